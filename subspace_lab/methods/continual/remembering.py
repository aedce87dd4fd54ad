"""Methods whose memory of old tasks is one orthonormal basis per layer."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from subspace_lab.continual.memory import BasisMemory
from subspace_lab.methods.continual.base import ContinualMethod


class RememberingMethod(ContinualMethod):
    """Base of methods that keep a basis M of each layer in `memory`, which is all that later tasks need.

    Attributes:
        memory: path of a layer -> M.
    """

    def __init__(self) -> None:
        self.memory = BasisMemory()

    @override
    def ranks(self) -> dict[str, int]:
        return self.memory.ranks()

    @override
    def dimensions(self) -> dict[str, int]:
        return {path: M.shape[0] for path, M in self.memory.items()}

    @override
    def basis_bytes(self) -> int:
        return self.memory.bytes()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"bases": self.memory.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state["bases"])
