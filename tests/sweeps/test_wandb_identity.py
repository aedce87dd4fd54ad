"""What W&B is told about a cell: one group per sweep, tags, swept keys; one line for all where there is no key."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig

from subspace_lab.training.wandb_about import RunIdentity, identity


@pytest.fixture
def told(training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[RunIdentity]:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    found: list[RunIdentity] = []

    def figure(cfg: DictConfig) -> float:
        found.append(identity(cfg, Path(cfg.paths.output_dir), str(cfg.method.name)))
        return 0.0

    training.figure = figure
    return found


def test_cells_of_a_sweep_are_one_group(command, told: list[RunIdentity], tmp_path: Path) -> None:
    answer = command("-m", "method=galore,none", "optimizer.lr=1e-2", "tags=[mine]", "logger=both")
    (sweep,) = tmp_path.glob("outputs/*/sweeps/*")
    assert [one.group for one in told] == [f"galore+none_llama_tiny_stdlib_text-{sweep.name}"] * 2
    assert [one.config["sweep"] for one in told] == [{"method": "galore"}, {"method": "none"}]
    assert told[0].tags == ["galore", "llama_tiny", "stdlib_text", "adamw", "fit", "mine"]
    assert told[1].config["choices"]["method"] == "none" and told[1].config["optimizer"]["lr"] == 0.01
    assert all(one.in_sweep for one in told)
    lines = [line for line in answer.err.splitlines() if line.startswith("wandb:")]
    assert lines == [f"wandb: no API key, logging offline; upload later with: wandb sync {sweep}/*/wandb/offline-*"], (
        answer.err
    )


def test_a_single_run_is_grouped_by_name(command, told: list[RunIdentity]) -> None:
    answer = command("name=mine", f"tags=[{'x' * 80}]")
    (one,) = told
    assert (one.group, one.method, one.in_sweep) == ("mine", "galore", False) and "sweep" not in one.config
    assert one.tags[-1] == "x" * 64, "as long as wandb takes"
    assert "wandb" not in answer.err


@pytest.mark.slow
def test_swept_numbers_are_numbers(command, told: list[RunIdentity]) -> None:
    command("-m", "method.rank=4,8", "seed=0,1", "method.refresh_every=[10]")
    assert [one.config["sweep"] for one in told] == [
        {"method.rank": rank, "seed": seed} for rank in (4, 8) for seed in (0, 1)
    ]
