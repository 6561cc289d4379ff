"""Each check finds the fault it is for, with the right numbers, and passes an undefended network."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.evaluation import defences
from tests.evaluation.defences import After, Before, Both
from torch import Tensor, nn

import robustfpd as rf
from robustfpd import attacks
from robustfpd.attacks.adaptive import View, adaptive_views
from robustfpd.attacks.base import attack
from robustfpd.attacks.losses import margin
from robustfpd.config import Norm
from robustfpd.evaluation import EvaluationRecord, checks, evaluate
from robustfpd.evaluation.attack_runner import AttackRunner
from robustfpd.evaluation.checks import NAMES, AttackFindings, CheckContext, gradients, inputs, outputs
from robustfpd.evaluation.checks import attacks as attack_checks
from robustfpd.evaluation.checks.context import FIXES
from robustfpd.evaluation.doctor import DOCTOR_CHECKS
from robustfpd.evaluation.inputs import EvaluationData
from robustfpd.evaluation.ledger import LedgerRow
from robustfpd.evaluation.record import Check, Verdict
from robustfpd.evaluation.suites import AttackSpec, Suite

DOCS = Path(__file__).parents[2] / "docs" / "checks.md"
COUNT = 32
EPS = 0.15


def _context(classifier: nn.Module, eps: float = EPS, norm: Norm = "linf", probes: int = COUNT) -> CheckContext:
    """Context of a classifier in evaluation mode, on digits that it classifies correctly."""
    images, labels = defences.sample(COUNT)
    runner = AttackRunner(
        classifier, EvaluationData(images, labels, torch.arange(COUNT)), torch.device("cpu"), norm, 0, 64
    )  # fmt: skip
    runner.classify(torch.arange(COUNT))
    runner.set_views(adaptive_views(classifier, images[:4]))
    return CheckContext(runner, runner.clean_predictions == labels, [eps], probes)


@functools.cache
def _attacked(classifier: nn.Module, eps: float) -> tuple[CheckContext, Tensor]:
    context = _context(classifier, eps)
    return context, attack_checks.misclassified_by_pgd(context)


def _probed(classifier: nn.Module, name: str, eps: float = EPS) -> Check:
    return checks.PROBE_CHECKS[name](*_attacked(classifier, eps))


def _findings(robust: Tensor, specs: tuple[AttackSpec, ...] = (), rows: tuple[LedgerRow, ...] = ()) -> AttackFindings:
    return AttackFindings(specs, rows, (), robust, margins=torch.zeros(len(robust)))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def honest() -> defences.Net:
    return defences.plain()


@pytest.fixture(scope="module")
def honest_context(honest: defences.Net) -> CheckContext:
    return _context(honest)


@pytest.fixture(scope="module")
def honest_record(honest: defences.Net) -> EvaluationRecord:
    """Of an undefended network, with a surrogate for black-box attacks."""
    surrogates = {"other": defences.plain(1)}
    return evaluate(honest, defences.sample(12), suite="quick", eps=EPS, surrogates=surrogates)


@pytest.fixture
def suite_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that registers a suite of functions as attacks and returns its name."""

    def make(*functions: Callable[[nn.Module, Tensor], Tensor]) -> str:
        specs = []
        for number, function in enumerate(functions):

            @attack(f"own-{number}")
            def own(
                classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
                generator: torch.Generator | None = None, function: Any = function,
            ) -> Tensor:  # fmt: skip
                x_adv: Tensor = function(classifier, images)
                return x_adv

            monkeypatch.setitem(attacks._ATTACKS, f"own-{number}", own)
            specs.append(AttackSpec(f"own {number}", f"own-{number}"))
        monkeypatch.setitem(rf.evaluation.suites._SUITES, "own", Suite(lambda target: specs, probes=0))
        return "own"

    return make


def _verdict_of(classifier: nn.Module, suite: str, count: int = 20) -> dict[str, Check]:
    record = rf.evaluate(classifier, defences.sample(count), suite=suite, eps=EPS, batch_size=10)
    return {c.name: c for c in record.verdict.checks}


# All checks


def test_every_check_has_an_entry_and_a_fix() -> None:
    text = DOCS.read_text()
    assert re.findall(r"^### `([a-z-]+)`$", text, flags=re.MULTILINE) == [*NAMES, *DOCTOR_CHECKS]
    entries = text.split("### ")[1:]
    for part in ("**Question:**", "**Measured:**", "**Fix:**"):
        assert all(entry.count(part) == 1 for entry in entries), part
    assert tuple(FIXES) == NAMES


