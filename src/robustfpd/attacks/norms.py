"""Three geometries, each with the three operations that gradient attacks need.

Perturbations live in the intersection of a norm ball around the image and the box [0, 1]. Projections
onto that intersection are exact (not ball first, box second, which stops short of the nearest point):
for L1 after Croce & Hein, "Mind the Box", ICML 2021; for L2 by the same argument.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustfpd.config import NORMS, Norm
from robustfpd.errors import InputError, unknown_name

Draws = torch.Generator | Sequence[torch.Generator]
"""Where random numbers come from: one source, or one for each image, so that none depends on the others."""
Radius = float | Tensor
"""One radius, or one for each image, N×1×1×1."""
CERTAIN = 30
"""Rounds after which a projection is exact to rounding on all but contrived images, where none may be looked at."""
MOST_ROUNDS = 200
CACHED = 50_000
"""Values that are projected at once on a CPU."""


class LpBall(ABC):
    """Operations in one norm. Perturbations are N×C×H×W, one ball per image."""

    name: Norm

    @abstractmethod
    def norm(self, delta: Tensor) -> Tensor:
        """Norm of each perturbation, N."""

    @abstractmethod
    def project(self, delta: Tensor, images: Tensor, eps: Radius) -> Tensor:
        """Nearest perturbation (Euclidean) with norm ≤ eps and image + perturbation in [0, 1]."""

    @abstractmethod
    def normalize(self, gradient: Tensor) -> Tensor:
        """Direction in which to raise a loss with this gradient; a step of size 1 in this norm."""

    @abstractmethod
    def sample(self, images: Tensor, eps: float, generator: Draws) -> Tensor:
        """Random perturbation, uniform in the ball, then projected onto the box."""

    def step(self, x: Tensor, gradient: Tensor, size: Radius, images: Tensor, eps: float) -> None:
        """Move `x`, points of the balls around `images`, a step of `size` up the gradient and project them, in place.

        NaN in a gradient moves nothing.
        """
        delta = self.normalize(gradient.nan_to_num(0, 0, 0)).mul_(size).add_(x).sub_(images)
        torch.add(images, self.project(delta, images, eps), out=x)
        x.clamp_(0, 1)

    def step_scale(self, pixels: int) -> float:
        """How many times longer than in other norms a step must be to lead as far."""
        return 1.0


class Linf(LpBall):
    """Largest change of any pixel."""

    name = "linf"

    def norm(self, delta: Tensor) -> Tensor:
        """Largest magnitude."""
        return delta.abs().flatten(1).amax(dim=1)

    def project(self, delta: Tensor, images: Tensor, eps: Radius) -> Tensor:
        """Ball and box are both boxes: clamping to each is exact."""
        return (images + delta.clamp(-eps, eps)).clamp(0, 1) - images  # type: ignore[arg-type]  # numbers or tensors

    def normalize(self, gradient: Tensor) -> Tensor:
        """Sign of the gradient."""
        sign: Tensor = gradient.sign()
        return sign

    def step(self, x: Tensor, gradient: Tensor, size: Radius, images: Tensor, eps: float) -> None:
        """As elsewhere, with one temporary: cheap networks take hardly longer than passes over their images."""
        x.add_(gradient.nan_to_num(0, 0, 0).sign_().mul_(size))
        x.sub_(images).clamp_(-eps, eps).add_(images).clamp_(0, 1)

    def sample(self, images: Tensor, eps: float, generator: Draws) -> Tensor:
        """Uniform in [-eps, eps] per pixel."""
        return self.project(eps * (2 * _uniform(images, generator) - 1), images, eps)


class L2(LpBall):
    """Euclidean length."""

    name = "l2"

    def norm(self, delta: Tensor) -> Tensor:
        """Root of the sum of squares."""
        length: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        return length

    def project(self, delta: Tensor, images: Tensor, eps: Radius) -> Tensor:
        """Shrink all coordinates by one factor s, each stopped at the box: |δ_i| = min(s·|d_i|, room_i)."""
        return _in_parts(_shrunk, delta, images, eps)

    def normalize(self, gradient: Tensor) -> Tensor:
        """Gradient over its length."""
        gradient = _scaled(gradient)
        return gradient / _per_image(self.norm(gradient).clamp_min(1e-6))

    def sample(self, images: Tensor, eps: float, generator: Draws) -> Tensor:
        """Gaussian direction, radius ∝ u^(1/d)."""
        direction = self.normalize(_normal(images, generator))
        u = _uniform(images[:, :1, :1, :1], generator)
        return self.project(direction * (eps * u ** (1 / images[0].numel())), images, eps)


class L1(LpBall):
    """Sum of all changes."""

    name = "l1"

    def norm(self, delta: Tensor) -> Tensor:
        """Sum of magnitudes."""
        return delta.abs().flatten(1).sum(dim=1)

    def project(self, delta: Tensor, images: Tensor, eps: Radius) -> Tensor:
        """Lower all magnitudes by one λ, each kept within zero and the box: |δ_i| = clip(|d_i| - λ, 0, room_i)."""
        return _in_parts(_lowered, delta, images, eps)

    def normalize(self, gradient: Tensor) -> Tensor:
        """Gradient over its L1 norm: dense, so that the projection decides which pixels change.

        The steepest step changes one pixel alone and needs hundreds of iterations. The dense step's fixed
        points on a linear loss are exactly the optima: the projection lowers all pixels alike, so only
        those with the steepest slopes, up to the box, survive.
        """
        gradient = _scaled(gradient)
        return gradient / _per_image(self.norm(gradient).clamp_min(1e-6))

    def step_scale(self, pixels: int) -> float:
        """4·√d: the dense step moves each pixel by about 1/d only, and the projection takes most of that back."""
        return float(4 * pixels**0.5)

    def sample(self, images: Tensor, eps: float, generator: Draws) -> Tensor:
        """Exponential magnitudes with random signs, normalised: uniform on the sphere; radius ∝ u^(1/d)."""
        magnitudes = -_uniform(images, generator).clamp_min(1e-12).log()
        signs = (2 * _uniform(images, generator) - 1).sign()
        direction = magnitudes / _per_image(self.norm(magnitudes)) * signs
        u = _uniform(images[:, :1, :1, :1], generator)
        return self.project(direction * (eps * u ** (1 / images[0].numel())), images, eps)


_BALLS: dict[str, LpBall] = {g.name: g for g in (Linf(), L2(), L1())}


def lp_ball(norm: str, offered: tuple[str, ...] = NORMS, attack: str = "this attack") -> LpBall:
    """Return the geometry of a norm; one that is unknown or not among `offered` is an InputError."""
    if norm not in _BALLS:
        raise unknown_name("norm", norm, offered)
    if norm not in offered:
        raise InputError(f"{attack} does not offer norm {norm!r}; it offers {', '.join(offered)}")
    return _BALLS[norm]


def _in_parts(
    project: Callable[[Tensor, Tensor, Radius], Tensor], delta: Tensor, images: Tensor, eps: Radius
) -> Tensor:
    """Project a few images at a time on a CPU: what is computed of them on the way stays in its cache."""
    few = max(CACHED // max(images.shape[1:].numel(), 1), 1)
    if delta.device.type != "cpu" or len(delta) <= few:
        return project(delta, images, eps)
    radii: Sequence[Radius] = torch.split(eps, few) if isinstance(eps, Tensor) else [eps] * len(delta)
    parts = zip(torch.split(delta, few), torch.split(images, few), radii, strict=False)
    return torch.cat([project(*part) for part in parts])


def _shrunk(delta: Tensor, images: Tensor, eps: Radius) -> Tensor:
    a, room = _magnitudes(delta, images)
    s = _shrinkage(a.square(), torch.minimum(a, room).square_(), _column(eps))
    return (delta * _per_image(s.to(delta.dtype))).clamp(-images, 1 - images)


def _lowered(delta: Tensor, images: Tensor, eps: Radius) -> Tensor:
    a, room = _magnitudes(delta, images)
    lowered = (a - _lowering(a, room, _column(eps))).clamp_min_(0)
    return _signed(torch.minimum(lowered, room), delta)


def _magnitudes(delta: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude of each coordinate and how far it may go before the pixel leaves [0, 1]; both N×D, float64."""
    flat = delta.flatten(1).double()
    room = (0.5 - images.flatten(1).double()).mul_(flat.sign()).add_(0.5)  # 1 - x upwards, x downwards
    return flat.abs(), room.clamp_min_(0)


