"""A real SLURM on this one machine: two nodes with fake GPUs, a partition that preempts the other, its own munge.

    sudo scripts/local_slurm.py install       Debian's packages: 4 MB
    sudo scripts/local_slurm.py up            ready in a few seconds
    eval "$(scripts/local_slurm.py env)"      then sbatch, srun, squeue as on any cluster
    sudo scripts/local_slurm.py down          nothing stays behind

Standard library only. Everything lies in one folder (--dir), on free ports, so several can stand beside each other and
beside a real SLURM. Jobs run as root: for tests and for trying things out, not for work. There is no accounting.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sinfo", "sbatch", "munged", "munge")
DEFAULT = Path("/tmp") / f"subspace-slurm-{os.getuid()}"
DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd")
MARKER = ".local_slurm"  # the folder is ours to remove
GPUS = 8

# A site with nodes as conf/cluster/ has them, but quick: a requeued job is back after 6 s (cred_expire), not 120.
CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
SchedulerParameters=sched_interval=2,sched_min_interval=1
KillWait=10
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{user_signal}GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports}] \
CPUs=128 CoresPerSocket=128 RealMemory=1000000 Gres=gpu:{gpus} Feature=a100,h100
PartitionName=debug Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""


class SlurmError(Exception):
    """The local SLURM could not be had; one line says why, the ends of the logs follow."""


def why_not() -> str | None:
    """Return what this machine lacks, None if a local SLURM can be started."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found (scripts/local_slurm.py install)"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


