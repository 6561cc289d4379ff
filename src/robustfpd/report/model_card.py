"""A trained network's card: what it is, how it was made, what was measured, what that does not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustfpd.config import RunConfig
from robustfpd.errors import unknown_name
from robustfpd.evaluation import EvaluationRecord
from robustfpd.models import FPD, Baseline
from robustfpd.report.commands import evaluation_command, training_command

LICENCES = {
    "mnist": "MNIST, Yann LeCun and Corinna Cortes, CC BY-SA 3.0",
    "digits": "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, "
    "CC BY 4.0",
    "fashion_mnist": "Fashion-MNIST, Zalando SE, MIT",
}
"""Data sets with their authors and licences."""


@dataclass(frozen=True)
class StageCost:
    """What one stage of training took."""

    stage: str
    epochs: int
    seconds: float
    """Of the epochs, without validation."""
    environment: Mapping[str, Any]
    """As the run noted it."""


@dataclass(frozen=True)
class Card:
    """A card's facts."""

    name: str
    description: str
    config: RunConfig
    model: FPD | Baseline
    weights_bytes: int
    weights_sha256: str
    """Of the file."""
    costs: Sequence[StageCost]
    records: Mapping[str, EvaluationRecord]
    """By the name of their file, without its suffix."""
    ledgers: frozenset[str]
    """Names of records with one row per attacked image beside them."""

    def markdown(self) -> str:
        """The card; a data set whose licence is not known is an InputError."""
        if self.config.data.dataset not in LICENCES:
            raise unknown_name("data set with a known licence", self.config.data.dataset, LICENCES)
        parts = [
            f"# {self.name}\n\n{self.description}", _facts(self), _results(self), _loading(self), _making(self),
            _limits(self), _versions(self), _licence(self),
        ]  # fmt: skip
        return "\n\n".join(parts) + "\n"


def training_in_words(config: RunConfig) -> str:
    """A run's stage in a few words."""
    if config.stage == "adversarial":
        settings = config.adversarial
        return f"adversarial, {'eps' if settings.norm == 'linf' else settings.norm} {settings.eps:.3g}"
    return f"{'two-phase, ' if config.model.defence == 'fpd' else ''}noise {config.training.noise:g}"


def _facts(card: Card) -> str:
    model, config, task = card.model.config, card.config, card.model.task
    network = f"`{model.backbone}` without a defence (the undefended baseline)"
    if model.defence == "fpd":
        width = f"{model.pyramid_channels} channels" if model.pyramid_channels else "default width"
        network = (
            f"Feature Pyramid Decoder around `{model.backbone}`: pyramid of {width}, {model.denoise} denoising, "
            f"{model.head} head"
        )
    height, width_px = task.image_size
    count = sum(p.numel() for p in card.model.parameters())
    rows = (
        ("network", network),
        ("input → output", f"{task.in_channels}×{height}×{width_px} pixels in [0, 1] → {task.num_classes} logits"),
        ("training", f"{training_in_words(config)}; recipe `{config.recipe}`, protocol {config.protocol}"),
        ("data set", f"{config.data.dataset}; seed {config.seed}"),
        ("parameters", f"{count:,}"),
        ("weights", f"`model.safetensors`, {card.weights_bytes:,} bytes, SHA-256 `{card.weights_sha256}`"),
    )
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _results(card: Card) -> str:
    parts = ["## What was measured", "Accuracy with 95 % Wilson intervals; then, per attack, images turned / tried."]
    for name, record in card.records.items():
        labels = list(dict.fromkeys(attack.attack for attack in record.attacks))
        ledger = f", each attacked image in `results/{name}.ledger.csv`" if name in card.ledgers else ""
        parts.append(
            f"### Suite {record.suite}, {record.norm}\n\n{record.num_images:,} test images, seed {record.seed}; "
            f"`results/{name}.json`{ledger}."
        )
        rows = [["eps", "accuracy", *labels], ["---"] * (2 + len(labels))]
        rows.append(["0 (clean)", str(record.clean), *[""] * len(labels)])
        for worst in record.worst_case:
            tried = {a.attack: f"{a.misclassified} / {a.attacked}" for a in record.attacks if a.eps == worst.eps}
            rows.append([f"{worst.eps:.4g}", str(worst.robust), *(tried.get(label, "") for label in labels)])
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts)


