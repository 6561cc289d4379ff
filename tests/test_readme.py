from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

from robustfpd.cli import COMMANDS, function, parse
from robustfpd.config import recipe

README = (Path(__file__).parents[1] / "README.md").read_text()
MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "{{" not in README
    snippets = _blocks("python")
    assert len(snippets) >= 2
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert type(namespace["model"]).__name__ == "FPD"
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


def _commands() -> list[list[str]]:
    lines = [line.partition("#")[0].strip() for block in _blocks("sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


def test_the_shell_commands_exist_and_their_flags_are_understood() -> None:
    commands = _commands()
    assert ["make", "demo"] in commands
    assert ["make", "test"] in commands
    for words in commands:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", MAKEFILE, flags=re.MULTILINE)
        elif words[0] == "robustfpd":
            parse(words[1:])
            if words[1] == "train":
                recipe(words[2], [word for word in words[3:] if "=" in word])


def test_the_first_screen_leads_to_a_report() -> None:
    assert [words[:2] for words in _commands()[:4]] == [
        ["pip", "install"], ["robustfpd", "train"], ["robustfpd", "evaluate"], ["robustfpd", "report"],
    ]  # fmt: skip
    assert README.index("robustfpd report") < README.index("make demo") < 2500


def test_every_command_is_in_the_table_and_its_flags_exist() -> None:
    rows = re.findall(r"^\| `robustfpd (\w+)[^|]*\|(.*)\|$", README, flags=re.MULTILINE)
    assert {name for name, _ in rows} == COMMANDS.keys()
    for name, text in rows:
        parameters = {*inspect.signature(function(name)).parameters, "json", "quiet"}
        assert {flag[2:].replace("-", "_") for flag in re.findall(r"--[a-z-]+", text)} <= parameters, name
