"""Model cards of trained networks: the YAML header of the Hugging Face Hub, and a page made from the stored files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from robustfpd.config import RunConfig, load_run
from robustfpd.errors import unknown_name
from robustfpd.evaluation import EvaluationRecord
from robustfpd.evaluation.robustness import NORM_NAMES, format_eps
from robustfpd.models import load, zoo
from robustfpd.models.checkpoint import WEIGHTS
from robustfpd.report.sources import evaluation_command, training_command

TEMPLATE = Path(__file__).with_name("model_card.md")
TRAINING = "training.json"
"""Epochs, seconds and environment of each stage of the training, as models/add.py writes them."""
PACKAGES = ("robustfpd", "torch", "torchvision", "timm", "lightning", "numpy", "scikit-learn")
DATA_LICENCES = {
    "mnist": "MNIST, Yann LeCun and Corinna Cortes, CC BY-SA 3.0",
    "digits": "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, "
    "CC BY 4.0",
    "fashion_mnist": "Fashion-MNIST, Zalando SE, MIT",
    "svhn": "SVHN, Y. Netzer et al., Stanford University and Google; for non-commercial use",
    "cifar10": "CIFAR-10, Alex Krizhevsky, no licence stated",
}
"""Data sets with their authors and licences."""


def model_card(folder: Path, name: str, description: str, results: Sequence[str], images: str = "") -> ModelCard:
    """Return the card of the network in `folder`, from its settings, weights, records and training costs.

    Args:
        folder: holds the model, `config.yaml`, `training.json` and records in `results/`.
        name: the network's name in the zoo, `<data set>/<model>`.
        description: one line.
        results: names of the records without suffix, in the card's order.
        images: images that it was trained and evaluated on, where they are not the data set's own parts.

    Raises:
        InputError: the data set's licence is unknown, a file is damaged, or no command repeats the training.
    """
    config, model = load_run(folder / zoo.SETTINGS), load(folder)
    dataset = name.split("/")[0]
    if dataset not in DATA_LICENCES:
        raise unknown_name("data set with a known licence", dataset, DATA_LICENCES)
    records = {stem: EvaluationRecord.load(folder / "results" / f"{stem}.json") for stem in results}
    measured = list(records.values())
    stages = json.loads((folder / TRAINING).read_text(encoding="utf-8"))["stages"]
    run = f"runs/{name.replace('/', '-')}"
    trained = f"{run}/adversarial" if config.stage == "adversarial" else run
    environments = {stage["stage"]: stage["environment"] for stage in stages}
    environments |= {f"evaluation {stem}": record.environment for stem, record in records.items()}
    height, width = model.task.image_size
    card: ModelCard = ModelCard.from_template(
        _card_data(name, dataset, measured),
        template_path=str(TEMPLATE),
        name=name,
        description=description,
        config=config,
        shapes=f"{model.task.in_channels}×{height}×{width} pixels in [0, 1] → {model.task.num_classes} logits",
        training=training_description(config),
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        weights_bytes=f"{(folder / WEIGHTS).stat().st_size:,}",
        weights_sha256=zoo.digest(folder / WEIGHTS),
        records=records,
        ledgers=[stem for stem, record in records.items() if record.ledger],
        norms=NORM_NAMES,
        training_commands=[training_command(config, run), *(evaluation_command(r, config, trained) for r in measured)],
        evaluation_commands=[evaluation_command(r, config, name) for r in measured],
        stages=stages,
        attacks=list(dict.fromkeys(attack.attack for r in measured for attack in r.attacks)),
        norm_names=list(dict.fromkeys(NORM_NAMES[r.norm] for r in measured)),
        environments=environments,
        packages=PACKAGES,
        data_licence=DATA_LICENCES[dataset],
        dataset=dataset,
        images=images,
    )
    return card


def training_description(config: RunConfig) -> str:
    """Return a run's stage in a few words."""
    if config.stage == "adversarial":
        settings = config.adversarial
        parts = {"mixed": ["adversarial"], "madry": ["PGD-AT"], "trades": ["TRADES"], "mart": ["MART"]}[
            settings.objective
        ]
        parts += [name for name, used in (("AWP", settings.awp), ("EMA", settings.ema)) if used]
        return f"{' + '.join(parts)}, {'eps' if settings.norm == 'linf' else settings.norm} {format_eps(settings.eps)}"
    return f"{'two-phase, ' if config.model.defence == 'fpd' else ''}noise {config.training.noise:g}"


def _card_data(name: str, dataset: str, records: Sequence[EvaluationRecord]) -> ModelCardData:
    """Return the card's YAML header, with clean and robust accuracies as evaluation results."""
    results = []
    for record in records:
        where = f"suite {record.suite}, {NORM_NAMES[record.norm]} eps"
        accuracies = [("clean accuracy", record.clean)]
        accuracies += [(f"robust accuracy, {where} {format_eps(w.eps)}", w.robust) for w in record.under_attack]
        results += [
            EvalResult(
                task_type="image-classification", dataset_type=dataset, dataset_name=dataset, metric_type="accuracy",
                metric_name=metric, metric_value=round(p.value, 4),
            )
            for metric, p in accuracies
        ]  # fmt: skip
    return ModelCardData(
        license="mit", library_name="robustfpd", pipeline_tag="image-classification", datasets=[dataset],
        tags=["adversarial-robustness"], metrics=["accuracy"], model_name=name, eval_results=results,
    )  # fmt: skip
