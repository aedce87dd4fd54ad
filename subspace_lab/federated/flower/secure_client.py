"""A client's four stages of secure aggregation, over Flower's Message API.

J. Bell, K. Bonawitz, A. Gascón, T. Lepoint, M. Raykova, "Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead", CCS 2020 (SecAgg+); K. Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine
Learning", CCS 2017, whose Figure 4 has the stages:

1. keys: two fresh key pairs; the public keys go to the neighbours through the server.
2. shares: Shamir shares of the seed b_u of the own mask and of the masking key, encrypted for each neighbour.
3. masked: x_u + PRG(b_u) + Σ_{v<u} PRG(s_uv) − Σ_{v>u} PRG(s_uv) modulo 2⁶⁴, s_uv agreed on with neighbour v.
4. unmask: the shares of b_v of those whose vectors arrived, and those of the masking keys of those whose did not; never
   both of one client.

| Paper        | Here                          |
|--------------|-------------------------------|
| s_u^SK, c_u  | mask_secret, box_secret       |
| b_u          | seed                          |
| t            | threshold                     |
| U_2, U_3     | nodes, alive                  |

The server is trusted to follow the protocol (honest but curious): it forwards everyone's keys and names those who
dropped out, and nothing is signed.
"""

from __future__ import annotations

import base64
import os
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat, share_keys_plaintext_separate
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, generate_key_pairs, public_key_to_bytes
from torch import Tensor

from subspace_lab.federated.flower import masking
from subspace_lab.federated.flower.records import pack

_STATE = "secure_aggregation"
_SECRET_BYTES = 48  # of a key on the curve P-384


def secret_key(secret: bytes) -> ec.EllipticCurvePrivateKey:
    """Return the private key of its number: what the shares of a masking key hold."""
    return ec.derive_private_key(int.from_bytes(secret, "big"), ec.SECP384R1())


def mask_key(secret: ec.EllipticCurvePrivateKey, public: bytes) -> bytes:
    """Return the key (32 bytes) of the mask that two clients share."""
    return base64.urlsafe_b64decode(generate_shared_key(secret, bytes_to_public_key(public)))


def keys(client: int, order: RecordDict, context: Context) -> RecordDict:
    """Stage 1: make two key pairs and tell the public ones."""
    state, public = ConfigRecord(), ConfigRecord()
    for name in ("mask", "box"):
        private, shown = generate_key_pairs()
        state[f"{name}_secret"] = private.private_numbers().private_value.to_bytes(_SECRET_BYTES, "big")
        public[f"{name}_public"] = public_key_to_bytes(shown)
    state["own_public"] = [cast(bytes, public["mask_public"]), cast(bytes, public["box_public"])]
    context.state[_STATE] = state
    return RecordDict({"secure": public})


def shares(client: int, order: RecordDict, context: Context) -> RecordDict:
    """Stage 2: share the seed of the own mask and the masking key among the neighbours.

    Raises:
        ValueError: the server's lists do not fit together.
    """
    state, told = _entered(context, "own_public"), cast(dict[str, Any], order.config_records["secure"])
    nodes, needed = cast(list[int], told["nodes"]), cast(int, told["threshold"])
    masks, boxes = cast(list[bytes], told["mask_public"]), cast(list[bytes], told["box_public"])
    if needed < masking.threshold(len(nodes)) or len(nodes) < masking.LEAST_CLIENTS:
        raise ValueError(f"{needed} of {len(nodes)} shares would be too few to keep a secret")
    if len({*masks, *boxes}) != 2 * len(nodes):
        raise ValueError("two clients have the same public key")
    if [masks[nodes.index(client)], boxes[nodes.index(client)]] != state.pop("own_public"):
        raise ValueError("the server passes on another public key than this client's")
    seed = os.urandom(masking.SEED_BYTES)
    parts = zip(
        nodes,
        boxes,
        create_shares(seed, needed, len(nodes)),
        create_shares(cast(bytes, state["mask_secret"]), needed, len(nodes)),
        strict=True,
    )
    box = secret_key(cast(bytes, state.pop("box_secret")))
    box_keys, sealed = list[bytes](), list[bytes]()
    for node, public, seed_share, secret_share in parts:
        box_keys.append(generate_shared_key(box, bytes_to_public_key(public)))
        plain = share_keys_plaintext_concat(client, node, seed_share, secret_share)
        sealed.append(encrypt(box_keys[-1], plain))
    state.update(seed=seed, nodes=nodes, mask_public=masks, box_keys=box_keys, threshold=needed)
    return RecordDict({"secure": ConfigRecord({"nodes": nodes, "sealed": sealed})})


