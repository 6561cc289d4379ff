from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import robustfpd as rf
from robustfpd import attacks
from robustfpd.attacks import adaptive
from robustfpd.attacks.base import attack as make_attack
from robustfpd.attacks.base import record_queries
from robustfpd.errors import InputError
from robustfpd.evaluation import early_stopping, evaluate, suites
from robustfpd.evaluation.early_stopping import tranches
from robustfpd.evaluation.ledger import CLEAN
from robustfpd.evaluation.suites import AttackSpec, Suite, SuiteContext
from robustfpd.rng import generator

if TYPE_CHECKING:
    from tests.evaluation.conftest import Data, Linear

    from robustfpd.config import Norm

    Digits = tuple[nn.Module, Tensor, Tensor]


class Seen(nn.Module):
    """Counts the images that go through it, and those whose gradient is asked for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.forward_images = self.backward_images = 0
        self.training = inner.training

    def forward(self, images: Tensor) -> Any:
        self.forward_images += len(images)
        out = self.inner(images)
        if isinstance(out, Tensor) and out.requires_grad:
            out.register_hook(self._back)  # type: ignore[no-untyped-call]
        return out

    def _back(self, gradient: Tensor) -> None:
        self.backward_images += len(gradient)


def _install(monkeypatch: pytest.MonkeyPatch, *planned: AttackSpec, probes: int = 0) -> None:
    def chosen(target: SuiteContext) -> list[AttackSpec]:
        return list(planned)

    monkeypatch.setitem(suites._SUITES, "ours", Suite(chosen, probes))


def _spy(found: Any, *, access: Any = "scores") -> Any:
    def attack(
        classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        out: Tensor = found(classifier, images, labels, eps)
        return out

    return make_attack("square", access=access)(attack)


EVERY_KIND = [
    AttackSpec("FGSM", "fgsm"),
    AttackSpec("PGD", "pgd", options={"steps": 3, "restarts": 2, "early_stop": True}),
    AttackSpec("APGD-CE", "apgd-ce", options={"steps": 5}),
    AttackSpec("APGD-T", "apgd-t", options={"steps": 5, "targets": 2}),
    AttackSpec("noise", "noise", options={"samples": 3}),
    AttackSpec("DeepFool", "deepfool"),
    AttackSpec("FMN", "fmn", options={"steps": 5}),
    AttackSpec("FAB-T", "fab-t", options={"steps": 3, "targets": 2}, screened=True),
    AttackSpec("Square", "square", options={"queries": 9}, screened=True),
]


@pytest.mark.parametrize("every_attack", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_passes_add_up_to_what_the_classifier_saw(
    monkeypatch: pytest.MonkeyPatch, digits: Digits, every_attack: bool, training: bool
) -> None:
    net, images, labels = digits
    seen = Seen(copy.deepcopy(net).train(training))
    _install(monkeypatch, *EVERY_KIND, probes=5)
    record = evaluate(
        seen, (images[:40], labels[:40]), suite="ours", eps=(0.05, 0.1), batch_size=17, every_attack=every_attack
    )
    assert record.forward_passes == seen.forward_images
    assert record.backward_passes == seen.backward_images > 0
    assert record.check_forward_passes > 0
    asked = sum(a.forward_passes for a in record.attacks) + 40 + record.check_forward_passes
    assert record.forward_passes == asked
    for attack in record.attacks:
        rows = [r for r in record.ledger if (r.attack, r.eps) == (attack.attack, attack.eps)]
        assert attack.forward_passes == sum(r.queries for r in rows)
        assert attack.backward_passes == sum(r.gradients for r in rows)
    assert all(r.queries == 1 and r.gradients == 0 for r in record.ledger if r.attack == CLEAN)


def test_passes_of_every_view_of_an_fpd_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rf.enhance("resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8).eval()
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = model(images).logits.argmax(1)
    names = list(adaptive.adaptive_views(model.classifier(), images))
    assert len(names) == 8
    _install(monkeypatch, *(AttackSpec(name, "pgd", name, {"steps": 2}) for name in names))
    seen: list[int] = []
    hook = model.head.linear.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    record = evaluate(model, (images, labels), suite="ours", eps=0.02, batch_size=3, every_attack=True)
    hook.remove()
    assert [a.attack for a in record.attacks] == names
    assert all(a.forward_passes == 4 * (4 + 1) for a in record.attacks)  # and the logits before squashing
    assert record.forward_passes == sum(seen)


def test_passes_of_a_surrogate_are_counted_with_those_of_the_classifier(digits: Digits) -> None:
    net, images, labels = digits
    seen, other = Seen(net), Seen(copy.deepcopy(net))
    record = evaluate(seen, (images, labels), suite="quick", eps=0.03, surrogates={"baseline": other})
    assert record.forward_passes == seen.forward_images + other.forward_images
    assert record.backward_passes == seen.backward_images + other.backward_images
    assert other.forward_images > 0
    assert record.surrogates == ("baseline",)


def test_queries_of_black_box_attacks_are_told_image_by_image(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    net, images, labels = digits
    _install(monkeypatch, AttackSpec("Square", "square", options={"queries": 60}))
    record = evaluate(net, (images[:40], labels[:40]), suite="ours", eps=0.08, every_attack=True)
    (square,) = record.attacks
    rows = [r for r in record.ledger if r.attack == "Square"]
    fell = [r.queries for r in rows if r.outcome == "misclassified"]
    stood = [r.queries for r in rows if r.outcome == "robust"]
    assert len(fell) > 0 < len(stood)
    assert min(stood) >= 60 >= max(stood) - 6
    assert len(set(fell)) > 1
    assert min(fell) < 60
    assert square.median_queries == pytest.approx(float(torch.tensor(fell, dtype=torch.float64).quantile(0.5)))
    assert square.median_distance is None
    _install(monkeypatch, AttackSpec("HopSkipJump", "hopskipjump"))
    record = evaluate(net, (images[:4], labels[:4]), suite="ours", eps=0.08, every_attack=True)
    (hopskipjump,) = record.attacks
    queries = {r.queries for r in record.ledger if r.attack == "HopSkipJump"}
    assert min(queries) > 1000
    assert hopskipjump.median_distance is not None
    assert 0.01 < hopskipjump.median_distance < 0.6


def test_told_queries_and_the_rest_of_the_passes_both_count(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    def asks(classifier: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        classifier(images)
        record_queries(classifier, torch.arange(len(images)) // len(images))
        return images.clone()

    net, images, labels = digits
    monkeypatch.setitem(attacks._ATTACKS, "square", _spy(asks))
    _install(monkeypatch, AttackSpec("Square", "square"))
    record = evaluate(net, (images, labels), suite="ours", eps=0.1)
    assert {r.queries for r in record.ledger if r.attack == "Square"} == {2}  # its one, and the judgement


class _Tries:
    """An attack on linear models that turns the images it is told, and no others."""

    def __init__(self, turned: Tensor) -> None:
        self.turned, self.batches = turned, list[Tensor]()

    def __call__(self, classifier: Any, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        self.batches.append(images.clone())
        falls = (images[:, None] == self.turned[None]).flatten(2).all(2).any(1)
        slope = classifier.classifier.weight.sign().reshape(1, 1, 6, 6)
        out = images.clone()
        out[falls] -= eps * slope * (2 * labels[falls] - 1).reshape(-1, 1, 1, 1)
        return out.clamp(0, 1)


def _order(label: str, eps: float, standing: list[int]) -> list[list[int]]:
    """Tranches of images on the places `standing`, none of which an attack has seen yet."""
    draws, images = generator(0, "tranches", label, repr(eps)), torch.tensor(standing)
    return [part.tolist() for part in tranches(images, torch.full((len(images),), -torch.inf), draws)]


@pytest.fixture
def many(linear: Linear) -> Data:
    draws = torch.Generator().manual_seed(8)
    images = (1.2 * torch.rand(130, 1, 6, 6, generator=draws) - 0.1).clamp(0, 1)
    return images, linear(images).argmax(1)


@pytest.mark.parametrize(("falls", "tried"), [([], 64), ([3], 128), ([70], 64), ([3, 70], 130)])
def test_a_dear_attack_goes_on_for_as_long_as_something_falls(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data, falls: list[int], tried: int
) -> None:
    images, _ = many
    order = [i for part in _order("Square", 0.5, list(range(130))) for i in part]
    attack = _Tries(images[[order[i] for i in falls]] if falls else images[:0])
    monkeypatch.setitem(attacks._ATTACKS, "square", _spy(attack))
    _install(monkeypatch, AttackSpec("Square", "square", screened=True))
    record = evaluate(linear, many, suite="ours", eps=0.5, batch_size=20)
    (result,) = record.attacks
    assert (result.attacked, result.skipped) == (tried, 130 - tried)
    rows = [r for r in record.ledger if r.attack == "Square"]
    assert [r.image for r in rows] == order[:tried]
    assert [len(b) for b in attack.batches] == (tried // 64) * [20, 20, 20, 4] + [2] * (tried == 130)
    assert result.misclassified == len([f for f in falls if f < tried])
    assert record.worst_case[0].robust.count == 130 - result.misclassified


def test_an_attack_that_fails_on_a_tranche_spares_nothing(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data
) -> None:
    calls = [0]

    def raises_once(classifier: Any, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        calls[0] += 1
        if calls[0] == 1:
            raise RuntimeError("once")
        return images.clone()

    monkeypatch.setitem(attacks._ATTACKS, "square", _spy(raises_once))
    _install(monkeypatch, AttackSpec("Square", "square", screened=True))
    (result,) = evaluate(linear, many, suite="ours", eps=0.1).attacks
    assert (result.attacked, result.failed, result.skipped) == (128, 64, 2)


def test_nothing_is_spared_under_every_attack(monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data) -> None:
    attack = _Tries(many[0][:0])
    monkeypatch.setitem(attacks._ATTACKS, "square", _spy(attack))
    _install(monkeypatch, AttackSpec("Square", "square", screened=True))
    record = evaluate(linear, many, suite="ours", eps=0.1, every_attack=True)
    assert (record.attacks[0].attacked, record.attacks[0].skipped) == (130, 0)
    assert sum(len(b) for b in attack.batches) == 130


def test_nothing_is_spared_where_a_check_is_suspicious(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data
) -> None:
    attack = _Tries(many[0][:0])
    monkeypatch.setitem(attacks._ATTACKS, "square", _spy(attack))
    _install(monkeypatch, AttackSpec("Square", "square", screened=True))
    probabilities = nn.Sequential(linear, nn.Softmax(dim=1)).eval()
    record = evaluate(probabilities, many, suite="ours", eps=0.1)
    assert any(c.name == "squashed-outputs" and c.outcome == "suspicious" for c in record.verdict.checks)
    assert (record.attacks[0].attacked, record.attacks[0].skipped) == (130, 0)


def test_what_a_smallest_perturbation_found_outside_the_ball_does_not_say_who_is_close(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data
) -> None:
    attack = _Tries(many[0][:0])
    monkeypatch.setitem(attacks._ATTACKS, "square", _spy(attack))
    _install(monkeypatch, AttackSpec("DeepFool", "deepfool"), AttackSpec("Square", "square", screened=True))
    record = evaluate(linear, many, suite="ours", eps=0.003)
    smallest = [r for r in record.ledger if r.attack == "DeepFool"]
    fell = [r.image for r in smallest if r.outcome == "misclassified"]
    assert len(fell) < 20
    assert all(r.margin > 0 for r in smallest)
    (first, *_) = _order("Square", 0.003, [i for i in range(130) if i not in fell])
    assert [r.image for r in record.ledger if r.attack == "Square"] == first


def test_screening_changes_nothing_for_an_honest_classifier(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    net, images, labels = digits
    monkeypatch.setattr(early_stopping, "SMALLEST_TRANCHE", 16)
    records = []
    for screened in (True, False):
        _install(
            monkeypatch, AttackSpec("FGSM", "fgsm"), AttackSpec("APGD-CE", "apgd-ce", options={"steps": 30}),
            AttackSpec("APGD-T", "apgd-t", options={"steps": 30, "targets": 3}),
            AttackSpec("FAB-T", "fab-t", options={"steps": 10, "targets": 3}, screened=screened),
            AttackSpec("Square", "square", options={"queries": 100}, screened=screened),
        )  # fmt: skip
        records.append(evaluate(net, (images, labels), suite="ours", eps=0.03))
    with_, without = records
    assert with_.worst_case == without.worst_case
    assert 40 < with_.worst_case[0].robust.count < with_.clean.count
    assert sum(a.skipped for a in with_.attacks) > 0 == sum(a.skipped for a in without.attacks)
    assert with_.forward_passes < without.forward_passes


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_batch_size_hardly_changes_what_falls_to_attacks_without_chance(
    monkeypatch: pytest.MonkeyPatch, digits: Digits, norm: Norm
) -> None:
    net, images, labels = digits
    _install(
        monkeypatch, AttackSpec("FGSM", "fgsm"), AttackSpec("PGD", "pgd", options={"steps": 10, "random_start": False}),
        AttackSpec("BIM", "bim"), AttackSpec("DeepFool", "deepfool"),
    )  # fmt: skip
    eps = 0.06 if norm == "linf" else 0.3
    whole, parts = (evaluate(net, (images, labels), suite="ours", eps=eps, norm=norm, batch_size=n) for n in (100, 7))
    assert 5 < whole.worst_case[0].robust.count < 95
    assert abs(whole.worst_case[0].robust.count - parts.worst_case[0].robust.count) <= 1


class _Masked(nn.Module):
    """A network behind 31 grey levels that no module of its own makes: its gradients are zero."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.inner((30 * images).round() / 30)
        return out


