"""`robustfpd benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from robustfpd.errors import InputError

if TYPE_CHECKING:
    from robustfpd.benchmark.result import Benchmark, Workload
    from robustfpd.cli.output import Output

OUT = Path("runs/benchmark.json")


def benchmark(
    only: str = "model,attacks,suite,scaling",
    out: Path = OUT,
    document: Path | None = None,
    read: tuple[Path, ...] = (),
    extra: tuple[Path, ...] = (),
    repeats: int = 9,
    limit: float = 60.0,
    suite_images: int | None = None,
    smoke: bool = False,
    data_root: str = "data",
    device: str = "auto",
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Measure what FPD costs beside its plain backbone, and attacks beside other libraries'.

    For example `robustfpd benchmark --smoke`,
    or `robustfpd benchmark --only model,attacks --out results/benchmark/cpu.json --repeats 5`.

    Contenders take turns in one process; tables show ratios, and whether they reach what they should. All of it takes
    about an hour on two cores. Libraries that are not installed are named.

    To make a page of what was measured: `robustfpd benchmark --read FILE --document PAGE`.

    Args:
        only: parts, with commas between: model, attacks, suite, scaling. Others that the file has are kept.
        out: file to write; of a folder, cpu.json or cuda.json in it.
        document: write what was found as a page of Markdown, too.
        read: measure nothing; read these files.
        extra: output of scripts in benchmarks/, JSON in its last line, to show with the rest.
        repeats: rounds, at least 3.
        limit: seconds after which a workload begins no further round; three are always run (of the suite, one).
        suite_images: images that the suite attacks; default 200.
        smoke: tiny networks, few images and steps: to see that everything runs.
        data_root: where torchvision keeps MNIST; without it, digits are attacked.
        device: auto, cpu, cuda or mps.
        json: write one JSON object.
        quiet: say nothing.
    """
    from robustfpd.benchmark import SECTIONS
    from robustfpd.cli.common import check_device, known
    from robustfpd.cli.output import Output

    sections = [known("part of the benchmark", name, SECTIONS) for name in only.split(",")]
    check_device(device)
    if repeats < 3 or limit < 0 or (suite_images is not None and suite_images < 1):
        raise InputError(
            f"--repeats must be at least 3, --limit not negative and --suite-images at least 1, "
            f"found {repeats}, {limit:g} and {suite_images}"
        )
    for path in (*read, *extra):
        if not path.is_file():
            raise InputError(f"no file {path}")
    output = Output(json=json, quiet=quiet)
    if read:
        found = _read(read, extra, output)
    else:
        found = [_measured(sections, out, extra, repeats, limit, suite_images, smoke, data_root, device, output)]
    if document is not None:
        from robustfpd.benchmark.document import page

        document.parent.mkdir(parents=True, exist_ok=True)
        document.write_text(page(found), encoding="utf-8")
        output.say(f"wrote {document}")
    output.result({"benchmarks": [each.model_dump(mode="json", exclude_none=True) for each in found]})


def _read(paths: tuple[Path, ...], extra: tuple[Path, ...], output: Output) -> list[Benchmark]:
    from robustfpd.benchmark.document import tables
    from robustfpd.benchmark.result import read

    found = [read(path) for path in paths]
    if extra:
        from robustfpd.benchmark.running import last_object

        told = {path.stem: last_object(path) for path in extra}
        found[0] = found[0].model_copy(update={"extra": {**found[0].extra, **told}})
    for each in found:
        output.say(*(tables(section) for section in each.sections.values()))
    return found


def _measured(
    sections: list[str], out: Path, extra: tuple[Path, ...], repeats: int, limit: float, suite_images: int | None,
    smoke: bool, data_root: str, device: str, output: Output,
) -> Benchmark:  # fmt: skip
    from dataclasses import replace

    from robustfpd.benchmark.document import tables
    from robustfpd.benchmark.running import run
    from robustfpd.benchmark.scale import FULL, SMOKE
    from robustfpd.benchmark.timing import Pace
    from robustfpd.cli.common import torch_device

    place = torch_device(device)
    scale = SMOKE if smoke else FULL
    if suite_images is not None:
        scale = replace(scale, suite_images=suite_images)
    path = out if out.suffix else out / f"{place.type}.json"

    def observe(name: str, workload: Workload) -> None:
        variant = f", {workload.variant}" if workload.variant else ""
        output.say(f"{name}: {workload.group}{variant}")

    found = run(
        scale, Pace(repeats, limit), place, out=path, only=sections, data_root=data_root, extra=extra, observe=observe
    )
    output.say(*(tables(found.sections[name]) for name in sections), f"wrote {path}")
    return found
