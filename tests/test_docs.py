"""The README and the documentation: snippets run, commands parse, and every public name is documented."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel
from tests.conftest import SHARED
from tests.documents import DOCS, DOCUMENTS, PAGES, README, ROOT, Block, blocks, inline_commands, name_of

import robustfpd as rf
from robustfpd.attacks import adaptive
from robustfpd.cli import COMMANDS, function, main, parse
from robustfpd.config import RunConfig, TaskConfig, recipe, recipe_names
from robustfpd.config.schema import Denoise, Head, Middle
from robustfpd.evaluation import suite_names, suites

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
WITH_PYTHON = [page for page in DOCUMENTS if any(b.language == "python" for b in blocks(page))]
CHECKPOINT = SHARED / "published" / "resnet_mnist_1-1-1-1" / "bestmodel_params.pkl"
OTHER_ACCURACIES = {"checks.md", "speed.md", "benchmarks.md"}
"""Pages with published accuracies and their sources, with those of results/training_options, and a written page."""
OTHERS = {"make", "pip", "tensorboard", "wait"}
"""Programs in shell blocks beside robustfpd."""


def _page(name: str) -> str:
    return (DOCS / name).read_text()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder whose modules can be imported; suites run only the attacks of `first-look`."""
    for name in ("quick", "standard"):
        monkeypatch.setitem(suites._SUITES, name, suites._SUITES["first-look"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def _shortened(words: list[str]) -> list[str]:
    """Return the same command with less to compute."""
    if words[0] == "train":
        return [*words, "training.epochs=1", "data.train_limit=256"]
    if words[0] == "evaluate" and "--suite" not in words:
        return [*words, "--suite", "first-look", "--num-images", "16"]
    return words


def _run(block: Block, page: str, namespace: dict[str, Any], folder: Path) -> None:
    if block.language == "python":
        if block.title is not None:
            (folder / block.title).write_text(block.body)
        exec(compile(block.body, page, "exec"), namespace)
    elif block.runs:
        for words in block.commands():
            main(_shortened(words[1:]))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_snippets_of_a_page_run_one_after_the_other(page: Path, elsewhere: Path) -> None:
    if "bestmodel_params.pkl" in page.read_text():
        if not CHECKPOINT.is_file():
            pytest.skip("no published checkpoint beside the project")
        shutil.copy(CHECKPOINT, elsewhere)
    module = types.ModuleType("snippets")  # dataclasses and the like look for where they were made
    run = [block for block in blocks(page) if block.language == "python" or block.runs]
    assert run
    for block in run:
        _run(block, str(page), vars(module), elsewhere)


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_the_commands_of_a_page_are_accepted(page: Path, elsewhere: Path) -> None:
    for block in blocks(page):
        if block.title is not None:
            (elsewhere / block.title).write_text(block.body)
    shown = [words for b in blocks(page) if b.language == "sh" for words in b.commands()]
    for words in [*shown, *inline_commands(page)]:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), words
        elif words[0] == "robustfpd":
            _accepted(words[1:])
        elif words[0] in ("torchrun", "srun"):
            start = words.index("-m") + 2
            assert words[start - 1] == "robustfpd", words
            _accepted(words[start:])
        else:
            assert words[0] in OTHERS, words


def _accepted(words: list[str]) -> None:
    """Parse as the program does, and resolve the recipe and the suite."""
    name, call = words[0], parse(words)
    given = inspect.signature(function(name)).bind(*call.args, **call.keywords).arguments  # type: ignore[attr-defined]
    if name == "train":
        recipe(given["recipe"], given.get("settings", ()), protocol=given.get("protocol", "improved"))
    if given.get("suite") is not None:
        assert given["suite"] in suite_names(), words


@pytest.mark.parametrize(("text", "message"), [
    ("- a list\n\n  ```sh\n  robustfpd nope\n  ```\n", "no blocks"), ("```\nrobustfpd nope\n```\n", "no blocks"),
    ("~~~sh\nrobustfpd nope\n~~~\n", "no blocks"), ("```bash\nrobustfpd nope\n```\n", "a block of bash"),
    ("```sh\nmake\n ```\n\n```sh\nmake\n```\n", "inside|no blocks"),
])  # fmt: skip
def test_a_fence_that_the_tests_would_miss_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError, match=message):
        blocks(tmp_path / "page.md")


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_measured_accuracies_stand_in_tables_that_a_script_writes_from_records(page: Path) -> None:
    if name_of(page) in OTHER_ACCURACIES:
        return
    prose = re.sub(r"<!-- (measured:|attack cost).*?<!-- end", "", page.read_text(), flags=re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", prose, flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"[^|\n]*\b\d\d?\.\d(?: %| ± | \[\d)[^|\n]*", prose) == []


def test_every_page_is_in_the_navigation() -> None:
    def leaves(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [leaf for child in (node.values() if isinstance(node, dict) else node) for leaf in leaves(child)]

    pages = [name_of(page) for page in PAGES] + [path.name for path in DOCS.glob("*.ipynb")]
    assert sorted(leaves(SITE["nav"])) == sorted(pages)


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_or_to_papers_and_projects(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            assert re.match(r"https://(arxiv\.org/abs/|github\.com/[\w-]+/[\w.-]+$)", target), target
        elif not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_site_is_strict_executes_the_notebook_and_loads_nothing_from_elsewhere() -> None:
    assert SITE["strict"] is True
    assert SITE["theme"]["font"] is False
    assert SITE["validation"]["links"]["anchors"] == "warn"
    notebook = next(p["mkdocs-jupyter"] for p in SITE["plugins"] if isinstance(p, dict) and "mkdocs-jupyter" in p)
    assert notebook["execute"] is True
    assert notebook["allow_errors"] is False


def test_attacks_views_and_suites_are_documented() -> None:
    page, choosing = _page("attacks.md"), _page("choosing.md")
    model = rf.enhance("resnet_mini", num_classes=3, in_channels=1, image_size=8, protocol="corrected")
    views = adaptive.adaptive_views(model.classifier(), torch.zeros(2, 1, 8, 8))
    assert len(views) == 8
    for name in [*rf.attacks.names(), *suite_names(), *views.keys() - {adaptive.LOGITS}]:
        assert f"`{name}`" in page, name
    for name in suite_names():
        assert f"`{name}`" in choosing, name


def test_the_method_page_lists_denoising_layers_and_heads() -> None:
    page = _page("method.md")
    for name in (*typing.get_args(Denoise), *typing.get_args(Head)):
        assert f"| `{name}` |" in page, name
    for name in typing.get_args(Middle):
        assert f"`{name}`" in page, name


def test_every_public_name_is_in_the_reference() -> None:
    page = _page("reference/python.md")
    for name in rf.__all__:
        assert f"`rf.{name}`" in page, name


def test_every_setting_is_in_the_reference() -> None:
    page = _page("reference/settings.md")

    def configs(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
        yield cls
        for field in cls.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from configs(field.annotation)

    found: set[type[BaseModel]] = {*configs(RunConfig), TaskConfig}
    assert len(found) >= 9
    for cls in found:
        assert f"::: {cls.__module__}.{cls.__name__}\n" in page, cls
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name} has no docstring to show"


def test_the_reference_lists_every_command_with_its_flags_and_every_recipe() -> None:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    made = hooks.on_page_markdown(_page("reference/cli.md"))
    sections = dict(re.findall(r"^## robustfpd (\w+) .*?\n(.*?)(?=^## |\Z)", made, flags=re.MULTILINE | re.DOTALL))
    assert list(sections) == list(COMMANDS)
    for name, section in sections.items():
        for parameter in inspect.signature(function(name)).parameters.values():
            if parameter.kind is not parameter.POSITIONAL_ONLY and parameter.name not in ("output", "images"):
                flag = f"--{parameter.name.replace('_', '-')}"
                assert re.search(rf"^\W*{flag}\b", section, flags=re.MULTILINE), (name, flag)
        assert re.search(r"^\W*--json\b", section, flags=re.MULTILINE), name
    settings = hooks.on_page_markdown(_page("reference/settings.md"))
    for name in recipe_names():
        assert f"| `{name}` |" in settings, name


def test_the_readme_starts_with_four_commands_and_lists_all_of_them() -> None:
    text = README.read_text()
    shown = [words for block in blocks(README) if block.language == "sh" for words in block.commands()]
    assert [words[:2] for words in shown[:4]] == [
        ["pip", "install"], ["robustfpd", "train"], ["robustfpd", "evaluate"], ["robustfpd", "report"],
    ]  # fmt: skip
    assert text.index("robustfpd report") < text.index("make demo") < 2500
    rows = re.findall(r"^\| `robustfpd (\w+)[^|]*\|(.*)\|$", text, flags=re.MULTILINE)
    assert {name for name, _ in rows} == COMMANDS.keys()
    for name, row in rows:
        parameters = {*inspect.signature(function(name)).parameters, "json", "quiet"}
        assert {flag[2:].replace("-", "_") for flag in re.findall(r"--[a-z-]+", row)} <= parameters, name
