"""What a run ran on: versions, device, cores, git revision."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "subspace-lab",
    "torch",
    "lightning",
    "transformers",
    "datasets",
    "hydra-core",
    "omegaconf",
    "numpy",
    "torchao",
    "wandb",
)


def capture() -> dict[str, Any]:
    """Return the environment as plain values; nothing that is not installed is imported to find out."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "gpus": torch.cuda.device_count() if cuda else 0,
        "cuda": torch.version.cuda if cuda else None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git": git_revision(Path(__file__).resolve().parent),
        "executable": Path(sys.executable).name,
    }


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Return {"revision", "dirty"} of the git checkout that holds `folder`; None for an installed package."""
    revision = _git(folder, "rev-parse", "HEAD")
    if revision is None or _git(folder, "ls-files", "--error-unmatch", "environment.py") is None:
        return None  # no checkout, no commit yet, or an environment folder inside somebody else's checkout
    return {
        "revision": revision,
        "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
