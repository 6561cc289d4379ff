"""docs/benchmarks.md, made from the JSON files alone: the same files give the same page."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.results import Benchmark, ImplementationResult, Measure, Quartiles, Section, Workload

HEAD = """\
<!-- made by `make bench`; edit benchmarks/page.py instead -->
# Benchmarks

Cost of the FPD relative to its undefended baseline, and of our attacks relative to other libraries'. `make bench`
runs the benchmarks and writes this page; `python -m benchmarks --only attacks` runs a part of them.

After a warm-up, the implementations of a workload run alternately in one process, in rotating order. Ratios are
computed within each round; tables show their median and quartiles over the rounds, and a bar applies to the median.
Absolute times depend on the machine and are stored in the JSON only (`results/benchmark`).
"""

SECTIONS = {
    "model": (
        "FPD relative to its undefended baseline",
        "The baseline is the same backbone without the defence, on the same random batch. Inference is "
        "`model.classifier()` in inference mode. A training step consists of forward, backward, gradient clipping "
        "and Adam; the gate is open, so that both phases run. fp32 is compared with the same step under bfloat16 "
        "autocast. The fraction of the matmul peak is the step's operations per second divided by those of one "
        "large matrix product, measured in alternation with it. Peak memory is measured over three steps in a "
        "separate process, relative to a process without the network: weights, gradients, optimizer state, "
        "activations.",
    ),
    "attacks": (
        "Gradient attacks",
        "All implementations attack the same images and the same frozen network from one random start, with the "
        "same steps, radius and loss; no PGD stops early. Times are relative to `bare passes`: the forward and "
        "backward passes of our PGD alone (for APGD, a pass of every image at its start and at every step). Each "
        "cell also shows the robust accuracy, because a faster attack may be weaker, and the forward and backward "
        "passes per image.",
    ),
    "suite": (
        "A whole suite",
        "`rf.evaluate(suite=…)`, checks included, compared with FGSM and PGD-20 of foolbox and the members of "
        "AutoAttack (pyautoattack), each on every image. robustfpd attacks an image until it is misclassified, and "
        "skips images that are far from the decision boundary.",
    ),
    "scaling": (
        "Scaling",
        "An evaluation of N images, and of the same images repeated four times. The import time is that of "
        "`robustfpd` alone in a new interpreter.",
    ),
}
"""Parts of the benchmark in the order in which they run: title and description."""


def page(benchmarks: Sequence[Benchmark]) -> str:
    """Return the page as Markdown.

    Args:
        benchmarks: one for each type of device.
    """
    parts = [HEAD]
    for benchmark in benchmarks:
        parts.append(f"## On {'a GPU' if benchmark.device == 'cuda' else benchmark.device.upper()}\n")
        parts += [_section(name, benchmark.sections[name]) for name in SECTIONS if name in benchmark.sections]
    return "\n".join(parts)


def tables(section: Section) -> str:
    """Return the tables of a section: measures with their bars, then implementations by workload."""
    groups = [[w for w in section.workloads if w.group == g] for g in dict.fromkeys(w.group for w in section.workloads)]
    parts = [_measure_table(section.workloads)]
    parts += [_implementation_table(workloads) for workloads in groups if any(map(_needs_table, workloads))]
    return "\n".join(part for part in parts if part)


def _section(name: str, section: Section) -> str:
    title, about = SECTIONS[name]
    notes = dict.fromkeys(
        f"- {w.group}: {note}\n" for w in section.workloads for note in w.notes if w.variant != "peak memory"
    )
    return f"### {title}\n\n{about}\n\n{_environment(section)}\n\n{tables(section)}\n{''.join(notes)}"


def _environment(section: Section) -> str:
    env, rounds, limit = section.environment, section.settings.get("rounds"), section.settings.get("limit")
    labels = {
        "torch": "torch",
        "pyautoattack": "pyautoattack",
        "foolbox": "foolbox",
        "adversarial-robustness-toolbox": "ART",
    }
    packages = env.get("packages", {})
    versions = ", ".join(f"{label} {packages[name]}" for name, label in labels.items() if packages.get(name))
    smoke = "**A smoke run, whose sizes are too small for its numbers to mean anything.** "
    return (smoke if section.settings.get("smoke") else "") + (
        f"{env.get('processor')}, {env.get('threads')} threads, {'with' if env.get('bfloat16') else 'without'} "
        f"bfloat16 instructions; {versions}; at most {rounds} rounds, fewer after {limit:g} s."
    )


def _measure_table(workloads: Sequence[Workload]) -> str:
    lines = [
        f"| {w.group}{f', {w.variant}' if w.variant else ''} | {m.what} | {_quartiles(m.value, m.unit)} | "
        f"{m.value.count} | {_bar(m)} | {bar_result(m)} |"
        for w in workloads
        for m in w.measures
    ]
    head = ["| workload | measure | median [quartiles] | rounds | bar | |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) + "\n" if lines else ""


def bar_result(measure: Measure) -> str:
    """Return whether the bar was reached, and if not by how much it was missed."""
    if measure.bar is None:
        return ""
    missed = measure.bar.missed_by(measure.value.median)
    if not missed:
        return "reached"
    if measure.unit == "points":
        return f"missed by {100 * missed:.1f} points"
    return "missed by less than 1 %" if missed < 0.01 else f"missed by {100 * missed:.0f} %"


def _bar(measure: Measure) -> str:
    bar, unit = measure.bar, measure.unit
    if bar is None:
        return ""
    if bar.at_least is not None and bar.at_most is not None:
        return f"{_number(bar.at_least, unit)} to {_number(bar.at_most, unit)}"
    return f"≥ {_number(bar.at_least, unit)}" if bar.at_least is not None else f"≤ {_number(bar.at_most, unit)}"


def _quartiles(value: Quartiles, unit: str = "×") -> str:
    """Median and quartiles; of one round only the value."""
    median = _number(value.median, unit)
    return median if value.count < 2 else f"{median} [{_number(value.low, unit)}, {_number(value.high, unit)}]"


def _number(value: float | None, unit: str) -> str:
    assert value is not None
    texts = {"×": f"{value:.2f}", "%": f"{100 * value:.0f} %", "s": f"{value:.2f} s", "points": f"{100 * value:+.1f}"}
    return texts[unit] if value or unit != "points" else "0"


def _needs_table(workload: Workload) -> bool:
    """Whether implementations have more to show than the measures do."""
    return any(entry.accuracy is not None or entry.missing for entry in workload.entries)


def _implementation_table(workloads: Sequence[Workload]) -> str:
    """Implementations by row, variants by column."""
    names = list(dict.fromkeys(entry.name for w in workloads for entry in w.entries))
    names.sort(key=lambda name: all(entry.missing for w in workloads for entry in w.entries if entry.name == name))
    heads = ["implementation", *(w.variant or "result" for w in workloads)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in names:
        cells = [_cell(next((e for e in w.entries if e.name == name), None)) for w in workloads]
        lines.append(f"| {' | '.join([name, *cells])} |")
    first = workloads[0]
    relative = f"time relative to {first.reference}; " if first.reference else ""
    return f"\n**{first.group}** ({relative}robust accuracy; passes)\n\n" + "\n".join(lines) + "\n"


def _cell(entry: ImplementationResult | None) -> str:
    if entry is None or entry.missing:
        return "" if entry is None else entry.missing
    parts = [_quartiles(entry.ratio)] if entry.ratio is not None else []
    parts += [f"{100 * entry.accuracy:.1f} %"] if entry.accuracy is not None else []
    passes = [f"{count:,.5g}" for count in (entry.forward, entry.backward) if count is not None]
    return "; ".join([*parts, *([" + ".join(passes)] if passes else [])])
