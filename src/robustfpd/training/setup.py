"""What a training begins with: images, and a network with new weights or another run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from robustfpd import data
from robustfpd.config import RunConfig
from robustfpd.errors import InputError, ReportedByOtherRank
from robustfpd.launched import Launched
from robustfpd.models import FPD, Baseline, build, load
from robustfpd.models.checkpoint import read_settings
from robustfpd.models.factory import saved_in
from robustfpd.processes import Processes
from robustfpd.training.fabric import check
from robustfpd.training.sync_batchnorm import synchronise


def prepared(config: RunConfig, net: nn.Module | None, start: str | Path | None) -> tuple[data.Splits, FPD | Baseline]:
    """The images of a run and the network that it begins with; `train` says what its arguments are.

    Raises:
        InputError: settings that cannot be used, or a start that does not fit.
    """
    check(config, Launched.now())
    splits = data.load(config.data)
    if len(splits.validation) == 0:
        raise InputError(
            f"{config.data.dataset} has {len(splits.train)} training images of {splits.info.num_classes} classes, "
            "too few to hold any out for validation: each class needs two"
        )
    _check_shares(len(splits.train), config.procedure.batch_size, Processes.now())
    model = build(splits.info.task, config.model, net=net, seed=config.seed)
    if start is not None:
        _take_over(model, Path(start), net, config.data.dataset)
    if config.procedure.sync_batchnorm and Processes.now().size > 1:
        synchronise(model)
    return splits, model


def check_agreed(processes: Processes, *asked: Any) -> None:
    """Refuse processes that were not started for one training: several seeds are several commands.

    Raises:
        InputError: a process group that is neither torchrun's nor srun's, or other arguments in another process.
    """
    launched = Launched.now()
    if processes.size != launched.size:
        raise InputError(
            f"the process group has {processes.size} processes, of which torchrun or srun started {launched.size}; "
            "start the script with torchrun or srun, or train in one process"
        )
    mine = [each.model_dump_json() if isinstance(each, RunConfig) else str(each) for each in asked]
    everywhere = processes.all(mine)
    other = next((rank for rank, theirs in enumerate(everywhere) if theirs != everywhere[0]), None)
    if other is not None:
        message = f"processes 0 and {other} were told to train different things"
        if not processes.first:
            raise ReportedByOtherRank(message)
        raise InputError(f"{message}; give all the same settings, and each seed a command of its own")


def _check_shares(images: int, batch_size: int, processes: Processes) -> None:
    """Refuse a batch that is smaller than asked for and cannot be shared out evenly."""
    if images < batch_size and images % processes.size:
        raise InputError(
            f"{images} training images are less than a batch, and cannot be shared out evenly among {processes.size} "
            "processes; train in one process"
        )


def _take_over(model: FPD | Baseline, start: Path, net: nn.Module | None, dataset: str) -> None:
    """Give `model` the weights of the checkpoint `start`, which must be of the same architecture and task."""
    path = saved_in(start)
    task, config = read_settings(path)
    if task != model.task:
        raise InputError(
            f"{start} was trained for {task}, but data set {dataset} has {model.task}; "
            "start from a checkpoint of the same classes and image size, or give the data it was trained on"
        )
    ignored = {"pretrained", "dropout"}  # they leave a trained network as it is
    old, new = (c.model_dump(exclude=ignored) for c in (config, model.config))
    differing = [f"{k} was {v!r}, now {new[k]!r}" for k, v in old.items() if v != new[k]]
    if differing:
        raise InputError(f"{start} holds another network than this run's model settings: {'; '.join(differing)}")
    source = load(path, net=net, trust_code=True)  # the backbone is the one that this run's settings name
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if len(str(error).splitlines()) > 1 else str(error)
        raise InputError(f"{start} holds another network than this run's model settings build: {reason}") from None
