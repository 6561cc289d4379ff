from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import peak_memory, scaling
from benchmarks.__main__ import main
from benchmarks.peak_memory import PeakMemory
from robustfpd.errors import InputError

MEMORY = {"baseline": (100, 50), "improved": (200, 120), "corrected": (300, 200), "corrected, joint": (400, 300)}


def test_a_smoke_run_measures_and_writes_json_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = SimpleNamespace(robust_accuracy=0.5, forward_passes=80)
    monkeypatch.setattr(peak_memory, "measure", lambda size, name, device: PeakMemory(*MEMORY[name]))
    monkeypatch.setattr(scaling, "evaluate", lambda *args, **options: record)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu.json").write_text(
        '{"device": "cpu", "sections": {"attacks": {"environment": {}, "settings": {"rounds": 4, "limit": 1}}}}'
    )
    smoke: dict[str, Any] = {"smoke": True, "rounds": 3, "limit": 0, "device": "cpu"}
    main("model,scaling", out=tmp_path, document=tmp_path / "page.md", **smoke)
    values = json.loads((tmp_path / "cpu.json").read_text())
    assert values["sections"].keys() == {"attacks", "model", "scaling"}
    measures = {m["what"]: m["value"] for w in values["sections"]["model"]["workloads"] for m in w["measures"]}
    assert measures["corrected step / baseline step"]["median"] == 3.0
    assert measures["improved, full front / baseline"]["median"] > 1
    mean = "improved, mean step (phase 2 in one of 8 batches) / baseline step"
    assert measures[mean]["median"] < measures["improved, step with both phases / baseline step"]["median"]
    assert 0 < measures["improved, both phases, fp32: fraction of the matmul peak"]["median"] < 10
    text = (tmp_path / "page.md").read_text()
    for part in ("A smoke run", "| resnet_mini@8, peak memory |", "import robustfpd", "at most 4 rounds", "50.0 %; 20"):
        assert part in text
    main(read=(tmp_path / "cpu.json",), document=tmp_path / "again.md")
    assert (tmp_path / "again.md").read_text() == text
    with pytest.raises(InputError, match="measured on cpu, not on meta"):
        main(out=tmp_path / "cpu.json", smoke=True, device="meta")


@pytest.mark.parametrize(("options", "message"), [
    ({"only": "modle"}, "did you mean 'model'"), ({"rounds": 2}, "--rounds must be at least 3"),
])  # fmt: skip
def test_unusable_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(**options)
