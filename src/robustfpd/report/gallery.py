"""Images on their way through the defence: clean, noisy, adversarial, restored."""

from __future__ import annotations

import torch
from torch import Tensor

from robustfpd import attacks
from robustfpd.data import ImageSet
from robustfpd.data.noise import add_uniform_noise
from robustfpd.models import FPD
from robustfpd.models.mode import evaluating
from robustfpd.report.figures import GalleryRow
from robustfpd.report.html import Gallery
from robustfpd.seeding import generator


def defence_gallery(model: FPD, images: ImageSet, *, noise: float, eps: float, seed: int, count: int = 6) -> Gallery:
    """Attack `count` images, drawn by the seed, with PGD-40 in L∞ and show what the defence makes of them."""
    chosen = torch.randperm(len(images), generator=generator(seed, "gallery"))[:count]
    device = next(model.parameters()).device
    clean, labels = (t.to(device) for t in images.take(chosen).floats())
    noisy = add_uniform_noise(clean, noise, generator(seed, "gallery noise")).clamp(0, 1)
    unsquashed = model.classifier(squash=False)
    adversarial = attacks.pgd(unsquashed, clean, labels, eps=eps, generator=generator(seed, "gallery attack"))
    with evaluating(model), torch.no_grad():
        seen = {name: model(x) for name, x in (("clean", clean), ("noisy", noisy), ("adversarial", adversarial))}
    rows = []
    for i, label in enumerate(labels.tolist()):
        pictures = (clean[i], noisy[i], adversarial[i], seen["adversarial"].restored[i])
        captions = [_said(seen[name].logits[i], label) for name in ("clean", "noisy", "adversarial")]
        rows.append(GalleryRow(pictures, (*captions, "")))
    caption = (
        f"{len(chosen)} test images: clean; with the training noise (±{noise:g}); after PGD-40 at eps {eps:g} on the "
        "logits before any squashing; and what the decoder restores from the adversarial image. "
        "Below each, the class the FPD gives."
    )
    return Gallery(("clean", "noisy", "adversarial", "restored"), tuple(rows), caption)


def _said(logits: Tensor, label: int) -> str:
    prediction = int(logits.argmax())
    return f"{prediction}, right" if prediction == label else f"{prediction}, wrong (is {label})"
