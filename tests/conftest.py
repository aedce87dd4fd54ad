"""What all tests share: no network, no scheduler's environment, and CUDA tests skipped where there is no CUDA."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# A machine that decides whether a change lands must decide the same twice; on a desk every run looks somewhere new.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Before any test module imports a hub client.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
for _name in [name for name in os.environ if name.startswith(("SLURM_", "SUBSPACE_DEBUG"))]:
    del os.environ[_name]


@pytest.fixture(autouse=True)
def _no_traceback_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that runs in the test's process tells its child processes its mode: not the next test's."""
    for name in ("SUBSPACE_DEBUG", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "0")  # so that what the command sets is undone
        monkeypatch.delenv(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
