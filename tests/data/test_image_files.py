from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torchvision.transforms import functional

from robustfpd.data import image_files
from robustfpd.data.image_files import AHEAD, Picture, covering, decode_pictures, decode_pixels, find_images, picture
from robustfpd.errors import InputError


def pixels(path: Path, size: tuple[int, int] = (24, 24)) -> np.ndarray:
    found = picture(path, size)
    assert isinstance(found, Picture), found
    assert found.pixels.dtype == np.uint8
    assert found.pixels.shape == (3, *size)
    return found.pixels


def expected(picture: Image.Image, side: int) -> np.ndarray:
    """What torchvision makes of the picture."""
    rgb: Any = picture.convert("RGB")  # torchvision annotates tensors only
    cropped = functional.center_crop(functional.resize(rgb, [side]), [side, side])
    return np.asarray(cropped).transpose(2, 0, 1)


@pytest.mark.parametrize("side", [16, 24, 45, 60, 100])
@pytest.mark.parametrize("turned", [False, True])
def test_a_picture_is_resized_and_cropped_as_torchvision_does(
    tmp_path: Path, photograph: Image.Image, side: int, turned: bool
) -> None:
    image = photograph.transpose(Image.Transpose.ROTATE_90) if turned else photograph
    image.save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png", (side, side)), expected(image, side))


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
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, name: str) -> None:
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
        assert isinstance(picture(tmp_path / f"{name}.jpg", (8, 8)), str), name
    assert picture(tmp_path / "text.jpg", (8, 8)) == "not an image"
    assert "truncated" in str(picture(tmp_path / "half.jpg", (8, 8)))
    Image.fromarray(np.zeros((9, 9), dtype=np.float32)).save(tmp_path / "floats.tif")
    assert "floats" in str(picture(tmp_path / "floats.tif", (8, 8)))


def test_a_file_that_cannot_be_read_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone.jpg cannot be read: No such file"):
        picture(tmp_path / "gone.jpg", (8, 8))


def test_many_files_come_in_order(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (1, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), (2, 0, 0)).save(tmp_path / "b.png")
    (tmp_path / "c.png").touch()
    choice = torch.randint(0, 3, (AHEAD + 40,), generator=torch.Generator().manual_seed(0)).tolist()
    found = list(decode_pixels([tmp_path / f"{'abc'[i]}.png" for i in choice], (4, 4)))
    assert [2 if isinstance(f, str) else int(f[0, 0, 0]) - 1 for f in found] == choice


def one(path: Path, size: tuple[int, int] = (8, 8), channels: int = 3) -> Picture | str:
    (found,) = decode_pictures([path], size, channels)
    return found


