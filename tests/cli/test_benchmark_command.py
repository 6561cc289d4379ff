from __future__ import annotations

import json
from pathlib import Path

import pytest

from robustfpd.benchmark import memory
from robustfpd.benchmark.memory import Memory
from robustfpd.cli import main


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_smoke_run_measures_writes_and_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "measured", lambda network, name, device: Memory(*MEMORY[name]))
    (tmp_path / "stream_memory.json").write_text('starting\n{"gigabytes": 1.5}\n')
    words = ["--smoke", "--repeats", "3", "--limit", "0", "--device", "cpu", "--extra", "stream_memory.json"]
    main(["benchmark", *words, "--only", "model,scaling", "--out", "found", "--document", "page.md", "--json"])
    (told,) = json.loads(capsys.readouterr().out)["benchmarks"]
    assert told == json.loads((tmp_path / "found" / "cpu.json").read_text())
    assert list(told["sections"]) == ["model", "scaling"]
    measures = {m["what"]: m["value"] for w in told["sections"]["model"]["workloads"] for m in w["measures"]}
    assert measures["two-phase step / plain step"]["median"] == 3.0  # of the memory, which comes last
    assert measures["FPD / plain"]["median"] > 1
    assert 0 < measures["two-phase step, fp32: share of the matmul peak"]["median"] < 10
    document = (tmp_path / "page.md").read_text()
    for said in ("A smoke run", "| resnet_mini@8, peak memory |", "import robustfpd", "| gigabytes | 1.5 |"):
        assert said in document
    main(["benchmark", "--read", "found/cpu.json", "--document", "again.md", "--quiet"])
    assert capsys.readouterr().out == ""
    assert (tmp_path / "again.md").read_text() == document


MEMORY = {"plain": (100, 50), "detached": (300, 200), "joint": (400, 300)}


def test_a_part_measured_again_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["benchmark", "--smoke", "--repeats", "3", "--limit", "0", "--device", "cpu", "--out", "b.json"]
    (tmp_path / "b.json").write_text(
        '{"device": "cpu", "sections": {"model": {"environment": {}, "settings": {}}, '
        '"scaling": {"environment": {}, "settings": {}}}}'
    )
    main([*words, "--only", "scaling"])
    assert "4N images / N images" in capsys.readouterr().out
    kept = json.loads((tmp_path / "b.json").read_text())["sections"]
    assert kept["model"] == {"environment": {}, "settings": {}, "workloads": []}
    assert kept["scaling"]["settings"]["smoke"] is True


@pytest.mark.parametrize(("words", "message"), [
    (["--only", "modle"], "did you mean 'model'"), (["--repeats", "2"], "--repeats must be at least 3"),
    (["--read", "nope.json"], "no file nope.json"), (["--device", "cdua"], "did you mean 'cuda'"),
])  # fmt: skip
def test_what_cannot_be_used_is_said_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
