"""What test_distributed.py runs on two ranks: each scenario returns what its rank observed."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from robustfpd.config import RunConfig, parse
from robustfpd.distributed import ProcessGroup, shared_errors
from robustfpd.errors import InputError
from robustfpd.training import Observer, Progress, train


class Net(nn.Module):
    """A backbone of three stages: with group norm, which does not depend on the batch, or with batch norm."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, inputs, outputs, stride in (("first", 1, 8, 1), ("middle", 8, 8, 2), ("last", 8, 16, 2)):
                convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
                norm = nn.BatchNorm2d(outputs) if batch_norm else nn.GroupNorm(2, outputs)
                self.add_module(name, nn.Sequential(convolution, norm, nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = nn.Sequential(*self.children())(x)
        return out


def config(images: int = 96, **training: Any) -> RunConfig:
    """A small run; three steps an epoch."""
    values = {
        "epochs": 2, "batch_size": 32, "noise": 0.1, "schedule": {"name": "one_cycle"}, "optimizer": {"lr": 0.003},
        "threshold": 0.9, "threshold_unit": "absolute", "restoration_start": 0, "early_stop_patience": None,
        **training,
    }  # fmt: skip
    data = {"train_limit": images, "augment": {"rotation": 10, "brightness": 0.1}}
    model = {"backbone": "custom", "stages": ["first", "middle", "last"], "pyramid_channels": 8}
    return parse(RunConfig, {"data": data, "model": model, "training": values})


def adversarial() -> RunConfig:
    """Adversarial training after `config()`."""
    settings = {"epochs": 1, "batch_size": 32, "steps": 2, "batch": "halves", "select_images": 20, "eps": 0.1}
    return parse(RunConfig, config().model_dump() | {"stage": "adversarial", "adversarial": settings})


CURVES: dict[str, dict[str, Any]] = {
    "detached": {"images": 320, "epochs": 5},
    "joint": {
        "images": 320,
        "epochs": 2,
        "second_pass": "joint",
        "activation_checkpointing": True,
        "restoration_start": 0.5,
    },
    "through": {"second_pass": "through", "threshold": 10.0},
}
"""Trainings whose losses must be those of one process."""


class Losses:
    """An observer that records every loss of every step."""

    def __init__(self, stop_in_epoch: int | None = None) -> None:
        self.steps: list[list[float]] = []
        self.stop_in_epoch = stop_in_epoch

    def __call__(self, progress: Progress) -> None:
        passes = [losses for losses in (progress.step.first, progress.step.second) if losses is not None]
        self.steps.append([float(loss) for p in passes for loss in (p.ce, p.restoration) if loss is not None])
        if (progress.epoch, progress.batch) == (self.stop_in_epoch, 2):
            raise KeyboardInterrupt


def trained(run: RunConfig, folder: Path, batch_norm: bool = False, **options: Any) -> dict[str, Any]:
    """Train; return losses, best weights and metrics."""
    losses = Losses()
    observer = Observer(on_batch=losses)
    result = train(run, folder, net=Net(batch_norm), device="cpu", precision="fp32", observer=observer, **options)
    weights = {name: w.float() for name, w in result.model.state_dict().items()}
    timing = ("seconds", "images_per_second")
    history = [{k: v for k, v in vars(row).items() if k not in timing} for row in result.history]
    return {"losses": losses.steps, "weights": weights, "history": history}


def curves(folder: Path) -> dict[str, Any]:
    """All of CURVES."""
    return {name: trained(config(**changes), folder / name) for name, changes in CURVES.items()}


def resumed(folder: Path) -> dict[str, Any]:
    """Trainings interrupted in their second epoch: one is resumed here, a copy of the other on one rank."""
    group = ProcessGroup.current()
    for name, batch_norm in (("interrupted", False), ("resumed", True)):
        try:
            observer = Observer(on_batch=Losses(stop_in_epoch=1))
            train(config(), folder / name, net=Net(batch_norm), device="cpu", precision="fp32", observer=observer)
        except KeyboardInterrupt:
            group.gather(None)
            continue
        raise AssertionError("not interrupted")
    if group.is_main:
        shutil.copytree(folder / "interrupted", folder / "copy")
    group.gather(None)
    return {
        "whole, group norm": trained(config(), folder / "interrupted", resume=True),
        "whole": trained(config(), folder / "whole", batch_norm=True),
        "resumed": trained(config(), folder / "resumed", batch_norm=True, resume=True),
    }


def attacked(folder: Path) -> dict[str, Any]:
    """Adversarial training after `resumed`."""
    return trained(adversarial(), folder / "attacked", batch_norm=True, start=folder / "whole")


def failing(folder: Path) -> dict[str, Any]:
    """Names and messages of the errors that each rank raises when rank 0 or rank 1 fails."""

    def raised(call: Callable[[], object]) -> list[str]:
        try:
            call()
        except (InputError, OSError) as error:
            return [type(error).__name__, str(error)]
        return []

    def full_disk(path: Path, rows: object) -> None:
        raise OSError("no space left")

    def fail_on_rank_1() -> None:
        with shared_errors():
            if ProcessGroup.current().rank == 1:
                raise InputError("no such folder here")

    def attempt(name: str, **changes: Any) -> list[str]:
        return raised(lambda: train(config(**changes), folder / name, net=Net(), device="cpu"))

    errors = {
        "taken folder": attempt("whole"),
        "odd batch": attempt("odd", batch_size=33),
        "sync_batchnorm": attempt("sync", sync_batchnorm=True),
        "rank 1": raised(fail_on_rank_1),
    }
    with patch("robustfpd.training.loop.write_csv", full_disk):
        errors["full disk"] = attempt("full")
    return errors


def command(folder: Path) -> dict[str, str]:
    """Standard output and error of `robustfpd train` on this rank."""
    from robustfpd.cli import main

    words = ["digits/mini", "data.train_limit=64", "training.batch_size=16", "training.epochs=1", "--device", "cpu"]
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        main(["train", *words, "--out", str(folder / "command"), "--json"])
    return {"out": out.getvalue(), "error": error.getvalue()}


def run_all(folder: Path) -> str:
    """Run all scenarios on this rank, and write what it observed."""
    rank = ProcessGroup.current().rank
    for scenario in (curves, resumed, attacked, failing, command):
        torch.save(scenario(folder), folder / f"{scenario.__name__}-{rank}.pt")
        ProcessGroup.current().gather(None)
    return ""
