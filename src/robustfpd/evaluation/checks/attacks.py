"""Checks that run attacks on a few images and compare what they find; checks of the results of the suite's attacks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from robustfpd import attacks
from robustfpd.attacks import apgd_ce, apgd_dlr, fgsm, noise, pgd
from robustfpd.attacks.norms import lp_ball
from robustfpd.errors import first_line
from robustfpd.evaluation.attack_runner import CHANGED
from robustfpd.evaluation.checks.context import AttackFindings, CheckContext, judge, skipped
from robustfpd.evaluation.ledger import LedgerRow
from robustfpd.evaluation.record import Check

STEPS = 20
TOLERATED = 0.05  # share of the images that may contradict a check by chance; two images always may
MORE_STEPS = 200
SURVIVORS = 24
BLACK_BOX = 0.02  # share of all images that attacks without gradients may misclassify after those with gradients failed
GAINED = 0.04  # share of the survivors that more steps may still find adversarial examples for


def misclassified_by_pgd(context: CheckContext) -> Tensor:
    """Return which probe images PGD-20 makes the classifier misclassify, N."""
    return _misclassified(context, pgd, steps=STEPS)


def single_step(context: CheckContext, by_pgd: Tensor) -> Check:
    """Check that a single step finds nothing that twenty do not."""
    by_fgsm = _misclassified(context, fgsm)
    only = int((by_fgsm & ~by_pgd).sum())
    fgsm_count, pgd_count = int(by_fgsm.sum()), int(by_pgd.sum())
    evidence = f"of {len(by_pgd)} images, {fgsm_count} are misclassified under FGSM and {pgd_count} under "
    evidence += f"PGD-{STEPS}; {only} under FGSM only"
    return judge("single-step", _exceeds_chance(only, by_pgd), evidence, fgsm=fgsm_count, pgd=pgd_count)


def random_noise(context: CheckContext, by_pgd: Tensor) -> Check:
    """Check that random noise finds nothing that gradients do not."""
    by_noise = _misclassified(context, noise)
    only = int((by_noise & ~by_pgd).sum())
    count = int(by_noise.sum())
    evidence = f"of {len(by_pgd)} images, {count} are misclassified under random noise, {only} not under PGD-{STEPS}"
    return judge("random-noise", _exceeds_chance(only, by_pgd), evidence, noise=count, alone=only)


def monotone_in_eps(context: CheckContext, by_pgd: Tensor) -> Check:
    """Check that images misclassified in a ball are misclassified in a larger one."""
    eps = context.radii[-1]
    radii = [eps / 2, eps, min(2 * eps, _covering_radius(context))]
    smaller, larger = (_misclassified(context, pgd, eps=radius, steps=STEPS) for radius in (radii[0], radii[2]))
    masks = smaller, by_pgd, larger
    lost = max(int((a & ~b).sum()) for a, b in itertools.pairwise(masks))
    accuracies = ", ".join(f"{1 - float(m.float().mean()):.0%} at {e:.3g}" for m, e in zip(masks, radii, strict=True))
    evidence = f"accuracy under PGD-{STEPS}: {accuracies}; {lost} images are misclassified at one radius only"
    return judge("monotone-in-eps", _exceeds_chance(lost, by_pgd), evidence, lost=lost)


def large_eps(context: CheckContext, by_pgd: Tensor) -> Check:
    """Check that no image is robust in a ball that holds every image, and few in one that holds a grey image."""
    images = context.probes[0]
    classes = int(context.runner.labels.max()) + 1
    with torch.no_grad():
        classes = max(classes, context.classifier(images[:1]).shape[1])
    radii = _covering_radius(context) / 2, _covering_radius(context)
    robust = []
    variants: tuple[dict[str, Any], ...] = ({}, {"loss": "margin"}, {"random_start": False})
    for eps in radii:
        left = torch.ones(len(images), dtype=torch.bool, device=images.device)
        for variant in variants:
            if bool(left.any()):
                left &= ~_misclassified(context, pgd, eps=eps, steps=2 * STEPS, early_stop=True, **variant)
        robust.append(int(left.sum()))
    count = len(images)
    chance = count / classes + 2 * (count / classes) ** 0.5  # two standard deviations of a Poisson count
    evidence = f"under PGD-{2 * STEPS}, {robust[0]} of {count} images are robust at eps {radii[0]:.3g}, whose balls "
    evidence += f"hold a grey image, and {robust[1]} at {radii[1]:.3g}, whose balls hold every image"
    bad = robust[0] > chance or robust[1] > max(1, 0.02 * count)
    return judge("large-eps", bad, evidence, at_half=robust[0], at_whole=robust[1])


def earlier_iterate(context: CheckContext, by_pgd: Tensor) -> Check:
    """Check that the last iterate of PGD is not worse than an earlier one."""
    images, labels = context.probes
    masks: list[Tensor] = []
    hook = context.white_box.register_forward_hook(lambda _, x, logits: masks.append(logits.argmax(dim=1) != labels))
    try:
        draws = context.generator("earlier-iterate")
        pgd(context.white_box, images, labels, eps=context.radii[-1], norm=context.norm, steps=STEPS, generator=draws)
    finally:
        hook.remove()
    iterates = torch.stack(masks)[1:]  # steps, N; the first is the random start
    at_any = iterates.any(dim=0)
    lost = int((at_any & ~iterates[-1]).sum())
    evidence = f"of {len(labels)} images, {int(at_any.sum())} are misclassified at some step of PGD-{STEPS}, "
    evidence += f"{lost} of them not at the last"
    return judge("earlier-iterate", lost > max(2, 2 * TOLERATED * len(labels)), evidence, lost=lost)


def more_steps(context: CheckContext, findings: AttackFindings) -> Check:
    """Check that ten times the steps find next to no adversarial example for the survivors."""
    name, survivors = "more-steps", torch.nonzero(findings.robust).flatten()
    if len(survivors) == 0:
        return skipped(name, "no image is robust")
    if len(context.probes[0]) == 0:
        return skipped(name, "the suite has no images for attacks of the checks")
    count = min(SURVIVORS, max(1, len(context.probes[0]) // 2))
    order = findings.margins[survivors].argsort(descending=True, stable=True)
    data = context.take(survivors[order][:count].sort().values)
    misclassified = torch.zeros(len(data[0]), dtype=torch.bool, device=data[0].device)
    for attack in (apgd_ce, apgd_dlr):
        try:
            misclassified |= _misclassified(context, attack, data, purpose=name, steps=MORE_STEPS)
        except Exception as error:  # vanishing-gradients reports why
            return skipped(name, f"{attack.name} cannot be run: {first_line(error)}")
    gained, attacked = int(misclassified.sum()), len(misclassified)
    evidence = f"APGD with {MORE_STEPS} steps finds adversarial examples for {gained} of the {attacked} survivors "
    evidence += "with the largest margins"
    return judge(name, gained > max(1, GAINED * attacked), evidence, gained=gained, attacked=attacked)


def black_box(context: CheckContext, findings: AttackFindings) -> Check:
    """Check that attacks without the classifier's gradients find nothing that those with gradients missed."""
    name, views, specs = "black-box", context.runner.views, findings.specs
    without = {s.label for s in specs if views[s.view].surrogate or attacks.get(s.attack).access != "gradients"}
    tried = [r for r in findings.rows if r.attack in without and r.eps > 0]
    if not tried:
        return skipped(name, "no attack without gradients was run on images that survived the others")
    white_box_rows: dict[int, list[LedgerRow]] = {}
    for row in findings.rows:
        if row.eps > 0 and row.attack not in without:
            white_box_rows.setdefault(row.image, []).append(row)
    only = [r for r in tried if r.outcome == "misclassified" and _survived(r, white_box_rows.get(r.image, []))]
    labels = ", ".join(dict.fromkeys(r.attack for r in only))
    count = len({r.image for r in only})
    evidence = f"of {len({r.image for r in tried})} images, {count} survived attacks with the classifier's gradients "
    evidence += f"and are misclassified under attacks without{f' ({labels})' if labels else ''}"
    return judge(name, count > max(1, BLACK_BOX * len(findings.robust)), evidence, turned=len(only))


