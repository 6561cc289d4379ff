"""Setup of a training: checked settings, images, and a model with new weights or those of another run."""

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
from robustfpd.training.fabric import synchronise_batch_norm


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


def load_splits(config: RunConfig, world_size: int) -> data.Splits:
    """Load the images of a run.

    Raises:
        InputError: no validation images, or batches that the ranks cannot share evenly.
    """
    _check_batch_size(config, world_size)
    splits = data.load(config.data)
    images = len(splits.train)
    if len(splits.validation) == 0:
        raise InputError(
            f"{config.data.dataset} has {images} training images of {splits.info.num_classes} classes, too few to hold "
            "any out for validation: each class needs two"
        )
    if images < config.procedure.batch_size and images % world_size:
        raise InputError(
            f"{images} training images are fewer than one batch and not a multiple of {world_size} ranks; "
            "train in one process"
        )
    return splits


def _check_batch_size(config: RunConfig, world_size: int) -> None:
    """Check that each rank gets equally many images of a batch, with `batch: halves` of each half."""
    batch_size = config.procedure.batch_size
    stage = "adversarial" if config.stage == "adversarial" else "training"
    halves = stage == "adversarial" and config.adversarial.batch == "halves"
    parts = world_size * (2 if halves else 1)
    if batch_size % parts:
        near = max(parts, batch_size // parts * parts)
        raise InputError(
            f"{stage}.batch_size counts the images of all {world_size} ranks and must be a multiple of {parts}"
            f"{' with adversarial.batch=halves' if halves else ''}, found {batch_size}; give {stage}.batch_size={near}"
        )


def build_model(
    config: RunConfig, splits: data.Splits, net: nn.Module | None, start: str | Path | None, world_size: int
) -> FPD | Baseline:
    """Return the model that a training starts with; `net` and `start` as in `robustfpd.train`.

    Raises:
        InputError: a start of another architecture or task.
    """
    model = build(splits.info.task, config.model, net=net, seed=config.seed)
    if start is not None:
        _load_start(model, Path(start), net, config.data.dataset)
    if config.procedure.sync_batchnorm and world_size > 1:
        synchronise_batch_norm(model)
    return model


def _load_start(model: FPD | Baseline, start: Path, net: nn.Module | None, dataset: str) -> None:
    """Load the weights of checkpoint `start`, which must be of the model's architecture and task."""
    path = saved_in(start)
    task, config = read_settings(path)
    if task != model.task:
        raise InputError(
            f"{start} was trained for {task}, but data set {dataset} has {model.task}; "
            "start from a checkpoint of the same classes and image size, or give the data it was trained on"
        )
    ignored = {"pretrained", "dropout"}  # the trained weights do not depend on them
    old, new = (c.model_dump(exclude=ignored) for c in (config, model.config))
    different = [f"{name} was {value!r}, now {new[name]!r}" for name, value in old.items() if value != new[name]]
    if different:
        raise InputError(f"{start} holds another network than this run's model settings: {'; '.join(different)}")
    source = load(path, net=net, trust_code=True)  # the backbone is the one that this run's settings name
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        lines = str(error).splitlines()
        reason = lines[1].strip() if len(lines) > 1 else str(error)
        raise InputError(f"{start} holds another network than this run's model settings build: {reason}") from None
