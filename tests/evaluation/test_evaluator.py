from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.evaluation.conftest import install_suite, make_data, make_linear
from tests.fpds import as_trained, gated
from torch import Tensor, nn

import robustfpd as rf
from robustfpd import attacks
from robustfpd.attacks.base import attack as make_attack
from robustfpd.errors import InputError
from robustfpd.evaluation import EvaluationObserver, EvaluationProgress, EvaluationRecord, LedgerRow, evaluate
from robustfpd.evaluation.inputs import gather
from robustfpd.evaluation.ledger import CLEAN
from robustfpd.evaluation.suites import AttackSpec

if TYPE_CHECKING:
    from tests.evaluation.conftest import Data, Linear

    from robustfpd.config import Norm

CHECK_IMAGES = 32
RADII = (0.005, 0.02, 0.05, 0.15)


def _counts(record: EvaluationRecord) -> list[int]:
    return [w.robust.count for w in record.worst_case]


def _findings(record: EvaluationRecord) -> Any:
    seconds = {"__all__": {"seconds"}}
    return record.model_dump(exclude={"environment": True, "attacks": seconds, "ledger": seconds})


def _attacked(record: EvaluationRecord) -> list[LedgerRow]:
    return [row for row in record.ledger if row.attack != CLEAN]


@pytest.fixture
def fpd() -> rf.FPD:
    options: dict[str, Any] = {"num_classes": 3, "in_channels": 1, "image_size": 8, "pyramid_channels": 8}
    return as_trained(rf.enhance("resnet_mini", head="tanh", **gated(**options))).train()


@pytest.fixture
def small() -> Data:
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(6) % 3


@pytest.fixture(scope="module")
def records() -> dict[tuple[str, bool], EvaluationRecord]:
    """Records of the linear classifier by suite and `every_attack`."""
    linear = make_linear()
    data = make_data(linear)
    return {
        (suite, every): evaluate(linear, data, suite=suite, eps=RADII, every_attack=every, batch_size=17)
        for suite in ("quick", "first-look")
        for every in (False, True)
    }


@pytest.mark.parametrize("suite", ["quick", "first-look"])
@pytest.mark.parametrize("every_attack", [False, True])
def test_worst_case_is_the_closed_form_image_by_image(
    records: dict[tuple[str, bool], EvaluationRecord], linear: Linear, data: Data, suite: str, every_attack: bool
) -> None:
    record = records[suite, every_attack]
    images, labels = data
    assert record.clean.count == 50
    expected = [linear.within(images, labels, eps) for eps in RADII]
    assert _counts(record) == [int(e.sum()) for e in expected]
    assert 50 > _counts(record)[0] > _counts(record)[-1] > 0
    for eps, stands in zip(RADII, expected, strict=True):
        misclassified = {r.image for r in _attacked(record) if r.eps <= eps and r.adversarial_prediction != r.label}
        right = set(torch.nonzero(linear(images).argmax(1) == labels).flatten().tolist())
        assert right - misclassified == set(torch.nonzero(stands).flatten().tolist())


def test_radii_are_sorted_and_accuracy_never_rises(linear: Linear, data: Data) -> None:
    record = evaluate(linear, data, suite="first-look", eps=[0.1, 0.01, 0.03, 0.01])
    assert [w.eps for w in record.worst_case] == [0.01, 0.03, 0.1]
    assert _counts(record) == sorted(_counts(record), reverse=True)
    assert record.robust_accuracy == record.worst_case[-1].robust.value


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms_never_rise_either(linear: Linear, data: Data, norm: Any) -> None:
    record = evaluate(linear, data, suite="first-look", eps=(0.1, 0.3, 1.0, 3.0), norm=norm)
    counts = [record.clean.count, *_counts(record)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]
    assert all(r.distance <= r.eps + 1e-5 for r in record.ledger)


def test_a_misclassified_image_is_not_attacked_again(records: dict[tuple[str, bool], EvaluationRecord]) -> None:
    record = records["quick", False]
    survivors = record.clean.count
    for attack in record.attacks:
        assert attack.attacked == survivors
        assert attack.accuracy is None
        survivors -= attack.misclassified
    assert survivors == _counts(record)[-1]
    misclassified: set[int] = set()
    for row in _attacked(record):
        assert row.image not in misclassified
        if row.adversarial_prediction != row.label:
            misclassified.add(row.image)


