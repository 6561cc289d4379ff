from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import robustfpd as rf
from robustfpd.cli import main


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["export", *map(str, arguments)])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed[1]


def test_a_network_is_exported_into_the_folder_one_is_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["export", "digits/mini-fpd", "--format", "torch", "--restored", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["file"] == "digits-mini-fpd.pt2"
    assert result["outputs"] == ["logits", "restored"]
    assert result["metadata"]["class_names"] == list("0123456789")
    assert result["difference"] < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["digits-mini-fpd.pt2"]
    images = torch.rand(3, 1, 8, 8)
    logits, restored = torch.export.load(tmp_path / "digits-mini-fpd.pt2").module()(images)
    with torch.no_grad():
        expected = rf.load("digits/mini-fpd")(images)
    assert torch.allclose(logits, expected.logits, atol=1e-4)
    assert torch.allclose(restored, expected.restored, atol=1e-4)


def test_words_for_people_and_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "plain.pt2"
    main(["export", "mnist/mini-baseline", "--format", "torch", "--out", str(out), "--image-size", "20", "24"])
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed
    assert "N×1×20×24" in printed
    assert "compared with the network on 18 images" in printed


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no restoration" in refusal(capsys, "mnist/mini-baseline", "--restored", "--out", tmp_path / "a.onnx")
    assert "found 0" in refusal(capsys, "digits/mini-fpd", "--image-size", 0)
    assert "is a folder" in refusal(capsys, "digits/mini-fpd", "--out", tmp_path)
    assert "did you mean" in refusal(capsys, "digits/mini-fdp")
    assert not list(tmp_path.iterdir())
