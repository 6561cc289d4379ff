"""Suites: which attacks an evaluation runs, cheap ones first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from robustfpd import attacks
from robustfpd.attacks.adaptive import LOGITS, PRE_SQUASH
from robustfpd.attacks.autoattack import EOT_SAMPLES, ITERATIONS, Version, members_of, restarts_and_targets
from robustfpd.config import Norm
from robustfpd.errors import unknown_name


@dataclass(frozen=True)
class AttackSpec:
    """One attack of a suite, on one view of the classifier."""

    label: str
    """Name in records and tables, unique in a suite; part of the seed."""
    attack: str
    """Name in `attacks.names()`."""
    view: str = LOGITS
    """Name of the view that it differentiates."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the attack."""
    share: float = 1.0
    """Part of the survivors that it attacks first: those with the largest margins, and the audit sample. The others are
    skipped if it finds no adversarial example among the farther ones of these; otherwise it goes on, see `loop`."""

    @property
    def iterations(self) -> int:
        """Upper bound of the passes of one image: steps × restarts × EOT samples × targets, or queries × restarts.

        An estimate for FAB, C&W, DeepFool and JSMA, whose searches end by other criteria.
        """
        if self.attack == "autoattack":
            return sum(ITERATIONS[member] for member in self.options["members"])
        parameters = inspect.signature(attacks.get(self.attack).function).parameters.values()
        options = {**{p.name: p.default for p in parameters}, **self.options}
        count = options.get("queries") or options.get("samples")
        if count is None:
            count = (options.get("steps") or (1 if self.attack == "fgsm" else 200)) + 1
        for name in ("restarts", "eot", "targets", "binary_search_steps"):
            count *= options.get(name, 1)
        return int(count * 2 * options["coordinates"] if "coordinates" in options else count)


@dataclass(frozen=True)
class SuiteContext:
    """What the attacks of a suite depend on."""

    norm: Norm = "linf"
    views: Collection[str] = (LOGITS,)
    surrogates: Collection[str] = ()
    randomised: bool = False
    """The classifier's logits differ from pass to pass, so that gradients are averaged."""
    seed: int = 0
    """Seed of the evaluation, which AutoAttack's own code takes as its seed."""

    @property
    def best_view(self) -> str:
        """The view with the clearest gradients: pre-squash logits if there are any."""
        return PRE_SQUASH if PRE_SQUASH in self.views else LOGITS

    @property
    def logit_views(self) -> list[str]:
        """The logits, and the pre-squash logits if there are any."""
        return [v for v in (LOGITS, PRE_SQUASH) if v in self.views]

    @property
    def adaptive_views(self) -> list[str]:
        """Views that replace the gradients of a part of the defence."""
        return [v for v in self.views if v not in (LOGITS, PRE_SQUASH, *self.surrogates)]


@dataclass(frozen=True)
class Suite:
    """Attacks, and the number of images for the checks that run attacks."""

    attacks: Callable[[SuiteContext], list[AttackSpec]]
    probes: int
    """0 leaves these checks out."""
    batch_size: int | None = None
    """Images that an attack takes at a time where the user leaves the choice; None chooses by device and image size."""


def _on_views(
    label: str, attack: str, views: Iterable[str], *, share: float = 1.0, **options: Any
) -> list[AttackSpec]:  # fmt: skip
    """Return one attack on several views."""
    labels = {view: label if view == LOGITS else f"{label}, {view}" for view in views}
    return [AttackSpec(name, attack, view, options, share) for view, name in labels.items()]


def _adaptive(context: SuiteContext, steps: int = 40, share: float = 1.0) -> list[AttackSpec]:
    """Return the adaptive attacks: PGD on adaptive views, and transferred attacks."""
    transfers = [AttackSpec(f"PGD-40, transfer from {name}", "pgd", name, {}, share) for name in context.surrogates]
    adaptive = _on_views(
        f"PGD-{steps} margin", "pgd", context.adaptive_views, share=share, steps=steps, loss="margin", early_stop=True
    )
    return [*adaptive, *transfers]


def _eot(context: SuiteContext, steps: int) -> list[AttackSpec]:
    """Return AutoAttack `rand` for a classifier with randomised outputs; nothing for others."""
    if not context.randomised:
        return []
    return [
        *_on_views(f"APGD-CE, EOT {EOT_SAMPLES}", "apgd-ce", context.logit_views, steps=steps, eot=EOT_SAMPLES),
        *_on_views(f"APGD-DLR, EOT {EOT_SAMPLES}", "apgd-dlr", context.logit_views, steps=steps, eot=EOT_SAMPLES),
    ]


def _pgd(context: SuiteContext, restarts: int, steps: int = 40) -> list[AttackSpec]:
    """Return FGSM and PGD on the logits and the pre-squash logits."""
    views = context.logit_views
    pgd = _on_views(f"PGD-{steps}", "pgd", views, steps=steps, restarts=restarts, early_stop=True)
    return [*_on_views("FGSM", "fgsm", views), *pgd]


def _quick(context: SuiteContext) -> list[AttackSpec]:
    return [*_pgd(context, restarts=2), *_adaptive(context, steps=20), *_eot(context, steps=20)]


def _pgd_100(context: SuiteContext) -> list[AttackSpec]:
    return [*_pgd(context, restarts=5, steps=100), *_adaptive(context), *_eot(context, steps=100)]


