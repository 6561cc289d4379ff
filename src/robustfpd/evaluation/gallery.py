"""The gallery of an evaluation: pictures of adversarial examples and survivors, and the loss landscape of one image.

Pictures and `gallery.json` lie in a folder beside the record, so that a report needs neither model nor data.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from robustfpd.attacks.base import reproducible
from robustfpd.attacks.losses import margin
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Config, Norm, parse
from robustfpd.errors import InputError, first_line
from robustfpd.evaluation.attack_runner import TOLERANCE, AttackOutcome, AttackRunner
from robustfpd.evaluation.ledger import LedgerRow
from robustfpd.evaluation.suites import AttackSpec
from robustfpd.io import write_json, writing
from robustfpd.models import FPD
from robustfpd.rng import generator

FORMAT = 1
FILE = "gallery.json"
CANDIDATES = 4
"""Survivors in memory for each that is shown: later attacks misclassify most of them."""
ALONG, ACROSS = (-0.5, 1.5), (-1.0, 1.0)
"""Range of the loss landscape's axes, in norms of the perturbation."""
POINTS = 21
"""Of the loss landscape, on each axis."""
T = TypeVar("T")
Picture = Literal["clean", "adversarial", "perturbation", "restored"]
PICTURES: tuple[Picture, ...] = get_args(Picture)


