from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from tests.evaluation.conftest import install_suite, make_spy
from tests.fpds import as_trained, gated
from torch import Tensor, nn

import robustfpd as rf
from robustfpd import attacks
from robustfpd.attacks import adaptive
from robustfpd.attacks.base import attack as make_attack
from robustfpd.attacks.base import record_queries
from robustfpd.errors import InputError
from robustfpd.evaluation import EvaluationRecord, evaluate, suites
from robustfpd.evaluation.ledger import CLEAN
from robustfpd.evaluation.suites import AttackSpec, Suite

if TYPE_CHECKING:
    from tests.evaluation.conftest import Data, Linear

    from robustfpd.config import Norm

    Digits = tuple[nn.Module, Tensor, Tensor]


class Seen(nn.Module):
    """Counts the images that go forward and backward."""

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


EVERY_KIND = [
    AttackSpec("FGSM", "fgsm"),
    AttackSpec("PGD", "pgd", options={"steps": 3, "restarts": 2, "early_stop": True}),
    AttackSpec("APGD-CE", "apgd-ce", options={"steps": 5}),
    AttackSpec("APGD-T", "apgd-t", options={"steps": 5, "targets": 2}),
    AttackSpec("noise", "noise", options={"samples": 3}),
    AttackSpec("DeepFool", "deepfool"),
    AttackSpec("FMN", "fmn", options={"steps": 5}),
    AttackSpec("FAB-T", "fab-t", options={"steps": 3, "targets": 2}, share=1 / 8),
    AttackSpec("Square", "square", options={"queries": 9}, share=1 / 8),
]