def _standard(context: SuiteContext) -> list[AttackSpec]:
    """Return AutoAttack's members and the adaptive attacks; the attack without gradients comes last.

    PGD attacks every image. The shares give most passes to the images next to the decision boundary: a smaller share
    for a more expensive attack.
    """
    front = _on_views("PGD-20 margin", "pgd", [context.best_view], steps=20, loss="margin", early_stop=True)
    if context.randomised:
        square = _on_views("Square", "square", [LOGITS])
        return [*front, *_adaptive(context), *_eot(context, steps=100), *square]
    restarts, targets = restarts_and_targets(context.norm)
    other_views = [view for view in context.logit_views if view != context.best_view]
    return [
        *front,
        *_adaptive(context, share=1 / 8),
        *_on_views("APGD-CE", "apgd-ce", [context.best_view], share=1 / 2, restarts=restarts),
        *_on_views("APGD-CE", "apgd-ce", other_views, share=1 / 8, restarts=restarts),
        *_on_views("APGD-T", "apgd-t", [context.best_view], share=1 / 8, targets=targets),
        *_on_views("APGD-T", "apgd-t", other_views, share=1 / 32, targets=targets),
        *_on_views("FAB-T", "fab-t", [context.best_view], share=1 / 32),
        *_on_views("Square", "square", [LOGITS], share=1 / 32),
    ]


def _full(context: SuiteContext) -> list[AttackSpec]:
    """Return `standard` on all survivors, with more restarts, minimal-norm and decision-based attacks."""
    return [
        *_on_views("FGSM", "fgsm", context.logit_views),
        *(replace(spec, share=1.0) for spec in _standard(context)),
        *_on_views("PGD-100", "pgd", context.logit_views, steps=100, restarts=5, early_stop=True),
        *_on_views("APGD-DLR", "apgd-dlr", context.logit_views),
        *_on_views("FMN", "fmn", context.logit_views),
        *_on_views("DeepFool", "deepfool", context.logit_views),
        *_on_views("DDN", "ddn", context.logit_views),
        *_on_views("C&W", "cw", context.logit_views),
        *_on_views("JSMA", "jsma", [context.best_view]),
        *_on_views("ZOO", "zoo", [LOGITS]),
        *_on_views("HopSkipJump", "hopskipjump", [LOGITS]),
    ]


def _autoattack(context: SuiteContext, version: Version) -> list[AttackSpec]:
    """Return the members of a version of AutoAttack, in its order, with the code and the seed of its authors."""
    return [
        AttackSpec(label, "autoattack", options={"version": version, "members": (member,), "seed": context.seed})
        for member, label in members_of(version).items()
    ]


def _published(steps: int, step_size: float) -> Callable[[SuiteContext], list[AttackSpec]]:
    """Return the paper's attacks on the squashed logits, as the authors ran them, without their attacks' errors.

    FGSM and PGD have the authors' steps and start at the image; in L2 and L1 they take 100 steps of 0.1. BIM follows
    eps and norm, JSMA has wrong classes as targets, C&W, ZOO and HopSkipJump run until they succeed.
    """

    def specs(context: SuiteContext) -> list[AttackSpec]:
        count, size = (steps, step_size) if context.norm == "linf" else (100, 0.1)
        fixed = {"steps": count, "step_size": size, "random_start": False}
        return [
            AttackSpec("FGSM", "fgsm"),
            AttackSpec(f"PGD-{count}, no random start", "pgd", options=fixed),
            AttackSpec("BIM", "bim", options={"steps": 100}),
            *(AttackSpec(f"FGSM, transfer from {name}", "fgsm", name) for name in context.surrogates),
            *(AttackSpec(f"PGD-{count}, transfer from {name}", "pgd", name, fixed) for name in context.surrogates),
            AttackSpec("DeepFool", "deepfool"),
            AttackSpec("C&W", "cw"),
            AttackSpec("JSMA", "jsma"),
            AttackSpec("ZOO", "zoo"),
            AttackSpec("HopSkipJump", "hopskipjump"),
        ]

    return specs


_SUITES: dict[str, Suite] = {
    "first-look": Suite(partial(_pgd, restarts=1), probes=0),
    "quick": Suite(_quick, probes=16),
    "standard": Suite(_standard, probes=64),
    "full": Suite(_full, probes=64),
    "published": Suite(_published(steps=40, step_size=2 / 255), probes=24),  # SVHN and CALTECH
    "published-mnist": Suite(_published(steps=100, step_size=0.1), probes=24),
    "pgd-100": Suite(_pgd_100, probes=24),
    "autoattack": Suite(partial(_autoattack, version="standard"), probes=64, batch_size=250),
    "autoattack-plus": Suite(partial(_autoattack, version="plus"), probes=64, batch_size=250),
    "autoattack-rand": Suite(partial(_autoattack, version="rand"), probes=64, batch_size=250),
}


STRENGTH = (
    "full", "autoattack-plus", "standard", "autoattack", "autoattack-rand", "published-mnist", "published", "pgd-100",
    "quick", "first-look",
)  # fmt: skip
"""Suites from the strongest to the weakest."""


def suite_names() -> list[str]:
    """Names of all suites."""
    return sorted(_SUITES)


def suite(name: str) -> Suite:
    """Return a suite by name; an unknown one is an InputError that lists the nearest names."""
    if name not in _SUITES:
        raise unknown_name("suite", name, _SUITES)
    return _SUITES[name]


def attack_specs(name: str, context: SuiteContext) -> list[AttackSpec]:
    """Return the attacks of a suite that offer the norm, on the views that there are.

    Raises:
        InputError: unknown suite.
    """
    views = {*context.views, *context.surrogates}
    specs = suite(name).attacks(context)
    return [s for s in specs if s.view in views and context.norm in attacks.get(s.attack).norms]
