"""`robustfpd evaluate`."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from robustfpd.errors import InputError

if TYPE_CHECKING:
    from robustfpd.config import RunConfig
    from robustfpd.training import RunFolder


def evaluate(
    run: tyro.conf.Positional[Path],
    /,
    eps: tuple[str, ...] = (),
    norm: str | None = None,
    suite: str | None = None,
    num_images: int | None = None,
    split: Literal["test", "validation"] = "test",
    dataset: str | None = None,
    data_root: str | None = None,
    download: bool = False,
    seed: int | None = None,
    every_attack: bool = False,
    device: str = "auto",
) -> None:
    """Attack a trained network: clean and worst-case accuracy over eps, with 95 % intervals.

    For example `robustfpd evaluate runs/digits-mini`,
    or `robustfpd evaluate runs/mnist-mini --eps 0.05 0.1 --norm linf --data-root data`.

    Args:
        run: a run's folder, or a folder that model.save wrote (then --dataset is needed).
        eps: radii of the perturbation in pixels of [0, 1], for example 0.03 or 8/255; default the recipe's.
        norm: norm of the perturbation, linf, l2 or l1; default the recipe's.
        suite: which attacks; default the recipe's.
        num_images: how many images; default the recipe's.
        split: test, or validation: the images held out of training, to choose settings by.
        dataset: images of this data set instead of the run's.
        data_root: folder where torchvision keeps its data sets.
        download: fetch the data set into data-root when it is not there.
        seed: seed of the choice of images and of the attacks.
        every_attack: try every attack on every image, for an accuracy per attack; costs more.
        device: auto, cpu, cuda or mps.
    """
    from rich.console import Console

    from robustfpd import data, evaluation, models
    from robustfpd.attacks.norms import geometry
    from robustfpd.cli.display import evaluation_display
    from robustfpd.cli.running import configured, torch_device
    from robustfpd.report.tables import evaluation_table
    from robustfpd.training import RunFolder

    chosen = torch_device(device)
    radii = tuple(_radius(text) for text in eps)
    folder = RunFolder(run)
    config = configured(_settings(folder, dataset), data_root, download, seed)
    plan = config.evaluation
    chosen_norm = geometry(norm or plan.norm).name
    if chosen_norm != plan.norm and not radii:
        raise InputError(f"the recipe's eps are {plan.norm} radii; say with --eps which in {chosen_norm}")
    model = models.load(run)
    splits = data.load(config.data)
    if splits.info.task != model.task:
        raise InputError(f"{run} was trained for {model.task}, {splits.info.name} has {splits.info.task}")
    images, shown = (splits.test, str(run)) if split == "test" else (splits.validation, f"{run} (validation images)")
    console = Console(soft_wrap=True)
    with evaluation_display(console, shown) as observer:
        record = evaluation.evaluate(
            model.classifier().to(chosen), images.floats(), suite=suite or plan.suite,
            eps=radii or plan.eps, norm=chosen_norm, num_images=plan.num_images if num_images is None else num_images,
            seed=config.seed, every_attack=every_attack, subject=shown, observer=observer,
        )  # fmt: skip
    source = splits.info.name if split == "test" else f"{splits.info.name}-{split}"
    # A saved model's folder stays as it is: model.save replaces only folders that hold nothing else.
    results = folder.evaluation if folder.started else run.with_name(f"{run.resolve().name}-evaluation")
    path = record.save(_new_file(results, f"{source}-{record.suite}-{record.norm}"))
    console.print(evaluation_table(record))
    console.print(f"record: {path}, each attacked image beside it as CSV", highlight=False)


def _settings(folder: RunFolder, dataset: str | None) -> RunConfig:
    """The run's settings, or a saved model's defaults; with the images of `dataset` where it is given."""
    from robustfpd import models
    from robustfpd.config import RunConfig

    if not folder.started and dataset is None:
        backbone = models.load(folder.path).config.backbone  # a clear error when there is no model either
        raise InputError(f"{folder.path} holds a model ({backbone}) but no run; say which test images with --dataset")
    config = folder.config() if folder.started else RunConfig()
    if dataset is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"dataset": dataset})})
    return config


def _radius(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"eps must hold numbers such as 0.03 or 8/255, found {text!r}") from None


def _new_file(folder: Path, name: str) -> Path:
    """Return a JSON file that does not exist yet: an evaluation never overwrites another."""
    candidates = (
        folder / f"{name}{suffix}.json" for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    )
    return next(path for path in candidates if not path.exists())
