"""The page of the documentation, made of benchmarks' files alone: the same files give the same page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from robustfpd.benchmark import SECTIONS
from robustfpd.benchmark.result import Benchmark, Entry, Measure, Section, Spread, Workload

HEAD = """\
<!-- made by robustfpd benchmark --document; edit src/robustfpd/benchmark/document.py instead -->
# Benchmarks

What FPD costs beside its plain backbone, and what our attacks cost beside other libraries'. `make bench` measures it
and makes this page; `robustfpd benchmark --only attacks` measures a part.

Contenders of a workload run in one process and take turns, round by round, in an order that rotates, after a warm-up. A
ratio is taken within each round; tables show its median and quartiles over the rounds, and a bar is held against the
median. Absolute times say more of the machine than of the code, and are kept in the JSON only (`results/benchmark`).
"""

ABOUT = {
    "model": (
        "FPD against its undefended baseline",
        "The same backbone without the defence, on the same random batch. Inference is `model.classifier()` in "
        "inference mode. A training step is that of real training: forward, backward, clipping, Adam; the gate is "
        "open, so that both phases run. fp32 is compared with the same step under bfloat16 autocast. The share of the "
        "matmul peak is the step's operations per second over those of one large product of matrices, which takes "
        "turns with it. Peak memory is of three steps in a process of its own, above a process without the network: "
        "weights, gradients, moments, activations.",
    ),
    "attacks": (
        "Gradient attacks",
        "Everybody attacks the same images of the same frozen network from one random start, with the same steps, "
        "radius and loss; nobody stops early in PGD. Times are over `bare passes`: as many forward and backward passes "
        "to the input as our PGD makes, and nothing else (for APGD, a pass of every image at its start and at every "
        "step). Beside each time stands the accuracy that is left, so that nobody wins by attacking less, and the "
        "passes forward and backward per image.",
    ),
    "suite": (
        "A whole suite",
        "`rf.evaluate(suite=…)`, checks included, against FGSM and PGD-20 of foolbox and the members of AutoAttack "
        "(pyautoattack), each on every image. Ours attacks an image until it falls, and spares what is far from "
        "falling.",
    ),
    "scaling": (
        "Scaling",
        "An evaluation of N images, and of the same images four times over. The import is that of `robustfpd` alone in "
        "a new interpreter.",
    ),
}


def page(benchmarks: Sequence[Benchmark]) -> str:
    """Markdown of the whole page.

    Args:
        benchmarks: one for each kind of device.
    """
    parts = [HEAD]
    for found in benchmarks:
        parts.append(f"## On {'a GPU' if found.device == 'cuda' else found.device.upper()}\n")
        parts += [
            _section(name, section)
            for name in SECTIONS
            if (section := found.sections.get(name)) is not None and section.workloads
        ]
        parts += _extra(found)
    return "\n".join(parts)


def tables(section: Section) -> str:
    """The tables of a section."""
    parts = [_measures(section.workloads)]
    parts += [_entries(group) for group in _groups(section.workloads) if any(_telling(w) for w in group)]
    return "\n".join(part for part in parts if part)


def _section(name: str, section: Section) -> str:
    title, about = ABOUT[name]
    notes = dict.fromkeys(
        f"- {w.group}: {note}\n" for w in section.workloads for note in w.notes if w.variant != "peak memory"
    )
    return f"### {title}\n\n{about}\n\n{_where(section)}\n\n{tables(section)}\n{''.join(notes)}"


def _where(section: Section) -> str:
    """The machine, in a sentence."""
    at = section.environment
    packages = {k: v for k, v in at.get("packages", {}).items() if k in ("torch", "foolbox", "pyautoattack") and v}
    art = at.get("packages", {}).get("adversarial-robustness-toolbox")
    versions = ", ".join(f"{name} {version}" for name, version in {**packages, **({"ART": art} if art else {})}.items())
    smoke = "**A smoke run, whose sizes are too small for its numbers to mean anything.** "
    precision = "with" if at.get("bfloat16") else "without"
    return (smoke if section.settings.get("smoke") else "") + (
        f"{at.get('processor')}, {at.get('threads')} threads, {precision} bfloat16 instructions; {versions}; "
        f"at most {section.settings.get('rounds')} rounds, fewer after {section.settings.get('limit'):g} s."
    )


def _measures(workloads: Sequence[Workload]) -> str:
    """What was asked for, one line each."""
    lines = [
        f"| {w.group}{f', {w.variant}' if w.variant else ''} | {m.what} | {_value(m)} | {m.value.count} | {_bar(m)} |"
        f" {verdict(m)} |"
        for w in workloads
        for m in w.measures
    ]
    if not lines:
        return ""
    head = ["| workload | measure | median [quartiles] | rounds | bar | |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) + "\n"


def verdict(measure: Measure) -> str:
    """Whether the bar was reached, and if not by how much it was missed."""
    if measure.bar is None:
        return ""
    missed = measure.bar.missed_by(measure.value.median)
    if not missed:
        return "reached"
    return f"missed by {100 * missed:.1f} points" if measure.unit == "points" else f"missed by {_percent(missed)}"


def _percent(share: float) -> str:
    return "less than 1 %" if share < 0.01 else f"{100 * share:.0f} %"


def _bar(measure: Measure) -> str:
    bar, unit = measure.bar, measure.unit
    if bar is None:
        return ""
    if bar.at_least is not None and bar.at_most is not None:
        return f"{_number(bar.at_least, unit)} to {_number(bar.at_most, unit)}"
    return f"≥ {_number(bar.at_least, unit)}" if bar.at_least is not None else f"≤ {_number(bar.at_most, unit)}"


def _value(measure: Measure) -> str:
    return _spread(measure.value, measure.unit)


def _spread(value: Spread, unit: str = "×") -> str:
    """Median and quartiles; of one round only the value."""
    middle = _number(value.median, unit)
    if value.count < 2:
        return middle
    return f"{middle} [{_number(value.low, unit)}, {_number(value.high, unit)}]"


def _number(value: float | None, unit: str) -> str:
    assert value is not None
    shown = {"×": f"{value:.2f}", "%": f"{100 * value:.0f} %", "s": f"{value:.2f} s", "points": f"{100 * value:+.1f}"}
    return shown[unit] if value or unit != "points" else "0"


def _groups(workloads: Sequence[Workload]) -> Iterator[list[Workload]]:
    """Workloads that share a table, in order."""
    for group in dict.fromkeys(w.group for w in workloads):
        yield [w for w in workloads if w.group == group]


def _telling(workload: Workload) -> bool:
    """Whether its contenders tell more than its measures do."""
    return any(entry.accuracy is not None or entry.missing for entry in workload.entries)


def _entries(group: Sequence[Workload]) -> str:
    """Contenders down, variants across."""
    names = list(dict.fromkeys(entry.name for w in group for entry in w.entries))
    # What has no time comes last, and says why.
    names.sort(key=lambda name: all(entry.missing for w in group for entry in w.entries if entry.name == name))
    heads = [w.variant or "found" for w in group]
    lines = [f"| {' | '.join(['contender', *heads])} |", "|---" * (1 + len(heads)) + "|"]
    for name in names:
        cells = [_cell(next((e for e in w.entries if e.name == name), None)) for w in group]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return (
        f"\n**{group[0].group}** (time over that of: {group[0].reference or 'nobody'}; accuracy left; passes)\n\n"
        + ("\n".join(lines) + "\n")
    )


def _cell(entry: Entry | None) -> str:
    if entry is None or entry.missing:
        return "" if entry is None else entry.missing
    parts = [_spread(entry.ratio)] if entry.ratio is not None else []
    parts += [f"{100 * entry.accuracy:.1f} %"] if entry.accuracy is not None else []
    passes = [f"{count:,.5g}" for count in (entry.forward, entry.backward) if count is not None]
    return "; ".join([*parts, *([" + ".join(passes)] if passes else [])])


def _extra(found: Benchmark) -> list[str]:
    """What other scripts told; measures among it as ours."""
    parts = []
    for name, values in sorted(found.extra.items()):
        measures = [Measure.model_validate(m) for m in values.get("measures", ())]
        plain = {key: value for key, value in values.items() if key != "measures"}
        parts.append(
            f"### {values.get('title', name.replace('_', ' ').capitalize())}\n\nFrom `benchmarks/{name}.py`.\n"
        )
        parts += [_measures([Workload(group=name, measures=tuple(measures))])] if measures else []
        rows = [f"| {key} | {_plain(value)} |" for key, value in plain.items() if key != "title"]
        parts.append("\n".join(["| | |", "|---|---|", *rows]) + "\n" if rows else "")
    return parts


def _plain(value: Any) -> str:
    """A value of somebody else's, in a cell."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value).replace("|", "\\|")
