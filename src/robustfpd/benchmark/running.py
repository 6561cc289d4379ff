"""Runs the parts of the benchmark, and keeps what each workload found as soon as it is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from robustfpd.benchmark import SECTIONS
from robustfpd.benchmark.machine import described
from robustfpd.benchmark.result import Benchmark, Section, Workload, read
from robustfpd.benchmark.scale import Scale
from robustfpd.benchmark.timing import Pace
from robustfpd.errors import InputError
from robustfpd.provenance import write_json


def run(
    scale: Scale, pace: Pace, device: torch.device, *, out: Path, only: Sequence[str] = SECTIONS,
    data_root: str = "data", extra: Sequence[Path] = (), observe: Callable[[str, Workload], None] = lambda *_: None,
) -> Benchmark:  # fmt: skip
    """Measure sections and write them to a file; other sections that it has are kept.

    Args:
        scale: sizes.
        pace: rounds.
        device: where everything runs.
        out: JSON file.
        only: names of sections.
        data_root: where torchvision keeps its data sets.
        extra: files whose last line is a JSON object, told under the file's name.
        observe: called after each workload.

    Raises:
        InputError: `out` is something else, or of another device; a file that holds no JSON.
    """
    found = read(out) if out.is_file() else Benchmark(device=device.type)
    if found.device != device.type:
        raise InputError(f"{out} was measured on {found.device}, not on {device.type}; give another --out")
    found = found.model_copy(update={"extra": {**found.extra, **{path.stem: last_object(path) for path in extra}}})
    settings = {**asdict(scale), **asdict(pace)}
    for name in (name for name in SECTIONS if name in only):
        section = Section(environment=described(device), settings=json.loads(json.dumps(settings)))
        for workload in _workloads(name, scale, pace, device, data_root):
            section = section.model_copy(update={"workloads": (*section.workloads, workload)})
            found = found.model_copy(update={"sections": {**found.sections, name: section}})
            write_json(out, found.model_dump(mode="json", exclude_none=True))
            observe(name, workload)
    write_json(out, found.model_dump(mode="json", exclude_none=True))
    return found


def _workloads(name: str, scale: Scale, pace: Pace, device: torch.device, data_root: str) -> Iterator[Workload]:
    """The workloads of a section, each run when it is asked for."""
    if name == "model":
        from robustfpd.benchmark.networks import model_workloads

        yield from model_workloads(scale, pace, device)
        return
    from robustfpd.benchmark.attacks import attack_workloads, victim
    from robustfpd.benchmark.scaling import scaling_workloads
    from robustfpd.benchmark.suites import suite_workload

    target = victim(scale, data_root, device, max(*scale.batches, scale.suite_images, scale.scaling_images))
    if name == "attacks":
        yield from attack_workloads(scale, pace, target)
    elif name == "suite":
        yield suite_workload(scale, pace, target)
    else:
        yield from scaling_workloads(scale, pace, target)


def last_object(path: Path) -> dict[str, Any]:
    """What a script told last."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for text in (path.read_text(encoding="utf-8"), *lines[-1:]):
        try:
            values = json.loads(text)
        except ValueError:
            continue
        if isinstance(values, dict):
            return values
    raise InputError(f"{path} ends with no JSON object; give what a script of benchmarks/ printed")
