"""A real Slurm on this machine: one munged, one slurmctld, two slurmd on loopback with ports of their own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cli.processes import environment
from tests.ranks import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin"

_CONF = """
ClusterName=megatron-med-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs={cpus} RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs={cpus} RealMemory=8000 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES State=UP OverSubscribe=YES
"""


def why_not() -> str | None:
    """Why Slurm cannot be started here; None where it can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    if missing:
        return f"{missing[0]} is not installed (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd needs root to start the steps of a job"


@dataclass(frozen=True)
class LocalSlurm:
    """A cluster that is up."""

    folder: Path

    def run(self, *command: str, check: bool = True, env: dict[str, str] | None = None) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(
            command, env=self.environment() | (env or {}), capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def environment(self) -> dict[str, str]:
        return environment() | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))


@dataclass(frozen=True)
class Job:
    """A job that was submitted."""

    slurm: LocalSlurm
    number: str

    def describe(self) -> dict[str, str]:
        """``scontrol show job`` as fields."""
        words = self.slurm.run("scontrol", "show", "job", self.number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def poll(self) -> str | None:
        """Its last state; None while it waits or runs."""
        state = self.describe()["JobState"]
        return None if state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED") else state

    def wait(self, seconds: float = 240) -> dict[str, str]:
        """The job when it has ended."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < deadline, f"no end in {seconds} s: {self.describe()}\n{self.slurm.logs()}"
            time.sleep(0.5)
        return self.describe()


@contextlib.contextmanager
def local_slurm(folder: Path) -> Iterator[LocalSlurm]:
    """Starts the cluster, and ends every process of it."""
    folder.mkdir(parents=True)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    ports = [free_port() for _ in range(3)]
    text = _CONF.format(
        host=socket.gethostname(),
        folder=folder,
        cpus=os.cpu_count() or 1,
        controller_port=ports[0],
        port_1=ports[1],
        port_2=ports[2],
    )
    (folder / "slurm.conf").write_text(text)
    slurm = LocalSlurm(folder)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with contextlib.ExitStack() as stack:
        start = lambda *command: stack.enter_context(_daemon(command, slurm))  # noqa: E731
        start(
            *("munged", "--foreground", "--force", f"--key-file={folder}/munge.key"),
            *(f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"),
            *(f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"),
        )
        _until(lambda: (folder / "munge.socket").exists(), slurm)
        start("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            start("slurmd", "-D", "-N", node)
        idle = lambda: slurm.run("sinfo", "-h", "-o", "%T %D", check=False) == "idle 2"  # noqa: E731
        _until(idle, slurm)
        yield slurm
    with contextlib.suppress(ChildProcessError):  # steps of jobs that outlived their slurmd
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@contextlib.contextmanager
def _daemon(command: tuple[str, ...], slurm: LocalSlurm) -> Iterator[None]:
    log = (slurm.folder / f"{Path(command[0]).name}-{command[-1].lstrip('-')[:2]}.out").open("w")
    process = subprocess.Popen(
        [shutil.which(command[0], path=_PATH) or command[0], *command[1:]],
        env=slurm.environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _until(condition: object, slurm: LocalSlurm, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"Slurm did not come up:\n{slurm.logs()}"
        time.sleep(0.2)