def _signed(magnitude: Tensor, delta: Tensor) -> Tensor:
    return magnitude.to(delta.dtype).reshape(delta.shape).copysign(delta)


def _shrinkage(a2: Tensor, cap2: Tensor, eps: Radius) -> Tensor:
    """N×1 factors s ≤ 1 with Σ min(s²·a_i², cap_i²) = eps², or 1 where that sum stays below.

    Newton's steps on s²: the sum is concave and piecewise linear in it, so that steps from the left never go too far
    and the last one, in the piece of the solution, is exact.
    """
    s2 = (eps**2 / a2.sum(dim=1, keepdim=True).clamp_min(1e-300)).clamp_max_(1)
    grown, free = torch.empty_like(a2), torch.empty_like(a2)
    for _ in range(_rounds(a2)):
        torch.mul(a2, s2, out=grown)
        torch.lt(grown, cap2, out=free)
        missing = eps**2 - torch.minimum(grown, cap2, out=grown).sum(dim=1, keepdim=True)
        if _may_look(a2) and bool(((missing <= 1e-14 * eps**2) | (s2 >= 1)).all()):
            break
        s2 = (s2 + missing.clamp_min_(0) / _dot(free, a2).clamp_min_(1e-300)).clamp_max_(1)
    return s2.sqrt_()


