"""What a merged checkpoint says of itself: `merge.json` for programs, README.md with front matter for people."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import re
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from subspace_lab import catalog
from subspace_lab.merging.base import Merge
from subspace_lab.merging.writing import RECORD

_CHUNK = 1 << 22
_PACKAGES = ("subspace-lab", "torch", "safetensors")


def describe_method(method: Merge) -> dict[str, Any]:
    """Name, paper and parameters of a method; the first two from the option that builds it."""
    target = f"{type(method).__module__}.{type(method).__qualname__}"
    pattern = re.compile(rf"^ *_target_: *{re.escape(target)}$", re.MULTILINE)
    found = next(
        (
            entry
            for entry in catalog.entries("method")
            if pattern.search((catalog.conf_root() / "method" / f"{entry.name}.yaml").read_text(encoding="utf-8"))
        ),
        None,
    )
    parameters = {
        name: getattr(method, name)
        for name in inspect.signature(type(method).__init__).parameters
        if name != "self" and hasattr(method, name)
    }
    return {
        "name": found.name if found else type(method).__name__,
        "description": found.description if found else "",
        "paper": found.paper if found else "",
        "parameters": parameters,
    }


def hash_files(files: Sequence[Path], stop: threading.Event) -> dict[Path, str]:
    """SHA-256 of files, read in pieces; ends early, with what it has, when told to stop."""
    found: dict[Path, str] = {}
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    for path in files:
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                if stop.is_set():
                    return found
                digest.update(view[:count])
        found[path] = digest.hexdigest()
    return found


def versions() -> dict[str, str]:
    """Of what computed the merge."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


def write_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write merge.json and README.md.

    Args:
        folder: of the merged checkpoint.
        record: `subspace_lab.merging.files.merge_files` makes it.
    """
    about = {**record, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    (folder / RECORD).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(folder, record), encoding="utf-8")


def _readme(folder: Path, record: Mapping[str, Any]) -> str:
    method, base, models = record["method"], record["base"], record["models"]
    sources = [*([base] if base else []), *models.values()]
    on_hub = list(dict.fromkeys(source["path"] for source in sources if source["hub"]))
    front = ["---"]
    if (folder / "config.json").is_file():
        front.append("library_name: transformers")
    if on_hub:
        front += ["base_model:", *(f"- {name}" for name in on_hub), "base_model_relation: merge"]
    front += ["tags:", "- merge", "- subspace-lab", "---"]
    lines = ["", f"# Merge of {len(models)} model{'s' if len(models) > 1 else ''}: {method['name']}", ""]
    if method["description"]:
        lines += [f"{method['description']}." + (f" {method['paper']}." if method["paper"] else ""), ""]
    lines += ["| Parameter | Value |", "|---|---|"]
    lines += [f"| {name} | {json.dumps(value)} |" for name, value in method["parameters"].items()]
    lines += [f"| λ was | {record['scale_chosen']} |"] if "scale" in method["parameters"] else []
    lines += [f"| family | {record['family']} |"] if record["family"] else []
    lines += [
        f"| dtype | {', '.join(record['dtypes'])} |",
        "",
        "| Source | Checkpoint | SHA-256 of each file |",
        "|---|---|---|",
    ]
    for label, source in [*([("base", base)] if base else []), *models.items()]:
        hashes = "<br>".join(f"`{file['name']}` {file['sha256']}" for file in source["files"])
        lines.append(f"| {label} | {source['path']} | {hashes} |")
    kinds = record["tensors"]
    lines += [
        "",
        f"{kinds['matrix']} tensors were merged as matrices, {kinds['other']} as others, {kinds['kept']} are as in the "
        f"base. Made with {', '.join(f'{name} {version}' for name, version in record['versions'].items())}; "
        f"`{RECORD}` has all of this for programs.",
        "",
    ]
    return "\n".join(front + lines)
