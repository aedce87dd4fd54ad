"""A process that imports everything once and then is three: one that runs alone, and the two ranks of a pair.

    python worker.py FOLDER PORT ALONE_FD RANK0_FD RANK1_FD

Each of the three serves its socket: a line of JSON with a job comes in, a line with what became of it goes out, until
the other end closes. Ranks find one another as under `torchrun`, by environment variables; SIGQUIT has a process write
its stacks to `stacks-NAME.txt`. Only the standard library until the imports: forking comes before any work of torch's.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What every case needs, paid for once.
IMPORTS = (
    "sklearn.datasets",
    "lightning.pytorch",
    "subspace_lab.run",
    "subspace_lab.hydra_errors",
    "subspace_lab.protocols.continual",
    "subspace_lab.protocols.task_sequence",
    "subspace_lab.protocols.transfer",
    "subspace_lab.training.callbacks.method",
    "subspace_lab.training.callbacks.averaging",
    "subspace_lab.data.images",
    "subspace_lab.models.mlp",
    "subspace_lab.methods.galore",
    "subspace_lab.methods.intrinsic",
    "subspace_lab.methods.continual.projection",
    "subspace_lab.cli",
)
NAMES = ("alone", "rank0", "rank1")


def main() -> None:
    folder, port, *descriptors = sys.argv[1:]
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()
    sockets = [socket.socket(fileno=int(number)) for number in descriptors]
    children = []
    for name, mine in zip(NAMES, sockets, strict=True):
        pid = os.fork()
        if pid == 0:
            for other in sockets:
                if other is not mine:
                    other.close()
            code = 1
            with contextlib.suppress(BaseException):
                serve(name, mine, Path(folder), port)
                code = 0
            os._exit(code)
        children.append(pid)
    for mine in sockets:
        mine.close()
    for pid in children:
        os.waitpid(pid, 0)


def serve(name: str, connection: socket.socket, folder: Path, port: str) -> None:
    """Do jobs until nobody asks any more."""
    if name != "alone":
        rank = name[-1]
        os.environ.update(RANK=rank, LOCAL_RANK=rank, GROUP_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo", TORCHELASTIC_RUN_ID="pair"
        )
    import torch

    from subspace_lab import interrupt

    torch.set_num_threads(1)
    stacks = (folder / f"stacks-{name}.txt").open("w")
    faulthandler.register(signal.SIGQUIT, file=stacks, all_threads=True)
    modules = remember_modules()
    stream = connection.makefile("rwb")
    stream.write(json.dumps({"pid": os.getpid()}).encode() + b"\n")
    stream.flush()
    for line in stream:
        job = json.loads(line)
        place = Path(job["folder"])
        place.mkdir(parents=True, exist_ok=True)
        log = place / f"{name}.log"
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        del modules[:]
        interrupt.request.signal = None
        told: dict[str, Any]
        try:
            told = DO[job["do"]](job, name, modules)
        except BaseException as error:
            told = {"error": f"{type(error).__name__}: {error}", "hint": getattr(error, "hint", None)}
            told["traceback"] = traceback.format_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        stream.write(json.dumps(told | {"log": str(log)}).encode() + b"\n")
        stream.flush()


def remember_modules() -> list[Any]:
    """A list to which every module that a run trains is added when it is made."""
    from subspace_lab.training.module import ExperimentModule

    made: list[Any] = []
    construct = ExperimentModule.__init__

    def constructing(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        made.append(self)

    def trained(self: Any) -> None:
        # Lightning hands out the first process's weights before each evaluation: replicas are compared before that.
        self.trained_digests = [*getattr(self, "trained_digests", []), digest(self.model.state_dict())]

    ExperimentModule.__init__ = constructing  # type: ignore[method-assign]
    ExperimentModule.on_train_end = trained  # type: ignore[method-assign]
    return made


def run_protocol(job: Mapping[str, Any], name: str, modules: list[Any]) -> dict[str, Any]:
    """Train as `subspace-lab WORDS` would, without its report; the weights go to NAME.npz."""
    import numpy as np

    from subspace_lab import build, schema
    from subspace_lab.app import compose_config
    from subspace_lab.optim.shards import whole
    from subspace_lab.training import rng

    place = Path(job["folder"])
    cfg = compose_config([*job["words"], f"paths.output_dir={place}"])
    schema.validate(cfg)
    outcome = build.instantiate(cfg.protocol).run(cfg, place, label="case", resume_dir=place)
    model, method = modules[-1].model, modules[-1].method
    state = {key: whole(value.detach()) for key, value in model.state_dict().items() if hasattr(value, "numpy")}
    np.savez(place / f"{name}.npz", **{key: value.detach().float().numpy() for key, value in state.items()})
    told = {"metrics": outcome.metrics, "timing": outcome.timing, "sections": outcome.sections}
    told["drawn"] = digest(rng.get_state()["torch"])
    told["weights_digest"] = digest(state)
    told["trained_digests"] = getattr(modules[-1], "trained_digests", [])
    told["method_digest"] = digest(method.state_dict() if hasattr(method, "state_dict") else {})
    return told


def run_command(job: Mapping[str, Any], name: str, modules: list[Any]) -> dict[str, Any]:
    """The command line itself."""
    from subspace_lab import cli

    words = [*job["words"], f"hydra.run.dir={job['folder']}"]
    return {"code": cli.main(words)}


def digest(value: Any) -> str:
    """Equal if and only if all tensors and plain values inside are, bit for bit."""
    import torch

    from subspace_lab.optim.shards import whole

    found = hashlib.sha256()

    def take(value: Any) -> None:
        if hasattr(value, "detach"):
            array = whole(value.detach()).cpu().contiguous()
            found.update(f"{array.dtype}{tuple(array.shape)}".encode())
            found.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                found.update(str(key).encode())
                take(value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                take(part)
        else:
            found.update(repr(value).encode())

    take(value)
    return found.hexdigest()[:16]


def wait_for_ever(job: Mapping[str, Any], name: str, modules: list[Any]) -> dict[str, Any]:
    """What a deadlock looks like: the second rank never answers."""
    if name == "rank1":
        time.sleep(1e4)
    return {}


DO = {"protocol": run_protocol, "command": run_command, "hang": wait_for_ever}

if __name__ == "__main__":
    main()
