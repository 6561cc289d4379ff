"""Exhibits as small pictures inside the page, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from robustfpd.evaluation import EvaluationRecord
from robustfpd.evaluation.exhibits import Exhibit, Picture, Shown
from robustfpd.report.standing import class_name, radius

BUDGET = 2_000_000
"""Bytes of all pictures together, as base64."""
LARGEST = 4096**2
"""Pixels of a picture; larger ones are none of ours."""
SMALL = 64
"""Pixels a side up to which pictures are kept as they are."""
SIDES = (160, 128, 104, 88, 72, 56)
"""Sides that larger ones are reduced to, until all fit."""
QUALITY = 78


@dataclass(frozen=True)
class Tile:
    """One picture of a card."""

    title: str
    alt: str
    uri: str | None
    """data: address; None where the file is missing."""


@dataclass(frozen=True)
class Card:
    """One exhibit, as the page shows it."""

    tiles: tuple[Tile, ...]
    caption: str
    pixelated: bool


@dataclass(frozen=True)
class Gallery:
    """Images that fell first, and images that never fell."""

    fell: tuple[Card, ...]
    stood: tuple[Card, ...]


def gallery(folder: Path, shown: Shown, record: EvaluationRecord, budget: int = BUDGET) -> Gallery:
    """Embed all pictures, as large as the budget allows; those that cannot be read are left blank."""
    exhibits = (*shown.fell, *shown.stood)
    read = {(e.image, p): _open(folder / e.file(p)) for e in exhibits for p in e.pictures}
    pictures = {key: picture for key, picture in read.items() if picture is not None}
    uris = _embedded(pictures, budget)
    cards = [_card(exhibit, record, pictures, uris) for exhibit in exhibits]
    return Gallery(tuple(cards[: len(shown.fell)]), tuple(cards[len(shown.fell) :]))


def _card(
    exhibit: Exhibit, record: EvaluationRecord, pictures: dict[tuple[int, Picture], Image.Image],
    uris: dict[tuple[int, Picture], str],
) -> Card:  # fmt: skip
    true, became = (class_name(record, n) for n in (exhibit.label, exhibit.adversarial_prediction))
    times = f"×{exhibit.amplification:.3g}"
    said = {
        "clean": f"classified as {true}, rightly", "adversarial": f"classified as {became}",
        "perturbation": f"magnified {times}, grey is 0", "restored": "what the decoder makes of it",
    }  # fmt: skip
    tiles = tuple(
        Tile(
            f"δ {times}" if p == "perturbation" else p, f"Image {exhibit.image}, {p}: {said[p]}",
            uris.get((exhibit.image, p)),
        )
        for p in exhibit.pictures
    )  # fmt: skip
    outcome = f"{true} → {became}" if exhibit.fell else f"{true}, still"
    caption = f"{outcome} · {exhibit.attack}, eps {radius(exhibit.eps)}, norm {exhibit.distance:.3g}"
    known = [pictures[key] for key in pictures if key[0] == exhibit.image]
    return Card(tiles, caption, bool(known) and max(known[0].size) <= SMALL)


def _open(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > LARGEST:
                return None
            return picture.convert("L" if picture.mode == "L" else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # missing, cut off, or no picture of ours
        return None


def _embedded(pictures: dict[tuple[int, Picture], Image.Image], budget: int) -> dict[tuple[int, Picture], str]:
    found: dict[tuple[int, Picture], str] = {}
    for side in SIDES:
        found = {key: _uri(picture, side) for key, picture in pictures.items()}
        if sum(map(len, found.values())) <= budget:
            return found
    left, kept = budget, {}
    for key, uri in found.items():  # hundreds of pictures: as many as fit
        left -= len(uri)
        if left < 0:
            break
        kept[key] = uri
    return kept


def _uri(picture: Image.Image, side: int) -> str:
    """Small ones as they are, lossless; larger ones reduced, as WebP."""
    buffer = io.BytesIO()
    if max(picture.size) <= SMALL:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture = picture.convert("RGB")
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        picture.save(buffer, "WEBP", quality=QUALITY)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