def test_misclassified_images_take_no_forward_pass(linear: Linear, data: Data) -> None:
    images, labels = data
    record = evaluate(linear.eval(), data, suite="first-look", eps=0.05)
    fgsm, pgd = record.attacks
    assert 0 < pgd.attacked < fgsm.attacked == 50
    sizes = [size for size in linear.batches if size > CHECK_IMAGES]  # smaller batches are those of checks
    assert sizes == [60] + 3 * [50]
    assert fgsm.forward_passes == 3 * 50  # two points, and one pass to judge
    assert pgd.attacked <= CHECK_IMAGES
    # PGD stops an image at its first adversarial example: survivors take 41 passes, and all are judged once.
    stands = _counts(record)[0]
    assert 42 * stands + 2 * (pgd.attacked - stands) <= pgd.forward_passes <= 42 * pgd.attacked
    with torch.no_grad():
        wrong = linear(images).argmax(1) != labels
    linear.batches.clear()
    nothing = evaluate(linear, (images[wrong], labels[wrong]), suite="quick", eps=RADII)
    assert linear.batches == [4, 10, 4]  # fingerprint, clean images, and the search for submodules without gradients
    assert nothing.forward_passes == 4 + 10 + 4


def test_every_attack_runs_on_all_and_has_its_own_accuracy(records: dict[tuple[str, bool], EvaluationRecord]) -> None:
    alone, some = records["quick", True], records["quick", False]
    for attack in alone.attacks:
        assert attack.attacked == alone.clean.count
        assert attack.accuracy is not None
        assert attack.accuracy.count == alone.clean.count - attack.misclassified
        assert attack.accuracy.total == 60
        worst = next(w for w in alone.worst_case if w.eps == attack.eps)
        assert worst.robust.count <= attack.accuracy.count
    assert len(_attacked(alone)) == alone.clean.count * len(alone.attacks)
    assert all(a <= s for a, s in zip(_counts(alone), _counts(some), strict=True))


def test_misclassified_images_count_as_not_robust(linear: Linear, data: Data) -> None:
    images, labels = data
    record = evaluate(linear, (images, labels), suite="first-look", eps=1e-7)
    assert record.clean.count == 50
    assert _counts(record) == [50]
    assert record.worst_case[0].robust.total == 60
    assert all(r.clean_prediction == r.label for r in _attacked(record))
    clean = record.ledger[:60]
    assert [r.image for r in clean] == list(range(60))
    assert {r.attack for r in clean} == {CLEAN}
    assert [r.outcome for r in clean] == [("misclassified", "robust")[i % 6 > 0] for i in range(60)]


def test_the_ledger_holds_every_try(linear: Linear, data: Data) -> None:
    labels = data[1]
    record = evaluate(linear, data, suite="first-look", eps=(0.02, 0.05), batch_size=7)
    assert len(_attacked(record)) == sum(a.attacked for a in record.attacks)
    for attack in record.attacks:
        rows = [r for r in record.ledger if (r.attack, r.eps) == (attack.attack, attack.eps)]
        assert len(rows) == attack.attacked
        assert sum(r.adversarial_prediction != r.label for r in rows) == attack.misclassified
        assert sum(r.queries for r in rows) == attack.forward_passes
        assert sum(r.gradients for r in rows) == attack.backward_passes
    for row in record.ledger:
        assert row.label == int(labels[row.image])
        assert 0 <= row.distance <= row.eps + 1e-6


def test_on_a_linear_model_the_batch_size_does_not_change_what_is_found(linear: Linear, data: Data) -> None:
    a, b = (evaluate(linear, data, suite="first-look", eps=RADII[1:3], batch_size=n) for n in (60, 7))
    assert _counts(a) == _counts(b)
    sizes: set[int] = set()

    def spy(classifier: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        sizes.add(len(images))
        return images.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attacks._ATTACKS, "fgsm", _attack(spy))
        evaluate(linear, data, suite="first-look", eps=0.02, batch_size=7)
    assert sizes == {7, 1}


def test_the_seed_draws_the_images(linear: Linear, data: Data) -> None:
    first, second, other = (
        evaluate(linear, data, suite="first-look", eps=0.02, num_images=20, seed=seed) for seed in (3, 3, 4)
    )
    assert _findings(first) == _findings(second)
    assert first.num_images == 20
    assert first.data_sha256 == gather(data, 20, 3).digest() != other.data_sha256
    assert len({gather(data, count, seed).digest() for seed in (3, 4) for count in (None, 60, 1000)}) == 1


def test_drawn_images_keep_their_labels(linear: Linear, data: Data) -> None:
    images, _ = data
    labels = linear(images).argmax(1)
    assert evaluate(linear, (images, labels), suite="first-look", eps=1e-6, num_images=23).clean.count == 23


