from __future__ import annotations

import dataclasses
import io
import time

import pytest
import torch
from rich.console import Console

from robustfpd.cli.display import duration, evaluation_display, training_display
from robustfpd.evaluation import EvaluationProgress
from robustfpd.training import EpochMetrics, PassLosses, Progress, StepResult

WIDTH = 80


def _step(gate_open: bool, plain: bool = False) -> StepResult:
    """Losses as wide as they get."""
    loss = torch.tensor(0.000123)
    losses = PassLosses(loss, None if plain else loss, torch.tensor(60), 64)
    return StepResult(losses, losses if gate_open and not plain else None, None, gate_open)


def _progress(step: StepResult) -> Progress:
    return Progress(
        epoch=98, epochs=100, batch=1, batches=1000, images_per_second=12345.6, seconds_left=7445.0, step=step,
        correct=torch.tensor(64), seen=64,
    )  # fmt: skip


def _metrics(plain: bool, gate_open: float | None = 1.0, gate_opened: int | None = 1) -> EpochMetrics:
    second = None if plain else 0.000123
    return EpochMetrics(
        epoch=98, ce=0.000123, restoration=second, second_ce=second, second_restoration=second, gate_open=gate_open,
        adversarial_ce=None, train_accuracy=1.0, train_adversarial_accuracy=None, validation_accuracy=1.0,
        validation_robust_accuracy=None, validation_ce=0.1, validation_restoration=second, lr=0.1,
        images_per_second=12345.6, seconds=1.0, gate_opened=gate_opened,
    )  # fmt: skip


def _shown(step: StepResult, plain: bool, *, terminal: bool) -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=WIDTH, force_terminal=terminal, soft_wrap=True, no_color=True, legacy_windows=False
    )
    with training_display(console, "digits", "undefended baseline, same noise") as observer:
        observer.on_batch(_progress(step))
        observer.on_epoch(_metrics(plain), True)
        observer.on_epoch(_metrics(plain), False)
    return file.getvalue()


def test_a_terminal_of_80_columns_shows_phase_gate_losses_speed_and_time_left_whole() -> None:
    alone = dataclasses.replace(_step(False), gate_open=None)
    steps = {"phases 1+2, gate open": _step(True), "phase 1, gate shut": _step(False), "backbone alone": alone}
    for said, step in steps.items():
        shown = " ".join(_shown(step, plain=False, terminal=True).split())
        for part in (said, "CE 0.00012", "L2 0.00012", "acc 100.0 %", "12346 img/s", "2:04:05 left"):
            assert part in shown


@pytest.mark.parametrize("plain", [False, True])
def test_epoch_lines_stand_under_their_headings_within_80_columns(plain: bool) -> None:
    title, heading, first, second = _shown(_step(True, plain), plain, terminal=False).strip("\n").split("\n")
    assert title == "undefended baseline, same noise"
    assert max(len(heading), len(first)) <= WIDTH
    assert first == f"{second}  best"
    assert len(heading) == len(second)
    assert ("gate open" in heading) is not plain
    assert heading.split()[0] == "epoch"
    assert second.split()[0] == "99"


@pytest.mark.parametrize(
    ("gate_open", "gate_opened", "said"),
    [
        (0.37, 210, "37 % from batch 210  "), (0.0, None, "0 %  "), (1.0, 1, "100 %  "),
        (0.996, 4, "100 % from batch 4  "),
        (None, None, "not yet  "),  # the backbone is trained alone
        (0.5, None, "50 %  "),  # metrics of an earlier version
    ],
)  # fmt: skip
def test_an_epochs_line_says_when_the_gate_opened(gate_open: float | None, gate_opened: int | None, said: str) -> None:
    file = io.StringIO()
    with training_display(Console(file=file, width=WIDTH, soft_wrap=True), "digits", "FPD") as observer:
        observer.on_epoch(_metrics(False, gate_open, gate_opened), False)
    heading, line = file.getvalue().strip("\n").split("\n")
    assert "gate open" in heading
    assert f" {said}" in line
    assert ("from batch" in line) is ("from batch" in said)


def test_a_baselines_line_names_no_gate() -> None:
    file = io.StringIO()
    with training_display(Console(file=file, width=WIDTH, soft_wrap=True), "digits", "baseline") as observer:
        observer.on_epoch(_metrics(True, 0.5, 7), False)
    assert "from batch" not in file.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (4.6, 245, 7445)] == ["5 s", "4:05", "2:04:05"]


def test_an_evaluation_shows_attack_radius_and_what_still_stands() -> None:
    file = io.StringIO()
    console = Console(file=file, width=WIDTH, force_terminal=True, no_color=True, legacy_windows=False)
    with evaluation_display(console, "FPD") as observer:
        observer.on_attack(EvaluationProgress(attack="PGD-40", eps=0.1, number=3, total=8, survivors=57))
        time.sleep(0.3)  # rich draws from a thread of its own
    assert "FPD: PGD-40 at eps 0.1 (3/8), 57 survivors" in file.getvalue()
