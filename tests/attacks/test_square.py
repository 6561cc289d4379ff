from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attacks.closed_form import smallest_eps
from torch import Tensor, nn

from robustfpd.attacks.base import QueryCounter
from robustfpd.attacks.norms import lp_ball
from robustfpd.attacks.square import square, window_side
from robustfpd.config import NORMS, Norm

if TYPE_CHECKING:
    from tests.attacks.conftest import Linear


def _predicted(classifier: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = classifier(images)
    return logits.argmax(1)


def _linear(shape: tuple[int, ...], seed: int = 0) -> nn.Module:
    draws = torch.Generator().manual_seed(seed)
    linear = nn.Linear(torch.Size(shape).numel(), 3)
    linear.weight.data = torch.randn(linear.weight.shape, generator=draws)
    linear.bias.data = -linear.weight.data.sum(1) / 2
    return nn.Sequential(nn.Flatten(), linear)


# --- images of any shape -------------------------------------------------------------------------------------------

SIDES = (1, 2, 3, 4, 5, 7, 12, 14, 18, 19, 24, 33)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(SIDES), st.sampled_from(SIDES), st.sampled_from([1, 3]), st.sampled_from(NORMS))
def test_images_of_any_shape_are_attacked_inside_ball_and_box(
    height: int, width: int, channels: int, norm: Norm
) -> None:
    shape = (channels, height, width)
    net = _linear(shape)
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    images = (1.4 * images - 0.2).clamp(0, 1)  # pixels at 0 and 1 too
    labels = _predicted(net, images)
    eps = 0.05 * {"linf": 1.0, "l2": images[0].numel() ** 0.5, "l1": float(images[0].numel())}[norm]
    adversarial = square(net, images, labels, eps=eps, norm=norm, queries=40)
    size = lp_ball(norm).norm(adversarial.double() - images.double())
    assert float(size.max()) <= eps * (1 + 1e-5)
    assert (float(adversarial.min()) >= 0) & (float(adversarial.max()) <= 1)
    assert bool((size > 0).any())


@pytest.mark.parametrize("shape", [(1, 12, 12), (1, 14, 14), (3, 9, 21), (1, 3, 40), (1, 2, 2)])
@pytest.mark.parametrize("norm", NORMS)
def test_it_finds_adversarial_examples_on_any_shape(shape: tuple[int, int, int], norm: Norm) -> None:
    """The whole box lies in the ball, and half of it is misclassified."""
    net = _linear(shape)
    images = torch.rand(8, *shape, generator=torch.Generator().manual_seed(2))
    labels = _predicted(net, images)
    eps = float(lp_ball(norm).norm(torch.ones(1, *shape)))
    adversarial = square(net, images, labels, eps=min(eps, 1.0) if norm == "linf" else eps, norm=norm, queries=500)
    assert bool((_predicted(net, adversarial) != labels).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 9), (12, 7), (3, 1)])
def test_every_pixel_is_reached(height: int, width: int, norm: Norm) -> None:
    class Recorder(nn.Module):
        """Is never misclassified, and records which pixels were changed."""

        changed = torch.zeros(1, height, width, dtype=torch.bool)

        def forward(self, images: Tensor) -> Tensor:
            self.changed = self.changed | (images - 0.5).abs().gt(1e-6).any(0)
            return torch.tensor([[1.0, 0.0]]).expand(len(images), 2)

    recorder = Recorder()
    square(recorder, torch.full((2, 1, height, width), 0.5), torch.zeros(2).long(), eps=0.2, norm=norm, queries=300)
    assert bool(recorder.changed.all())


# --- the search ----------------------------------------------------------------------------------------------------


def test_windows_shrink_from_most_of_the_image_to_a_pixel() -> None:
    sides = [window_side(i / 5000, (28, 28), "linf") for i in range(5000)]
    assert sides == sorted(sides, reverse=True)
    assert (sides[0], sides[-1]) == (25, 1)
    odd = {window_side(i / 5000, (28, 28), "l2") for i in range(5000)}
    assert all(side % 2 == 1 and side >= 3 for side in odd)


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_does_not_depend_on_the_others(net: nn.Module, corners: Tensor, norm: Norm) -> None:
    labels = _predicted(net, corners)
    eps = {"linf": 0.02, "l2": 0.1, "l1": 0.4}[norm]
    batched = square(net, corners, labels, eps=eps, norm=norm, queries=50)
    fewer = square(net, corners[:5], labels[:5], eps=eps, norm=norm, queries=50)
    torch.testing.assert_close(fewer, batched[:5], atol=1e-6, rtol=0)