def test_an_undefended_network_passes_every_check(honest_record: EvaluationRecord) -> None:
    record = honest_record
    assert tuple(c.name for c in record.verdict.checks) == NAMES
    assert record.verdict.status == "trusted", record.verdict.reasons
    assert {c.outcome for c in record.verdict.checks} <= {"passed", "skipped"}
    assert not any(c.fix for c in record.verdict.checks)
    assert record.robust_accuracy < 0.5  # which the bad defences around it hide
    assert record.check_forward_passes > 0


def test_checks_are_skipped_without_correctly_classified_images(honest: defences.Net) -> None:
    images, labels = defences.sample(8)
    record = rf.evaluate(honest, (images, (labels + 1) % 10), suite="quick", eps=EPS)
    outcomes = {c.name: c.outcome for c in record.verdict.checks}
    assert tuple(outcomes) == NAMES
    assert outcomes["gradient-agreement"] == outcomes["single-step"] == outcomes["more-steps"] == "skipped"


def test_a_check_that_raises_is_suspicious_and_the_others_go_on(honest: defences.Net) -> None:
    def raises(x: Tensor) -> Tensor:
        if len(x) == 1:
            raise RuntimeError("one image is too few")
        return x

    made = {c.name: c for c in checks.before_attacks(_context(Before(honest, raises)))}
    assert made["batch-composition"].outcome == "suspicious"
    assert "RuntimeError: one image is too few" in made["batch-composition"].evidence
    assert made["batch-composition"].fix == FIXES["batch-composition"]
    assert made["gradient-agreement"].outcome == "passed"


def test_reasons_of_failed_checks_come_first() -> None:
    made = [Check(name=n, outcome=o, evidence="e") for n, o in (("a", "suspicious"), ("b", "failed"), ("c", "passed"))]
    verdict = Verdict.of(made)
    assert (verdict.status, verdict.reasons) == ("broken", ("b: e", "a: e"))
    assert Verdict.of(made[::2]).status == "suspect"
    assert Verdict.of(made[2:]).status == "trusted"


# Inputs


def test_training_mode(honest: defences.Net) -> None:
    images, _ = defences.sample(8)
    bad = defences.BAD["dropout in training mode"].make(honest)
    made = inputs.training_mode(bad, images)
    assert (made.outcome, made.values["training"]) == ("suspicious", 1)
    assert "Dropout" in made.evidence
    harmless = inputs.training_mode(After(honest, lambda z: z).train(False).requires_grad_(True), images)
    assert (harmless.outcome, harmless.values["training"]) == ("passed", 0)


def test_training_mode_that_changes_nothing_passes_and_statistics_are_put_back() -> None:
    images, _ = defences.sample(8)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).train()
    assert inputs.training_mode(flat, images).outcome == "passed"
    norm = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)).train()
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    assert inputs.training_mode(norm, images).outcome == "suspicious"
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    assert norm.training


def test_images_in_range() -> None:
    images, _ = defences.sample(8)
    dark = inputs.images_in_range(images / 255)
    assert dark.outcome == "suspicious"
    assert dark.values["high"] == pytest.approx(1 / 255)
    assert inputs.images_in_range(images).outcome == "passed"


def test_stays_in_evaluation_mode(honest: defences.Net, honest_context: CheckContext) -> None:
    bad = defences.BAD["dropout that stays"].make(honest)
    made = inputs.stays_in_evaluation_mode(_context(bad))
    assert (made.outcome, made.values["modules"]) == ("suspicious", 1)
    assert "'dropout'" in made.evidence
    assert inputs.stays_in_evaluation_mode(honest_context).outcome == "passed"


@pytest.mark.parametrize(
    ("eps", "norm", "outcome"),
    [
        (0.9, "linf", "suspicious"), (8 / 255 / 255, "linf", "suspicious"), (8 / 255, "linf", "passed"),
        (0.3, "linf", "passed"), (8.0, "l2", "suspicious"), (1.5, "l2", "passed"), (1e-4, "l2", "suspicious"),
        (60.0, "l1", "suspicious"), (3.0, "l1", "passed"), (1e-4, "l1", "suspicious"),
    ],
)  # fmt: skip
def test_eps_units(honest: defences.Net, eps: float, norm: Norm, outcome: str) -> None:
    made = inputs.eps_units(_context(honest, eps, norm))
    assert made.outcome == outcome
    assert made.values["largest"] == pytest.approx(eps)


# Outputs


