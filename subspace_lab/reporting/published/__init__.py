"""Figures printed in papers, as data files with their source; `lookup` finds one by its path."""

from __future__ import annotations

from importlib import resources
from typing import Any

from subspace_lab.errors import UserError, did_you_mean


def lookup(entry: str) -> dict[str, Any]:
    """Return {"source", "metrics", …} of one published figure.

    Args:
        entry: file/…/key, e.g. `galore_c4/60m/galore`.

    Raises:
        UserError: there is no such entry; the message names the nearest.
    """
    from omegaconf import OmegaConf

    file, _, path = entry.partition("/")
    folder = resources.files(__package__)
    names = sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))
    if file not in names:
        raise UserError(
            f"published={entry}: no such table",
            hint=did_you_mean(file, names) or f"there are: {', '.join(names)}",
        )
    table: Any = OmegaConf.to_container(OmegaConf.create((folder / f"{file}.yaml").read_text(encoding="utf-8")))
    node = table["entries"]
    for key in path.split("/"):
        if not isinstance(node, dict) or key not in node:
            options = list(node) if isinstance(node, dict) else []
            raise UserError(
                f"published={entry}: no '{key}' there",
                hint=did_you_mean(key, options) or f"there are: {', '.join(options)}",
            )
        node = node[key]
    if not isinstance(node, dict) or "metrics" not in node:
        raise UserError(f"published={entry}: name one entry", hint=f"there are: {', '.join(node)}")
    return {"source": table["source"], **node}
