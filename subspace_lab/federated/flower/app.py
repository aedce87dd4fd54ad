"""The clients' side as a Flower ClientApp. Imports flwr: only to be imported when the engine runs, or by its workers.

Messages and their records; a reply holds these, or `error` (message, hint) alone:

| Type        | Order                                                  | Reply                            |
|-------------|--------------------------------------------------------|----------------------------------|
| query.hello |                                                        | number: the client's             |
| train       | weights (size,), order: the fields of a Work           | tensors: update (size,), float32 |
| query.ask   | weights, order: the fields of a Question, tensors: its | tensors: the answer's            |

`query.keys`, `query.shares`, `query.masked` and `query.unmask` are the stages of
`subspace_lab.federated.flower.secure_client`.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from subspace_lab.errors import UserError
from subspace_lab.federated.flower import secure_client
from subspace_lab.federated.flower.records import pack, unpack

Build = Callable[[DictConfig, str], Any]

_pools: dict[tuple[str, str], Any] = {}  # the clients of this process: of one run, since building them is slow


def client_app(configuration: str, device: str, build: Build | None = None) -> ClientApp:
    """Return the app of all clients; which of them one is, its node's `partition-id` says.

    Args:
        configuration: the resolved configuration of the run as YAML.
        device: where clients compute, for torch.
        build: makes what trains and answers like a `ClientPool` from the configuration and the device; must be
            importable in the workers. None: `ClientPool`.
    """
    app = ClientApp()
    pool = partial(_pool, configuration, device, build)
    app.train()(partial(_reply, _train, pool))
    for action, function in {"hello": _hello, "ask": _ask, **_SECURE}.items():
        app.query(action)(partial(_reply, function, pool))
    return app


Pool = Callable[[], Any]


def _pool(configuration: str, device: str, build: Build | None) -> Any:
    key = (configuration, device)
    if key not in _pools:
        import torch

        torch.set_num_threads(1)  # there is a worker for every core
        if build is None:
            from subspace_lab.federated.client import ClientPool

            build = ClientPool
        _pools.clear()
        _pools[key] = build(cast(DictConfig, OmegaConf.create(configuration)), device)
    return _pools[key]


def _reply(function: Callable[..., RecordDict], pool: Pool, message: Message, context: Context) -> Message:
    client = cast(int, context.node_config["partition-id"])
    try:
        content = function(pool, client, message.content, context)
    except Exception as error:  # told to the server in the reply: Flower would print a traceback and lose its type
        content = RecordDict({"error": _described(error)})
    return Message(content, reply_to=message)


def _described(error: Exception) -> ConfigRecord:
    if isinstance(error, UserError):
        return ConfigRecord({"message": error.message, "hint": error.hint or ""})
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    text = (str(error).strip().splitlines() or [""])[0]
    return ConfigRecord(
        {
            "message": f"{type(error).__name__}: {text} ({where})",
            "hint": "the same run with federation.engine=inprocess shows the whole traceback",
        }
    )


def _hello(pool: Pool, client: int, order: RecordDict, context: Context) -> RecordDict:
    return RecordDict({"hello": ConfigRecord({"number": client})})


def _train(pool: Pool, client: int, order: RecordDict, context: Context) -> RecordDict:
    return RecordDict({"tensors": pack({"update": _update(pool, client, order)})})


def _ask(pool: Pool, client: int, order: RecordDict, context: Context) -> RecordDict:
    return RecordDict({"tensors": pack(_answer(pool, client, order))})


def _update(pool: Pool, client: int, order: RecordDict) -> Tensor:
    from subspace_lab.federated.exchange import Work

    work = Work(**cast(dict[str, Any], dict(order.config_records["order"])))
    update: Tensor = pool().train(_weights(order), [client], work)[0]
    return update


def _answer(pool: Pool, client: int, order: RecordDict) -> dict[str, Tensor]:
    from subspace_lab.federated.exchange import Question

    tensors = unpack(order.array_records["tensors"])
    question = Question(**cast(dict[str, Any], dict(order.config_records["order"])), tensors=tensors)
    answer: dict[str, Tensor] = pool().answer(_weights(order), [client], question)[0]
    return answer


def _weights(order: RecordDict) -> Tensor:
    return unpack(order.array_records["weights"])["weights"]


def _masked(pool: Pool, client: int, order: RecordDict, context: Context) -> RecordDict:
    coefficient = order.config_records["secure"]["coefficient"]
    if "tensors" in order.array_records:
        tensors = _answer(pool, client, order)
    else:
        tensors = {"update": _update(pool, client, order)}
    return secure_client.masked(client, order, context, tensors, cast(float, coefficient))


def _stage(
    stage: Callable[..., RecordDict], pool: Pool, client: int, order: RecordDict, context: Context
) -> RecordDict:
    return stage(client, order, context)


_SECURE: dict[str, Callable[..., RecordDict]] = {
    "keys": partial(_stage, secure_client.keys),
    "shares": partial(_stage, secure_client.shares),
    "masked": _masked,
    "unmask": partial(_stage, secure_client.unmask),
}
