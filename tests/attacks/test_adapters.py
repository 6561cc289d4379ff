from __future__ import annotations

import importlib.util
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.attacks.closed_form import smallest_eps
from torch import Tensor, nn

from robustfpd.attacks.adapters import art
from robustfpd.attacks.adapters.art import hopskipjump, jsma, zoo
from robustfpd.attacks.adapters.foolbox import cw, ddn, deepfool, fmn
from robustfpd.attacks.adapters.pyautoattack import fab, fab_t
from robustfpd.attacks.base import Attack, QueryCounter
from robustfpd.attacks.norms import lp_ball
from robustfpd.attacks.square import square
from robustfpd.config import Norm
from robustfpd.errors import InputError

if TYPE_CHECKING:
    from tests.attacks.conftest import Linear

for library in ("foolbox", "art", "pyautoattack"):
    pytest.importorskip(library)

# Fewer steps than by default, where the default takes long.
QUICK: dict[str, dict[str, Any]] = {
    "cw": {"steps": 20, "binary_search_steps": 3},
    "ddn": {"steps": 40},
    "fab": {"steps": 10},
    "fab-t": {"steps": 10},
    "fmn": {"steps": 40},
    "hopskipjump": {"queries": 400},
    "jsma": {"theta": 0.2, "targets": 3},
    "square": {"queries": 60},
    "zoo": {"steps": 10},
}
ATTACKS: list[Attack[...]] = [square, fab, fab_t, deepfool, ddn, fmn, cw, jsma, zoo, hopskipjump]
CASES = [pytest.param(a, norm, id=f"{a.name}-{norm}") for a in ATTACKS for norm in a.norms]
ONCE = [pytest.param(a, a.norms[0], id=a.name) for a in ATTACKS] + [pytest.param(cw, "l2", id="cw-l2")]
RANDOM = [pytest.param(a, a.norms[0], id=a.name) for a in (square, zoo, hopskipjump)]
FAST_ZOO = {**art.ZOO_OPTIONS, "binary_search_steps": 2, "learning_rate": 0.2}
EPS: dict[str, float] = {"linf": 0.1, "l2": 0.5, "l1": 2.0}


def _run(attack: Attack[...], classifier: nn.Module, images: Tensor, labels: Tensor, norm: Norm, **more: Any) -> Tensor:
    options = {"eps": EPS[norm], **QUICK.get(attack.name, {}), **more}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(art, "ZOO_OPTIONS", FAST_ZOO)
        adversarial: Tensor = attack(classifier, images, labels, norm=norm, **options)
    return adversarial


