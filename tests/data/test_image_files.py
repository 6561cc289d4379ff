from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustfpd.data import image_files
from robustfpd.data.image_files import ORIENTATION, Picture, decode, decode_pictures, find_images, picture


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


def test_what_names_nothing_says_so(folder: Path) -> None:
    (folder / "empty").mkdir()
    found = names(folder, folder / "gone.png", f"{folder}/*.gif", folder / "empty")
    assert found[:2] == ["gone.png: no such file or folder", "*.gif: no file matches this pattern"]
    assert found[2].startswith("empty: no images in this folder (.jpg")
    (long,) = find_images(["x" * 5000])
    assert long.problem == "cannot be read: File name too long"


def test_a_name_may_hold_what_patterns_are_made_of(folder: Path) -> None:
    Image.new("RGB", (9, 9)).save(folder / "[a]*.png")
    assert names(folder, folder / "[a]*.png") == ["[a]*.png"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_camera_s_picture_is_turned_upright(
    tmp_path: Path, photograph: Image.Image, orientation: int, suffix: str
) -> None:
    turns = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
             5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
             8: Image.Transpose.ROTATE_270}  # fmt: skip
    as_held = photograph.transpose(turns[orientation]) if orientation in turns else photograph
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 95} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    as_held.save(tmp_path / f"a.{suffix}", exif=exif, **options)
    photograph.save(tmp_path / f"upright.{suffix}", **options)
    found, upright = (picture(tmp_path / f"{n}.{suffix}", (20, 30)) for n in ("a", "upright"))
    assert isinstance(found, Picture)
    assert isinstance(upright, Picture)
    apart = np.abs(found.pixels.astype(int) - upright.pixels)
    assert apart.mean() < (6 if suffix == "jpg" else 1)
    assert found.notes == (("turned upright",) if orientation > 1 and suffix != "tif" else ())


def test_changes_to_a_picture_are_noted(tmp_path: Path) -> None:
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


def test_grey_networks_see_the_luminance(tmp_path: Path, photograph: Image.Image) -> None:
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


def test_as_many_threads_as_cores_that_the_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: list[int]
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert all(isinstance(found, Picture) for found in decode_pictures(some(tmp_path, 9), (8, 8), 3))
    assert most == [1] * 8


@pytest.mark.parametrize(("size", "at_once"), [(100, 2), (200, 1)])
def test_large_pictures_wait_for_each_other(
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


def test_a_picture_of_30000_by_30000_pixels_is_refused_without_decoding(tmp_path: Path) -> None:
    found = one(bomb(tmp_path / "a.png", 30000, 30000))
    assert found == "too large to decode: more than 179 million pixels"


def test_a_line_is_not_blown_up(tmp_path: Path) -> None:
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
def test_damaged_camera_data_do_not_matter(tmp_path: Path, photograph: Image.Image) -> None:
    photograph.save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", quality=95)
    assert isinstance(decode(tmp_path / "a.jpg", (8, 8)), np.ndarray)
