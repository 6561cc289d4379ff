"""`robustfpd evaluate`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from robustfpd.errors import InputError

if TYPE_CHECKING:
    from robustfpd.config import DataConfig, EvaluationConfig, RunConfig
    from robustfpd.data import ImageSet
    from robustfpd.evaluation import EvaluationRecord
    from robustfpd.models import FPD, Plain


def evaluate(
    run: tyro.conf.Positional[Path],
    /,
    eps: tuple[str, ...] = (),
    norm: str | None = None,
    suite: str | None = None,
    num_images: int | None = None,
    split: Literal["test", "validation"] = "test",
    space: Literal["pixels", "normalised"] | None = None,
    dataset: str | None = None,
    data_root: str | None = None,
    download: bool = False,
    seed: int | None = None,
    every_attack: bool = False,
    device: str = "auto",
) -> None:
    """Attack a trained network: clean and worst-case accuracy over eps, with 95 % intervals.

    For example `robustfpd evaluate runs/digits-mini`,
    or `robustfpd evaluate runs/mnist-mini --eps 0.05 0.1 --norm linf --data-root data`,
    or `robustfpd evaluate mnist/mini-fpd --data-root data`.

    Args:
        run: a run's folder, a network that comes with robustfpd (see `robustfpd models`), or a folder that model.save
            wrote (then --dataset is needed).
        eps: radii of the perturbation in units of the space, for example 0.03 or 8/255; default the recipe's.
        norm: norm of the perturbation, linf, l2 or l1; default the recipe's.
        suite: which attacks; default the recipe's.
        num_images: how many images; default the recipe's.
        split: test, or validation: the images held out of training, to choose settings by.
        space: where eps is measured: pixels of [0, 1], or normalised as in the published CALTECH evaluation; default
            the recipe's.
        dataset: images of this data set instead of the run's.
        data_root: folder where torchvision keeps its data sets.
        download: fetch the data set into data-root when it is not there.
        seed: seed of the choice of images and of the attacks.
        every_attack: try every attack on every image, for an accuracy per attack; costs more.
        device: auto, cpu, cuda or mps.
    """
    from rich.console import Console

    from robustfpd import evaluation, models
    from robustfpd.cli.display import evaluation_display
    from robustfpd.cli.running import configured, torch_device
    from robustfpd.evaluation.space import in_space
    from robustfpd.report.tables import evaluation_table

    chosen = torch_device(device)
    trained = _trained(run)
    model = models.load(trained.folder)
    config = configured(_settings(trained, dataset, model), data_root, download, seed)
    plan = _plan(config.evaluation, eps, norm, suite, num_images, space)
    images = _images(config.data, split, model, trained.name)
    shown = trained.name if split == "test" else f"{trained.name} (validation images)"
    shown += " (in normalised space, as published)" if plan.space == "normalised" else ""
    classifier, given = in_space(model.classifier(), images, plan.space)
    console = Console(soft_wrap=True)
    with evaluation_display(console, shown) as observer:
        record = evaluation.evaluate(
            classifier.to(chosen), given, suite=plan.suite, eps=plan.eps, norm=plan.norm, num_images=plan.num_images,
            seed=config.seed, every_attack=every_attack, subject=shown, observer=observer,
        )  # fmt: skip
    source = config.data.dataset if split == "test" else f"{config.data.dataset}-{split}"
    path = record.save(_new_file(trained.results, f"{source}-{record.suite}-{record.norm}"))
    console.print(evaluation_table(record))
    if plan.divide_by is not None:
        console.print(_as_divided(record, plan.divide_by), highlight=False)
    console.print(f"record: {path}, each attacked image beside it as CSV", highlight=False)


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


@dataclass(frozen=True)
class _Trained:
    """What is evaluated."""

    name: str
    folder: Path
    """Where the model is read from."""
    config: RunConfig | None
    """How it was trained; None for a folder that model.save wrote."""
    results: Path


def _trained(given: Path) -> _Trained:
    """Tell a network that comes with robustfpd, a run and a saved model apart."""
    from robustfpd.config import load_run
    from robustfpd.models import shipped
    from robustfpd.training import RunFolder

    folder = shipped.locate(given)
    name = shipped.named(folder)
    if name is not None:  # its folder is the repository's, or one that can be fetched again: results go to the user's
        results = Path("runs") / f"{name.replace('/', '-')}-evaluation"
        return _Trained(name, folder, load_run(folder / shipped.SETTINGS), results)
    run = RunFolder(folder)
    if run.started:
        return _Trained(str(given), folder, run.config(), run.evaluation)
    # A saved model's folder stays as it is: model.save replaces only folders that hold nothing else.
    return _Trained(str(given), folder, None, folder.with_name(f"{folder.resolve().name}-evaluation"))


def _settings(trained: _Trained, dataset: str | None, model: FPD | Plain) -> RunConfig:
    """The run's settings, or a saved model's defaults; with the images of `dataset` where it is given."""
    from robustfpd import data
    from robustfpd.config import RunConfig

    if trained.config is None and dataset is None:
        raise InputError(
            f"{trained.name} holds a model ({model.config.backbone}) but no run; say which test images with --dataset"
        )
    config = trained.config or RunConfig()
    changes: dict[str, object] = {} if dataset is None else {"dataset": dataset}
    if trained.config is None:  # the model says how it wants its images
        channels = model.task.in_channels
        changes |= {"image_size": model.task.image_size, "channels": channels if channels in (1, 3) else None}
        known = data.info(dataset or config.data.dataset).num_classes
        changes["background"] = model.task.num_classes == known + 1  # the authors' CALTECH networks count it
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def _images(config: DataConfig, split: str, model: FPD | Plain, name: str) -> ImageSet:
    """The images to attack, which must be such as the model was trained for."""
    from robustfpd import data

    if split == "validation" and config.selection == "test":
        raise InputError(f"{name} held no images out of training (data.selection is test); evaluate the test images")
    splits = data.load(config)
    if splits.info.task != model.task:
        raise InputError(f"{name} was trained for {model.task}, {splits.info.name} has {splits.info.task}")
    return splits.test if split == "test" else splits.validation


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


def _new_file(folder: Path, name: str) -> Path:
    """Return a JSON file that does not exist yet: an evaluation never overwrites another."""
    candidates = (
        folder / f"{name}{suffix}.json" for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    )
    return next(path for path in candidates if not path.exists())
