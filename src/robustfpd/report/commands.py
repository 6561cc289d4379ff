"""The commands that repeat a run and its evaluation, told from what they left behind."""

from __future__ import annotations

import json
import shlex
from typing import Any

import yaml

from robustfpd.config import RunConfig, recipe, recipe_names
from robustfpd.errors import InputError
from robustfpd.evaluation import EvaluationRecord
from robustfpd.models.import_model import needs_trust

ELSEWHERE = ("data.root", "data.download", "data.cache", "evaluation", "stage", "seed", "recipe", "protocol")
"""What flags say, or what does not change the training."""
ROUNDS = 4
"""How often settings are corrected; the last only looks."""
BUNDLED = ("digits",)
"""Data sets that need no folder."""


def training_command(config: RunConfig, out: str) -> str:
    """Return the `robustfpd train` that makes this run, all stages before it included, in the folder `out`.

    Raises:
        InputError: the recipe is not a packaged one, or no flags and settings lead from it to these settings.
    """
    if config.recipe not in recipe_names():
        raise InputError(f"recipe {config.recipe!r} is not a packaged one, so no command repeats this run")
    base = recipe(config.recipe, protocol=config.protocol)
    plain = config.model.defence == "none" and base.model.defence != "none"
    settings = _settings(config, plain)
    words = ["robustfpd", "train", config.recipe, *settings]
    if config.stage == "adversarial":
        words += ["--stages", "two-phase,adversarial" if config.adversarial.start == "best" else "adversarial"]
    words += ["--protocol", config.protocol] if config.protocol != "corrected" else []
    words += ["--baseline"] if plain else []
    words += ["--seed", str(config.seed)] if config.seed != base.seed else []
    words += ["--data-root", "data", "--download"] if config.data.dataset not in BUNDLED else []
    return shlex.join([*words, "--out", out])


def evaluation_command(record: EvaluationRecord, config: RunConfig, subject: str) -> str:
    """Return the `robustfpd evaluate` that attacks `subject` as this record tells."""
    words = ["robustfpd", "evaluate", subject, "--suite", record.suite, "--norm", record.norm]
    words += ["--eps", *(_radius(worst.eps) for worst in record.worst_case), "--num-images", str(record.num_images)]
    words += ["--every-attack"] if record.every_attack else []
    words += ["--trust-code"] if needs_trust(config.model.backbone) else []
    words += ["--seed", str(record.seed)] if record.seed != config.seed else []
    return shlex.join([*words, *(["--data-root", "data"] if config.data.dataset not in BUNDLED else [])])


def _flat(config: RunConfig) -> dict[str, Any]:
    """Settings by dotted name, as YAML has them."""

    def walk(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            name = f"{prefix}{key}"
            if name not in ELSEWHERE:
                found |= walk(value, f"{name}.") if isinstance(value, dict) else {name: value}
        return found

    return walk(config.model_dump(mode="json"), "")


def _settings(config: RunConfig, plain: bool) -> list[str]:
    """The `field=value` words that lead from the recipe to these settings.

    The baseline multiplies some of what is given, by factors that other settings decide: so what comes out is looked
    at, and what was given is corrected by it.
    """
    wanted, given = _flat(config), dict[str, Any]()
    for _ in range(ROUNDS):
        words = [f"{name}={_word(value)}" for name, value in given.items()]
        run = recipe(config.recipe, words, protocol=config.protocol)
        found = _flat(run.baseline() if plain else run)
        lost = [name for name in wanted if found[name] != wanted[name]]
        if not lost:
            return words
        for name in lost:
            multiplied = name in given and isinstance(found[name], int) and found[name]
            given[name] = wanted[name] * given[name] // found[name] if multiplied else wanted[name]
    raise InputError(
        f"no settings of recipe {config.recipe} lead to this run: {lost[0]} is {wanted[lost[0]]!r}, "
        f"{shlex.join(words)!r} gives {found[lost[0]]!r}"
    )


def _word(value: Any) -> str:
    """A value as one reads it back from YAML."""
    if isinstance(value, str) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value)


def _radius(eps: float) -> str:
    levels = round(eps * 255)
    return f"{levels}/255" if levels / 255 == eps and len(repr(eps)) > 6 else repr(eps)
