"""The server's side of secure aggregation: forwards keys, adds up masked vectors, takes the masks off their sum.

The stages and the papers are those of `subspace_lab.federated.flower.secure_client`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, cast

import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from torch import Tensor

from subspace_lab.errors import UserError
from subspace_lab.federated.flower import masking
from subspace_lab.federated.flower.records import Failed, unpack
from subspace_lab.federated.flower.secure_client import mask_key, secret_key

Call = Callable[[str, Mapping[int, RecordDict]], Iterator[tuple[int, RecordDict]]]


def secure_sum(
    call: Call, order: RecordDict, coefficients: Mapping[int, float]
) -> tuple[dict[str, Tensor], dict[int, Failed]]:
    """Σ coefficient · tensors over the clients that answer, without seeing any single one.

    Args:
        call: sends clients orders of a stage, and gives their replies.
        order: what clients are asked to compute.
        coefficients: of each client.

    Returns:
        The sums (float64, on the CPU) and the clients that are missing from them, with the reason.

    Raises:
        UserError: too few clients, clients that fail before they have sent anything, or too many that do so later.
    """
    clients = sorted(coefficients)
    if len(clients) < masking.LEAST_CLIENTS:
        raise UserError(
            f"federation.secure_aggregation=true needs {masking.LEAST_CLIENTS} clients in a round, got {len(clients)}"
        )
    near = masking.neighbourhoods(random.SystemRandom().sample(clients, len(clients)))
    public = _all(call("query.keys", {client: RecordDict() for client in clients}))
    shared = _all(call("query.shares", {client: _introduction(near[client], public) for client in clients}))
    requests = {
        client: RecordDict({**order, "secure": _shares_for(client, near[client], shared, coefficients)})
        for client in clients
    }
    total, shapes, gone = _masked_sum(call("query.masked", requests))
    alive = [client for client in clients if client not in gone]
    _check(near, gone)
    _take_off(total, call, near, public, alive, list(gone))
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    parts = torch.split(masking.decode(total), sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}, gone


def _introduction(near: list[int], public: Mapping[int, RecordDict]) -> RecordDict:
    """Stage 2's order: the neighbours and their public keys."""
    known: dict[str, Any] = {"nodes": near, "threshold": masking.threshold(len(near))}
    for name in ("mask_public", "box_public"):
        known[name] = [public[client].config_records["secure"][name] for client in near]
    return RecordDict({"secure": ConfigRecord(known)})


def _shares_for(
    client: int, near: list[int], shared: Mapping[int, RecordDict], coefficients: Mapping[int, float]
) -> ConfigRecord:
    """Stage 3's order: what the neighbours have sealed for a client."""
    sealed: list[bytes] = []
    for sender in near:
        told = cast(dict[str, Any], shared[sender].config_records["secure"])
        sealed.append(told["sealed"][told["nodes"].index(client)])
    return ConfigRecord(
        {"nodes": near, "sealed": sealed, "coefficient": coefficients[client], "clients": len(coefficients)}
    )


def _masked_sum(
    replies: Iterator[tuple[int, RecordDict]],
) -> tuple[masking.Words, dict[str, list[int]], dict[int, Failed]]:
    total: masking.Words | None = None
    shapes: dict[str, list[int]] = {}
    gone: dict[int, Failed] = {}
    for client, reply in replies:
        if isinstance(reply, Failed):
            gone[client] = reply
            continue
        words = masking.from_tensor(unpack(reply.array_records["tensors"])["masked"])
        told = cast(dict[str, list[int]], dict(reply.config_records["shapes"]))
        if total is None:
            total, shapes = words, told
        elif told != shapes:
            raise UserError(f"client {client} answers with tensors of {told}, others with {shapes}: there is no sum")
        else:
            total += words
    if total is None:
        _give_up(gone)
    return total, shapes, dict(sorted(gone.items()))


def _take_off(
    total: masking.Words,
    call: Call,
    near: Mapping[int, list[int]],
    public: Mapping[int, RecordDict],
    alive: list[int],
    gone: list[int],
) -> None:
    """Stage 4: subtract the own masks of those that are there, and what those that are not left in the others'."""
    orders = {
        client: RecordDict(
            {
                "secure": ConfigRecord(
                    {
                        "alive": [node for node in near[client] if node in alive],
                        "gone": [node for node in near[client] if node in gone],
                    }
                )
            }
        )
        for client in alive
    }
    shares: dict[int, list[bytes]] = {client: [] for client in near}
    silent: dict[int, Failed] = {}
    for client, reply in call("query.unmask", orders):
        if isinstance(reply, Failed):
            silent[client] = reply
            continue
        told = cast(dict[str, Any], reply.config_records["secure"])
        for node, share in zip(told["alive"] + told["gone"], told["seed_shares"] + told["secret_shares"], strict=True):
            shares[node].append(share)
    secrets: dict[int, bytes] = {}
    for client, parts in shares.items():
        needed = masking.threshold(len(near[client]))
        if len(parts) < needed:
            _give_up(silent)
        secrets[client] = combine_shares(parts[:needed])
    for client in alive:
        masking.add_mask(total, secrets[client], negative=True)
    for client in gone:
        secret = secret_key(secrets[client])
        for node in near[client]:
            if node in alive:  # which added the common mask if its number is the larger, and subtracted it otherwise
                key = mask_key(secret, cast(bytes, public[node].config_records["secure"]["mask_public"]))
                masking.add_mask(total, key, negative=node > client)


def _all(replies: Iterator[tuple[int, RecordDict]]) -> dict[int, RecordDict]:
    found: dict[int, RecordDict] = {}
    for client, reply in replies:
        if isinstance(reply, Failed):
            _give_up({client: reply})
        found[client] = reply
    return found


def _check(near: Mapping[int, list[int]], gone: Mapping[int, Failed]) -> None:
    for members in near.values():
        if sum(node not in gone for node in members) < masking.threshold(len(members)):
            _give_up(gone)


def _give_up(failures: Mapping[int, Failed]) -> NoReturn:
    client = min(failures)
    failed = failures[client]
    rest = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    raise UserError(
        f"no secure sum: client {client}: {failed.message}{rest}",
        hint=failed.hint or "more than two thirds of a client's neighbours must answer",
    )
