"""Fixtures that several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _threads() -> None:
    """One thread: the tensors are tiny, and threads wait for each other where other work runs beside the tests."""
    torch.set_num_threads(1)


@pytest.fixture
def mnist_root() -> Path:
    """Folder with the real MNIST; the test is skipped where it is absent."""
    root = SHARED / "data"
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip("no MNIST beside the project")
    return root
