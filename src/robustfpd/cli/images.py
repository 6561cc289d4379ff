"""Which images `robustfpd evaluate` attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from robustfpd.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from robustfpd.cli.targets import Subject
    from robustfpd.config import DataConfig, RunConfig
    from robustfpd.data import DatasetInfo, ImageSet


def as_made_for(found: Subject, config: RunConfig) -> RunConfig:
    """A saved model says itself how it wants its images."""
    from robustfpd import data

    if found.config is not None or found.task is None:
        return config
    channels = found.task.in_channels
    changes = {
        "image_size": found.task.image_size,
        "channels": channels if channels in (1, 3) else None,
        # The authors' CALTECH networks count the background.
        "background": found.task.num_classes == data.info(config.data.dataset).num_classes + 1,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def images_of(
    config: DataConfig, split: str, found: Subject, classifier: nn.Module
) -> tuple[ImageSet, tuple[str, ...]]:
    """The images to attack, which must be such as the model was made for, and the names of their classes."""
    from robustfpd import data

    if split == "validation" and config.selection == "test":
        raise InputError(
            f"{found.name} held no images out of training (data.selection is test); evaluate the test images"
        )
    splits = data.load(config)
    if found.task is not None and splits.info.task != found.task:
        raise InputError(f"{found.name} was trained for {found.task}, {splits.info.name} has {splits.info.task}")
    images = splits.test if split == "test" else splits.validation
    if found.task is None:
        _check_classes(found.name, classifier, images, splits.info)
    return images, splits.info.class_names


def _check_classes(name: str, classifier: nn.Module, images: ImageSet, info: DatasetInfo) -> None:
    """A module of the user's must tell the data set's classes apart."""
    import torch

    from robustfpd.evaluation.inputs import device_of
    from robustfpd.models.mode import evaluating

    one = images.take(torch.tensor([0])).floats()[0].to(device_of(classifier, torch.zeros(1)))
    try:
        with evaluating(classifier), torch.no_grad():
            logits = classifier(one)
    except Exception as error:
        raise InputError(
            f"{name} raised {type(error).__name__} on an image {tuple(one.shape)} of {info.name}: "
            f"{next(iter(str(error).splitlines()), '')}; --image-size sets the size"
        ) from error
    if isinstance(logits, torch.Tensor) and logits.ndim == 2 and logits.shape[1] != info.num_classes:
        raise InputError(f"{name} gives {logits.shape[1]} logits, {info.name} has {info.num_classes} classes")
