"""Checkpoint files: atomic, verified, kept in number, and quiet about a full disk."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace_lab.errors import UserError
from subspace_lab.training import checkpoint
from subspace_lab.training.checkpoint import AtomicCheckpointIO


def save(run_dir: Path, step: int, keep: int = 2) -> AtomicCheckpointIO:
    io = AtomicCheckpointIO(keep)
    io.save_checkpoint({"global_step": step, "w": torch.full((1000,), float(step))}, checkpoint.path_for(run_dir, step))
    return io


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path)] == [15, 10]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4  # with their checksums, and nothing else
    assert checkpoint.newest_intact(tmp_path, pytest.fail) == checkpoint.path_for(tmp_path, 15)


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "unverified and cut"])
def test_damage_is_found_and_the_one_before_taken(tmp_path: Path, kind: str) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    newest = checkpoint.path_for(tmp_path, 10)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"flipped": bytes(data), "empty": b""}.get(kind, bytes(data[:-200])))
    if kind.startswith("unverified"):
        newest.with_name(newest.name + ".sha256").unlink()
    told: list[str] = []
    assert checkpoint.newest_intact(tmp_path, told.append) == checkpoint.path_for(tmp_path, 5)
    assert len(told) == 1 and str(newest) in told[0]
    with pytest.raises(UserError, match="damaged"):
        AtomicCheckpointIO(2).load_checkpoint(newest)


def test_a_copied_file_without_checksum_is_fine(tmp_path: Path) -> None:
    save(tmp_path, 5)
    copy = tmp_path / "best.ckpt"
    copy.write_bytes(checkpoint.path_for(tmp_path, 5).read_bytes())
    assert checkpoint.damage(copy) is None
    assert AtomicCheckpointIO(2).load_checkpoint(copy)["global_step"] == 5


class FullDisk:
    """A file that takes some bytes and then has no room."""

    def __init__(self, raw: Any, room: int) -> None:
        self.raw, self.room = raw, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *exc: object) -> None:
        self.raw.close()

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.raw.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_full_disk_is_one_line_and_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    save(tmp_path, 5, keep=1)
    before = checkpoint.path_for(tmp_path, 5).read_bytes()
    real_open = Path.open

    def open_full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        raw = real_open(self, mode, *args, **kwargs)
        return FullDisk(raw, room) if mode == "wb" else raw

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        io = save(tmp_path, 10, keep=1)
    assert io.problem is not None and "no space left" in io.problem and "\n" not in io.problem
    assert checkpoint.path_for(tmp_path, 5).read_bytes() == before
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        "step_00000005.ckpt",
        "step_00000005.ckpt.sha256",
    }
    assert save(tmp_path, 10, keep=1).problem is None  # and with room again it is written


def test_a_kill_while_writing_leaves_nothing_that_looks_like_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "checkpoints" / ".step_00000010.ckpt.partial").write_bytes(b"half")
    (tmp_path / "checkpoints" / "step_00000010.ckpt.sha256").write_text("0" * 64)
    assert checkpoint.newest_intact(tmp_path, pytest.fail) == checkpoint.path_for(tmp_path, 5)
