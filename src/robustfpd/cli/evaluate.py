"""`robustfpd evaluate`."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from robustfpd.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from robustfpd.cli.subjects import Subject
    from robustfpd.config import DataConfig, EvaluationConfig, RunConfig
    from robustfpd.data import ImageSet
    from robustfpd.evaluation import EvaluationRecord

NOT_TRUSTED = 3
"""Exit code under --strict."""


def evaluate(
    run: tyro.conf.Positional[Path | None] = None,
    /,
    model: str | None = None,
    eps: tuple[str, ...] = (),
    norm: str | None = None,
    suite: str | None = None,
    num_images: int | None = None,
    surrogate: tuple[str, ...] = (),
    strict: bool = False,
    split: Literal["test", "validation"] = "test",
    space: Literal["pixels", "normalised"] | None = None,
    dataset: str | None = None,
    image_size: int | None = None,
    data_root: str | None = None,
    download: bool = False,
    seed: int | None = None,
    every_attack: bool = False,
    device: str = "auto",
) -> None:
    """Attack a classifier: clean and worst-case accuracy over eps with 95 % intervals, and whether to trust them.

    For example `robustfpd evaluate runs/digits-mini`,
    or `robustfpd evaluate mnist/mini-fpd --suite standard --eps 0.1 --data-root data`,
    or `robustfpd evaluate --model mypackage.nets:make --dataset cifar10 --eps 8/255 --strict`.

    What was found is written as it goes: an evaluation that was killed goes on when the command is repeated.

    Args:
        run: a run's folder, a network that comes with robustfpd (see `robustfpd models`), or a folder that model.save
            wrote (then --dataset is needed).
        model: any torch.nn.Module instead, as package.module:factory, images in [0, 1] to logits; --dataset is needed.
        eps: radii of the perturbation in units of the space, for example 0.03 or 8/255; default the recipe's.
        norm: norm of the perturbation, linf, l2 or l1; default the recipe's.
        suite: which attacks: quick, standard (AutoAttack and attacks that know the defence), full, published, ...;
            default the recipe's.
        num_images: how many images; default the recipe's.
        surrogate: networks that attacks are transferred from, named like run or model; the plain twin of a network
            that comes with robustfpd joins by itself.
        strict: end with exit code 3 unless the verdict is `trusted`.
        split: test, or validation: the images held out of training, to choose settings by.
        space: where eps is measured: pixels of [0, 1], or normalised as in the published CALTECH evaluation; default
            the recipe's.
        dataset: images of this data set instead of the run's.
        image_size: pixels a side that --model wants; default the data set's own.
        data_root: folder where torchvision keeps its data sets.
        download: fetch the data set into data-root when it is not there.
        seed: seed of the choice of images and of the attacks.
        every_attack: try every attack on every image, for an accuracy per attack; costs more.
        device: auto, cpu, cuda or mps.
    """
    from rich.console import Console

    from robustfpd.cli.running import configured, torch_device
    from robustfpd.cli.subjects import subject, surrogates
    from robustfpd.evaluation.space import in_space

    chosen = torch_device(device)
    found = subject(run, model)
    config = configured(_settings(found, dataset, image_size), data_root, download, seed)
    plan = _plan(config.evaluation, eps, norm, suite, num_images, space)
    if surrogate and plan.space == "normalised":
        raise InputError("--surrogate networks take pixels; they cannot join an evaluation in normalised space")
    others = surrogates(surrogate, found.twin if plan.space == "pixels" else None)
    found.classifier.to(chosen)
    images = _images(config.data, split, found)
    console = Console(soft_wrap=True)
    shown = found.name if split == "test" else f"{found.name} (validation images)"
    shown += " (in normalised space, as published)" if plan.space == "normalised" else ""
    classifier, given = in_space(found.classifier, images, plan.space)
    source = config.data.dataset if split == "test" else f"{config.data.dataset}-{split}"
    others = {name: other.to(chosen) for name, other in others.items()}
    record, path = _evaluated(
        console, found.results, f"{source}-{plan.suite}-{plan.norm}", shown, classifier.to(chosen), given,
        suite=plan.suite, eps=plan.eps, norm=plan.norm, num_images=plan.num_images, seed=config.seed,
        every_attack=every_attack, surrogates=others,
    )  # fmt: skip
    _show(console, record, plan, path)
    if strict and record.verdict.status != "trusted":
        raise SystemExit(NOT_TRUSTED)


def _evaluated(
    console: Console, folder: Path, name: str, shown: str, classifier: nn.Module, data: Any, **options: Any
) -> tuple[EvaluationRecord, Path]:
    """Go on with, read, or make the evaluation; another one of that name stays, and this one gets a number."""
    from robustfpd import evaluation
    from robustfpd.cli.display import evaluation_display

    for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))):
        path = folder / f"{name}{suffix}.json"
        unfinished = evaluation.is_unfinished(path)
        done = path.is_file() and not unfinished
        try:
            with evaluation_display(console, shown) as observer:
                record = evaluation.evaluate(
                    classifier, data, out_dir=folder, name=path.stem, subject=shown, observer=observer, **options
                )
        except evaluation.OtherEvaluation:
            continue
        except KeyboardInterrupt:
            console.print(f"what was found is kept in {folder}; repeat the command to go on", highlight=False)
            raise
        if done:
            console.print(f"measured before, read from {path}", highlight=False)
        elif unfinished:
            console.print(f"went on with the unfinished evaluation in {folder}", highlight=False)
        break
    return record, path


def _show(console: Console, record: EvaluationRecord, plan: EvaluationConfig, path: Path) -> None:
    from robustfpd.report.tables import evaluation_table, verdict_text

    console.print(evaluation_table(record))
    if plan.divide_by is not None:
        console.print(_as_divided(record, plan.divide_by), highlight=False)
    console.print(verdict_text(record), highlight=False)
    console.print(f"record: {path}, each image and attack beside it as CSV", highlight=False)


def _plan(
    plan: EvaluationConfig, eps: tuple[str, ...], norm: str | None, suite: str | None, num_images: int | None,
    space: str | None,
) -> EvaluationConfig:  # fmt: skip
    """The recipe's evaluation, with what the flags change."""
    from robustfpd.attacks.norms import geometry

    radii = tuple(_radius(text) for text in eps)
    chosen = geometry(norm or plan.norm).name
    if chosen != plan.norm and not radii:
        raise InputError(f"the recipe's eps are {plan.norm} radii; say with --eps which in {chosen}")
    changes = {"eps": radii or plan.eps, "norm": chosen, "suite": suite or plan.suite, "space": space or plan.space}
    return plan.model_copy(update=changes | {"num_images": plan.num_images if num_images is None else num_images})


