"""Where evaluations may lie. Needs no torch, so that a name that is nothing is refused at once."""

from __future__ import annotations

from pathlib import Path

from robustfpd.errors import InputError, unknown_name
from robustfpd.models import zoo

RUNS = Path("runs")


def check_place(given: str | Path) -> None:
    """Refuse what is neither a folder, a record nor a network that comes with robustfpd, with the nearest names."""
    path = Path(given)
    if (path.is_file() and path.suffix == ".json") or str(given) in zoo.names():
        return
    if path.is_dir():
        signs = (path / "config.yaml", path / "config.json", path / "evaluation")
        if any(sign.exists() for sign in signs) or any(path.glob("*.json")) or any(path.glob("*.ledger.csv")):
            return
        raise InputError(f"{path} is no run and holds no evaluation: no config.yaml, config.json or record in it")
    near = [str(p.parent) for p in RUNS.glob("*/config.yaml")]
    raise unknown_name("run or network", str(given), [*near, *zoo.names()])


def results_of(network: str) -> Path:
    """Where evaluations of a network that comes with robustfpd go."""
    return RUNS / f"{network.replace('/', '-')}-evaluation"