def test_randomised_outputs(honest: defences.Net, honest_context: CheckContext) -> None:
    bad = outputs.randomised_outputs(_context(Before(honest, lambda x: x + 0.01 * torch.randn_like(x))))
    assert bad.outcome == "suspicious"
    assert bad.values["largest_difference"] > 1e-3
    good = outputs.randomised_outputs(honest_context)
    assert (good.outcome, good.values["changed"]) == ("passed", 0)
    assert checks.is_random([bad])
    assert not checks.is_random([good])


def test_finite_outputs(honest: defences.Net, honest_context: CheckContext) -> None:
    bad = outputs.finite_outputs(_context(defences.BAD["NaN off the manifold"].make(honest)))
    assert bad.outcome == "suspicious"
    assert bad.values["images"] == len(honest_context.images)
    assert outputs.finite_outputs(honest_context).values["images"] == 0


@pytest.mark.parametrize(("name", "word"), [("softmax", "distribution"), ("saturated tanh", "bound 1")])
def test_squashed_outputs(honest: defences.Net, name: str, word: str, honest_context: CheckContext) -> None:
    made = outputs.squashed_outputs(_context(defences.BAD[name].make(honest)))
    assert made.outcome == "suspicious"
    assert word in made.evidence
    assert outputs.squashed_outputs(honest_context).outcome == "passed"


def test_batch_composition(honest: defences.Net, honest_context: CheckContext) -> None:
    made = outputs.batch_composition(_context(Before(honest, lambda x: x - 0.5 * x.mean(dim=0))))
    assert made.outcome == "suspicious"
    assert made.values["largest_difference"] > 0.01
    assert outputs.batch_composition(honest_context).values["changed"] == 0


def test_wrapper_accuracy(honest: defences.Net) -> None:
    context = _context(honest)
    assert outputs.wrapper_accuracy(context).outcome == "passed"
    context.runner.set_views({"logits": View(honest), "other": View(After(honest, lambda z: z.roll(1, dims=1)))})
    made = outputs.wrapper_accuracy(context)
    assert (made.outcome, made.values["differing"]) == ("suspicious", len(context.images))
    assert made.evidence.endswith("(other)")
    two_faced = outputs.wrapper_accuracy(_context(defences.BAD["two-faced"].make(honest)))
    assert two_faced.outcome == "suspicious"


# Gradients


def test_vanishing_gradients(honest: defences.Net, honest_context: CheckContext) -> None:
    scaled = gradients.vanishing_gradients(_context(After(honest, lambda z: 1000 * z)))
    assert scaled.outcome == "suspicious"
    assert (scaled.values["zero_ce"] > 0.9, scaled.values["zero_margin"]) == (True, 0)
    detached = gradients.vanishing_gradients(_context(Before(honest, lambda x: x.round())))
    assert (detached.outcome, detached.values["zero_margin"]) == ("suspicious", 1)
    nan = gradients.vanishing_gradients(_context(Before(honest, defences.root)))
    assert (nan.outcome, nan.values["nan_ce"]) == ("suspicious", 1)
    none = gradients.vanishing_gradients(_context(After(honest, lambda z: z.detach())))
    assert none.outcome == "suspicious"
    good = gradients.vanishing_gradients(honest_context)
    assert (good.outcome, good.values["zero_ce"], good.values["nan_ce"]) == ("passed", 0, 0)


def test_gradients_that_vanish_only_off_the_images_are_seen(honest: defences.Net) -> None:
    made = gradients.vanishing_gradients(_context(defences.BAD["flat off the manifold"].make(honest)))
    assert (made.outcome, made.values["zero_margin"]) == ("suspicious", 1)


def test_gradient_agreement(honest: defences.Net, honest_context: CheckContext) -> None:
    made = gradients.gradient_agreement(_context(defences.BAD["misleading gradients"].make(honest)))
    assert (made.outcome, made.values["error"] > 0.5) == ("suspicious", True)
    few_classes = gradients.gradient_agreement(_context(defences.PartlyReversed(honest).eval()))
    assert few_classes.outcome == "suspicious"
    good = gradients.gradient_agreement(honest_context)
    assert (good.outcome, good.values["error"] < 0.01) == ("passed", True)


