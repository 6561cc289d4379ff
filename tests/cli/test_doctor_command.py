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


def run_doctor(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    try:
        main(["doctor", *map(str, arguments)])
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, error = capsys.readouterr()
    return code, out, error


def test_exit_code_0_where_none_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = run_doctor(capsys, "digits/mini-fpd")
    assert code == 0
    assert "no check failed" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert run_doctor(capsys, "digits/mini-fpd", "--quiet")[:2] == (0, "")


@pytest.mark.parametrize(
    ("name", "check"), [("Softmax", "squashed-outputs"), ("shifted", "label-order"), ("seven", "classes")]
)
def test_exit_code_3_where_one_fails(name: str, check: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run_doctor(capsys, "--model", f"doctored:{name}", "--dataset", "digits", "--json")
    report = json.loads(printed)
    assert code == 3
    failed = [c for c in report["checks"] if c["outcome"] == "failed"]
    assert check in [c["name"] for c in failed]
    assert all(c["fix"] and c["evidence"] for c in failed)
    assert report["failed"] == len(failed)


def test_a_failed_check_is_printed_with_its_fix(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run_doctor(capsys, "--model", "doctored:seven", "--dataset", "digits")
    assert code == 3
    assert "→" in printed
    assert "before you evaluate" in printed.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits/mini-fpd", "--num-images", 0), "--num-images must be at least 1"),
        (("digits/mini-fpd", "--image-size", 16), "--image-size is for --model"),
        (("--model", "doctored:Softmax"), "name its test images with --dataset"),
        (("--model", "doctored:Softmax", "--dataset", "digits", "--image-size", 0), "--image-size must be"),
        (("--model", "gone.module:make", "--dataset", "digits"), "cannot be imported"),
        (("digits/mini-fdp",), "did you mean"),
        ((), "name a network"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, error = run_doctor(capsys, *arguments)
    assert (code, printed) == (2, "")
    assert message in error
