"""Runs a suite against a classifier: worst case per image, attacking only what still stands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.attacks import adaptive
from robustfpd.config import Norm
from robustfpd.distributed import LaunchEnvironment, ProcessGroup, shared_errors
from robustfpd.errors import InputError, unknown_name
from robustfpd.evaluation import checks
from robustfpd.evaluation.attack_runner import AttackRunner, forward_passes
from robustfpd.evaluation.gallery import Gallery, gallery_folder
from robustfpd.evaluation.inputs import (
    Data,
    check_count,
    check_module,
    checked_radii,
    device_of,
    exact_digest,
    gather,
    look,
)  # fmt: skip
from robustfpd.evaluation.ledger import Ledger, OtherEvaluation, is_unfinished
from robustfpd.evaluation.memory import block_size, found_batch_size
from robustfpd.evaluation.record import LEDGER, EvaluationRecord
from robustfpd.evaluation.stages import EvaluationObserver, Sizes, Stages
from robustfpd.evaluation.suites import SuiteContext, plan
from robustfpd.models.mode import evaluating
from robustfpd.provenance import environment, weights_sha256

SearchPrecision = Literal["fp32", "bf16"]


def evaluate(
    classifier: nn.Module,
    data: Data,
    *,
    suite: str = "quick",
    eps: float | Sequence[float] = 8 / 255,
    norm: Norm = "linf",
    num_images: int | None = None,
    seed: int = 0,
    out_dir: str | Path | None = None,
    surrogates: Mapping[str, nn.Module] | None = None,
    batch_size: int | Literal["auto"] = "auto",
    search_precision: SearchPrecision = "fp32",
    every_attack: bool = False,
    model_name: str = "classifier",
    record_name: str = "record",
    class_names: Sequence[str] = (),
    gallery: int = 30,
    observer: EvaluationObserver | None = None,
) -> EvaluationRecord:
    """Attack a classifier, count what withstands, and say whether that number can be trusted.

    An image that has fallen to one attack, or at a smaller radius, is not attacked again: the smaller
    perturbation lies in the larger ball. Attacks that know the defence join when the classifier is an FPD.

    Inside a process group (torchrun, SLURM) the ranks shard the images, and all return the record that one process
    would return, except for the times. Rank 0 alone writes files.

    Args:
        classifier: images N×C×H×W in [0, 1] → logits N×K, or one of our models. Attacked in evaluation mode; flags,
            parameters, gradients and buffers are afterwards what they were.
        data: (images, labels), or a loader of such batches.
        suite: name of a suite: `quick`, `standard`, `full`, `published`, …
        eps: radius or radii, in pixels of [0, 1].
        norm: `linf`, `l2` or `l1`.
        num_images: how many images, drawn by `seed`; None takes all.
        seed: seed of the choice of images and of the attacks.
        out_dir: folder for `record.json` and `record.ledger.csv`. The ledger is written as the evaluation goes: one
            that was killed goes on where it stood when it is repeated, and one that is done is read.
        surrogates: other classifiers on which transferred attacks are made, by name.
        batch_size: images per forward pass; `auto` takes what serves well on a CPU, and on a GPU a block (at most
            256). Where memory does not suffice it is halved, and what was found is kept.
        search_precision: what attacks differentiate the classifier in: `fp32`, or `bf16` (autocast), faster where the
            hardware has it. Successes are always confirmed in float32, and one that is not is attacked again there.
        every_attack: try every attack on every image that is classified correctly, for a curve per attack; costs
            more.
        model_name: the classifier's name in the record.
        record_name: file name of the record in `out_dir`, without `.json`.
        class_names: what reports call the K classes; empty for numbers.
        gallery: how many images that fell, and how many that did not, get pictures in `out_dir` for a report.
        observer: callback for a live display.

    Raises:
        InputError: unusable images, labels, radii, suite or classifier, or a folder that holds another evaluation.
    """
    group = ProcessGroup.current()
    with shared_errors():
        started = LaunchEnvironment.read()
        if group.world_size == 1 < started.world_size:
            raise InputError(
                f"{started.launcher} started {started.world_size} processes without a process group: each would do "
                "the whole evaluation; call robustfpd.distributed.init_process_group() first"
            )
        classifier = adaptive.as_classifier(check_module(classifier))
        if torch.is_inference_mode_enabled():
            raise InputError(
                "evaluations cannot run inside torch.inference_mode(): gradients are off for good; leave it"
            )
        radii = checked_radii(eps, norm)
        for planned in plan(suite, SuiteContext(norm)):
            attacks.get(planned.attack).check_library(norm)
        if batch_size != "auto":
            check_count("batch_size", batch_size)
        if search_precision not in get_args(SearchPrecision):
            raise unknown_name("search_precision", search_precision, get_args(SearchPrecision))
        check_count("seed", seed, least=0)
        check_count("gallery", gallery, least=0)
        images, labels, numbers = gather(data, num_images, seed)
        device = device_of(classifier, images)
        with _exact(device), forward_passes(classifier) as passed:
            behaviour, classes = look(classifier, images, device)
            if class_names and classes and len(class_names) != classes:
                raise InputError(f"class_names must be {classes}, one for each logit, found {len(class_names)}")
            others, passes = _surrogates(surrogates, images, device, classes)
        passes += sum(passed)
    settings = {
        "suite": suite, "eps": [repr(e) for e in radii], "norm": norm, "seed": seed, "batch_size": batch_size,
        "search_precision": search_precision, "every_attack": every_attack, "behaviour": behaviour,
        "images": exact_digest(images, labels), "weights": weights_sha256(classifier),
        "surrogates": {n: weights_sha256(m) for n, m in others.items()}, "packages": environment()["packages"],
    }  # fmt: skip
    path = None if out_dir is None else Path(out_dir) / f"{record_name}.json"
    sha = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    group.check_equal({name: value for name, value in settings.items() if name != "behaviour"})  # which rounds
    ledger = Ledger()
    opened = group.run_on_main(lambda: _open(path, sha, settings, ledger))
    if isinstance(opened, OtherEvaluation):
        raise opened
    if opened is not None:
        return opened
    block = block_size(len(images), None if batch_size == "auto" else batch_size)
    chosen = found_batch_size(images, device, block) if batch_size == "auto" else batch_size
    sizes = Sizes(block, min(group.gather(chosen)), found=batch_size == "auto")
    with _exact(device), forward_passes(classifier) as looks:
        input_checks = checks.input_checks(classifier, images)
    runner = AttackRunner(
        classifier, images, labels, numbers, device, norm, seed, sizes.batch, classes,
        bfloat16=search_precision == "bf16",
    )  # fmt: skip
    shown = None
    if path is not None and group.is_main:
        shown = Gallery(gallery_folder(path), runner, sha, gallery)
    watcher = observer or EvaluationObserver()
    stages = Stages(runner, ledger, suite, radii, others, input_checks, every_attack, watcher, shown, sizes, group)
    with evaluating(classifier), _exact(device):
        record = stages.record(model_name, tuple(class_names), sha, passes + sum(looks))
    group.run_on_main(lambda: _keep(record, path, ledger))
    return group.broadcast(record)


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Without the caller's autocast, if any: attacks see the classifier's own gradients."""
    with ExitStack() as stack:
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _open(
    path: Path | None, sha: str, settings: Mapping[str, Any], ledger: Ledger
) -> EvaluationRecord | OtherEvaluation | None:
    """Return the finished record at `path`; without one, open the ledger. Another evaluation's files are returned."""
    try:
        record = _finished(path, sha, settings)
        if record is None and path is not None:
            ledger.open(path.with_suffix(LEDGER), settings)
    except OtherEvaluation as other:
        return other  # raised by the caller on every rank: it may go on under another name
    return record