@pytest.mark.parametrize("first", [defences.OrderStatistic(), defences.OrderStatistic(3, 6), nn.MaxPool2d(3, 1, 1)])
def test_gradient_agreement_passes_networks_with_kinks_where_pixels_are_equal(
    honest: defences.Net, first: nn.Module
) -> None:
    context = _context(Before(honest, first).eval())
    made = gradients.gradient_agreement(context)
    assert (made.outcome, made.values["error"] < 0.15) == ("passed", True), made.evidence
    gradient = gradients._gradient(context, context.images, context.labels, margin)
    assert gradient is not None
    x = context.images.clamp(1e-3, 1 - 1e-3)  # at the images themselves the error does not shrink with the step
    errors = gradients._disagreement(context, x, gradient, gradients.STEPS[1], torch.Generator().manual_seed(0))
    assert float(errors.quantile(0.85)) > gradients.DISAGREEMENT


@pytest.mark.parametrize("scale", [0.0, 0.4, -1.0])
def test_gradient_agreement_finds_wrong_gradients_of_networks_with_kinks(honest: defences.Net, scale: float) -> None:
    kinked = Before(honest, defences.OrderStatistic(3, 6))
    wrong = After(kinked, lambda z: z.detach() + scale * (z - z.detach()))  # gradients of another size or sign
    assert gradients.gradient_agreement(_context(wrong.eval())).outcome == "suspicious"


def test_gradient_stability(honest: defences.Net, honest_context: CheckContext) -> None:
    made = gradients.gradient_stability(_context(Before(honest, lambda x: x + 0.01 * (5000 * x).sin())))
    assert (made.outcome, made.values["cosine_around"] < 0.3) == ("suspicious", True)
    good = gradients.gradient_stability(honest_context)
    assert (good.outcome, good.values["cosine"] > 0.8) == ("passed", True)


# Attacks of the checks


def _steps(honest: nn.Module) -> nn.Module:
    """Right slopes at the images themselves, wrong ones anywhere else."""
    images, _ = defences.sample(COUNT)

    def last(x: Tensor, logits: Tensor) -> Tensor:
        known = torch.cdist(x.detach().flatten(1), images.flatten(1)).amin(dim=1, keepdim=True) < 1e-5
        return torch.where(known, logits, 2 * logits.detach() - logits)

    return Both(honest, last)


def test_single_step(honest: defences.Net) -> None:
    made = _probed(_steps(honest), "single-step")
    assert made.outcome == "suspicious"
    assert made.values["fgsm"] > made.values["pgd"]
    assert _probed(honest, "single-step").outcome == "passed"


def test_random_noise(honest: defences.Net) -> None:
    away = Both(honest, lambda x, logits: 2 * logits.detach() - logits)
    made = _probed(away, "random-noise", eps=0.4)
    assert (made.outcome, made.values["alone"] > 2) == ("suspicious", True)
    assert _probed(honest, "random-noise", eps=0.4).values["alone"] == 0


def test_monotone_in_eps(honest: defences.Net) -> None:
    images, _ = defences.sample(COUNT)

    def hidden_far_away(x: Tensor, logits: Tensor) -> Tensor:
        far = torch.cdist(x.detach().flatten(1), images.flatten(1), p=torch.inf).amin(dim=1, keepdim=True) > 1.1 * EPS
        return torch.where(far, 2 * logits.detach() - logits, logits)

    made = _probed(Both(honest, hidden_far_away), "monotone-in-eps")
    assert (made.outcome, made.values["lost"] > 2) == ("suspicious", True)
    assert _probed(honest, "monotone-in-eps").outcome == "passed"


def test_large_eps(honest: defences.Net) -> None:
    made = _probed(Before(honest, lambda x: x.round()), "large-eps")
    assert made.outcome == "suspicious"
    assert made.values["at_whole"] > 5
    good = _probed(honest, "large-eps")
    assert (good.outcome, good.values["at_whole"]) == ("passed", 0)


def test_earlier_iterate(honest: defences.Net) -> None:
    made = _probed(Before(honest, lambda x: x + 0.2 * torch.randn_like(x)), "earlier-iterate", eps=0.1)
    assert (made.outcome, made.values["lost"] > 3) == ("suspicious", True)
    assert _probed(honest, "earlier-iterate").outcome == "passed"


