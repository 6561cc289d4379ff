"""Checks that attack a few images for themselves, each attack alone, to see whether attacks behave as they must."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.attacks import apgd_ce, apgd_dlr, fgsm, noise, pgd
from robustfpd.attacks.norms import lp_ball
from robustfpd.errors import first_line
from robustfpd.evaluation.checks.context import CheckContext, Findings, guarded, judged, skipped
from robustfpd.evaluation.verdict import Check

STEPS = 20
TOLERATED = 0.05
"""Share of the images that may contradict a check by chance; two images always may."""
MORE_STEPS = 200
SURVIVORS = 24
GAINED = 0.04
"""Share of the survivors that more steps may still turn."""


class Probe:
    """Attacks on a few correctly classified images; which of them each attack turns."""

    def __init__(self, subject: CheckContext) -> None:
        self.subject, self.eps = subject, subject.radii[-1]
        self.x, self.y = subject.probes, subject.probe_labels

    def turned(self, attack: Any, eps: float | None = None, **options: Any) -> Tensor:
        """Which images an attack on the clearest gradients turns, N; judged by the classifier itself."""
        found = attack(
            self.subject.white, self.x, self.y, eps=self.eps if eps is None else eps, norm=self.subject.norm,
            generator=self.subject.draws(attack.name), **options,
        )  # fmt: skip
        with torch.no_grad():
            wrong: Tensor = self.subject.classifier(found).argmax(dim=1) != self.y
        return wrong

    def too_many(self, count: int) -> bool:
        """More than chance would have it."""
        return count > max(2, TOLERATED * len(self.x))


def probing(subject: CheckContext) -> list[Check]:
    """Run all of them, sharing the attacks they compare."""
    probe = Probe(subject)
    checks: dict[str, Callable[[Probe, Tensor], Check]] = {
        "single-step": single_step, "random-noise": random_noise, "monotone-in-eps": monotone, "large-eps": large,
        "earlier-iterate": earlier_iterate,
    }  # fmt: skip
    if len(probe.x) == 0:
        return [skipped(name, "no images for attacks of the checks' own") for name in checks]
    try:
        iterative = probe.turned(pgd, steps=STEPS)
    except Exception as error:  # other checks say why
        return [skipped(name, f"PGD-{STEPS} cannot be run: {first_line(error)}") for name in checks]
    return [guarded(name, partial(check, probe, iterative)) for name, check in checks.items()]


def single_step(probe: Probe, iterative: Tensor) -> Check:
    """Does one step turn what twenty do not?"""
    one = probe.turned(fgsm)
    alone = int((one & ~iterative).sum())
    evidence = (
        f"of {len(one)} images FGSM turns {int(one.sum())}, PGD-{STEPS} {int(iterative.sum())}; {alone} fall to the "
        "single step alone"
    )
    return judged("single-step", probe.too_many(alone), evidence, fgsm=int(one.sum()), pgd=int(iterative.sum()))


def random_noise(probe: Probe, iterative: Tensor) -> Check:
    """Does noise turn what gradients do not?"""
    by_noise = probe.turned(noise)
    alone = int((by_noise & ~iterative).sum())
    evidence = f"random noise turns {int(by_noise.sum())} of {len(by_noise)} images, {alone} of which PGD does not"
    return judged("random-noise", probe.too_many(alone), evidence, noise=int(by_noise.sum()), alone=alone)


def monotone(probe: Probe, iterative: Tensor) -> Check:
    """Does what falls in a ball also fall in a larger one?"""
    ceiling = _covering(probe)
    radii = [probe.eps / 2, probe.eps, min(2 * probe.eps, ceiling)]
    turned = [probe.turned(pgd, radii[0], steps=STEPS), iterative, probe.turned(pgd, radii[2], steps=STEPS)]
    lost = max(int((a & ~b).sum()) for a, b in itertools.pairwise(turned))
    accuracies = ", ".join(f"{1 - float(t.float().mean()):.0%} at {e:.3g}" for t, e in zip(turned, radii, strict=True))
    evidence = f"accuracy under PGD-{STEPS}: {accuracies}; {lost} images fall at a radius and not at the next"
    return judged("monotone-in-eps", probe.too_many(lost), evidence, lost=lost)


def large(probe: Probe, iterative: Tensor) -> Check:
    """Is nothing left where the ball holds every image, and no more than chance where it holds a grey one?"""
    classes = int(probe.subject.runner.labels.max()) + 1
    with torch.no_grad():
        classes = max(classes, probe.subject.classifier(probe.x[:1]).shape[1])
    half, whole = _covering(probe) / 2, _covering(probe)
    left = []
    for eps in (half, whole):
        turned = probe.turned(pgd, eps, steps=2 * STEPS, early_stop=True)
        for more in ({"loss": "margin"}, {"random_start": False}):
            if not bool(turned.all()):
                turned |= probe.turned(pgd, eps, steps=2 * STEPS, early_stop=True, **more)
        left.append(int((~turned).sum()))
    count = len(probe.x)
    chance = count / classes + 2 * (count / classes) ** 0.5  # two standard deviations of a Poisson count
    evidence = (
        f"under PGD-{2 * STEPS} {left[0]} of {count} images stand at eps {half:.3g}, where a grey image is in reach, "
        f"and {left[1]} at {whole:.3g}, where everything is"
    )
    return judged(
        "large-eps", left[0] > chance or left[1] > max(1, 0.02 * count), evidence, at_half=left[0], at_whole=left[1]
    )


def earlier_iterate(probe: Probe, iterative: Tensor) -> Check:
    """Are points found on the way that the last step loses again?"""
    recorder = _Recorder(probe.subject.white, probe.y)
    pgd(
        recorder, probe.x, probe.y, eps=probe.eps, norm=probe.subject.norm, steps=STEPS,
        generator=probe.subject.draws("earlier-iterate"),
    )  # fmt: skip
    ever = torch.stack(recorder.wrong)[1:]  # the first is the random start
    lost = int((ever.any(dim=0) & ~ever[-1]).sum())
    fell = int(ever.any(dim=0).sum())
    evidence = f"of {len(probe.y)} images {fell} fall at some step of PGD-{STEPS}, {lost} of them not at the last"
    return judged("earlier-iterate", lost > max(2, 2 * TOLERATED * len(probe.y)), evidence, lost=lost)


def more_steps(subject: CheckContext, findings: Findings) -> Check:
    """Do ten times the steps turn what the whole suite left standing?"""
    name = "more-steps"
    standing = torch.nonzero(findings.standing).flatten()
    if len(standing) == 0 or len(subject.probes) == 0:
        return skipped(name, "no image stands" if len(standing) == 0 else "no images for attacks of the checks' own")
    count = min(SURVIVORS, max(1, len(subject.probes) // 2))
    nearest = standing[findings.closest[standing].argsort(descending=True, stable=True)][:count].sort().values
    x, y = subject.at(nearest)
    turned = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for attack in (apgd_ce, apgd_dlr):
        try:
            found = attack(
                subject.white, x, y, eps=subject.radii[-1], norm=subject.norm, steps=MORE_STEPS,
                generator=subject.draws(name),
            )  # fmt: skip
        except Exception as error:  # other checks say why
            return skipped(name, f"{attack.name} cannot be run: {first_line(error)}")
        with torch.no_grad():
            turned |= subject.classifier(found).argmax(dim=1) != y
    gained = int(turned.sum())
    evidence = f"{MORE_STEPS} more steps turn {gained} of the {len(x)} survivors that came closest to falling"
    return judged(name, gained > max(1, GAINED * len(x)), evidence, gained=gained, attacked=len(x))


class _Recorder(nn.Module):
    """Notes at each forward pass which images are misclassified."""

    def __init__(self, classifier: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.classifier, self.labels = classifier, labels
        self.wrong: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(images)
        self.wrong.append(logits.detach().argmax(dim=1) != self.labels)
        return logits


def _covering(probe: Probe) -> float:
    """Radius of a ball around any image that holds all images."""
    return float(lp_ball(probe.subject.norm).norm(torch.ones_like(probe.x[:1])))
