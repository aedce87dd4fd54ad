"""`protocol=continual` from the command line: what goes into a run folder, what is refused, and the odd methods out."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from subspace_lab import cli

QUICK = ["trainer.max_steps=4", "trainer.progress=off", "trainer.checkpoint_every=0", "export=false"]


def run(folder: Path, *words: str) -> dict[str, Any]:
    with contextlib.chdir(folder):
        assert cli.main([*words, *QUICK, f"hydra.run.dir={folder}/run"]) == 0
    found: dict[str, Any] = json.loads((folder / "run" / "results.json").read_text())
    return found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method=gpm", "data=digits"], "needs a sequence of tasks.*scenario=permuted"),
        (["method=gpm", "protocol=fit"], "runs with protocol=continual, not with protocol=fit"),
        (["method=softmax", "data=split_digits", "protocol=fit"], "sequence of tasks.*protocol=continual"),
        (["method=softmax", "data=split_digits", "protocol=continual"], "method=softmax does not learn sequences"),
        (["method=gpn"], "did you mean 'gpm'"),
        (["method=gpm", "scenario=permutted"], "did you mean 'permuted'"),
        (["method=gpm", "scenario.head=class"], "scenario.head=class does not fit scenario=permuted"),
        (["method=gpm", "data=split_digits", "scenario.tasks=6"], "10 classes"),
        (["method=gpm", "method.threshold=1.5"], "between 0 and 1"),
        (["method=gpm", "method.threshold={fc9:0.9}"], "says nothing of layer 1"),
        (["method=gpm", "method.targets=[conv]"], "conv"),
        (["method=gpm", "method.samples=0"], "method.samples=0"),
        (["method=gpm", "protocol.epsilon=0", "protocol.attack=pgd"], "protocol.epsilon=0"),
        (["method=gpm", "trainer=fsdp"], "method=gpm cannot run under FSDP"),
        (["method=coso", "data=split_cifar100", "data.data_dir=/no/such"], "data=cifar100: neither"),
    ],
)
def test_a_mistake_gets_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with contextlib.chdir(tmp_path):
        assert cli.main([*words, *QUICK]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and not any("Traceback" in line for line in lines)
    import re

    assert re.search(told, errors[0]), errors[0]


def test_accuracies_on_held_out_images_and_under_attack(tmp_path: Path) -> None:
    words = ["method=gpm", "scenario.tasks=2", "protocol.part=validation", "protocol.attack=fgsm"]
    found = run(tmp_path, *words, "data.val_size=100", "optimizer.lr=0.5", "trainer.max_steps=60")
    section, metrics = found["continual"], found["metrics"]
    assert section["part"] == "validation" and section["examples"] == [100, 100]
    assert all(abs(100 * a - round(100 * a)) < 1e-6 for row in section["accuracy_matrix"] for a in row)
    assert metrics["robust_final_accuracy"] < metrics["final_accuracy"] - 0.1
    assert found["objective"] == "final_error"
    assert metrics["final_error"] == pytest.approx(1 - metrics["final_accuracy"])


def test_methods_without_gradients_learn_all_the_same(tmp_path: Path) -> None:
    found = run(tmp_path, "method=nmc", "data=split_digits", "scenario.head=class", "model=mlp")
    assert found["metrics"]["final_accuracy"] > 0.6  # means of random features
    assert found["timing"]["steps"] == 0 and len(found["continual"]["accuracy_matrix"]) == 5


def test_joint_training_has_one_row_and_the_steps_of_all_tasks(tmp_path: Path) -> None:
    found = run(tmp_path, "method=joint", "data=split_digits", "trainer.max_steps=4")
    assert [len(row) for row in found["continual"]["accuracy_matrix"]] == [5]
    assert found["timing"]["steps"] == 5 * 4
    assert "backward_transfer" not in found["metrics"] and "final_accuracy" in found["metrics"]


def test_any_optimizer_and_any_image_data(tmp_path: Path) -> None:
    words = ["method=gpm", "data=digits", "scenario=rotated", "scenario.tasks=2", "optimizer=adamw"]
    found = run(tmp_path, *words, "optimizer.weight_decay=0.1", "data.batch_size=20")
    assert len(found["continual"]["accuracy_matrix"]) == 2 and found["continual"]["head"] == "single"


def test_kinds_of_learning_do_not_share_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for head in ("task", "class"):
        words = ["method=naive", "data=split_digits", f"scenario.head={head}", "scenario.tasks=2", *QUICK]
        with contextlib.chdir(tmp_path):
            assert cli.main([*words, f"hydra.run.dir={tmp_path}/outputs/{head}"]) == 0
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "outputs")]) == 0
    printed = capsys.readouterr().out
    assert "task-incremental learning:" in printed and "class-incremental learning:" in printed
    assert printed.count("final accuracy") == 2