def test_more_steps(honest: defences.Net, honest_context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack_checks, "MORE_STEPS", 20)
    every = torch.ones(COUNT, dtype=torch.bool)
    bad = attack_checks.more_steps(honest_context, _findings(every))
    assert (bad.outcome, bad.values["attacked"]) == ("suspicious", COUNT // 2)
    assert bad.values["gained"] > 8
    assert attack_checks.more_steps(honest_context, _findings(~every)).outcome == "skipped"
    assert attack_checks.more_steps(_context(honest, eps=0.002), _findings(every)).outcome == "passed"


def test_rugged_loss(honest: defences.Net, honest_context: CheckContext) -> None:
    findings = _findings(torch.arange(COUNT) < 20)
    waves = _context(Before(honest, lambda x: x + 0.05 * (200 * x).sin()))
    bad = gradients.rugged_loss(waves, findings)
    assert (bad.outcome, bad.values["median_cosine"] < 0.15) == ("suspicious", True)
    assert gradients.gradient_stability(waves).outcome == "passed"
    good = gradients.rugged_loss(honest_context, findings)
    assert (good.outcome, good.values["median_cosine"] > 0.9) == ("passed", True)
    assert gradients.rugged_loss(waves, _findings(torch.arange(COUNT) < 2)).outcome == "skipped"


# Results of the suite


def test_black_box_of_a_masked_gradient(honest: defences.Net) -> None:
    record = rf.evaluate(
        Before(honest, lambda x: x.round()), defences.sample(12), suite="quick", eps=0.3, surrogates={"plain": honest}
    )
    made = {c.name: c for c in record.verdict.checks}["black-box"]
    assert (made.outcome, made.values["turned"] > 1) == ("suspicious", True)


def _row(image: int, attack: str, outcome: Any, eps: float = EPS) -> LedgerRow:
    return LedgerRow(
        image=image, label=0, clean_prediction=0, attack=attack, eps=eps, adversarial_prediction=1, distance=eps,
        outcome=outcome, margin=0.0, queries=1, gradients=0, seconds=0.0, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("white_box", "black_box", "outcome"),
    [
        ("robust", "misclassified", "suspicious"),
        ("robust", "robust", "passed"),
        ("misclassified", "misclassified", "passed"),
        (None, "misclassified", "passed"),
        ("robust", None, "skipped"),
    ],
)
def test_black_box_compares_images_that_both_kinds_of_attacks_tried(
    honest_context: CheckContext, white_box: str | None, black_box: str | None, outcome: str
) -> None:
    specs = AttackSpec("PGD", "pgd"), AttackSpec("Square", "square")
    tried = {"PGD": white_box, "Square": black_box}
    rows = [_row(i, label, result) for i in range(4) for label, result in tried.items() if result is not None]
    findings = _findings(torch.ones(COUNT, dtype=torch.bool), specs, tuple(rows))
    assert attack_checks.black_box(honest_context, findings).outcome == outcome


def test_failed_attacks(honest: defences.Net, suite_of: Callable[..., str]) -> None:
    batches: list[int] = []

    def sometimes(classifier: nn.Module, images: Tensor) -> Tensor:
        batches.append(len(images))
        if len(batches) == 1:
            raise RuntimeError("no memory left")
        return images + 1e-3 * torch.ones_like(images) * (images < 0.9)

    def outside(classifier: nn.Module, images: Tensor) -> Tensor:
        return (images + 2 * EPS).clamp(0, 1)

    made = _verdict_of(honest, suite_of(sometimes))["failed-attacks"]
    assert (made.outcome, made.values["failed"]) == ("suspicious", batches[0])
    assert "RuntimeError: no memory left" in made.evidence
    left = _verdict_of(honest, suite_of(outside))["failed-attacks"]
    assert left.outcome == "failed"
    assert "it left the linf ball of radius 0.15: distance 0.3" in left.evidence


def test_unchanged_state(suite_of: Callable[..., str]) -> None:
    norm = nn.BatchNorm2d(1)
    net = nn.Sequential(norm, defences.plain()).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def in_training_mode(classifier: nn.Module, images: Tensor) -> Tensor:
        F.batch_norm(images, norm.running_mean, norm.running_var, training=True)
        return images * 0.99

    made = _verdict_of(net, suite_of(in_training_mode))
    assert made["unchanged-state"].outcome == "suspicious"
    assert "own 0: it changed the classifier's 0.running_mean" in made["unchanged-state"].evidence
    assert made["failed-attacks"].outcome == "passed"
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_idle_attacks(honest: defences.Net, suite_of: Callable[..., str]) -> None:
    made = _verdict_of(honest, suite_of(lambda classifier, images: images, lambda classifier, images: images * 0.99))
    assert (made["idle-attacks"].outcome, made["idle-attacks"].values["idle"]) == ("suspicious", 1)
    assert made["idle-attacks"].evidence.endswith("own 0")
    assert made["unchanged-state"].outcome == "passed"
