"""`protocol=federated` from the command line: what goes into a run folder, what is refused, and resuming."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace_lab import cli
from subspace_lab.training import checkpoint

QUICK = ["federation.rounds=3", "scenario.tasks=3", "data.batch_size=50", "trainer.progress=off"]
SAVED = ["trainer.checkpoint_every=1", "trainer.keep_checkpoints=99"]


def run(folder: Path, *words: str, name: str = "run", code: int = 0) -> Path:
    with contextlib.chdir(folder):
        assert cli.main([*words, f"hydra.run.dir={folder / name}"]) == code
    return folder / name


def results(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "results.json").read_text())
    return found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method=fot", "protocol=continual"], "runs with protocol=federated, not with protocol=continual"),
        (["method=gpm", "protocol=federated"], "runs with protocol=continual, not with protocol=federated"),
        (["method=none", "protocol=federated", "federation=clients_10"], "method=none does not aggregate"),
        (["method=gpm", "federation=clients_10"], "federation is for protocol=federated"),
        (["method=fot", "~federation"], "protocol=federated needs clients.*federation=clients_10"),
        (["method=fot", "federation=clients_12"], "did you mean 'clients_1"),
        (["method=fto"], "did you mean 'fot'"),
        (["method=fot", "federation.client=5"], "did you mean 'federation.clients'"),
        (["method=fot", "federation.partition=noniid"], "federation.partition"),
        (["method=fot", "federation.clients=5000"], "5000 clients cannot share 1293 training examples"),
        (["method=fot", "federation.rounds=[1,2]"], "is of 2 tasks, and there are 5"),
        (["method=fot", "trainer.max_steps=10"], "trainer.max_steps is of training in one place.*federation.rounds"),
        (["method=fot", "trainer.precision=bf16-true"], "bf16-true: updates are averaged in float32"),
        (["method=fot", "trainer=ddp", "trainer.devices=2"], "runs in one process"),
        (["method=fot", "callbacks=ema"], "are Lightning's"),
        (["method=fot", "data.mixup=0.2"], "clients do not mix examples"),
        (["method=fot", "data=stdlib_text"], "divides labelled examples"),
        (["method=fot", "method.targets=[conv]"], "conv"),
        (["method=fedavg", "federation.participation=0"], "federation.participation=0"),
        (["method=fedavg", "data=split_cifar100", "data.data_dir=/no/such"], "data=cifar100: neither"),
        (["method=fedgp", "method.target=10", *QUICK], "method.target=10: expected 0 to 9"),
        (["method=bulyan", "method.f=2", *QUICK], "method.f=2: bulyan needs at least 4 f . 3 = 11 participants"),
        (["method=fedavg", "optimizer.lr=1e30", *QUICK], "round 1: the aggregated update is not finite"),
    ],
)
def test_a_mistake_gets_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with contextlib.chdir(tmp_path):
        assert cli.main([*words]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and not any("Traceback" in line for line in lines)
    assert re.search(told, errors[0]), errors[0]


def test_a_run_folder_says_who_had_what_and_what_was_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["method=fot", "federation.participation=4", "federation.partition=shards", "federation.weighting=samples"]
    place = run(tmp_path, *words, *QUICK, "trainer.val_every=1")
    found = results(place)
    metrics, section = found["metrics"], found["federated"]
    for name in ("final_accuracy", "forgetting", "forgetting_since_learned", "backward_transfer"):
        assert name in metrics and name in section["definitions"]
    n = sum((64 * 100, 100, 100 * 100, 100, 100 * 10, 10))
    assert metrics["model/parameters"] == n and metrics["communication/round_bytes"] == 2 * 4 * 4 * n
    ends = section["task_end_bytes"]
    sketches = 4 * (5 * (64 * 64 + 2 * 100 * 100) + 12)  # of one client: 5 d² for each layer, and four energies
    ranks = [{"1": 0, "3": 0, "5": 0}, *found["continual"]["ranks"]]
    d = {"1": 64, "3": 100, "5": 100}
    for end, before in zip(ends, ranks, strict=False):
        assert end == 4 * (4 * n + sketches + 4 * sum(d[path] * k for path, k in before.items()))
    assert metrics["communication/up_bytes"] + metrics["communication/down_bytes"] == 9 * 8 * 4 * n + sum(ends)
    assert metrics["server/seconds"] > 0 and metrics["clients/seconds"] > 0
    assert section["partition"] == "shards" and section["rounds"] == [3, 3, 3] and section["participants"] == 4
    assert found["continual"]["ranks"][-1]["1"] > found["continual"]["ranks"][0]["1"] > 0
    assert found["objective"] == "final_error" and found["timing"]["steps"] == 9
    partition = json.loads((place / "partition.json").read_text())
    assert partition["hash"] == section["partition_hash"] and len(partition["tasks"]) == 3
    clients = partition["tasks"][1]["clients"]
    assert sum(client["examples"] for client in clients) == 1293
    assert all(sum(client["labels"].values()) == client["examples"] for client in clients)
    rounds = [json.loads(line) for line in (place / "rounds.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rounds] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(len(row["clients"]) == 4 for row in rounds) and rounds[0]["clients"] != rounds[1]["clients"]
    with (place / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["val/accuracy"]] == [str(k) for k in range(1, 10)]
    assert (place / "plots" / "accuracy_matrix.png").stat().st_size > 5000
    assert (place / "plots" / "loss.png").stat().st_size > 5000
    assert (place / "export" / "model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert "final accuracy" in printed and "bytes" in printed


def test_one_task_without_a_scenario_and_heads_of_many(tmp_path: Path) -> None:
    single = results(
        run(
            tmp_path,
            "method=fedavg",
            "data=digits",
            "federation.rounds=15",
            "optimizer.lr=0.1",
            "data.batch_size=32",
            "trainer.progress=off",
        )
    )
    assert single["metrics"]["final_accuracy"] > 0.9 and "continual" not in single
    assert "forgetting" not in single["metrics"]
    words = ["method=fot", "data=split_digits", "data.batch_size=20", "federation.rounds=10", "trainer.progress=off"]
    split = results(run(tmp_path, *words, name="split"))
    assert split["continual"]["head"] == "task" and split["metrics"]["final_accuracy"] > 0.9
    assert set(split["continual"]["dimensions"]) == {"1", "3"}  # the heads are the tasks' own


def test_convolutions_and_schedules(tmp_path: Path) -> None:
    words = ["method=fot", "model=small_cnn", "scheduler=linear", "scenario.tasks=2", "federation.rounds=2"]
    found = results(run(tmp_path, *words, "federation.clients=3", "data.batch_size=100", "trainer.progress=off"))
    assert len(found["continual"]["accuracy_matrix"]) == 2 and min(found["continual"]["ranks"][-1].values()) > 0


def test_server_momentum_is_federated_averaging_with_momentum(tmp_path: Path) -> None:
    """After the first round v = Δ; then w − w_before = v_2 = μ v_1 + Δ_2 with Δ_2 the mean update at w (FedAvgM)."""
    words = ["method=fedavg", "data=digits", "federation.rounds=2", "trainer.progress=off", "data.batch_size=50"]
    place = run(tmp_path, *words, *SAVED, "federation.server_momentum=0.9")
    states = [checkpoint.load(path)["weights"] for path in reversed(checkpoint.list_checkpoints(place))]
    from subspace_lab.app import compose_config
    from subspace_lab.federated.client import ClientPool
    from subspace_lab.federated.exchange import InProcess, Work

    pool = ClientPool(compose_config(words))
    w, everyone, velocity = pool.layout.read(pool.model), list(range(10)), torch.zeros(())
    for index in range(2):
        velocity = 0.9 * velocity + InProcess(pool).sum_train(w, everyone, Work(0, index), [0.1] * 10).float()
        w = w + velocity
        torch.testing.assert_close(states[index], w, rtol=0, atol=1e-6)


def test_attacks_destroy_the_mean_and_not_the_robust_rules(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """−10 times one of ten updates turns their mean around: the weights grow without end."""
    words = ["data=digits", "data.batch_size=32", "optimizer.lr=0.1", "federation.rounds=15", "trainer.progress=off"]
    words += ["federation.byzantine=1", "federation.attack=sign_flip"]
    run(tmp_path, "method=fedavg", *words, name="mean", code=2)
    assert "the aggregated update is not finite" in capfd.readouterr().err
    found = results(run(tmp_path, "method=bulyan", *words))
    assert found["metrics"]["final_accuracy"] > 0.9 and found["federated"]["attack"] == "sign_flip"


def test_a_target_with_steps_of_its_own(tmp_path: Path) -> None:
    words = ["method=fedgp", "method.beta=auto", "data=digits", "federation.rounds=4", "federation.participation=4"]
    place = run(tmp_path, *words, "method.target=7", "data.batch_size=32", "trainer.progress=off")
    rounds = [json.loads(line)["clients"] for line in (place / "rounds.jsonl").read_text().splitlines()]
    assert all(7 in who and len(who) == 4 for who in rounds)


def test_keys_of_swept_methods(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Hydra composes a sweep without what is swept; there is no federation then."""
    words = ["-m", "method=fedavg,median", "data=digits", "federation.byzantine=1", "federation.rounds=1"]
    with contextlib.chdir(tmp_path):
        assert cli.main([*words, "trainer.progress=off", "export=false", f"hydra.sweep.dir={tmp_path}/sweep"]) == 0
        assert [results(tmp_path / "sweep" / n)["federated"]["byzantine"] for n in "01"] == [1, 1]
        capfd.readouterr()
        assert cli.main([*words, "federation.byzantin=1"]) == 2
    assert "unknown key 'federation.byzantin'; did you mean 'federation.byzantine'?" in capfd.readouterr().err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("federated"), "method=fot", *QUICK, *SAVED)


