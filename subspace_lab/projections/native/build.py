"""Compiles the C sources on first use and keeps the library in the cache folder.

A library is named by what it depends on (sources, flags, compiler, processor) and ends with the SHA-256 of the rest,
which loaders of shared objects do not look at: half a file is never loaded, as that can kill the process. It is written
under another name and renamed, so that any number of processes may build at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

LOG = logging.getLogger(__name__)

SOURCES = ("words.h", "transform.h", "orthoblock.c", "signs.c")
# No contraction: a fused multiply-add rounds once where the definition rounds twice. -O3 unrolls the register tiles.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-w")
CHOICES = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
DIGEST = 32


def cache_folder() -> Path:
    """Where compiled libraries are kept: below SUBSPACE_CACHE, else the user's cache folder."""
    root = os.environ.get("SUBSPACE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "subspace-lab"
    return Path(root).expanduser() / "native"


def compiler() -> list[str] | None:
    """The command of the system's C compiler: $CC, or the first of cc, gcc, clang; None if there is none."""
    chosen = os.environ.get("CC")
    for command in [shlex.split(chosen)] if chosen else [["cc"], ["gcc"], ["clang"]]:
        if command and shutil.which(command[0]):
            return command
    return None


def library() -> ctypes.CDLL | None:
    """The compiled kernels, from the cache or built now; None, with a line in the log, if that is not possible."""
    command = compiler()
    if command is None:
        LOG.info("no C compiler: projections run in torch alone (install gcc or clang, or set CC)")
        return None
    try:
        path = cache_folder() / f"{_identity(command)}.so"
        if not _sound(path):
            _compile(command, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        LOG.info("compiled kernels are not available, projections run in torch alone: %s", _first_line(error))
        return None


def _identity(command: list[str]) -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(_source(name))
    digest.update(repr((FLAGS, CHOICES, command, _run([*command, "--version"]), _processor())).encode())
    return digest.hexdigest()[:32]


def _source(name: str) -> bytes:
    return resources.files(__package__).joinpath(name).read_bytes()


def _processor() -> str:
    """What -march=native depends on."""
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n", 1)[0]
    except OSError:
        return platform.platform()
    kept = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    return "\n".join(line for line in first.splitlines() if line.startswith(kept)) or platform.platform()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def _sound(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) > DIGEST and hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _compile(command: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        for name in SOURCES:
            Path(folder, name).write_bytes(_source(name))
        units = [str(Path(folder, name)) for name in SOURCES if name.endswith(".c")]
        made = Path(folder, "library.so")
        for i, extra in enumerate(CHOICES):
            try:
                _run([*command, *FLAGS, *extra, "-o", str(made), *units])
                break
            except subprocess.CalledProcessError:
                if i == len(CHOICES) - 1:
                    raise
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(made, path)


def _first_line(error: Exception) -> str:
    told = getattr(error, "stderr", None) or str(error)
    return next((line for line in str(told).splitlines() if line.strip()), type(error).__name__)
