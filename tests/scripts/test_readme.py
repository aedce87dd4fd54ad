"""The README says what the repository does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from subspace_lab import catalog

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_configuration() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "readme_tables.py", "--check"], check=False)
    assert done.returncode == 0, "out of date: python scripts/readme_tables.py"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", TEXT))
    assert {"run", "test", "bench", "bench-gpu"} <= named <= targets


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target


COMMANDS = re.findall(r"^subspace-lab ([^#\n]+)", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    from subspace_lab.app import compose_config
    from subspace_lab.schema import validate

    assert len(COMMANDS) >= 5
    words = command.split()
    overrides = [w.split(",")[0] if words[0] == "-m" and "[" not in w else w for w in words if w != "-m"]
    for word in overrides:
        group, _, option = word.partition("=")
        assert "." in group or option in catalog.options(group) or group in catalog.root_keys(), word
    validate(compose_config(overrides))


def test_python_example_runs() -> None:
    import torch

    code = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)[0]
    model = torch.nn.Sequential(torch.nn.Linear(160, 200), torch.nn.Linear(200, 3))
    scope = {"model": model}
    exec(code, scope)
    before = model[0].weight.detach().clone()
    model(torch.randn(4, 160)).square().mean().backward()
    scope["optimizer"].step()  # type: ignore[attr-defined]
    assert scope["optimizer"].directions("0.weight")["basis"].shape == (160, 128)  # type: ignore[attr-defined]
    assert (model[0].weight - before).abs().max() > 0