def same(left: Path, right: Path) -> None:
    a, b = results(left), results(right)
    assert a["continual"]["accuracy_matrix"] == b["continual"]["accuracy_matrix"]
    assert a["continual"]["ranks"] == b["continual"]["ranks"]
    for name in ("communication/up_bytes", "communication/down_bytes", "final_accuracy"):
        assert a["metrics"][name] == b["metrics"][name]
    rows = []
    for place in (left, right):
        with (place / "metrics.csv").open(newline="") as file:
            rows.append([{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
    states = [checkpoint.load(checkpoint.list_checkpoints(place)[0]) for place in (left, right)]
    assert torch.equal(states[0]["weights"], states[1]["weights"])


@pytest.mark.parametrize("step", [2, 3, 5, 9])
def test_cut_anywhere_it_ends_the_same(whole: Path, tmp_path: Path, step: int) -> None:
    """Within a task, after the last round of one, in the next, after the last of all; bit for bit."""
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for path in checkpoint.list_checkpoints(cut):
        if checkpoint.step_of(path) > step:
            path.unlink()
    (cut / "results.json").unlink()
    run(tmp_path, "method=fot", *QUICK, *SAVED, "resume=auto", name="cut")
    same(whole, cut)


def test_a_signal_saves_and_says_how_to_go_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import os
    import signal

    from subspace_lab import interrupt
    from subspace_lab.federated.client import ClientPool

    train, rounds = ClientPool.train, []

    def watched(self: Any, weights: Any, clients: Any, work: Any) -> Any:
        rounds.append(work.round)
        if work.round == 3 and len(rounds) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(self, weights, clients, work)

    monkeypatch.setattr(ClientPool, "train", watched)
    run(tmp_path, "method=fot", *QUICK, *SAVED, name="cut", code=130)
    told = capfd.readouterr().err
    assert "interrupted after round 4 of 9" in told and f"subspace-lab resume {tmp_path / 'cut'}" in told
    interrupt.request.signal = None
    assert cli.main(["resume", str(tmp_path / "cut")]) == 0
    same(whole, tmp_path / "cut")
    assert rounds == list(range(9))


def test_checkpoints_of_something_else_are_refused(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "method=fot", *QUICK, "federation.clients=5", f"resume={whole}", code=2)
    assert "is of clients with other examples or of another model" in capfd.readouterr().err
    run(tmp_path, "method=naive", f"resume={whole}", code=2)
    assert "is not of a sequence of tasks" in capfd.readouterr().err
    run(tmp_path, "method=naive", "scenario.tasks=1", "trainer.max_steps=2", "trainer.progress=off", name="other")
    run(tmp_path, "method=fot", *QUICK, f"resume={tmp_path / 'other'}", code=2)
    assert "is not of a federated run" in capfd.readouterr().err