def _loading(card: Card) -> str:
    return (
        "## How to load it\n\n```python\nimport robustfpd as rf\n\n"
        f'model = rf.load("{card.name}")  # in evaluation mode, on the CPU\n'
        "classifier = model.classifier()  # images N×C×H×W in [0, 1] → logits N×K\n```"
    )


def _making(card: Card) -> str:
    out = f"runs/{card.name.replace('/', '-')}"
    stage = f"{out}/adversarial" if card.config.stage == "adversarial" else out
    making = [training_command(card.config, out)]
    making += [evaluation_command(record, card.config, stage) for record in card.records.values()]
    checking = [evaluation_command(record, card.config, card.name) for record in card.records.values()]
    rows = ["| stage | epochs | time | device | threads |", "|---|---|---|---|---|"]
    for cost in card.costs:
        device, threads = cost.environment.get("device", "unknown"), cost.environment.get("threads", "unknown")
        rows.append(f"| {cost.stage} | {cost.epochs} | {cost.seconds:,.0f} s | {device} | {threads} |")
    return "\n".join(
        [
            "## How it was made", "", "```sh", *making, "```", "", *rows, "",
            "The time is that of the epochs, without validation. Other versions, devices and numbers of threads round "
            "otherwise and lead to other weights. The attacks on these very weights are repeated by:", "",
            "```sh", *checking, "```",
        ]
    )  # fmt: skip


def _limits(card: Card) -> str:
    config, records = card.config, card.records.values()
    labels = dict.fromkeys(attack.attack for record in records for attack in record.attacks)
    norms = dict.fromkeys(record.norm for record in records)
    limits = [
        f"A robust accuracy is an upper bound: it holds for the attacks that were run ({'; '.join(labels)}). "
        "Others may turn more images.",
        f"eps is in pixels of [0, 1], measured in {' and '.join(norms)}. Nothing is said about other norms and radii.",
        f"One training, seed {config.seed}: the intervals cover the choice of images, not of seeds.",
        f"Only {config.data.dataset} was seen. On other images its answers mean nothing.",
    ]
    if config.stage == "adversarial":
        limits.append(
            f"It was trained on {config.adversarial.attack.upper()} images within {config.adversarial.norm} "
            f"{config.adversarial.eps:.3g}; attacks of that kind are the ones it knows."
        )
    if config.data.selection == "test":
        limits.append("Its best epoch was picked on the test images (as published): its accuracy on them is flattered.")
    if card.model.config.defence == "none":
        limits.append("It has no defence of its own: it is what a defended network is compared with.")
    return "\n".join(["## What this does not say", "", *(f"- {limit}" for limit in limits)])


def _versions(card: Card) -> str:
    settings = {cost.stage: cost.environment for cost in card.costs}
    settings |= {f"evaluation {name}": record.environment for name, record in card.records.items()}
    packages = list(dict.fromkeys(p for env in settings.values() for p in env.get("packages", {})))
    rows = [["", "python", *packages, "git revision"], ["---"] * (3 + len(packages))]
    for name, env in settings.items():
        versions = [str(env.get("packages", {}).get(package) or "") for package in packages]
        rows.append([name, str(env.get("python", "")), *versions, str(env.get("git_revision") or "")])
    return "\n".join(["## Versions", "", *(f"| {' | '.join(row)} |" for row in rows)])


def _licence(card: Card) -> str:
    return (
        "## Licence\n\nThe weights, like the code: MIT. They were trained on "
        f"{LICENCES[card.config.data.dataset]}; its images are not part of them."
    )
