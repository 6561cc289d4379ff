"""Three geometries, each with the three operations that gradient attacks need.

Perturbations live in the intersection of a norm ball around the image and the box [0, 1]. Projections
onto that intersection are exact (not ball first, box second, which stops short of the nearest point):
for L1 after Croce & Hein, "Mind the Box", ICML 2021; for L2 by the same argument.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from robustfpd.config import NORMS, Norm
from robustfpd.errors import InputError, unknown_name


class Geometry(ABC):
    """Operations in one norm. Perturbations are N×C×H×W, one ball per image."""

    name: Norm

    @abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """Norm of each perturbation, N."""

    @abstractmethod
    def project(self, delta: Tensor, images: Tensor, eps: float) -> Tensor:
        """Nearest perturbation (Euclidean) with norm ≤ eps and image + perturbation in [0, 1]."""

    @abstractmethod
    def ascent(self, gradient: Tensor) -> Tensor:
        """Direction in which to raise a loss with this gradient; a step of size 1 in this norm."""

    @abstractmethod
    def sample(self, images: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Random perturbation, uniform in the ball, then projected onto the box."""

    def stride(self, pixels: int) -> float:
        """How many times longer than in other norms a step must be to lead as far."""
        return 1.0


class Linf(Geometry):
    """Largest change of any pixel."""

    name = "linf"

    def size(self, delta: Tensor) -> Tensor:
        """Largest magnitude."""
        return delta.abs().flatten(1).amax(dim=1)

    def project(self, delta: Tensor, images: Tensor, eps: float) -> Tensor:
        """Ball and box are both boxes: clamping to each is exact."""
        return (images + delta.clamp(-eps, eps)).clamp(0, 1) - images

    def ascent(self, gradient: Tensor) -> Tensor:
        """Sign of the gradient."""
        sign: Tensor = gradient.sign()
        return sign

    def sample(self, images: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Uniform in [-eps, eps] per pixel."""
        return self.project(eps * (2 * _uniform(images, generator) - 1), images, eps)


class L2(Geometry):
    """Euclidean length."""

    name = "l2"

    def size(self, delta: Tensor) -> Tensor:
        """Root of the sum of squares."""
        length: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        return length

    def project(self, delta: Tensor, images: Tensor, eps: float) -> Tensor:
        """Shrink all coordinates by one factor s, each stopped at the box: |δ_i| = min(s·|d_i|, room_i)."""
        a, room = _magnitudes(delta, images)
        cap = torch.minimum(a, room)
        s = _shrinkage(a, cap, eps)
        return _signed(torch.minimum(s * a, cap), delta)

    def ascent(self, gradient: Tensor) -> Tensor:
        """Gradient over its length."""
        gradient = _scaled(gradient)
        return gradient / _per_image(self.size(gradient).clamp_min(1e-6))

    def sample(self, images: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Gaussian direction, radius ∝ u^(1/d)."""
        direction = self.ascent(_normal(images, generator))
        u = torch.rand(len(images), generator=generator, device=generator.device).to(images)
        return self.project(direction * _per_image(eps * u ** (1 / images[0].numel())), images, eps)


class L1(Geometry):
    """Sum of all changes."""

    name = "l1"

    def size(self, delta: Tensor) -> Tensor:
        """Sum of magnitudes."""
        return delta.abs().flatten(1).sum(dim=1)

    def project(self, delta: Tensor, images: Tensor, eps: float) -> Tensor:
        """Lower all magnitudes by one λ, each kept within zero and the box: |δ_i| = clip(|d_i| - λ, 0, room_i)."""
        a, room = _magnitudes(delta, images)
        lowered = (a - _lowering(a, room, eps)).clamp_min(0)
        return _signed(torch.minimum(lowered, room), delta)

    def ascent(self, gradient: Tensor) -> Tensor:
        """Gradient over its L1 norm: dense, so that the projection decides which pixels change.

        The steepest step changes one pixel alone and needs hundreds of iterations. The dense step's fixed
        points on a linear loss are exactly the optima: the projection lowers all pixels alike, so only
        those with the steepest slopes, up to the box, survive.
        """
        gradient = _scaled(gradient)
        return gradient / _per_image(self.size(gradient).clamp_min(1e-6))

    def stride(self, pixels: int) -> float:
        """4·√d: the dense step moves each pixel by about 1/d only, and the projection takes most of that back."""
        return float(4 * pixels**0.5)

    def sample(self, images: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Exponential magnitudes with random signs, normalised: uniform on the sphere; radius ∝ u^(1/d)."""
        magnitudes = -_uniform(images, generator).clamp_min(1e-12).log()
        signs = (2 * _uniform(images, generator) - 1).sign()
        direction = magnitudes / _per_image(self.size(magnitudes)) * signs
        u = torch.rand(len(images), generator=generator, device=generator.device).to(images)
        return self.project(direction * _per_image(eps * u ** (1 / images[0].numel())), images, eps)


_GEOMETRIES: dict[str, Geometry] = {g.name: g for g in (Linf(), L2(), L1())}


def geometry(norm: str, offered: tuple[str, ...] = NORMS, attack: str = "this attack") -> Geometry:
    """Return the geometry of a norm; one that is unknown or not among `offered` is an InputError."""
    if norm not in _GEOMETRIES:
        raise unknown_name("norm", norm, offered)
    if norm not in offered:
        raise InputError(f"{attack} does not offer norm {norm!r}; it offers {', '.join(offered)}")
    return _GEOMETRIES[norm]


def _magnitudes(delta: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude of each coordinate and how far it may go before the pixel leaves [0, 1]; both N×D, float64."""
    room = torch.where(delta >= 0, 1 - images, images)
    return delta.abs().flatten(1).double(), room.flatten(1).double().clamp_min(0)


def _signed(magnitude: Tensor, delta: Tensor) -> Tensor:
    return magnitude.to(delta.dtype).reshape(delta.shape).copysign(delta)


def _shrinkage(a: Tensor, cap: Tensor, eps: float) -> Tensor:
    """N×1 factors s ≤ 1 with Σ min(s·a_i, cap_i)² = eps², or 1 where that sum stays below.

    A coordinate reaches its cap at s = cap_i / a_i; between such points the sum is quadratic in s.
    """
    at = torch.where(a > 0, cap / a.clamp_min(1e-300), torch.ones_like(a))
    at, order = at.sort(dim=1)
    a2, cap2 = a.gather(1, order).square(), cap.gather(1, order).square()
    capped = cap2.cumsum(dim=1)  # coordinates up to and with this one stand at their caps
    free = a2.sum(dim=1, keepdim=True) - a2.cumsum(dim=1)
    below = (capped + at.square() * free.clamp_min(0) < eps**2).sum(dim=1, keepdim=True)
    zero = torch.zeros_like(capped[:, :1])
    held = torch.cat([zero, capped], dim=1).gather(1, below)
    rest = torch.cat([a2.sum(dim=1, keepdim=True), free], dim=1).gather(1, below)
    s = ((eps**2 - held).clamp_min(0) / rest.clamp_min(1e-300)).sqrt().clamp_max(1)
    fits = cap.square().sum(dim=1, keepdim=True) <= eps**2
    return torch.where(fits, torch.ones_like(s), s)


def _lowering(a: Tensor, room: Tensor, eps: float) -> Tensor:
    """N×1 amounts λ ≥ 0 with Σ clip(a_i - λ, 0, room_i) = eps, or 0 where that sum stays below.

    A coordinate starts to fall at λ = a_i - room_i (or at once) and is zero at λ = a_i; between such
    points the sum is linear in λ.
    """
    points, order = torch.cat([(a - room).clamp_min(0), a], dim=1).sort(dim=1)
    change = torch.cat([torch.ones_like(a), -torch.ones_like(a)], dim=1).gather(1, order)
    falling = change.cumsum(dim=1)  # coordinates that fall just after each point
    total = torch.minimum(a, room).sum(dim=1, keepdim=True)
    drops = falling[:, :-1] * points.diff(dim=1)
    sums = torch.cat([total, total - drops.cumsum(dim=1)], dim=1)  # the sum at each point; the first is at λ = 0
    last = ((sums > eps).sum(dim=1, keepdim=True) - 1).clamp_min(0)
    start, over = points.gather(1, last), sums.gather(1, last) - eps
    amount = start + over / falling.gather(1, last).clamp_min(1)
    return torch.where(total <= eps, torch.zeros_like(amount), amount)


def _scaled(gradient: Tensor) -> Tensor:
    """Gradient over its largest entry: squares of tiny gradients would underflow."""
    return gradient / _per_image(gradient.abs().flatten(1).amax(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny))


def _per_image(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)  # N 1 1 1


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=generator.device).to(like)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like)
