"""Measures the cost of FPD and of the attacks, as ratios with their bars, and writes JSON and docs/benchmarks.md.

    python -m benchmarks --smoke
    python -m benchmarks --only model,attacks --out results/benchmark/cpu.json --rounds 5
    python -m benchmarks --read results/benchmark/*.json --document docs/benchmarks.md

Everything takes about an hour on two cores. Libraries that are not installed are listed as missing.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.attacks import attack_workloads, attacked_network
from benchmarks.model_cost import model_workloads
from benchmarks.page import SECTIONS, page, tables
from benchmarks.results import Benchmark, Section, Workload
from benchmarks.results import read as read_benchmark
from benchmarks.scaling import scaling_workloads
from benchmarks.sizes import FULL, SMOKE, BenchmarkSizes
from benchmarks.suites import suite_workload
from benchmarks.timing import RoundLimits
from robustfpd.device import supports_bf16
from robustfpd.errors import InputError, unknown_name
from robustfpd.io import write_json
from robustfpd.provenance import environment


def main(
    only: str = ",".join(SECTIONS),
    out: Path = Path("runs/benchmark.json"),
    read: tuple[Path, ...] = (),
    document: Path | None = None,
    rounds: int = 9,
    limit: float = 60.0,
    suite_images: int | None = None,
    smoke: bool = False,
    data_root: str = "data",
    device: str = "auto",
) -> None:
    """Measure, print tables, write JSON and the page.

    Args:
        only: sections separated by commas: model, attacks, suite, scaling. Other sections of the file are kept.
        out: file to write, or a folder, in which it is called DEVICE.json.
        read: read these files instead of measuring.
        document: write the page to this file.
        rounds: maximal number of rounds, at least 3.
        limit: seconds after which a workload starts no further round; three are always run (of the suite, one).
        suite_images: number of images that the suite attacks; default 200.
        smoke: use tiny networks and few images and steps, to see that everything runs.
        data_root: folder with torchvision's MNIST; without it, digits are attacked.
        device: auto, cpu, cuda or mps.

    Raises:
        InputError: unknown section, too few rounds, or a file that is not a benchmark of this device.
    """
    sections = only.split(",")
    unknown = next((name for name in sections if name not in SECTIONS), None)
    if unknown is not None:
        raise unknown_name("section", unknown, SECTIONS)
    if rounds < 3 or limit < 0 or (suite_images is not None and suite_images < 1):
        raise InputError(
            f"--rounds must be at least 3, --limit not negative and --suite-images at least 1, "
            f"found {rounds}, {limit:g} and {suite_images}"
        )
    if read:
        benchmarks = [read_benchmark(path) for path in read]
    else:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        sizes = SMOKE if smoke else FULL
        sizes = sizes if suite_images is None else replace(sizes, suite_images=suite_images)
        path = out if out.suffix else out / f"{place.type}.json"
        benchmarks = [measure(sizes, RoundLimits(rounds, limit), place, path, sections, data_root)]
    for benchmark in benchmarks:
        print(*(tables(benchmark.sections[name]) for name in sections if name in benchmark.sections), sep="\n")
    if document is not None:
        document.parent.mkdir(parents=True, exist_ok=True)
        document.write_text(page(benchmarks), encoding="utf-8")
        print(f"wrote {document}")


def measure(
    sizes: BenchmarkSizes, limits: RoundLimits, device: torch.device, out: Path, only: Sequence[str], data_root: str
) -> Benchmark:
    """Measure sections and write them to `out` after each workload; other sections of the file are kept.

    Raises:
        InputError: `out` is not a benchmark file, or one of another device.
    """
    benchmark = read_benchmark(out) if out.is_file() else Benchmark(device=device.type)
    if benchmark.device != device.type:
        raise InputError(f"{out} was measured on {benchmark.device}, not on {device.type}; give another --out")
    settings = json.loads(json.dumps({**asdict(sizes), **asdict(limits)}))
    for name in (name for name in SECTIONS if name in only):
        section = Section(environment=machine(device), settings=settings)
        for workload in _workloads(name, sizes, limits, device, data_root):
            section = section.model_copy(update={"workloads": (*section.workloads, workload)})
            benchmark = benchmark.model_copy(update={"sections": {**benchmark.sections, name: section}})
            write_json(out, benchmark.model_dump(mode="json", exclude_none=True))
            print(f"{name}: {workload.group}{f', {workload.variant}' if workload.variant else ''}", flush=True)
    return benchmark


def _workloads(
    name: str, sizes: BenchmarkSizes, limits: RoundLimits, device: torch.device, data_root: str
) -> Iterator[Workload]:
    """Yield the workloads of a section; each runs when it is requested."""
    if name == "model":
        yield from model_workloads(sizes, limits, device)
        return
    images = max(*sizes.batches, sizes.suite_images, sizes.scaling_images)
    network = attacked_network(sizes, data_root, device, images)
    if name == "attacks":
        yield from attack_workloads(sizes, limits, network)
    elif name == "suite":
        yield suite_workload(sizes, limits, network)
    else:
        yield from scaling_workloads(sizes, limits, network)


def machine(device: torch.device) -> dict[str, Any]:
    """Return versions, revision, processor, number of cores, and whether the device multiplies in bfloat16."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        **environment(device), "processor": processor, "cores": os.cpu_count(), "bfloat16": supports_bf16(device),
    }  # fmt: skip


def _processor() -> str:
    """Return the processor's name from Linux's list, or as Python knows it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
