"""Checkpoints that survive: written atomically, verified when read, the newest good one found again.

A file is written beside its final name, flushed to the disk, and renamed only when it is complete; its SHA-256 lies
beside it. So a kill or a full disk leaves the earlier checkpoints as they were. Everything inside is a plain
container or a tensor: it loads with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from subspace_lab.errors import UserError

FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d{8})\.ckpt")


def path_for(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint after `step` optimizer steps lies."""
    return run_dir / FOLDER / f"step_{step:08d}.ckpt"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return a run's checkpoints, newest first."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: p.name, reverse=True)


def step_of(path: Path) -> int:
    """Return after how many optimizer steps a checkpoint was written, from its name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file, or None if it is as it was written.

    A file without its .sha256 (copied from elsewhere) is checked by opening it.
    """
    sidecar = path.with_name(path.name + ".sha256")
    try:
        if sidecar.is_file():
            digest = _file_sha256(path)
            return (
                None if digest == sidecar.read_text().split()[0] else "its SHA-256 differs from the one written with it"
            )
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # garbage in a pickle can raise anything
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def newest_intact(run_dir: Path, tell: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint of a run that is not damaged, None if there is none.

    Args:
        run_dir: the run folder.
        tell: called with one line for each damaged file passed over.
    """
    for path in list_checkpoints(run_dir):
        problem = damage(path)
        if problem is None:
            return path
        tell(f"checkpoint {path} is damaged ({problem}); trying the one before")
    return None


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint's contents on the CPU."""
    contents: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return contents


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's file plugin: atomic writes with a checksum, the last `keep` files kept.

    A failed write does not raise (the other ranks wait at a barrier after it): `problem` holds the line to tell.

    Args:
        keep: how many checkpoints of the folder stay.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.problem: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`, then remove the oldest ones."""
        target = Path(path)
        self.problem = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, lambda file: torch.save(checkpoint, file), checksum=True)
        except OSError as error:
            self.problem = _explain(error, target)
            return
        for old in list_checkpoints(target.parent.parent)[self.keep :]:
            self.remove_checkpoint(old)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, refusing a damaged one in one line."""
        problem = damage(Path(path))
        if problem is not None:
            raise UserError(f"checkpoint {path} is damaged: {problem}", hint="give an earlier one with resume=PATH")
        return load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint and its checksum."""
        for file in (Path(path), Path(f"{path}.sha256")):
            file.unlink(missing_ok=True)


class _HashingFile(io.RawIOBase):
    """A write-only file that hashes what passes through (torch.save writes front to back) and keeps its own failure."""

    def __init__(self, raw: io.BufferedWriter) -> None:
        self.raw, self.sha256 = raw, hashlib.sha256()
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        try:
            self.raw.write(data)
        except OSError as error:  # torch turns whatever comes out of here into a RuntimeError of its own
            self.failure = error
            raise
        self.sha256.update(data)
        return len(data)


def write_atomically(target: Path, write: Callable[[Any], object], *, checksum: bool = False) -> None:
    """Write a binary file so that `target` is at every moment either the old contents or the new.

    Args:
        target: the final name; its folder must exist.
        write: called with the open file.
        checksum: also write `target`.sha256, before the file itself gets its name.

    Raises:
        OSError: the disk is full, the folder is read-only, …; nothing is left behind then.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("wb") as raw:
            file = _HashingFile(raw)
            try:
                write(file)
            except RuntimeError as error:
                raise file.failure if file.failure is not None else error from None
            raw.flush()
            os.fsync(raw.fileno())
        if checksum:
            sidecar = target.with_name(target.name + ".sha256")
            text = f"{file.sha256.hexdigest()}  {target.name}\n".encode()
            write_atomically(sidecar, lambda out: out.write(text))
        partial.replace(target)
        _sync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot open folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _explain(error: OSError, target: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{target.name} was not written to {target.parent}"
        return f"no space left on the disk: {where}; earlier checkpoints are untouched"
    return f"checkpoint {target} was not written: {error.strerror or error}; earlier checkpoints are untouched"
