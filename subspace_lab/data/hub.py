"""The Hugging Face hub, and being offline: one clear line at once instead of half a minute of retries."""

from __future__ import annotations

import os
import socket
import urllib.request
from urllib.parse import urlsplit

from subspace_lab.errors import UserError


def require_network(url: str | None = None) -> None:
    """Return if the host of `url` (the hub's if null) has an address, or a proxy will look it up.

    Raises:
        ConnectionError: it has none: this machine is offline.
    """
    host = urlsplit(url or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname or ""
    if "https" in urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise ConnectionError(f"no network: {host} has no address here") from error


def hub_error(tried: str, source: str, error: BaseException, hint: str) -> UserError:
    """One line for whatever was raised while `source` was looked for, after all that was `tried` before."""
    reason = (str(error).strip().splitlines() or [""])[0].split(". ")[0][:160] or type(error).__name__
    before = f"{tried}, and " if tried else ""
    return UserError(f"{before}cannot read {source} ({reason})", hint=hint)
