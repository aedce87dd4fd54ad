"""What protocols do with two processes, and which of them refuse: in one line, before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed.cases import DIGITS, MLP, TWO
from distributed.harness import Hang, Processes, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REFUSED = {
    "federated": (
        ("method=fedavg", "federation.clients=2", "model.hidden=[8]"),
        "protocol=federated runs in one process; trainer.devices=1",
    ),
    "evolution": (
        ("protocol=evolution", "method=none", "data=cartpole", "model=policy_fc"),
        "reinforcement learning runs in one process; use trainer.devices=1",
    ),
    "dqn": (
        ("protocol=dqn", "method=none", "data=cartpole", "model=policy_fc"),
        "reinforcement learning runs in one process; use trainer.devices=1",
    ),
    "search_in_workers": (
        ("method=intrinsic_dimension", "protocol.launcher=joblib"),
        "runs cells of one process each; trainer.devices=1, or protocol.launcher=local",
    ),
    "per_layer": (
        ("method=galore", "method.per_layer=true"),
        "several processes; use trainer.devices=1 or method.per_layer=false",
    ),
    "sharded_tasks": (
        ("method=gpm", "trainer.strategy=fsdp"),
        "cannot run under FSDP, which cuts the matrices it needs; use trainer=ddp",
    ),
    "sweep": (("-m", "seed=0,1"), "cannot be part of a local sweep: every process would repeat the whole sweep"),
    "global_batch": (
        ("method=galore", "data.batch_size=4", "data.global_batch_size=10"),
        "is not a multiple of data.batch_size=4 × 2 processes; data.batch_size=1 fits",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_needs_one_process_says_so(name: str, processes: Processes) -> None:
    words, line = REFUSED[name]
    told = processes.run(name, {"pair": [*words, *TWO, "compare=null"]}, do="command")
    for rank in ("rank0", "rank1"):
        said = Path(told[rank]["log"]).read_text()
        assert told[rank]["code"] == 2, said
        errors = [text for text in said.splitlines() if text.startswith("error:")]
        assert len(errors) == 1 and line in errors[0], said
    assert not (processes.place(name, "pair") / "metrics.csv").exists()


def test_a_dimension_search_trains_its_cells_together(processes: Processes) -> None:
    words = ["method=intrinsic_dimension", *MLP, "protocol.grid=[5,20]", "protocol.seeds=1", "protocol.lr_factors=[1]"]
    words += ["protocol.bootstrap=10", f"paths.output_root={processes.folder}/search"]
    jobs = {
        "alone": ["name=one", "trainer=cpu", "data.batch_size=20"],
        "pair": ["name=two", *TWO, "data.batch_size=10"],
    }
    told = processes.run("search", {team: [*words, *more] for team, more in jobs.items()}, do="command")
    assert [answer["code"] for answer in told.values()] == [0, 0, 0], Path(told["rank0"]["log"]).read_text()
    one, two = (json.loads((processes.place("search", team) / "results.json").read_text())["search"] for team in jobs)
    assert without_clock(one) == without_clock(two)


def without_clock(value: Any) -> Any:
    """The section with its numbers to five digits, without seconds and the cells' names."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k not in ("seconds", "name", "cells", "keys", "key")}
    if isinstance(value, list):
        return [without_clock(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def test_batch_norm_has_one_set_of_statistics(processes: Processes) -> None:
    """Each process normalises by its own batch; all are judged, saved and continued with the first one's statistics."""
    words = ["model=gpm_resnet18", "model.width=2", "model.running_statistics=true", "data.image_size=16", *DIGITS]
    fit = [
        "method=none",
        "data=digits",
        *words,
        "trainer.max_steps=3",
        "trainer.val_every=2",
        "data.train_fraction=0.2",
    ]
    tasks = ["method=naive", "data=split_digits", "scenario.tasks=2", *words, "trainer.max_steps=3"]
    for name, kind in {"norm_fit": fit, "norm_tasks": tasks}.items():
        told = processes.run(name, {"pair": [*kind, *TWO, "data.batch_size=8"]})
        first, second = told["rank0"], told["rank1"]
        assert "error" not in first, first["traceback"]
        assert first["trained_digests"] == second["trained_digests"] != [], name


def test_the_command_writes_one_folder(processes: Processes) -> None:
    """The whole command line with a baseline: two trainings, one results.json, one line for the user."""
    words = ["method=galore", "model=mlp", "data=digits", "method.targets=all-linear", *MLP[2:], "compare=adamw"]
    told = processes.run("command", {"pair": [*words, "method.rank=4", *TWO, "data.batch_size=8"]}, do="command")
    assert [answer["code"] for answer in told.values()] == [0, 0], Path(told["rank0"]["log"]).read_text()
    place = processes.place("command", "pair")
    results = json.loads((place / "results.json").read_text())
    assert results["status"] == "completed" and results["compared_with"] == ["compare_adamw"]
    assert len(rows(place)) == len(rows(place / "compare_adamw")) == 8
    assert str(place) in Path(told["rank0"]["log"]).read_text()
    assert str(place) not in Path(told["rank1"]["log"]).read_text()


def test_a_hang_names_the_case_and_shows_where_everybody_stands(tmp_path: Path) -> None:
    own = Processes(tmp_path)
    with pytest.raises(Hang, match=r"(?s)stuck: no answer from rank1.*stacks-rank1.txt.*in wait_for_ever"):
        own.run("stuck", {"pair": []}, do="hang", seconds=3)
    own.close()
