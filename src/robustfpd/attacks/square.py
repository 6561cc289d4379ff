"""Square Attack: random search over windows of pixels, by logits alone.

Andriushchenko et al., ECCV 2020, algorithms 1 to 3; L1 after Croce & Hein, "Mind the box", ICML 2021, appendix.
The published code raises an error in L2 and L1 on images that are not square and on many small ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from robustfpd.attacks.adapters import misclassified
from robustfpd.attacks.base import attack, check_counts, num_classes, record_queries
from robustfpd.attacks.batching import SampleRNG
from robustfpd.attacks.losses import margin
from robustfpd.attacks.norms import LpBall, lp_ball, per_image
from robustfpd.config import Norm

FIRST_FRACTION = 0.8
"""Fraction of the pixels in the first windows."""
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, after which that fraction is halved."""
TILES = 5
"""Tiles along the shorter side of the starting point, in L2 and L1."""
CHUNK = 256
"""Queries for which an image's random numbers are drawn at once."""


@attack("square", access="scores")
@torch.no_grad()
def square(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", queries: int = 5000,
    restarts: int = 1, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Square Attack: random search over windows of pixels, by logits alone (Andriushchenko et al., ECCV 2020).

    Each query changes the perturbation in a window and keeps the change if it raises the margin. Windows are squares,
    cut to the height and width of the images, which may have any shape. An image's random numbers depend on its
    position only. Arguments, result and errors as in `pgd`. Records the queries per image.

    Options:
        queries: forward passes per image and restart.
        restarts: random searches per image; an image is not attacked again once it is misclassified.
    """
    check_counts(queries=queries, restarts=restarts)
    assert generator is not None  # Attack.__call__ sets it
    num_classes(classifier, images, labels)
    ball, rng, result = lp_ball(norm), SampleRNG(generator), images.clone()
    done = misclassified(classifier, images, labels)
    used = torch.ones(len(images), dtype=torch.long, device=images.device)
    for restart in range(restarts):
        rows = (~done).nonzero().flatten()
        if len(rows) == 0:
            break
        draws = _Draws(rng.generators(rows, [restart] * len(rows)), images.device)
        x, y = images[rows], labels[rows]
        best = _start(ball, x, eps, draws)
        loss, success = _evaluate(classifier, best, y)
        result[rows], done[rows] = best, success
        used[rows] += 1
        for query in range(queries - 1):
            if bool(success.any()):
                rows, x, y, best, loss = (values[~success] for values in (rows, x, y, best, loss))
                draws.keep(~success)
            if len(rows) == 0:
                break
            candidates = _propose(ball, x, best, eps, window_side(query / queries, x.shape[2:], norm), draws)
            candidate_loss, success = _evaluate(classifier, candidates, y)
            better = success | (candidate_loss > loss)
            best = torch.where(per_image(better), candidates, best)
            loss = torch.where(better, candidate_loss, loss)
            result[rows], done[rows] = best, success
            used[rows] += 1
    record_queries(classifier, used)
    return result


def window_side(progress: float, shape: Sequence[int], norm: Norm) -> int:
    """Return the side of the windows at a fraction of all queries, in pixels; in L2 and L1 it is odd and at least 3."""
    fraction = FIRST_FRACTION * 0.5 ** sum(progress > after / 10_000 for after in HALVED_AFTER)
    side = round(math.sqrt(fraction * shape[0] * shape[1]))
    return max(side, 1) if norm == "linf" else max(side, 3) | 1


class _Draws:
    """Random numbers, uniform in [0, 1), of each image from its own generator."""

    def __init__(self, generators: Sequence[torch.Generator], device: torch.device) -> None:
        self.generators, self.device = generators, device
        self._chunk, self._position = torch.empty(0), CHUNK

    def once(self, *shape: int) -> Tensor:
        """Return numbers N×shape."""
        draws = torch.stack([torch.rand(shape, generator=g, device=g.device) for g in self.generators])
        return draws.to(self.device)

    def next(self, count: int) -> Tensor:
        """Return the numbers of one query, N×count, always the same `count`."""
        if self._position == CHUNK:
            self._chunk, self._position = self.once(CHUNK, count), 0
        self._position += 1
        return self._chunk[:, self._position - 1]

    def keep(self, rows: Tensor) -> None:
        """Keep these images, N booleans."""
        self.generators = [g for g, kept in zip(self.generators, rows.tolist(), strict=True) if kept]
        self._chunk = self._chunk[rows] if self._position < CHUNK else self._chunk


def _evaluate(classifier: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the margin of each image, -∞ where logits are not finite, and whether it is misclassified."""
    logits: Tensor = classifier(images)
    finite = logits.isfinite().all(dim=1)
    return torch.where(finite, margin(logits, labels), -torch.inf), finite & (logits.argmax(dim=1) != labels)


def _start(ball: LpBall, x: Tensor, eps: float, draws: _Draws) -> Tensor:
    """Return the starting points: vertical stripes in L∞, pyramids in tiles in L2 and L1."""
    channels, height, width = x.shape[1:]
    if ball.name == "linf":
        return (x + eps * _signs(draws.once(channels, 1, width), x)).clamp(0, 1)
    side = max(min(height, width) // TILES, 1)
    rows, columns = height // side, width // side
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    tile = _pyramids(side, side, _power(ball)).to(x)
    transposed = draws.once(rows, columns, 1, 1) < 0.5
    tiles = torch.where(transposed, tile.T, tile).unsqueeze(1)  # N 1 rows columns side side
    tiles = tiles * _signs(draws.once(channels, rows, columns, 1, 1), x)  # N C rows columns side side
    delta = torch.zeros_like(x)
    delta[:, :, top : top + rows * side, left : left + columns * side] = tiles.transpose(3, 4).flatten(4).flatten(2, 3)
    return _fill(ball, x, delta, eps)


def _propose(ball: LpBall, x: Tensor, best: Tensor, eps: float, side: int, draws: _Draws) -> Tensor:
    """Return candidates whose perturbation differs from the best one's in one window (L∞), or in two (L2, L1)."""
    channels, height, width = x.shape[1:]
    size = min(side, height), min(side, width)
    if ball.name == "linf":
        numbers = draws.next(2 + channels)
        window = _window(numbers[:, :2], size, x.shape[2:])
        changed = (x + eps * _signs(numbers[:, 2:], x)[..., None, None]).clamp(0, 1)
        candidates = best.flatten(2)
        window = window.unsqueeze(1).expand(-1, channels, -1)
        return candidates.scatter(2, window, changed.flatten(2).gather(2, window)).reshape(x.shape)
    return _fill(ball, x, _move_mass(best - x, eps, size, _power(ball), draws), eps)


def _move_mass(delta: Tensor, eps: float, size: tuple[int, int], power: int, draws: _Draws) -> Tensor:
    """Empty two windows of each perturbation; put their mass Σ|δ|^power, and what is unused, into the first one.

    The new values are the window's own shape plus a pair of pyramids of opposite signs, with a random sign a channel.
    """
    channels = delta.shape[1]
    numbers = draws.next(5 + channels)

    def mass(values: Tensor) -> Tensor:
        return values.abs().pow(power).sum(dim=2, keepdim=True)  # N C 1

    windows = (_window(numbers[:, i : i + 2], size, delta.shape[2:]) for i in (0, 2))
    first, second = (window.unsqueeze(1).expand(-1, channels, -1) for window in windows)  # N C size
    flat = delta.flatten(2)
    old = flat.gather(2, first)
    emptied = flat.scatter(2, second, 0).scatter(2, first, 0)
    unused = (eps**power - mass(flat).sum(dim=1, keepdim=True)).clamp_min(0) / channels
    freed = (mass(flat) - mass(emptied)).clamp_min(0)
    upright, lying = _pyramids(*size, power), _pyramids(*size[::-1], power).T
    lies = numbers[:, 4, None] < 0.5
    pyramids = torch.where(lies, lying.flatten().to(delta), upright.flatten().to(delta)).unsqueeze(1)  # N 1 size
    new = pyramids * _signs(numbers[:, 5:], delta).unsqueeze(2) + old / mass(old).pow(1 / power).clamp_min(1e-12)
    budget = (unused + freed) * (channels if power == 1 else 1)  # L1 takes more, and the projection removes the rest
    new = new / mass(new).pow(1 / power).clamp_min(1e-12) * budget.pow(1 / power)
    return emptied.scatter(2, first, new).reshape(delta.shape)


def _fill(ball: LpBall, x: Tensor, delta: Tensor, eps: float) -> Tensor:
    """Return x + delta, brought into ball ∩ [0, 1]; in L2 after scaling delta to length eps."""
    if ball.name == "l2":
        return (x + delta * per_image(eps / ball.norm(delta).clamp_min(1e-12))).clamp(0, 1)
    return (x + ball.project(delta, x, eps)).clamp(0, 1)


def _window(numbers: Tensor, size: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """Return the indices, in H·W, of one window at a random position per image, N×(height·width of the window)."""
    limits = torch.tensor([shape[0] - size[0], shape[1] - size[1]], device=numbers.device)
    corner = torch.minimum((numbers * (limits + 1)).long(), limits)  # N 2; rounding may reach the limit + 1
    rows = corner[:, :1] + torch.arange(size[0], device=numbers.device)
    columns = corner[:, 1:] + torch.arange(size[1], device=numbers.device)
    return (rows.unsqueeze(2) * shape[1] + columns.unsqueeze(1)).flatten(1)


def _signs(numbers: Tensor, like: Tensor) -> Tensor:
    """Return ±1 for numbers in [0, 1)."""
    return torch.where(numbers < 0.5, -1.0, 1.0).to(like)


def _power(ball: LpBall) -> int:
    """Return p of the norm (Σ|δ|^p)^(1/p)."""
    return 1 if ball.name == "l1" else 2


@cache
def _pyramids(height: int, width: int, power: int) -> Tensor:
    """Return a positive pyramid above a negative one, height×width, of norm 1 (η in the paper)."""
    upper, lower = _pyramid(height // 2, width, power), _pyramid(height - height // 2, width, power)
    both = torch.cat([upper, -lower])
    return both / both.abs().pow(power).sum().pow(1 / power)


def _pyramid(height: int, width: int, power: int) -> Tensor:
    """Return concentric rectangles of falling height, height×width, of norm 1; empty without rows."""
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    distance = torch.maximum(rows.unsqueeze(1), columns)
    steps = 1.0 / torch.arange(1, max(height, width) // 2 + 2) ** (2 if power == 2 else 4)
    values = steps.flip(0).cumsum(0).flip(0)[distance]  # Σ over k ≥ distance of 1 / (k + 1)^2, in L1 ^4
    return values / values.abs().pow(power).sum().pow(1 / power)