def _lowering(a: Tensor, room: Tensor, eps: Radius) -> Tensor:
    """N×1 amounts λ ≥ 0 with Σ clip(a_i - λ, 0, room_i) = eps, or 0 where that sum stays below.

    Newton's steps between bounds that close in: the sum falls piecewise linearly, so that the last one is exact. Where
    a step leaves the bounds, and every tenth time, they are halved.
    """
    late = (a - room).clamp_min_(0)  # where a coordinate that the box holds back starts to fall
    low, high = torch.zeros_like(a[:, :1]), a.amax(dim=1, keepdim=True)
    amount, rounding = low, 1e-13 * eps + 1e-15 * a.sum(dim=1, keepdim=True)
    buffer = torch.empty_like(a)
    for turn in range(_rounds(a)):
        over = falling = torch.zeros_like(amount)
        for points, sign in ((a, 1), (late, -1)):
            left = torch.sub(points, amount, out=buffer).clamp_min_(0)
            over = over + sign * left.sum(dim=1, keepdim=True)
            falling = falling + sign * left.sign_().sum(dim=1, keepdim=True)
        over = over - eps
        low, high = torch.where(over > 0, amount, low), torch.where(over > 0, high, amount)
        found = over.abs() <= rounding
        if _may_look(a) and bool((found | (high <= low)).all()):
            break
        step = amount + over / falling.clamp_min(1)
        inside = (step > low) & (step < high) & (turn % 10 < 9)
        amount = torch.where(found, amount, torch.where(inside, step, (low + high) / 2))
    return torch.where(found, amount, high)  # where rounds did not suffice, the side that stays in the ball


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a, b)
    return product.unsqueeze(1)


def _may_look(values: Tensor) -> bool:
    """Whether it costs nothing to ask how far a computation is; a GPU would have to finish all that waits first."""
    return values.device.type == "cpu"


def _rounds(values: Tensor) -> int:
    return MOST_ROUNDS if _may_look(values) else CERTAIN


def _scaled(gradient: Tensor) -> Tensor:
    """Gradient over its largest entry: squares of tiny gradients would underflow."""
    return gradient / _per_image(gradient.abs().flatten(1).amax(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny))


def _per_image(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)  # N 1 1 1


def _column(eps: Radius) -> Radius:
    return eps.reshape(-1, 1).double() if isinstance(eps, Tensor) else eps  # N 1


def _uniform(like: Tensor, generator: Draws) -> Tensor:
    return _drawn(torch.rand, like, generator)


def _normal(like: Tensor, generator: Draws) -> Tensor:
    return _drawn(torch.randn, like, generator)


def _drawn(draw: Callable[..., Tensor], like: Tensor, generator: Draws) -> Tensor:
    if isinstance(generator, torch.Generator):
        return draw(like.shape, generator=generator, device=generator.device).to(like)
    return torch.stack([draw(like.shape[1:], generator=g, device=g.device) for g in generator]).to(like)
