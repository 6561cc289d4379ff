"""`robustfpd demo`: train, attack and report on real images, in minutes and offline."""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from robustfpd.cli.common import Output, program
from robustfpd.config import recipe
from robustfpd.distributed import sigterm_as_interrupt
from robustfpd.errors import InputError
from robustfpd.io import write_json

if TYPE_CHECKING:
    from robustfpd.config import RunConfig
    from robustfpd.evaluation import EvaluationProgress
    from robustfpd.training import EpochMetrics, Progress

RUNS = {
    "FPD": "fpd", "undefended baseline, same noise": "baseline", "undefended baseline, no noise": "baseline-no-noise",
}  # fmt: skip
"""The networks and their folders."""
MARKER = "demo.json"
"""The file by which the folder of an earlier demo is recognised."""
RECORD = "first-look-linf"
SECONDS = 0.25
"""Interval between two messages on a network's progress."""
TRAINING_PART = 0.7
"""Fraction of a network's progress bar that is training."""
Message = tuple[str, str, float, bool]
"""Network, text, fraction done, and whether this is a milestone."""


def demo(
    out: Path = Path("runs/demo"), seed: int = 0, epochs: int | None = None, output: Output = Output()  # noqa: B008
) -> None:  # fmt: skip
    """Train an FPD and two undefended baselines on 1,797 handwritten digits, attack them, and write a report.

    The baselines are the same backbone without the defence, trained for the same number of optimizer steps:
    one with the same noise, one without. The attacks are FGSM and PGD-40.
    The networks are trained and attacked in parallel processes, at most one per core.

    For example `robustfpd demo`, or `robustfpd demo --seed 1 --out runs/demo-1`.

    Args:
        out: folder for the three runs and the report; an earlier demo's are replaced.
        seed: seed of every random draw.
        epochs: passes over the training images; default the recipe's (digits/mini).
    """
    overrides = [f"seed={seed}"] + ([f"training.epochs={epochs}"] if epochs is not None else [])
    fpd = recipe("digits/mini", overrides)  # before torch is imported: a wrong number is reported at once
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file())):
        raise InputError(f"{out} holds something other than a demo; give another folder with --out")
    baseline = fpd.baseline()
    noiseless = baseline.model_copy(update={"training": baseline.training.model_copy(update={"noise": 0.0})})
    configs = dict(zip(RUNS, (fpd, baseline, noiseless), strict=True))
    for name in RUNS.values():
        shutil.rmtree(out / name, ignore_errors=True)
    write_json(out / MARKER, {"seed": seed})
    with sigterm_as_interrupt():
        _run_all(configs, out, seed, output)
    from robustfpd.evaluation import EvaluationRecord
    from robustfpd.report.html import write_report
    from robustfpd.report.metrics import comparison_table
    from robustfpd.report.page import comparison_sentence, report_on
    from robustfpd.report.sources import read

    folders = [out / folder for folder in RUNS.values()]
    records = [EvaluationRecord.load(folder / "evaluation" / f"{RECORD}.json") for folder in folders]
    title = "Feature Pyramid Decoder and undefended baselines on digits"
    page = write_report(out / "report.html", report_on([read(folder) for folder in folders], title=title))[0]
    output.print(comparison_table(records))
    output.print_wrapped(f"FPD: {records[0].headline}")
    output.print_wrapped(comparison_sentence(records) or "")
    output.print(f"report: {page}", "try next:")
    output.print(
        f"  {program()} train digits/mini training.noise=0.1   # another noise level",
        f"  {program()} evaluate runs/digits-mini --norm l2 --eps 0.5 1   # another norm",
        f"  {program()} train mnist/mini --data-root data --download   # a larger data set",
        f"  {program()} recipes   # all recipes",
    )
    networks = [
        {
            "folder": str(folder), "model_name": record.model_name, "clean": record.clean_accuracy,
            "worst_case": [{"eps": w.eps, "accuracy": w.robust.value} for w in record.worst_case],
            "robustness": record.robustness.model_dump(mode="json"), "verdict": record.verdict.status,
        }
        for folder, record in zip(folders, records, strict=True)
    ]  # fmt: skip
    output.print_result({"seed": seed, "report": str(page), "networks": networks})


