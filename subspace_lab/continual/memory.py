"""Protected directions of each layer: an orthonormal basis that only grows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from subspace_lab import linalg


class BasisMemory:
    """Path of a layer -> M (d, k), orthonormal columns in float32."""

    def __init__(self) -> None:
        self._bases: dict[str, Tensor] = {}

    def __contains__(self, path: object) -> bool:
        return path in self._bases

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases)

    def __len__(self) -> int:
        return len(self._bases)

    def __getitem__(self, path: str) -> Tensor:
        return self._bases[path]

    def get(self, path: str) -> Tensor | None:
        """M of a layer, None before its first `extend`."""
        return self._bases.get(path)

    def items(self) -> list[tuple[str, Tensor]]:
        """(path, M) pairs."""
        return list(self._bases.items())

    def extend(self, path: str, directions: Tensor) -> None:
        """Append directions (d, k), made orthonormal to each other and to what is there; at most d columns are kept."""
        d = directions.shape[0]
        M = self._bases.get(path, directions.new_zeros(d, 0)).to(directions.device)
        new = directions[:, : d - M.shape[1]].double()
        if new.shape[1] and not _is_clean(M.double(), new):
            new = linalg.extend_basis(M.double(), new)[:, M.shape[1] :]
        self._bases[path] = torch.cat([M.float(), new.float()], dim=1)

    def put(self, path: str, basis: Tensor) -> None:
        """Set a layer's basis, orthonormal already (one received from the first process)."""
        self._bases[path] = basis

    def ranks(self) -> dict[str, int]:
        """Columns of each basis."""
        return {path: M.shape[1] for path, M in self._bases.items()}

    def bytes(self) -> int:
        """Bytes of all bases."""
        return sum(M.numel() * M.element_size() for M in self._bases.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The bases by path, on the CPU."""
        return {path: M.detach().cpu() for path, M in self._bases.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all bases."""
        self._bases = {path: M.clone() for path, M in state.items()}


def _is_clean(M: Tensor, new: Tensor) -> bool:
    """Whether `new` is orthonormal and orthogonal to M as it comes (as `energy_directions` gives it)."""
    error = new.mT @ new
    error.diagonal().sub_(1)
    worst = torch.maximum(error.abs().max(), (M.mT @ new).abs().max() if M.shape[1] else error.new_zeros(()))
    return bool(worst < 1e-6)
