"""`subspace-lab doctor`: what works here, what does not, and the line that mends it.

Each check imports what it looks at; a failing import is a result and not an error. Only what every run needs fails the
whole.
"""

from __future__ import annotations

import importlib
import netrc
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]
MIN_FREE_GB = 5.0
REINSTALL = "pip install --force-reinstall torch torchvision"


@dataclass(frozen=True)
class Check:
    """One line of the table: `mend` is what to type or install, "" if nothing needs mending."""

    name: str
    verdict: Verdict
    finding: str
    mend: str = ""


def main() -> int:
    """Print the table and return 0, or 1 if something that every run needs is broken."""
    print("checking (importing torch and its company takes some seconds) …", file=sys.stderr)
    checks = [check for find in CHECKS for check in find()]
    print(table(checks))
    return 1 if any(check.verdict == "fail" for check in checks) else 0


def table(checks: list[Check]) -> str:
    """Return the checks as aligned text, each followed by how to mend it."""
    name = max(len(check.name) for check in checks)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    lines = []
    for check in checks:
        verdict = f"{check.verdict:4}"
        if colour:
            verdict = f"\033[{ {'ok': 32, 'warn': 33, 'fail': 31}[check.verdict] }m{verdict}\033[0m"
        lines.append(f"{verdict}  {check.name.ljust(name)}  {check.finding}")
        if check.mend:
            lines.append(f"{' ' * (name + 8)}→ {check.mend}")
    return "\n".join(lines)


