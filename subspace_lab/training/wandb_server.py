"""Whether Weights & Biases can be used from here: asked once per process, within seconds, and without Lightning.

`wandb.init` itself would try an unreachable server for a minute and then keep nothing.
"""

from __future__ import annotations

import contextlib
import netrc
import os
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

#: seconds that a server has to answer one request
PATIENCE = 3.0
NO_KEY = "no API key"

_asked: dict[str, str | None] = {}


def wanted_mode() -> str | None:
    """Return WANDB_MODE; None if it is unset or empty, which wandb would refuse."""
    if not os.environ.get("WANDB_MODE"):
        os.environ.pop("WANDB_MODE", None)
    return os.environ.get("WANDB_MODE")


def address() -> str:
    """Return where W&B is, from the environment or its own settings files."""
    import wandb

    return os.environ.get("WANDB_BASE_URL") or str(wandb.Settings().base_url)


def tell_offline(reason: str, place: Path) -> None:
    """Say in one line that logging is offline, and how it gets to W&B later.

    Args:
        reason: why.
        place: the folder with the run's `wandb` folder; of a sweep a pattern.
    """
    print(f"wandb: {reason}, logging offline; upload later with: wandb sync {place}/wandb/offline-*", file=sys.stderr)


def obstacle(server: str) -> str | None:
    """Return why nothing can be logged online, None if it can.

    Args:
        server: the address of W&B, as WANDB_BASE_URL.
    """
    if not has_key(server):
        return NO_KEY
    if server not in _asked:
        _asked[server] = None if answers(server) else f"{server} does not answer"
    return _asked[server]


def give_up(server: str, reason: str) -> None:
    """Let later runs of this process know that a server does not work, so that they do not wait for it too."""
    _asked[server] = reason


def answers(server: str, patience: float = PATIENCE) -> bool:
    """Return whether the server answers a request in time, whatever may hang: name look-up, proxy, TCP, HTTP."""
    reply: list[bool] = []

    def ask() -> None:
        query = urllib.request.Request(
            f"{server.rstrip('/')}/graphql", b'{"query": "{ __typename }"}', {"Content-Type": "application/json"}
        )
        try:
            urllib.request.urlopen(query, timeout=patience).close()
            reply.append(True)
        except urllib.error.HTTPError as error:  # an answer, if only that we are not allowed to ask
            reply.append(error.code < 500)
        except (OSError, ValueError):
            reply.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return bool(reply) and reply[0]


def has_key(server: str) -> bool:
    """Return whether `wandb login` or WANDB_API_KEY has left a key, without asking the network or the user."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(server).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False