def test_a_surrogate_finds_what_masked_gradients_hide(digits: Digits) -> None:
    net, images, labels = digits
    masked = _Masked(net).eval()
    alone = evaluate(masked, (images, labels), suite="quick", eps=0.1)
    helped = evaluate(masked, (images, labels), suite="quick", eps=0.1, surrogates={"unmasked": net})
    assert alone.robust_accuracy > 0.8
    assert helped.robust_accuracy < 0.4
    transfer = helped.attacks[-1]
    assert transfer.attack == "PGD-40, transfer from unmasked"
    assert transfer.misclassified > 50
    assert alone.verdict.status != "trusted"
    assert helped.verdict.status != "trusted"


def test_what_fools_a_surrogate_alone_counts_for_nothing(linear: Linear, data: Data) -> None:
    class Fickle(nn.Module):
        """Another class at the least change; what it is told has no bearing on the classifier."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            score = 1e6 * (images.flatten(1)[:, :1] - 0.5)
            return torch.cat([score, -score], dim=1)

    fickle = Fickle()
    record = evaluate(linear, data, suite="quick", eps=1e-4, surrogates={"fickle": fickle})
    transfer = next(a for a in record.attacks if "fickle" in a.attack)
    assert transfer.attacked > 0 == transfer.misclassified
    assert fickle.calls > 40
    rows = [r for r in record.ledger if r.attack == transfer.attack]
    assert all(r.adversarial_prediction == r.label and r.outcome == "robust" for r in rows)


def test_a_surrogate_cannot_take_the_name_of_a_view(linear: Linear, data: Data) -> None:
    with pytest.raises(InputError, match="surrogate cannot be called 'logits'"):
        evaluate(linear, data, suite="quick", eps=0.1, surrogates={"logits": linear})


class _Named(NamedTuple):
    logits: Tensor
    features: Tensor


class _Answers(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: Tensor) -> Any:
        logits = images.flatten(1)[:, :3]
        return {
            "tuple": (logits, logits),
            "named": _Named(logits, logits),
            "dict": {"logits": logits},
            "one": logits[:, :1],
            "maps": images,
            "batch": logits.mean(0, keepdim=True),
            "nan": logits * torch.nan,
            "inf": logits + torch.inf,
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tuple", "classifier must return logits N×K, found tuple$"),
        ("named", r"classifier must return logits N×K, found _Named; attack model.classifier\(\)"),
        ("dict", "classifier must return logits N×K, found dict"),
        ("one", "the classifier must tell at least 2 classes apart, found 1"),
        ("maps", r"classifier must return logits N×K with N=7, found \(7, 1, 6, 6\)"),
        ("batch", r"classifier must return logits N×K with N=7, found \(1, 3\)"),
        ("nan", "classifier returned NaN or infinite logits"),
        ("inf", "classifier returned NaN or infinite logits"),
    ],
)
def test_a_classifier_that_answers_no_logits_is_refused_at_the_first_batch(kind: str, message: str) -> None:
    seen = Seen(_Answers(kind)).eval()
    images, labels = torch.rand(20, 1, 6, 6), torch.zeros(20, dtype=torch.long)
    with pytest.raises(InputError, match=message):
        evaluate(seen, (images, labels), suite="quick", eps=0.1, batch_size=7)
    assert seen.forward_images == 4 + 7  # a first look, and the first batch


def test_labels_beyond_the_classes_are_refused_at_the_first_batch_wherever_they_are(linear: Linear) -> None:
    images, labels = torch.rand(20, 1, 6, 6), torch.zeros(20, dtype=torch.long)
    labels[19] = 2
    with pytest.raises(InputError, match="labels must be below the classifier's 2 classes, found 2"):
        evaluate(linear.eval(), (images, labels), suite="quick", eps=0.1, batch_size=7)
    assert linear.batches == [4, 7]  # a first look, and the first batch


@pytest.mark.parametrize("classifier", [lambda x: x, None, nn.Linear, "resnet18", torch.zeros(3)])
def test_what_is_no_module_is_refused(data: Data, classifier: Any) -> None:
    with pytest.raises(InputError, match=f"classifier must be a torch.nn.Module, found {type(classifier).__name__}$"):
        evaluate(classifier, data, eps=0.1)
    with pytest.raises(InputError, match=r"surrogate 'baseline' must be a torch.nn.Module"):
        evaluate(nn.Flatten(), data, eps=0.1, surrogates={"baseline": classifier})


@pytest.mark.parametrize("ours", [False, True])
def test_images_of_other_channels_are_refused_by_name(ours: bool) -> None:
    net: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    net(torch.rand(1, 3, 8, 8))
    if ours:
        net = rf.enhance("resnet_mini", num_classes=3, in_channels=3, image_size=8, pyramid_channels=8).eval()
    message = "images must be N×3×H×W" if ours else r"the classifier raised an error on images \(5, 1, 8, 8\)"
    with pytest.raises(InputError, match=message):
        evaluate(net, (torch.rand(5, 1, 8, 8), torch.zeros(5, dtype=torch.long)), eps=0.1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (([[1.0]], [0]), r"batches of list|must be a torch.Tensor"),
        ((torch.rand(0, 1, 6, 6), torch.zeros(0, dtype=torch.long)), r"at least one image, found shape \(0, 1, 6, 6\)"),
        (iter(()), "data must hold at least one image, found none"),
        (7, r"data must be \(images, labels\) or batches of such, found int"),
        (None, r"data must be \(images, labels\) or batches of such, found NoneType"),
        ((torch.rand(2, 1, 6, 6).numpy(), [0, 1]), "images must be a torch.Tensor, found ndarray"),
        ([torch.rand(2, 1, 6, 6)], "found batches of Tensor"),
        ({"images": 1}, "found batches of str"),
        (
            [(torch.rand(2, 1, 6, 6), torch.zeros(2).long()), (torch.rand(2, 1, 7, 7), torch.zeros(2).long())],
            "batches of data do not fit together",
        ),
    ],
)
def test_data_that_are_none_are_refused(linear: Linear, data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(linear, data, eps=0.1)
    assert linear.batches == []


@pytest.mark.parametrize(
    ("eps", "norm", "message"),
    [
        (0.0, "l2", "eps must be a positive number, found 0.0"),
        (-1.0, "l1", "eps must be a positive number, found -1.0"),
        (float("nan"), "linf", "eps must be a positive number, found nan"),
        (float("inf"), "l2", "eps must be a positive number, found inf"),
        (8.0, "linf", "eps must be at most 1 in linf .* found 8.0; 8/255 is eight grey levels"),
        ("0.1", "linf", "eps must be a number or several, found the text '0.1'"),
    ],
)
def test_radii_that_are_none_are_refused(linear: Linear, data: Data, eps: Any, norm: Norm, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(linear, data, eps=eps, norm=norm)
    assert linear.batches == []


def test_large_radii_are_radii_in_other_norms(linear: Linear, data: Data) -> None:
    assert evaluate(linear, data, suite="first-look", eps=8.0, norm="l2").worst_case[0].eps == 8


def test_a_classifier_whose_logits_do_not_depend_on_images_fails_gradient_attacks_alone(
    monkeypatch: pytest.MonkeyPatch, digits: Digits
) -> None:
    class Hidden(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.inner(images.detach())
            return out

    net, images, labels = digits
    _install(monkeypatch, AttackSpec("FGSM", "fgsm"), AttackSpec("APGD-CE", "apgd-ce"), AttackSpec("noise", "noise"))
    record = evaluate(Hidden(net).eval(), (images, labels), suite="ours", eps=0.3)
    fgsm, apgd, noise = record.attacks
    assert fgsm.failed == fgsm.attacked == apgd.failed == record.clean.count
    assert (noise.failed, noise.attacked) == (0, record.clean.count)
    assert noise.misclassified > 0
    notes = {r.note for r in record.ledger if r.outcome == "failed"}
    assert len(notes) == 1
    assert "do not depend differentiably on the images" in notes.pop()
    names = [r.split(":")[0] for r in record.verdict.reasons]
    assert {"failed-attacks", "vanishing-gradients"} <= set(names)


def test_every_kind_of_attack_is_in_the_registry() -> None:
    assert {p.attack for p in EVERY_KIND} <= set(attacks.names())
