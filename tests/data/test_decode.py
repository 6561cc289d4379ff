from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional

from robustfpd.data.image_files import AHEAD, covering, decode, decoded
from robustfpd.errors import InputError


def pixels(path: Path, size: tuple[int, int] = (24, 24)) -> np.ndarray:
    found = decode(path, size)
    assert isinstance(found, np.ndarray), found
    assert found.dtype == np.uint8
    assert found.shape == (3, *size)
    return found


def expected(picture: Image.Image, side: int) -> np.ndarray:
    """What torchvision makes of the picture."""
    rgb: Any = picture.convert("RGB")  # torchvision annotates tensors only
    whole = functional.center_crop(functional.resize(rgb, [side]), [side, side])
    return np.asarray(whole).transpose(2, 0, 1)


@pytest.mark.parametrize("side", [16, 24, 45, 60, 100])
@pytest.mark.parametrize("turned", [False, True])
def test_a_picture_is_resized_and_cropped_as_torchvision_does(
    tmp_path: Path, photograph: Image.Image, side: int, turned: bool
) -> None:
    picture = photograph.transpose(Image.Transpose.ROTATE_90) if turned else photograph
    picture.save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png", (side, side)), expected(picture, side))


@pytest.mark.parametrize("side", [8, 15, 30, 60])
def test_a_jpeg_decoded_at_a_smaller_scale_looks_the_same(tmp_path: Path, photograph: Image.Image, side: int) -> None:
    photograph.save(tmp_path / "a.jpg", quality=95)
    difference = pixels(tmp_path / "a.jpg", (side, side)).astype(int) - expected(Image.open(tmp_path / "a.jpg"), side)
    assert np.abs(difference).mean() < 4


def test_a_size_that_is_no_square_is_covered(tmp_path: Path, photograph: Image.Image) -> None:
    photograph.save(tmp_path / "a.png")  # 90×60
    assert np.array_equal(pixels(tmp_path / "a.png", (60, 30)), np.asarray(photograph).transpose(2, 0, 1)[:, :, 30:60])
    assert np.array_equal(pixels(tmp_path / "a.png", (20, 90)), np.asarray(photograph).transpose(2, 0, 1)[:, 20:40])


@settings(deadline=None, derandomize=True)
@given(*[st.integers(1, 400)] * 4)
def test_the_covering_size_covers_and_keeps_one_side(height: int, width: int, h: int, w: int) -> None:
    high, wide = covering(height, width, (h, w))
    assert high >= h
    assert wide >= w
    assert high == h or wide == w
    assert abs(high * width - wide * height) <= max(height, width)  # within a pixel of the proportions


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "palette with transparency"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 24, axis=0).repeat(12, axis=1))
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "palette with transparency":
        grey.convert("P").save(path, transparency=bytes([0] * 200 + [255] * 56))
    else:
        grey.convert(mode).save(path)
    found = pixels(path)
    assert found[:, :, :8].max() < 16
    assert found[:, :, 16:].min() > 239


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_become_eight_and_are_not_cut_off(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, 24).astype(np.uint16)
    Image.fromarray(np.repeat(values[None], 24, axis=0)).save(tmp_path / name)
    found = pixels(tmp_path / name)
    assert np.array_equal(found[0, 0], np.round(values / 257).astype(np.uint8))
    assert np.array_equal(found[0], found[2])


def test_bad_files_give_an_error(tmp_path: Path, photograph: Image.Image) -> None:
    photograph.save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    for name, bad in (
        ("half", content[: len(content) // 2]),
        ("empty", b""),
        ("text", b"no picture\n"),
        ("head", content[:20]),
    ):
        (tmp_path / f"{name}.jpg").write_bytes(bad)
        assert isinstance(decode(tmp_path / f"{name}.jpg", (8, 8)), str), name
    assert decode(tmp_path / "text.jpg", (8, 8)) == "not an image"
    assert "truncated" in str(decode(tmp_path / "half.jpg", (8, 8)))
    Image.fromarray(np.zeros((9, 9), dtype=np.float32)).save(tmp_path / "floats.tif")
    assert "floats" in str(decode(tmp_path / "floats.tif", (8, 8)))


def test_a_file_that_cannot_be_read_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone.jpg cannot be read: No such file"):
        decode(tmp_path / "gone.jpg", (8, 8))


def test_many_files_come_in_order(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (1, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), (2, 0, 0)).save(tmp_path / "b.png")
    (tmp_path / "c.png").touch()
    choice = torch.randint(0, 3, (AHEAD + 40,), generator=torch.Generator().manual_seed(0)).tolist()
    found = list(decoded([tmp_path / f"{'abc'[i]}.png" for i in choice], (4, 4)))
    assert [2 if isinstance(f, str) else int(f[0, 0, 0]) - 1 for f in found] == choice
