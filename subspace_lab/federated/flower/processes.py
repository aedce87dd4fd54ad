"""Ray's processes, so that none is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PATIENCE_S = 5.0  # for processes that are ending by themselves


class Processes:
    """Ray's processes of one run: those that name its folder, and what they start. Only to be used with ray imported.

    Args:
        folder: of the run; no other process knows its name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._known: dict[int, Any] = {}

    def note(self) -> None:
        """Remember those that run now: what a process has started is not found any more once that has ended."""
        import psutil  # Ray brings it along

        for process in psutil.process_iter(["cmdline"]):
            if any(self._folder in part for part in process.info["cmdline"] or ()):
                try:
                    for each in (process, *process.children(recursive=True)):
                        self._known[each.pid] = each
                except psutil.NoSuchProcess:
                    continue

    def kill_clients(self) -> None:
        """End the workers that run clients, at once."""
        self.note()
        self._kill(lambda process: "ClientAppActor" in " ".join(process.cmdline()))

    def end(self) -> None:
        """Wait for all to end, and end those that do not."""
        import psutil

        self.note()
        psutil.wait_procs(list(self._known.values()), timeout=_PATIENCE_S)
        self._kill(lambda process: True)
        psutil.wait_procs(list(self._known.values()), timeout=_PATIENCE_S)

    def _kill(self, wanted: Any) -> None:
        import psutil

        for process in self._known.values():
            try:
                if process.is_running() and wanted(process):
                    process.kill()
            except psutil.Error:
                continue
