"""What processes send one another: collectives counted by kind, with the bytes of the tensors they work on.

Every collective of torch.distributed passes the dispatcher, those of DDP's reducer, of FSDP2 and of DTensor included:
nothing has to be changed to be counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from typing_extensions import override

# Operator name, without its namespace and underscores, begins with -> kind. The longer names come first.
_KINDS = (
    ("allgather", "all_gather"),
    ("all_gather", "all_gather"),
    ("allreduce", "all_reduce"),
    ("all_reduce", "all_reduce"),
    ("reduce_scatter", "reduce_scatter"),
    ("broadcast", "broadcast"),
    ("alltoall", "all_to_all"),
    ("all_to_all", "all_to_all"),
    ("gather", "gather"),
    ("scatter", "scatter"),
    ("send", "send"),
    ("reduce", "reduce"),
)


@dataclass
class Traffic:
    """Collectives of one kind.

    Attributes:
        calls: how many.
        bytes: of the whole tensors they produce or consume: of an all-gather's result, of a reduce-scatter's input.
        largest: bytes of the largest one.
    """

    calls: int = 0
    bytes: int = 0
    largest: int = 0


@dataclass
class Communication(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the collectives of this process in a `with` block (on the thread that calls it).

    Attributes:
        kinds: all_reduce, all_gather, reduce_scatter, broadcast … -> `Traffic`.
    """

    kinds: dict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        space, _, name = str(func.name()).partition("::")
        if space in ("c10d", "_c10d_functional", "c10d_functional"):
            bare = name.strip("_")
            kind = next((kind for start, kind in _KINDS if bare.startswith(start)), None)
            if kind is not None:
                size = max(_sizes(args, result))
                traffic = self.kinds[kind]
                traffic.calls += 1
                traffic.bytes += size
                traffic.largest = max(traffic.largest, size)
        return result

    def sent(self, processes: int) -> float:
        """Bytes that a process sends by ring algorithms: 2 (w − 1)/w of an all-reduce, (w − 1)/w of the others.

        Args:
            processes: w.
        """
        share = (processes - 1) / processes
        return sum((2 if kind == "all_reduce" else 1) * share * traffic.bytes for kind, traffic in self.kinds.items())


def _sizes(args: Any, result: Any) -> Iterator[int]:
    """Bytes of each argument (a list of tensors counts as one) and of the result; at least a zero."""
    yield 0
    for part in (*args, result if isinstance(result, Tensor) else None):
        tensors = [t for t in tree_iter(part) if isinstance(t, Tensor)]
        yield sum(t.numel() * t.element_size() for t in tensors if t.layout == torch.strided)