def _settings(found: Subject, dataset: str | None, image_size: int | None) -> RunConfig:
    """The run's settings, or defaults; with the images of `dataset` where it is given."""
    from robustfpd import data
    from robustfpd.config import RunConfig

    if found.config is None and dataset is None:
        raise InputError(f"{found.name} is no run; say which test images with --dataset")
    if image_size is not None and found.task is not None:
        raise InputError(f"--image-size is for --model; {found.name} was made for {found.task}")
    if image_size is not None and image_size < 1:
        raise InputError(f"--image-size must be at least 1, found {image_size}")
    config = found.config or RunConfig()
    changes: dict[str, object] = {} if dataset is None else {"dataset": dataset}
    if found.config is None and found.task is not None:  # the model says how it wants its images
        channels = found.task.in_channels
        changes |= {"image_size": found.task.image_size, "channels": channels if channels in (1, 3) else None}
        known = data.info(dataset or config.data.dataset).num_classes
        changes["background"] = found.task.num_classes == known + 1  # the authors' CALTECH networks count it
    if image_size is not None:
        changes["image_size"] = (image_size, image_size)
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def _images(config: DataConfig, split: str, found: Subject) -> ImageSet:
    """The images to attack, which must be such as the model was made for."""
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
        _check_classes(found, images, splits.info.task.num_classes, splits.info.name)
    return images


def _check_classes(found: Subject, images: ImageSet, classes: int, name: str) -> None:
    """A module of the user's must tell the data set's classes apart."""
    import torch

    from robustfpd.evaluation.inputs import device_of
    from robustfpd.models.mode import evaluating

    one = images.take(torch.tensor([0])).floats()[0].to(device_of(found.classifier, torch.zeros(1)))
    try:
        with evaluating(found.classifier), torch.no_grad():
            logits = found.classifier(one)
    except Exception as error:
        raise InputError(
            f"{found.name} raised {type(error).__name__} on an image {tuple(one.shape)} of {name}: "
            f"{next(iter(str(error).splitlines()), '')}; --image-size sets the size"
        ) from error
    if isinstance(logits, torch.Tensor) and logits.ndim == 2 and logits.shape[1] != classes:
        raise InputError(f"{found.name} gives {logits.shape[1]} logits, {name} has {classes} classes")


def _radius(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"eps must hold numbers such as 0.03 or 8/255, found {text!r}") from None


def _as_divided(record: EvaluationRecord, count: int) -> str:
    """The accuracies that the published evaluation would print: counts over a fixed number."""
    robust = "".join(f", {100 * w.robust.count / count:.2f} % at eps {w.eps:.4g}" for w in record.worst_case)
    return (
        f"divided by {count:,} instead of {record.num_images:,} images, as the published evaluation does: "
        f"{100 * record.clean.count / count:.2f} % clean{robust}"
    )