class GalleryImage(Config):
    """One image, and an adversarial image that an attack returned for it."""

    image: int
    """Index in the data given."""
    label: int
    clean_prediction: int
    adversarial_prediction: int
    attack: str
    """Of a survivor: the attack that reached the largest margin."""
    eps: float
    distance: float
    misclassified: bool
    margin: float
    """As in the ledger."""
    amplification: float
    """Factor of the perturbation in its picture, where 0 is middle grey."""
    has_restored: bool = False
    """There is a picture of the decoder's restoration of the adversarial image."""

    def file(self, picture: Picture) -> str:
        """Return the file name of one of its pictures."""
        return f"{self.image:06d}-{picture}.png"

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Return the kinds of its pictures."""
        return PICTURES if self.has_restored else PICTURES[:-1]


class LossLandscape(Config):
    """Margins on a plane through an image and an adversarial image.

    As in Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, but over pixels instead of weights.
    """

    image: int
    attack: str
    eps: float
    distance: float
    """Norm of the perturbation: one unit of either axis."""
    along: tuple[float, ...]
    """Steps towards the adversarial image: 0 is the image, 1 the adversarial image."""
    across: tuple[float, ...]
    """Steps of the same norm in a random direction."""
    margin: tuple[tuple[float, ...], ...]
    """Best wrong logit minus the true one, a row for each step across; above 0 the image is misclassified."""


class GalleryIndex(Config):
    """Content of `gallery.json`."""

    format: int = FORMAT
    settings_sha256: str
    norm: Norm
    misclassified: tuple[GalleryImage, ...] = ()
    """In the order in which attacks found them."""
    robust: tuple[GalleryImage, ...] = ()
    """Survivors, with the adversarial image of the largest margin at the largest radius."""
    landscape: LossLandscape | None = None
    problems: tuple[str, ...] = ()
    """Errors that left something out."""


def gallery_folder(record: Path) -> Path:
    """Return the folder of the gallery that belongs to a record."""
    return record.with_name(record.name.removesuffix(".json") + ".gallery")


def read_gallery(folder: Path) -> GalleryIndex:
    """Read `gallery.json`; a missing or damaged file is an InputError. Pictures may be missing."""
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{path} is not a gallery of format {FORMAT}")
    return parse(GalleryIndex, values, str(path))


@dataclass
class _Candidate:
    """An image that may be shown."""

    entry: GalleryImage
    order: tuple[int, float]
    """Number of the attack that found it, and a number drawn for the image: data may be sorted by class."""
    pixels: tuple[Tensor, Tensor]
    """The image and the adversarial image, C×H×W on the CPU."""
    written: bool = False
    """The pictures are in the folder."""


class Gallery:
    """Chooses images during an evaluation and writes their pictures.

    Errors do not end the evaluation: they are listed in `GalleryIndex.problems`.

    Args:
        folder: folder for the pictures; that of an interrupted evaluation is continued, any other is replaced.
        runner: runner of the evaluation.
        settings_sha256: the evaluation's.
        limit: number of misclassified images, and of robust ones, to show; 0 for none.
    """

    def __init__(self, folder: Path, runner: AttackRunner, settings_sha256: str, limit: int) -> None:
        self.folder, self.runner, self.limit = folder, runner, limit
        self._settings_sha256 = settings_sha256
        self._drawn = torch.rand(len(runner.images), generator=generator(runner.seed, "gallery")).tolist()
        self._attacks = 0  # finished attacks
        self._misclassified: dict[int, _Candidate] = {}
        self._survivors: dict[int, _Candidate] = {}
        self._outside: dict[str, dict[int, Tensor]] = {}
        """Adversarial images of minimal attacks that lie outside the ball, and may lie in a larger one; by attack."""
        self._problems: dict[str, None] = {}
        self._landscape: LossLandscape | None = None
        self._guarded("pictures of the interrupted evaluation cannot be read", self._resume)
        self._seen = set(self._misclassified)  # images that are misclassified already

    def add(self, spec: AttackSpec, indices: Tensor, outcome: AttackOutcome) -> None:
        """Consider the images of one batch. Without adversarial images (ledger, other ranks) few can be shown."""
        if not self.limit:
            return
        outside = self._outside.setdefault(spec.label, {})
        for i, (index, row) in enumerate(zip(indices.tolist(), outcome.rows, strict=True)):
            first = row.image not in self._seen
            if row.outcome == "misclassified":
                self._seen.add(row.image)
                self._survivors.pop(row.image, None)
            if not first or row.outcome == "failed":
                continue
            adversarial = outside.get(row.image) if outcome.adversarial is None else outcome.adversarial[i]
            if adversarial is not None:
                # A copy: a slice would keep the whole batch in memory.
                self._keep(row, index, adversarial.detach().cpu().clone(), outside)

    def _keep(self, row: LedgerRow, index: int, adversarial: Tensor, outside: dict[int, Tensor]) -> None:
        """Keep an adversarial image if it is among those to show."""
        if row.distance > row.eps * (1 + TOLERANCE) + TOLERANCE:
            outside[row.image] = adversarial
            positions = self.runner.data.positions
            _limit(outside, CANDIDATES * self.limit, lambda image: self._drawn[positions[image]])
            return
        before = self._survivors.get(row.image)
        if before is not None and (before.entry.eps, before.entry.margin) > (row.eps, row.margin):
            return
        clean = self.runner.images[index].clone()
        largest = float((adversarial.float() - clean.float()).abs().max())
        entry = GalleryImage(
            image=row.image, label=row.label, clean_prediction=row.clean_prediction,
            adversarial_prediction=row.adversarial_prediction, attack=row.attack, eps=row.eps, distance=row.distance,
            misclassified=row.outcome == "misclassified", margin=row.margin, amplification=0.5 / max(largest, 1 / 255),
        )  # fmt: skip
        candidate = _Candidate(entry, (self._attacks, self._drawn[index]), (clean, adversarial))
        if entry.misclassified:
            self._misclassified[row.image] = candidate
            _limit(self._misclassified, self.limit, lambda image: self._misclassified[image].order)
        else:
            self._survivors[row.image] = candidate
            _limit(self._survivors, CANDIDATES * self.limit, lambda image: self._survivors[image].order[1])

    def save(self, *, final: bool) -> None:
        """Write the pictures after an attack; those of survivors if its radius was the final, largest one."""
        self._attacks += 1
        if self.limit:
            self._guarded("pictures were not written", lambda: self._write(final=final))

    def finish(self, view: nn.Module, survivors: Tensor) -> None:
        """Remove images that are no survivors, and add the loss landscape of the first misclassified image.

        Args:
            view: images → logits, before squashing if possible, for the loss landscape.
            survivors: which images survived every attack, N.
        """
        if not self.limit:
            return
        robust = {int(image) for image in self.runner.data.ids[survivors.cpu()]}
        self._survivors = {image: c for image, c in self._survivors.items() if image in robust}
        changed = (c for images in self._shown(final=True) for c in images if not torch.equal(*c.pixels))
        candidate = next(changed, None)
        if candidate is not None and self._landscape is None:
            self._landscape = self._guarded(
                "the loss landscape was not drawn",
                lambda: loss_landscape(view, *candidate.pixels, candidate.entry, self.runner),
            )
        self.save(final=True)

    def _shown(self, *, final: bool) -> tuple[list[_Candidate], list[_Candidate]]:
        """Return the misclassified images in the order in which attacks found them, and survivors drawn at random."""
        survivors = sorted(self._survivors.values(), key=lambda c: c.order[1])[: self.limit]
        return sorted(self._misclassified.values(), key=lambda c: c.order), survivors if final else []

    def _guarded(self, problem: str, action: Callable[[], T]) -> T | None:
        """Return an action's result; list an error under `problems` instead of raising it."""
        try:
            return action()
        except Exception as error:  # a classifier may raise anything, a disk may be full
            self._problems[f"{problem}: {type(error).__name__}: {first_line(error)}"] = None
            return None

    def _write(self, *, final: bool) -> None:
        """Write missing pictures and the index; remove pictures of images that are no longer shown."""
        misclassified, robust = self._shown(final=final)
        new = [c for c in [*misclassified, *robust] if not c.written]
        restored = self._restore([c.pixels[1] for c in new])
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for i, candidate in enumerate(new):
                self._write_pictures(candidate, None if restored is None else restored[i])
            shown = {c.entry.image for c in [*misclassified, *robust]}
            for path in self.folder.glob("*-*.png"):
                number = path.name.partition("-")[0]
                if number.isdecimal() and int(number) not in shown:
                    path.unlink()
            index = GalleryIndex(
                settings_sha256=self._settings_sha256, norm=self.runner.norm, landscape=self._landscape,
                misclassified=tuple(c.entry for c in misclassified), robust=tuple(c.entry for c in robust),
                problems=tuple(self._problems),
            )  # fmt: skip
            write_json(self.folder / FILE, index.model_dump(mode="json"))

    def _write_pictures(self, candidate: _Candidate, restored: Tensor | None) -> None:
        clean, adversarial = candidate.pixels
        delta = candidate.entry.amplification * (adversarial.float() - clean.float())
        pictures: dict[Picture, Tensor] = {"clean": clean, "adversarial": adversarial, "perturbation": 0.5 + delta}
        pictures |= {} if restored is None else {"restored": restored}
        for name, pixels in pictures.items():
            to_picture(pixels).save(self.folder / candidate.entry.file(name))
        candidate.entry = candidate.entry.model_copy(update={"has_restored": restored is not None})
        candidate.written = True

    @torch.no_grad()
    def _restore(self, adversarial: list[Tensor]) -> Tensor | None:
        """Return the decoder's restorations of adversarial images, M×C×H×W; None for a classifier without decoder."""
        fpd = getattr(self.runner.classifier, "fpd", None)
        if not adversarial or not isinstance(fpd, FPD):
            return None

        def restore() -> Tensor:
            parts = torch.split(torch.stack(adversarial), self.runner.batch_size)
            return torch.cat([fpd.restore(part.to(self.runner.device)).cpu() for part in parts])

        return self._guarded("nothing was restored", restore)

    def _resume(self) -> None:
        """Read the pictures of this evaluation from before it was interrupted; remove those of another one."""
        if not self.folder.is_dir():
            return
        try:
            index = read_gallery(self.folder)
        except InputError:
            index = None
        if index is None or index.settings_sha256 != self._settings_sha256:
            shutil.rmtree(self.folder)
            return
        self._landscape = index.landscape
        positions = self.runner.data.positions
        for number, entry in enumerate((*index.misclassified, *index.robust)):
            clean, adversarial = (_read_picture(self.folder / entry.file(p)) for p in PICTURES[:2])
            if entry.image not in positions or clean is None or adversarial is None:
                continue
            # Images from before the interruption precede all that come now.
            order = (-1, float(number)) if entry.misclassified else (0, self._drawn[positions[entry.image]])
            candidates = self._misclassified if entry.misclassified else self._survivors
            candidates[entry.image] = _Candidate(entry, order, (clean, adversarial), written=True)


