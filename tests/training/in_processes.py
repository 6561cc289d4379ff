"""What test_distributed.py runs in two processes under torchrun: each scenario leaves what it saw in a file."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from robustfpd.config import RunConfig, parse
from robustfpd.distributed import ProcessGroup, init_process_group, shared_errors
from robustfpd.errors import InputError
from robustfpd.training import Observer, Progress, RunFolder, train
from robustfpd.training.sync_batchnorm import synchronise

STEPS = 50
"""Of the loss curves."""


class Net(nn.Module):
    """A backbone of three stages: every batch norm costs messages."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, inputs, outputs, stride in (("first", 1, 8, 1), ("middle", 8, 8, 2), ("last", 8, 16, 2)):
                convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
                self.add_module(name, nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = nn.Sequential(*self.children())(x)
        return out


def config(images: int = 96, **training: Any) -> RunConfig:
    """A small run; three steps an epoch."""
    values = {
        "epochs": 2, "batch_size": 32, "noise": 0.1, "schedule": {"name": "one_cycle"}, "optimizer": {"lr": 0.003},
        "threshold": 0.6, "sync_batchnorm": True, "early_stop_patience": None, **training,
    }  # fmt: skip
    data = {"train_limit": images, "augment": {"rotation": 10, "brightness": 0.1}}
    model = {"backbone": "custom", "stages": ["first", "middle", "last"], "pyramid_channels": 8}
    return parse(RunConfig, {"data": data, "model": model, "training": values})


def adversarial() -> RunConfig:
    """Adversarial training after `config()`."""
    settings = {"epochs": 1, "batch_size": 32, "steps": 2, "batch": "halves", "select_images": 20, "eps": 0.1}
    run = config().model_dump() | {"stage": "adversarial", "adversarial": settings}
    return parse(RunConfig, run)


CURVES: dict[str, dict[str, Any]] = {
    "detached": {"images": 320, "epochs": STEPS // 10},
    "joint": {"images": 320, "epochs": STEPS // 10, "second_pass": "joint"},
    "through": {"second_pass": "through", "threshold": 1.0},
    "fsdp": {
        "images": 192,
        "threshold": 0.66,
        "epochs": 1,
        "strategy": "fsdp",
        "second_pass": "joint",
        "activation_checkpointing": True,
    },
}
"""Trainings whose losses must be those of one process."""


class Losses:
    """An observer's record: every loss of every step."""

    def __init__(self, stop_in_epoch: int | None = None) -> None:
        self.seen: list[list[float]] = []
        self.stop_in_epoch = stop_in_epoch

    def __call__(self, progress: Progress) -> None:
        step = progress.step
        losses = (step.ce, step.restoration, step.second_ce, step.second_restoration)
        self.seen.append([float(loss) for loss in losses if loss is not None])
        if (progress.epoch, progress.batch) == (self.stop_in_epoch, 2):
            raise KeyboardInterrupt


def trained(run: RunConfig, folder: Path, **options: Any) -> dict[str, Any]:
    """Train; return losses, last weights and metrics."""
    losses = Losses()
    result = train(
        run, folder, net=Net(), device="cpu", precision="fp32", observer=Observer(on_batch=losses), **options
    )
    weights = {name: w.float() for name, w in result.model.state_dict().items()}
    timing = ("seconds", "images_per_second")
    history = [{k: v for k, v in vars(row).items() if k not in timing} for row in result.history]
    return {"losses": losses.seen, "weights": weights, "history": history}


def curves(folder: Path) -> dict[str, Any]:
    """All of CURVES."""
    return {name: trained(config(**changes), folder / name) for name, changes in CURVES.items()}


def resumed(folder: Path) -> dict[str, Any]:
    """Trainings that are interrupted in their second epoch; one goes on here, copies are to go on elsewhere."""
    for strategy in ("ddp", "fsdp"):
        observer = Observer(on_batch=Losses(stop_in_epoch=1))
        try:
            train(
                config(strategy=strategy),
                folder / strategy / "cut",
                net=Net(),
                device="cpu",
                precision="fp32",
                observer=observer,
            )
        except KeyboardInterrupt:
            continue
        raise AssertionError("not interrupted")
    group = ProcessGroup.current()
    group.barrier()
    if group.is_main:
        shutil.copytree(folder / "ddp" / "cut", folder / "resumed")
    group.barrier()
    return {
        "whole": trained(config(), folder / "whole"),
        "resumed": trained(config(), folder / "resumed", resume=True),
    }


def attacked(folder: Path) -> dict[str, Any]:
    """Adversarial training with batch norm of each process's own."""
    return trained(adversarial(), folder / "attacked", start=folder / "whole")


def failing(folder: Path) -> dict[str, Any]:
    """What each process raises when process 0 meets an error, or another one does."""

    def raised(call: Callable[[], object]) -> list[str]:
        try:
            call()
        except (InputError, OSError) as error:
            return [type(error).__name__, str(error)]
        return []

    def full_disk(self: RunFolder, history: object) -> None:
        raise OSError("no space left")

    def second_process_fails() -> None:
        with shared_errors():
            if ProcessGroup.current().rank == 1:
                raise InputError("no such folder here")

    found = {
        "taken folder": raised(lambda: train(config(), folder / "whole", net=Net(), device="cpu")),
        "odd batch": raised(lambda: train(config(batch_size=33), folder / "odd", net=Net(), device="cpu")),
        "fsdp through": raised(
            lambda: train(config(strategy="fsdp", second_pass="through"), folder / "both", net=Net(), device="cpu")
        ),
        "second process": raised(second_process_fails),
    }
    kept, RunFolder.write_metrics = RunFolder.write_metrics, full_disk  # type: ignore[method-assign]
    found["full disk"] = raised(lambda: train(config(), folder / "full", net=Net(), device="cpu"))
    RunFolder.write_metrics = kept  # type: ignore[method-assign]
    return found


def normalised(folder: Path) -> dict[str, Any]:
    """Batch norms on a batch of which the processes have unlike parts: outputs, gradients and statistics."""
    return {name: normalise(norm, images) for name, (norm, images) in norms().items()}


def norms() -> dict[str, tuple[nn.Module, Tensor]]:
    """Batch norms with images for them, the same in every process."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(7, 3, 4, 5, generator=draws)
    cumulative = nn.BatchNorm2d(3, momentum=None)
    far = nn.BatchNorm2d(3)
    return {
        "plain": (nn.BatchNorm2d(3), images), "activated": (BatchNormAct2d(3, act_layer=nn.ELU), images),
        "no weights": (nn.BatchNorm1d(3, affine=False), images[..., 0]), "cumulative": (cumulative, images),
        "far from zero": (far, 1000 + images), "channels last": (
            nn.BatchNorm2d(3), images.contiguous(memory_format=torch.channels_last)),
    }  # fmt: skip


def normalise(norm: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Two passes of the own part forward, one back; parts are gathered, gradients of weights summed."""
    group = ProcessGroup.current()
    synchronise(norm)
    own = group.shard(len(images))
    x = images[own].clone().requires_grad_()
    norm(x.detach())
    y = norm(x)
    target = torch.linspace(-1, 1, images.numel()).reshape(images.shape)[own]
    F.mse_loss(y, target, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    parts = {"y": torch.cat(group.gather(y.detach())), "slope": torch.cat(group.gather(x.grad))}
    own_slopes = {n: p.grad for n, p in norm.named_parameters() if p.grad is not None}
    slopes = {n: torch.stack(group.gather(slope)).sum(dim=0) for n, slope in own_slopes.items()}
    return {**parts, **slopes, **dict(norm.named_buffers())}


SCENARIOS = (curves, resumed, attacked, failing, normalised)


if __name__ == "__main__":
    torch.set_num_threads(1)
    group = init_process_group("cpu")
    for scenario in SCENARIOS:
        torch.save(scenario(Path(sys.argv[1])), Path(sys.argv[1]) / f"{scenario.__name__}-{group.rank}.pt")
        group.barrier()
