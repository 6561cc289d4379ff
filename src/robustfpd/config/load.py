"""Settings from YAML files and `field=value` overrides; errors name the field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from robustfpd.config.schema import Config, Protocol, RunConfig
from robustfpd.errors import InputError, unknown_name

C = TypeVar("C", bound=Config)


def parse(cls: type[C], values: Mapping[str, Any], source: str = "") -> C:
    """Build `cls` from plain values; an InputError names the field, the value and the allowed values."""
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        raise _explain(cls, error, source) from None


def load_run(path: Path) -> RunConfig:
    """Read a `config.yaml`."""
    return parse(RunConfig, _read_yaml(path), source=str(path))


RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes, `<dataset>/<name>`."""
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))


def recipe(name: str, overrides: Iterable[str] = (), *, protocol: str = "corrected") -> RunConfig:
    """Return a packaged recipe, or the recipe in the YAML file `name`, with `field=value` overrides.

    Args:
        name: a name from `recipe_names()` or a path that ends in .yaml.
        overrides: dotted fields and YAML values, as in `training.epochs=3`.
        protocol: `corrected`, or `published`, which applies the recipe's section `published` before the overrides.

    Raises:
        InputError: an unknown recipe, protocol or field, or an invalid value.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name in recipe_names():
        path = RECIPES / f"{name}.yaml"
    else:
        raise unknown_name("recipe", name, recipe_names())
    if protocol not in get_args(Protocol):
        raise unknown_name("protocol", protocol, get_args(Protocol))
    values: dict[str, Any] = {"recipe": name, "protocol": protocol, **_read_yaml(path)}
    published = values.pop("published", None)
    if protocol == "published":
        if not isinstance(published, dict) or not published:
            raise InputError(f"recipe {name} has no section `published`, which lists what that protocol changes")
        for field, value in published.items():
            _set(values, str(field), value, f"published field {field}")
    for override in overrides:
        _apply(values, override)
    return parse(RunConfig, values, source=f"recipe {name}")


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
    found = f", found {first['input']!r}" if first["type"] != "missing" else ""
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