def test_a_misclassified_image_is_not_queried_again(corners: Tensor) -> None:
    class Counts(nn.Module):
        """Misclassifies what differs from the second image; the others are always correct."""

        def forward(self, images: Tensor) -> Tensor:
            second = (images - corners[1]).abs().mean((1, 2, 3)) < 0.2
            moved = second & (images != corners[1]).flatten(1).any(1)
            return torch.stack([1.0 - moved.float(), 0.5 + 0 * moved.float()], dim=1)

    counter = QueryCounter(Counts())
    square(counter, corners[:3], torch.zeros(3).long(), eps=0.1, queries=20, restarts=2)
    assert counter.per_image is not None
    assert counter.per_image.tolist() == [41, 2, 41]
    assert counter.forward_passes == 41 + 2 + 41 + 1  # and one to count the classes


def test_an_image_with_nan_logits_is_no_success(corners: Tensor) -> None:
    class Breaks(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            clean = (images == corners[:1]).flatten(1).all(1)
            return torch.where(clean[:, None], torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, torch.inf]]))

    adversarial = square(Breaks(), corners[:1], torch.zeros(1).long(), eps=0.1, queries=10)
    assert adversarial.isfinite().all()


def test_it_finds_as_many_adversarial_examples_as_the_published_code(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    pyautoattack = pytest.importorskip("pyautoattack.square")
    net, images, labels = digits[0], digits[1][:40], digits[2][:40]
    correct = _predicted(net, images) == labels
    for norm, name, eps in (("linf", "Linf", 0.08), ("l2", "L2", 0.8), ("l1", "L1", 3.5)):
        published = pyautoattack.SquareAttack(net, name, n_queries=300, eps=eps, device="cpu")
        theirs = published.perturb(images, labels)
        ours = square(net, images, labels, eps=eps, norm=norm, queries=300)  # type: ignore[arg-type]
        left = [int((_predicted(net, found) == labels).sum()) for found in (theirs, ours)]
        assert 0 < left[0] < int(correct.sum())
        assert left[1] <= left[0] + 2


def test_square_does_not_stop_at_equal_logits(corners: Tensor) -> None:
    class Saturated(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            score = 100 * (images[:, 0, 7, 7] - 0.45)
            return torch.stack([torch.ones_like(score), (1 + score).clamp(0, 1), score.sign()], dim=1) - (
                torch.stack([(score > 8).float(), 0 * score, 0 * score], dim=1)
            )

    images = torch.full((3, 1, 8, 8), 0.5)
    adversarial = square(Saturated(), images, torch.zeros(3, dtype=torch.long), eps=0.1, queries=300)
    assert bool((_predicted(Saturated(), adversarial) != 0).all())


# In L2 and L1 its windows are at least three pixels wide, so it cannot follow a random slope.
@pytest.mark.parametrize(("norm", "slack"), [("linf", 1.05), ("l2", 1.6), ("l1", 2.5)])
@pytest.mark.parametrize("model", [pytest.param("two_classes", marks=pytest.mark.slow), "three_classes"])
def test_square_succeeds_slightly_beyond_the_closed_form(
    request: pytest.FixtureRequest, norm: Norm, slack: float, model: str, corners: Tensor
) -> None:
    classifier: Linear = request.getfixturevalue(model)
    images = corners[:4]
    labels = _predicted(classifier, images)
    for image, label, smallest in zip(images, labels, smallest_eps(classifier, images, labels, norm), strict=True):
        single, eps = (image[None], label[None]), float(smallest)
        assert _predicted(classifier, square(classifier, *single, eps=slack * eps, norm=norm)) != label
        assert _predicted(classifier, square(classifier, *single, eps=0.99 * eps, norm=norm, queries=50)) == label


def test_square_reaches_the_last_row_and_column(corners: Tensor) -> None:
    weight = torch.zeros(2, 1, 8, 8)
    weight[1, 0, 7, :], weight[1, 0, :, 7] = torch.tensor([1.0, -1.0] * 4), torch.tensor([-1.0, 1.0] * 4)

    class Edge(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (images - 0.5).flatten(1) @ weight.flatten(1).T - torch.tensor([0.0, 0.145 * 10])

    images = torch.full((2, 1, 8, 8), 0.5)
    adversarial = square(Edge(), images, torch.zeros(2, dtype=torch.long), eps=0.1, queries=2000)
    assert bool((_predicted(Edge(), adversarial) == 1).all())
