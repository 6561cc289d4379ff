"""Provenance of a result: weights, package versions, machine, revision, command."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = (
    "robustfpd", "torch", "torchvision", "timm", "lightning", "numpy", "scikit-learn", "pyautoattack", "foolbox",
    "adversarial-robustness-toolbox",
)  # fmt: skip


def weights_sha256(module: nn.Module) -> str | None:
    """Return the SHA-256 of a module's parameters and buffers; None for sparse or quantised tensors.

    The hash includes names, types, shapes and values, so a model and its `classifier()` have different hashes.
    """
    digest = hashlib.sha256()
    state = module.state_dict()
    try:
        for name in sorted(state):
            if isinstance(state[name], Tensor):
                values = state[name].detach().cpu().contiguous()
                digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
                digest.update(values.reshape(-1).view(torch.uint8).numpy())  # bfloat16 has no numpy type of its own
    except (RuntimeError, TypeError):  # no view as bytes
        return None
    return digest.hexdigest()


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return versions, machine, device, git revision and command line."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_revision": _git_revision(),
        "command": _command(),
    }


def _command() -> str | None:
    """Return the command line; None if this process is another program."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    is_robustfpd = program.stem == "robustfpd" or program.parts[-2:] == ("robustfpd", "__main__.py")
    return shlex.join(["robustfpd", *sys.argv[1:]]) if is_robustfpd else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Return the revision of the git checkout that tracks this file, marked if it has changes; else None."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
