"""Gallery images as small pictures embedded in the page, within a limit of bytes."""

from __future__ import annotations

import base64
import io
import itertools
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from robustfpd.evaluation import EvaluationRecord
from robustfpd.evaluation.gallery import GalleryImage, GalleryIndex, Picture
from robustfpd.evaluation.robustness import format_eps
from robustfpd.report.metrics import class_name

MAX_BYTES = 2_000_000
"""Of all pictures, as base64."""
MAX_PIXELS = 4096**2
"""Larger files are not read."""
LOSSLESS_SIZE = 64
"""Longest side in pixels up to which pictures are embedded unchanged."""
SIZES = (160, 128, 104, 88, 72, 56)
"""Longest sides that larger pictures are reduced to, until all fit."""
QUALITY = 78
Key = tuple[int, Picture]


@dataclass(frozen=True)
class Tile:
    """One picture."""

    title: str
    alt: str
    uri: str | None
    """data: address; None where the file is missing."""


@dataclass(frozen=True)
class Thumbnail:
    """One gallery image: its pictures and a caption."""

    tiles: tuple[Tile, ...]
    caption: str
    pixelated: bool


def thumbnails(folder: Path, gallery: GalleryIndex, record: EvaluationRecord) -> dict[str, list[Thumbnail]]:
    """Return the `misclassified` and the `robust` images, as large as `MAX_BYTES` allows; unreadable ones are blank."""
    images = (*gallery.misclassified, *gallery.robust)
    files = {(image.image, picture): folder / image.file(picture) for image in images for picture in image.pictures}
    pictures = {key: picture for key, path in files.items() if (picture := _open(path)) is not None}
    uris = _embed(pictures)
    pixelated = {key[0] for key, picture in pictures.items() if max(picture.size) <= LOSSLESS_SIZE}
    return {
        group: [_thumbnail(image, record, uris, image.image in pixelated) for image in members]
        for group, members in (("misclassified", gallery.misclassified), ("robust", gallery.robust))
    }


def _thumbnail(image: GalleryImage, record: EvaluationRecord, uris: dict[Key, str], pixelated: bool) -> Thumbnail:
    true, predicted = (class_name(record, n) for n in (image.label, image.adversarial_prediction))
    times = f"×{image.amplification:.3g}"
    alt = {
        "clean": f"classified as {true}, correctly", "adversarial": f"classified as {predicted}",
        "perturbation": f"magnified {times}, grey is 0", "restored": "the decoder's restored image",
    }  # fmt: skip
    tiles = tuple(
        Tile(
            f"δ {times}" if picture == "perturbation" else picture, f"Image {image.image}, {picture}: {alt[picture]}",
            uris.get((image.image, picture)),
        )
        for picture in image.pictures
    )  # fmt: skip
    outcome = f"{true} → {predicted}" if image.misclassified else f"{true}, still correct"
    caption = f"{outcome} · {image.attack}, eps {format_eps(image.eps)}, norm {image.distance:.3g}"
    return Thumbnail(tiles, caption, pixelated)


def _open(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                return None
            return picture.convert("L" if picture.mode == "L" else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # missing, truncated or not a picture
        return None


def _embed(pictures: dict[Key, Image.Image]) -> dict[Key, str]:
    """Return data: addresses at the largest size at which all fit; at the smallest, as many as fit."""
    uris: dict[Key, str] = {}
    for size in SIZES:
        uris = {key: _data_uri(picture, size) for key, picture in pictures.items()}
        if sum(map(len, uris.values())) <= MAX_BYTES:
            return uris
    totals = itertools.accumulate(map(len, uris.values()))
    return {key: uri for (key, uri), total in zip(uris.items(), totals, strict=True) if total <= MAX_BYTES}


def _data_uri(picture: Image.Image, size: int) -> str:
    """Return small pictures as PNG, larger ones reduced to `size` as WebP."""
    buffer = io.BytesIO()
    if max(picture.size) <= LOSSLESS_SIZE:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture = picture.convert("RGB")
        picture.thumbnail((size, size), Image.Resampling.LANCZOS)
        picture.save(buffer, "WEBP", quality=QUALITY)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
