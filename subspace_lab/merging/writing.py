"""A merged checkpoint written while it is computed: tensors go to their places in safetensors files, in any order.

Everything lies under a temporary name beside the output until it is whole; an error or Ctrl-C leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.merging.checkpoints import DTYPES, INDEX, SINGLE
from subspace_lab.merging.engine import Shelf, Sink
from subspace_lab.merging.grouping import Part
from subspace_lab.merging.sources import TensorInfo

RECORD = "merge.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".py")  # configuration, tokenizer, the model's own code


class CheckpointWriter(Sink):
    """A folder with safetensors files that are filled in any order; use as a context, and `finish` at its end.

    Args:
        output: the folder; may exist if it is empty or holds an earlier merge.
        infos: tensors by name.
        shards: file name -> names of its tensors.

    Raises:
        UserError: the folder holds something else.
        OSError: the disk is full (all of it is reserved at once), or not ours to write.
    """

    def __init__(self, output: Path, infos: Mapping[str, TensorInfo], shards: Mapping[str, list[str]]) -> None:
        check_output(output)
        self.output, self._infos, self._shards = output, infos, shards
        self.folder = output.with_name(f".{output.name}.partial-{os.getpid()}")
        self._files: list[BinaryIO] = []
        self._places: dict[str, tuple[int, int]] = {}
        #: bytes of all files
        self.bytes = 0

    def __enter__(self) -> CheckpointWriter:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file, names in self._shards.items():
                self._begin(self.folder / (file if len(self._shards) > 1 else SINGLE), names)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._discard()

    def _begin(self, path: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        # Wide dtypes first keeps every tensor aligned to its own size, as the library does.
        offset = 0
        inside = {}
        for name in sorted(names, key=lambda name: (-self._infos[name].dtype.itemsize, name)):
            info = self._infos[name]
            end = offset + info.numel * info.dtype.itemsize
            header[name] = {
                "dtype": _NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, end],
            }
            inside[name] = offset
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = open(path, "wb")  # noqa: SIM115 - closed by _discard or finish
        self._files.append(file)
        total = 8 + len(text) + offset
        _reserve(file, total)
        os.pwrite(file.fileno(), len(text).to_bytes(8, "little") + text, 0)
        self._places |= {name: (file.fileno(), 8 + len(text) + begin) for name, begin in inside.items()}
        self.bytes += total

    @override
    def put(self, name: str, start: int, values: Tensor) -> None:
        dtype = self._infos[name].dtype
        file, begin = self._places[name]
        _write(file, values.to(dtype).cpu(), begin + start * dtype.itemsize)

    def copy_companions(self, folder: Path) -> list[str]:
        """Copy what a loadable checkpoint has beside its weights; return the names."""
        wanted = [
            path
            for path in sorted(folder.iterdir())
            if path.is_file() and path.suffix in _COMPANIONS and not path.name.endswith(".index.json")
        ]
        for path in wanted:
            if path.name != RECORD:
                shutil.copyfile(path, self.folder / path.name)
        return [path.name for path in wanted if path.name != RECORD]

    def finish(self) -> None:
        """Give everything its name."""
        if len(self._shards) > 1:
            size = sum(info.numel * info.dtype.itemsize for info in self._infos.values())
            places = {name: file for file, names in self._shards.items() for name in names}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self._close()
        check_output(self.output)
        if self.output.exists():
            shutil.rmtree(self.output)
        self.folder.rename(self.output)

    def _close(self) -> None:
        while self._files:
            self._files.pop().close()

    def _discard(self) -> None:
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)


class ScratchFile(Shelf):
    """Updates on disk in the precision they were computed in, until the method's factor is known.

    Args:
        folder: where the file is made; it has no name and vanishes with the process.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the object
        self._places: dict[str, tuple[int, int, torch.dtype]] = {}
        self._end = 0
        self._lock = threading.Lock()

    @override
    def keep(self, part: Part, update: Tensor) -> None:
        size = update.numel() * update.dtype.itemsize
        with self._lock:
            begin, self._end = self._end, self._end + size
        self._places[part.name] = (begin, size, update.dtype)
        _write(self._file.fileno(), update.cpu(), begin)

    @override
    def fetch(self, part: Part) -> Tensor:
        begin, size, dtype = self._places[part.name]
        found = bytearray(size)
        view, done = memoryview(found), 0
        while done < size:
            done += os.preadv(self._file.fileno(), [view[done:]], begin + done)
        return torch.frombuffer(found, dtype=dtype)

    def close(self) -> None:
        """Give the space back."""
        self._file.close()


def check_output(output: Path) -> None:
    """Refuse a folder with anything in it that no merge has made.

    Raises:
        UserError: there is something.
    """
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / RECORD).is_file())):
        raise UserError(
            f"merge.output={output} exists and is no earlier merge", hint="choose another folder, or empty it"
        )


def _reserve(file: BinaryIO, size: int) -> None:
    try:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        error.filename = file.name
        raise


def _write(file: int, values: Tensor, begin: int) -> None:
    if values.numel() == 0:
        return
    view: memoryview = values.contiguous().view(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], begin + done)
