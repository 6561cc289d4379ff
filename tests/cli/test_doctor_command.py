from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from robustfpd.cli import main

MODULE = """
import torch
from torch import nn
import robustfpd as rf

class Softmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = rf.load("digits/mini-fpd").classifier(squash=False)
        self.eval()
    def forward(self, images):
        return self.net(images).softmax(dim=1)

def shifted():
    net = rf.load("digits/mini-fpd").classifier(squash=False)
    class Shifted(nn.Module):
        def forward(self, images):
            return net(images).roll(1, dims=1)
    return Shifted().eval()

def seven():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7)).eval()
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doctored.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def ask(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    try:
        main(["doctor", *map(str, arguments)])
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_healthy_network_ends_with_0(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = ask(capsys, "digits/mini-fpd")
    assert code == 0
    assert "nothing that would ruin an evaluation" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert ask(capsys, "digits/mini-fpd", "--quiet")[:2] == (0, "")


@pytest.mark.parametrize(
    ("name", "finding"), [("Softmax", "squashed-outputs"), ("shifted", "label-order"), ("seven", "classes")]
)
def test_a_module_with_a_disease_ends_with_3(name: str, finding: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = ask(capsys, "--model", f"doctored:{name}", "--dataset", "digits", "--json")
    told = json.loads(printed)
    assert code == 3
    problems = [f for f in told["findings"] if f["outcome"] == "problem"]
    assert finding in [f["name"] for f in problems]
    assert all(f["fix"] and f["evidence"] for f in problems)
    assert told["problems"] == len(problems)
    code, printed, _ = ask(capsys, "--model", f"doctored:{name}", "--dataset", "digits")
    assert code == 3
    assert "→" in printed
    assert "before you evaluate" in printed.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits/mini-fpd", "--num-images", 0), "--num-images must be at least 1"),
        (("digits/mini-fpd", "--image-size", 16), "--image-size is for --model"),
        (("--model", "doctored:Softmax"), "say with --dataset"),
        (("--model", "doctored:Softmax", "--dataset", "digits", "--image-size", 0), "--image-size must be"),
        (("--model", "gone.module:make", "--dataset", "digits"), "cannot be imported"),
        (("digits/mini-fdp",), "did you mean"),
        ((), "name what to"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, error = ask(capsys, *arguments)
    assert (code, printed) == (2, "")
    assert message in error
