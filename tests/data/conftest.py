"""Small folders of pictures, and a cache of their own for every test."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Painter = Callable[..., Path]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTFPD_CACHE", str(tmp_path_factory.mktemp("cache")))


@cache
def _jpeg(colour: tuple[int, int, int], width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(content, "JPEG", quality=95)
    return content.getvalue()


@pytest.fixture
def paint() -> Painter:
    """Write `count` JPEGs into each of `classes` below a folder; each picture has a brightness of its own."""

    def write(root: Path, classes: list[str] | tuple[str, ...], count: int = 10, side: int = 20) -> Path:
        for label, name in enumerate(classes):
            folder = root / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(1, count + 1):
                colour = (20 * (label % 12), 8 * number % 256, 60)
                (folder / f"image_{number:04}.jpg").write_bytes(_jpeg(colour, side + number % 3, side))
        return root

    return write


@pytest.fixture
def photograph() -> Image.Image:
    """A smooth picture of 90×60 pixels."""
    rows, columns = np.mgrid[0:60, 0:90]
    waves = [127 + 120 * np.sin(rows / a + columns / b) for a, b in ((9, 14), (17, 8), (11, 23))]
    return Image.fromarray(np.stack(waves, axis=2).astype(np.uint8))
