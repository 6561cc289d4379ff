"""The binarisation test: run the suite's attacks on problems that are known to have an adversarial example.

Zimmermann, Brendel, Tramèr and Carlini, "Increasing Confidence in Adversarial Robustness Evaluations", NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.attacks.adaptive import LOGITS, PRE_SQUASH
from robustfpd.attacks.base import QueryCounter
from robustfpd.attacks.norms import lp_ball
from robustfpd.errors import first_line
from robustfpd.evaluation.attack_runner import TOLERANCE, fills_batches
from robustfpd.evaluation.checks.binary_problems import (
    BinaryProblems,
    Readout,
    fit_readout,
    last_layer,
    surface_points,
    typical_margin,
)
from robustfpd.evaluation.checks.context import AttackFindings, CheckContext, judge, skipped
from robustfpd.evaluation.record import Check
from robustfpd.evaluation.suites import AttackSpec

NAME = "binarisation"
LEAST_PROBES = 32  # suites with fewer images for attacks of the checks do not run it
PROBLEMS = 16
LEAST_PROBLEMS = 4
RANDOM = 100  # queries of the random search that the attacks are compared with
BUDGET = 5000  # forward and backward passes of the attacks on all problems; building them takes 6,500 at most
SOLVED = 0.75  # share of the problems below which the check is suspicious
CHANGING = 1e-3  # relative change of the features from pass to pass that counts as random


@dataclass(frozen=True)
class _Attacked:
    """Which problems the attacks solved; one that no attack was run on is in neither."""

    solved: Tensor
    unsolved: Tensor
    error: str
    """Of the first attack that raised one; empty if none did."""


def binarisation(context: CheckContext, findings: AttackFindings) -> Check:
    """Check that the suite's attacks find adversarial examples that are known to exist."""
    if context.num_probes < LEAST_PROBES:
        return skipped(NAME, f"only suites with {LEAST_PROBES} images or more for attacks of the checks run it")
    view = PRE_SQUASH if context.has_pre_squash else LOGITS
    specs = [s for s in findings.specs if s.view == view and _is_white_box(s)]
    if not specs:
        return skipped(NAME, "the suite has no attack with gradients and a fixed radius")
    built = _build(context)
    if isinstance(built, str):
        return skipped(NAME, built)
    problems, indices = QueryCounter(built), torch.arange(len(built.images), device=built.images.device)
    attacked = _attack(context, problems, specs, indices)
    count, solved = len(attacked.solved) + len(attacked.unsolved), len(attacked.solved)
    if count < LEAST_PROBLEMS:
        return skipped(NAME, f"the attacks take more than {BUDGET} passes")
    by_chance = _solved_by_chance(context, built)
    evidence = f"the attacks find {solved} of {count} adversarial examples that are known to exist for read-outs of "
    evidence += f"the classifier's features; {RANDOM} random points find {by_chance} of {len(indices)}"
    evidence += f". Error of an attack: {attacked.error}" if attacked.error else ""
    bad = count - solved > max(1, (1 - SOLVED) * count)
    return judge(NAME, bad, evidence, solved=solved, problems=count, by_chance=by_chance / len(indices))


def _is_white_box(spec: AttackSpec) -> bool:
    """Return whether a suite relies on the attack to find adversarial examples by gradients at the radius.

    Of AutoAttack's own members APGD-CE does: the others need more than two classes, or search for minimal norms.
    """
    attack = attacks.get(spec.attack)
    binary = spec.attack != "autoattack" or spec.options["members"] == ("apgd-ce",)
    return attack.access == "gradients" and not attack.minimal and binary


def _build(context: CheckContext) -> BinaryProblems | str:
    """Return the problems, or why there are none."""
    images, labels = _apart(context)
    if len(images) < LEAST_PROBLEMS:
        return f"fewer than {LEAST_PROBLEMS} correctly classified images are more than 2·eps apart"
    problems = _with_own_head(context, images, labels)
    if problems is None:
        problems = _with_outputs(context, images, labels)
    if problems is None:
        return "the classifier's predictions do not follow its largest logit"
    first, second = problems.features(images), problems.features(images)
    if not torch.allclose(first, second, rtol=0, atol=CHANGING * float(first.std())):
        return "the features differ from pass to pass, or are not finite"
    built = _with_solutions(context, problems)
    if built is None:
        return "the features at random points of the balls do not differ enough for a read-out to separate them"
    return built


def _with_solutions(context: CheckContext, problems: BinaryProblems) -> BinaryProblems | None:
    """Return those of the problems that have a solution, with their read-outs; None if they are too few."""
    draws, size = context.generator(NAME), context.runner.batch_size

    def features(x: Tensor) -> Tensor:
        return torch.cat([problems.features(part) for part in torch.split(x, size)])

    readouts = dict[int, Readout]()
    for i, image in enumerate(problems.images):
        readout = fit_readout(features, image, problems.ball, context.radii[-1], problems.scale, draws)
        if readout is not None:
            readouts[i] = readout
    if len(readouts) < LEAST_PROBLEMS:
        return None
    problems = _select(problems, readouts)
    solutions = torch.stack([r.solution for r in readouts.values()])
    with torch.no_grad():
        valid = problems(problems.images).argmax(dim=1) == problems.labels
        valid &= problems(solutions).argmax(dim=1) == problems.targets
    solvable = {i: r for i, (r, v) in enumerate(zip(readouts.values(), valid.tolist(), strict=True)) if v}
    return _select(problems, solvable) if len(solvable) >= LEAST_PROBLEMS else None