def test_a_loader_gives_what_its_images_give(linear: Linear, data: Data) -> None:
    images, labels = data
    pairs = list(zip(torch.chunk(images, 3), torch.chunk(labels, 3), strict=True))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield from pairs

    dataset = torch.utils.data.TensorDataset(images, labels)
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size=11)
    halves = list(zip(torch.chunk(images, 2), torch.chunk(labels, 2), strict=True))
    for source in (pairs, batches(), loader, tuple(halves), [images, labels]):
        gathered = gather(source, None, 0)  # type: ignore[arg-type]
        assert torch.equal(gathered.images, images)
        assert torch.equal(gathered.labels, labels)
        assert gathered.ids.tolist() == list(range(60))
    whole, loaded = (evaluate(linear, source, suite="first-look", eps=0.02) for source in (data, loader))
    assert _findings(loaded) == _findings(whole)


def test_an_observer_gets_every_attack(linear: Linear, data: Data) -> None:
    stages: list[EvaluationProgress] = []
    record = evaluate(
        linear, data, suite="first-look", eps=(0.02, 0.05), observer=EvaluationObserver(on_attack=stages.append)
    )
    assert [(s.attack, s.eps) for s in stages] == [(a.attack, a.eps) for a in record.attacks]
    assert [(s.number, s.total) for s in stages] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [s.survivors for s in stages] == [a.attacked for a in record.attacks]


