"""Choosing bases: chunk by chunk in one process, or divided among processes that have the same gradients.

In data-parallel training every process has the averaged gradient, and choosing all bases in all of them would be the
same work done over. So each chooses its share, balanced by cost, and sends what it has chosen to the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from subspace_lab.optim.meter import Meter
from subspace_lab.optim.stack import Stack
from subspace_lab.optim.threads import in_parallel
from subspace_lab.subspaces.base import Members

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Due = Sequence[tuple[Stack, list[int]]]
Changes = list[tuple[Members, Tensor | None]]
Gather = Callable[[slice], tuple[Tensor, Tensor | None]]  # a chunk's gradients, and weights where asked for


class Peers:
    """Processes that step the same weights with the same gradients.

    Args:
        group: the processes; None for all.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        import torch.distributed as dist

        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def send(self, buffers: Sequence[Tensor]) -> None:
        """Fill buffer o of every process with what process o has in it (flat uint8; empty ones stay at home)."""
        import torch.distributed as dist

        sources = [o if self.group is None else dist.get_global_rank(self.group, o) for o in range(self.size)]
        sent = [
            dist.broadcast(buffer, src=source, group=self.group, async_op=True)
            for buffer, source in zip(buffers, sources, strict=True)
            if buffer.numel()
        ]
        for work in sent:
            assert work is not None
            work.wait()


def refresh(due: Due, gather: Callable[[Stack], Gather], meter: Meter, peers: Peers | None = None) -> list[Changes]:
    """Refresh the members that are due; return for each stack (members, change of basis where it is tracked).

    Args:
        due: stacks with their members.
        gather: gives the gradients of a stack.
        meter: counts and times.
        peers: who shares the work.
    """
    timed = [(s, members) for s, members in due if not s.subspace.every_step]
    if not timed:
        return [_refresh_here(s, members, gather) for s, members in due]
    meter.refreshes += sum(len(members) for _, members in timed)
    with meter.watch.running(timed[0][0].device):
        if peers is None or peers.size == 1:
            return [_refresh_here(s, members, gather) for s, members in due]
        return _refresh_divided(due, gather, peers)


def _refresh_here(s: Stack, members: list[int], gather: Callable[[Stack], Gather]) -> Changes:
    if not members:  # all of them are somebody else's share
        return []
    chosen = gather(s)

    def work(chunk: slice) -> tuple[Members, Tensor | None]:
        A, W = chosen(chunk)
        return s.refresh(A, chunk, members, W)

    chunks = [c for c in s.chunks() if any(c.start <= i < c.stop for i in members)]
    # Threads would mix up the order of collectives.
    alone = s.device.type != "cpu" or s.subspace.every_step or s.rows is not None
    return [work(c) for c in chunks] if alone else in_parallel(work, chunks)


def _refresh_divided(due: Due, gather: Callable[[Stack], Gather], peers: Peers) -> list[Changes]:
    divided = [k for k, (s, _) in enumerate(due) if s.subspace.divides and s.rows is None]
    shares = dict(zip(divided, divide([due[k] for k in divided], peers.size), strict=True))
    done: list[Changes] = []
    for k, (s, members) in enumerate(due):
        mine = shares[k][peers.rank] if k in shares else members
        done.append(_refresh_here(s, mine, gather))
    if divided:
        changes = _exchange(
            [due[k][0] for k in divided], [shares[k] for k in divided], [done[k] for k in divided], peers
        )
        for k, change in zip(divided, changes, strict=True):
            done[k] = change
    return done


def divide(due: Due, processes: int) -> list[list[list[int]]]:
    """Return for each stack the members of each process: the dearest matrix goes to the process with least to do.

    A basis of a (p, q) matrix costs min(p, q)² max(p, q); the division is the same on every process.
    """
    pieces = []
    for k, (s, members) in enumerate(due):
        short, long = sorted(s.shape[1:])
        pieces += [(short * short * long, k, i) for i in members]
    load = [(0, o) for o in range(processes)]
    shares: list[list[list[int]]] = [[[] for _ in range(processes)] for _ in due]
    for cost, k, i in sorted(pieces, key=lambda piece: (-piece[0], piece[1], piece[2])):
        done, o = heapq.heappop(load)
        shares[k][o].append(i)
        heapq.heappush(load, (done + cost, o))
    return shares


def _exchange(
    stacks: Sequence[Stack], shares: Sequence[list[list[int]]], done: Sequence[Changes], peers: Peers
) -> list[Changes]:
    """Send what was chosen here, take what others have chosen; return the changes of all members of each stack."""
    turns = [s.subspace.tracks_change for s in stacks]
    changes: list[Tensor | None] = []
    for s, share, mine, turn in zip(stacks, shares, done, turns, strict=True):
        for o, members in enumerate(share):
            if o != peers.rank and members:
                s.subspace.skip(members)
        r = s.coordinates[2]
        whole = torch.zeros(s.B, r, r, device=s.device) if turn else None
        if whole is not None:
            for some, change in mine:
                assert change is not None
                whole[some] = change.to(whole.dtype)
        changes.append(whole)
    tensors = [
        [t for _, t in sorted(s.subspace.state.items())] + ([change] if change is not None else [])
        for s, change in zip(stacks, changes, strict=True)
    ]
    buffers = [
        (_pack if o == peers.rank else _room)(tensors, [share[o] for share in shares]) for o in range(peers.size)
    ]
    peers.send(buffers)
    for o, buffer in enumerate(buffers):
        if o != peers.rank:
            _unpack(buffer, tensors, [share[o] for share in shares])
    everyone = [sorted(i for members in share for i in members) for share in shares]
    return [
        [(members, None if change is None else change[members])]
        for members, change in zip(everyone, changes, strict=True)
    ]


def _pack(tensors: Sequence[Sequence[Tensor]], members: Sequence[list[int]]) -> Tensor:
    """Some members' entries of each stack's tensors as one flat uint8 tensor."""
    parts = [
        t[some].reshape(-1).view(torch.uint8)
        for group, some in zip(tensors, members, strict=True)
        for t in group
        if some
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def _room(tensors: Sequence[Sequence[Tensor]], members: Sequence[list[int]]) -> Tensor:
    """Where what another process has packed will arrive."""
    counted = [
        (t, t[0].numel() * len(some) * t.element_size())
        for group, some in zip(tensors, members, strict=True)
        for t in group
        if some
    ]
    device = counted[0][0].device if counted else None
    return torch.empty(sum(size for _, size in counted), dtype=torch.uint8, device=device)


def _unpack(buffer: Tensor, tensors: Sequence[Sequence[Tensor]], members: Sequence[list[int]]) -> None:
    start = 0
    for group, some in zip(tensors, members, strict=True):
        for t in group if some else ():
            shape = (len(some), *t.shape[1:])
            size = t[0].numel() * len(some) * t.element_size()
            # A copy starts where its dtype may: a slice of bytes need not.
            t[some] = buffer[start : start + size].clone().view(t.dtype).view(shape)
            start += size
