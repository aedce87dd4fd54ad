"""sweep.json: the cells of a sweep, so that a resume, a report and W&B know them without Hydra.

Standard library only. How each cell ended stands in the results.json of its folder and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from subspace_lab import rundir

FILE = "sweep.json"
SCHEMA_VERSION = 1


@dataclass
class Cell:
    """One configuration of a sweep.

    Attributes:
        folder: of its run, relative to the sweep's; in an earlier sweep (`../OTHER/3`) if the cell was done there.
        overrides: what was typed for it, fixed and swept.
        config_hash: see `schema.config_hash`.
    """

    folder: str
    overrides: list[str]
    config_hash: str


@dataclass
class Manifest:
    """What sweep.json holds.

    Attributes:
        command: the command line of its last start.
        sweeper: the last word of the sweeper's class (`BasicSweeper`, `OptunaSweeper`).
        swept: the keys that vary.
        cells: those known so far: all of a grid, the trials asked for of an adaptive sweep.
    """

    command: str
    sweeper: str
    swept: list[str]
    cells: list[Cell] = field(default_factory=list)

    def words(self, cell: Cell) -> str:
        """Return the swept overrides of a cell: what it is called."""
        told = [text for text in cell.overrides if text.lstrip("+").split("=", 1)[0] in self.swept]
        return " ".join(told) or "the only cell"


def read(sweep_dir: Path) -> Manifest | None:
    """Return what a sweep's folder says; None if it says nothing (or the file is cut short)."""
    try:
        found: dict[str, Any] = json.loads((sweep_dir / FILE).read_text(encoding="utf-8"))
        if found["schema_version"] != SCHEMA_VERSION:
            return None
        cells = [Cell(str(c["folder"]), [*map(str, c["overrides"])], str(c["config_hash"])) for c in found["cells"]]
        return Manifest(str(found["command"]), str(found["sweeper"]), [*map(str, found["swept"])], cells)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(sweep_dir: Path, manifest: Manifest) -> None:
    """Write sweep.json as a whole or not at all; the folder is made."""
    sweep_dir.mkdir(parents=True, exist_ok=True)
    partial = sweep_dir / f".{FILE}.partial"
    partial.write_text(json.dumps({"schema_version": SCHEMA_VERSION, **asdict(manifest)}, indent=1) + "\n", "utf-8")
    partial.replace(sweep_dir / FILE)


def finished_elsewhere(sweep_dir: Path, output_root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (config hash, folder) of the completed cells of all other sweeps below the root, and beside this one."""
    files = {*output_root.glob(f"*/sweeps/*/{FILE}"), *sweep_dir.parent.glob(f"*/{FILE}")}
    for file in sorted(files, key=lambda path: (path.stat().st_mtime_ns, str(path))):
        if file.parent.resolve() == sweep_dir.resolve():
            continue
        other = read(file.parent)
        for cell in other.cells if other is not None else ():
            folder = file.parent / cell.folder
            if rundir.status(folder) == "completed" and rundir.digest(folder) == cell.config_hash:
                yield cell.config_hash, folder