def _attack(function: Any) -> Any:
    """An attack with the one signature."""

    def attack(
        classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
        generator: torch.Generator | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        found: Tensor = function(classifier, images, labels, eps=eps, norm=norm, generator=generator, **options)
        return found

    return make_attack("ours")(attack)


def _outside(classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, **options: Any) -> Tensor:
    return (images + 1.5 * eps * (0.5 - images).sign()).clamp(0, 1)


def _off_the_box(classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, **options: Any) -> Tensor:
    return images - eps


def _not_a_number(classifier: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return images * torch.nan


def _another_shape(classifier: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return images[:, :, 1:]


def _raises(classifier: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
    raise IndexError("index 10 is out of bounds\nand more")


@pytest.mark.parametrize(
    ("attack", "note"),
    [
        (_outside, r"it left the linf ball of radius 0\.1: distance 0\.15"),
        (_off_the_box, r"InputError: attack \w+ ended outside \[0, 1\]"),
        (_not_a_number, r"it left the linf ball of radius 0.1: distance inf, pixels in \[nan, nan\]"),
        (_another_shape, r"it returned a tensor of shape \(50, 1, 5, 6\)"),
        (_raises, r"IndexError: index 10 is out of bounds$"),
    ],
)
def test_an_attack_that_fails_misclassifies_nothing_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, data: Data, attack: Any, note: str
) -> None:
    alone = evaluate(linear, data, suite="first-look", eps=0.1)
    monkeypatch.setitem(attacks._ATTACKS, "fgsm", _attack(attack))
    record = evaluate(linear, data, suite="first-look", eps=0.1)
    fgsm, pgd = record.attacks
    assert (fgsm.attacked, fgsm.failed, fgsm.misclassified) == (50, 50, 0)
    assert (pgd.attacked, pgd.failed) == (50, 0)
    assert _counts(record) == _counts(alone)
    rows = [r for r in record.ledger if r.attack == "FGSM"]
    assert {r.outcome for r in rows} == {"failed"}
    assert all(re.search(note, r.note) for r in rows)
    assert record.verdict.status == "suspect"
    assert any(r.startswith("failed-attacks: FGSM failed on 50 images") for r in record.verdict.reasons)


def test_an_attack_that_fails_on_one_batch_fails_for_its_images_alone(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, data: Data
) -> None:
    def third(classifier: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        batches.append(len(images))
        if len(batches) == 3:
            raise RuntimeError("CUDA error")
        return rf.attacks.fgsm(classifier, images, labels, **options)

    batches: list[int] = []
    whole = evaluate(linear, data, suite="first-look", eps=0.02, batch_size=10, every_attack=True)
    monkeypatch.setitem(attacks._ATTACKS, "fgsm", _attack(third))
    part = evaluate(linear, data, suite="first-look", eps=0.02, batch_size=10, every_attack=True)
    assert batches == 5 * [10]
    a, b = ([r for r in e.ledger if r.attack == "FGSM"] for e in (whole, part))
    assert [r.outcome for r in b[20:30]] == 10 * ["failed"]
    for old, new in zip(a[:20] + a[30:], b[:20] + b[30:], strict=True):
        assert old.model_copy(update={"seconds": new.seconds}) == new
    assert _counts(part) == _counts(whole)  # PGD finds them
    assert part.attacks[0].failed == 10


def test_where_no_attack_runs_the_verdict_is_broken(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, data: Data
) -> None:
    for name in ("fgsm", "pgd"):
        monkeypatch.setitem(attacks._ATTACKS, name, _attack(_raises))
    record = evaluate(linear, data, suite="first-look", eps=0.1)
    assert record.robust_accuracy == record.clean_accuracy
    assert record.verdict.status == "broken"


def test_a_change_of_the_classifier_is_reported_and_undone(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, data: Data
) -> None:
    def spoils(classifier: Any, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        classifier.classifier.weight.data.zero_()
        return images.clone()

    before = linear.weight.detach().clone()
    monkeypatch.setitem(attacks._ATTACKS, "fgsm", _attack(spoils))
    record = evaluate(linear, data, suite="first-look", eps=0.1)
    assert torch.equal(linear.weight, before)
    assert {r.note for r in record.ledger if r.attack == "FGSM"} == {"it changed the classifier's weight"}
    assert any(r.startswith("unchanged-state: FGSM") for r in record.verdict.reasons)


def test_attacks_that_change_nothing_are_reported_as_idle(
    monkeypatch: pytest.MonkeyPatch, fpd: rf.FPD, small: Data
) -> None:
    images, _ = small
    with torch.no_grad():
        labels = fpd.eval()(images).logits.argmax(1)

    def nothing(classifier: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return images.clone()

    monkeypatch.setitem(attacks._ATTACKS, "fgsm", _attack(nothing))
    monkeypatch.setitem(attacks._ATTACKS, "pgd", _attack(nothing))
    record = evaluate(fpd.classifier(), (images, labels), suite="first-look", eps=0.5, every_attack=True)
    assert [a.attack for a in record.attacks] == ["FGSM", "FGSM, pre-squash", "PGD-40", "PGD-40, pre-squash"]
    assert record.robust_accuracy == record.clean_accuracy == 1
    assert {r.distance for r in record.ledger} == {0.0}
    assert record.verdict.status == "suspect"
    assert any(r.startswith("idle-attacks") for r in record.verdict.reasons)


def test_an_fpd_is_attacked_before_its_tanh_and_its_state_is_restored(
    monkeypatch: pytest.MonkeyPatch, fpd: rf.FPD, small: Data
) -> None:
    views = [AttackSpec(view, "pgd", view, {"steps": 3}) for view in ("logits", "pre-squash")]
    install_suite(monkeypatch, AttackSpec("FGSM", "fgsm"), *views)
    next(m for m in fpd.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    flags = [m.training for m in fpd.modules()]
    state = {k: v.clone() for k, v in fpd.state_dict().items()}
    assert any("running_mean" in k for k in state)
    record = evaluate(fpd, small, suite="ours", eps=0.01, every_attack=True)
    assert [a.attack for a in record.attacks] == ["FGSM", "logits", "pre-squash"]
    assert [m.training for m in fpd.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in fpd.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in fpd.parameters())


def test_a_plain_module_has_no_pre_squash_view(small: Data) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    record = evaluate(plain, small, suite="first-look", eps=0.01)
    assert [a.attack for a in record.attacks] == ["FGSM", "PGD-40"]


def test_a_saturated_tanh_hides_the_gradient_but_not_from_the_suite(small: Data) -> None:
    model = rf.enhance(
        "resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8, protocol="corrected"
    ).eval()
    images, _ = small
    with torch.no_grad():
        linear = model.head.linear
        assert isinstance(linear, nn.Linear)
        shared = linear.weight.mean(0)
        linear.weight.copy_(torch.stack([shared - 20, shared + 20, shared]))
        features = model.back(model.restore(images), images)
        linear.bias.zero_()
        linear.bias[:2] = 12.0 - model.head.pre_squash(features)[:, :2].mean(0)
        labels = model(images).logits.argmax(1)
    record = evaluate(model, (images, labels), suite="first-look", eps=0.3, every_attack=True)
    accuracy = {a.attack: a.accuracy.count for a in record.attacks if a.accuracy is not None}
    assert accuracy["FGSM, pre-squash"] < accuracy["FGSM"]
    assert accuracy["PGD-40, pre-squash"] < accuracy["PGD-40"]
    assert record.worst_case[0].robust.count <= min(accuracy.values())


def test_a_model_that_raises_is_left_as_it_was(linear: Linear, small: Data) -> None:
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(10, 3)).train()
    net[2].eval()
    with pytest.raises(
        InputError, match=r"raised an error on images \(6, 1, 8, 8\) torch.float32 on cpu: RuntimeError: "
    ):
        evaluate(net, small, eps=0.01)
    assert [m.training for m in net.modules()] == [True, True, True, False]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"eps": 8}, "eps must be at most 1 in linf"),
    ({"eps": [0.1, -0.1]}, "eps must be 0 or a positive number, found -0.1"),
    ({"eps": []}, "eps must hold at least one radius, found none"),
    ({"eps": 0.1, "norm": "l7"}, "unknown norm 'l7'"),
    ({"eps": 0.1, "suite": "quik"}, "unknown suite 'quik'; did you mean 'quick'"),
    ({"eps": 0.1, "num_images": 0}, "num_images must be at least 1, found 0"),
    ({"eps": 0.1, "batch_size": 0}, "batch_size must be at least 1, found 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_are_refused(linear: Linear, data: Data, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(linear, data, **options)
    assert linear.batches == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * 255, y), r"images must lie in \[0, 1\].*divide by 255"),
        (lambda x, y: (x * torch.nan, y), "images must be finite, found 2160 NaN"),
        (lambda x, y: ((255 * x).byte(), y), "images must be floating point"),
        (lambda x, y: (x, y.float()), "labels must be integers, found torch.float32"),
        (lambda x, y: (x, y[:-1]), r"labels must have shape \(60,\)"),
        (lambda x, y: (x, y - 1), "labels must not be negative, found -1"),
        (
            lambda x, y: (x, y + (torch.arange(60) == 59) * 5),
            "labels must be below the classifier's 2 classes, found [56]",
        ),
        (lambda *_: [], "data must hold at least one image, found none"),
    ],
)
def test_data_are_refused(linear: Linear, data: Data, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(linear, change(*data), suite="first-look", eps=0.1)


class _Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


def test_a_classifier_that_returns_no_logits_is_refused(data: Data) -> None:
    with pytest.raises(InputError, match="classifier must return logits N×K, found tuple"):
        evaluate(_Pair(), data, eps=0.1)


@pytest.mark.parametrize("eps", [np.float32(0.25), torch.tensor(0.25), np.array([0.25]), (torch.tensor(0.25),)])
def test_radii_may_be_numbers_of_numpy_and_torch(linear: Linear, data: Data, eps: Any) -> None:
    assert [w.eps for w in evaluate(linear, data, suite="first-look", eps=eps).worst_case] == [0.25]


def test_at_radius_0_the_accuracy_is_that_of_the_clean_images(linear: Linear, data: Data) -> None:
    with_zero = evaluate(linear, data, suite="quick", eps=[0.05, 0.0])
    without = evaluate(linear, data, suite="quick", eps=0.05)
    assert [(w.eps, w.robust) for w in with_zero.worst_case[:1]] == [(0.0, with_zero.clean)]
    assert with_zero.worst_case[1:] == with_zero.under_attack == without.worst_case
    rows = [[r.model_copy(update={"seconds": 0.0}) for r in record.ledger] for record in (with_zero, without)]
    assert rows[0] == rows[1]
    assert with_zero.verdict == without.verdict


@pytest.mark.parametrize("every_attack", [False, True])
def test_without_another_radius_no_attack_is_run_and_no_ball_checked(
    linear: Linear, data: Data, tmp_path: Path, every_attack: bool
) -> None:
    record = evaluate(linear, data, suite="quick", eps=0, out_dir=tmp_path, every_attack=every_attack)
    assert (record.robust_accuracy, record.attacks, record.under_attack) == (record.clean_accuracy, (), ())
    assert {r.attack for r in record.ledger} == {"clean"}
    assert record.backward_passes == 0
    outcomes = {c.name: c for c in record.verdict.checks}
    assert outcomes["gradient-agreement"].evidence == outcomes["large-eps"].evidence == "no radius is above 0"
    assert outcomes["batch-composition"].outcome == "passed"
    assert record.verdict.status == "trusted"
    assert evaluate(linear, data, suite="quick", eps=0, out_dir=tmp_path, every_attack=every_attack) == record


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rounding_in_other_precisions_is_not_blamed_on_the_attack(
    linear: Linear, data: Data, dtype: torch.dtype
) -> None:
    images, labels = data
    linear.to(dtype)
    record = evaluate(linear, (images.to(dtype), labels), suite="first-look", eps=0.1)
    assert record.worst_case[0].robust.count < record.clean.count
