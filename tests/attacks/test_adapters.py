from __future__ import annotations

import importlib.util
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from robustfpd.attacks.adapters import art
from robustfpd.attacks.adapters.art import hopskipjump, jsma, zoo
from robustfpd.attacks.adapters.foolbox import cw, ddn, deepfool, fmn
from robustfpd.attacks.adapters.pyautoattack import fab, fab_t, square
from robustfpd.attacks.base import Attack, QueryCounter
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Norm
from robustfpd.errors import InputError

if TYPE_CHECKING:
    from tests.attacks.conftest import Linear

for library in ("foolbox", "art", "pyautoattack"):
    pytest.importorskip(library)

# Less effort than by default, where the default takes long.
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
def test_results_are_images_that_fool_or_the_images_themselves(
    attack: Attack[...], norm: Norm, net: nn.Module, corners: Tensor
) -> None:
    images, labels = corners[:5], _predicted(net, corners[:5])
    labels[1] = (labels[1] + 1) % 3
    found = _run(attack, net, images, labels, norm)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert found.dtype == images.dtype
    assert not found.requires_grad
    assert torch.equal(found[1], images[1])
    size = lp_ball(norm).norm(found - images)
    misclassified = _predicted(net, found) != labels
    if attack.minimal:
        assert bool((misclassified | (size == 0)).all())
        assert int(misclassified.sum()) == 5
    else:
        assert float(size.max()) <= EPS[norm] + 1e-5
        assert float(size[0]) > 0


class _Stubborn(nn.Module):
    """Always the first of three classes, by a margin that falls with the brightness."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images.flatten(1).mean(1, keepdim=True)
        return torch.cat([10 - bright, bright, -bright], dim=1)


@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_where_nothing_fools_the_image_comes_back(
    monkeypatch: pytest.MonkeyPatch, attack: Attack[...], norm: Norm, corners: Tensor
) -> None:
    monkeypatch.setattr(art, "HOPSKIPJUMP_STARTS", 3)
    options = {"theta": 1.0} if attack is jsma else {}
    found = _run(attack, _Stubborn(), corners[:2], torch.zeros(2, dtype=torch.long), norm, **options)
    if attack.minimal:
        assert torch.equal(found, corners[:2])
    else:
        assert float(lp_ball(norm).norm(found - corners[:2]).max()) <= EPS[norm] + 1e-5


class _Fussy(nn.Module):
    """A network with a mode, a statistic, a frozen weight and a gradient of its own."""

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
def test_the_classifier_and_the_random_states_are_left_alone(attack: Attack[...], norm: Norm, corners: Tensor) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        fussy = _Fussy().train()
    labels = _predicted(fussy.eval(), corners[:2])
    fussy.train()
    fussy.seen_training = False
    before = _state(fussy)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    _run(attack, fussy, corners[:2], labels, norm)
    assert not fussy.seen_training
    assert _state(fussy) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize(("attack", "norm"), CASES)
def test_the_same_seed_finds_the_same(attack: Attack[...], norm: Norm, net: nn.Module, corners: Tensor) -> None:
    images, labels = corners[:2], _predicted(net, corners[:2])

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(torch.seed())
        np.random.seed(None)  # noqa: NPY002 - libraries use this one
        return _run(attack, net, images, labels, norm, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(seeded(5), seeded(5))


@pytest.mark.parametrize(("attack", "norm"), RANDOM)
def test_another_seed_finds_something_else(attack: Attack[...], norm: Norm, net: nn.Module, corners: Tensor) -> None:
    labels = _predicted(net, corners[:2])
    more = {"coordinates": 5} if attack is zoo else {}
    five, six = (
        _run(attack, net, corners[:2], labels, norm, generator=torch.Generator().manual_seed(seed), **more)
        for seed in (5, 6)
    )
    assert not torch.equal(five, six)


@pytest.mark.parametrize(("attack", "norm"), ONCE)
def test_images_keep_their_precision(attack: Attack[...], norm: Norm, two_classes: Linear, corners: Tensor) -> None:
    classifier = two_classes.double()
    images = corners[:2].double()
    labels = _predicted(classifier, images)
    found = _run(attack, classifier, images, labels, norm)
    assert found.dtype == torch.float64
    if attack.minimal:
        assert bool((_predicted(classifier, found) != labels).all())


@pytest.mark.parametrize(("attack", "norm"), ONCE)
@pytest.mark.parametrize("classes", [2, 3, 102])
def test_any_number_of_classes(attack: Attack[...], norm: Norm, classes: int, corners: Tensor) -> None:
    draws = torch.Generator().manual_seed(9)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    net[1].weight.data = torch.randn(classes, 64, generator=draws)
    net[1].bias.data = torch.randn(classes, generator=draws)
    labels = _predicted(net, corners[:2])
    found = _run(attack, net, corners[:2], labels, norm, eps=8 * EPS[norm])
    assert bool((_predicted(net, found) != labels).all())


@pytest.mark.parametrize("attack", [zoo, hopskipjump, jsma, cw], ids=lambda a: a.name)
def test_no_image_depends_on_its_batch(attack: Attack[...], net: nn.Module, corners: Tensor) -> None:
    labels = _predicted(net, corners[:4])
    norm = attack.norms[0]
    together = _run(attack, net, corners[:4], labels, norm)
    alone = _run(attack, net, corners[2:3], labels[2:3], norm)
    torch.testing.assert_close(alone, together[2:3], atol=1e-6, rtol=0)


@pytest.mark.parametrize("attack", [square, zoo, hopskipjump], ids=lambda a: a.name)
def test_queries_are_told(attack: Attack[...], net: nn.Module, corners: Tensor) -> None:
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
        found = _run(attack, Detached(), corners[:2], labels, "linf", eps=0.5)
    assert bool((_predicted(two_classes, found) != labels).all())
    for white in (fab, deepfool, jsma, cw):
        with pytest.raises(InputError, match="use a black-box attack"):
            _run(white, Detached(), corners[:2], labels, white.norms[0])


class _Night(nn.Module):
    """Day above a brightness of 0.2, night below."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images.flatten(1).mean(1)
        return torch.stack([bright - 0.2, 0.2 - bright], dim=1)


