from __future__ import annotations

from pathlib import Path

import pytest

from robustfpd.cli import main
from robustfpd.config import load_run
from robustfpd.models import Baseline, load
from robustfpd.training import Progress, RunFolder, TrainResult, loop

QUICK = (
    "training.epochs=1", "data.train_limit=64", "adversarial.epochs=1", "adversarial.steps=1", "adversarial.eps=0.1",
    "adversarial.select_images=20", "model.pyramid_channels=4",
)  # fmt: skip


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "digits/mini", *QUICK, *arguments])
    assert exit_.value.code == 2
    error = capsys.readouterr()[1]
    assert len(error.strip().splitlines()) == 1
    return error


@pytest.mark.parametrize("plain", [False, True])
def test_one_command_trains_all_stages_and_keeps_each_ones_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: bool
) -> None:
    run = tmp_path / "run"
    words = ["train", "digits/mini", *QUICK, "--stages", "two-phase,adversarial", "--out", str(run)]
    main([*words, *(["--baseline"] if plain else [])])
    out = capsys.readouterr().out
    assert "under PGD-10 at eps 0.1" in out
    assert f"evaluate {run / 'adversarial'}" in out
    for folder, stage in ((run, "two-phase"), (run / "adversarial", "adversarial")):
        assert load_run(folder / "config.yaml").stage == stage
        assert isinstance(load(folder), Baseline) is plain
        assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best", "last"}
    weights = [(f / "checkpoints/best/model.safetensors").read_bytes() for f in (run, run / "adversarial")]
    assert weights[0] != weights[1]
    main([*words, *(["--baseline"] if plain else []), "--resume"])  # all done: nothing is trained again
    assert (run / "checkpoints/best/model.safetensors").read_bytes() == weights[0]
    assert (run / "adversarial/checkpoints/best/model.safetensors").read_bytes() == weights[1]


def test_the_second_stage_can_follow_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    error = _fails(capsys, "--stages", "adversarial", "--out", str(run))
    assert "holds no checkpoint; train both with --stages two-phase,adversarial" in error
    assert not run.exists()
    main(["train", "digits/mini", *QUICK, "--out", str(run)])
    before = (run / "checkpoints/best/model.safetensors").read_bytes()
    main(["train", "digits/mini", *QUICK, "--stages", "adversarial", "--out", str(run)])
    assert (run / "checkpoints/best/model.safetensors").read_bytes() == before
    assert RunFolder(run / "adversarial").best.is_dir()
    assert "holds a run" in _fails(capsys, "--stages", "adversarial", "--out", str(run))


def test_a_stage_from_scratch_needs_no_first_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    main(["train", "digits/mini", *QUICK, "adversarial.start=scratch", "--stages", "adversarial", "--out", str(out)])
    assert RunFolder(out / "adversarial").best.is_dir()
    assert not RunFolder(out).started


@pytest.mark.parametrize(("stages", "said"), [
    ("adversial", "unknown stage 'adversial'; did you mean 'adversarial'?"),
    ("adversarial,two-phase", "--stages takes two-phase, adversarial or two-phase,adversarial"),
    ("two-phase,two-phase", "--stages takes"),
    ("", "--stages takes"),
])  # fmt: skip
def test_stages_that_are_none_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stages: str, said: str
) -> None:
    assert said in _fails(capsys, "--stages", stages, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_interrupted_second_stage_is_resumed_by_the_command_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    original = loop._Training._report

    def cut(self: loop._Training, epoch: int, *rest: object) -> Progress | None:
        if self.config.stage == "adversarial" and epoch == 1:
            raise KeyboardInterrupt
        original(self, epoch, *rest)  # type: ignore[arg-type]
        return None

    words = ["train", "digits/mini", *QUICK, "adversarial.epochs=2", "--stages", "two-phase,adversarial"]
    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "_report", cut)
        with pytest.raises(SystemExit) as exit_:
            main([*words, "--out", str(run)])
    assert exit_.value.code == 130
    out = capsys.readouterr().out
    assert f"1 complete epoch is kept in {run / 'adversarial'}" in out
    again = out.strip().splitlines()[-1].split()
    assert again[-1] == "--resume"
    main(again[again.index("train") :])
    history = (run / "adversarial" / "metrics.csv").read_text().splitlines()
    assert len(history) == 3


def test_the_protocol_is_applied_and_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def watched(config: object, *_: object, **__: object) -> TrainResult:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("robustfpd.training.train", watched)
    with pytest.raises(SystemExit):
        main(["train", "mnist/mini", "--protocol", "published", "--out", str(tmp_path / "run")])
    config = seen[0]
    assert getattr(config, "protocol", None) == "published"
    assert config.training.gate_trains == "upscaling"  # type: ignore[attr-defined]
