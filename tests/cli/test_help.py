from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from robustfpd import data
from robustfpd.cli import COMMANDS, function, main, overview, parsing
from robustfpd.cli.common import settings_together
from robustfpd.cli.completion import answers
from robustfpd.cli.parsing import examples, flags_of, parse, walk
from robustfpd.config import DATASETS, SUITES, recipe_names
from robustfpd.evaluation import suite_names

WIDTH = 80


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_alone_it_shows_the_journey(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    out = capsys.readouterr().out
    journey = [out.index(f"robustfpd {name}") for name in ("demo", "train", "evaluate", "report")]
    assert journey == sorted(journey)
    assert all(re.search(rf"^  {name} +\w", out, flags=re.MULTILINE) for name in COMMANDS)
    assert max(map(len, out.splitlines())) <= WIDTH
    for line in re.findall(r"^  (robustfpd .*?)(?:   .*)?$", out, flags=re.MULTILINE):
        _understood(line)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_fits_and_has_examples_that_are_understood(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= WIDTH
    assert "None" not in out
    assert not re.search(r"--no-|STR|\(default: \)", out)
    shown = examples(function(name))
    assert len(shown) >= 2
    told = out.partition("examples:\n")[2].replace(" \\\n   ", "")
    assert told.splitlines() == [f"  {example}" for example in shown]
    for example in shown:
        assert example.split()[1] == name
        _understood(example)
    if name != "completion":  # whose output is a script
        assert {"--json", "--quiet"} <= flags_of(function(name)).keys()


def _understood(line: str) -> None:
    _, name, *words = shlex.split(line.partition(" > ")[0])
    parse(name, function(name), settings_together(words))


def test_names_that_are_known_without_torch_are_those_of_the_registries() -> None:
    assert sorted(DATASETS) == data.names()
    assert sorted(SUITES) == suite_names()


WITHOUT_TORCH = (
    (), ("trian",), *((name, "--help") for name in COMMANDS),
    ("train", "digit/mini"), ("train", "digits/mini", "data.dataset=digit"), ("train", "digits/mini", "--seed", "x"),
    ("train", "digits/mini", "evaluation.suite=quik"), ("train", "digits/mini", "training.epoch=3"),
    ("train", "digits/mini", "--stages", "adversial"), ("train", "digits/mini", "--device", "cdua"),
    ("train", "digits/mini", "--stages", "adversarial"), ("train", "folder/mini", "--data-root", "nowhere"),
    ("train", "digits/mini", "--protocol", "publishd"), ("train", "digits/mini", "model.backbone=nonets:make"),
    ("evaluate",), ("evaluate", "nope"), ("evaluate", "mnist/mini-fdp"), ("evaluate", "x", "--model", "y:z"),
    ("evaluate", "mnist/mini-fpd", "--suite", "quik"), ("evaluate", "mnist/mini-fpd", "--norm", "l3"),
    ("evaluate", "mnist/mini-fpd", "--eps", "8"), ("evaluate", "mnist/mini-fpd", "--eps", "8/x"),
    ("evaluate", "mnist/mini-fpd", "--num-images", "0"), ("evaluate", "mnist/mini-fpd", "--dataset", "mnis"),
    ("evaluate", "mnist/mini-fpd", "--surrogate", "nope"), ("evaluate", "--model", "y:z", "--dataset", "digits"),
    ("evaluate", "mnist/mini-fpd", "--split", "tset"), ("evaluate", "mnist/mini-fpd", "--image-size", "9"),
    ("__complete", "train", "dig"), ("__complete", "evaluate", ""),
)  # fmt: skip


def test_help_and_wrong_arguments_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, robustfpd.cli as cli\n"
        f"for words in {WITHOUT_TORCH!r}:\n"
        "    try:\n"
        "        cli.main(words)\n"
        "        code = 0\n"
        "    except SystemExit as ended:\n"
        "        code = ended.code\n"
        "    wrong = bool(words) and '--help' not in words and words[0] != '__complete'\n"
        "    assert code == (2 if wrong else 0), (words, code)\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'mnist/mini-fpd'" in done.stderr
    assert "`robustfpd models` lists" in done.stderr


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m robustfpd recipes | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "error:" not in done.stderr


BASH = """
robustfpd() { "$PYTHON" -m robustfpd "$@"; }
eval "$(robustfpd completion bash)"
while read -r -a words; do
  COMP_WORDS=("${words[@]}") COMP_CWORD=$((${#words[@]} - 1)) COMPREPLY=()
  [[ ${COMP_WORDS[COMP_CWORD]} == _ ]] && COMP_WORDS[COMP_CWORD]=""
  _robustfpd
  echo "${COMPREPLY[*]}"
done
"""


def test_bash_completes_commands_flags_and_names(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").touch()
    (tmp_path / "runs" / "[a-z]ine").mkdir()
    (tmp_path / "runs" / "[a-z]ine" / "config.yaml").touch()
    expected = {
        "robustfpd tr": "train",
        "robustfpd train dig": "digits/mini", "robustfpd train digits/mini --pro": "--protocol",
        "robustfpd train digits/mini --protocol _": "corrected published",
        "robustfpd evaluate runs/": "runs/[a-z]ine runs/mine", "robustfpd evaluate x --norm =": "linf l2 l1",
        "robustfpd evaluate x --suite = st": "standard", "robustfpd evaluate --every-attack mnist/mini-f":
        "mnist/mini-fpd mnist/mini-fpd-adversarial", "robustfpd evaluate x --eps 0.1 --norm l": "linf l2 l1",
        "robustfpd train x --out _": "", "robustfpd nope _": "", "robustfpd completion z": "zsh",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", BASH], input="\n".join(expected) + "\n", capture_output=True, text=True, cwd=tmp_path,
        check=False, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert dict(zip(expected, done.stdout.splitlines(), strict=True)) == expected, done.stderr


@pytest.mark.parametrize(("words", "expected"), [
    (["evaluate", "--suite", "="], SUITES), (["evaluate", "--suite", "=", ""], SUITES),
    (["evaluate", "--suite", "=", "qu"], ["quick"]), (["evaluate", "--suite=qu"], ["--suite=quick"]),
    (["evaluate", "--suite="], [f"--suite={name}" for name in SUITES]), (["evaluate", "--out=x"], []),
    (["evaluate", "--nope=x"], []), (["train", "digits/mini", "training.epochs", "=", "3", "--seed", "-1", "x"], []),
    (["evaluate", "--suite=quick", "--norm", "l"], ["linf", "l2", "l1"]), (["evaluate", "--json=x"], []),
    (["train", "--seed=1", "digits/mini-f"], [n for n in recipe_names() if n.startswith("digits/mini-f")]),
])  # fmt: skip
def test_values_behind_an_equals_sign_are_completed(words: list[str], expected: list[str]) -> None:
    assert answers(words) == list(expected)


def test_the_journey_tells_which_commands_take_json_and_quiet() -> None:
    without = [name for name in COMMANDS if not {"--json", "--quiet"} <= flags_of(function(name)).keys()]
    assert f"All but {' and '.join(without)} take --json and\n--quiet" in overview()


@pytest.mark.parametrize("words", [
    ["predict", "--top", "3"], ["predict", "--device", "cpu", "--csv"], ["report", "--title", "a"],
])  # fmt: skip
def test_values_of_flags_are_no_words_that_a_command_needs(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: robustfpd {words[0]} needs RUN")
    assert said.count("\n") == 1


def test_only_settings_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_together(["x", "a.b=1", "--out", "c.d=2", "e.f=3"]) == ["x", "--out", "c.d=2", "a.b=1", "e.f=3"]
    seen: list[list[str]] = []
    monkeypatch.setattr(parsing, "parse", lambda name, command, words: lambda: seen.append(words))
    for words in (["report", "x.y=z", "--title", "a.b=c"], ["train", "a.b=1", "x"]):
        main(words)
    assert seen == [["x.y=z", "--title", "a.b=c"], ["x", "a.b=1"]]


def test_words_are_told_apart_as_argparse_does() -> None:
    def shown(*words: str) -> list[str]:
        return [word.flag or str(word.place) for word in walk(function("predict"), words)]

    assert shown("a", "--top", "-1", "b", "--json", "c") == ["0", "--top", "--top", "1", "--json", "2"]
    assert shown("--top=3", "a", "-", "--nope", "b") == ["--top", "0", "1", "-1", "2"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", shell])
    script = capsys.readouterr().out
    assert "__complete" in script
    assert "robustfpd" in script
