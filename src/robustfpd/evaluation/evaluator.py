"""`evaluate`: check the arguments, open the files, run the evaluation loop."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from robustfpd import attacks
from robustfpd.attacks import adaptive
from robustfpd.attacks.half_precision import HALF, SinglePrecision
from robustfpd.config import Norm
from robustfpd.device import evaluating
from robustfpd.distributed import LaunchEnvironment, ProcessGroup, shared_errors
from robustfpd.errors import InputError, unknown_name
from robustfpd.evaluation import checks, inputs, suites
from robustfpd.evaluation.attack_runner import AttackRunner, forward_passes
from robustfpd.evaluation.checks import contradictions
from robustfpd.evaluation.gallery import Gallery, gallery_folder
from robustfpd.evaluation.inputs import Data, EvaluationData, check_count, check_module, device_of, fingerprint
from robustfpd.evaluation.ledger import Ledger, OtherEvaluation, is_unfinished
from robustfpd.evaluation.loop import EvaluationLoop, EvaluationObserver, EvaluationSettings, SearchPrecision
from robustfpd.evaluation.record import LEDGER, EvaluationRecord
from robustfpd.evaluation.robustness import guessing_accuracy
from robustfpd.evaluation.suites import SuiteContext
from robustfpd.evaluation.time_limit import TimeLimit
from robustfpd.provenance import environment, weights_sha256


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
    dataset: str = "",
    certified_accuracy: float | Sequence[float] | None = None,
    observer: EvaluationObserver | None = None,
    max_minutes: float | None = None,
) -> EvaluationRecord:
    """Attack a classifier; return how robust it is, and a verdict on whether the measurement is reliable.

    An image that was misclassified under one attack or at a smaller radius is not attacked again: the smaller
    perturbation lies in the larger ball. Adaptive attacks are added if the classifier is an FPD.

    Inside a process group (torchrun, SLURM) the images are sharded over the ranks. All ranks return the record of a
    single process, except for the times; rank 0 alone writes files.

    Args:
        classifier: images N×C×H×W in [0, 1] → logits N×K, or one of our models. It is attacked in evaluation mode;
            its flags, parameters, gradients and buffers are restored.
        data: (images, labels), or a loader of such batches. A loader is read no further than needed.
        suite: name of a suite: `quick`, `standard`, `full`, `published`, …
        eps: radius or radii, in pixels of [0, 1]. At 0 no attack is run: the accuracy is that of the clean images.
        norm: `linf`, `l2` or `l1`.
        num_images: number of images, drawn by `seed`; None takes all. A `DataLoader` that shuffles is read in the
            order of its data set. Of an iterable whose images cannot be counted before they are read (a generator, an
            iterable data set, a custom batch sampler) these are the first images.
        seed: seed of the choice of images and of the attacks.
        out_dir: folder for `record.json` and `record.ledger.csv`. The ledger is written during the evaluation: an
            interrupted evaluation resumes when it is repeated, and a finished one is read.
        surrogates: other classifiers, by name, for transferred attacks.
        batch_size: images per forward pass; `auto` chooses by device and image size, at most 256. It is halved when
            memory runs out.
        search_precision: precision in which attacks differentiate the classifier: `fp32`, or `bf16` (autocast),
            faster on some hardware. Adversarial images are classified in float32, and images that are
            misclassified in bfloat16 only are attacked again in float32.
        every_attack: run every attack on every correctly classified image, for a curve per attack; takes longer.
        model_name: the classifier's name in the record.
        record_name: file name of the record in `out_dir`, without `.json`.
        class_names: names of the K classes for reports; empty for numbers.
        gallery: number of misclassified and of robust images to save as pictures in `out_dir` for a report.
        dataset: name of the data set if these are its test images, such as `cifar10`, for the best published number.
        certified_accuracy: fraction of images that a certificate proves robust, one that holds at all radii or one for
            each; the verdict is `broken` if attacks leave less.
        observer: callbacks for a live display.
        max_minutes: end after about this time with what is known: the record is not `complete`, its robust accuracy
            is an upper bound, and its verdict is never `trusted`. A batch under attack is not interrupted, so that the
            evaluation ends at most a batch later. Repeat it with `out_dir` and a larger limit, or
            none, to go on. Ctrl-C leaves such a record in `out_dir` too.

    Raises:
        InputError: invalid images, labels, radii, suite or classifier, or a folder that holds another evaluation.
    """
    group = ProcessGroup.current()
    with shared_errors():
        _check_launch(group)
        classifier = adaptive.as_classifier(check_module(classifier))
        settings = EvaluationSettings(
            suite, inputs.check_radii(eps, norm), norm, seed, batch_size, search_precision, every_attack, model_name,
            tuple(class_names),
        )  # fmt: skip
        _check_settings(settings)
        certified = inputs.check_certified(certified_accuracy, eps, settings.radii)
        check_count("gallery", gallery, least=0)
        limit = TimeLimit(_check_minutes(max_minutes), group)
        samples = inputs.gather(data, num_images, seed)
        device = device_of(classifier, samples.images)
        with _without_autocast(device), forward_passes(classifier) as passes:
            behaviour, num_classes = fingerprint(classifier, samples.images, device)
            if class_names and num_classes and len(class_names) != num_classes:
                raise InputError(f"class_names must be {num_classes}, one for each logit, found {len(class_names)}")
            others, surrogate_passes = _check_surrogates(surrogates, samples, device, num_classes)
        forward = passes() + surrogate_passes
    identity = _identity(settings, classifier, samples, behaviour, others)
    group.check_equal({name: value for name, value in identity.items() if name != "behaviour"})  # logits may round
    settings = dataclasses.replace(settings, sha256=hashlib.sha256(json.dumps(identity).encode()).hexdigest())

    path = None if out_dir is None else Path(out_dir) / f"{record_name}.json"
    ledger = Ledger()
    opened = group.run_on_main(lambda: _open(path, settings.sha256, identity, ledger, certified))
    if isinstance(opened, OtherEvaluation):
        raise opened
    if opened is not None:
        return opened
    ledger.checks.results, ledger.checks.passes = group.broadcast((ledger.checks.results, ledger.checks.passes))
    with _without_autocast(device), forward_passes(classifier) as passes:
        resume = partial(ledger.checks.resume, passes=lambda: (passes(), 0))
        input_checks = checks.input_checks(classifier, samples.images, resume)
    forward += passes()
    dtype = samples.images.dtype
    if dtype in HALF:
        classifier, samples = SinglePrecision(classifier, dtype), samples.float()
        others = {name: SinglePrecision(module, dtype) for name, module in others.items()}
    runner = AttackRunner(
        classifier, samples, device, norm, seed, min(group.gather(_batch_size(settings, samples, device))),
        num_classes, bfloat16=search_precision == "bf16",
    )  # fmt: skip
    pictures = None
    if path is not None and group.is_main:
        pictures = Gallery(gallery_folder(path), runner, settings.sha256, gallery)
    loop = EvaluationLoop(settings, runner, others, ledger, group, observer or EvaluationObserver(), pictures, limit)
    guessing = guessing_accuracy(samples.labels.tolist(), num_classes)
    about = {"dataset": dataset, "guessing": guessing, "certified_accuracy": certified}
    with evaluating(classifier), _without_autocast(device):
        try:
            record = loop.run(input_checks, forward)
        except KeyboardInterrupt:
            if group.is_main and loop.state is not None:
                limit.end_now("when it was interrupted")
                _save(loop.conclude(loop.state, runner.batch_size).model_copy(update=about), path, ledger)
            raise
    return group.run_on_main(lambda: _save(record.model_copy(update=about), path, ledger))


def _batch_size(settings: EvaluationSettings, samples: EvaluationData, device: torch.device) -> int:
    """Return the first batch size to try: the user's, the suite's, or one by device and image size."""
    if settings.batch_size != "auto":
        return settings.batch_size
    block = inputs.block_size(len(samples.images), None)
    return suites.suite(settings.suite).batch_size or inputs.auto_batch_size(samples.images, device, block)


def _check_minutes(minutes: Any) -> float | None:
    """Return the time limit in minutes, checked."""
    if minutes is None:
        return None
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 < minutes < math.inf:
        raise InputError(f"max_minutes must be a number above 0, found {minutes!r}")
    return float(minutes)


def _check_launch(group: ProcessGroup) -> None:
    """Raise an InputError if several processes were started without a process group."""
    started = LaunchEnvironment.read()
    if group.world_size == 1 < started.world_size:
        raise InputError(
            f"{started.launcher} started {started.world_size} processes without a process group: each would do "
            "the whole evaluation; call robustfpd.distributed.init_process_group() first"
        )


def _check_settings(settings: EvaluationSettings) -> None:
    if torch.is_inference_mode_enabled():
        raise InputError("evaluations cannot run inside torch.inference_mode(), which has no gradients; leave it first")
    for spec in suites.attack_specs(settings.suite, SuiteContext(settings.norm)):
        attacks.get(spec.attack).check_library(settings.norm)
    if settings.batch_size != "auto":
        check_count("batch_size", settings.batch_size)
    if settings.search_precision not in get_args(SearchPrecision):
        raise unknown_name("search_precision", settings.search_precision, get_args(SearchPrecision))
    check_count("seed", settings.seed, least=0)


def _check_surrogates(
    surrogates: Mapping[str, nn.Module] | None, samples: EvaluationData, device: torch.device, num_classes: int
) -> tuple[dict[str, nn.Module], int]:
    """Return the surrogates as classifiers, and the images sent forward to check them."""
    if not isinstance(surrogates, (Mapping, type(None))):
        raise InputError(f"surrogates must be modules by name, found {type(surrogates).__name__}")
    checked = {n: adaptive.as_classifier(check_module(m, f"surrogate {n!r}")) for n, m in (surrogates or {}).items()}
    forward = 0
    for name, surrogate in checked.items():
        with forward_passes(surrogate) as passes:
            fits = device_of(surrogate, samples.images) == device
            fits = fits and fingerprint(surrogate, samples.images, device)[1] == num_classes
        if not fits:
            raise InputError(
                f"surrogate {name!r} must lie on {device} and give {num_classes} logits like the classifier"
            )
        forward += passes()
    return checked, forward


def _identity(
    settings: EvaluationSettings, classifier: nn.Module, samples: EvaluationData, behaviour: str,
    surrogates: Mapping[str, nn.Module],
) -> dict[str, Any]:  # fmt: skip
    """Return all that decides the result: an evaluation resumes, or is read, only if all of it is equal."""
    return {
        "suite": settings.suite, "eps": [repr(e) for e in settings.radii], "norm": settings.norm,
        "seed": settings.seed, "batch_size": settings.batch_size, "search_precision": settings.search_precision,
        "every_attack": settings.every_attack, "behaviour": behaviour, "images": samples.exact_digest(),
        "weights": weights_sha256(classifier), "surrogates": {n: weights_sha256(m) for n, m in surrogates.items()},
        "packages": environment()["packages"],
    }  # fmt: skip


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """Turn off the caller's autocast: attacks differentiate the classifier in its own precision."""
    with ExitStack() as stack:
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _open(
    path: Path | None, sha256: str, identity: Mapping[str, Any], ledger: Ledger, certified: tuple[float, ...]
) -> EvaluationRecord | OtherEvaluation | None:
    """Return the finished record at `path`; without one, open the ledger. Another evaluation's files are returned."""
    try:
        record = _finished(path, sha256, identity)
        if path is not None:
            if record is not None:
                return _judge_again(record, path, certified)
            ledger.open(path.with_suffix(LEDGER), identity)
        return record
    except OtherEvaluation as other:
        return other  # raised by the caller on every rank: it may go on under another name


