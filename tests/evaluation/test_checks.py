"""Each check sees what it is there to see, with the right numbers, and passes an honest network."""

from __future__ import annotations

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
from robustfpd.config import Norm
from robustfpd.evaluation import checks
from robustfpd.evaluation.attack_runner import AttackRunner
from robustfpd.evaluation.checks import NAMES, CheckContext, gradients, outputs
from robustfpd.evaluation.checks import attacks as attack_checks
from robustfpd.evaluation.checks.inputs import eps_units, images_in_range, stays_in_evaluation, training_mode
from robustfpd.evaluation.suites import AttackSpec, Suite
from robustfpd.evaluation.verdict import Check, Verdict

DOCS = Path(__file__).parents[2] / "docs" / "checks.md"
COUNT = 32
EPS = 0.15


def _subject(classifier: nn.Module, eps: float = EPS, norm: Norm = "linf", probes: int = COUNT) -> CheckContext:
    """What the checks see of a classifier in evaluation mode, on digits that it classifies correctly."""
    images, labels = defences.sample(COUNT)
    runner = AttackRunner(classifier, images, labels, torch.arange(COUNT), torch.device("cpu"), norm, 0, 64)
    runner.ask(torch.arange(COUNT))
    runner.offer(adaptive_views(classifier, images[:4]))
    return CheckContext(runner, runner.clean == labels, [eps], probes)


def _probed(classifier: nn.Module, name: str, eps: float = EPS) -> Check:
    return next(c for c in attack_checks.probing(_subject(classifier, eps)) if c.name == name)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def honest() -> defences.Net:
    return defences.plain()