def notes(path: Path) -> tuple[str, ...]:
    found = one(path)
    assert isinstance(found, Picture), found
    return found.notes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png, b/a.png, b/c.JPG; hidden ones and a text beside."""
    (tmp_path / "b" / ".hidden").mkdir(parents=True)
    for name in ("a.png", "b/a.png", "b/c.JPG", "b/.hidden/d.png", ".e.png"):
        Image.new("RGB", (9, 9), (10, 20, 30)).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def names(folder: Path, *given: str | Path) -> list[str]:
    return [str(f.path.relative_to(folder)) + (f": {f.problem}" if f.problem else "") for f in find_images(given)]


def test_paths_folders_and_patterns_name_files(folder: Path) -> None:
    assert names(folder, folder) == ["a.png", "b/a.png", "b/c.JPG"]
    assert names(folder, folder / "a.png", folder) == ["a.png", "b/a.png", "b/c.JPG"]
    assert names(folder, f"{folder}/*.png") == ["a.png"]
    assert names(folder, f"{folder}/**/*.png") == ["a.png", "b/a.png"]
    assert names(folder, f"{folder}/[b]") == ["b/a.png", "b/c.JPG"]
    assert names(folder, folder / "notes.txt") == ["notes.txt"]


def test_arguments_without_files_are_returned_with_their_problem(folder: Path) -> None:
    (folder / "empty").mkdir()
    found = names(folder, folder / "gone.png", f"{folder}/*.gif", folder / "empty")
    assert found[:2] == ["gone.png: no such file or folder", "*.gif: no file matches this pattern"]
    assert found[2].startswith("empty: no images in this folder (.jpg")
    (long,) = find_images(["x" * 5000])
    assert long.problem == "cannot be read: File name too long"


def test_file_names_may_contain_pattern_characters(folder: Path) -> None:
    Image.new("RGB", (9, 9)).save(folder / "[a]*.png")
    assert names(folder, folder / "[a]*.png") == ["[a]*.png"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, photograph: Image.Image, orientation: int, suffix: str) -> None:
    turns = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
             5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
             8: Image.Transpose.ROTATE_270}  # fmt: skip
    as_held = photograph.transpose(turns[orientation]) if orientation in turns else photograph
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"quality": 95} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    as_held.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    photograph.save(tmp_path / f"upright.{suffix}", **options)
    found, upright = (picture(tmp_path / f"{n}.{suffix}", (20, 30)) for n in ("a", "upright"))
    assert isinstance(found, Picture)
    assert isinstance(upright, Picture)
    apart = np.abs(found.pixels.astype(int) - upright.pixels)
    assert apart.mean() < (6 if suffix == "jpg" else 1)
    assert found.notes == (("turned upright",) if orientation > 1 and suffix != "tif" else ())


def test_changes_to_an_image_are_noted(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 81).astype(np.uint16).reshape(9, 9)
    Image.fromarray(grey).save(tmp_path / "sixteen.png")
    Image.new("RGBA", (9, 9), (200, 10, 10, 0)).save(tmp_path / "clear.png")
    frames = [Image.new("L", (9, 9), level) for level in (10, 250)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(tmp_path / "inks.jpg")
    assert notes(tmp_path / "sixteen.png") == ("16 bits cut to 8",)
    assert notes(tmp_path / "clear.png") == ("transparency dropped",)
    assert notes(tmp_path / "moves.gif") == ("first frame of an animation",)
    assert notes(tmp_path / "inks.jpg") == ()
    moves, inks, clear = (one(tmp_path / name) for name in ("moves.gif", "inks.jpg", "clear.png"))
    assert isinstance(moves, Picture)
    assert isinstance(inks, Picture)
    assert isinstance(clear, Picture)
    assert abs(int(moves.pixels.mean()) - 10) < 3  # the first
    assert inks.pixels[0].min() > 200  # red
    assert inks.pixels[1:].max() < 60
    assert clear.pixels[0].min() == 200  # as the data sets show it, not white


def test_grey_networks_get_the_luminance(tmp_path: Path, photograph: Image.Image) -> None:
    photograph.crop((0, 0, 60, 60)).save(tmp_path / "a.png")
    found = one(tmp_path / "a.png", (60, 60), channels=1)
    assert isinstance(found, Picture)
    assert np.array_equal(found.pixels[0], np.asarray(photograph.crop((0, 0, 60, 60)).convert("L")))


def test_bad_files_are_reported_and_the_others_are_read(tmp_path: Path, photograph: Image.Image) -> None:
    photograph.save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    os.mkfifo(tmp_path / "pipe.png")
    files = [tmp_path / f"{n}.png" for n in ("cut", "empty", "text", "pipe", "gone", "whole")]
    *bad, good = decode_pictures(files, (8, 8), 3)
    assert isinstance(good, Picture)
    assert ["truncated" in str(bad[0]), *bad[1:]] == [
        True, "the file is empty", "not an image", "not a regular file", "not a regular file",
    ]  # fmt: skip


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures were decoded at once, each time that one was begun; each takes a while."""
    running, seen, lock, original = [0], list[int](), threading.Lock(), picture

    def slowly(path: Path, size: tuple[int, int]) -> Picture | str:
        with lock:
            running[0] += 1
            seen.append(running[0])
        time.sleep(0.02)
        try:
            return original(path, size)
        finally:
            with lock:
                running[0] -= 1

    monkeypatch.setattr(image_files, "picture", slowly)
    return seen


def some(folder: Path, size: int) -> list[Path]:
    for place in range(8):
        Image.new("RGB", (size, size)).save(folder / f"{place}.png")
    return sorted(folder.glob("*.png"))


def test_threads_are_limited_to_the_available_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: list[int]
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert all(isinstance(found, Picture) for found in decode_pictures(some(tmp_path, 9), (8, 8), 3))
    assert most == [1] * 8


@pytest.mark.parametrize(("size", "at_once"), [(100, 2), (200, 1)])
def test_decoding_in_parallel_is_limited_by_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: list[int], size: int, at_once: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(image_files, "AT_ONCE", 100_000, raising=False)  # 40 kB and 160 kB as they are decoded
    found = list(decode_pictures([*some(tmp_path, size), tmp_path / "gone.png"], (8, 8), 3))
    assert [isinstance(one, Picture) for one in found] == [True] * 8 + [False]
    assert max(most) == at_once


def bomb(path: Path, width: int, height: int) -> Path:
    """A small PNG that says it is large."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes((width + 7) // 8 + 1) * 100) for _ in range(height // 100)) + packer.flush()
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_an_image_of_30000_by_30000_pixels_is_not_decoded(tmp_path: Path) -> None:
    found = one(bomb(tmp_path / "a.png", 30000, 30000))
    assert found == "too large to decode: more than 179 million pixels"


def test_very_narrow_images_are_not_upscaled(tmp_path: Path) -> None:
    Image.new("L", (60000, 1)).save(tmp_path / "a.png")
    assert one(tmp_path / "a.png", (224, 224)) == "60000×1 pixels are too long and narrow to cover 224×224"


def test_files_and_memory_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    monkeypatch.setattr(image_files, "LARGEST_FILE", 10)
    assert "more than 1 GB" in str(one(tmp_path / "a.png"))
    monkeypatch.setattr(image_files, "LARGEST_FILE", 2**30)

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(image_files, "_rgb", full)
    assert "not enough memory" in str(one(tmp_path / "a.png"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_are_ignored(tmp_path: Path, photograph: Image.Image) -> None:
    photograph.save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", quality=95)
    assert isinstance(picture(tmp_path / "a.jpg", (8, 8)), Picture)
