"""A run that was cut off and continued is the uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace_lab.errors import Interrupted, UserError


def same(tiny: Any, a: str, b: str) -> None:
    assert tiny.rows(a) == tiny.rows(b)
    left, right = tiny.weights(a), tiny.weights(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("where,step", [("step", 5), ("step", 4), ("validation", 8), ("step", 9)])
def test_interrupt_and_resume_equals_uninterrupted(tiny: Any, stop_at: Any, where: str, step: int) -> None:
    whole = tiny.fit("whole")
    stop_at(step, where)
    with pytest.raises(Interrupted, match=f"interrupted after step {step} of 10.*subspace-lab resume .*cut"):
        tiny.fit("cut")
    stop_at.reset()
    resumed = tiny.fit("cut", "resume=auto")
    assert whole.metrics["val/loss"] == resumed.metrics["val/loss"]
    same(tiny, "whole", "cut")


@pytest.mark.parametrize("keep", [3, 6, 9])
def test_any_earlier_checkpoint_leads_to_the_same_end(tiny: Any, keep: int) -> None:
    """As after kill -9: later rows and files are there, the newest usable checkpoint is an older one."""
    from subspace_lab.training import checkpoint

    overrides = ("data.batch_size=2", "trainer.gradient_clip_val=0.5", "trainer.keep_checkpoints=9")
    tiny.fit("whole", *overrides)
    tiny.fit("cut", *overrides)
    for path in checkpoint.list_checkpoints(tiny.root / "cut"):
        if checkpoint.step_of(path) > keep:
            path.unlink()
    with (tiny.root / "cut" / "metrics.csv").open("a") as file:
        file.write("11,0.5")  # a line cut off in the middle
    tiny.fit("cut", *overrides, "resume=auto")
    same(tiny, "whole", "cut")


def test_more_steps_continue_a_finished_run(tiny: Any) -> None:
    overrides = ("scheduler=constant",)
    tiny.fit("whole", *overrides, "trainer.max_steps=12", "trainer.val_every=6")
    tiny.fit("cut", *overrides, "trainer.max_steps=6", "trainer.val_every=6")
    tiny.fit("cut", *overrides, "trainer.max_steps=12", "trainer.val_every=6", "resume=auto")
    same(tiny, "whole", "cut")


def test_finished_run_is_not_trained_again(tiny: Any) -> None:
    first = tiny.fit("run")
    before = tiny.rows("run")
    again = tiny.fit("run", "resume=auto")
    assert first.metrics["val/loss"] == again.metrics["val/loss"]
    assert again.timing["tokens"] == first.timing["tokens"] == 10 * 4 * 16
    assert tiny.rows("run") == before


def test_validation_interval_does_not_change_training(tiny: Any) -> None:
    tiny.fit("often", "trainer.val_every=1")
    tiny.fit("never", "trainer.val_every=50")
    assert all(
        torch.equal(a, b) for a, b in zip(tiny.weights("often").values(), tiny.weights("never").values(), strict=True)
    )


def test_another_number_of_micro_batches_keeps_the_steps(tiny: Any) -> None:
    """Step count, schedule and validations continue when the same global batch is cut differently."""
    tiny.fit("run", "trainer.max_steps=6")
    tiny.fit("run", "data.batch_size=2", "trainer.max_steps=10", "resume=auto")
    steps = [int(row["step"]) for row in tiny.rows("run")]
    assert steps == list(range(1, 11))
    assert [int(r["step"]) for r in tiny.rows("run") if "val/loss" in r] == [4, 6, 8, 10]
    assert tiny.rows("run")[-1]["train/tokens"] == str(10.0 * 4 * 16)


def test_damaged_checkpoint_is_named_and_the_one_before_used(tiny: Any, capfd: pytest.CaptureFixture[str]) -> None:
    from subspace_lab.training import checkpoint

    tiny.fit("whole")
    tiny.fit("cut")
    newest = checkpoint.list_checkpoints(tiny.root / "cut")[0]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    tiny.fit("cut", "resume=auto")
    told = capfd.readouterr().err
    assert f"{newest} is damaged" in told and "continuing from step 9" in told
    same(tiny, "whole", "cut")
    with pytest.raises(UserError, match="damaged"):
        newest.write_bytes(data)
        tiny.fit("other", f"resume={newest}")


def test_resume_from_one_file_into_another_folder(tiny: Any) -> None:
    from subspace_lab.training import checkpoint

    tiny.fit("whole", "trainer.keep_checkpoints=9")
    tiny.fit("branch", f"resume={checkpoint.path_for(tiny.root / 'whole', 6)}")
    left, right = tiny.weights("whole"), tiny.weights("branch")
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the imported libraries instead of importing them again")
@pytest.mark.parametrize("delay", [0.0, 0.03])
def test_kill_9_at_any_moment(tiny: Any, delay: float) -> None:
    """SIGKILL some moment after the second checkpoint appeared; the continued run ends as the uninterrupted one."""
    from subspace_lab.training import checkpoint

    words = ("trainer.max_steps=120", "trainer.checkpoint_every=5", "trainer.val_every=7")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    try:
        tiny.fit("whole", *words)
        child = os.fork()
        if child == 0:
            try:
                tiny.fit("cut", *words)
            finally:
                os._exit(0)
        end = time.monotonic() + 60
        while len(checkpoint.list_checkpoints(tiny.root / "cut")) < 2 and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left_at = checkpoint.step_of(checkpoint.list_checkpoints(tiny.root / "cut")[0])
        assert 10 <= left_at < 120
        tiny.fit("cut", *words, "resume=auto")
    finally:
        torch.set_num_threads(threads)
    same(tiny, "whole", "cut")


@pytest.mark.slow
def test_kill_9_in_a_real_process(tiny: Any) -> None:
    """`subspace-lab …`, SIGKILL after some step, the same command with resume=auto."""
    from subspace_lab.training import checkpoint

    command = ["trainer.max_steps=400", "trainer.checkpoint_every=5", "trainer.val_every=7"]
    tiny.fit("whole", *command)
    words = [*tiny.words(), *command, f"hydra.run.dir={tiny.root}/cut"]
    process = subprocess.Popen([sys.executable, "-m", "subspace_lab", *words], cwd=tiny.root, env=environment())
    wait_for(lambda: len(checkpoint.list_checkpoints(tiny.root / "cut")) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.step_of(checkpoint.list_checkpoints(tiny.root / "cut")[0]) < 400
    subprocess.run(
        [sys.executable, "-m", "subspace_lab", *words, "resume=auto"],
        cwd=tiny.root,
        env=environment(),
        check=True,
    )
    same(tiny, "whole", "cut")


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def wait_for(condition: Callable[[], bool], process: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < end
        time.sleep(0.05)


def test_checkpoints_hold_plain_containers(tiny: Any) -> None:
    from subspace_lab.training import checkpoint

    tiny.fit("run")
    path = checkpoint.list_checkpoints(tiny.root / "run")[0]
    contents = torch.load(path, weights_only=True)
    assert contents["global_step"] == 10
    assert len(checkpoint.list_checkpoints(tiny.root / "run")) == 2
    assert {p.name for p in path.parent.iterdir()} == {
        name for p in checkpoint.list_checkpoints(Path(path.parent.parent)) for name in (p.name, f"{p.name}.sha256")
    }
