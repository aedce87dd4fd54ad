"""Checkpoints of one model on disk: a safetensors file, a Hugging Face folder (sharded or not), a name on the hub.

Files are mapped, not read: a tensor costs memory while its pages are looked at, and `release` gives them back.
"""

from __future__ import annotations

import json
import logging
import mmap
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError, did_you_mean
from subspace_lab.merging.sources import Sources, TensorInfo

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Of a repository on the hub, what a merged checkpoint needs.
_HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERT = (
    "save it as safetensors first: model.save_pretrained(folder), or safetensors.torch.save_file(state_dict, file)"
)
_ADAPTER = re.compile(r"(^|\.)lora_(A|B|embedding_[AB])(\.|$)")


@dataclass(frozen=True)
class _Place:
    file: int
    begin: int
    end: int


class Checkpoint:
    """The tensors of one model's safetensors files.

    Args:
        where: what the user typed: a file, a folder, or `owner/name` on the hub.
        option: the option it was given to, for messages.

    Attributes:
        where: as typed.
        files: of the weights.
        folder: with config.json and tokenizer, if the weights have one.
        hub: whether `where` is a name on the hub.
        infos: tensors by name, in the order in which they lie in the files.
        shards: file name -> names of its tensors.

    Raises:
        UserError: there is no such checkpoint, or it is of another kind, or damaged.
    """

    def __init__(self, where: str, option: str) -> None:
        self.where = where
        folder_or_file, self.hub = _find(where, option)
        self.folder, self.files = _weights(folder_or_file, f"{option}={where}")
        self.infos: dict[str, TensorInfo] = {}
        self.shards: dict[str, list[str]] = {}
        self._places: dict[str, _Place] = {}
        self._maps: list[mmap.mmap] = []
        self._bytes: list[Tensor] = []
        self._touched: list[_Place] = []
        for number, file in enumerate(self.files):
            self._open(number, file)
        lora = next((name for name in self.infos if _ADAPTER.search(name)), None)
        if lora is not None:
            raise _adapter(f"{option}={where}", lora)

    def _open(self, number: int, file: Path) -> None:
        header, begin = read_header(file)
        with open(file, "rb") as opened:
            self._maps.append(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the memory is not writable, and nobody writes
            self._bytes.append(torch.frombuffer(self._maps[-1], dtype=torch.uint8))
        lying = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        self.shards[file.name] = [name for name, _ in lying]
        for name, entry in lying:
            if entry["dtype"] not in DTYPES:
                raise UserError(f"{file}: tensor {name} has the dtype {entry['dtype']}, which cannot be merged")
            if name in self.infos:
                raise UserError(f"{file}: tensor {name} is in another file of the checkpoint too")
            self.infos[name] = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            self._places[name] = _Place(number, *(begin + offset for offset in entry["data_offsets"]))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries start … stop of a tensor, flat: a view of the file's pages."""
        info, place = self.infos[name], self._places[name]
        size = info.dtype.itemsize
        begin = place.begin + start * size
        end = place.end if stop is None else place.begin + stop * size
        self._touched.append(_Place(place.file, begin, end))
        found = self._bytes[place.file][begin:end]
        # Old writers did not align what follows their header.
        return (found if begin % size == 0 else found.clone()).view(info.dtype)

    def release(self) -> None:
        """Let the pages read so far leave this process; views are read again from the file when they are used."""
        touched, self._touched = self._touched, []
        for place in touched:
            begin = place.begin // mmap.PAGESIZE * mmap.PAGESIZE
            if place.end > begin:
                self._maps[place.file].madvise(mmap.MADV_DONTNEED, begin, place.end - begin)


class Checkpoints(Sources):
    """A base and T models on disk.

    Args:
        base: None for methods that need none: the first model stands for it.
        models: by label.
        device: where reads are put.
    """

    def __init__(self, base: Checkpoint | None, models: Mapping[str, Checkpoint], device: torch.device) -> None:
        self.labels: Sequence[str] = list(models)
        self.device = device
        self._models = list(models.values())
        self._base = self._models[0] if base is None else base

    @override
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._base.infos

    @override
    def read(self, model: int | None, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        checkpoint = self._base if model is None else self._models[model]
        return checkpoint.read(name, start, stop).to(self.device)

    @override
    def release(self) -> None:
        for checkpoint in {id(one): one for one in (self._base, *self._models)}.values():
            checkpoint.release()


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where the first begins, after the library has checked it.

    Raises:
        UserError: the file is damaged, or none of this kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file, but the checkpoint's index names it") from None
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise UserError(
            f"{file} is damaged or no safetensors file ({reason})", hint="copy or download it again"
        ) from None
    header.pop("__metadata__", None)
    return header, 8 + length


def _find(where: str, option: str) -> tuple[Path, bool]:
    path = Path(where).expanduser()
    if path.exists():
        return path, False
    if _HUB_NAME.fullmatch(where) and path.suffix not in (".safetensors", *_PICKLES) and not path.parent.is_dir():
        return _download(where, option), True
    near = path.parent
    while not near.is_dir():
        near = near.parent
    wanted = path.relative_to(near).parts[0]
    hint = did_you_mean(wanted, [found.name for found in near.iterdir()])
    raise UserError(f"{option}={where}: no such file or folder", hint=hint or "or owner/name of a model on the hub")


def _download(name: str, option: str) -> Path:
    import huggingface_hub

    from subspace_lab.data.hub import hub_error, require_network

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # every attempt of an offline machine is no news
    try:
        require_network()
        cached = False
    except ConnectionError:
        cached = True
    try:
        found = huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES), local_files_only=cached)
    except Exception as error:
        hint = "a file or folder on this machine, or a network"
        raise hub_error("", f"{option}={name}, no file here, from the hub", error, hint) from error
    return Path(found)


def _weights(path: Path, what: str) -> tuple[Path | None, list[Path]]:
    """The folder and the files of weights."""
    if path.is_file():
        if path.suffix in _PICKLES:
            raise UserError(f"{what}: a pickle, which is not streamed and may run code", hint=_CONVERT)
        if path.name == INDEX:
            return _weights(path.parent, what)
        return (path.parent if (path.parent / "config.json").is_file() else None), [path]
    if (path / INDEX).is_file():
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{what}: {INDEX} is damaged", hint="copy or download it again") from None
        return path, [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    if (path / "adapter_config.json").is_file():
        raise _adapter(what, "adapter_config.json")
    if (path / SINGLE).is_file() or len(found) == 1:
        return path, [path / SINGLE if (path / SINGLE).is_file() else found[0]]
    if found:
        raise UserError(f"{what}: {len(found)} safetensors files and no {INDEX}", hint="give one of the files")
    if any(file.suffix in _PICKLES for file in path.iterdir()):
        raise UserError(f"{what}: only pickles, which are not streamed and may run code", hint=_CONVERT)
    raise UserError(f"{what}: no safetensors file in this folder", hint=f"expected {SINGLE} or {INDEX}")


def _adapter(what: str, found: str) -> UserError:
    return UserError(
        f"{what}: a LoRA adapter ({found}), not a whole model",
        hint="merge it into its base first: peft's model.merge_and_unload().save_pretrained(folder)",
    )
