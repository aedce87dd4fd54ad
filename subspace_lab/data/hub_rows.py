"""One split of a data set from the Hugging Face hub, or from the folder where it was saved before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from subspace_lab.data.hub import hub_error, require_network


def hub_rows(name: str, folder: Path, hub: str, config: str | None, split: str) -> Any:
    """The rows (`datasets.Dataset`) of a split.

    Args:
        name: of the task, for messages, and of its folder.
        folder: `<folder>/<name>/<split>` may hold what `save_to_disk` wrote.
        hub: name on the hub.
        config: of the set there, if it has several.
        split: which part.

    Raises:
        UserError: neither has it.
    """
    import datasets

    local = folder / name / split
    source = f"{hub} ({split}) from the Hugging Face hub"
    bars = datasets.utils.logging.is_progress_bar_enabled()
    try:
        if local.is_dir():
            source = str(local)
            return datasets.load_from_disk(str(local))
        if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("1", "true", "yes", "on"):
            require_network()
        if bars:
            datasets.disable_progress_bars()
        return datasets.load_dataset(hub, config, split=split)
    except Exception as error:
        hint = "with a network it is downloaded once; or write it there with save_to_disk"
        raise hub_error(f"data.tasks: {name} is not in {local}", source, error, hint) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