def _apart(context: CheckContext) -> tuple[Tensor, Tensor]:
    """Return images and labels for the problems: no two share a point of their balls."""
    images, labels = context.probes
    ball, kept = lp_ball(context.norm), list[int]()
    for i, image in enumerate(images):
        distances = ball.norm(images[kept].float() - image.float()) if kept else torch.ones(1)
        if len(kept) < PROBLEMS and (not kept or bool((distances > 2 * context.radii[-1]).all())):
            kept.append(i)
    return images[kept], labels[kept]


def _with_own_head(context: CheckContext, images: Tensor, labels: Tensor) -> BinaryProblems | None:
    """Return problems, without read-outs yet, in place of the last linear layer; None if predictions ignore it."""
    found = last_layer(context.white_box, images)
    if found is None:
        return None
    layer, output = found
    return _following(context, layer, output, images, labels)


def _with_outputs(context: CheckContext, images: Tensor, labels: Tensor) -> BinaryProblems | None:
    """Return problems whose features are the classifier's outputs."""
    with torch.no_grad():
        output = context.white_box(images)
    return _following(context, None, output, images, labels)


def _following(
    context: CheckContext, layer: nn.Linear | None, output: Tensor, images: Tensor, labels: Tensor
) -> BinaryProblems | None:
    """Return problems if predictions follow constant scores of either sign."""
    targets = output.scatter(1, labels.unsqueeze(1), -torch.inf).argmax(dim=1)
    scale, ball = typical_margin(output, labels), lp_ball(context.norm)
    problems = BinaryProblems(context.white_box, layer, images, labels, targets, scale, ball)
    for sign, expected in ((1.0, targets), (-1.0, labels)):
        problems.set_readouts(problems.weights, torch.full_like(problems.biases, sign * scale))
        with torch.no_grad():
            if not torch.equal(problems(images).argmax(dim=1), expected):
                return None
    return problems


def _select(problems: BinaryProblems, readouts: Mapping[int, Readout]) -> BinaryProblems:
    """Return problems by index, with their read-outs."""
    (layer,), kept = problems.layer, list(readouts)
    images, labels, targets = (t[kept] for t in (problems.images, problems.labels, problems.targets))
    selected = BinaryProblems(problems.classifier, layer, images, labels, targets, problems.scale, problems.ball)
    weights = torch.stack([r.weight for r in readouts.values()]).float().to(images.device)
    selected.set_readouts(weights, torch.tensor([r.bias for r in readouts.values()], device=images.device))
    return selected


def _attack(context: CheckContext, problems: QueryCounter, specs: Sequence[AttackSpec], indices: Tensor) -> _Attacked:
    """Run attacks, one after the other, on the problems that are not solved yet, while the budget lasts.

    There is one other class and little budget, so attacks take one target and one restart.
    """
    solved, tried, left, error = list[int](), set[int](), indices, ""
    for spec in specs:
        single = {name: 1 for name in ("restarts", "targets") if name in attacks.get(spec.attack).options}
        spec = replace(spec, options=dict(spec.options) | single)
        affordable = (BUDGET - problems.forward_passes - problems.backward_passes) // (2 * spec.iterations + 1)
        if len(left) == 0 or affordable <= 0:
            continue
        tried |= {*left[:affordable].tolist()}
        for part in torch.split(left[:affordable], context.runner.batch_size):
            try:
                solved += part[_solves(context, problems, spec, part)].tolist()
            except Exception as raised:  # vanishing-gradients reports why
                error = error or f"{spec.label}: {first_line(raised)}"
        left = torch.tensor([i for i in left.tolist() if i not in solved], dtype=torch.long, device=indices.device)
    return _Attacked(torch.tensor(solved), torch.tensor(sorted(tried - {*solved})), error)


def _solves(context: CheckContext, problems: QueryCounter, spec: AttackSpec, indices: Tensor) -> Tensor:
    """Return which problems one attack solves, M."""
    built, eps = problems.classifier, context.radii[-1]
    assert isinstance(built, BinaryProblems)
    options = dict(spec.options) | ({"batch_size": context.runner.batch_size} if fills_batches(spec) else {})
    images, labels = built.images[indices], built.labels[indices]
    adversarial = attacks.get(spec.attack)(
        problems, images, labels, eps=eps, norm=context.norm, generator=context.generator(f"{NAME} {spec.label}"),
        **options,
    )  # fmt: skip
    tolerance = max(TOLERANCE, torch.finfo(images.dtype).eps)
    inside = built.ball.norm(adversarial.float() - images.float()) <= eps * (1 + tolerance) + tolerance
    with torch.no_grad():
        solved: Tensor = inside & (problems(adversarial).argmax(dim=1) != labels)
    return solved


@torch.no_grad()
def _solved_by_chance(context: CheckContext, problems: BinaryProblems) -> int:
    """Return how many problems random points of the balls' surfaces solve."""
    draws, solved = context.generator(f"{NAME} random"), 0
    for image, label in zip(problems.images, problems.labels, strict=True):
        points = surface_points(image.expand(RANDOM, *image.shape), problems.ball, context.radii[-1], draws)
        parts = torch.split(points, context.runner.batch_size)
        solved += any(bool((problems(part).argmax(dim=1) != label).any()) for part in parts)
    return solved