class LocalSlurm:
    """A SLURM in a folder.

    Args:
        folder: configuration, state and logs; removed by `down`.
        nodes: simulated machines.
        user_signal: a preempted job is told by the signal it asked for, else by SIGTERM.
        more: further lines of slurm.conf.
    """

    def __init__(self, folder: Path, *, nodes: int = 2, user_signal: bool = True, more: str = "") -> None:
        self.folder = folder.absolute()
        self.nodes, self.user_signal, self.more = nodes, user_signal, more
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def conf(self) -> Path:
        """The SLURM_CONF of its commands."""
        return self.folder / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """The environment of its commands."""
        return os.environ | {"SLURM_CONF": str(self.conf)}

    def up(self, timeout: float = 30.0) -> None:
        """Start it and wait until all nodes are idle; whatever fails or interrupts this, nothing is left.

        Args:
            timeout: seconds.

        Raises:
            SlurmError: it did not come up.
        """
        reason = why_not()
        if reason is not None:
            raise SlurmError(f"no local SLURM: {reason}")
        if (self.folder / MARKER).exists():
            raise SlurmError(f"there is one in {self.folder} already: `down` ends it")
        try:
            self._write()
            munge = self.folder / "munge"
            where = [f"--{name}-file={munge / name}" for name in ("key", "log", "pid", "seed")]
            self._start("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *where)
            self._wait("munged", ["munge", "-n", f"--socket={munge / 'socket'}"], timeout=10)
            self._start("slurmctld", "-D", "-c")
            for node in range(1, self.nodes + 1):
                self._start("slurmd", "-D", "-N", f"n{node}")
            self._wait("sinfo", ["sinfo", "-h", "-o", "%T %D", "-p", "debug"], f"idle {self.nodes}", timeout=timeout)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End jobs and daemons and remove the folder; safe whatever has or has not been started."""
        if self._processes():
            self._quiet("scancel", "--full", "--signal=KILL", "--user=root")
            self._quiet("scancel", "--user=root")
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and self._quiet("squeue", "-h").strip():
                time.sleep(0.2)
            self._quiet("scontrol", "shutdown")
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + 8
            while time.monotonic() < deadline and self._processes():
                time.sleep(0.1)
        for daemon in self._daemons:
            daemon.poll()  # or it stays a zombie as long as we live
        self._daemons.clear()
        if (self.folder / MARKER).exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def log_tails(self, lines: int = 8) -> str:
        """Return the ends of the daemons' logs."""
        parts = []
        for path in sorted([*self.folder.glob("log/*"), *self.folder.glob("munge/log")]):
            text = path.read_text(errors="replace").splitlines()[-lines:]
            parts += [f"--- {path}", *text] if text else []
        return "\n".join(parts)

    def _write(self) -> None:
        """Write what the daemons read."""
        if self.folder.exists() and any(self.folder.iterdir()):
            raise SlurmError(f"{self.folder} is not empty: choose another with --dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MARKER).touch()
        for name in ("state", "log", "dev", "munge", *(f"spool/n{node + 1}" for node in range(self.nodes))):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        first, *rest = _free_ports(1 + self.nodes)
        conf = CONF.format(
            host=socket.gethostname().split(".")[0],
            folder=self.folder,
            control_port=first,
            node_ports=",".join(map(str, rest)),
            nodes=self.nodes,
            gpus=GPUS,
            user_signal="SlurmctldParameters=preempt_send_user_signal\n" if self.user_signal else "",
        )
        self.conf.write_text(conf + self.more)
        lines = []
        for node in range(1, self.nodes + 1):
            for gpu in range(GPUS):
                (self.folder / "dev" / f"n{node}gpu{gpu}").touch()
            lines.append(f"NodeName=n{node} Name=gpu File={self.folder}/dev/n{node}gpu[0-{GPUS - 1}]\n")
        (self.folder / "gres.conf").write_text("".join(lines))

    def _start(self, *command: str) -> None:
        with (self.folder / "log" / f"{command[0]}.out").open("ab") as log:
            daemon = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is not for them
            )
        self._daemons.append(daemon)

    def _wait(self, what: str, command: list[str], expected: str = "", *, timeout: float) -> None:
        """Repeat a command until it succeeds and its output begins with what is expected."""
        deadline = time.monotonic() + timeout
        said = ""
        while time.monotonic() < deadline:
            ended = next((daemon for daemon in self._daemons if daemon.poll() is not None), None)
            if ended is not None:
                program = str(ended.args[0])  # type: ignore[index]
                raise SlurmError(f"{program} ended with code {ended.returncode}\n{self.log_tails()}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=10)
                said = (done.stdout + done.stderr).strip()
                if done.returncode == 0 and said.startswith(expected):
                    return
            time.sleep(0.1)
        raise SlurmError(f"{what} is not ready after {timeout:g} s, it says: {said[-200:]}\n{self.log_tails()}")

    def _processes(self) -> list[int]:
        """Return its daemons and job steps, whoever started them."""
        found = []
        wanted = f"SLURM_CONF={self.conf}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_daemon = (entry / "comm").read_text().strip() in DAEMONS
                if is_daemon and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def _quiet(self, *command: str) -> str:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=10).stdout
        return ""


def install() -> int:
    """Install Debian's packages; returns the exit code."""
    if why_not() is None:
        return 0
    apt = shutil.which("apt-get")
    command = f"apt-get update && apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
    if apt is None or os.geteuid() != 0:
        print(f"run as root, on Debian or Ubuntu: {command}", file=sys.stderr)
        return 1
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False)
    if done.returncode or why_not() is not None:
        print(f"{command} failed: {done.stderr.strip()[-400:]}", file=sys.stderr)
        return 1
    return 0


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["up", "down", "install", "env"])
    parser.add_argument("--dir", type=Path, default=DEFAULT, help=f"where it lies (default {DEFAULT})")
    parser.add_argument("--nodes", type=int, default=2)
    options = parser.parse_args()
    cluster = LocalSlurm(options.dir, nodes=options.nodes)
    if options.command == "install":
        return install()
    if options.command == "env":
        print(f"export SLURM_CONF={cluster.conf}")
        return 0
    if options.command == "down":
        cluster.down()
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        cluster.up()
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"export SLURM_CONF={cluster.conf}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