def masked(
    client: int, order: RecordDict, context: Context, tensors: dict[str, Tensor], coefficient: float
) -> RecordDict:
    """Stage 3: keep the neighbours' shares, and send coefficient · tensors behind masks.

    Raises:
        ValueError: shares that are not for this client, or of too few.
        UserError: numbers too large for the sum.
    """
    state, told = _entered(context, "seed"), cast(dict[str, Any], order.config_records["secure"])
    nodes, publics = cast(list[int], state["nodes"]), cast(list[bytes], state["mask_public"])
    box_keys = cast(list[bytes], state["box_keys"])
    senders, sealed = cast(list[int], told["nodes"]), cast(list[bytes], told["sealed"])
    if len(senders) < cast(int, state["threshold"]) or not {client, *senders} <= set(nodes):
        raise ValueError("shares of too few neighbours, or of clients that are none")
    mask = secret_key(cast(bytes, state["mask_secret"]))
    words = masking.encode(tensors, coefficient, cast(int, told["clients"]))
    seed_shares, secret_shares = list[bytes](), list[bytes]()
    for sender, ciphertext in zip(senders, sealed, strict=True):
        place = nodes.index(sender)
        plain = decrypt(box_keys[place], ciphertext)
        source, target, seed_share, secret_share = share_keys_plaintext_separate(plain)
        if (source, target) != (sender, client):
            raise ValueError(f"a share of client {source} for client {target} came as one of {sender} for {client}")
        seed_shares.append(seed_share)
        secret_shares.append(secret_share)
        if sender != client:
            masking.add_mask(words, mask_key(mask, publics[place]), negative=sender > client)
    masking.add_mask(words, cast(bytes, state.pop("seed")))
    state.update(senders=senders, seed_shares=seed_shares, secret_shares=secret_shares)
    shapes: dict[str, Any] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return RecordDict({"tensors": pack({"masked": masking.to_tensor(words)}), "shapes": ConfigRecord(shapes)})


def unmask(client: int, order: RecordDict, context: Context) -> RecordDict:
    """Stage 4: give the shares that take the masks off the sum, once.

    Raises:
        ValueError: the server asks for more than one of the two shares of a client, or for the sum of too few.
    """
    state, told = _entered(context, "seed_shares"), cast(dict[str, Any], order.config_records["secure"])
    alive, gone = cast(list[int], told["alive"]), cast(list[int], told["gone"])
    senders = cast(list[int], state["senders"])
    if len({*alive, *gone}) != len(alive) + len(gone) or not {*alive, *gone} <= set(senders):
        raise ValueError("both shares of one client, or one of a stranger, are never told")
    if len(alive) < cast(int, state["threshold"]):
        raise ValueError(f"a sum over {len(alive)} neighbours would tell too much")
    seed_shares, secret_shares = cast(list[bytes], state["seed_shares"]), cast(list[bytes], state["secret_shares"])
    reply = {
        "alive": alive,
        "gone": gone,
        "seed_shares": [seed_shares[senders.index(node)] for node in alive],
        "secret_shares": [secret_shares[senders.index(node)] for node in gone],
    }
    del context.state[_STATE]
    return RecordDict({"secure": ConfigRecord(cast(Any, reply))})


def _entered(context: Context, needed: str) -> Any:
    state = context.state.config_records.get(_STATE)
    if state is None or needed not in state:
        raise ValueError("a stage of secure aggregation was left out or came twice")
    return state
