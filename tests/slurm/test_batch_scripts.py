"""What `subspace-lab sbatch` writes, and that slurm/ is what it writes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest
from hydra import initialize_config_module
from slurm.cluster_harness import ROOT, load_script

from subspace_lab.cluster.commands import written
from subspace_lab.errors import UserError

templates = load_script("slurm_templates")
SCRIPTS = templates.scripts()
EXPERIMENTS = sorted(name for name in SCRIPTS if name.startswith("experiments/"))


@pytest.fixture(scope="module", autouse=True)
def initialized() -> Iterator[None]:
    """Hydra once for all of them: starting it is what costs."""
    with initialize_config_module("subspace_lab.conf", version_base="1.3", job_name="run"):
        yield


def options(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))


def write(*words: str, multirun: bool = False) -> str:
    return written(words, multirun=multirun, command="subspace-lab sbatch …")


def stale(names: list[str]) -> list[str]:
    return [name for name in names if (ROOT / "slurm" / name).read_text() != templates.text(name, *SCRIPTS[name])]


def test_slurm_holds_a_script_for_each_template_and_experiment() -> None:
    there = {path.relative_to(ROOT / "slurm").as_posix() for path in (ROOT / "slurm").rglob("*.sbatch")}
    assert there == set(SCRIPTS), "make slurm"


def test_templates_and_some_experiments_are_up_to_date() -> None:
    assert stale([name for name in SCRIPTS if name not in EXPERIMENTS] + EXPERIMENTS[::40]) == [], "make slurm"


@pytest.mark.slow
def test_every_experiment_is_up_to_date() -> None:
    assert stale(EXPERIMENTS) == [], "make slurm"


def test_a_run_asks_for_a_process_for_each_device() -> None:
    text = write("trainer=ddp", "trainer.num_nodes=2", "trainer.devices=4", "cluster=h100", "cluster.account=me")
    asked = options(text)
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "4", "4")
    assert (asked["cpus-per-task"], asked["mem"], asked["time"]) == ("12", "480G", "1-00:00:00")
    assert asked["signal"] == "USR2@300" and asked["account"] == "me" and "requeue" in asked
    assert "ntasks" not in asked and "MASTER" not in text and "partition" not in asked
    assert text.endswith(
        "exec srun --kill-on-bad-exit=1 subspace-lab trainer=ddp trainer.num_nodes=2 trainer.devices=4 "
        'cluster=h100 cluster.account=me "$@"\n'
    )


def test_all_gpus_of_a_node_and_none() -> None:
    assert options(write("trainer=ddp", "cluster=a100", "cluster.gpus_per_node=4"))["ntasks-per-node"] == "4"
    for words in (["trainer=cpu"], ["cluster=cpu"], ["trainer.accelerator=cpu", "trainer.devices=2"]):
        asked = options(write(*words))
        assert "gpus-per-node" not in asked and asked["ntasks-per-node"] == ("2" if "devices" in words[-1] else "1")


def test_an_experiment_takes_the_gpus_it_was_published_with_unless_told() -> None:
    text = write("experiment=gcr_resnet50d", "cluster=a100")
    assert options(text)["ntasks-per-node"] == "8" and " trainer.devices=8 " in text
    text = write("experiment=gcr_resnet50d", "cluster=a100", "trainer.devices=2")
    assert options(text)["ntasks-per-node"] == "2"
    text = write("experiment=gcr_resnet50d", "cluster=a100", "cluster.gpus_per_node=4")
    assert (options(text)["nodes"], options(text)["ntasks-per-node"]) == ("2", "4")
    assert " trainer.devices=4 trainer.num_nodes=2 " in text


def test_an_array_has_a_task_for_each_cell_in_the_order_of_a_sweep() -> None:
    text = write("method=galore,none", "seed=range(3,5)", "tags=[a b]", multirun=True)
    assert options(text)["array"] == "0-3%32"
    cells = re.findall(r"^  (\d+)\) cell=\((.*)\) ;;$", text, re.MULTILINE)
    assert cells == [
        ("0", "method=galore seed=3"),
        ("1", "method=galore seed=4"),
        ("2", "method=none seed=3"),
        ("3", "method=none seed=4"),
    ]
    assert "folder=outputs/galore+none_llama_tiny_stdlib_text/sweeps/" in text
    assert " 'tags=[a b]' " in text and " compare=null " in text


@pytest.mark.slow
def test_a_search_file_is_a_grid_too() -> None:
    text = write("hparams_search=rank_grid")
    assert len(re.findall(r"^  \d+\) cell=", text, re.MULTILINE)) > 2
    assert " hydra.mode=RUN " in text


def test_site_settings_are_written_where_they_belong() -> None:
    text = write("+cluster.env.NCCL_DEBUG=WARN and more", "+cluster.sbatch.exclusive=true", "cluster.requeue=false")
    asked = options(text)
    assert "exclusive" in asked and "no-requeue" in asked and "requeue" not in asked
    assert "export NCCL_DEBUG='WARN and more'\n" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer=ddp", "trainer.devices=16", "cluster=a100"], "trainer.devices=8 trainer.num_nodes=2"),
        (["trainer.devices=3", "data.global_batch_size=64", "data.batch_size=16"], "multiple"),
        (["cluster.time_minutes=2"], "cluster.signal_seconds=180"),
        (["cluster=b100"], "did you mean"),
        (["method=galor"], "did you mean 'galore'"),
        (["seed=0,1"], "add -m"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        write(*words)
    assert said in str(caught.value)


def test_an_array_has_one_shape() -> None:
    with pytest.raises(UserError, match="the tasks of an array ask for the same"):
        write("trainer.devices=1,2", multirun=True)


def test_an_adaptive_sweep_is_no_array() -> None:
    with pytest.raises(UserError, match="submitit_slurm"):
        write("hydra/sweeper=optuna", "seed=range(0,3)", multirun=True)
