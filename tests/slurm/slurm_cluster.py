"""A SLURM of its own on this machine: munged, slurmctld and a few slurmds in a temporary folder."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
INSTALL = "apt-get install slurmctld slurmd slurm-client munge"

# Where `make install` and packages put the plugin that runs steps in Enroot containers; there is none in Debian.
PYXIS = (
    *Path("/usr/local/lib").glob("**/slurm*/spank_pyxis.so"),
    *Path("/usr/lib").glob("**/slurm*/spank_pyxis.so"),
    *Path("/usr/lib64").glob("slurm*/spank_pyxis.so"),
)

# What a test before has made of this process: a job must not take itself for a rank.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# A requeued job waits as long as a credential lives (5 s is the least), a node is down after SlurmdTimeout: both are
# minutes by default.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
JobRequeue=1
ReturnToService=2
SlurmdTimeout=6
MessageTimeout=5
TCPTimeout=2
SlurmctldTimeout=10
InactiveLimit=0
KillWait=2
MinJobAge=300
OverTimeLimit=0
UnkillableStepTimeout=20
LaunchParameters=use_interactive_step
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing_programs() -> list[str]:
    """Programs of SLURM that are not installed here."""
    return [name for name in PROGRAMS if _where(name) is None]


def _where(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _program(name: str) -> str:
    found = _where(name)
    assert found is not None, name
    return found


def missing_pyxis() -> str:
    """What is missing for steps in Enroot containers; nothing where all is there."""
    if not PYXIS:
        return "no spank_pyxis.so (NVIDIA pyxis)"
    if _where("enroot") is None:
        return "no enroot (NVIDIA enroot)"
    return ""


@dataclass
class Cluster:
    """A running SLURM."""

    folder: Path
    environment: dict[str, str]
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Runs a client of SLURM, or what calls one; returns what it printed."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment | environment, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What slurmctld knows of a job."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = 300) -> None:
        """Waits until something holds."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, (
                f"{what}: not in {seconds:.0f} s\n{self.run('squeue')}{self.run('sinfo')}"
            )
            time.sleep(0.2)

    def ended(self, number: str, seconds: float = 400) -> dict[str, str]:
        """Waits for the end of a job, requeued as often as it may be; returns what slurmctld knows of it."""
        unfinished = {
            "PENDING",
            "RUNNING",
            "COMPLETING",
            "REQUEUED",
            "CONFIGURING",
            "SUSPENDED",
            "REQUEUE_HOLD",
        }
        self.wait(f"end of job {number}", lambda: self.job(number)["JobState"] not in unfinished, seconds)
        return self.job(number)

    def start_node(self, name: str) -> None:
        """Starts a slurmd, which finds an `enroot` of its node's own: nodes of a real cluster do not share disks."""
        path = f"{self.folder / f'enroot.{name}'}:{self.environment['PATH']}"
        self.nodes[name] = _start(
            [_program("slurmd"), "-D", "-N", name, "-f", str(self.folder / "slurm.conf")],
            self.environment | {"PATH": path},
        )

    def processes_of(self, node: str) -> list[int]:
        """Processes of this cluster's jobs on a node, and what SLURM put above them."""
        marks = {f"SLURM_CONF={self.folder / 'slurm.conf'}".encode(), f"SLURMD_NODENAME={node}".encode()}
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if marks <= set((entry / "environ").read_bytes().split(b"\0")):
                    found.add(int(entry.name))
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    if b"slurmstepd" in (Path("/proc") / str(parent) / "cmdline").read_bytes():
                        found.add(parent)
            except OSError:
                continue  # it has ended meanwhile
        return sorted(found)

    def cut_power(self, node: str) -> None:
        """Kills a slurmd with all that runs on its node."""
        self.nodes[node].kill()
        self.nodes[node].wait()
        for number in self.processes_of(node):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _configure(folder: Path, names: list[str], cpus: int) -> None:
    host = socket.gethostname()
    first, *ports = _free_ports(1 + len(names))
    # More CPUs than there are: see CONFIGURATION; slurmd -D would otherwise set the node aside.
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000 State=UNKNOWN"
        for name, port in zip(names, ports, strict=True)
    ]
    text = CONFIGURATION.format(
        user=getpass.getuser(), host=host, port=first, folder=folder, nodes="\n".join(nodes)
    )
    text += "SlurmdParameters=config_overrides\n"
    (folder / "slurm.conf").write_text(text)
    if not missing_pyxis():
        _configure_pyxis(folder, names)
    (folder / "state").mkdir()
    key = folder / "munge" / "key"
    key.parent.mkdir(mode=0o700)
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)


def _configure_pyxis(folder: Path, names: list[str]) -> None:
    (folder / "plugstack.conf").write_text(f"required {PYXIS[0]} runtime_path={folder / 'pyxis'}\n")
    for name in names:
        # pyxis keeps nothing but PATH of the environment of slurmd.
        program = folder / f"enroot.{name}/enroot"
        program.parent.mkdir()
        settings = " ".join(
            f"ENROOT_{what.upper()}_PATH={program.parent / what}" for what in ("data", "cache", "runtime")
        )
        program.write_text(f'#!/bin/sh\n{settings} exec {_program("enroot")} "$@"\n')
        program.chmod(0o755)


@contextmanager
def running_cluster(folder: Path, names: list[str], cpus: int = 4) -> Iterator[Cluster]:
    """Starts a cluster and stops what it started, and what its jobs left."""
    _configure(folder, names, cpus)
    munge = folder / "munge"
    environment = {key: value for key, value in os.environ.items() if key not in OF_A_RANK}
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    cluster = Cluster(folder, environment)
    started = [
        _start(
            [
                _program("munged"), "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key",
                f"--log-file={munge}/log", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed",
            ],
            environment,
        )
    ]  # fmt: skip
    try:
        _until((munge / "socket").exists, "munged")
        started.append(_start([_program("slurmctld"), "-D", "-f", str(folder / "slurm.conf")], environment))
        for name in names:
            cluster.start_node(name)
        _until(lambda: _num_idle(environment) == len(names), f"slurmctld and its nodes, see {folder}/*.log")
        yield cluster
    finally:
        subprocess.run(
            ["scancel", f"--user={getpass.getuser()}", "--quiet"], env=environment, timeout=30, check=False
        )
        for process in (*cluster.nodes.values(), *reversed(started)):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name in names:
            for number in cluster.processes_of(name):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


def _num_idle(environment: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    return len(done.stdout.split()) if done.returncode == 0 else 0


def _until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 40
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not start in 40 s"
        time.sleep(0.1)
