"""A uniform sample of all training examples seen so far, of fixed size, on the device (Vitter 1985, Algorithm R).

Example m (from 0) takes place m while there is one left; later it replaces the example at place r, r uniform in
[0, m], if r < size. All choices are words of a counter-based generator (`linalg.random`), numbered by m, so that the
counters are the generator's state, and every process of a run, which sees all examples, keeps the same sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key, random_bits


class Reservoir:
    """Keeps `size` of all examples that were added.

    Args:
        size: examples kept.
        seed: of all choices.
        balanced: replace an example of the class of which most are kept instead of a uniformly chosen one (as the
            release of BFP does): rare classes stay longer.
        classes: labels are below it; only looked at when balanced.
    """

    def __init__(self, size: int, seed: int, balanced: bool = False, classes: int = 0) -> None:
        self.size, self.seed, self.balanced, self.classes = size, seed, balanced, classes
        self._seen = self._draws = 0
        self._rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self._seen, self.size)

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Let a batch of this process, and those of the others, pass by.

        Args:
            batch: tensors (b, …) by name, "labels" int64 (b,) among them; b is the same on every process.

        Raises:
            UserError: the examples have another shape than those before.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        count = len(batch["labels"]) * world
        # On the host, from counters alone: which of them stay is known without asking the device.
        number = torch.arange(self._seen, self._seen + count)
        place = (random_bits(derive_key("reservoir/1", self.seed), self._seen, count, "cpu") * (number + 1)) >> 32
        place = torch.where(number < self.size, number, place)
        stays = [(p, i) for i, p in enumerate(place.tolist()) if p < self.size]
        free = self.size - self._seen
        first = self._seen
        self._seen += count
        if not stays:
            return
        rows = {name: _from_everyone(tensor.detach(), world) for name, tensor in batch.items()}
        self._allocate(rows)
        if self.balanced:
            self._put(dict(stay for stay in stays if stay[1] < free), rows)
            for _, i in stays:
                if i >= free:
                    self._replace_frequent(rows, i, first + i)
        else:
            self._put(dict(stays), rows)  # of several for one place the last

    def draw(self, count: int) -> dict[str, Tensor]:
        """Return `count` of the kept examples, drawn without replacement; all, shuffled, where fewer are kept.

        The processes of a run divide among them what one process would draw for all: `count` each, or equal parts of
        all that are kept (the last few of which nobody gets where they cannot be divided).
        """
        device = self._rows["labels"].device
        key = derive_key("reservoir/draw/1", self.seed, 0)
        order = random_bits(key, self._draws * self.size, len(self), device).argsort(stable=True)
        self._draws += 1
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        if len(self) >= world:
            count = min(count, len(self) // world)
            order = order[rank * count : (rank + 1) * count]
        return {name: rows.index_select(0, order) for name, rows in self._rows.items()}

    def kept(self) -> dict[str, Tensor]:
        """Return the kept examples, in order of their places."""
        return {name: rows[: len(self)] for name, rows in self._rows.items()}

    def bytes(self) -> int:
        """Bytes of the places, taken or not."""
        return sum(rows.numel() * rows.element_size() for rows in self._rows.values())

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self._rows = {name: rows.to(device) for name, rows in self._rows.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return examples and counters."""
        rows = {name: tensor.clone() for name, tensor in self.kept().items()}
        settings = {"size": self.size, "seed": self.seed, "balanced": self.balanced, "classes": self.classes}
        return {**settings, "seen": self._seen, "draws": self._draws, "rows": rows}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Reservoir:
        """Return the reservoir of a `state_dict`."""
        made = cls(state["size"], state["seed"], state["balanced"], state["classes"])
        made._seen, made._draws = state["seen"], state["draws"]
        for name, rows in state["rows"].items():
            made._rows[name] = rows.new_zeros(made.size, *rows.shape[1:])
            made._rows[name][: len(rows)] = rows
        return made

    def _allocate(self, rows: Mapping[str, Tensor]) -> None:
        for name, tensor in rows.items():
            if name not in self._rows:
                self._rows[name] = tensor.new_zeros(self.size, *tensor.shape[1:])
            elif self._rows[name].shape[1:] != tensor.shape[1:]:
                known, new = tuple(self._rows[name].shape[1:]), tuple(tensor.shape[1:])
                raise UserError(f"replayed {name} all need one shape, and after {known} came {new}")

    def _put(self, chosen: Mapping[int, int], rows: Mapping[str, Tensor]) -> None:
        if not chosen:
            return
        device = self._rows["labels"].device
        # Not blocking: a copy from the host would otherwise wait for the device.
        to, source = (torch.tensor(list(x)).to(device, non_blocking=True) for x in (chosen.keys(), chosen.values()))
        for name, tensor in rows.items():
            self._rows[name].index_copy_(0, to, tensor.index_select(0, source))

    def _replace_frequent(self, rows: Mapping[str, Tensor], i: int, number: int) -> None:
        labels = self._rows["labels"]
        counts = labels.new_zeros(self.classes).index_add_(0, labels, torch.ones_like(labels))
        frequent = counts[labels] == counts.max()
        key = derive_key("reservoir/balance/1", self.seed)
        words = random_bits(key, number * self.size, self.size, labels.device)
        place = torch.where(frequent, words, -1).argmax(0, keepdim=True)
        for name, tensor in rows.items():
            self._rows[name].index_copy_(0, place, tensor[i : i + 1])


def _from_everyone(tensor: Tensor, world: int) -> Tensor:
    if world == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
