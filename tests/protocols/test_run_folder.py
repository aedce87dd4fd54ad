"""A whole run through the command line: the folder it leaves, the baseline beside it, interruption in any part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_run_with_baseline_export_and_plot(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("compare=adamw") == 0
    run = tmp_path / "run"
    printed = capsys.readouterr()
    assert printed.out.rstrip().splitlines()[-1] == str(run)
    assert "galore" in printed.out and "adamw" in printed.out and "share of time in refreshes" in printed.out
    assert "Tip" not in printed.err and "GPU available" not in printed.err and "Warning" not in printed.err
    files = {p.name for p in run.iterdir()}
    assert {"results.json", "metrics.csv", "config.yaml", "config_hash", "command.txt", "environment.json"} <= files
    assert (run / "plots" / "loss.png").is_file()
    ours, baseline = results_of(run), results_of(run / "compare_adamw")
    assert ours["status"] == baseline["status"] == "completed"
    assert ours["compared_with"] == ["compare_adamw"]
    assert (ours["method"], baseline["method"], baseline["choices"]["optimizer"]) == ("galore", "none", "adamw")
    assert ours["metrics"]["optimizer/state_bytes"] < baseline["metrics"]["optimizer/state_bytes"]
    assert 0 < ours["metrics"]["subspace/captured_energy"] <= 1
    assert ours["timing"]["steps"] == baseline["timing"]["steps"] == 8
    assert ours["data"]["train"]["hash"] == baseline["data"]["train"]["hash"]
    assert "trainer.max_steps=8" in ours["overrides"] and ours["command"].startswith("subspace-lab data=text")
    check_export(run)


def check_export(run: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from subspace_lab.training import checkpoint

    model = AutoModelForCausalLM.from_pretrained(run / "export")
    trained = checkpoint.load(checkpoint.list_checkpoints(run)[0])["state_dict"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[f"model.{name}"]), name


def test_baseline_is_continued_without_repeating_the_run(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from subspace_lab import interrupt
    from subspace_lab.protocols.fit import Fit
    from subspace_lab.training.callbacks.method import MethodDriver

    end = MethodDriver.on_train_batch_end
    parts: list[str] = []
    fit = Fit.run

    def stop_in_baseline(self: Any, trainer: Any, module: Any, *args: Any) -> None:
        end(self, trainer, module, *args)
        if module.method.name == "none" and trainer.global_step == 5:
            interrupt.request.signal = 2

    def counted(self: Any, cfg: Any, run_dir: Path, **kwargs: Any) -> Any:
        parts.append(run_dir.name)
        return fit(self, cfg, run_dir, **kwargs)

    monkeypatch.setattr(Fit, "run", counted)
    with monkeypatch.context() as patch:
        patch.setattr(MethodDriver, "on_train_batch_end", stop_in_baseline)
        assert command("compare=adamw") == 130
    interrupt.request.signal = None
    run = tmp_path / "run"
    assert f"subspace-lab resume {run}" in capsys.readouterr().err
    assert results_of(run)["status"] == results_of(run / "compare_adamw")["status"] == "interrupted"
    assert results_of(run)["trained"] and not results_of(run / "compare_adamw")["trained"]
    assert parts == ["run", "compare_adamw"]
    assert command("resume", str(run)) == 0
    assert parts == ["run", "compare_adamw", "compare_adamw"]
    assert results_of(run)["status"] == results_of(run / "compare_adamw")["status"] == "completed"
    assert len((run / "compare_adamw" / "command.txt").read_text().splitlines()) == 2


def test_failures_are_recorded(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from subspace_lab.training.module import ExperimentModule

    def too_large(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    assert command("compare=null", "data.global_batch_size=6") == 2
    assert not (tmp_path / "run").exists(), "a mistake found before the first step leaves nothing behind"
    assert "data.batch_size=3 fits" in capsys.readouterr().err
    monkeypatch.setattr(ExperimentModule, "training_step", too_large)
    assert command("compare=null") == 2
    found = results_of(tmp_path / "run")
    assert found["status"] == "out_of_memory" and found["metrics"] == {}
    assert "data.batch_size" in capsys.readouterr().err


def test_wandb_never_stops_a_run(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def unreachable(**kwargs: Any) -> None:
        raise wandb.errors.CommError("could not reach api.wandb.ai")

    monkeypatch.setattr(wandb, "init", unreachable)
    assert command("compare=null", "logger=both", "export=false") == 0
    told = capsys.readouterr().err
    assert "could not reach api.wandb.ai; the run goes on without it" in told
    assert results_of(tmp_path / "run")["status"] == "completed"


def test_divergence_is_said(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("compare=null", "optimizer.lr=1e30", "export=false") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "note: not finite:" in out and "val/loss" in out and "try a smaller optimizer.lr" in out
    assert results_of(tmp_path / "run")["metrics"]["val/loss"] is None
