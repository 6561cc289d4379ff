"""The three protocols of every recipe, and the page that explains and measures them."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from robustfpd.config import RECIPES, load_run, parse, recipe, recipe_names
from robustfpd.config.load import CORRECTED
from robustfpd.config.schema import RunConfig
from robustfpd.errors import InputError

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "protocols.md").read_text()
FULL = [
    "caltech101/resnet101", "caltech256/resnet101", "mnist/resnet101", "svhn/resnet101", "svhn/resnet50",
    "svhn/resnext50",
]  # fmt: skip


def _section(name: str, protocol: str) -> dict[str, Any]:
    section: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text()).get(protocol, {})
    return section


def _published(name: str) -> dict[str, Any]:
    return _section(name, "published")


def _changed(config: RunConfig, fields: Mapping[str, Any]) -> RunConfig:
    """Return settings with dotted fields set."""
    values = config.model_dump()
    for field, value in fields.items():
        *parents, leaf = field.split(".")
        node = values
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return parse(RunConfig, values)


def _leaf(config: RunConfig, field: str) -> Any:
    value: Any = config
    for part in field.split("."):
        value = getattr(value, part)
    return value


def _benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_full_size_recipes_and_a_mini_of_each_data_set_exist() -> None:
    names = recipe_names()
    assert set(FULL) <= set(names)
    for name in names:
        assert f"{name.split('/')[0]}/mini" in names


@pytest.mark.parametrize("name", recipe_names())
def test_both_protocols_differ_in_exactly_the_fields_listed(name: str) -> None:
    corrected, section = recipe(name, protocol="corrected"), _published(name)
    assert corrected.protocol == "corrected"
    if not section:
        with pytest.raises(InputError, match="has no section `published`"):
            recipe(name, protocol="published")
        return
    published = recipe(name, protocol="published")
    assert published.protocol == "published"
    for field in section:
        assert _leaf(corrected, field) != _leaf(published, field), field
    changes = {field: _leaf(published, field) for field in ("protocol", *section)}
    assert _changed(corrected, changes) == published


@pytest.mark.parametrize("name", recipe_names())
def test_corrected_differs_from_improved_in_the_papers_settings_and_the_recipes_section(name: str) -> None:
    improved, corrected = recipe(name), recipe(name, protocol="corrected")
    assert (improved.protocol, corrected.protocol) == ("improved", "corrected")
    given = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    paper = {field: value for field, value in CORRECTED.items() if not _holds(given, field)}
    assert _changed(improved, {**paper, **_section(name, "corrected"), "protocol": "corrected"}) == corrected


def _holds(values: dict[str, Any], field: str) -> bool:
    """Return whether a recipe sets a dotted field under every protocol."""
    section, leaf = field.split(".")
    return leaf in values.get(section, {})


def test_overrides_apply_after_the_corrected_section() -> None:
    found = recipe("mnist/mini", ["model.pyramid_channels=5", "model.head=linear"], protocol="corrected")
    assert (found.model.pyramid_channels, found.model.head, found.model.activation) == (5, "linear", "elu")


def test_the_sections_of_a_recipe_file_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("corrected: [1]\n")
    assert recipe(str(path)).protocol == "improved"
    with pytest.raises(InputError, match=r"section `corrected` of recipe .* must map fields to values, found \[1\]"):
        recipe(str(path), protocol="corrected")
    path.write_text("corrected: {model.hed: tanh}\n")
    with pytest.raises(InputError, match=r"unknown field 'model.hed'"):
        recipe(str(path), protocol="corrected")


def test_overrides_apply_after_the_published_section() -> None:
    found = recipe("mnist/mini", ["data.selection=held_out"], protocol="published")
    assert found.data.selection == "held_out"
    assert found.training.gate_trains == "upscaling"


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(InputError, match="unknown protocol 'publish'; did you mean 'published'"):
        recipe("mnist/mini", protocol="publish")


@pytest.mark.parametrize(("name", "backbone", "size", "pyramid", "optimiser", "lr", "batch", "noise", "clip"), [
    ("mnist/resnet101", "resnet101", 64, 256, "adamax", 1e-3, 300, 0.01, 10),
    ("svhn/resnet101", "resnet101", 64, 256, "adam", 1e-4, 300, 0.01, 5),
    ("svhn/resnet50", "resnet50", 64, 128, "adam", 1e-4, 300, 0.01, 5),
    ("svhn/resnext50", "published_resnext_3_4_6_3", 64, 128, "adam", 1e-3, 100, 0.01, 5),
    ("caltech101/resnet101", "resnet101", 224, 256, "adam", 1e-4, 24, 0.03, 5),
    ("caltech256/resnet101", "resnet101", 224, 256, "adam", 1e-4, 24, 0.03, 5),
])  # fmt: skip
def test_the_full_size_recipes_hold_the_published_numbers(
    name: str, backbone: str, size: int, pyramid: int, optimiser: str, lr: float, batch: int, noise: float, clip: float
) -> None:
    run = recipe(name, protocol="corrected")
    caltech = name.startswith("caltech")
    training = run.training
    assert run.model.backbone == backbone
    assert run.data.image_size == (size, size)
    assert run.model.pyramid_channels == pyramid
    assert (training.optimizer.name, training.optimizer.lr, training.batch_size) == (optimiser, lr, batch)
    assert (training.noise, training.clip_grad_norm) == (noise, clip)
    assert training.optimizer.weight_decay == (1e-5 if name.startswith("mnist") else 0)
    assert run.model.dropout == (0 if name.startswith("mnist") else 0.5)
    assert training.threshold == (1 if caltech else 3)
    assert training.alpha_restore_second == (0.1 if caltech else 1)
    assert training.schedule.patience == (15 if caltech else 10)
    assert (training.epochs, training.early_stop_patience, training.alpha_ce, training.alpha_restore) == (100, 20, 1, 1)


def test_every_field_of_a_protocol_is_explained_on_the_page() -> None:
    published = {field for name in recipe_names() for field in _published(name)}
    assert len(published) > 12
    for field in published | CORRECTED.keys():
        assert f"`{field}`" in PAGE, field


def test_the_pages_tables_are_those_of_the_committed_results(tmp_path: Path) -> None:
    benchmark = _benchmark("protocols")
    files = {path.stem for path in (ROOT / "results" / "protocols").glob("*.json")}
    assert files == {f"{v.stage}-{v.name}" for v in benchmark.VARIANTS}
    between = PAGE.partition(benchmark.BEGIN)[2].partition(benchmark.END)[0]
    assert between.strip() == benchmark.table().strip()
    fabricated = json.loads((ROOT / "results" / "protocols" / "two-phase-corrected.json").read_text())
    fabricated["record"]["clean"] = {"count": 1, "total": 200, "low": 0.0, "high": 0.01}
    (tmp_path / "two-phase-corrected.json").write_text(json.dumps(fabricated))
    assert "| nothing | first-look | 0.5 % [0.0, 1.0] |" in benchmark.table(tmp_path)


def test_the_results_have_the_settings_of_the_recipe(tmp_path: Path) -> None:
    benchmark = _benchmark("protocols")
    for variant in benchmark.VARIANTS:
        saved = json.loads((ROOT / "results" / "protocols" / f"{variant.stage}-{variant.name}.json").read_text())
        # Fields that came later have their protocol's defaults in what was measured before.
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved["config"]))
        measured = load_run(tmp_path / "config.yaml")
        assert measured == parse(RunConfig, benchmark.settings(variant)), variant.name
        assert saved["record"]["clean"]["total"] == benchmark.NUM_IMAGES


def _check(found: dict[str, Any]) -> None:
    assert list(found["image_size"]) == ([224, 224] if "caltech" in found["recipe"] else [64, 64])
    assert found["steps"] == found["gates_open"] == 2
    assert 0 < found["ce"] < 20
    assert 0 < found["restoration"] < 1e12
    assert found["peak_gb"] < 16


@pytest.mark.parametrize("name", ["svhn/resnext50", pytest.param("caltech101/resnet101", marks=pytest.mark.slow)])
def test_shallow_networks_of_the_same_classes_take_two_steps_at_full_image_size(name: str) -> None:
    found = _benchmark("full_size").two_steps(name, "published", batch=2, shallow=True, gate=False)
    assert re.search(r"_1_1_1_1$", found["backbone"])
    _check(found)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["corrected", "published"])
@pytest.mark.parametrize("name", FULL)
def test_full_size_networks_take_two_steps_of_8_images_in_16_gb(name: str, protocol: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "full_size.py"), name, "--protocol", protocol, "--open",
               "--batch", "8"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "_1_1_1_1" not in found["backbone"]
    _check(found)