def failed_attacks(context: CheckContext, findings: AttackFindings) -> Check:
    """Check that every attack ran on all its images and stayed in its ball."""
    name, failed = "failed-attacks", [r for r in findings.rows if r.outcome == "failed"]
    if not failed:
        return judge(name, False, f"all {len(findings.results)} attacks ran on all their images", failed=0)
    labels = ", ".join(dict.fromkeys(r.attack for r in failed))
    evidence = f"{labels} failed on {len(failed)} images, which count as robust there; the first: {failed[0].note}"
    everywhere = all(r.failed == r.attacked for r in findings.results if r.attacked)
    return judge(name, True, evidence, "", "failed" if everywhere else "suspicious", failed=len(failed))


def unchanged_state(context: CheckContext, findings: AttackFindings) -> Check:
    """Check that no attack changed the classifier's parameters or buffers."""
    name, changed = "unchanged-state", [r for r in findings.rows if r.note.startswith(CHANGED)]
    if not changed:
        return judge(name, False, "parameters and buffers are unchanged after every attack")
    labels = ", ".join(dict.fromkeys(r.attack for r in changed))
    return judge(name, True, f"{labels}: {changed[0].note}; restored after each batch")


def idle_attacks(context: CheckContext, findings: AttackFindings) -> Check:
    """Check that every attack with a fixed radius changed an image."""
    idle = []
    for spec in findings.specs:
        rows = [r for r in findings.rows if r.attack == spec.label and r.outcome != "failed"]
        returns_clean = attacks.get(spec.attack).minimal or spec.attack == "autoattack"  # where they find nothing
        if rows and not returns_clean and all(r.distance == 0 for r in rows):
            idle.append(spec.label)
    evidence = f"{len(idle)} attacks returned every image unchanged" + (f": {', '.join(idle)}" if idle else "")
    return judge("idle-attacks", bool(idle), evidence, idle=len(idle))


