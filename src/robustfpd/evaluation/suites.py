"""Suites: which attacks an evaluation runs, cheap ones first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from robustfpd import attacks
from robustfpd.attacks.adaptive import LOGITS, PRE_SQUASH
from robustfpd.config import Norm
from robustfpd.errors import unknown_name

UNSTATED_STEPS = 200
"""Steps that `AttackSpec.iterations` assumes where an attack's options give none."""
EOT = 20
"""How often a random classifier is asked at each step."""


@dataclass(frozen=True)
class AttackSpec:
    """One attack of a suite, on one view of the classifier."""

    label: str
    """How records and tables call it, unique in a suite."""
    attack: str
    """Name in the registry."""
    view: str = LOGITS
    """Which of the views it differentiates."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the attack."""
    screened: bool = False
    """It is dear: images go to it closest to falling first, and the rest is skipped when none of these falls."""

    @property
    def iterations(self) -> int:
        """Upper bound of the passes of one image: steps × restarts × EOT samples × targets, or queries × restarts.

        An estimate for C&W, DeepFool and JSMA, whose searches end by other criteria.
        """
        parameters = inspect.signature(attacks.get(self.attack).function).parameters.values()
        options = {**{p.name: p.default for p in parameters}, **self.options}
        count = options.get("queries") or options.get("samples")
        if count is None:
            count = (options.get("steps") or (1 if self.attack == "fgsm" else UNSTATED_STEPS)) + 1
        for name in ("restarts", "eot", "targets", "binary_search_steps"):
            count *= options.get(name, 1)
        return int(count * 2 * options["coordinates"] if "coordinates" in options else count)


@dataclass(frozen=True)
class SuiteContext:
    """What a plan depends on."""

    norm: Norm = "linf"
    views: Collection[str] = (LOGITS,)
    surrogates: Collection[str] = ()
    random: bool = False
    """The classifier answers the same question differently: gradients are averaged."""

    @property
    def best(self) -> str:
        """The view with the clearest gradients."""
        return PRE_SQUASH if PRE_SQUASH in self.views else LOGITS

    @property
    def own(self) -> list[str]:
        """The classifier and its logits before squashing."""
        return [v for v in (LOGITS, PRE_SQUASH) if v in self.views]

    @property
    def detours(self) -> list[str]:
        """Views with another way back for gradients."""
        return [v for v in self.views if v not in (LOGITS, PRE_SQUASH, *self.surrogates)]


@dataclass(frozen=True)
class Suite:
    """Attacks, and how many images the checks may attack for themselves."""

    attacks: Callable[[SuiteContext], list[AttackSpec]]
    probes: int
    """0: only the checks that need no attack."""


def _named(
    label: str, attack: str, views: Iterable[str], *, screened: bool = False, **options: Any
) -> list[AttackSpec]:
    """One attack on several views."""
    return [AttackSpec(label if v == LOGITS else f"{label}, {v}", attack, v, options, screened) for v in views]


def _pgd(target: SuiteContext, restarts: int, steps: int = 40, **options: Any) -> list[AttackSpec]:
    """PGD on the classifier and on its logits before squashing."""
    name = f"PGD-{steps} {options['loss']}" if "loss" in options else f"PGD-{steps}"
    return _named(name, "pgd", target.own, steps=steps, restarts=restarts, early_stop=True, **options)


def _adaptive(target: SuiteContext, steps: int = 40) -> list[AttackSpec]:
    """What an attacker tries who knows the defence: ways round its parts, and other networks' weaknesses."""
    transfers = [AttackSpec(f"PGD-40, transfer from {name}", "pgd", name) for name in target.surrogates]
    detours = _named(f"PGD-{steps} margin", "pgd", target.detours, steps=steps, loss="margin", early_stop=True)
    return [*detours, *transfers]


def _averaged(target: SuiteContext, steps: int) -> list[AttackSpec]:
    """AutoAttack `rand` for a classifier that answers differently each time; nothing for others."""
    if not target.random:
        return []
    return [
        *_named(f"APGD-CE, EOT {EOT}", "apgd-ce", target.own, steps=steps, eot=EOT),
        *_named(f"APGD-DLR, EOT {EOT}", "apgd-dlr", target.own, steps=steps, eot=EOT),
    ]


def _first_look(target: SuiteContext) -> list[AttackSpec]:
    return [*_named("FGSM", "fgsm", target.own), *_pgd(target, restarts=1)]


def _quick(target: SuiteContext) -> list[AttackSpec]:
    averaged = _averaged(target, steps=20)
    return [*_named("FGSM", "fgsm", target.own), *_pgd(target, restarts=2), *_adaptive(target, steps=20), *averaged]