@torch.no_grad()
def loss_landscape(
    view: nn.Module, clean: Tensor, adversarial: Tensor, entry: GalleryImage, runner: AttackRunner
) -> LossLandscape:
    """Return the margins of `view` (images → logits) on a plane through an image C×H×W and an adversarial image."""
    draws = generator(runner.seed, "loss landscape", entry.image)
    along_direction = (adversarial - clean).float()  # not zero
    across_direction = (2 * torch.randint(0, 2, clean.shape, generator=draws) - 1).float()
    norm = lp_ball(runner.norm).norm
    across_direction *= float(norm(along_direction[None])) / float(norm(across_direction[None]))
    along, across = torch.linspace(*ALONG, POINTS), torch.linspace(*ACROSS, POINTS)
    b, a = torch.meshgrid(across, along, indexing="ij")
    points = clean + a.reshape(-1, 1, 1, 1) * along_direction + b.reshape(-1, 1, 1, 1) * across_direction
    points = points.clamp(0, 1).to(clean.dtype)  # POINTS² C H W
    margins = []
    with reproducible(draws):
        for part in torch.split(points, runner.batch_size):
            labels = torch.full((len(part),), entry.label, device=runner.device)
            margins.append(margin(view(part.to(runner.device)).float(), labels).cpu())
    grid = torch.cat(margins).nan_to_num(0, 0, 0).reshape(POINTS, POINTS)
    return LossLandscape(
        image=entry.image, attack=entry.attack, eps=entry.eps, distance=entry.distance, along=tuple(along.tolist()),
        across=tuple(across.tolist()), margin=tuple(tuple(line) for line in grid.tolist()),
    )  # fmt: skip


def to_picture(image: Tensor) -> Image.Image:
    """Return an image C×H×W in [0, 1] as 8-bit picture; of other than 1 or 3 channels, the first."""
    pixels = (image.detach().float().nan_to_num(0, 1, 0).clamp(0, 1) * 255).round().to(torch.uint8)
    shown = pixels if len(pixels) == 3 else pixels[:1]
    return Image.fromarray(np.ascontiguousarray(shown.permute(1, 2, 0).squeeze(-1).numpy()))


def _read_picture(path: Path) -> Tensor | None:
    """Return a picture C×H×W in [0, 1]; None if it is missing or damaged."""
    try:
        with Image.open(path) as file:
            values = torch.from_numpy(np.array(file, dtype=np.float32)) / 255
    except (OSError, ValueError):
        return None
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def _limit(candidates: dict[int, Any], most: int, key: Callable[[int], Any]) -> None:
    """Remove the image with the largest key if there are more than `most`."""
    if len(candidates) > most:
        del candidates[max(candidates, key=key)]
