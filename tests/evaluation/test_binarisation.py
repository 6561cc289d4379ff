"""The binarisation test distinguishes strong attacks from weak ones, and problems with and without a solution."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.evaluation import defences
from tests.evaluation.conftest import install_suite
from tests.evaluation.defences import After, Before
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.attacks.adaptive import adaptive_views
from robustfpd.attacks.losses import margin
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Norm
from robustfpd.evaluation import evaluate
from robustfpd.evaluation.attack_runner import AttackRunner
from robustfpd.evaluation.checks import AttackFindings, CheckContext
from robustfpd.evaluation.checks.binarisation import BUDGET, LEAST_PROBES, PROBLEMS, binarisation
from robustfpd.evaluation.checks.binary_problems import INNER, SURFACE, fit_readout, last_layer
from robustfpd.evaluation.inputs import EvaluationData
from robustfpd.evaluation.record import Check
from robustfpd.evaluation.suites import AttackSpec
from robustfpd.models import heads

COUNT = 40
EPS = 0.15
STRONG = (
    AttackSpec("PGD-20 margin", "pgd", options={"steps": 20, "loss": "margin", "early_stop": True}),
    AttackSpec("APGD-T", "apgd-t", options={"targets": 9}),
)


def _context(
    classifier: nn.Module, eps: float = EPS, norm: Norm = "linf", count: int = COUNT,
    dtype: torch.dtype = torch.float32, trained: bool = True,
) -> CheckContext:  # fmt: skip
    """Context of a classifier on digits, labelled by the digit or, for an untrained one, by itself."""
    images, labels = defences.sample(count)
    if not trained:
        with torch.no_grad():
            labels = classifier(images).argmax(dim=1)
    data = EvaluationData(images.to(dtype), labels, torch.arange(count))
    runner = AttackRunner(classifier.eval(), data, torch.device("cpu"), norm, 0, 64)
    runner.classify(torch.arange(count))
    runner.set_views(adaptive_views(classifier, data.images[:4]))
    return CheckContext(runner, runner.clean_predictions == labels, [eps], COUNT)


def _check(context: CheckContext, *specs: AttackSpec) -> Check:
    findings = AttackFindings(specs or STRONG, (), (), torch.zeros(0, dtype=torch.bool), torch.zeros(0))
    return binarisation(context, findings)


def _passes(context: CheckContext) -> int:
    forward, backward = context.runner.check_passes
    return forward + backward + context.classifier.forward_passes + context.classifier.backward_passes


def _pgd(**options: Any) -> AttackSpec:
    return AttackSpec("PGD", "pgd", options={"steps": 20, "loss": "margin", **options})


@pytest.fixture(scope="module")
def honest() -> defences.Net:
    return defences.plain()


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("linf", 0.03), ("l2", 0.8), ("l1", 1.5)])
def test_strong_attacks_solve_nearly_all_problems(honest: defences.Net, norm: Norm, eps: float) -> None:
    context = _context(honest, eps, norm)
    made = _check(context)
    assert made.outcome == "passed"
    assert made.values["problems"] == PROBLEMS
    assert made.values["solved"] >= PROBLEMS - 2
    assert made.values["by_chance"] < 0.2
    assert _passes(context) < 12_000
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in honest.modules())


def _rounded(net: nn.Module) -> nn.Module:
    return Before(net, defences.quantise(8))


def _times_1000(net: nn.Module) -> nn.Module:
    return After(net, lambda z: 1000 * z)


def _unchanged(net: nn.Module) -> nn.Module:
    return net


@pytest.mark.parametrize(
    ("change", "spec", "most"),
    [
        pytest.param(_unchanged, _pgd(steps=2, step_size=EPS / 4), 2, id="few steps"),
        pytest.param(_unchanged, _pgd(step_size=EPS / 50), 2, id="small steps"),
        pytest.param(_unchanged, AttackSpec("FGSM", "fgsm"), 9, id="one step"),
        pytest.param(_times_1000, _pgd(loss="ce"), 2, id="cross-entropy where it saturates"),
        pytest.param(_unchanged, _pgd(loss=lambda z, y: -margin(z, y)), 0, id="wrong sign"),
        pytest.param(_rounded, _pgd(), 2, id="rounding"),
        pytest.param(defences.BAD["wrong backward"].make, _pgd(), 3, id="wrong backward"),
        pytest.param(defences.BAD["finely shattered"].make, _pgd(), 8, id="shattered"),
        pytest.param(defences.BAD["one-hot"].make, _pgd(), 0, id="no gradients behind the features"),
        pytest.param(defences.BAD["detached restoration"].make, _pgd(), 0, id="no gradients"),
    ],
)
def test_weak_attacks_do_not(
    honest: defences.Net, change: Callable[[Any], nn.Module], spec: AttackSpec, most: int
) -> None:
    made = _check(_context(change(honest)), spec)
    assert made.outcome == "suspicious", made.evidence
    assert made.values["solved"] <= most
    assert made.fix


def test_stronger_attacks_solve_what_cross_entropy_does_not(honest: defences.Net) -> None:
    made = _check(_context(_times_1000(honest)), _pgd(loss="ce"), _pgd())
    assert (made.outcome, made.values["solved"] >= PROBLEMS - 2) == ("passed", True)


def test_an_fpd_is_tested_before_its_head() -> None:
    fpd = copy.deepcopy(defences.fpd().fpd)
    assert isinstance(fpd, rf.FPD)
    linear = fpd.head.linear
    assert isinstance(linear, nn.Linear)
    fpd.head = heads.Tanh(linear, 1.0)
    context = _context(fpd.classifier())
    assert context.has_pre_squash
    made = _check(context, AttackSpec("PGD-20, pre-squash", "pgd", "pre-squash", {"steps": 20, "loss": "margin"}))
    assert (made.outcome, made.values["problems"]) == ("passed", PROBLEMS)
    assert _check(context).outcome == "skipped"  # attacks on the squashed logits, not the best view


def test_a_head_that_is_not_linear_has_its_outputs_as_features(honest: defences.Net) -> None:
    layer = nn.Conv2d(1, 10, 8)
    convolution = nn.Sequential(layer, nn.Flatten())
    with torch.no_grad():
        layer.weight.copy_(0.3 * torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    images, _ = defences.sample(COUNT)
    assert last_layer(convolution, images) is None
    found = last_layer(honest, images)
    assert found is not None
    assert found[0] is honest.fc2
    made = _check(_context(convolution, trained=False))
    assert made.outcome == "passed"
    assert made.values["problems"] >= PROBLEMS / 2


def test_half_precision() -> None:
    half = defences.Net().half()
    half.load_state_dict(defences.plain().state_dict())
    made = _check(_context(half, dtype=torch.float16))
    assert made.outcome == "passed", made.evidence
    assert made.values["solved"] >= PROBLEMS - 3


@pytest.mark.parametrize(
    ("make", "count", "reason"),
    [
        (lambda net: net, 1, "fewer than 4 correctly classified images"),
        (lambda net: Before(net, lambda x: x + 0.1 * torch.randn_like(x)), COUNT, "from pass to pass"),
        (lambda net: Before(net, lambda x: x.round()), COUNT, "do not differ enough"),
        (lambda net: After(net, lambda z: -z), COUNT, "fewer than 4 correctly classified images"),
    ],
)
def test_skipped_where_no_problem_can_be_built(
    honest: defences.Net, make: Callable[[nn.Module], nn.Module], count: int, reason: str
) -> None:
    made = _check(_context(make(honest), eps=0.01, count=count))
    assert made.outcome == "skipped"
    assert reason in made.evidence


def test_skipped_in_suites_with_few_images_for_checks_and_without_attacks(honest: defences.Net) -> None:
    context = _context(honest)
    assert _check(context, AttackSpec("Square", "square"), AttackSpec("FMN", "fmn")).outcome == "skipped"
    context.num_probes = LEAST_PROBES - 1
    assert _check(context).outcome == "skipped"


def test_the_budget_limits_the_attacks(honest: defences.Net) -> None:
    context = _context(_rounded(honest))
    before = _passes(context)
    specs = [AttackSpec(f"PGD {i}", "pgd", options={"steps": 40}) for i in range(8)]
    made = _check(context, *specs)
    assert made.outcome == "suspicious"
    assert _passes(context) - before < BUDGET + PROBLEMS * (INNER + 3 * SURFACE)


def test_a_read_out_has_an_adversarial_example_and_random_points_are_none(honest: defences.Net) -> None:
    images, _ = defences.sample(1)
    ball, draws = lp_ball("linf"), torch.Generator().manual_seed(0)

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        return honest.features(x).double()

    readout = fit_readout(features, images[0], ball, EPS, 5.0, draws)
    assert readout is not None
    points = images + ball.sample(images.expand(500, -1, -1, -1), EPS, draws)
    scores = features(torch.cat([images, readout.solution.unsqueeze(0), points])) @ readout.weight + readout.bias
    assert float(scores[0]) == pytest.approx(-5)
    assert float(scores[1]) > 0
    assert float((scores[2:] > 0).float().mean()) < 0.01
    assert float(ball.norm(readout.solution - images)) <= EPS + 1e-6
    constant = fit_readout(lambda x: torch.zeros(len(x), 3).double(), images[0], ball, EPS, 5.0, draws)
    assert constant is None


def test_evaluate_runs_it(honest: defences.Net, monkeypatch: pytest.MonkeyPatch) -> None:
    install_suite(monkeypatch, _pgd(steps=2, step_size=EPS / 50), probes=LEAST_PROBES)
    record = evaluate(honest, defences.sample(COUNT), suite="ours", eps=EPS)
    checks = {c.name: c for c in record.verdict.checks}
    assert checks["binarisation"].outcome == "suspicious"
    assert record.check_forward_passes > PROBLEMS * INNER