def _pgd_100(target: SuiteContext) -> list[AttackSpec]:
    found = [*_named("FGSM", "fgsm", target.own), *_pgd(target, restarts=5, steps=100), *_adaptive(target)]
    return [*found, *_averaged(target, steps=100)]


def _standard(target: SuiteContext) -> list[AttackSpec]:
    """AutoAttack's members and the adaptive attacks; what needs no gradients comes last."""
    cheap = [
        *_named("FGSM", "fgsm", target.own),
        *_named("PGD-20 margin", "pgd", [target.best], steps=20, loss="margin", early_stop=True),
        *_adaptive(target),
    ]
    if target.random:
        return [*cheap, *_averaged(target, steps=100), *_named("Square", "square", [LOGITS], screened=True)]
    first, targets = (5, 5) if target.norm == "l1" else (1, 9)  # as AutoAttack has it
    return [
        *cheap,
        *_named("APGD-CE", "apgd-ce", target.own, restarts=first),
        *_named("APGD-T", "apgd-t", [target.best], targets=targets),
        *_named("APGD-T", "apgd-t", [v for v in target.own if v != target.best], screened=True, targets=targets),
        *_named("FAB-T", "fab-t", [target.best], screened=True),
        *_named("Square", "square", [LOGITS], screened=True),
    ]


def _full(target: SuiteContext) -> list[AttackSpec]:
    """`standard` with nothing skipped, more starts, the smallest perturbations, and attacks on decisions."""
    standard = [AttackSpec(p.label, p.attack, p.view, p.options) for p in _standard(target)]
    more = [
        *_pgd(target, restarts=5, steps=100),
        *_named("APGD-DLR", "apgd-dlr", target.own),
        *_named("FMN", "fmn", target.own),
        *_named("DeepFool", "deepfool", target.own),
        *_named("DDN", "ddn", target.own),
        *_named("C&W", "cw", target.own),
        *_named("JSMA", "jsma", [target.best]),
        *_named("ZOO", "zoo", [LOGITS], screened=True),
        *_named("HopSkipJump", "hopskipjump", [LOGITS], screened=True),
    ]
    return [*standard, *more]


def _published(steps: int, step_size: float) -> Callable[[SuiteContext], list[AttackSpec]]:
    """The paper's attacks, on the squashed logits as the authors ran them; made to work where theirs did nothing.

    FGSM and PGD have the authors' steps and start at the image; in L2 and L1 theirs were .1 × 100. BIM follows eps and
    norm, JSMA has wrong classes as targets, C&W, ZOO and HopSkipJump run until they find something.
    """

    def planned(target: SuiteContext) -> list[AttackSpec]:
        count, size = (steps, step_size) if target.norm == "linf" else (100, 0.1)
        fixed = {"steps": count, "step_size": size, "random_start": False}
        return [
            AttackSpec("FGSM", "fgsm"),
            AttackSpec(f"PGD-{count}, no random start", "pgd", options=fixed),
            AttackSpec("BIM", "bim", options={"steps": 100}),
            *(AttackSpec(f"FGSM, transfer from {name}", "fgsm", name) for name in target.surrogates),
            *(AttackSpec(f"PGD-{count}, transfer from {name}", "pgd", name, fixed) for name in target.surrogates),
            AttackSpec("DeepFool", "deepfool"),
            AttackSpec("C&W", "cw"),
            AttackSpec("JSMA", "jsma"),
            AttackSpec("ZOO", "zoo"),
            AttackSpec("HopSkipJump", "hopskipjump"),
        ]

    return planned


_SUITES: dict[str, Suite] = {
    "first-look": Suite(_first_look, probes=0),
    "quick": Suite(_quick, probes=16),
    "standard": Suite(_standard, probes=64),
    "full": Suite(_full, probes=64),
    "published": Suite(_published(steps=40, step_size=2 / 255), probes=24),  # SVHN and CALTECH
    "published-mnist": Suite(_published(steps=100, step_size=0.1), probes=24),
    "pgd-100": Suite(_pgd_100, probes=24),
}


STRENGTH = ("full", "standard", "published-mnist", "published", "pgd-100", "quick", "first-look")
"""From the suite whose number says most to the one whose says least."""


def suite_names() -> list[str]:
    """Names of all suites."""
    return sorted(_SUITES)


def suite(name: str) -> Suite:
    """Return a suite; an unknown name is an InputError with the nearest ones."""
    if name not in _SUITES:
        raise unknown_name("suite", name, _SUITES)
    return _SUITES[name]


def plan(name: str, target: SuiteContext) -> list[AttackSpec]:
    """Return the attacks of a suite for a target: those that its norm and its views allow.

    Raises:
        InputError: unknown suite.
    """
    offered = {*target.views, *target.surrogates}
    return [p for p in suite(name).attacks(target) if p.view in offered and target.norm in attacks.get(p.attack).norms]
