"""Images worth a look: some that fell first, some that never fell, and the loss around one of them.

They lie in a folder beside the record, as pictures and `gallery.json`, so that a report needs neither model nor data.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from robustfpd.config import Config, Norm, parse
from robustfpd.errors import InputError, first_line
from robustfpd.evaluation.attack_runner import OUTSIDE, AttackRunner
from robustfpd.evaluation.ledger import LedgerRow, Outcome, writing
from robustfpd.evaluation.loss_landscape import LossLandscape, loss_landscape
from robustfpd.evaluation.suites import AttackSpec
from robustfpd.io import write_json
from robustfpd.models import FPD
from robustfpd.rng import generator

FORMAT = 1
FOLDER = ".gallery"
FILE = "gallery.json"
CANDIDATES = 4
"""Times as many images that still stand are held in memory as are shown: most of them fall later."""
Picture = Literal["clean", "adversarial", "perturbation", "restored"]
PICTURES: tuple[Picture, ...] = ("clean", "adversarial", "perturbation", "restored")


class GalleryImage(Config):
    """One image, and the point that an attack found near it."""

    image: int
    """Its place in the data that was given."""
    label: int
    clean_prediction: int
    adversarial_prediction: int
    attack: str
    """Of an image that never fell: the one that came closest."""
    eps: float
    distance: float
    misclassified: bool
    margin: float
    """How near it came to falling, as the ledger has it."""
    amplification: float
    """What the perturbation was multiplied by for its picture, in which 0 is middle grey."""
    has_restored: bool = False
    """There is a picture of what the decoder makes of the adversarial image."""

    def file(self, picture: Picture) -> str:
        """Name of one of its pictures."""
        return f"{self.image:06d}-{picture}.png"

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """What there should be of it."""
        return PICTURES if self.has_restored else PICTURES[:-1]


class GalleryIndex(Config):
    """All gallery of an evaluation."""

    format: int = FORMAT
    settings_sha256: str
    norm: Norm
    misclassified: tuple[GalleryImage, ...] = ()
    """In the order in which they fell."""
    robust: tuple[GalleryImage, ...] = ()
    """Beside each the point that came closest at the largest radius."""
    landscape: LossLandscape | None = None
    problems: tuple[str, ...] = ()
    """What could not be drawn, and why."""


def gallery_folder(record: Path) -> Path:
    """Where the gallery of the evaluation with this record lie."""
    return record.with_name(record.name.removesuffix(".json") + FOLDER)


def read_gallery(folder: Path) -> GalleryIndex:
    """Read `gallery.json`; a missing or damaged one is an InputError, missing pictures are not looked for."""
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{path} does not hold gallery of format {FORMAT}")
    return parse(GalleryIndex, values, str(path))


@dataclass
class _Candidate:
    """An image that may be shown, with the point that was found, C×H×W on the CPU."""

    row: LedgerRow
    order: tuple[int, float]
    """The attack that found it, by number, and a lot drawn for the image: data often come sorted by class."""
    pixels: tuple[Tensor, Tensor]
    gallery_image: GalleryImage | None = None
    """What was written of it; None until its pictures are."""


class Gallery:
    """Chooses images while an evaluation runs and keeps pictures of them.

    Nothing that goes wrong here ends the evaluation: it is told in `GalleryIndex.problems`.
    """

    def __init__(self, folder: Path, runner: AttackRunner, settings_sha256: str, limit: int) -> None:
        self.folder, self.runner, self.limit = folder, runner, limit
        self._settings = settings_sha256
        self._lots = torch.rand(len(runner.images), generator=generator(runner.seed, "gallery")).tolist()
        self._place = {int(number): i for i, number in enumerate(runner.numbers)}
        self._fallen: dict[int, _Candidate] = {}
        self._standing: dict[int, _Candidate] = {}
        self._outside: dict[str, dict[int, Tensor]] = {}
        """Points of attacks that look for the smallest perturbation, which a larger ball may hold; by attack, image."""
        self._problems: dict[str, None] = {}
        self._surface: LossLandscape | None = None
        self._guarded("what was kept before cannot be read", self._go_on)
        self._down = set(self._fallen)

    def see(self, stage: int, planned: AttackSpec, eps: float, indices: Tensor, rows: list[LedgerRow]) -> None:
        """Look at what an attack made of a batch; where it was read from the ledger there may be no images."""
        if not self.limit:
            return
        outside = self._outside.setdefault(planned.label, {})
        for place, (index, row) in enumerate(zip(indices.tolist(), rows, strict=True)):
            first = row.image not in self._down
            if row.outcome == "misclassified":
                self._down.add(row.image)
                self._standing.pop(row.image, None)
            if not first or row.outcome == "failed":
                continue
            found = outside.get(row.image) if self.runner.found is None else self.runner.found[place]
            if found is not None:
                self._keep(row, (stage, self._lots[index]), index, found, outside)

    def _keep(
        self, row: LedgerRow, order: tuple[int, float], index: int, found: Tensor, outside: dict[int, Tensor]
    ) -> None:
        """Keep a point if it is among those that will be shown; copied, because it is a part of its whole batch."""
        most, key = CANDIDATES * self.limit, row.image
        if row.distance > row.eps * (1 + OUTSIDE) + OUTSIDE:
            outside[key] = found.detach().cpu().clone()
            self._drop(outside, most, lambda image: self._lots[self._place[image]])
            return
        kept, most = (self._fallen, self.limit) if row.outcome == "misclassified" else (self._standing, most)
        before = kept.get(key)
        if before is not None and (before.row.eps, before.row.margin) > (row.eps, row.margin):
            return
        kept[key] = _Candidate(row, order, (self.runner.images[index].clone(), found.detach().cpu().clone()))
        fell = row.outcome == "misclassified"
        self._drop(kept, most, lambda image: kept[image].order if fell else (0, kept[image].order[1]))

    @staticmethod
    def _drop(kept: dict[int, Any], most: int, rank: Callable[[int], Any]) -> None:
        if len(kept) > most:
            del kept[max(kept, key=rank)]

    def save(self, *, final: bool) -> None:
        """Write what was found so far; called after each attack, so that little is lost to whoever is killed.

        Args:
            final: the radius is the largest, so that what stands now may never fall.
        """
        if self.limit:
            self._guarded("pictures were not written", lambda: self._write(final=final))

    def finish(self, view: nn.Module, standing: Tensor) -> None:
        """Leave out what does not stand after all, and add the loss around the first image that fell.

        Args:
            view: images → logits, before squashing where these can be had; whose loss is looked at.
            standing: which images robust everything, N.
        """
        if not self.limit:
            return
        up = {int(number) for number in self.runner.numbers[standing.cpu()]}
        self._standing = {image: c for image, c in self._standing.items() if image in up}
        around = next((c for c in [*self._ordered(), *self._shown()] if not torch.equal(*c.pixels)), None)
        if around is not None and self._surface is None:
            self._guarded("the loss surface was not drawn", lambda: self._draw(view, around))
        self.save(final=True)

    def _draw(self, view: nn.Module, around: _Candidate) -> None:
        draws = generator(self.runner.seed, "surface", around.row.image)
        self._surface = loss_landscape(view, *around.pixels, around.row, self.runner, draws)

    def _ordered(self) -> list[_Candidate]:
        """Images that fell, the first ones first."""
        return sorted(self._fallen.values(), key=lambda c: c.order)

    def _shown(self) -> list[_Candidate]:
        """Images that stand, as many as are shown, by lot."""
        return sorted(self._standing.values(), key=lambda c: c.order[1])[: self.limit]

    def _guarded(self, what: str, action: Callable[[], None]) -> None:
        """Do something that the evaluation can do without."""
        try:
            action()
        except Exception as error:  # a classifier may raise anything, a disk may be full
            self._problems[f"{what}: {type(error).__name__}: {first_line(error)}"] = None

    def _write(self, *, final: bool) -> None:
        """Write the pictures that are not there yet, remove those of images that are no longer shown, and the list."""
        fell, stood = self._ordered(), self._shown() if final else []
        new = [c for c in [*fell, *stood] if c.gallery_image is None]
        restored = self._restored([c.pixels[1] for c in new])
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for place, candidate in enumerate(new):
                self._pictures(candidate, None if restored is None else restored[place])
            shown = {c.row.image for c in [*fell, *stood]}
            for path in self.folder.glob("*-*.png"):
                number = path.name.partition("-")[0]
                if number.isdecimal() and int(number) not in shown:
                    path.unlink()
            listed = GalleryIndex(
                settings_sha256=self._settings, norm=self.runner.norm, landscape=self._surface,
                misclassified=tuple(c.gallery_image for c in fell if c.gallery_image),
                robust=tuple(c.gallery_image for c in stood if c.gallery_image),
                problems=tuple(self._problems),
            )  # fmt: skip
            write_json(self.folder / FILE, listed.model_dump(mode="json"))

    def _pictures(self, candidate: _Candidate, restored: Tensor | None) -> None:
        row, (clean, adversarial) = candidate.row, candidate.pixels
        delta = adversarial.float() - clean.float()
        amplification = 0.5 / max(float(delta.abs().max()), 1 / 255)
        gallery_image = GalleryImage(
            image=row.image, label=row.label, clean_prediction=row.clean_prediction,
            adversarial_prediction=row.adversarial_prediction, attack=row.attack, eps=row.eps, distance=row.distance,
            misclassified=row.outcome == "misclassified", margin=row.margin, amplification=amplification,
            has_restored=restored is not None,
        )  # fmt: skip
        pictures: dict[Picture, Tensor] = {
            "clean": clean, "adversarial": adversarial, "perturbation": 0.5 + amplification * delta,
        }  # fmt: skip
        pictures |= {} if restored is None else {"restored": restored}
        for name, pixels in pictures.items():
            picture_of(pixels).save(self.folder / gallery_image.file(name))
        candidate.gallery_image = gallery_image

    @torch.no_grad()
    def _restored(self, adversarial: list[Tensor]) -> Tensor | None:
        """What the decoder makes of adversarial images, M×C×H×W; None for a classifier without one."""
        fpd = getattr(self.runner.classifier, "fpd", None)
        if not adversarial or not isinstance(fpd, FPD):
            return None
        restored: list[Tensor] = []

        def restore() -> None:
            for part in torch.split(torch.stack(adversarial), self.runner.batch_size):
                restored.append(fpd.restore(part.to(self.runner.device)).cpu())

        self._guarded("nothing was restored", restore)
        return torch.cat(restored) if sum(map(len, restored)) == len(adversarial) else None

    def _go_on(self) -> None:
        """Take up what this evaluation had kept before it was killed; whatever else lies there is another's."""
        if not self.folder.is_dir():
            return
        try:
            found = read_gallery(self.folder)
        except InputError:
            found = None
        if found is None or found.settings_sha256 != self._settings:
            shutil.rmtree(self.folder)
            return
        self._surface = found.landscape
        for place, gallery_image in enumerate((*found.misclassified, *found.robust)):
            pixels = _pixels(self.folder, gallery_image), _pixels(self.folder, gallery_image, "adversarial")
            if gallery_image.image not in self._place or pixels[0] is None or pixels[1] is None:
                continue
            # What fell before fell before everything that comes now.
            order = (
                (-1, float(place)) if gallery_image.misclassified else (0, self._lots[self._place[gallery_image.image]])
            )
            outcome: Outcome = "misclassified" if gallery_image.misclassified else "robust"
            row = LedgerRow(
                image=gallery_image.image, label=gallery_image.label, clean_prediction=gallery_image.clean_prediction,
                attack=gallery_image.attack, eps=gallery_image.eps,
                adversarial_prediction=gallery_image.adversarial_prediction,
                distance=gallery_image.distance, outcome=outcome, margin=gallery_image.margin,
            )  # fmt: skip
            kept = self._fallen if gallery_image.misclassified else self._standing
            kept[gallery_image.image] = _Candidate(row, order, (pixels[0], pixels[1]), gallery_image)


def _pixels(folder: Path, gallery_image: GalleryImage, picture: Picture = "clean") -> Tensor | None:
    """A picture as it was written, C×H×W in [0, 1]; None where it is missing."""
    try:
        with Image.open(folder / gallery_image.file(picture)) as file:
            values = torch.from_numpy(np.array(file, dtype=np.float32)) / 255
    except (OSError, ValueError):
        return None
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def picture_of(image: Tensor) -> Image.Image:
    """An image C×H×W in [0, 1] as 8 bits; of other than 1 or 3 channels, the first."""
    pixels = (image.detach().float().nan_to_num(0, 1, 0).clamp(0, 1) * 255).round().to(torch.uint8)
    shown = pixels if len(pixels) == 3 else pixels[:1]
    return Image.fromarray(np.ascontiguousarray(shown.permute(1, 2, 0).squeeze(-1).numpy()))