def _keep(record: EvaluationRecord, path: Path | None, ledger: Ledger) -> None:
    """Write what is done."""
    if path is not None:
        record.save(path)
        ledger.finish()


def _surrogates(
    given: Mapping[str, nn.Module] | None, images: Tensor, device: torch.device, classes: int
) -> tuple[dict[str, nn.Module], int]:
    """The surrogates as classifiers, checked, and how many images were sent through them for that."""
    if not isinstance(given, (Mapping, type(None))):
        raise InputError(f"surrogates must be modules by name, found {type(given).__name__}")
    others = {n: adaptive.as_classifier(check_module(m, f"surrogate {n!r}")) for n, m in (given or {}).items()}
    passes = 0
    for name, other in others.items():
        with forward_passes(other) as looks:
            fits = device_of(other, images) == device and look(other, images, device)[1] == classes
        if not fits:
            raise InputError(f"surrogate {name!r} must lie on {device} and give {classes} logits like the classifier")
        passes += sum(looks)
    return others, passes


def _finished(path: Path | None, sha: str, settings: Mapping[str, Any]) -> EvaluationRecord | None:
    """The record that is there, if any; one of another evaluation is an InputError."""
    if path is None or not path.is_file() or is_unfinished(path.with_suffix(LEDGER)):
        return None
    record = EvaluationRecord.load(path)
    if record.settings_sha256 != sha:
        there = {
            "suite": record.suite, "norm": record.norm, "eps": [repr(w.eps) for w in record.worst_case],
            "seed": record.seed, "batch_size": "auto" if record.batch_size_auto else record.batch_size,
            "search_precision": record.search_precision, "every_attack": record.every_attack,
            "weights": record.weights_sha256, "packages": record.environment.get("packages"),
        }  # fmt: skip
        differing = (f"{k}={v!r}, this one has {settings[k]!r}" for k, v in there.items() if v != settings[k])
        raise OtherEvaluation(
            f"{path} holds another evaluation ({record.model_name}, {record.num_images} images) with "
            f"{next(differing, 'other images or surrogates')}; give another out_dir or record_name"
        )
    return record
