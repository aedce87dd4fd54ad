"""The state of every random generator as plain containers: a resumed run draws what the uninterrupted one would.

Checkpoints are loaded with `weights_only=True`: tuples of Python's generator become lists, numpy's key becomes a
tensor.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def get_state() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators (CPU and every CUDA device in use)."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_state(state: dict[str, Any]) -> None:
    """Restore what `get_state` returned; CUDA states beyond the devices present are left out."""
    version, internal, gauss = state["python"]
    random.setstate((int(version), tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state.cpu(), device)


def seed(value: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