@pytest.fixture
def suite_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Makes a suite of functions as attacks and returns its name."""

    def make(*functions: Callable[[nn.Module, Tensor], Tensor]) -> str:
        planned = []
        for number, function in enumerate(functions):

            @attack(f"own-{number}")
            def own(
                classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
                generator: torch.Generator | None = None, function: Any = function,
            ) -> Tensor:  # fmt: skip
                found: Tensor = function(classifier, images)
                return found

            monkeypatch.setitem(attacks._ATTACKS, f"own-{number}", own)
            planned.append(AttackSpec(f"own {number}", f"own-{number}"))
        monkeypatch.setitem(rf.evaluation.suites._SUITES, "own", Suite(lambda target: planned, probes=0))
        return "own"

    return make


def _verdict_of(classifier: nn.Module, suite: str, count: int = 20) -> dict[str, Check]:
    record = rf.evaluate(classifier, defences.sample(count), suite=suite, eps=EPS, batch_size=10)
    return {c.name: c for c in record.verdict.checks}


# The catalogue


def test_every_check_has_an_entry_and_every_entry_a_check() -> None:
    entries = re.findall(r"^### `([a-z-]+)`$", DOCS.read_text(), flags=re.MULTILINE)
    assert entries == list(NAMES)
    assert all(entry.count("**Asked:**") == 1 for entry in DOCS.read_text().split("### ")[1:])


def test_every_check_that_is_made_is_in_the_catalogue(honest: defences.Net) -> None:
    record = rf.evaluate(honest, defences.sample(12), suite="quick", eps=EPS)
    assert tuple(c.name for c in record.verdict.checks) == NAMES
    assert record.verdict.status == "trusted", record.verdict.reasons
    assert record.check_forward_passes > 0


def test_no_image_classified_rightly_leaves_nothing_to_check(honest: defences.Net) -> None:
    images, labels = defences.sample(8)
    record = rf.evaluate(honest, (images, (labels + 1) % 10), suite="quick", eps=EPS)
    outcomes = {c.name: c.outcome for c in record.verdict.checks}
    assert tuple(outcomes) == NAMES
    assert outcomes["gradient-agreement"] == outcomes["single-step"] == outcomes["more-steps"] == "skipped"


def test_a_classifier_that_raises_under_a_check_is_suspicious_and_the_others_go_on(honest: defences.Net) -> None:
    def raises(x: Tensor) -> Tensor:
        if len(x) == 1:
            raise RuntimeError("one image is too few")
        return x

    found = {c.name: c for c in checks.before_attacks(_subject(Before(honest, raises)))}
    assert found["batch-composition"].outcome == "suspicious"
    assert "RuntimeError: one image is too few" in found["batch-composition"].evidence
    assert found["gradient-agreement"].outcome == "passed"


def test_the_gravest_reasons_come_first() -> None:
    made = [Check(name=n, outcome=o, evidence="e") for n, o in (("a", "suspicious"), ("b", "failed"), ("c", "passed"))]
    verdict = Verdict.of(made)
    assert (verdict.status, verdict.reasons) == ("broken", ("b: e", "a: e"))
    assert Verdict.of(made[::2]).status == "suspect"
    assert Verdict.of(made[2:]).status == "trusted"


# What was handed over


def test_training_mode(honest: defences.Net) -> None:
    images, _ = defences.sample(8)
    device = torch.device("cpu")
    bad = defences.BAD["dropout handed over in training mode"].make(honest)
    found = training_mode(bad, images, device)
    assert (found.outcome, found.values["training"]) == ("suspicious", 1)
    assert "Dropout" in found.evidence
    harmless = training_mode(After(honest, lambda z: z).train(False).requires_grad_(True), images, device)
    assert (harmless.outcome, harmless.values["training"]) == ("passed", 0)


def test_training_mode_that_changes_nothing_passes_and_statistics_are_put_back() -> None:
    images, _ = defences.sample(8)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).train()
    assert training_mode(flat, images, torch.device("cpu")).outcome == "passed"
    norm = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)).train()
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    assert training_mode(norm, images, torch.device("cpu")).outcome == "suspicious"
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    assert norm.training


def test_images_in_range() -> None:
    images, _ = defences.sample(8)
    dark = images_in_range(images / 255)
    assert dark.outcome == "suspicious"
    assert dark.values["high"] == pytest.approx(1 / 255)
    assert images_in_range(images).outcome == "passed"


def test_stays_in_evaluation_mode(honest: defences.Net) -> None:
    bad = defences.BAD["dropout that stays"].make(honest)
    found = stays_in_evaluation(_subject(bad))
    assert (found.outcome, found.values["modules"]) == ("suspicious", 1)
    assert "'dropout'" in found.evidence
    assert stays_in_evaluation(_subject(honest)).outcome == "passed"


@pytest.mark.parametrize(
    ("eps", "norm", "outcome"),
    [
        (0.9, "linf", "suspicious"), (8 / 255 / 255, "linf", "suspicious"), (8 / 255, "linf", "passed"),
        (0.3, "linf", "passed"), (8.0, "l2", "suspicious"), (1.5, "l2", "passed"), (1e-4, "l2", "suspicious"),
        (60.0, "l1", "suspicious"), (3.0, "l1", "passed"), (1e-4, "l1", "suspicious"),
    ],
)  # fmt: skip
def test_eps_units(honest: defences.Net, eps: float, norm: Norm, outcome: str) -> None:
    found = eps_units(_subject(honest, eps, norm))
    assert found.outcome == outcome
    assert found.values["largest"] == pytest.approx(eps)


# What it answers


def test_randomised_outputs(honest: defences.Net) -> None:
    bad = outputs.randomised(_subject(Before(honest, lambda x: x + 0.01 * torch.randn_like(x))))
    assert bad.outcome == "suspicious"
    assert bad.values["largest_difference"] > 1e-3
    good = outputs.randomised(_subject(honest))
    assert (good.outcome, good.values["changed"]) == ("passed", 0)
    assert checks.is_random([bad])
    assert not checks.is_random([good])


def test_finite_outputs(honest: defences.Net) -> None:
    bad = outputs.finite(_subject(defences.BAD["NaN off the manifold"].make(honest)))
    assert bad.outcome == "suspicious"
    assert bad.values["images"] == len(_subject(honest).images)
    assert outputs.finite(_subject(honest)).values["images"] == 0
    record = rf.evaluate(defences.BAD["NaN off the manifold"].make(honest), defences.sample(12), suite="quick", eps=EPS)
    assert any(reason.startswith("finite-outputs") for reason in record.verdict.reasons)


@pytest.mark.parametrize(("name", "word"), [("softmax", "distribution"), ("saturated tanh", "bound 1")])
def test_squashed_outputs(honest: defences.Net, name: str, word: str) -> None:
    found = outputs.squashed(_subject(defences.BAD[name].make(honest)))
    assert found.outcome == "suspicious"
    assert word in found.evidence
    assert outputs.squashed(_subject(honest)).outcome == "passed"


def test_batch_composition(honest: defences.Net) -> None:
    found = outputs.batches(_subject(Before(honest, lambda x: x - 0.5 * x.mean(dim=0))))
    assert found.outcome == "suspicious"
    assert found.values["largest_difference"] > 0.01
    assert outputs.batches(_subject(honest)).values["changed"] == 0


def test_wrapper_accuracy(honest: defences.Net) -> None:
    subject = _subject(honest)
    assert outputs.wrappers(subject).outcome == "passed"
    subject.runner.offer({"logits": View(honest), "other": View(After(honest, lambda z: z.roll(1, dims=1)))})
    found = outputs.wrappers(subject)
    assert (found.outcome, found.values["differing"]) == ("suspicious", len(subject.images))
    assert found.evidence.endswith("(other)")
    two_faced = outputs.wrappers(_subject(defences.BAD["two-faced"].make(honest)))
    assert two_faced.outcome == "suspicious"


# What its gradients say


def test_vanishing_gradients(honest: defences.Net) -> None:
    scaled = gradients.vanishing(_subject(After(honest, lambda z: 1000 * z)))
    assert scaled.outcome == "suspicious"
    assert (scaled.values["zero_ce"] > 0.9, scaled.values["zero_margin"]) == (True, 0)
    detached = gradients.vanishing(_subject(Before(honest, lambda x: x.round())))
    assert (detached.outcome, detached.values["zero_margin"]) == ("suspicious", 1)
    nan = gradients.vanishing(_subject(Before(honest, defences.root)))
    assert (nan.outcome, nan.values["nan_ce"]) == ("suspicious", 1)
    none = gradients.vanishing(_subject(After(honest, lambda z: z.detach())))
    assert none.outcome == "suspicious"
    good = gradients.vanishing(_subject(honest))
    assert (good.outcome, good.values["zero_ce"], good.values["nan_ce"]) == ("passed", 0, 0)


def test_gradients_that_vanish_only_off_the_images_are_seen(honest: defences.Net) -> None:
    found = gradients.vanishing(_subject(defences.BAD["flat off the manifold"].make(honest)))
    assert (found.outcome, found.values["zero_margin"]) == ("suspicious", 1)


def test_gradient_agreement(honest: defences.Net) -> None:
    found = gradients.agreement(_subject(defences.BAD["misleading gradients"].make(honest)))
    assert (found.outcome, found.values["error"] > 0.5) == ("suspicious", True)
    good = gradients.agreement(_subject(honest))
    assert (good.outcome, good.values["error"] < 0.01) == ("passed", True)


def test_gradient_stability(honest: defences.Net) -> None:
    found = gradients.stability(_subject(Before(honest, lambda x: x + 0.01 * (5000 * x).sin())))
    assert (found.outcome, found.values["cosine_around"] < 0.3) == ("suspicious", True)
    good = gradients.stability(_subject(honest))
    assert (good.outcome, good.values["cosine"] > 0.8) == ("passed", True)


# How attacks behave


def _steps(honest: nn.Module) -> nn.Module:
    """Right slopes at the images themselves, wrong ones anywhere else."""
    images, _ = defences.sample(COUNT)

    def last(x: Tensor, logits: Tensor) -> Tensor:
        known = torch.cdist(x.detach().flatten(1), images.flatten(1)).amin(dim=1, keepdim=True) < 1e-5
        return torch.where(known, logits, 2 * logits.detach() - logits)

    return Both(honest, last)


def test_single_step(honest: defences.Net) -> None:
    found = _probed(_steps(honest), "single-step")
    assert found.outcome == "suspicious"
    assert found.values["fgsm"] > found.values["pgd"]
    assert _probed(honest, "single-step").outcome == "passed"


def test_random_noise(honest: defences.Net) -> None:
    away = Both(honest, lambda x, logits: 2 * logits.detach() - logits)
    found = _probed(away, "random-noise", eps=0.4)
    assert (found.outcome, found.values["alone"] > 2) == ("suspicious", True)
    assert _probed(honest, "random-noise", eps=0.4).values["alone"] == 0


def test_monotone_in_eps(honest: defences.Net) -> None:
    images, _ = defences.sample(COUNT)

    def hidden_far_away(x: Tensor, logits: Tensor) -> Tensor:
        far = torch.cdist(x.detach().flatten(1), images.flatten(1), p=torch.inf).amin(dim=1, keepdim=True) > 1.1 * EPS
        return torch.where(far, 2 * logits.detach() - logits, logits)

    found = _probed(Both(honest, hidden_far_away), "monotone-in-eps")
    assert (found.outcome, found.values["lost"] > 2) == ("suspicious", True)
    assert _probed(honest, "monotone-in-eps").outcome == "passed"


def test_large_eps(honest: defences.Net) -> None:
    found = _probed(Before(honest, lambda x: x.round()), "large-eps")
    assert found.outcome == "suspicious"
    assert found.values["at_whole"] > 5
    good = _probed(honest, "large-eps")
    assert (good.outcome, good.values["at_whole"]) == ("passed", 0)


def test_earlier_iterate(honest: defences.Net) -> None:
    found = _probed(Before(honest, lambda x: x + 0.2 * torch.randn_like(x)), "earlier-iterate", eps=0.1)
    assert (found.outcome, found.values["lost"] > 3) == ("suspicious", True)
    assert _probed(honest, "earlier-iterate").outcome == "passed"


def test_more_steps(honest: defences.Net) -> None:
    subject = _subject(honest)
    everything = torch.ones(COUNT, dtype=torch.bool)
    findings = checks.Findings((), (), (), standing=everything, closest=torch.zeros(COUNT))
    found = attack_checks.more_steps(subject, findings)
    assert (found.outcome, found.values["attacked"]) == ("suspicious", COUNT // 2)
    assert found.values["gained"] > 8
    nothing = checks.Findings((), (), (), standing=~everything, closest=torch.zeros(COUNT))
    assert attack_checks.more_steps(subject, nothing).outcome == "skipped"
    robust = _subject(defences.pgd_trained(), eps=0.01)
    assert attack_checks.more_steps(robust, findings).outcome == "passed"


def test_rugged_loss(honest: defences.Net) -> None:
    standing = torch.arange(COUNT) < 20
    findings = checks.Findings((), (), (), standing=standing, closest=torch.zeros(COUNT))
    waves = _subject(Before(honest, lambda x: x + 0.05 * (200 * x).sin()))
    found = gradients.ruggedness(waves, findings)
    assert (found.outcome, found.values["median_cosine"] < 0.15) == ("suspicious", True)
    assert gradients.stability(waves).outcome == "passed"
    good = gradients.ruggedness(_subject(honest), findings)
    assert (good.outcome, good.values["median_cosine"] > 0.9) == ("passed", True)
    fallen = checks.Findings((), (), (), standing=torch.arange(COUNT) < 2, closest=torch.zeros(COUNT))
    assert gradients.ruggedness(waves, fallen).outcome == "skipped"


# What the attacks brought home


def test_black_box(honest: defences.Net) -> None:
    record = rf.evaluate(
        Before(honest, lambda x: x.round()), defences.sample(12), suite="quick", eps=0.3, surrogates={"plain": honest}
    )
    found = {c.name: c for c in record.verdict.checks}["black-box"]
    assert (found.outcome, found.values["turned"] > 1) == ("suspicious", True)
    honestly = rf.evaluate(honest, defences.sample(12), suite="quick", eps=EPS, surrogates={"other": defences.plain(1)})
    assert {c.name: c.outcome for c in honestly.verdict.checks}["black-box"] in ("passed", "skipped")


def test_failed_attacks(honest: defences.Net, suite_of: Callable[..., str]) -> None:
    batches: list[int] = []

    def sometimes(classifier: nn.Module, images: Tensor) -> Tensor:
        batches.append(len(images))
        if len(batches) == 1:
            raise RuntimeError("no memory left")
        return images + 1e-3 * torch.ones_like(images) * (images < 0.9)

    def outside(classifier: nn.Module, images: Tensor) -> Tensor:
        return (images + 2 * EPS).clamp(0, 1)

    found = _verdict_of(honest, suite_of(sometimes))["failed-attacks"]
    assert (found.outcome, found.values["failed"]) == ("suspicious", batches[0])
    assert "RuntimeError: no memory left" in found.evidence
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

    found = _verdict_of(net, suite_of(in_training_mode))
    assert found["unchanged-state"].outcome == "suspicious"
    assert "own 0: it changed the classifier's 0.running_mean" in found["unchanged-state"].evidence
    assert found["failed-attacks"].outcome == "passed"
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_idle_attacks(honest: defences.Net, suite_of: Callable[..., str]) -> None:
    found = _verdict_of(honest, suite_of(lambda classifier, images: images, lambda classifier, images: images * 0.99))
    assert (found["idle-attacks"].outcome, found["idle-attacks"].values["idle"]) == ("suspicious", 1)
    assert found["idle-attacks"].evidence.endswith("own 0")
    assert found["unchanged-state"].outcome == "passed"