def test_a_black_image_is_no_find_of_carlini_and_wagner() -> None:
    images, labels = torch.full((2, 1, 8, 8), 0.9), torch.zeros(2, dtype=torch.long)
    hardly: dict[str, Any] = {"steps": 2, "binary_search_steps": 1, "step_size": 1e-3}
    assert torch.equal(cw(_Night(), images, labels, eps=1.0, norm="l2", **hardly), images)
    found = cw(_Night(), images, labels, eps=1.0, norm="l2")
    assert float(found.min()) > 0.1
    assert bool((_predicted(_Night(), found) == 1).all())


def test_no_search_goes_on_for_ever(corners: Tensor) -> None:
    class Moody(nn.Module):
        """Wrong about noise once, right ever after: the start of HopSkipJump is no start."""

        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            return torch.tensor([[0.0, 1.0] if self.calls == 3 else [1.0, 0.0]]).expand(len(images), 2)

    labels = torch.zeros(1, dtype=torch.long)
    moody = Moody()
    assert torch.equal(_run(hopskipjump, moody, corners[:1], labels, "linf"), corners[:1])
    assert moody.calls > 100


def test_square_goes_on_where_two_logits_are_equal(corners: Tensor) -> None:
    class Saturated(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            score = 100 * (images[:, 0, 7, 7] - 0.45)
            return torch.stack([torch.ones_like(score), (1 + score).clamp(0, 1), score.sign()], dim=1) - (
                torch.stack([(score > 8).float(), 0 * score, 0 * score], dim=1)
            )

    images = torch.full((3, 1, 8, 8), 0.5)
    found = square(Saturated(), images, torch.zeros(3, dtype=torch.long), eps=0.1, queries=300)
    assert bool((_predicted(Saturated(), found) != 0).all())


# --- closed forms --------------------------------------------------------------------------------------------------


def _gain(slope: Any, image: Any, eps: float, norm: str) -> float:
    """Largest slope·δ over ball ∩ box, for one image."""
    steep, room = np.abs(slope), np.where(slope > 0, 1 - image, image)
    if norm == "linf":
        return float(steep @ np.minimum(room, eps))
    if norm == "l2":
        largest = float((room / steep).max())

        def length(t: float) -> float:
            return float(np.linalg.norm(np.minimum(t * steep, room))) - eps

        t = largest if length(largest) <= 0 else float(brentq(length, 0, largest, xtol=1e-14))
        return float(steep @ np.minimum(t * steep, room))
    order = np.argsort(-steep)
    before = np.cumsum(room[order]) - room[order]
    return float(steep[order] @ np.clip(eps - before, 0, room[order]))


def _nearest(classifier: Linear, images: Tensor, labels: Tensor, norm: str) -> Tensor:
    """Least perturbation that brings each image to the boundary between the classes 0 and 1, by bisection."""
    margins, least = classifier(images).detach().double(), []
    for image, label, logits in zip(images, labels.tolist(), margins, strict=True):
        slope = (classifier.weight[1 - label] - classifier.weight[label]).detach().double().numpy()
        needed = float(logits[label] - logits[1 - label])
        x = image.double().flatten().numpy()
        least.append(
            brentq(lambda e, g=slope, i=x, n=needed: _gain(g, i, e, norm) - n, 0, {"linf": 1, "l2": 8, "l1": 64}[norm])
        )
    return torch.tensor(least)


# How far from the optimum, at most, at default effort. JSMA always changes two pixels, and by much: see its docstring.
WITHIN: dict[tuple[str, str], float] = {("jsma", "l1"): 1.75, ("jsma", "l2"): 3.0}
MINIMAL = [pytest.param(a, norm, id=f"{a.name}-{norm}") for a in ATTACKS for norm in a.norms if a.minimal]


@pytest.mark.parametrize(("attack", "norm"), MINIMAL)
@pytest.mark.parametrize("model", ["two_classes", "three_classes"])
def test_minimal_attacks_come_close_to_the_closed_form(
    request: pytest.FixtureRequest, attack: Attack[...], norm: Norm, model: str, corners: Tensor
) -> None:
    classifier: Linear = request.getfixturevalue(model)
    images = corners[:3] if attack in (zoo, cw) else corners
    labels = _predicted(classifier, images)
    options = {"queries": 5000} if attack is hopskipjump else {}
    found = attack(classifier, images, labels, eps=0.3, norm=norm, **options)
    least = _nearest(classifier, images, labels, norm)
    ratio = lp_ball(norm).norm(found - images) / least
    assert bool((_predicted(classifier, found) != labels).all())
    assert float(ratio.min()) >= 1 - 1e-3
    assert float(ratio.max()) <= WITHIN.get((attack.name, norm), 1.25)


# In L2 and L1 its squares are at least three pixels wide: it cannot follow a random slope to the end.
@pytest.mark.parametrize(("norm", "slack"), [("linf", 1.05), ("l2", 1.6), ("l1", 2.5)])
@pytest.mark.parametrize("model", ["two_classes", "three_classes"])
def test_square_succeeds_a_little_beyond_the_closed_form(
    request: pytest.FixtureRequest, norm: Norm, slack: float, model: str, corners: Tensor
) -> None:
    classifier: Linear = request.getfixturevalue(model)
    images = corners[:4]
    labels = _predicted(classifier, images)
    for image, label, least in zip(images, labels, _nearest(classifier, images, labels, norm), strict=True):
        alone, eps = (image[None], label[None]), float(least)
        assert _predicted(classifier, square(classifier, *alone, eps=slack * eps, norm=norm)) != label
        assert _predicted(classifier, square(classifier, *alone, eps=0.99 * eps, norm=norm, queries=50)) == label


def test_square_reaches_the_last_row_and_column(corners: Tensor) -> None:
    weight = torch.zeros(2, 1, 8, 8)
    weight[1, 0, 7, :], weight[1, 0, :, 7] = torch.tensor([1.0, -1.0] * 4), torch.tensor([-1.0, 1.0] * 4)

    class Edge(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (images - 0.5).flatten(1) @ weight.flatten(1).T - torch.tensor([0.0, 0.145 * 10])

    images = torch.full((2, 1, 8, 8), 0.5)
    found = square(Edge(), images, torch.zeros(2, dtype=torch.long), eps=0.1, queries=2000)
    assert bool((_predicted(Edge(), found) == 1).all())


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attack", "norm"), ONCE)
def test_a_missing_library_is_named(
    attack: Attack[...], norm: Norm, net: nn.Module, corners: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs [a-z-]+; install it with: pip install 'robustfpd\[attacks\]'"):
        _run(attack, net, corners, torch.zeros(12, dtype=torch.long), norm)


@pytest.mark.parametrize(("attack", "norm"), ONCE)
def test_a_classifier_that_is_none_is_refused(attack: Attack[...], norm: Norm, corners: Tensor) -> None:
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
def test_options_that_make_no_attack_are_refused(
    attack: Attack[...], options: dict[str, Any], net: nn.Module, corners: Tensor
) -> None:
    with pytest.raises(InputError, match=next(iter(set(options) - {"norm"}), "norm")):
        attack(net, corners, torch.zeros(12, dtype=torch.long), **{"eps": 0.1, **options})
