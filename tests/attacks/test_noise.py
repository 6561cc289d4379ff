from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustfpd.attacks import noise
from robustfpd.attacks.base import QueryCounter
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import NORMS, Norm
from robustfpd.errors import InputError


class _Watched(nn.Module):
    """Keeps what it is asked; every image belongs to class 0 unless `falls` says otherwise."""

    def __init__(self, falls: list[list[int]] | None = None) -> None:
        super().__init__()
        self.falls, self.asked = falls, list[Tensor]()

    def forward(self, images: Tensor) -> Tensor:
        self.asked.append(images.clone())
        logits = torch.tensor([1.0, 0.0]).repeat(len(images), 1)
        if self.falls is not None:
            for row in self.falls[len(self.asked) - 1]:
                logits[row] = torch.tensor([0.0, 1.0])
        return logits


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.05, 0.9])
def test_points_lie_in_ball_and_box_and_every_other_one_at_their_edge(corners: Tensor, norm: Norm, eps: float) -> None:
    watched = _Watched()
    labels = torch.zeros(12, dtype=torch.long)
    found = noise(watched, corners, labels, eps=eps, norm=norm, samples=6)
    assert len(watched.asked) == 6
    assert torch.equal(found, watched.asked[-1])
    for draw, points in enumerate(watched.asked):
        size = lp_ball(norm).norm(points - corners)
        assert float(size.max()) <= eps + 2e-6
        assert 0 <= float(points.min()) <= float(points.max()) <= 1
        if draw % 2 and norm == "linf":
            change = (points - corners).abs()
            at_edge = (change - eps).abs() < 1e-6
            assert bool((at_edge | (points == 0) | (points == 1)).all())
    inner, outer = (torch.stack([lp_ball(norm).norm(p - corners) for p in watched.asked[i::2]]) for i in (0, 1))
    assert float(outer.mean()) >= float(inner.mean())


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_far_points_lie_on_the_sphere_where_the_box_leaves_room(norm: Norm) -> None:
    watched, images = _Watched(), torch.full((5, 1, 8, 8), 0.5)
    noise(watched, images, torch.zeros(5, dtype=torch.long), eps=0.3, norm=norm, samples=4)
    for points in watched.asked[1::2]:
        torch.testing.assert_close(lp_ball(norm).norm(points - images), torch.full((5,), 0.3), rtol=1e-4, atol=1e-5)


def test_an_image_that_fell_is_not_asked_again_and_keeps_its_point(corners: Tensor) -> None:
    watched = _Watched([[1], [0, 2], [], []])
    counted = QueryCounter(watched)
    found = noise(counted, corners[:4], torch.zeros(4, dtype=torch.long), eps=0.1, samples=4)
    first, second, third, fourth = watched.asked
    assert [len(a) for a in watched.asked] == [4, 3, 1, 1]
    assert torch.equal(found[1], first[1])
    assert torch.equal(found[[0, 3]], second[[0, 2]])  # rows 0 and 2 of images 0, 2, 3
    assert torch.equal(found[2], fourth[0])
    assert not torch.equal(third, fourth)
    assert counted.per_image is not None
    assert counted.per_image.tolist() == [2, 1, 4, 2]
    assert counted.forward_passes == int(counted.per_image.sum())
    assert counted.backward_passes == 0


def test_it_stops_when_all_have_fallen(corners: Tensor) -> None:
    watched = _Watched([[0, 1], [0]])
    noise(watched, corners[:2], torch.zeros(2, dtype=torch.long), eps=0.1)
    assert len(watched.asked) == 1


@pytest.mark.parametrize("norm", NORMS)
def test_the_seed_decides_the_points(net: nn.Module, corners: Tensor, norm: Norm) -> None:
    labels = net(corners).argmax(1)

    def attack(seed: int | None) -> Tensor:
        draws = None if seed is None else torch.Generator().manual_seed(seed)
        return noise(net, corners, labels, eps=0.1, norm=norm, generator=draws)

    assert torch.equal(attack(5), attack(5))
    assert not torch.equal(attack(5), attack(6))
    assert torch.equal(attack(None), attack(0))


def test_it_needs_no_gradient_and_says_so(corners: Tensor) -> None:
    assert noise.access == "decisions"
    assert not noise.minimal
    with torch.inference_mode():
        found = noise(_Watched(), corners, torch.zeros(12, dtype=torch.long), eps=0.1)
    assert found.shape == corners.shape
    assert not found.requires_grad


def test_no_samples_are_no_attack(net: nn.Module, corners: Tensor) -> None:
    with pytest.raises(InputError, match="samples must be at least 1, found 0"):
        noise(net, corners, torch.zeros(12, dtype=torch.long), eps=0.1, samples=0)