def _run_all(configs: dict[str, RunConfig], out: Path, seed: int, output: Output) -> None:
    """Train and attack the networks in parallel processes, with one display.

    Raises:
        InputError: a network could not be trained, or its process was killed.
    """
    from robustfpd.cli.display import networks_display

    context = multiprocessing.get_context("spawn")  # forked processes would share torch's threads
    messages: multiprocessing.Queue[Message] = context.Queue()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(configs), cores)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(messages,))
    with networks_display(output.console, list(configs)) as show, pool:
        try:
            with _interrupts_ignored():  # by the processes that start here: the parent terminates them
                futures = [
                    pool.submit(_train_and_attack, name, config, out / RUNS[name], seed)
                    for name, config in configs.items()
                ]
            _follow(futures, messages, show)
        except BrokenProcessPool:
            raise InputError(
                "a process that trained a network was killed (out of memory?); free memory and start the demo again"
            ) from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _follow(
    futures: list[Future[None]], messages: multiprocessing.Queue[Message], show: Callable[[str, str, float, bool], None]
) -> None:
    """Show the messages of the processes until all have ended; raise the first error."""
    left = set(futures)
    while left:
        done, left = wait(left, timeout=SECONDS / 2)
        with suppress(queue.Empty):
            while True:
                show(*messages.get_nowait())
        for future in done:
            future.result()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore SIGINT, in this process and in those that start meanwhile, which go on ignoring it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


_messages: multiprocessing.Queue[Message] | None = None
"""Where a worker process sends its progress."""


def _start_worker(messages: multiprocessing.Queue[Message]) -> None:
    import torch

    global _messages
    _messages = messages
    torch.set_num_threads(1)  # 8×8 images are too small to be shared by threads


def _train_and_attack(name: str, config: RunConfig, folder: Path, seed: int) -> None:
    """Train one network into its run folder and evaluate it there."""
    from robustfpd import data, evaluation, training

    assert _messages is not None
    messages, sent = _messages, 0.0

    def send(text: str, done: float, *, milestone: bool = False) -> None:
        nonlocal sent
        if milestone or time.monotonic() - sent > SECONDS:
            sent = time.monotonic()
            messages.put((name, text, done, milestone))

    def on_batch(progress: Progress) -> None:
        done = (progress.epoch + progress.batch / progress.batches) / progress.epochs
        send(f"training, epoch {progress.epoch + 1} of {progress.epochs}", TRAINING_PART * done)

    def on_epoch(metrics: EpochMetrics, best: bool) -> None:
        if metrics.epoch + 1 == config.training.epochs:
            accuracy = f"{100 * metrics.validation_accuracy:.1f} %"
            send(f"trained, validation accuracy {accuracy}", TRAINING_PART, milestone=True)

    def on_attack(progress: EvaluationProgress) -> None:
        done = TRAINING_PART + (1 - TRAINING_PART) * (progress.number - 1) / progress.total
        send(f"{progress.attack} at eps {progress.eps:.4g}", done)

    # 8×8 images gain nothing from bfloat16, and the README's figures are of fp32.
    observer = training.Observer(on_batch=on_batch, on_epoch=on_epoch)
    model = training.train(config, folder, device="cpu", precision="fp32", observer=observer).model
    splits = data.load(config.data)
    record = evaluation.evaluate(
        model.classifier(), splits.test.floats(), suite="first-look", eps=config.evaluation.eps, norm="linf",
        num_images=config.evaluation.num_images, seed=seed,
        every_attack=True, model_name=name, class_names=splits.info.class_names, out_dir=folder / "evaluation",
        record_name=RECORD, observer=evaluation.EvaluationObserver(on_attack=on_attack),
    )  # fmt: skip
    worst = record.worst_case[-1]
    send(f"robust accuracy {100 * worst.robust.value:.1f} % at eps {worst.eps:g}", 1.0, milestone=True)
