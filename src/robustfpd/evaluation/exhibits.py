"""Images worth a look: some that fell first, some that never fell, and the loss around one of them.

They lie in a folder beside the record, as pictures and `exhibits.json`, so that a report needs neither model nor data.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.config import Config, Norm, parse
from robustfpd.errors import InputError
from robustfpd.evaluation.bench import OUTSIDE, Bench
from robustfpd.evaluation.ledger import LedgerRow, writing
from robustfpd.evaluation.suite import Planned
from robustfpd.evaluation.surface import Surface, loss_surface
from robustfpd.models import FPD
from robustfpd.provenance import write_json
from robustfpd.seeding import generator

FORMAT = 1
FOLDER = ".exhibits"
FILE = "exhibits.json"
CANDIDATES = 4
"""Times as many images that still stand are held in memory as are shown: most of them fall later."""
Picture = Literal["clean", "adversarial", "perturbation", "restored"]
PICTURES: tuple[Picture, ...] = ("clean", "adversarial", "perturbation", "restored")


class Exhibit(Config):
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
    fell: bool
    amplification: float
    """What the perturbation was multiplied by for its picture, in which 0 is middle grey."""
    restores: bool = False
    """There is a picture of what the decoder makes of the adversarial image."""

    def file(self, picture: Picture) -> str:
        """Name of one of its pictures."""
        return f"{self.image:06d}-{picture}.png"

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """What there should be of it."""
        return PICTURES if self.restores else PICTURES[:-1]


class Shown(Config):
    """All exhibits of an evaluation."""

    format: int = FORMAT
    settings_sha256: str
    norm: Norm
    fell: tuple[Exhibit, ...] = ()
    """In the order in which they fell."""
    stood: tuple[Exhibit, ...] = ()
    surface: Surface | None = None


def exhibits_folder(record: Path) -> Path:
    """Where the exhibits of the evaluation with this record lie."""
    return record.with_name(record.name.removesuffix(".json") + FOLDER)


def read_exhibits(folder: Path) -> Shown:
    """Read `exhibits.json`; a missing or damaged one is an InputError, missing pictures are not looked for."""
    path = folder / FILE
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{path} does not hold exhibits of format {FORMAT}")
    return parse(Shown, values, str(path))


@dataclass
class _Candidate:
    """An image that may be shown."""

    exhibit: Exhibit
    order: tuple[int, float]
    """The attack that found it, by number, and a lot drawn for the image: data often come sorted by class."""
    closeness: float
    pixels: tuple[Tensor, Tensor] | None
    """The image and the point that was found, C×H×W on the CPU; None where the pictures were written earlier."""


class Exhibits:
    """Chooses images while an evaluation runs and keeps pictures of them."""

    def __init__(self, folder: Path, bench: Bench, settings_sha256: str, limit: int) -> None:
        self.folder, self.bench, self.limit = folder, bench, limit
        self._settings = settings_sha256
        self._lots = torch.rand(len(bench.images), generator=generator(bench.seed, "exhibits")).tolist()
        self._fallen = self._kept_before()
        self._standing: dict[int, _Candidate] = {}
        self._down = set(self._fallen)
        self._written = set(self._fallen)

    def see(self, stage: int, planned: Planned, eps: float, indices: Tensor, rows: list[LedgerRow]) -> None:
        """Look at what an attack made of a batch; of one that was read from the ledger there are no images."""
        for place, (index, row) in enumerate(zip(indices.tolist(), rows, strict=True)):
            known, fell = row.image in self._down, row.outcome == "fooled"
            if fell:
                self._down.add(row.image)
                self._standing.pop(row.image, None)
            inside = not attacks.get(planned.attack).minimal or row.distance <= eps * (1 + OUTSIDE)
            if self.bench.found is None or known or row.outcome == "failed" or not inside:
                continue
            clean, found = self.bench.images[index], self.bench.found[place].detach().cpu()
            order = stage, self._lots[index]
            candidate = _Candidate(_exhibit(row, found - clean), order, row.closeness, (clean, found))
            (self._fallen if fell else self._closest(candidate))[row.image] = candidate
        self._fallen = {c.exhibit.image: c for c in _ordered(self._fallen)[: self.limit]}
        by_lot = sorted(self._standing.values(), key=lambda c: c.order[1])
        self._standing = {c.exhibit.image: c for c in by_lot[: CANDIDATES * self.limit]}

    def _closest(self, candidate: _Candidate) -> dict[int, _Candidate]:
        """Where a candidate that still stands goes: to the others, unless a point came closer at that radius."""
        before = self._standing.get(candidate.exhibit.image)
        if before is None:
            return self._standing
        old, new = ((c.exhibit.eps, c.closeness) for c in (before, candidate))
        return self._standing if new >= old else {}

    def save(self) -> None:
        """Keep what was found so far; called after each attack, so that little is lost to whoever is killed."""
        if self._fallen.keys() != self._written:
            self._save({}, None)

    def finish(self, view: nn.Module, standing: Tensor) -> None:
        """Add images that withstood everything, and the loss around the first that fell.

        Args:
            view: images → logits, before squashing where these can be had; whose loss is looked at.
            standing: which images withstood everything, N.
        """
        up = {int(number) for number in self.bench.numbers[standing.cpu()]}
        stood = dict([(image, c) for image, c in self._standing.items() if image in up][: self.limit])
        candidates = [*_ordered(self._fallen), *stood.values()]
        surface = None
        around = next((c for c in candidates if c.pixels is not None and not torch.equal(*c.pixels)), None)
        if around is not None and around.pixels is not None:
            draws = generator(self.bench.seed, "surface", around.exhibit.image)
            surface = loss_surface(view, *around.pixels, around.exhibit, self.bench, draws)
        self._save(stood, surface)

    def _save(self, stood: dict[int, _Candidate], surface: Surface | None) -> None:
        """Write the pictures that are not there yet, remove those of images that are no longer shown, and the list."""
        shown = {**self._fallen, **stood}
        new = {image: c.pixels for image, c in shown.items() if image not in self._written and c.pixels is not None}
        restored = self._restored([adversarial for _, adversarial in new.values()])
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for place, (image, (clean, adversarial)) in enumerate(new.items()):
                exhibit = shown[image].exhibit
                delta = exhibit.amplification * (adversarial.float() - clean.float())
                pictures = {"clean": clean, "adversarial": adversarial, "perturbation": 0.5 + delta}
                if restored is not None:
                    pictures["restored"] = restored[place]
                    shown[image].exhibit = exhibit.model_copy(update={"restores": True})
                for name, pixels in pictures.items():
                    picture_of(pixels).save(self.folder / f"{image:06d}-{name}.png")
            for image in self._written - shown.keys():
                for old in self.folder.glob(f"{image:06d}-*.png"):
                    old.unlink()
            self._written = set(shown)
            listed = Shown(
                settings_sha256=self._settings, norm=self.bench.norm, surface=surface,
                fell=tuple(c.exhibit for c in _ordered(self._fallen)),
                stood=tuple(c.exhibit for c in stood.values()),
            )  # fmt: skip
            write_json(self.folder / FILE, listed.model_dump(mode="json"))

    @torch.no_grad()
    def _restored(self, adversarial: list[Tensor]) -> Tensor | None:
        """What the decoder makes of adversarial images, M×C×H×W; None for a classifier without one."""
        fpd = getattr(self.bench.classifier, "fpd", None)
        if not adversarial or not isinstance(fpd, FPD):
            return None
        parts = torch.split(torch.stack(adversarial).to(self.bench.device), self.bench.batch_size)
        return torch.cat([fpd.restore(part).cpu() for part in parts])

    def _kept_before(self) -> dict[int, _Candidate]:
        """What an evaluation that was killed had kept; whatever else lies there is another evaluation's."""
        if not self.folder.is_dir():
            return {}
        try:
            found = read_exhibits(self.folder)
            if found.settings_sha256 == self._settings and not found.stood:
                # Attacks that come now come later.
                return {e.image: _Candidate(e, (-1, place), 0.0, None) for place, e in enumerate(found.fell)}
        except InputError:
            pass
        shutil.rmtree(self.folder)
        return {}


def _exhibit(row: LedgerRow, delta: Tensor) -> Exhibit:
    return Exhibit(
        image=row.image, label=row.label, clean_prediction=row.clean_prediction,
        adversarial_prediction=row.adversarial_prediction, attack=row.attack, eps=row.eps, distance=row.distance,
        fell=row.outcome == "fooled", amplification=0.5 / max(float(delta.abs().max()), 1 / 255),
    )  # fmt: skip


def _ordered(candidates: dict[int, _Candidate]) -> list[_Candidate]:
    return sorted(candidates.values(), key=lambda c: c.order)


def picture_of(image: Tensor) -> Image.Image:
    """An image C×H×W in [0, 1] as 8 bits; of other than 1 or 3 channels, the first."""
    pixels = (image.detach().float().nan_to_num(0, 1, 0).clamp(0, 1) * 255).round().to(torch.uint8)
    shown = pixels if len(pixels) == 3 else pixels[:1]
    return Image.fromarray(np.ascontiguousarray(shown.permute(1, 2, 0).squeeze(-1).numpy()))
