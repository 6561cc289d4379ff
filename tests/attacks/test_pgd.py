from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attacks.closed_form import best_gain, margins
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.attacks import bim, fgsm, pgd
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import NORMS, Norm
from robustfpd.errors import InputError

if TYPE_CHECKING:
    from tests.attacks.conftest import Linear

ALL: tuple[Norm, ...] = ("linf", "l2", "l1")


def _zeros(images: Tensor) -> Tensor:
    return torch.zeros(len(images), dtype=torch.long)


_SETTINGS: list[tuple[Norm, float, dict[str, Any], float]] = [
    ("linf", 0.03, {}, 1e-5),
    ("linf", 0.6, {}, 1e-5),
    ("l2", 0.3, {}, 1e-3),
    ("l2", 2.0, {}, 1e-3),
    ("l2", 2.0, {"steps": 100, "step_size": 1.0}, 1e-4),
    ("l1", 0.5, {}, 2e-3),
    ("l1", 4.0, {}, 1e-3),
    ("l1", 4.0, {"steps": 200, "step_size": 20.0}, 1e-4),
]


@pytest.mark.parametrize(("norm", "eps", "options", "slack"), _SETTINGS)
@pytest.mark.parametrize("model", ["two_classes", "three_classes"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_pgd_reaches_the_closed_form_optimum_on_a_linear_model(
    request: pytest.FixtureRequest, corners: Tensor, model: str, loss: Literal["ce", "margin"], norm: Norm, eps: float,
    options: dict[str, Any], slack: float,
) -> None:  # fmt: skip
    classifier: Linear = request.getfixturevalue(model)
    labels = _zeros(corners)
    adversarial = pgd(classifier, corners, labels, eps=eps, norm=norm, loss=loss, **options)
    slope = classifier.weight[1] - classifier.weight[0]
    best = torch.tensor([best_gain(slope, x, eps, norm) for x in corners])
    gained = margins(classifier, adversarial, labels) - margins(classifier, corners, labels)
    assert float((gained / best).max()) <= 1 + 1e-5
    assert float((gained / best).min()) >= 1 - slack


@pytest.mark.parametrize("norm", NORMS)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 2**31), eps=st.floats(1e-3, 1), steps=st.integers(1, 5), size=st.floats(1e-3, 100))
def test_results_lie_in_ball_and_box(norm: Norm, seed: int, eps: float, steps: int, size: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    images = (1.4 * torch.rand(3, 1, 4, 4, generator=draws) - 0.2).clamp(0, 1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    adversarial = pgd(
        net, images, torch.tensor([0, 1, 2]), eps=eps, norm=norm, steps=steps, step_size=size, generator=draws
    )
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    assert float(lp_ball(norm).norm(adversarial - images).max()) <= eps + 2e-6


def test_fgsm_is_one_sign_step(two_classes: Linear, corners: Tensor) -> None:
    slope = (two_classes.weight[1] - two_classes.weight[0]).detach().reshape(1, 1, 8, 8)
    labels = torch.arange(12) % 2
    uphill = torch.where(labels == 0, 1, -1).reshape(-1, 1, 1, 1) * slope
    expected = (corners + 0.1 * uphill.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(two_classes, corners, labels, eps=0.1), expected, atol=1e-6, rtol=0)
    assert two_classes.batches == [12, 12]


@pytest.mark.parametrize("norm", ALL)
def test_bim_is_pgd_from_the_image_in_equal_parts(net: nn.Module, corners: Tensor, norm: Norm) -> None:
    labels = torch.arange(12) % 3
    size = 0.2 / 7 * lp_ball(norm).step_scale(corners[0].numel())
    expected = pgd(net, corners, labels, eps=0.2, norm=norm, steps=7, step_size=size, random_start=False)
    assert torch.equal(bim(net, corners, labels, eps=0.2, norm=norm, steps=7), expected)
    assert not torch.equal(expected, corners)


def test_losses_differ_with_three_classes(net: nn.Module, corners: Tensor) -> None:
    labels = torch.arange(12) % 3
    ce, margin = (pgd(net, corners, labels, eps=0.1, loss=loss) for loss in ("ce", "margin"))
    assert float(margins(net, margin, labels).mean()) >= float(margins(net, ce, labels).mean())
    assert not torch.equal(ce, margin)


@pytest.mark.parametrize("norm", ALL)
def test_the_seed_decides_the_result(net: nn.Module, corners: Tensor, norm: Norm) -> None:
    labels, state = torch.arange(12) % 3, torch.get_rng_state()

    def attack(seed: int | None) -> Tensor:
        draws = None if seed is None else torch.Generator().manual_seed(seed)
        return pgd(net, corners, labels, eps=0.05, norm=norm, steps=3, generator=draws)

    assert torch.equal(attack(5), attack(5))
    assert not torch.equal(attack(5), attack(6))
    assert torch.equal(attack(None), attack(0))
    assert torch.equal(torch.get_rng_state(), state)


class _Raises(nn.Module):
    """Raise on the third forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("out of memory")
        out: Tensor = self.inner(images)
        return out


def _state(module: nn.Module) -> list[Any]:
    flags = [m.training for m in module.modules()]
    tensors = [*module.parameters(), *module.buffers()]
    grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    return [flags, [t.detach().clone() for t in tensors], grads, [t.requires_grad for t in tensors]]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@pytest.fixture
def mixed() -> rf.FPD:
    """An FPD in training with a frozen batch norm, a frozen weight, one gradient and statistics of its own."""
    model = rf.enhance("resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].eval()
    model.backbone.eval()
    norms[1].train()
    next(model.parameters()).requires_grad_(False)
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    return model


@pytest.mark.parametrize("norm", ALL)
def test_an_attack_preserves_the_classifiers_state(mixed: rf.FPD, corners: Tensor, norm: Norm) -> None:
    classifier = _Raises(nn.Module())
    classifier.inner, classifier.calls = _View(mixed), 3
    before = _state(classifier)
    pgd(classifier, corners[:2], torch.tensor([0, 1]), eps=0.1, norm=norm, steps=3)
    assert classifier.calls > 5
    assert _equal(_state(classifier), before)


def test_the_classifiers_state_is_restored_after_an_error(mixed: rf.FPD, corners: Tensor) -> None:
    classifier = _Raises(_View(mixed))
    before = _state(classifier)
    with pytest.raises(RuntimeError, match="out of memory"):
        pgd(classifier, corners[:2], torch.tensor([0, 1]), eps=0.1, steps=3)
    assert _equal(_state(classifier), before)


class _View(nn.Module):
    def __init__(self, model: rf.FPD) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        assert not any(m.training for m in self.modules())
        logits: Tensor = self.model(images).logits
        return logits


class _Scripted(nn.Module):
    """Row k of a table of logits for an image of brightness k/10; the gradient always points to brighter."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = torch.tensor(table)

    def forward(self, images: Tensor) -> Tensor:
        brightness = images.flatten(1).mean(1, keepdim=True)
        row = (10 * brightness.detach()).round().long().squeeze(1)
        up = torch.tensor([-1.0] + [1.0] * (self.table.shape[1] - 1))
        return self.table[row] + up * (brightness - brightness.detach())


_CORRECT, _CLOSE, _WRONG, _WRONGER = [5.0, 0.0, 0.0], [0.01, 0.0, 0.0], [0.0, 0.1, -9.0], [0.0, 0.2, -9.0]


@pytest.mark.parametrize(
    ("table", "best_step"),
    [
        ([_CORRECT, _CORRECT, _WRONG, _CORRECT, _CORRECT], 2),  # the last iterate is worse
        ([_CORRECT, _WRONG, _WRONGER, _WRONG, _CORRECT], 2),
        ([_CORRECT, _WRONG, _CORRECT, _CLOSE, _CLOSE], 1),  # a larger cross-entropy, but correctly classified
        ([_CORRECT, _CORRECT, _CLOSE, _CORRECT, _CORRECT], 2),
        ([_CLOSE, _CORRECT, _CORRECT, _CORRECT, _CORRECT], 0),
        ([_CORRECT, _CORRECT, _CORRECT, _CORRECT, _WRONG], 4),
    ],
)
def test_the_best_iterate_is_returned(table: list[list[float]], best_step: int) -> None:
    images = torch.zeros(1, 1, 2, 2)
    adversarial = bim(_Scripted(table), images, torch.tensor([0]), eps=0.4, steps=4)
    torch.testing.assert_close(adversarial, torch.full_like(adversarial, best_step / 10), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ALL)
@pytest.mark.parametrize("at", [0.0, 1.0])
def test_a_pixel_at_the_edge_of_the_box_does_not_block_the_gradient(two_classes: Linear, norm: Norm, at: float) -> None:
    slope = (two_classes.weight[1] - two_classes.weight[0]).detach().reshape(1, 1, 8, 8)
    images = torch.full((1, 1, 8, 8), at)
    free = slope > 0 if at == 0 else slope < 0
    moved = (bim(two_classes, images, torch.tensor([0]), eps=0.3, norm=norm) - images) != 0
    assert not bool(moved[~free].any())
    assert bool(moved[free].all()) if norm != "l1" else bool(moved[free].any())


@pytest.mark.parametrize("norm", ALL)
@pytest.mark.parametrize("scale", [1e-12, 1e-20, 1e-30])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_tiny_gradients_suffice(corners: Tensor, norm: Norm, scale: float, loss: Literal["ce", "margin"]) -> None:
    draws = torch.Generator().manual_seed(1)
    net = nn.Linear(64, 2)
    net.weight = nn.Parameter(scale * torch.randn(2, 64, generator=draws))
    net.bias = nn.Parameter(torch.zeros(2))
    classifier = nn.Sequential(nn.Flatten(), net)
    labels = classifier(corners).argmax(1)
    adversarial = pgd(
        classifier, corners, labels, eps=1.0 if norm == "linf" else 30.0, norm=norm, loss=loss, random_start=False
    )
    assert bool((classifier(adversarial).argmax(1) != labels).all())


class _NanGradient(nn.Module):
    """Gradients of NaN in the first pixel; finite logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        first = images[:, :1, 0, 0]
        out: Tensor = self.inner(images) + (0 * first).sqrt() * 0
        return out


@pytest.mark.parametrize("norm", ALL)
def test_nan_gradients_do_not_reach_the_images(two_classes: Linear, corners: Tensor, norm: Norm) -> None:
    labels = two_classes(corners).argmax(1)
    nan_gradient = _NanGradient(two_classes)
    x = corners.clone().requires_grad_()
    assert bool(torch.autograd.grad(nan_gradient(x).sum(), x)[0][:, 0, 0, 0].isnan().all())
    adversarial = bim(nan_gradient, corners, labels, eps=1.0 if norm == "linf" else 30.0, norm=norm)
    assert bool(adversarial.isfinite().all())
    assert bool((two_classes(adversarial).argmax(1) != labels).all())


def test_a_misclassified_image_has_no_more_restarts(two_classes: Linear) -> None:
    slope = (two_classes.weight[1] - two_classes.weight[0]).detach().reshape(1, 1, 8, 8)
    near, far = torch.full_like(slope, 0.5), 0.5 - 0.5 * slope.sign()
    images, labels = torch.cat([far, near]), torch.tensor([0, 0])
    two_classes.bias.data = torch.tensor([0.0, 0.1 - float((slope * near).sum())])
    two_classes.bias.data[0] = 0.2
    two_classes.batches.clear()
    adversarial = pgd(two_classes, images, labels, eps=0.1, steps=4, restarts=3)
    assert two_classes.batches == [2] * 5 + [1] * 10
    assert two_classes(adversarial).argmax(1).tolist() == [0, 1]
    two_classes.batches.clear()
    pgd(two_classes, images[1:], labels[1:], eps=0.1, steps=4, restarts=3)
    assert two_classes.batches == [1] * 5


@pytest.mark.parametrize("norm", ALL)
def test_restarts_never_lower_the_loss(net: nn.Module, corners: Tensor, norm: Norm) -> None:
    labels = net(corners).argmax(1)
    per_restart = []
    for restarts in (1, 2, 6):
        draws = torch.Generator().manual_seed(3)
        adversarial = pgd(
            net, corners, labels, eps=0.02, norm=norm, steps=1, step_size=0.004, restarts=restarts, loss="margin",
            generator=draws,
        )  # fmt: skip
        per_restart.append(margins(net, adversarial, labels))
    assert float((per_restart[1] - per_restart[0]).min()) >= -1e-6
    assert float((per_restart[2] - per_restart[1]).min()) >= -1e-6
    assert float((per_restart[2] - per_restart[0]).max()) > 0


@pytest.mark.parametrize("norm", ALL)
def test_an_image_does_not_depend_on_its_batch(net: nn.Module, corners: Tensor, norm: Norm) -> None:
    labels = torch.arange(12) % 3
    alone = torch.cat([bim(net, corners[i : i + 1], labels[i : i + 1], eps=0.1, norm=norm) for i in range(12)])
    torch.testing.assert_close(alone, bim(net, corners, labels, eps=0.1, norm=norm), atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_have_the_images_dtype(net: nn.Module, corners: Tensor, norm: Norm, dtype: torch.dtype) -> None:
    labels = torch.arange(12) % 3
    adversarial = pgd(copy.deepcopy(net).to(dtype), corners.to(dtype), labels, eps=0.1, norm=norm, steps=3, restarts=2)
    assert adversarial.dtype == dtype
    assert bool(adversarial.isfinite().all())


def test_images_do_not_change_and_the_result_has_no_graph(net: nn.Module, corners: Tensor) -> None:
    images, labels = corners.clone().requires_grad_(), torch.arange(12) % 3
    with torch.no_grad():
        adversarial = pgd(net, images, labels, eps=0.1, steps=2)
    assert torch.equal(images, corners)
    assert images.grad is None
    assert not adversarial.requires_grad
    assert not pgd(net, images, labels, eps=0.1, steps=2).requires_grad
    assert adversarial.data_ptr() != images.data_ptr()


class _NoGradient(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.detach().flatten(1)[:, :3].round()


def test_a_classifier_without_gradients_is_refused(corners: Tensor) -> None:
    with pytest.raises(InputError, match="do not depend differentiably on the images; use a black-box attack"):
        pgd(_NoGradient(), corners, _zeros(corners), eps=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l7"}, "unknown norm 'l7'; did you mean 'l2' or 'l1'"),
        ({"loss": "hinge"}, "unknown loss 'hinge'; choose from ce, dlr, margin"),
        ({"steps": 0}, "steps must be at least 1, found 0"),
        ({"restarts": 0}, "restarts must be at least 1, found 0"),
        ({"step_size": 0.0}, "step_size must be a positive number, found 0.0"),
        ({"step_size": -0.1}, "step_size must be a positive number, found -0.1"),
        ({"step_size": float("nan")}, "step_size must be a positive number, found nan"),
    ],
)
def test_invalid_options_are_refused(
    two_classes: Linear, corners: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pgd(two_classes, corners, _zeros(corners), eps=0.1, **options)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.4)])
def test_agrees_with_foolbox(net: nn.Module, corners: Tensor, norm: Norm, eps: float) -> None:
    foolbox = pytest.importorskip("foolbox")
    images = (
        0.3 + 0.4 * corners
    )  # inside the box: foolbox projects onto ball and box in turn, we onto their intersection
    labels = net(images).argmax(1)
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    foolbox_attack = kind(abs_stepsize=eps / 8, steps=20, random_start=False)
    _, foolbox_points, misclassified = foolbox_attack(
        foolbox.PyTorchModel(net.eval(), bounds=(0, 1)), images, labels, epsilons=eps
    )
    ours = pgd(net, images, labels, eps=eps, norm=norm, steps=20, step_size=eps / 8, random_start=False)
    assert 0 < int(misclassified.sum()) < len(images)
    assert torch.equal(net(ours).argmax(1) != labels, misclassified)
    equal = (ours - foolbox_points).flatten(1).abs().amax(1) < 1e-4
    assert int(equal.sum()) >= 9
    assert float((margins(net, ours, labels) - margins(net, foolbox_points, labels)).min()) >= -1e-4


def test_inference_mode_is_refused(net: nn.Module, corners: Tensor) -> None:
    labels = torch.zeros(len(corners), dtype=torch.long)
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        pgd(net, corners, labels, eps=0.1)


class _Sums(nn.Module):
    """Sums of each channel; autograd returns their gradient as an expanded tensor, which cannot be written to."""

    def forward(self, images: Tensor) -> Tensor:
        return images.sum(dim=(2, 3))


@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_that_is_an_expanded_tensor(norm: Norm) -> None:
    images = torch.full((2, 3, 4, 4), 0.5)
    images[:, 0] += 0.001
    adversarial = pgd(_Sums(), images, torch.zeros(2, dtype=torch.long), eps=0.3, norm=norm, steps=3)
    assert (_Sums()(adversarial).argmax(dim=1) != 0).all()
