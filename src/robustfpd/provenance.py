"""What a result depends on: weights, package versions, machine, revision, command."""

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
    """SHA-256 of a module's parameters and buffers: names, types, shapes, values; None where they are not plain bytes.

    Names count: compare what two classifiers give, not a model with the classifier around it.
    """
    digest = hashlib.sha256()
    state = module.state_dict()
    try:
        for name in sorted(state):
            if isinstance(state[name], Tensor):
                values = state[name].detach().cpu().contiguous()
                digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
                digest.update(values.reshape(-1).view(torch.uint8).numpy())  # bfloat16 has no numpy type of its own
    except (RuntimeError, TypeError):  # sparse and quantised tensors
        return None
    return digest.hexdigest()


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, machine, device, git revision, and the command that was typed."""
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
    """What was typed, where this process is our command line."""
    called = Path(sys.argv[0]) if sys.argv else Path()
    ours = called.stem == "robustfpd" or called.parts[-2:] == ("robustfpd", "__main__.py")
    return shlex.join(["robustfpd", *sys.argv[1:]]) if ours else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Revision of the checkout that tracks this file, marked when it has changes; None when installed elsewhere."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
