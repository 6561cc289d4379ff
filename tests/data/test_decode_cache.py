from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustfpd.data import decode_cache
from robustfpd.data.decode_cache import CachedImages, cached_images, images_folder
from robustfpd.data.image_files import Pixels
from robustfpd.errors import InputError

SHAPE = (10, 3, 4, 5)


def pictures(bad: tuple[int, ...] = ()) -> Iterator[Pixels | str]:
    for place in range(10):
        yield f"bad {place}" if place in bad else np.full(SHAPE[1:], place, dtype=np.uint8)


def never() -> Iterator[Pixels | str]:
    raise AssertionError("made anew")


def silent(done: int, total: int) -> None:
    pass


def make(
    folder: Path, source: Any = "x", bad: tuple[int, ...] = (), made: Any = None, progress: Any = silent
) -> CachedImages:
    return cached_images(folder, "small", {"files": source}, SHAPE, made or (lambda: pictures(bad)), progress)


def check(found: CachedImages, bad: tuple[int, ...] = ()) -> None:
    good = [place for place in range(10) if place not in bad]
    assert found.images.shape == (len(good), *SHAPE[1:])
    assert found.images[:, 0, 0, 0].tolist() == good
    assert found.bad == {place: f"bad {place}" for place in bad}


@pytest.mark.parametrize("bad", [(), (0,), (3, 9), tuple(range(10))])
def test_images_are_decoded_once_and_mapped_afterwards(tmp_path: Path, bad: tuple[int, ...]) -> None:
    check(make(tmp_path, bad=bad), bad)
    check(make(tmp_path, made=never), bad)
    assert [path.suffix for path in sorted(tmp_path.iterdir()) if path.suffix != ".lock"] == [".images"]


def test_another_source_has_another_file(tmp_path: Path) -> None:
    make(tmp_path, "x")
    check(make(tmp_path, "y", (2,)), (2,))
    check(make(tmp_path, "x", made=never))
    assert len(list(tmp_path.glob("*.images"))) == 2


def test_progress_is_called_after_each_decoded_image(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    for _ in range(2):
        make(tmp_path, bad=(4,), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 10) for done in range(1, 11)]


@pytest.mark.parametrize("kept_bytes", [0, 1, 30, 600, -1, -20])
def test_a_truncated_file_is_written_again(tmp_path: Path, kept_bytes: int) -> None:
    make(tmp_path)
    (path,) = tmp_path.glob("*.images")
    content = path.read_bytes()
    path.write_bytes(content[:kept_bytes])
    check(make(tmp_path))
    assert path.read_bytes() == content


@pytest.mark.parametrize("where", [0, 300, -10, -20, -40])
def test_a_damaged_file_is_written_again(tmp_path: Path, where: int) -> None:
    make(tmp_path)
    (path,) = tmp_path.glob("*.images")
    content = path.read_bytes()
    path.write_bytes(content[:where] + content[where:][7:])
    check(make(tmp_path))
    if where < 0:
        path.write_bytes(content[:where] + b"\xff" * 7 + content[where:][7:])
        check(make(tmp_path))
    assert path.read_bytes() == content


def test_writes_to_the_images_do_not_reach_the_file(tmp_path: Path) -> None:
    images = make(tmp_path).images
    images.fill_(77)
    again = make(tmp_path, made=never)
    check(again)
    assert not bool((again.images == 77).any())


def test_a_mapped_file_gives_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert float(make(tmp_path).images.float().mean()) == 4.5
    assert not recwarn.list


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, InputError])
def test_an_interrupted_write_leaves_no_file(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise error

    with pytest.raises(error):
        make(tmp_path, progress=interrupt)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    check(make(tmp_path))


def _dies_half_way(folder: Path) -> None:
    def die(done: int, total: int) -> None:
        if done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    make(folder, progress=die)


def _makes_slowly(folder: Path, barrier: Any, made: Any) -> None:
    def progress(done: int, total: int) -> None:
        made.value += 1
        time.sleep(0.01)

    barrier.wait()
    check(make(folder, progress=progress))


fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@fork
def test_a_killed_process_leaves_no_cache_file(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_dies_half_way, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob("*.images"))
    check(make(tmp_path))
    assert not list(tmp_path.glob("*.partial"))


@fork
def test_two_concurrent_processes_decode_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, made = context.Barrier(2), context.Value("i", 0)
    processes = [context.Process(target=_makes_slowly, args=(tmp_path, barrier, made)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert made.value == 10
    check(make(tmp_path, made=never))


def test_an_error_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"small \(0 MB\) cannot be kept in .*data.cache=FOLDER or ROBUSTFPD_CACHE"):
        make(tmp_path / "file" / "images")


def test_a_full_disk_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(decode_cache.os, "fsync", full)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"No space left on device\); give another folder with data.cache="):
        make(tmp_path)
    assert not list(tmp_path.glob("*.images"))
    assert not list(tmp_path.glob("*.partial"))


def test_a_read_only_cache_is_used(tmp_path: Path) -> None:
    make(tmp_path)
    for path in tmp_path.iterdir():
        path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        found = make(tmp_path, made=never)
        check(found)
        assert float(found.images.float().mean()) == 4.5
    finally:
        tmp_path.chmod(0o755)


def test_the_default_folder_is_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTFPD_CACHE", str(tmp_path / "c"))
    assert images_folder(None) == tmp_path / "c" / "images"
    assert images_folder(str(tmp_path / "d")) == tmp_path / "d" / "images"


def test_cached_pixels_equal_the_decoded_ones(tmp_path: Path) -> None:
    draws = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    found = make(tmp_path, made=lambda: iter(draws))
    assert torch.equal(found.images, torch.from_numpy(draws))
