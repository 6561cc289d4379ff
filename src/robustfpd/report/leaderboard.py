"""The leaderboard: entries in `results/leaderboard/NAME`, each a description and an evaluation record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from robustfpd.config import Config, DataConfig, load_run, parse
from robustfpd.errors import InputError
from robustfpd.evaluation import EvaluationRecord, WorstCase
from robustfpd.evaluation.robustness import NORM_NAMES, format_eps
from robustfpd.models import zoo

DESCRIPTION = "entry.yaml"
RECORD = "record.json"
SUITES = ("standard", "full", "autoattack", "autoattack-plus")
"""Suites of which records are accepted."""


class Description(Config):
    """What an entry is: `entry.yaml`."""

    title: str
    """The network's name, one line."""
    model: str
    """What to evaluate: a name of the zoo, a reference network of `benchmarks/reference_networks.py`, or
    `module:function` for a function that returns the classifier with its weights, in a module beside this file."""
    training: str
    """How it was trained, in a few words."""
    defence: str = "none"
    """`fpd`, `none`, or another defence in a few words."""
    dataset: str
    """Data set, as the table shows it."""
    images: str
    """The images that the evaluation draws from."""
    data: DataConfig
    """Settings that load them, without `root`."""
    source: str
    """Address or citation of the network."""
    licence: str
    """Licence of the weights."""


@dataclass(frozen=True)
class Entry:
    """A network of the leaderboard."""

    name: str
    description: Description
    record: EvaluationRecord


def read_entries(folder: Path) -> list[Entry]:
    """Read all entries of a folder.

    Raises:
        InputError: an entry lacks a file, has an unknown field, or is not accepted (see `refusal`).
    """
    entries = []
    for home in sorted(path for path in folder.iterdir() if path.is_dir()):
        missing = [name for name in (DESCRIPTION, RECORD) if not (home / name).is_file()]
        if missing:
            raise InputError(f"{home} lacks {missing[0]}; an entry is {DESCRIPTION} and {RECORD}, see CONTRIBUTING.md")
        values: Any = yaml.safe_load((home / DESCRIPTION).read_text(encoding="utf-8"))
        entry = Entry(
            home.name, parse(Description, values, str(home / DESCRIPTION)), EvaluationRecord.load(home / RECORD)
        )
        reason = refusal(entry)
        if reason is not None:
            raise InputError(f"{home / RECORD} is not accepted: {reason}")
        entries.append(entry)
    return entries


def zoo_entries(folder: Path) -> list[Entry]:
    """Return the zoo's networks in a `models/` folder, with those of their records that are accepted."""
    entries = []
    for name, model in zoo.manifest().models.items():
        images = model.images or "the test images"
        description = Description(
            title=f"`{name}`", model=name, training=model.training, defence=model.defence, dataset=name.split("/")[0],
            images=images, data=load_run(folder / name / zoo.SETTINGS).data, source="robustfpd", licence="MIT",
        )  # fmt: skip
        for path in model.results:
            entry = Entry(name, description, EvaluationRecord.load(folder / path))
            if refusal(entry) is None:
                entries.append(entry)
    return entries


def refusal(entry: Entry) -> str | None:
    """Return why a record is not accepted, or None."""
    record = entry.record
    if record.verdict.status != "trusted":
        return f"its verdict is {record.verdict.status}, not trusted: {'; '.join(record.verdict.reasons)}"
    if record.suite not in SUITES:
        return f"its suite is {record.suite}; use one of {', '.join(SUITES)}"
    if not record.under_attack:
        return "it has no radius above 0"
    return None


def differences(committed: EvaluationRecord, fresh: EvaluationRecord) -> list[str]:
    """Return the differences between a committed record and a fresh evaluation; empty if the record is reproduced.

    Both must be of the same images. The fresh accuracies must lie in the committed 95 % intervals over the images.
    """
    found = []
    if committed.data_sha256 != fresh.data_sha256:
        found.append("it evaluates other images: the hash of the images differs")
    if fresh.verdict.status != "trusted":
        found.append(f"the verdict is now {fresh.verdict.status}: {'; '.join(fresh.verdict.reasons)}")
    accuracies = [("clean", committed.clean, fresh.clean)]
    again = {worst.eps: worst.robust for worst in fresh.worst_case}
    for worst in committed.worst_case:
        if worst.eps not in again:
            found.append(f"eps {format_eps(worst.eps)} is not evaluated")
        else:
            accuracies.append((f"robust at eps {format_eps(worst.eps)}", worst.robust, again[worst.eps]))
    for label, old, new in accuracies:
        if not old.low <= new.value <= old.high:
            found.append(f"{label}: {old} in the record, {new} now")
    return found


def leaderboard(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the lines of the page: a table for each data set, norm and radius, most robust network first."""
    groups: dict[tuple[str, str, str], list[tuple[WorstCase, Entry]]] = {}
    for entry in entries:
        for worst in entry.record.under_attack:
            key = entry.description.dataset, entry.record.norm, format_eps(worst.eps)
            groups.setdefault(key, []).append((worst, entry))
    for (dataset, norm, eps), members in sorted(groups.items(), key=lambda group: (group[0][:2], group[1][0][0].eps)):
        yield from ("", f"## {dataset}, {NORM_NAMES[norm]}, eps {eps}", "")
        yield "| network | training | defence | clean, % | robust, % | images | suite | source |"
        yield "|" + "---|" * 8
        for worst, entry in sorted(members, key=lambda member: (-member[0].robust.value, member[1].name)):
            about, record = entry.description, entry.record
            clean, robust = (str(a).replace(" %", "") for a in (record.clean, worst.robust))
            images = f"{record.num_images:,} of {about.images}"
            yield (
                f"| {about.title} | {about.training} | {about.defence} | {clean} | {robust} | {images} | "
                f"`{record.suite}` | {about.source} |"
            )