def _predicted(classifier: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = classifier(images)
    return logits.argmax(1)


@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_results_are_misclassified_or_the_clean_image(
    attack: Attack[...], norm: Norm, net: nn.Module, corners: Tensor
) -> None:
    images, labels = corners[:5], _predicted(net, corners[:5])
    labels[1] = (labels[1] + 1) % 3
    adversarial = _run(attack, net, images, labels, norm)
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    assert adversarial.dtype == images.dtype
    assert not adversarial.requires_grad
    assert torch.equal(adversarial[1], images[1])
    size = lp_ball(norm).norm(adversarial - images)
    misclassified = _predicted(net, adversarial) != labels
    if attack.minimal:
        assert bool((misclassified | (size == 0)).all())
        assert int(misclassified.sum()) == 5
    else:
        assert float(size.max()) <= EPS[norm] + 1e-5
        assert float(size[0]) > 0


class _Robust(nn.Module):
    """Always predicts class 0 of three; brighter images lower its margin."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images.flatten(1).mean(1, keepdim=True)
        return torch.cat([10 - bright, bright, -bright], dim=1)


@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_failed_attacks_return_the_clean_image(
    monkeypatch: pytest.MonkeyPatch, attack: Attack[...], norm: Norm, corners: Tensor
) -> None:
    monkeypatch.setattr(art, "HOPSKIPJUMP_STARTS", 3)
    options = {"theta": 1.0} if attack is jsma else {}
    adversarial = _run(attack, _Robust(), corners[:2], torch.zeros(2, dtype=torch.long), norm, **options)
    if attack.minimal:
        assert torch.equal(adversarial, corners[:2])
    else:
        assert float(lp_ball(norm).norm(adversarial - corners[:2]).max()) <= EPS[norm] + 1e-5


class _Stateful(nn.Module):
    """A network in training mode with a running statistic, a frozen weight and a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(1), nn.Linear(64, 3)
        self.linear.bias.requires_grad_(False)
        self.linear.weight.grad = torch.ones_like(self.linear.weight)
        self.seen_training = False

    def forward(self, images: Tensor) -> Tensor:
        self.seen_training |= self.norm.training
        out: Tensor = self.linear(self.norm(images).flatten(1))
        return out


def _state(module: nn.Module) -> list[Any]:
    tensors = [*module.parameters(), *module.buffers()]
    return [
        [m.training for m in module.modules()], [t.detach().tolist() for t in tensors],
        [t.requires_grad for t in tensors], [None if p.grad is None else p.grad.tolist() for p in module.parameters()],
    ]  # fmt: skip


@pytest.mark.parametrize(("attack", "norm"), ONCE)
def test_the_classifier_and_the_random_states_do_not_change(attack: Attack[...], norm: Norm, corners: Tensor) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        stateful = _Stateful().train()
    labels = _predicted(stateful.eval(), corners[:2])
    stateful.train()
    stateful.seen_training = False
    before = _state(stateful)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    _run(attack, stateful, corners[:2], labels, norm)
    assert not stateful.seen_training
    assert _state(stateful) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_equal_seeds_give_equal_results(attack: Attack[...], norm: Norm, net: nn.Module, corners: Tensor) -> None:
    images, labels = corners[:2], _predicted(net, corners[:2])

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(torch.seed())
        np.random.seed(None)  # noqa: NPY002 - libraries use this one
        return _run(attack, net, images, labels, norm, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(seeded(5), seeded(5))


@pytest.mark.parametrize(("attack", "norm"), RANDOM)
def test_other_seeds_give_other_results(attack: Attack[...], norm: Norm, net: nn.Module, corners: Tensor) -> None:
    labels = _predicted(net, corners[:2])
    more = {"coordinates": 5} if attack is zoo else {}
    five, six = (
        _run(attack, net, corners[:2], labels, norm, generator=torch.Generator().manual_seed(seed), **more)
        for seed in (5, 6)
    )
    assert not torch.equal(five, six)


@pytest.mark.parametrize(("attack", "norm"), ONCE)
def test_results_have_the_images_dtype(attack: Attack[...], norm: Norm, two_classes: Linear, corners: Tensor) -> None:
    classifier = two_classes.double()
    images = corners[:2].double()
    labels = _predicted(classifier, images)
    adversarial = _run(attack, classifier, images, labels, norm)
    assert adversarial.dtype == torch.float64
    if attack.minimal:
        assert bool((_predicted(classifier, adversarial) != labels).all())


@pytest.mark.parametrize(("attack", "norm"), ONCE)
@pytest.mark.parametrize("classes", [2, 3, 102])
def test_any_number_of_classes(attack: Attack[...], norm: Norm, classes: int, corners: Tensor) -> None:
    draws = torch.Generator().manual_seed(9)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    net[1].weight.data = torch.randn(classes, 64, generator=draws)
    net[1].bias.data = torch.randn(classes, generator=draws)
    labels = _predicted(net, corners[:2])
    adversarial = _run(attack, net, corners[:2], labels, norm, eps=8 * EPS[norm])
    assert bool((_predicted(net, adversarial) != labels).all())


@pytest.mark.parametrize("attack", [zoo, hopskipjump, jsma, cw], ids=lambda a: a.name)
def test_an_image_does_not_depend_on_its_batch(attack: Attack[...], net: nn.Module, corners: Tensor) -> None:
    labels = _predicted(net, corners[:4])
    norm = attack.norms[0]
    batched = _run(attack, net, corners[:4], labels, norm)
    single = _run(attack, net, corners[2:3], labels[2:3], norm)
    torch.testing.assert_close(single, batched[2:3], atol=1e-6, rtol=0)


@pytest.mark.parametrize("attack", [square, zoo, hopskipjump], ids=lambda a: a.name)
def test_queries_are_recorded(attack: Attack[...], net: nn.Module, corners: Tensor) -> None:
    counted, labels = QueryCounter(net), _predicted(net, corners[:3])
    labels[1] = (labels[1] + 1) % 3
    _run(attack, counted, corners[:3], labels, attack.norms[0])
    assert counted.per_image is not None
    assert int(counted.per_image[1]) == 1
    assert int(counted.per_image.sum()) <= counted.forward_passes <= int(counted.per_image.sum()) + 20
    if attack is not zoo:
        assert int(counted.per_image.max()) <= QUICK[attack.name]["queries"] + 1


@pytest.mark.parametrize("attack", [square, hopskipjump], ids=lambda a: a.name)
def test_black_boxes_need_no_gradients(attack: Attack[...], two_classes: Linear, corners: Tensor) -> None:
    class Detached(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = two_classes(images.detach())
            return out.detach()

    labels = _predicted(two_classes, corners[:2])
    with torch.inference_mode():
        adversarial = _run(attack, Detached(), corners[:2], labels, "linf", eps=0.5)
    assert bool((_predicted(two_classes, adversarial) != labels).all())
    for white in (fab, deepfool, jsma, cw):
        with pytest.raises(InputError, match="use a black-box attack"):
            _run(white, Detached(), corners[:2], labels, white.norms[0])


class _DayOrNight(nn.Module):
    """Class 0 above a brightness of 0.2, class 1 below."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images.flatten(1).mean(1)
        return torch.stack([bright - 0.2, 0.2 - bright], dim=1)


def test_a_black_image_is_a_failure_of_carlini_and_wagner() -> None:
    images, labels = torch.full((2, 1, 8, 8), 0.9), torch.zeros(2, dtype=torch.long)
    weak: dict[str, Any] = {"steps": 2, "binary_search_steps": 1, "step_size": 1e-3}
    assert torch.equal(cw(_DayOrNight(), images, labels, eps=1.0, norm="l2", **weak), images)
    adversarial = cw(_DayOrNight(), images, labels, eps=1.0, norm="l2")
    assert float(adversarial.min()) > 0.1
    assert bool((_predicted(_DayOrNight(), adversarial) == 1).all())


def test_every_search_ends(corners: Tensor) -> None:
    class Inconsistent(nn.Module):
        """Misclassifies the first noise image only, so HopSkipJump starts at a correctly classified image."""

        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            return torch.tensor([[0.0, 1.0] if self.calls == 3 else [1.0, 0.0]]).expand(len(images), 2)

    labels = torch.zeros(1, dtype=torch.long)
    inconsistent = Inconsistent()
    assert torch.equal(_run(hopskipjump, inconsistent, corners[:1], labels, "linf"), corners[:1])
    assert inconsistent.calls > 100


# --- closed forms --------------------------------------------------------------------------------------------------


# Largest ratio to the optimum with default options. JSMA always changes two pixels, and by much: see its docstring.
WITHIN: dict[tuple[str, str], float] = {("jsma", "l1"): 1.75, ("jsma", "l2"): 3.0}
MODELS = [pytest.param("two_classes", marks=pytest.mark.slow), "three_classes"]
MINIMAL = [pytest.param(a, norm, id=f"{a.name}-{norm}") for a in ATTACKS for norm in a.norms if a.minimal]


@pytest.mark.parametrize(("attack", "norm"), MINIMAL)
@pytest.mark.parametrize("model", MODELS)
def test_minimal_attacks_come_close_to_the_closed_form(
    request: pytest.FixtureRequest, attack: Attack[...], norm: Norm, model: str, corners: Tensor
) -> None:
    classifier: Linear = request.getfixturevalue(model)
    images = corners[:3] if attack in (zoo, cw) else corners
    labels = _predicted(classifier, images)
    options = {"queries": 5000} if attack is hopskipjump else {}
    adversarial = attack(classifier, images, labels, eps=0.3, norm=norm, **options)
    smallest = smallest_eps(classifier, images, labels, norm)
    ratio = lp_ball(norm).norm(adversarial - images) / smallest
    assert bool((_predicted(classifier, adversarial) != labels).all())
    assert float(ratio.min()) >= 1 - 1e-3
    assert float(ratio.max()) <= WITHIN.get((attack.name, norm), 1.25)


# --- invalid inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attack", "norm"), [p for p in ONCE if p.values[0] is not square])
def test_a_missing_library_is_named(
    attack: Attack[...], norm: Norm, net: nn.Module, corners: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs [a-z-]+; install it with: pip install 'robustfpd\[attacks\]'"):
        _run(attack, net, corners, torch.zeros(12, dtype=torch.long), norm)


@pytest.mark.parametrize(("attack", "norm"), ONCE)
def test_an_invalid_classifier_is_refused(attack: Attack[...], norm: Norm, corners: Tensor) -> None:
    labels = torch.zeros(12, dtype=torch.long)
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    with pytest.raises(InputError, match="at least two classes"):
        _run(attack, narrow, corners, labels, norm)
    with pytest.raises(InputError, match="below the classifier's 1 classes, found 2"):
        _run(attack, narrow, corners, labels + 2, norm)
    with pytest.raises(InputError, match="NaN"):
        _run(attack, nn.Sequential(nn.Flatten(), nn.LogSigmoid(), nn.Threshold(1, torch.nan)), corners, labels, norm)


@pytest.mark.parametrize(
    ("attack", "options"),
    [
        (square, {"queries": 0}),
        (fab_t, {"targets": 0}),
        (fab, {"restarts": 0}),
        (fab_t, {"restarts": 0}),
        (deepfool, {"steps": 0}),
        (deepfool, {"overshoot": -0.1}),
        (ddn, {"norm": "l2", "gamma": 0.0}),
        (fmn, {"step_size": float("nan")}),
        (cw, {"decrease_factor": 1.0}),
        (cw, {"largest_const": -1.0}),
        (jsma, {"norm": "l1", "theta": -0.1}),
        (zoo, {"norm": "l2", "coordinates": 0}),
        (hopskipjump, {"queries": 0}),
        (jsma, {"norm": "linf"}),
    ],
)
def test_invalid_options_are_refused(
    attack: Attack[...], options: dict[str, Any], net: nn.Module, corners: Tensor
) -> None:
    with pytest.raises(InputError, match=next(iter(set(options) - {"norm"}), "norm")):
        attack(net, corners, torch.zeros(12, dtype=torch.long), **{"eps": 0.1, **options})
