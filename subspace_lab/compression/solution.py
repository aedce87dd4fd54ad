"""A trained point of a random subspace as a file: everything from which `rebuild` makes the whole model again.

θ is a function of integers (seeds, versions), of the model's own initialisation, and of d numbers; so the file holds d
numbers, the buffers (a subspace does not cover BatchNorm's statistics) and hashes of what the rebuilt θ has to be.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from subspace_lab.methods.intrinsic import IntrinsicDimension
    from subspace_lab.subspaces.flat import FlatModel

FILE = "solution.safetensors"
ALGORITHM = "intrinsic_dimension"
VERSION = 1
#: the method's arguments that decide which subspace it is; the others only say how to move in it
GEOMETRY = ("d", "d_max", "projection", "scope", "variant", "targets", "seed")
_BUFFER = "buffer/"


@dataclass(frozen=True)
class Solution:
    """A point in a subspace of a model's weights.

    Attributes:
        z: coordinates, float32 (float64 for float64 models), on the CPU.
        lambdas: the layers' scales (SAID), (m,), or None.
        buffers: persistent buffers by their name in the model; those left out are as the model is built.
        seed: of the model's initialisation θ0.
        method: the arguments named in `GEOMETRY`; `d` counts the lambdas.
        model: {"node": the model group's resolved configuration, "arguments": what the data told it}.
        D: number of weights in θ.
        tensors: (name, shape, dtype) of the weights in θ's order; may be empty where only their hash was kept.
        layout_sha256: `FlatLayout.digest()`.
        projection_version: of the algorithm that makes P.
        projection_fingerprint: `Projection.fingerprint()`.
        theta0_sha256: of θ0's bytes.
        theta_sha256: of θ's bytes at z.
        frozen_sha256: of the parameters outside θ, by name; of nothing if there are none.
    """

    z: Tensor
    lambdas: Tensor | None
    buffers: dict[str, Tensor]
    seed: int
    method: dict[str, Any]
    model: dict[str, Any]
    D: int
    layout_sha256: str
    projection_version: int
    projection_fingerprint: str
    theta0_sha256: str
    theta_sha256: str
    frozen_sha256: str
    tensors: list[tuple[str, list[int], str]] = field(default_factory=list)

    @property
    def d(self) -> int:
        """Trained numbers: coordinates and scales."""
        return self.z.numel() + (0 if self.lambdas is None else self.lambdas.numel())

    @classmethod
    def of(
        cls,
        model: FlatModel,
        method: IntrinsicDimension,
        *,
        seed: int,
        node: Mapping[str, Any],
        arguments: Mapping[str, Any],
    ) -> Solution:
        """Take the solution out of a trained model.

        Args:
            model: what `method.prepare` gave.
            method: that method.
            seed: with which the generators were seeded just before the model was built.
            node: the model's configuration, resolved, as plain containers.
            arguments: what it was built with beyond that (`data_shape`, …).
        """
        layout = model.layout
        return cls(
            z=model.z.detach().cpu().clone(),
            lambdas=None if model.lambdas is None else model.lambdas.detach().cpu().clone(),
            buffers={name: tensor.detach().cpu().clone() for name, tensor in buffers_of(model).items()},
            seed=seed,
            method={name: _plain(getattr(method, name)) for name in GEOMETRY},
            model={"node": _plain(node), "arguments": _plain(arguments)},
            D=layout.D,
            layout_sha256=layout.digest(),
            projection_version=model.projection.version,
            projection_fingerprint=model.projection.fingerprint(),
            theta0_sha256=model.theta0_sha256(),
            theta_sha256=sha256(model.theta_exact()),
            frozen_sha256=frozen_sha256(model),
            tensors=[
                (name, list(shape), str(dtype).removeprefix("torch."))
                for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True)
            ],
        )

    def about(self) -> dict[str, Any]:
        """Return everything but the numbers, as JSON has it."""
        left_out = ("z", "lambdas", "buffers")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def save(self, path: Path) -> int:
        """Write one safetensors file, as a whole or not at all, and return its bytes: 4 per number and a header."""
        from safetensors.torch import save

        tensors = self._tensors()
        about = json.dumps(self.about(), sort_keys=True, separators=(",", ":"))
        metadata = {
            "format": f"subspace-lab/{ALGORITHM}",
            "version": str(VERSION),
            "about": about,
            "sha256": _content_sha256(about, tensors),
        }
        data = save(tensors, metadata)
        write_bytes(path, data)
        return len(data)

    @classmethod
    def load(cls, path: Path) -> Solution:
        """Read a file that `save` wrote.

        Raises:
            UserError: there is no such file, it is damaged, something else, or of a newer version.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        try:
            tensors = load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            kind, version = metadata["format"], int(metadata["version"])
        except (SafetensorError, ValueError, KeyError, TypeError):
            raise UserError(f"{path}: damaged, or not a solution of subspace-lab") from None
        if kind != f"subspace-lab/{ALGORITHM}":
            raise UserError(f"{path}: a {kind} file, not a solution of subspace-lab")
        if version > VERSION:
            raise UserError(f"{path}: written by a newer subspace-lab (version {version}, this one reads {VERSION})")
        if metadata.get("sha256") != _content_sha256(metadata.get("about", ""), tensors):
            raise UserError(f"{path}: damaged: its content differs from the SHA-256 written with it")
        buffers = {name.removeprefix(_BUFFER): value for name, value in tensors.items() if name.startswith(_BUFFER)}
        return cls(z=tensors["z"], lambdas=tensors.get("lambdas"), buffers=buffers, **json.loads(metadata["about"]))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"z": self.z, **{_BUFFER + name: value for name, value in self.buffers.items()}}
        return tensors if self.lambdas is None else tensors | {"lambdas": self.lambdas}


def buffers_of(model: FlatModel) -> dict[str, Tensor]:
    """Return the wrapped module's persistent buffers by name, once each."""
    kept = model.inner.state_dict()
    return {name: tensor for name, tensor in model.inner.named_buffers() if name in kept}


def frozen_sha256(model: FlatModel) -> str:
    """Return the SHA-256 of the parameters outside θ (names and bytes, in the model's order), "" without any."""
    inside = set(model.layout.names)
    outside = [(name, p) for name, p in model.inner.named_parameters() if name not in inside]
    if not outside:
        return ""
    digest = hashlib.sha256()
    for name, parameter in outside:
        digest.update(f"{name}:{parameter.dtype}:{list(parameter.shape)};".encode())
        digest.update(_raw(parameter))
    return digest.hexdigest()


def sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's numbers (little endian), hexadecimal."""
    return hashlib.sha256(_raw(tensor)).hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that `path` always is either as before or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _content_sha256(about: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name].dtype}:{list(tensors[name].shape)};".encode())
        digest.update(_raw(tensors[name]))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Return nested plain containers as JSON has them: mappings with text keys, sequences as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    from omegaconf import ListConfig

    return [_plain(item) for item in value] if isinstance(value, ListConfig) else str(value)
