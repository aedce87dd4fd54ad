"""Runs of two processes that were cut off: two go on bit for bit, one goes on as one would."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from distributed.cases import MLP, TASKS, TWO
from distributed.harness import Processes, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SAVING = ("trainer.checkpoint_every=1", "trainer.keep_checkpoints=99")
GALORE = ("method=galore", *MLP, "method.targets=all-linear", "method.rank=4", "method.refresh_every=3")
CASES = {
    "galore": (GALORE, 5),
    "galore_staggered_rotating": ((*GALORE, "method.stagger=true", "method.moments=rotate"), 4),
    "intrinsic": (("method=intrinsic_dimension", "protocol=fit", *MLP, "method.d=20", "method.variant=said"), 5),
    "gpm": (("method=gpm", *TASKS), 8),
    "gpm_at_the_end_of_a_task": (("method=gpm", *TASKS), 6),
    "trgp": (("method=trgp", *TASKS), 9),
    "hlop": (("method=hlop", *TASKS), 8),
    "rogo": (("method=rogo", *TASKS, "method.gradient_steps=3", "method.relax_at=[0.4]", "method.gamma=0.1"), 9),
    "coso": (("method=coso", *TASKS), 8),
    "derpp": (("method=derpp", *TASKS, "optimizer.lr=0.03", "method.buffer_size=30", "method.minibatch_size=5"), 8),
    "bfp": (("method=bfp", *TASKS, "optimizer.lr=0.03", "method.buffer_size=30", "method.minibatch_size=5"), 8),
    "dgp_adversarial": (("method=dgp", *TASKS, "method.defense=adversarial"), 8),
    "ema": (("method=gcr", "protocol=fit", *MLP, "method.k=3", "callbacks=ema", "callbacks.averaging.decay=0.9"), 5),
    "o_lora": (("method=o_lora", *TASKS), 8),  # with dropout
}


def cut(folder: Path, step: int) -> None:
    """As after kill -9 when the checkpoint of a step was the newest on the disk."""
    for file in (folder / "checkpoints").iterdir():
        if int(file.name[5:13]) > step:
            file.unlink()


def good(told: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for name, answer in told.items():
        assert "error" not in answer, f"{name}: {answer['traceback']}"
    return told


@pytest.mark.parametrize("name", CASES)
def test_two_go_on_bit_for_bit(name: str, processes: Processes) -> None:
    words, step = CASES[name]
    pair = [*words, *SAVING, *TWO, "data.batch_size=10"]
    whole = good(processes.run(f"whole_{name}", {"pair": pair}))
    shutil.copytree(processes.place(f"whole_{name}", "pair"), processes.place(f"cut_{name}", "pair"))
    cut(processes.place(f"cut_{name}", "pair"), step)
    again = good(processes.run(f"cut_{name}", {"pair": [*pair, "resume=auto"]}))
    for rank in ("rank0", "rank1"):
        for kind in ("trained_digests", "weights_digest", "method_digest", "drawn"):
            left, right = whole[rank][kind], again[rank][kind]
            if kind == "trained_digests":  # of the last task, of which the cut run trained at least the end
                left, right = left[-1], right[-1]
            assert left == right, (rank, kind)
    assert whole["rank0"]["drawn"] != whole["rank1"]["drawn"]  # each drops units of its own
    left, right = (rows(processes.place(f"{kind}_{name}", "pair")) for kind in ("whole", "cut"))
    assert left == right
    log = Path(again["rank0"]["log"]).read_text()
    assert f"continuing from step {step}" in log


@pytest.mark.parametrize("name", ["galore", "intrinsic", "gpm", "derpp"])
@pytest.mark.parametrize("cut_team", ["pair", "alone"])
def test_another_number_goes_on(name: str, cut_team: str, processes: Processes) -> None:
    """One where two stood, and two where one did."""
    words, step = CASES[name]
    jobs = {
        "alone": [*words, *SAVING, "trainer=cpu", "data.batch_size=20"],
        "pair": [*words, *SAVING, *TWO, "data.batch_size=10"],
    }
    # What one process draws of the reservoir two divide.
    jobs["alone"] = [word.replace("minibatch_size=5", "minibatch_size=10") for word in jobs["alone"]]
    goes_on = "alone" if cut_team == "pair" else "pair"
    whole, rest = f"{cut_team}_{name}", f"{goes_on}_after_{cut_team}_{name}"
    told = good(processes.run(whole, {cut_team: jobs[cut_team]}))
    shutil.copytree(processes.place(whole, cut_team), processes.place(rest, goes_on))
    cut(processes.place(rest, goes_on), step)
    again = good(processes.run(rest, {goes_on: [*jobs[goes_on], "resume=auto"]}))
    left, right = rows(processes.place(whole, cut_team)), rows(processes.place(rest, goes_on))
    assert [row["step"] for row in left] == [row["step"] for row in right] and left[:step] == right[:step]
    for a, b in zip(left, right, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    sections = [next(iter(answers.values()))["sections"].get("continual", {}) for answers in (told, again)]
    assert sections[0].get("accuracy_matrix") == sections[1].get("accuracy_matrix")


def test_a_signal_to_one_of_them_stops_both(processes: Processes) -> None:
    words, _ = CASES["gpm"]
    pair = [*words, *SAVING[1:], *TWO, "data.batch_size=10"]
    whole = good(processes.run("whole", {"pair": pair}))
    stopped = processes.run(
        "stopped",
        {"pair": [*pair, "+callbacks.ask._target_=asking.Ask", "+callbacks.ask.step=8", "+callbacks.ask.rank=1"]},
    )
    for rank in ("rank0", "rank1"):
        assert "Interrupted: interrupted after step 8 of 12, everything is saved" in stopped[rank]["error"]
    again = good(processes.run("stopped", {"pair": [*pair, "resume=auto"]}))
    assert all(whole[rank]["weights_digest"] == again[rank]["weights_digest"] for rank in ("rank0", "rank1"))
    assert rows(processes.place("whole", "pair")) == rows(processes.place("stopped", "pair"))