def python() -> Iterator[Check]:
    """The interpreter, and how much of the machine this process may use."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", "ok", f"{version}, {sys.prefix}")
    cores = len(os.sched_getaffinity(0))
    yield Check("cores", "ok" if cores > 1 else "warn", f"{cores} of {os.cpu_count()}")


def torch() -> Iterator[Check]:
    """PyTorch and its devices."""
    try:
        module = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        yield Check("torch", "fail", _one_line(error), REINSTALL)
        return
    yield Check("torch", "ok", f"{module.__version__}, {module.get_num_threads()} threads")
    if not module.cuda.is_available():
        built = module.version.cuda
        has_driver = shutil.which("nvidia-smi") is not None
        if built and has_driver:
            yield Check(
                "cuda",
                "warn",
                f"built for CUDA {built} but no GPU is usable",
                "compare with nvidia-smi's version",
            )
        elif has_driver:
            yield Check(
                "cuda",
                "warn",
                "a driver, but a torch built for the CPU",
                "pip install --force-reinstall torch torchvision",
            )
        else:
            yield Check("cuda", "ok", "no GPU on this machine; runs use the CPU")
        return
    for index in range(module.cuda.device_count()):
        device = module.cuda.get_device_properties(index)
        free, total = module.cuda.mem_get_info(index)
        bf16 = "bf16" if module.cuda.is_bf16_supported() else "no bf16: use trainer.precision=32-true"
        yield Check(f"cuda:{index}", "ok", f"{device.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, {bf16}")


def torchvision() -> Iterator[Check]:
    """Torchvision: absent is fine for text, present but broken breaks Lightning and transformers too."""
    if util.find_spec("torchvision") is None:
        yield Check("torchvision", "warn", "not installed; only images need it", "pip install torchvision")
        return
    try:
        module = importlib.import_module("torchvision")
    except Exception as error:
        # A CUDA-built torchvision beside a CPU-only torch: "operator torchvision::nms does not exist".
        mend = "pip install --force-reinstall torch torchvision (both from one source), or pip uninstall torchvision"
        yield Check("torchvision", "fail", f"present but broken: {_one_line(error)}", mend)
        return
    yield Check("torchvision", "ok", module.__version__)


def libraries() -> Iterator[Check]:
    """What the runs import: the first three always, the others when chosen."""
    for name in ("lightning", "hydra", "omegaconf"):
        yield _library(name, "fail")
    for name in (
        "transformers",
        "datasets",
        "tokenizers",
        "sentencepiece",
        "safetensors",
        "sklearn",
        "matplotlib",
        "submitit",
    ):
        yield _library(name, "warn")
    optional = (("bitsandbytes", "quant"), ("flwr", "flower"))
    for name, extra in (("timm", "vision"), ("torchao", "quant"), *optional):
        if util.find_spec(name) is None:
            yield Check(name, "ok", f"not installed; optional: pip install 'subspace-lab[{extra}]'")
        else:
            yield Check(name, "ok", _version(name))


def wandb() -> Iterator[Check]:
    """Weights & Biases: installed, and logged in or offline."""
    if util.find_spec("wandb") is None:
        yield Check("wandb", "warn", "not installed; logger=csv works without", "pip install wandb")
        return
    mode = os.environ.get("WANDB_MODE", "")
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    if mode in ("offline", "disabled"):
        yield Check("wandb", "ok", f"{_version('wandb')}, WANDB_MODE={mode}")
    elif os.environ.get("WANDB_API_KEY") or _in_netrc(host):
        yield Check("wandb", "ok", f"{_version('wandb')}, a key for {host}")
    else:
        yield Check(
            "wandb",
            "warn",
            f"{_version('wandb')}, not logged in",
            "wandb login, or WANDB_MODE=offline; logger=csv needs neither",
        )


def data() -> Iterator[Check]:
    """The data folder, the hub, and room for caches and runs."""
    folder = Path(os.environ.get("SUBSPACE_DATA", "data"))
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        yield Check(
            "data", "ok", f"{folder.resolve()}: {', '.join(names[:8]) or 'empty'}{' …' if len(names) > 8 else ''}"
        )
    else:
        said = "SUBSPACE_DATA" if "SUBSPACE_DATA" in os.environ else "SUBSPACE_DATA is not set"
        mend = "export SUBSPACE_DATA=/your/datasets; data=stdlib_text needs none"
        yield Check("data", "warn", f"no folder {folder} ({said})", mend)
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield Check("hub", "ok", "HF_HUB_OFFLINE is set: local files and caches only")
    elif _reachable("huggingface.co"):
        yield Check("hub", "ok", "huggingface.co answers")
    else:
        yield Check(
            "hub",
            "warn",
            "huggingface.co does not answer",
            "data.files=… reads local files; HF_HUB_OFFLINE=1 uses the cache",
        )
    cache = Path(
        os.environ.get("SUBSPACE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subspace-lab"
    )
    for name, path, mend in (
        ("disk, outputs", Path.cwd(), "paths.output_root=/a/bigger/disk"),
        ("disk, cache", cache, "export SUBSPACE_CACHE=/a/bigger/disk"),
    ):
        place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        free = shutil.disk_usage(place).free / 1e9
        if not os.access(place, os.W_OK):
            yield Check(name, "warn", f"{place} is not writable", mend)
        else:
            yield Check(
                name,
                "ok" if free >= MIN_FREE_GB else "warn",
                f"{free:.0f} GB free at {place}",
                "" if free >= MIN_FREE_GB else mend,
            )


def slurm() -> Iterator[Check]:
    """SLURM: its commands, whether it answers and with which partitions, and what a preempted job is told."""
    missing = [name for name in ("sbatch", "srun", "scontrol", "sinfo") if shutil.which(name) is None]
    if len(missing) == 4:
        yield Check("slurm", "ok", "not on this machine")
        return
    if missing:
        yield Check("slurm", "warn", f"missing: {', '.join(missing)}", "load your site's SLURM module")
        return
    partitions = _output("sinfo", "-h", "-o", "%P: %D nodes, %G, %l")
    if partitions is None:
        yield Check("slurm", "warn", "installed, but the controller does not answer", "sinfo says why")
        return
    shown = "; ".join(line.strip() for line in partitions.splitlines()[:6])
    yield Check("slurm", "ok", f"{shown or 'no partition'} (subspace-lab sbatch, hydra/launcher=submitit_slurm)")
    settings = _output("scontrol", "show", "config") or ""
    if "PreemptMode" in settings and not re.search(r"PreemptMode\s*=\s*OFF", settings):
        told = "SIGUSR2" if "preempt_send_user_signal" in settings else "SIGTERM, where the partition has a GraceTime"
        yield Check("preemption", "ok", f"a preempted job is told by {told}")


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (python, torch, torchvision, libraries, wandb, data, slurm)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _library(name: str, verdict: Verdict) -> Check:
    try:
        importlib.import_module(name)
    except Exception as error:
        distribution = {"hydra": "hydra-core", "sklearn": "scikit-learn"}.get(name, name)
        return Check(name, verdict, _one_line(error), f"pip install --force-reinstall {distribution}")
    return Check(name, "ok", _version(name))


def _version(name: str) -> str:
    distribution = {"hydra": "hydra-core", "sklearn": "scikit-learn"}.get(name, name)
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "installed"


def _in_netrc(host: str) -> bool:
    # Only whether there is an entry: the key itself is never shown.
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reachable(host: str) -> bool:
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        import urllib.request

        try:
            urllib.request.urlopen(urllib.request.Request(f"https://{host}", method="HEAD"), timeout=4).close()
        except (OSError, ValueError):
            return False
        return True
    try:
        socket.create_connection((host, 443), timeout=2).close()
    except OSError:
        return False
    return True


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
