"""Settings from YAML files and `field=value` overrides; errors name the field."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from robustfpd.config.base import Config
from robustfpd.config.schema import Protocol, RunConfig
from robustfpd.errors import InputError, unknown_name

C = TypeVar("C", bound=Config)


def parse(cls: type[C], values: Mapping[str, Any], source: str = "") -> C:
    """Build `cls` from plain values; an InputError names the field, the value and the allowed values."""
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        raise _explain(cls, error, source) from None


CORRECTED: dict[str, Any] = {
    "model.small_stem": "auto",
    "model.activation": "elu",
    "model.tail": "pooling",
    "model.denoise": "dot",
    "model.denoise_gate": False,
    "model.middle": "input",
    "model.pass_statistics": "shared",
    "model.front_stages": None,
    "model.restoration": "image",
    "model.pyramid_channels": None,
    "model.unstrided_kernel": 3,
    "model.head": "tanh",
    "training.middle_noise": 0.0,
    "training.threshold": 3.0,
    "training.threshold_unit": "absolute",
    "training.restoration_unit": "space",
    "training.alpha_restore": 1.0,
    "training.alpha_restore_second": 1.0,
    "training.restoration_start": 0.0,
    "training.second_pass_interval": 1,
    "adversarial.batch": "both",
}
"""Defaults of the protocols `corrected` and `published`, where they differ from those of `improved`."""


EARLIER_DEFAULTS: dict[str, Any] = {"model": {"pass_statistics": "shared"}}
"""Settings of every model that was saved before these fields existed."""


def protocol_defaults(protocol: str, section: str = "") -> dict[str, Any]:
    """Return the defaults of a protocol that differ from the fields' own: all, nested, or those of one section.

    Raises:
        InputError: an unknown protocol.
    """
    if protocol not in get_args(Protocol):
        raise unknown_name("protocol", protocol, get_args(Protocol))
    values: dict[str, Any] = {}
    for field, value in CORRECTED.items() if protocol != "improved" else ():
        _set(values, field, value, field)
    defaults: dict[str, Any] = values.get(section, {}) if section else values
    return defaults


def load_run(path: Path) -> RunConfig:
    """Read a `config.yaml`. Fields that the version which wrote it did not have get their protocol's defaults."""
    given = _read_yaml(path)
    values = protocol_defaults(str(given.get("protocol", "improved")))
    _merge(values, copy.deepcopy(EARLIER_DEFAULTS))
    _merge(values, given)
    return parse(RunConfig, values, source=str(path))


RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes, `<dataset>/<name>`."""
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))


def recipe(name: str, overrides: Iterable[str] = (), *, protocol: str = "improved") -> RunConfig:
    """Return a packaged recipe, or the recipe in the YAML file `name`, with `field=value` overrides.

    Args:
        name: a name from `recipe_names()` or a path that ends in .yaml.
        overrides: dotted fields and YAML values, as in `training.epochs=3`.
        protocol: `improved`; `corrected`, which applies the recipe's section of that name before the overrides; or
            `published`, which applies its section `published` as well.

    Raises:
        InputError: an unknown recipe, protocol or field, an invalid value, or a recipe without a section `published`.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name in recipe_names():
        path = RECIPES / f"{name}.yaml"
    else:
        raise unknown_name("recipe", name, recipe_names())
    values: dict[str, Any] = {"recipe": name, "protocol": protocol, **protocol_defaults(protocol)}
    given = _read_yaml(path)
    sections = {section: given.pop(section, None) for section in ("corrected", "published")}
    _merge(values, given)
    if protocol == "published" and not sections["published"]:
        raise InputError(f"recipe {name} has no section `published`, which lists what that protocol changes")
    applied = {"improved": (), "corrected": ("corrected",), "published": ("corrected", "published")}[protocol]
    for section in applied:
        fields = sections[section] or {}
        if not isinstance(fields, dict):
            raise InputError(f"section `{section}` of recipe {name} must map fields to values, found {fields!r}")
        for field, value in fields.items():
            _set(values, str(field), value, f"{section} field {field}")
    for override in overrides:
        _apply(values, override)
    return parse(RunConfig, values, source=f"recipe {name}")


def _merge(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Set the fields of `given`, group by group."""
    for field, value in given.items():
        old = values.get(field)
        if isinstance(value, dict) and isinstance(old, dict):
            _merge(old, value)
        else:
            values[field] = value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping of settings, found {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    field, separator, text = override.partition("=")
    if not separator or not field:
        raise InputError(f"override {override!r} is not of the form field=value, as in training.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: {text!r} is not a YAML value") from None
    _set(values, field, value, f"override {override!r}")


def _set(values: dict[str, Any], field: str, value: Any, source: str) -> None:
    """Set a dotted field to `value`."""
    *parents, leaf = field.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"{source}: {parent} is a value, not a group of settings")
        node = child
    node[leaf] = value


def _explain(cls: type[Config], error: ValidationError, source: str) -> InputError:
    """Return the first error with the dotted field and the value."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    where = f" in {source}" if source else ""
    if first["type"] == "extra_forbidden":
        owner = _config_at(cls, location[:-1])
        fields = [".".join([*location[:-1], name]) for name in owner.model_fields]
        return InputError(f"{unknown_name('field', '.'.join(location), fields, listed=40)}{where}")
    # The input of a check of several fields is the whole section; its message names what it found.
    whole = first["type"] == "missing" or isinstance(first["input"], Mapping)
    found = "" if whole else f", found {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ")
    return InputError(f"{'.'.join(location) or cls.__name__}: {message}{found}{where}")


def _config_at(cls: type[Config], location: list[str]) -> type[Config]:
    """Return the settings class at a location; numbers are indices of tuples."""
    for name in location:
        if not name.isdigit():
            annotation = cls.model_fields[name].annotation
            candidates = (annotation, *get_args(annotation))
            cls = next(c for c in candidates if isinstance(c, type) and issubclass(c, Config))
    return cls
