from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustfpd.attacks import noise
from robustfpd.attacks.base import QueryCounter
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import NORMS, Norm
from robustfpd.errors import InputError


class _Recorder(nn.Module):
    """Record the images of each pass; all belong to class 0 but the rows that `misclassify` lists for a pass."""

    def __init__(self, misclassify: list[list[int]] | None = None) -> None:
        super().__init__()
        self.misclassify, self.batches = misclassify, list[Tensor]()

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(images.clone())
        logits = torch.tensor([1.0, 0.0]).repeat(len(images), 1)
        if self.misclassify is not None:
            for row in self.misclassify[len(self.batches) - 1]:
                logits[row] = torch.tensor([0.0, 1.0])
        return logits


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.05, 0.9])
def test_points_lie_in_ball_and_box_and_every_other_one_on_its_surface(corners: Tensor, norm: Norm, eps: float) -> None:
    recorder = _Recorder()
    labels = torch.zeros(12, dtype=torch.long)
    adversarial = noise(recorder, corners, labels, eps=eps, norm=norm, samples=6)
    assert len(recorder.batches) == 6
    assert torch.equal(adversarial, recorder.batches[-1])
    for draw, points in enumerate(recorder.batches):
        size = lp_ball(norm).norm(points - corners)
        assert float(size.max()) <= eps + 2e-6
        assert 0 <= float(points.min()) <= float(points.max()) <= 1
        if draw % 2 and norm == "linf":
            change = (points - corners).abs()
            at_edge = (change - eps).abs() < 1e-6
            assert bool((at_edge | (points == 0) | (points == 1)).all())
    inner, outer = (torch.stack([lp_ball(norm).norm(p - corners) for p in recorder.batches[i::2]]) for i in (0, 1))
    assert float(outer.mean()) >= float(inner.mean())


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_surface_points_lie_on_the_sphere_inside_the_box(norm: Norm) -> None:
    recorder, images = _Recorder(), torch.full((5, 1, 8, 8), 0.5)
    noise(recorder, images, torch.zeros(5, dtype=torch.long), eps=0.3, norm=norm, samples=4)
    for points in recorder.batches[1::2]:
        torch.testing.assert_close(lp_ball(norm).norm(points - images), torch.full((5,), 0.3), rtol=1e-4, atol=1e-5)


def test_a_misclassified_image_keeps_its_point(corners: Tensor) -> None:
    recorder = _Recorder([[1], [0, 2], [], []])
    counted = QueryCounter(recorder)
    adversarial = noise(counted, corners[:4], torch.zeros(4, dtype=torch.long), eps=0.1, samples=4)
    first, second, third, fourth = recorder.batches
    assert [len(a) for a in recorder.batches] == [4, 3, 1, 1]
    assert torch.equal(adversarial[1], first[1])
    assert torch.equal(adversarial[[0, 3]], second[[0, 2]])  # rows 0 and 2 of images 0, 2, 3
    assert torch.equal(adversarial[2], fourth[0])
    assert not torch.equal(third, fourth)
    assert counted.per_image is not None
    assert counted.per_image.tolist() == [2, 1, 4, 2]
    assert counted.forward_passes == int(counted.per_image.sum())
    assert counted.backward_passes == 0


def test_it_stops_when_all_are_misclassified(corners: Tensor) -> None:
    recorder = _Recorder([[0, 1], [0]])
    noise(recorder, corners[:2], torch.zeros(2, dtype=torch.long), eps=0.1)
    assert len(recorder.batches) == 1


@pytest.mark.parametrize("norm", NORMS)
def test_the_seed_decides_the_points(net: nn.Module, corners: Tensor, norm: Norm) -> None:
    labels = net(corners).argmax(1)

    def attack(seed: int | None) -> Tensor:
        draws = None if seed is None else torch.Generator().manual_seed(seed)
        return noise(net, corners, labels, eps=0.1, norm=norm, generator=draws)

    assert torch.equal(attack(5), attack(5))
    assert not torch.equal(attack(5), attack(6))
    assert torch.equal(attack(None), attack(0))


def test_it_needs_no_gradient(corners: Tensor) -> None:
    assert noise.access == "decisions"
    assert not noise.minimal
    with torch.inference_mode():
        adversarial = noise(_Recorder(), corners, torch.zeros(12, dtype=torch.long), eps=0.1)
    assert adversarial.shape == corners.shape
    assert not adversarial.requires_grad


def test_invalid_options_are_refused(net: nn.Module, corners: Tensor) -> None:
    with pytest.raises(InputError, match="samples must be at least 1, found 0"):
        noise(net, corners, torch.zeros(12, dtype=torch.long), eps=0.1, samples=0)