def _finished(path: Path | None, sha256: str, identity: Mapping[str, Any]) -> EvaluationRecord | None:
    """Return the finished record at `path`, if any; raise OtherEvaluation if its settings differ."""
    if path is None or not path.is_file() or is_unfinished(path.with_suffix(LEDGER)):
        return None
    record = EvaluationRecord.load(path)
    if record.settings_sha256 != sha256:
        found = {
            "suite": record.suite, "norm": record.norm, "eps": [repr(w.eps) for w in record.worst_case],
            "seed": record.seed, "batch_size": "auto" if record.batch_size_auto else record.batch_size,
            "search_precision": record.search_precision, "every_attack": record.every_attack,
            "weights": record.weights_sha256, "packages": record.environment.get("packages"),
        }  # fmt: skip
        differing = (f"{k}={v!r}, this one has {identity[k]!r}" for k, v in found.items() if v != identity[k])
        raise OtherEvaluation(
            f"{path} holds another evaluation ({record.model_name}, {record.num_images} images) with "
            f"{next(differing, 'other images or surrogates')}; give another out_dir or record_name"
        )
    return record


def _judge_again(record: EvaluationRecord, path: Path, certified: tuple[float, ...]) -> EvaluationRecord:
    """Compare a finished record with the records beside it now, and with the certified accuracy if one is given."""
    changed = record.model_copy(update={"certified_accuracy": certified or record.certified_accuracy})
    changed = contradictions.judged(changed, contradictions.read_beside(changed, path))
    if (changed.certified_accuracy, changed.verdict.status) != (record.certified_accuracy, record.verdict.status):
        changed.save(path)
    return changed


def _save(record: EvaluationRecord, path: Path | None, ledger: Ledger) -> EvaluationRecord:
    """Compare the record with those beside it, write it, and return it with the outcome."""
    others = [] if path is None else contradictions.read_beside(record, path)
    record = contradictions.judged(record, others)
    if path is not None and record.complete:
        record.save(path)
        ledger.finish()
    elif path is not None:
        record.save_summary(path)  # the ledger is there, and may have rows that were not read again
    return record
