"""Lp balls: norm, projection, gradient step and random sampling in L∞, L2 and L1.

A perturbation is valid if it lies in the Lp ball of radius eps and image + perturbation lies in the box [0, 1].
Projections onto this intersection are exact. Projecting onto the ball and then clamping to the box is not: it stops
short of the nearest valid point. L1 after Croce & Hein, "Mind the Box", ICML 2021; L2 by the same argument.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustfpd.config import NORMS, Norm
from robustfpd.errors import InputError, unknown_name

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for the batch, or one per image, so that an image's draw does not depend on the other images."""
Radius = float | Tensor
"""One radius, or one per image, N×1×1×1."""
GPU_ITERATIONS = 30
"""Newton iterations where convergence is not checked; exact to rounding on all but contrived images."""
MAX_ITERATIONS = 200
CPU_CHUNK = 50_000
"""Values projected at once on a CPU."""


class LpBall(ABC):
    """Operations in one Lp norm. Images and perturbations are N×C×H×W, with one ball per image."""

    name: Norm

    @abstractmethod
    def norm(self, delta: Tensor) -> Tensor:
        """Return the norm of each perturbation, N."""

    @abstractmethod
    def project(self, delta: Tensor, images: Tensor, eps: Radius) -> Tensor:
        """Return the nearest perturbation (Euclidean) with norm at most eps and image + perturbation in [0, 1]."""

    def normalize(self, gradient: Tensor) -> Tensor:
        """Return an ascent direction for this gradient, of norm 1 in this ball; zero for a zero gradient.

        By default gradient / norm. Dividing by the largest entry first keeps squares of tiny gradients from
        underflowing.
        """
        largest = gradient.abs().flatten(1).amax(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
        gradient = gradient / per_image(largest)
        return gradient / per_image(self.norm(gradient).clamp_min(1e-6))

    @abstractmethod
    def sample(self, images: Tensor, eps: float, generator: Generators) -> Tensor:
        """Return random perturbations, uniform in the ball, then projected onto the box."""

    def step(self, x: Tensor, gradient: Tensor, step_size: Radius, images: Tensor, eps: float) -> None:
        """Move `x` by `step_size` along the normalized gradient and project it onto the ball around `images`, in place.

        NaN and infinite entries of the gradient count as zero.
        """
        delta = self.normalize(gradient.nan_to_num(0, 0, 0)).mul_(step_size).add_(x).sub_(images)
        torch.add(images, self.project(delta, images, eps), out=x)
        x.clamp_(0, 1)

    def step_scale(self, dimension: int) -> float:
        """Return the factor by which default step sizes are multiplied, for images of C·H·W = `dimension` values."""
        return 1.0


class Linf(LpBall):
    """L∞: the largest change of a pixel."""

    name = "linf"

    def norm(self, delta: Tensor) -> Tensor:
        """max |δ_i|."""
        return delta.abs().flatten(1).amax(dim=1)

    def project(self, delta: Tensor, images: Tensor, eps: Radius) -> Tensor:
        """Clamp to the ball and to the box; both are boxes, so this is exact."""
        return (images + delta.clamp(-eps, eps)).clamp(0, 1) - images  # type: ignore[arg-type]  # numbers or tensors

    def normalize(self, gradient: Tensor) -> Tensor:
        """sign(g)."""
        sign: Tensor = gradient.sign()
        return sign

    def step(self, x: Tensor, gradient: Tensor, step_size: Radius, images: Tensor, eps: float) -> None:
        """Step and project as the base class does, with one temporary tensor: small networks are memory-bound."""
        x.add_(gradient.nan_to_num(0, 0, 0).sign_().mul_(step_size))
        x.sub_(images).clamp_(-eps, eps).add_(images).clamp_(0, 1)

    def sample(self, images: Tensor, eps: float, generator: Generators) -> Tensor:
        """Uniform in [-eps, eps] per pixel."""
        return self.project(eps * (2 * _random(torch.rand, images, generator) - 1), images, eps)


class L2(LpBall):
    """L2: the Euclidean norm."""

    name = "l2"

    def norm(self, delta: Tensor) -> Tensor:
        """sqrt(Σ δ_i²)."""
        length: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        return length

    def project(self, delta: Tensor, images: Tensor, eps: Radius) -> Tensor:
        """Scale all coordinates by one factor s, each cut off at the box: |δ_i| = min(s·|d_i|, room_i)."""
        return _in_chunks(_project_l2, delta, images, eps)

    def sample(self, images: Tensor, eps: float, generator: Generators) -> Tensor:
        """Gaussian direction, radius ∝ u^(1/d)."""
        direction = self.normalize(_random(torch.randn, images, generator))
        return self.project(direction * _random_radius(images, eps, generator), images, eps)


class L1(LpBall):
    """L1: the sum of all changes.

    `normalize` returns g / ‖g‖₁, which is dense: the projection decides which pixels change. The steepest L1 step
    changes a single pixel and needs hundreds of iterations. The dense step has the same optima on a linear loss: the
    projection lowers all pixels alike, so only those with the largest slopes remain.
    """

    name = "l1"

    def norm(self, delta: Tensor) -> Tensor:
        """Σ |δ_i|."""
        return delta.abs().flatten(1).sum(dim=1)

    def project(self, delta: Tensor, images: Tensor, eps: Radius) -> Tensor:
        """Lower all magnitudes by one λ, each kept between zero and the box: |δ_i| = clip(|d_i| - λ, 0, room_i)."""
        return _in_chunks(_project_l1, delta, images, eps)

    def step_scale(self, dimension: int) -> float:
        """4·√d: the dense step moves each pixel by about 1/d only, and the projection takes most of that back."""
        return float(4 * dimension**0.5)

    def sample(self, images: Tensor, eps: float, generator: Generators) -> Tensor:
        """Exponential magnitudes with random signs, normalized (uniform on the sphere); radius ∝ u^(1/d)."""
        magnitudes = -_random(torch.rand, images, generator).clamp_min(1e-12).log()
        signs = (2 * _random(torch.rand, images, generator) - 1).sign()
        direction = magnitudes / per_image(self.norm(magnitudes)) * signs
        return self.project(direction * _random_radius(images, eps, generator), images, eps)


_BALLS: dict[str, LpBall] = {"linf": Linf(), "l2": L2(), "l1": L1()}


def lp_ball(norm: str, supported: tuple[str, ...] = NORMS, attack: str = "this attack") -> LpBall:
    """Return the Lp ball of a norm; raise an InputError unless it is among the norms that `attack` supports."""
    if norm not in _BALLS:
        raise unknown_name("norm", norm, supported)
    if norm not in supported:
        raise InputError(f"{attack} does not offer norm {norm!r}; it offers {', '.join(supported)}")
    return _BALLS[norm]


def _in_chunks(
    project: Callable[[Tensor, Tensor, Radius], Tensor], delta: Tensor, images: Tensor, eps: Radius
) -> Tensor:
    """Project a few images at a time on a CPU, so that intermediate results stay in its cache."""
    count = max(CPU_CHUNK // max(images.shape[1:].numel(), 1), 1)
    if delta.device.type != "cpu" or len(delta) <= count:
        return project(delta, images, eps)
    radii: Sequence[Radius] = torch.split(eps, count) if isinstance(eps, Tensor) else [eps] * len(delta)
    chunks = zip(torch.split(delta, count), torch.split(images, count), radii, strict=False)
    return torch.cat([project(*chunk) for chunk in chunks])


def _project_l2(delta: Tensor, images: Tensor, eps: Radius) -> Tensor:
    magnitude, room = _magnitude_and_room(delta, images)
    scale = _l2_scale(magnitude.square(), torch.minimum(magnitude, room).square_(), _column(eps))
    return (delta * per_image(scale.to(delta.dtype))).clamp(-images, 1 - images)


def _project_l1(delta: Tensor, images: Tensor, eps: Radius) -> Tensor:
    magnitude, room = _magnitude_and_room(delta, images)
    lowered = torch.minimum((magnitude - _l1_threshold(magnitude, room, _column(eps))).clamp_min_(0), room)
    return lowered.to(delta.dtype).reshape(delta.shape).copysign(delta)


def _magnitude_and_room(delta: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return |delta| and how far each pixel may move in that direction within [0, 1]; both N×D in float64."""
    flat = delta.flatten(1).double()
    room = (0.5 - images.flatten(1).double()).mul_(flat.sign()).add_(0.5)  # 1 - x upwards, x downwards
    return flat.abs(), room.clamp_min_(0)


def _l2_scale(squared: Tensor, cap: Tensor, eps: Radius) -> Tensor:
    """Return factors s ≤ 1, N×1, with Σ min(s²·squared_i, cap_i) = eps², or 1 where that sum stays below.

    Newton's method on s²: the sum is concave and piecewise linear in it, so steps from the left never overshoot, and
    the step within the solution's piece is exact.
    """
    s2 = (eps**2 / squared.sum(dim=1, keepdim=True).clamp_min(1e-300)).clamp_max_(1)
    scaled, free = torch.empty_like(squared), torch.empty_like(squared)
    for _ in range(MAX_ITERATIONS if _can_synchronize(squared) else GPU_ITERATIONS):
        torch.mul(squared, s2, out=scaled)
        torch.lt(scaled, cap, out=free)
        missing = eps**2 - torch.minimum(scaled, cap, out=scaled).sum(dim=1, keepdim=True)
        if _can_synchronize(squared) and bool(((missing <= 1e-14 * eps**2) | (s2 >= 1)).all()):
            break
        slope: Tensor = torch.linalg.vecdot(free, squared).unsqueeze(1)
        s2 = (s2 + missing.clamp_min_(0) / slope.clamp_min(1e-300)).clamp_max_(1)
    return s2.sqrt_()


def _l1_threshold(magnitude: Tensor, room: Tensor, eps: Radius) -> Tensor:
    """Return λ ≥ 0, N×1, with Σ clip(magnitude_i - λ, 0, room_i) = eps, or 0 where that sum stays below.

    Newton's method between bounds that close in: the sum falls piecewise linearly, so the last step is exact. Where a
    step leaves the bounds, and every tenth time, they are halved instead.
    """
    leaves_box = (magnitude - room).clamp_min_(0)  # the λ from which a coordinate at the box starts to fall
    low, high = torch.zeros_like(magnitude[:, :1]), magnitude.amax(dim=1, keepdim=True)
    threshold, rounding = low, 1e-13 * eps + 1e-15 * magnitude.sum(dim=1, keepdim=True)
    buffer = torch.empty_like(magnitude)
    for iteration in range(MAX_ITERATIONS if _can_synchronize(magnitude) else GPU_ITERATIONS):
        excess = slope = torch.zeros_like(threshold)
        for kink, sign in ((magnitude, 1), (leaves_box, -1)):
            above = torch.sub(kink, threshold, out=buffer).clamp_min_(0)
            excess = excess + sign * above.sum(dim=1, keepdim=True)
            slope = slope + sign * above.sign_().sum(dim=1, keepdim=True)
        excess = excess - eps
        low, high = torch.where(excess > 0, threshold, low), torch.where(excess > 0, high, threshold)
        converged = excess.abs() <= rounding
        if _can_synchronize(magnitude) and bool((converged | (high <= low)).all()):
            break
        newton = threshold + excess / slope.clamp_min(1)
        inside = (newton > low) & (newton < high) & (iteration % 10 < 9)
        threshold = torch.where(converged, threshold, torch.where(inside, newton, (low + high) / 2))
    return torch.where(converged, threshold, high)  # not converged: the bound that stays in the ball


def _can_synchronize(values: Tensor) -> bool:
    """Return whether a convergence check is cheap; on a GPU it synchronizes with all queued work."""
    return values.device.type == "cpu"


def per_image(values: Tensor) -> Tensor:
    """Return N values as N×1×1×1, to multiply images by."""
    return values.reshape(-1, 1, 1, 1)


def _column(eps: Radius) -> Radius:
    return eps.reshape(-1, 1).double() if isinstance(eps, Tensor) else eps  # N 1


def _random_radius(images: Tensor, eps: float, generator: Generators) -> Tensor:
    """Return eps·u^(1/d), N×1×1×1: the radius of a uniform point of a d-dimensional ball."""
    u = _random(torch.rand, images[:, :1, :1, :1], generator)
    return eps * u ** (1 / images[0].numel())


def _random(draw: Callable[..., Tensor], like: Tensor, generator: Generators) -> Tensor:
    """Return draws of `torch.rand` or `torch.randn` with the shape, dtype and device of `like`."""
    if isinstance(generator, torch.Generator):
        return draw(like.shape, generator=generator, device=generator.device).to(like)
    return torch.stack([draw(like.shape[1:], generator=g, device=g.device) for g in generator]).to(like)
