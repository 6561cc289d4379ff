from __future__ import annotations

import importlib.util
import inspect
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustfpd as rf
from robustfpd import attacks
from robustfpd.attacks.base import QueryCounter, attack, check_images, check_labels, check_logits, record_queries
from robustfpd.config import check_eps
from robustfpd.errors import InputError

if TYPE_CHECKING:
    from robustfpd.config import Norm


def _custom(body: Any = None, **options: Any) -> Any:
    @attack("custom", **options)
    def custom(
        classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 3,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the custom attack."""
        if body is not None:
            arguments = {"images": images, "labels": labels, "eps": eps, "norm": norm, "steps": steps}
            body(classifier=classifier, generator=generator, **arguments)
        return images.clone()

    return custom


X, Y = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
NET = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def test_an_attack_has_its_metadata() -> None:
    custom = _custom(norms=("l2", "l1"), minimal=True, access="scores", library="foolbox")
    assert (custom.name, custom.norms, custom.minimal, custom.access) == ("custom", ("l2", "l1"), True, "scores")
    assert custom.library == "foolbox"
    assert custom.__doc__ == "Run the custom attack."
    assert custom.__name__ == "custom"
    assert list(inspect.signature(custom).parameters)[:4] == ["classifier", "images", "labels", "eps"]


def test_arguments_reach_the_attack_checked_and_complete() -> None:
    seen: dict[str, Any] = {}
    custom = _custom(seen.update)
    images = X.clone().requires_grad_()
    custom(NET, images, Y.int(), eps=np.float32(0.25))
    assert seen["eps"] == 0.25
    assert isinstance(seen["eps"], float)
    assert not seen["images"].requires_grad
    assert seen["labels"].dtype == torch.long
    assert (seen["norm"], seen["steps"]) == ("linf", 3)
    assert seen["generator"].initial_seed() == 0
    draws = torch.Generator().manual_seed(9)
    custom(NET, images=X, labels=Y, eps=0.1, generator=draws, steps=7)
    assert seen["generator"] is draws
    assert seen["steps"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 8.0}, "eps must be at most 1 in linf"),
        ({"eps": -1}, "eps must be 0 or a positive number, found -1"),
        ({"eps": True}, "eps must be 0 or a positive number, found True"),
        ({"eps": None}, "eps must be 0 or a positive number, found None"),
        ({"norm": "l7"}, "unknown norm 'l7'"),
        ({"norm": "l1"}, "custom does not offer norm 'l1'; it offers linf, l2"),
        ({"images": X * 255}, "divide by 255"),
        ({"images": X[0]}, "images must be N×C×H×W"),
        ({"images": X.numpy()}, "images must be a torch.Tensor, found ndarray"),
        ({"labels": Y[:2]}, r"labels must have shape \(3,\)"),
        ({"labels": Y.float()}, "labels must be integers"),
        ({"labels": Y - 1}, "labels must not be negative"),
    ],
)
def test_invalid_inputs_are_refused_before_the_attack_runs(options: dict[str, Any], message: str) -> None:
    called: list[Any] = []
    custom = _custom(lambda **arguments: called.append(arguments), norms=("linf", "l2"))
    with pytest.raises(InputError, match=message):
        custom(NET, **{"images": X, "labels": Y, "eps": 0.1, **options})
    assert called == []


def test_a_radius_of_0_returns_the_images_and_does_not_call_the_attack() -> None:
    called: list[Any] = []
    custom = _custom(lambda **arguments: called.append(arguments), norms=("linf", "l2"))
    for eps in (0, 0.0, torch.tensor(0.0)):
        adversarial = custom(NET, images=X, labels=Y, eps=eps)
        assert torch.equal(adversarial, X)
        assert adversarial.data_ptr() != X.data_ptr()
    assert called == []


def test_unknown_and_missing_arguments_are_type_errors() -> None:
    with pytest.raises(TypeError, match="eps"):
        _custom()(NET, X, Y)
    with pytest.raises(TypeError, match="colour"):
        _custom()(NET, X, Y, eps=0.1, colour="red")


def test_a_missing_library_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"attack custom .*needs foolbox; install it with: pip install 'robustfpd\[att"
    ):
        _custom(library="foolbox")(NET, X, Y, eps=0.1)
    with pytest.raises(InputError, match="needs adversarial-robustness-toolbox; install it with"):
        attacks.get("hopskipjump")(NET, X, Y, eps=0.1)
    assert _custom()(NET, X, Y, eps=0.1).shape == X.shape


def test_only_gradient_attacks_refuse_inference_mode() -> None:
    with torch.inference_mode():
        with pytest.raises(InputError, match="inference_mode"):
            _custom()(NET, X, Y, eps=0.1)
        assert _custom(access="decisions")(NET, X, Y, eps=0.1).shape == X.shape


def _states() -> list[Any]:
    legacy: Any = np.random.get_state()  # noqa: NPY002 - libraries use this one
    return [torch.get_rng_state().tolist(), legacy[1].tolist(), legacy[2], random.getstate()]


@pytest.mark.parametrize("fails", [False, True])
def test_global_random_states_follow_the_generator_and_are_restored(fails: bool) -> None:
    values: list[tuple[float, float, float]] = []

    def draws(**arguments: Any) -> None:
        values.append((float(torch.rand(1)), float(np.random.rand()), random.random()))  # noqa: NPY002
        if fails:
            raise RuntimeError("no")

    custom, before = _custom(draws), _states()
    for seed in (1, 1, 2):
        source = torch.Generator().manual_seed(seed)
        state = source.get_state()
        try:
            custom(NET, X, Y, eps=0.1, generator=source)
        except RuntimeError:
            assert fails
        assert torch.equal(source.get_state(), state)  # nothing was drawn from it
        assert _states() == before
    first, again, other = values
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_the_classifier_is_frozen_and_in_evaluation_mode_during_the_attack(fails: bool) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 3)).train()
    net[3].eval()
    frozen = net[1].bias
    frozen.requires_grad_(False)
    weight = net[4].weight
    assert isinstance(weight, Tensor)
    weight.grad = gradient = torch.full_like(weight, 2.0)
    seen: list[Any] = []

    def inspect_state(classifier: nn.Module, **arguments: Any) -> None:
        seen.append([m.training for m in classifier.modules()])
        seen.append([(p.requires_grad, p.grad) for p in classifier.parameters()])
        for p in classifier.parameters():  # as libraries do
            p.requires_grad_(True)
            p.grad = torch.ones_like(p)
        classifier.train()
        if fails:
            raise RuntimeError("no")

    try:
        _custom(inspect_state)(net, X, Y, eps=0.1)
    except RuntimeError:
        assert fails
    assert not any(seen[0])
    assert set(seen[1]) == {(False, None)}
    assert [m.training for m in net.modules()] == [True, True, True, True, False, True]
    assert weight.grad is gradient
    assert bool((gradient == 2).all())
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True, True, True]
    assert all(p.grad is None for p in net.parameters() if p is not weight)


def test_query_counter_counts_forward_and_backward_passes() -> None:
    counter = QueryCounter(NET)
    x = X.clone().requires_grad_()
    logits = counter(x)
    logits.sum().backward()
    with torch.no_grad():
        counter(X[:2])
    assert (counter.forward_passes, counter.backward_passes) == (5, 3)
    out = counter(x[:1])
    for k in range(3):
        torch.autograd.grad(out[0, k], x, retain_graph=True)
    assert (counter.forward_passes, counter.backward_passes) == (6, 6)
    record_queries(counter, torch.tensor([4, 5]))
    record_queries(NET, torch.tensor([4, 5]))
    assert counter.per_image is not None
    assert counter.per_image.tolist() == [4, 5]
    counter.reset()
    assert counter.forward_passes == counter.backward_passes == 0
    assert counter.per_image is None


IMAGES = torch.full((2, 1, 8, 8), 0.5)
LABELS = torch.tensor([0, 2])


def _with(value: float) -> Tensor:
    images = IMAGES.clone()
    images[1, 0, 3, 3] = value
    return images


CLASSIFIER = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
INVALID_IMAGES = [
    (_with(float("nan")), "images must be finite, found 1 NaN or infinite pixels"),
    (_with(float("inf")), "images must be finite, found 1 NaN or infinite pixels"),
    (_with(1.25), r"images must lie in \[0, 1\], found \[0.5, 1.25\]; normalise inside the model"),
    (_with(-0.5), r"images must lie in \[0, 1\], found \[-0.5, 0.5\]; normalise inside the model"),
    (_with(255), r"images must lie in \[0, 1\], found \[0.5, 255\]; divide by 255"),
    (IMAGES.to(torch.uint8), r"images must be floating point in \[0, 1\], found torch.uint8; divide uint8 by 255"),
    (IMAGES[0], r"images must be N×C×H×W with at least one image, found shape \(1, 8, 8\)"),
    (IMAGES[:0], r"images must be N×C×H×W with at least one image, found shape \(0, 1, 8, 8\)"),
    (IMAGES[:, :0], r"images must be N×C×H×W with at least one image, found shape \(2, 0, 8, 8\)"),
    (IMAGES.numpy(), "images must be a torch.Tensor, found ndarray"),
]

INVALID_LABELS = [
    (torch.tensor([0.0, 1.0]), "labels must be integers, found torch.float32"),
    (torch.tensor([True, False]), "labels must be integers, found torch.bool"),
    (torch.tensor([0, -1]), "labels must not be negative, found -1"),
    (torch.tensor([0, 3]), "labels must be below the classifier's 3 classes, found 3"),
    (torch.tensor([0]), r"labels must have shape \(2,\), one per image, found \(1,\)"),
    (torch.eye(2, 3, dtype=torch.long), r"labels must have shape \(2,\), one per image, found \(2, 3\)"),
    ([0, 1], "labels must be a torch.Tensor, found list"),
]

INVALID_EPS: list[tuple[Norm, Any, str]] = [
    ("linf", 8, "eps must be at most 1 in linf .*, found 8; 8/255 is eight grey levels"),
    ("linf", 1.01, "eps must be at most 1 in linf .*, found 1.01"),
    ("l1", -1, "eps must be 0 or a positive number, found -1"),
    ("l2", float("nan"), "eps must be 0 or a positive number, found nan"),
    ("l2", float("inf"), "eps must be 0 or a positive number, found inf"),
    ("l2", "0.1", "eps must be 0 or a positive number, found '0.1'"),
    ("l2", True, "eps must be 0 or a positive number, found True"),
]


@pytest.mark.parametrize(("images", "message"), INVALID_IMAGES)
def test_invalid_images_are_refused(images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attacks.pgd(CLASSIFIER, images, LABELS, eps=0.1)


@pytest.mark.parametrize(("labels", "message"), INVALID_LABELS)
def test_invalid_labels_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attacks.pgd(CLASSIFIER, IMAGES, labels, eps=0.1)


@pytest.mark.parametrize(("norm", "eps", "message"), INVALID_EPS)
def test_invalid_eps_is_refused(norm: Norm, eps: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attacks.pgd(CLASSIFIER, IMAGES, LABELS, eps=eps, norm=norm)


class _Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, images: Tensor) -> Any:
        return self.what(images.flatten(1)[:, :3])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: (x, x), "classifier must return logits N×K, found tuple$"),
        (lambda x: x / 0 * 0, "classifier returned NaN or infinite logits"),
        (lambda x: x[:, 0], r"classifier must return logits N×K with N=2, found \(2,\)"),
        (lambda x: x[:1], r"classifier must return logits N×K with N=2, found \(1, 3\)"),
        (lambda x: x[:, :2], "labels must be below the classifier's 2 classes, found 2"),
        (lambda _: None, "classifier must return logits N×K, found NoneType"),
    ],
)
def test_invalid_logits_are_refused(what: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attacks.pgd(_Returns(what), IMAGES, LABELS, eps=0.1, steps=1)


def test_an_fpd_itself_is_refused_with_a_hint() -> None:
    model = rf.enhance("resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8)
    with pytest.raises(InputError, match=r"found FPDOutput; attack model.classifier\(\)"):
        attacks.fgsm(model, IMAGES, LABELS, eps=0.1)
    assert attacks.fgsm(model.classifier(), IMAGES, LABELS, eps=0.1).shape == IMAGES.shape


def test_checks_return_valid_inputs_and_name_the_argument() -> None:
    assert check_images(IMAGES) is IMAGES
    assert check_images(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).double()).dtype == torch.float64
    assert check_labels(LABELS.to(torch.uint8), 2).dtype == torch.int64
    assert check_logits(torch.zeros(2, 3), LABELS).shape == (2, 3)
    assert check_eps(8 / 255, "linf") == 8 / 255
    assert check_eps(1, "linf") == 1.0
    assert check_eps(12, "l1") == 12.0
    with pytest.raises(InputError, match=r"^images must be a torch.Tensor"):
        check_images(None)
    with pytest.raises(InputError, match=r"^labels must not be negative"):
        check_labels(torch.tensor([-2]), 1)
    with pytest.raises(InputError, match=r"^radius must be a positive number"):
        check_eps(-1, "l2", "radius")
    assert check_eps(0, "l2", zero=True) == 0.0
    with pytest.raises(InputError, match=r"^eps must be a positive number, found 0$"):
        check_eps(0, "l2")


@pytest.mark.parametrize("eps", [np.float32(0.125), np.float64(0.125), np.array(0.125), torch.tensor(0.125)])
def test_numpy_and_torch_scalars_are_valid_eps(eps: Any) -> None:
    assert check_eps(eps, "linf") == 0.125
