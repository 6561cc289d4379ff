"""Gallery as small pictures inside the page, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from robustfpd.evaluation import EvaluationRecord
from robustfpd.evaluation.gallery import GalleryImage, GalleryIndex, Picture
from robustfpd.report.metrics import class_name, radius

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
class Thumbnail:
    """One gallery_image, as the page shows it."""

    tiles: tuple[Tile, ...]
    caption: str
    pixelated: bool


@dataclass(frozen=True)
class ThumbnailGallery:
    """Images that fell first, and images that never fell."""

    fell: tuple[Thumbnail, ...]
    stood: tuple[Thumbnail, ...]


def thumbnails(folder: Path, shown: GalleryIndex, record: EvaluationRecord, budget: int = BUDGET) -> ThumbnailGallery:
    """Embed all pictures, as large as the budget allows; those that cannot be read are left blank."""
    gallery = (*shown.misclassified, *shown.robust)
    read = {(e.image, p): _open(folder / e.file(p)) for e in gallery for p in e.pictures}
    pictures = {key: picture for key, picture in read.items() if picture is not None}
    uris = _embedded(pictures, budget)
    cards = [_thumbnail(gallery_image, record, pictures, uris) for gallery_image in gallery]
    return ThumbnailGallery(tuple(cards[: len(shown.misclassified)]), tuple(cards[len(shown.misclassified) :]))


def _thumbnail(
    gallery_image: GalleryImage, record: EvaluationRecord, pictures: dict[tuple[int, Picture], Image.Image],
    uris: dict[tuple[int, Picture], str],
) -> Thumbnail:  # fmt: skip
    true, became = (class_name(record, n) for n in (gallery_image.label, gallery_image.adversarial_prediction))
    times = f"×{gallery_image.amplification:.3g}"
    said = {
        "clean": f"classified as {true}, correctly", "adversarial": f"classified as {became}",
        "perturbation": f"magnified {times}, grey is 0", "restored": "what the decoder makes of it",
    }  # fmt: skip
    tiles = tuple(
        Tile(
            f"δ {times}" if p == "perturbation" else p, f"Image {gallery_image.image}, {p}: {said[p]}",
            uris.get((gallery_image.image, p)),
        )
        for p in gallery_image.pictures
    )  # fmt: skip
    outcome = f"{true} → {became}" if gallery_image.misclassified else f"{true}, still"
    caption = f"{outcome} · {gallery_image.attack}, eps {radius(gallery_image.eps)}, norm {gallery_image.distance:.3g}"
    known = [pictures[key] for key in pictures if key[0] == gallery_image.image]
    return Thumbnail(tiles, caption, bool(known) and max(known[0].size) <= SMALL)


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
