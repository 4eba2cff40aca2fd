"""A real Slurm of one node on loopback, with four pretend GPUs, for as long as a test needs it.

Everything of it lies in one directory, and its ports are free ones: it disturbs no other Slurm. It
needs root and the programs of Debian's packages slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its old credential to expire: the default is two minutes.
AuthInfo=socket={root}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
StateSaveLocation={root}/controller
SlurmdSpoolDir={root}/node
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
SlurmctldTimeout=60
SlurmdTimeout=60
# A run on a busy machine may take this long for its checkpoint after SIGTERM.
KillWait=60
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=patient Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def why_not() -> str:
    """Why no Slurm can be started here; empty if one can."""
    missing = [p for p in PROGRAMS if _which(p) is None]
    if missing:
        return f"no Slurm is installed (Debian: slurmctld slurmd slurm-client munge): {missing[0]}"
    if os.geteuid() != 0:
        return "starting a Slurm takes root"
    return ""


class NoDevices(Exception):
    """A container without the right to make device nodes."""


class Cluster:
    """Starts the daemons.

    Args:
        root: an empty directory.

    Attributes:
        environment: variables with which Slurm's commands find this cluster.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.host = socket.gethostname().split(".")[0]
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(root / "slurm.conf"),
        }
        self._daemons: list[subprocess.Popen] = []
        for name in ("controller", "node"):
            (root / name).mkdir()
        for gpu in range(4):  # copies of /dev/null: Slurm counts only devices
            try:
                os.mknod(root / f"gpu{gpu}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
            except PermissionError as error:
                raise NoDevices("pretend GPUs are device nodes, which cannot be made here") from (
                    error
                )
        key = root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (root / "gres.conf").write_text(f"NodeName={self.host} Name=gpu File={root}/gpu[0-3]\n")
        ports = dict(zip(("controller_port", "node_port"), _free_ports(2), strict=True))
        text = CONFIGURATION.format(root=root, host=self.host, **ports)
        (root / "slurm.conf").write_text(text)
        try:
            self._start(
                "munged",
                "--foreground",
                "--force",  # its own idea of who may own the directories above
                f"--socket={root}/munge.socket",
                f"--key-file={key}",
                f"--pid-file={root}/munged.pid",
                f"--log-file={root}/munged.log",
                f"--seed-file={root}/munge.seed",
            )
            wait_until((root / "munge.socket").exists, "munged's socket", self.logs)
            self._start("slurmctld", "-D", "-i")
            self._start("slurmd", "-D", "-N", self.host)
            wait_until(lambda: self.try_ask("sinfo", "-h", "-o", "%t") == "idle", "node", self.logs)
        except BaseException:
            self.close()
            raise

    def _start(self, program: str, *arguments: str) -> None:
        path = _which(program)
        assert path is not None
        with (self.root / f"{program}.out").open("ab") as out:
            self._daemons.append(
                subprocess.Popen(
                    [path, *arguments],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,  # the tests' Ctrl-C is not for them
                )
            )

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def try_ask(self, *command: str) -> str:
        """The same, or nothing if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    def submit(
        self, script: Path, *arguments: str, flags: tuple[str, ...], cwd: Path, **variables: str
    ) -> str:
        """Submit a batch script; the job's id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *flags, str(script), *arguments],
            env={**self.environment, **variables},
            cwd=cwd,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        text = self.ask("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def state(self, job: str) -> str:
        """JobState of a job."""
        return self.show(job)["JobState"]

    def wait_for(self, job: str, *states: str, seconds: float = 300.0) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        wait_until(
            lambda: self.state(job) in states, f"job {job} to be {states}", self.logs, seconds
        )
        return self.show(job)

    def jobs(self) -> list[str]:
        """Ids of the jobs that wait or run."""
        return self.ask("squeue", "-h", "-r", "-o", "%i").split()

    def clear(self) -> None:
        """Cancel what there still is, and wait for its end."""
        for job in self.jobs():
            self.try_ask("scancel", "--signal=KILL", "--full", job)
            self.try_ask("scancel", job)
        wait_until(lambda: not self.jobs(), "the queue to be empty", self.logs)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        names = ("munged.out", "slurmctld.log", "slurmd.log")
        there = [self.root / name for name in names if (self.root / name).exists()]
        return "\n".join(f"{p.name}:\n{p.read_text(errors='replace')[-2000:]}" for p in there)

    def close(self) -> None:
        """Stop the daemons, the last one first."""
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def wait_until(
    ready: Callable[[], bool],
    what: str,
    details: Callable[[], str] = lambda: "",
    seconds: float = 300.0,
) -> None:
    """Return as soon as something is so; asking takes at most a fifth of the time."""
    end = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        if ready():
            return
        took = time.monotonic() - asked
        assert asked < end, f"waited {seconds} s for {what}\n{details()}"
        time.sleep(max(0.1, min(4.0 * took, 1.0)))


def _which(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
