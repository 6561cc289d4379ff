from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from robustfpd.cli import COMMANDS
from robustfpd.config import recipe_names

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


def test_the_shell_commands_exist() -> None:
    lines = [line.partition("#")[0].strip() for block in _blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line]
    assert ["make", "demo"] in commands
    assert ["make", "test"] in commands
    for words in commands:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", MAKEFILE, flags=re.MULTILINE)
        elif words[0] == "robustfpd":
            assert words[1] in COMMANDS
            assert words[1] != "train" or words[2] in recipe_names()