@pytest.mark.parametrize("every_attack", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_passes_add_up_to_what_the_classifier_saw(
    monkeypatch: pytest.MonkeyPatch, digits: Digits, every_attack: bool, training: bool
) -> None:
    net, images, labels = digits
    seen = Seen(copy.deepcopy(net).train(training))
    install_suite(monkeypatch, *EVERY_KIND, probes=5)
    record = evaluate(
        seen, (images[:40], labels[:40]), suite="ours", eps=(0.05, 0.1), batch_size=17, every_attack=every_attack
    )
    assert record.forward_passes == seen.forward_images
    assert record.backward_passes == seen.backward_images > 0
    assert record.check_forward_passes > 0
    passed = sum(a.forward_passes for a in record.attacks) + 40 + record.check_forward_passes
    assert record.forward_passes == passed
    for attack in record.attacks:
        rows = [r for r in record.ledger if (r.attack, r.eps) == (attack.attack, attack.eps)]
        assert attack.forward_passes == sum(r.queries for r in rows)
        assert attack.backward_passes == sum(r.gradients for r in rows)
    assert all(r.queries == 1 and r.gradients == 0 for r in record.ledger if r.attack == CLEAN)


@pytest.mark.parametrize(("protocol", "views"), [("improved", 7), ("corrected", 8)])
def test_passes_of_every_view_of_an_fpd_are_counted(monkeypatch: pytest.MonkeyPatch, protocol: str, views: int) -> None:
    options = gated(protocol=protocol, head="tanh", image_size=8, pyramid_channels=8)
    model = as_trained(rf.enhance("resnet_mini", num_classes=3, in_channels=1, **options)).eval()
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = model(images).logits.argmax(1)
    names = list(adaptive.adaptive_views(model.classifier(), images))
    assert len(names) == views
    install_suite(monkeypatch, *(AttackSpec(name, "pgd", name, {"steps": 2}) for name in names))
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


def test_queries_of_black_box_attacks_are_counted_per_image(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    net, images, labels = digits
    install_suite(monkeypatch, AttackSpec("Square", "square", options={"queries": 60}))
    record = evaluate(net, (images[:40], labels[:40]), suite="ours", eps=0.08, every_attack=True)
    (square,) = record.attacks
    rows = [r for r in record.ledger if r.attack == "Square"]
    misclassified = [r.queries for r in rows if r.outcome == "misclassified"]
    robust = [r.queries for r in rows if r.outcome == "robust"]
    assert len(misclassified) > 0 < len(robust)
    assert min(robust) >= 60 >= max(robust) - 6
    assert len(set(misclassified)) > 1
    assert min(misclassified) < 60
    assert square.median_queries == pytest.approx(float(torch.tensor(misclassified, dtype=torch.float64).quantile(0.5)))
    assert square.median_distance is None
    install_suite(monkeypatch, AttackSpec("HopSkipJump", "hopskipjump"))
    record = evaluate(net, (images[:4], labels[:4]), suite="ours", eps=0.08, every_attack=True)
    (hopskipjump,) = record.attacks
    queries = {r.queries for r in record.ledger if r.attack == "HopSkipJump"}
    assert min(queries) > 1000
    assert hopskipjump.median_distance is not None
    assert 0.01 < hopskipjump.median_distance < 0.6


def test_recorded_queries_and_other_passes_add_up(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    def asks(classifier: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        classifier(images)
        record_queries(classifier, torch.arange(len(images)) // len(images))
        return images.clone()

    net, images, labels = digits
    monkeypatch.setitem(attacks._ATTACKS, "square", make_spy(asks))
    install_suite(monkeypatch, AttackSpec("Square", "square"))
    record = evaluate(net, (images, labels), suite="ours", eps=0.1)
    assert {r.queries for r in record.ledger if r.attack == "Square"} == {2}  # its one, and the judgement


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deterministic_attacks_hardly_depend_on_the_batch_size(
    monkeypatch: pytest.MonkeyPatch, digits: Digits, norm: Norm
) -> None:
    net, images, labels = digits
    install_suite(
        monkeypatch, AttackSpec("FGSM", "fgsm"), AttackSpec("PGD", "pgd", options={"steps": 10, "random_start": False}),
        AttackSpec("BIM", "bim"), AttackSpec("DeepFool", "deepfool"),
    )  # fmt: skip
    eps = 0.06 if norm == "linf" else 0.3
    whole, parts = (evaluate(net, (images, labels), suite="ours", eps=eps, norm=norm, batch_size=n) for n in (100, 7))
    assert 5 < whole.worst_case[0].robust.count < 95
    assert abs(whole.worst_case[0].robust.count - parts.worst_case[0].robust.count) <= 1


class _Mpassed(nn.Module):
    """A network behind 31 grey levels that no module of its own makes: its gradients are zero."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.inner((30 * images).round() / 30)
        return out


def test_a_surrogate_finds_what_masked_gradients_hide(digits: Digits) -> None:
    net, images, labels = digits
    masked = _Mpassed(net).eval()
    alone = evaluate(masked, (images, labels), suite="quick", eps=0.1)
    helped = evaluate(masked, (images, labels), suite="quick", eps=0.1, surrogates={"unmasked": net})
    assert alone.robust_accuracy > 0.8
    assert helped.robust_accuracy < 0.4
    transfer = helped.attacks[-1]
    assert transfer.attack == "PGD-40, transfer from unmasked"
    assert transfer.misclassified > 50
    assert alone.verdict.status != "trusted"
    assert helped.verdict.status != "trusted"


def test_an_image_that_only_a_surrogate_misclassifies_is_robust(linear: Linear, data: Data) -> None:
    class Fickle(nn.Module):
        """Another class at the least change, unrelated to the classifier."""

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
        ("one", "the classifier must have at least 2 classes, found 1"),
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


@pytest.mark.parametrize("ours", [False, True])
def test_images_of_other_channels_are_refused_by_name(ours: bool) -> None:
    net: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    net(torch.rand(1, 3, 8, 8))
    if ours:
        net = rf.enhance("resnet_mini", num_classes=3, in_channels=3, image_size=8, pyramid_channels=8).eval()
    message = "images must be N×3×H×W" if ours else r"the classifier raised an error on images \(5, 1, 8, 8\)"
    with pytest.raises(InputError, match=message):
        evaluate(net, (torch.rand(5, 1, 8, 8), torch.zeros(5, dtype=torch.long)), eps=0.1)


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
    install_suite(
        monkeypatch, AttackSpec("FGSM", "fgsm"), AttackSpec("APGD-CE", "apgd-ce"), AttackSpec("noise", "noise")
    )
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


ATTACKS = [
    AttackSpec("FGSM", "fgsm"),
    AttackSpec("PGD", "pgd", options={"steps": 8, "early_stop": True}),
    AttackSpec("APGD-CE", "apgd-ce", options={"steps": 8}),
]


@pytest.fixture(autouse=True)
def _suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites._SUITES, "ours", Suite(lambda target: ATTACKS, probes=0))


class Narrow(nn.Module):
    """Takes so many images at once and no more; keeps the size of every batch that it took."""

    def __init__(self, inner: nn.Module, most: int, error: Exception) -> None:
        super().__init__()
        self.inner, self.most, self.error = inner, most, error
        self.taken, self.refused = list[int](), list[int]()

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            self.refused.append(len(images))
            raise self.error
        self.taken.append(len(images))
        out: Tensor = self.inner(images)
        return out


def _found(record: EvaluationRecord) -> list[tuple[Any, ...]]:
    return [(r.image, r.attack, r.eps, r.adversarial_prediction, r.outcome) for r in record.ledger]


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503599627370496 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["torch", "allocator", "python"])
def test_running_out_of_memory_halves_the_batch_size_and_changes_no_result(digits: Digits, error: Exception) -> None:
    net, images, labels = digits
    expected = evaluate(net, (images, labels), suite="ours", eps=0.03, gallery=0)
    narrow = Narrow(net, 40, error).eval()
    record = evaluate(narrow, (images, labels), suite="ours", eps=0.03, gallery=0)
    assert narrow.refused == [64]
    assert max(narrow.taken) == 32
    assert record.batch_size == 32 < expected.batch_size == 64
    assert _found(record) == _found(expected)
    assert not any(r.note for r in record.ledger)


def test_a_single_image_that_runs_out_of_memory_is_a_failure(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    net, images, labels = digits

    @make_attack("fgsm")
    def hungry(
        classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        raise ERRORS[0]

    monkeypatch.setitem(attacks._ATTACKS, "fgsm", hungry)
    record = evaluate(net, (images[:20], labels[:20]), suite="ours", eps=0.03, gallery=0)
    failed = [r for r in record.ledger if r.attack == "FGSM"]
    assert {r.outcome for r in failed} == {"failed"}
    assert failed[0].note.startswith("OutOfMemoryError: CUDA out of memory")
    assert record.batch_size == 1
    assert record.attacks[1].failed == 0


def test_an_error_of_an_attack_that_refills_costs_one_batch(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    net, images, labels = digits

    class Picky(nn.Module):
        """Refuses gradients of the 30th image."""

        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad and bool((x - images[30]).abs().flatten(1).amax(dim=1).lt(0.031).any()):
                raise IndexError("not this one")
            out: Tensor = net(x)
            return out

    record = evaluate(Picky(), (images, labels), suite="ours", eps=0.03, batch_size=8, gallery=0)
    pgd = [r for r in record.ledger if r.attack == "PGD"]
    assert 0 < sum(r.outcome == "failed" for r in pgd) <= 8
    assert [r.note for r in pgd if r.image == 30] == ["IndexError: not this one"]


class Watched(nn.Module):
    """Keeps the precisions in which images are passed, and gradients come back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.passed = inner, set[tuple[bool, torch.dtype]]()

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.inner(images)
        self.passed.add((images.requires_grad, hidden.dtype))
        return hidden


def test_attacks_ignore_the_autocast_of_the_caller(digits: Digits) -> None:
    watched = Watched(digits[0]).eval()
    images, labels = digits[1][:20], digits[2][:20]
    expected = evaluate(watched, (images, labels), suite="ours", eps=0.03, gallery=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert digits[0](images).dtype == torch.bfloat16
        record = evaluate(watched, (images, labels), suite="ours", eps=0.03, gallery=0)
    assert {dtype for _, dtype in watched.passed} == {torch.float32}
    assert _found(record) == _found(expected)
    assert record.search_precision == "fp32"
    assert next(c for c in record.verdict.checks if c.name == "search-precision").outcome == "passed"


def test_bfloat16_is_searched_and_float32_decides(digits: Digits) -> None:
    watched = Watched(digits[0]).eval()
    record = evaluate(watched, digits[1:], suite="ours", eps=0.03, search_precision="bf16", gallery=0)
    assert (True, torch.bfloat16) in watched.passed
    exact = evaluate(digits[0], digits[1:], suite="ours", eps=0.03, gallery=0)
    # Many of this small network's margins are within bfloat16's rounding: what stands is too much, never too little.
    assert 0 <= record.worst_case[0].robust.count - exact.worst_case[0].robust.count <= 12
    assert record.search_precision == "bf16"
    check = next(c for c in record.verdict.checks if c.name == "search-precision")
    assert (check.outcome, check.evidence) == (
        "suspicious",
        "attacks differentiated the classifier in bfloat16; float32 confirmed every adversarial example, but no "
        "survivor was attacked in float32",
    )
    with pytest.raises(InputError, match="search_precision"):
        evaluate(digits[0], digits[1:], eps=0.03, search_precision="fp8")  # type: ignore[arg-type]


class Liar(nn.Module):
    """Misclassifies everything in bfloat16; in float32 it is right, and attacks along gradients find it out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.inner(images)
        return out.roll(1, dims=1) if out.dtype == torch.bfloat16 else out


def test_a_success_that_float32_does_not_confirm_is_attacked_again(digits: Digits) -> None:
    liar = Liar(digits[0]).eval()
    exact = evaluate(liar, digits[1:], suite="ours", eps=0.03, gallery=0, every_attack=True)
    record = evaluate(liar, digits[1:], suite="ours", eps=0.03, gallery=0, every_attack=True, search_precision="bf16")
    for found, expected in zip(record.attacks, exact.attacks, strict=True):
        assert abs(found.misclassified - expected.misclassified) <= 2
        assert found.forward_passes > expected.forward_passes