def search_precision(context: CheckContext, findings: AttackFindings, more_steps: Check) -> Check:
    """Check that attacks used float32 gradients, or that float32 attacks find next to nothing more."""
    name = "search-precision"
    if not context.runner.bfloat16:
        return judge(name, False, "attacks differentiated the classifier without reduced precision")
    evidence = "attacks differentiated the classifier in bfloat16; float32 confirmed every adversarial example"
    if not bool(findings.robust.any()):
        return judge(name, False, f"{evidence}, and no image is robust")
    if more_steps.outcome == "skipped":
        return judge(name, True, f"{evidence}, but no survivor was attacked in float32")
    return judge(name, more_steps.outcome != "passed", f"{evidence}. {more_steps.evidence}", **more_steps.values)


def _misclassified(
    context: CheckContext, attack: Any, data: tuple[Tensor, Tensor] | None = None, *, eps: float | None = None,
    purpose: str = "", **options: Any,
) -> Tensor:  # fmt: skip
    """Return which images the classifier misclassifies after an attack on the white-box module, N."""
    images, labels = context.probes if data is None else data
    x_adv = attack(
        context.white_box, images, labels, eps=context.radii[-1] if eps is None else eps, norm=context.norm,
        generator=context.generator(purpose or attack.name), **options,
    )  # fmt: skip
    with torch.no_grad():
        mask: Tensor = context.classifier(x_adv).argmax(dim=1) != labels
    return mask


def _exceeds_chance(count: int, images: Tensor) -> bool:
    return count > max(2, TOLERATED * len(images))


def _covering_radius(context: CheckContext) -> float:
    """Return the radius of a ball around any image that holds every image."""
    return float(lp_ball(context.norm).norm(torch.ones_like(context.probes[0][:1])))


def _survived(row: LedgerRow, white_box_rows: Sequence[LedgerRow]) -> bool:
    """Return whether white-box attacks were run on the row's image up to its radius and none succeeded."""
    up_to = [r for r in white_box_rows if r.eps <= row.eps]
    return bool(up_to) and all(r.outcome != "misclassified" for r in up_to)
