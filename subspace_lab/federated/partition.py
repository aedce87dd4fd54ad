"""How the examples of a task are divided among clients.

IID and two-shard: McMahan et al., AISTATS 2017, arXiv 1602.05629 (§3). Dirichlet: Yurochkin et al., ICML 2019,
arXiv 1905.12022 (§5), as Li et al., ICDE 2022, arXiv 2102.02079 have it: each class is divided by shares of its own.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key

Partition = Literal["iid", "shards", "dirichlet"]
Indices = npt.NDArray[np.int64]

_TRIES = 20  # of Dirichlet shares, before clients that got nothing are given an example


def divide(
    kind: Partition,
    examples: int,
    targets: Indices | None,
    clients: int,
    seed: int,
    *,
    shards: int = 2,
    alpha: float = 0.5,
) -> list[Indices]:
    """Divide the examples 0 … `examples` − 1 so that each belongs to exactly one client.

    Args:
        kind: iid: at random, equally many; shards: sorted by label and cut in clients · shards pieces, of which each
            client is given `shards` at random; dirichlet: of each class the clients get shares drawn from Dir(α).
        examples: how many.
        targets: label of each (examples,); None where nobody knows them.
        clients: how many.
        seed: of the draw.
        shards: pieces of each client.
        alpha: concentration; small: few classes a client.

    Returns:
        Numbers of the examples of each client, ascending, none empty.

    Raises:
        UserError: fewer examples than clients or pieces, or no labels to sort by.
    """
    pieces = clients * (shards if kind == "shards" else 1)
    if pieces > examples:
        what = f"{clients} clients" if pieces == clients else f"{clients} clients with {shards} shards each"
        raise UserError(f"{what} cannot share {examples} training examples", hint=f"at most {examples // shards}")
    generator = np.random.default_rng(derive_key("partition/1", kind, seed))
    if kind == "iid":
        return [np.sort(part) for part in np.array_split(generator.permutation(examples), clients)]
    if targets is None:
        raise UserError(f"federation.partition={kind} needs labels, and these data have none", hint="partition=iid")
    if kind == "shards":
        cut = np.array_split(np.argsort(targets, kind="stable"), pieces)
        given = generator.permutation(pieces).reshape(clients, shards)
        return [np.sort(np.concatenate([cut[piece] for piece in row])) for row in given]
    return _dirichlet(targets, clients, alpha, generator)


def _dirichlet(targets: Indices, clients: int, alpha: float, generator: np.random.Generator) -> list[Indices]:
    classes = [generator.permutation(np.flatnonzero(targets == label)) for label in np.unique(targets)]
    for _ in range(_TRIES):
        owner = np.empty(len(targets), dtype=np.int64)
        for members in classes:
            shares = generator.dirichlet(np.full(clients, alpha))
            ends = np.rint(np.cumsum(shares) * len(members)).astype(np.int64)
            owner[members] = np.searchsorted(ends, np.arange(len(members)), side="right").clip(max=clients - 1)
        counts = np.bincount(owner, minlength=clients)
        if counts.min():
            break
    for empty in np.flatnonzero(counts == 0):  # strong skew leaves some with nothing however often it is drawn
        richest = int(np.bincount(owner, minlength=clients).argmax())
        owner[np.flatnonzero(owner == richest)[0]] = empty
    return [np.flatnonzero(owner == client) for client in range(clients)]
