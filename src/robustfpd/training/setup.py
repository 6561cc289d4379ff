"""What a training begins with: images, and a network with new weights or another run's."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from robustfpd import data
from robustfpd.config import RunConfig
from robustfpd.distributed import LaunchEnvironment, ProcessGroup, shared_errors
from robustfpd.errors import InputError
from robustfpd.models import FPD, Baseline, build, load
from robustfpd.models.checkpoint import read_settings
from robustfpd.models.factory import saved_in
from robustfpd.training.fabric import check
from robustfpd.training.sync_batchnorm import synchronise


def prepared(config: RunConfig, net: nn.Module | None, start: str | Path | None) -> tuple[data.Splits, FPD | Baseline]:
    """The images of a run and the network that it begins with; `train` says what its arguments are.

    Raises:
        InputError: settings that cannot be used, or a start that does not fit.
    """
    check(config, LaunchEnvironment.read())
    splits = data.load(config.data)
    if len(splits.validation) == 0:
        raise InputError(
            f"{config.data.dataset} has {len(splits.train)} training images of {splits.info.num_classes} classes, "
            "too few to hold any out for validation: each class needs two"
        )
    _check_shares(len(splits.train), config.procedure.batch_size, ProcessGroup.current())
    model = build(splits.info.task, config.model, net=net, seed=config.seed)
    if start is not None:
        _take_over(model, Path(start), net, config.data.dataset)
    if config.procedure.sync_batchnorm and ProcessGroup.current().world_size > 1:
        synchronise(model)
    return splits, model


def check_ranks(group: ProcessGroup, config: RunConfig, out_dir: str | Path, start: object, resume: bool) -> None:
    """Check that all ranks were started for one training.

    Raises:
        InputError: a process group that is neither torchrun's nor srun's, or other arguments on another rank.
    """
    started = LaunchEnvironment.read().world_size
    with shared_errors():
        if group.world_size != started:
            raise InputError(
                f"the process group has {group.world_size} ranks, of which torchrun or srun started {started}; "
                "start the script with torchrun or srun, or train in one process"
            )
    settings = {"settings": config.model_dump_json(), "out_dir": str(out_dir), "start": str(start), "resume": resume}
    group.check_equal(settings)


def _check_shares(images: int, batch_size: int, group: ProcessGroup) -> None:
    """Refuse a batch that is smaller than asked for and cannot be shared out evenly."""
    if images < batch_size and images % group.world_size:
        raise InputError(
            f"{images} training images are less than a batch, and cannot be shared out evenly among {group.world_size} "
            "ranks; train in one process"
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
