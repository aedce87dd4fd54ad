"""The launcher asks for what a batch script asks for; a launcher that is not installed is named with its package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hydra import initialize_config_module
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from subspace_lab import app
from subspace_lab.cluster import launchers
from subspace_lab.cluster.commands import written
from subspace_lab.errors import UserError


@contextmanager
def sweep(*words: str) -> Iterator[DictConfig]:
    with initialize_config_module("subspace_lab.conf", version_base="1.3", job_name="run"):
        hydra_app = GlobalHydra.instance().hydra
        assert hydra_app is not None
        yield hydra_app.compose_config("config", [*words, "hydra.sweep.dir=x"], RunMode.MULTIRUN, False, False)


def launcher(*words: str) -> dict[str, Any]:
    with sweep("hydra/launcher=submitit_slurm", "seed=0,1", *words) as cfg:
        found = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    "words",
    [
        ("cluster=a100", "cluster.account=me", "cluster.partition=gpu", "cluster.qos=low"),
        ("cluster=h100", "trainer=ddp", "trainer.num_nodes=2", "trainer.devices=4", "cluster.signal_seconds=90"),
        ("cluster=cpu", "trainer.accelerator=cpu", "cluster.time_minutes=90", "cluster.mem_gb_per_task=3"),
        ("cluster=a100", "cluster.requeue=false", "+cluster.env.A=b c", "+cluster.sbatch.mail-type=END"),
    ],
)
def test_a_job_of_a_sweep_asks_for_what_a_batch_script_asks_for(words: tuple[str, ...]) -> None:
    text = written(words, multirun=False, command="")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    ours = launcher(*words)
    for key, option in {
        "nodes": "nodes",
        "tasks_per_node": "ntasks-per-node",
        "gpus_per_node": "gpus-per-node",
        "cpus_per_task": "cpus-per-task",
        "partition": "partition",
        "account": "account",
        "qos": "qos",
        "constraint": "constraint",
    }.items():
        assert asked.get(option) == (None if ours[key] is None else str(ours[key])), key
    assert asked["signal"] == f"USR2@{ours['signal_delay_s']}"
    assert asked.get("mem") == (None if ours["mem_gb"] is None else f"{ours['mem_gb']}G")
    days, _, clock = asked["time"].rpartition("-")
    assert ours["timeout_min"] == int(days or 0) * 1440 + int(clock[:2]) * 60 + int(clock[3:5])
    assert all(option in asked for option in ours["additional_parameters"])
    assert all(line in text.splitlines() for line in ours["setup"])
    assert ours["max_num_timeout"] == (50 if "requeue" in asked else -1)


@pytest.mark.parametrize("name", ["local", "joblib", "submitit_slurm"])
def test_hydra_makes_every_launcher_of_ours(name: str) -> None:
    with sweep(f"hydra/launcher={name}", "seed=0,1") as cfg:
        hydra_app = GlobalHydra.instance().hydra
        assert hydra_app is not None
        context = HydraContext(config_loader=hydra_app.config_loader, callbacks=Callbacks())
        made = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=app.task, config=cfg)
    assert type(made).__name__ == {"local": "BasicLauncher", "joblib": "JoblibLauncher"}.get(name, "SlurmLauncher")


def test_a_launcher_without_its_package_or_slurm_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with sweep("hydra/launcher=joblib", "seed=0,1") as cfg:
        assert launchers.prepare(cfg, []) == []
        monkeypatch.setattr(launchers, "_installed", lambda module: False)
        with pytest.raises(UserError, match=r"hydra/launcher=joblib needs .*pip install hydra-joblib-launcher"):
            launchers.prepare(cfg, [])
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nowhere")
    with (
        sweep("hydra/launcher=submitit_slurm", "seed=0,1") as cfg,
        pytest.raises(UserError, match=r"needs SLURM.*hydra/launcher=joblib"),
    ):
        launchers.prepare(cfg, [])


def test_a_published_number_of_gpus_comes_with_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers.shutil, "which", lambda name: name)
    words = ["hydra/launcher=submitit_slurm", "experiment=gcr_resnet50d", "cluster=a100", "seed=0,1"]
    with sweep(*words) as cfg:
        assert launchers.prepare(cfg, words) == ["trainer.devices=8"]
        assert launchers.prepare(cfg, [*words, "trainer.devices=1"]) == []
