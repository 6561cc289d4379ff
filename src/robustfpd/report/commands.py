"""Commands that repeat a training and its evaluation, from the stored settings and record."""

from __future__ import annotations

import json
import shlex
from typing import Any

import yaml

from robustfpd.config import RunConfig, recipe, recipe_names
from robustfpd.errors import InputError
from robustfpd.evaluation import EvaluationRecord
from robustfpd.models.import_model import needs_trust

NOT_SETTINGS = ("data.root", "data.download", "data.cache", "evaluation", "stage", "seed", "recipe", "protocol")
"""Fields that are flags, or that do not change the training."""
MULTIPLIED = ("epochs", "early_stop_patience", "schedule.patience")
"""Fields that `RunConfig.baseline` multiplies."""
BUNDLED = ("digits",)
"""Data sets that need no folder."""


def training_command(config: RunConfig, out: str) -> str:
    """Return the `robustfpd train` that repeats a run and the stages before it, in the folder `out`.

    Raises:
        InputError: the recipe is not a packaged one, or no overrides of it give these settings.
    """
    if config.recipe not in recipe_names():
        raise InputError(f"recipe {config.recipe!r} is not a packaged one, so no command repeats this run")
    base = recipe(config.recipe, protocol=config.protocol)
    baseline = config.model.defence == "none" and base.model.defence != "none"
    arguments = ["robustfpd", "train", config.recipe, *_overrides(config, base, baseline)]
    if config.stage == "adversarial":
        arguments += ["--stages", "two-phase,adversarial" if config.adversarial.start == "best" else "adversarial"]
    arguments += ["--protocol", config.protocol] if config.protocol != "corrected" else []
    arguments += ["--baseline"] if baseline else []
    arguments += ["--seed", str(config.seed)] if config.seed != base.seed else []
    arguments += ["--data-root", "data", "--download"] if config.data.dataset not in BUNDLED else []
    return shlex.join([*arguments, "--out", out])


def evaluation_command(record: EvaluationRecord, config: RunConfig, model: str) -> str:
    """Return the `robustfpd evaluate` that repeats the evaluation of `record` on `model`, a run or a zoo name."""
    arguments = ["robustfpd", "evaluate", model, "--suite", record.suite, "--norm", record.norm, "--eps"]
    arguments += [*(_eps(worst.eps) for worst in record.worst_case), "--num-images", str(record.num_images)]
    arguments += ["--every-attack"] if record.every_attack else []
    arguments += ["--trust-code"] if needs_trust(config.model.backbone) else []
    arguments += ["--seed", str(record.seed)] if record.seed != config.seed else []
    arguments += ["--data-root", "data"] if config.data.dataset not in BUNDLED else []
    return shlex.join(arguments)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _overrides(config: RunConfig, base: RunConfig, baseline: bool) -> list[str]:
    """Return the `field=value` overrides that lead from the recipe to these settings."""
    wanted, given = _training_settings(config), _training_settings(base)
    if baseline:
        given |= {f"model.{k}": v for k, v in flatten(base.model.baseline().model_dump(mode="json")).items()}
        factor = config.training.steps_per_batch
        for stage, times in (("training", factor), ("adversarial", factor if config.adversarial.second_pass else 1)):
            for name in (f"{stage}.{field}" for field in MULTIPLIED):
                wanted[name] = wanted[name] and round(wanted[name] / times)
    changed = {name: value for name, value in wanted.items() if value != given[name]}
    overrides = [f"{name}={_yaml_value(value)}" for name, value in changed.items()]
    made = recipe(config.recipe, overrides, protocol=config.protocol)
    made_settings = _training_settings(made.baseline() if baseline else made)
    for name, value in _training_settings(config).items():
        if made_settings[name] != value:
            raise InputError(
                f"no overrides of recipe {config.recipe} give this run: {name} is {value!r}, "
                f"{shlex.join(overrides)!r} gives {made_settings[name]!r}"
            )
    return overrides


def _training_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings by dotted name, without those that do not change the training."""
    flat = flatten(config.model_dump(mode="json"))
    return {name: v for name, v in flat.items() if name not in NOT_SETTINGS and name.split(".")[0] not in NOT_SETTINGS}


def _yaml_value(value: Any) -> str:
    """Return a value as YAML reads it back."""
    return value if isinstance(value, str) and yaml.safe_load(value) == value else json.dumps(value)


def _eps(eps: float) -> str:
    levels = round(eps * 255)
    return f"{levels}/255" if levels / 255 == eps and len(repr(eps)) > 6 else repr(eps)
