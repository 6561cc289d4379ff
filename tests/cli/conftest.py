"""Fixtures of the commands' tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from robustfpd import device
from robustfpd.cli import main


@pytest.fixture(autouse=True)
def _quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry runs time each action once or twice."""
    monkeypatch.setattr(device, "TIMED_SECONDS", 0.02)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of the undefended baseline on digits; do not write to it."""
    run = tmp_path_factory.mktemp("cli") / "run"
    main(["train", "digits/mini", "training.epochs=1", "data.train_limit=128", "--baseline", "--out", str(run)])
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
