"""A real Slurm on this machine alone: munge, slurmctld and three nodes with two fake GPUs each, no root services.

Everything lies in one fresh folder and on free ports; `stop` ends what `start` began, job scripts included, and
nothing else. Its clients need `environment`; nothing is put into this process's own.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specreason_batch.pairs import dying_with

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
NODES = ("node1", "node2", "node3")
GPUS_PER_NODE = 2
GRACE_SECONDS = 5  # between the notice of a pre-emption and its end
SYSTEM_FOLDERS = ("/usr/sbin", "/sbin")

CONFIGURATION = """
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
JobRequeue=1
SlurmdTimeout=2
MessageTimeout=2
TCPTimeout=1
KillWait=3
MinJobAge=3600
MaxArraySize={max_array_size}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What a cluster needs and this machine does not have."""
    return [name for name in PROGRAMS if _find(name) is None]


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_FOLDERS]))


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 60.0, every: float = 0.1) -> Any:
    """The condition's first true value. Fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(every)
    return found


@dataclass(slots=True)
class Cluster:
    """One Slurm. `folder`: a fresh one, with a short path (sockets lie in it)."""

    folder: Path
    max_array_size: int = 7  # six shards are an array, nine are not
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a client of this cluster, and only of this one, runs with."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return inherited | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Returns when all nodes are idle."""
        self._write_files()
        munge = [f"--{name}={self.folder}/{path}" for name, path in _MUNGE_FILES.items()]
        self._launch("munged", "munged", "--foreground", "--force", *munge)
        wait_for("munge's socket", (self.folder / "run" / "munge.socket").exists)
        self._launch("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()

    def stop(self) -> None:
        """End every daemon and whatever they started, wherever it went."""
        for name in ("slurmctld", *NODES, "munged"):
            self._end(name)
        for pid in self._processes():
            _kill(pid, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        self._launch(node, "slurmd", "-D", "-N", node)

    def wait_for_nodes(self) -> None:
        """Until all are there and nothing runs on them."""
        wait_for("three idle nodes", lambda: self._node_states() == ["idle"] * len(NODES))

    def kill_node_daemon(self, node: str) -> None:
        """As if the network to it had gone: its job scripts keep running."""
        self._daemons.pop(node).kill()

    def call(self, *words: str, folder: Path | None = None, check: bool = True, **environment: str) -> str:
        """A client's standard output."""
        done = subprocess.run(
            words,
            cwd=folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert not check or done.returncode == 0, f"{words}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job` of one job or task, by field."""
        text = self.call("scontrol", "show", "job", "--oneliner", job_id)
        return dict(word.split("=", 1) for word in text.splitlines()[0].split() if "=" in word)

    def states(self, job_id: str) -> dict[str, str]:
        """State of every task of an array (or of one job) by `<array>_<task>`."""
        found: dict[str, str] = {}
        for line in self.call("scontrol", "show", "job", "--oneliner", job_id).splitlines():
            fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
            name = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}" if "ArrayJobId" in fields else fields["JobId"]
            found[name] = fields["JobState"]
        return found

    def wait_until(self, job_id: str, *states: str, seconds: float = 60.0) -> dict[str, str]:
        """The states, once all tasks are in one of these."""
        return wait_for(  # type: ignore[no-any-return]
            f"{job_id} to be {states}: {self.states(job_id)}",
            lambda: (found := self.states(job_id)) and set(found.values()) <= set(states) and found,
            seconds,
        )

    def running_pids(self, **environment: str) -> list[int]:
        """Processes of this cluster whose environment holds these values."""
        wanted = {f"{name}={value}".encode() for name, value in environment.items()}
        return [pid for pid in self._processes() if wanted <= _environment(pid)]

    def _processes(self) -> list[int]:
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in pids if pid != os.getpid() and mark in _environment(pid)]

    def _node_states(self) -> list[str]:
        text = self.call("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False)
        return text.split()

    def _write_files(self) -> None:
        for name in ("run", "state", "log", "dev", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        for gpu in range(GPUS_PER_NODE):
            (self.folder / "dev" / f"gpu{gpu}").symlink_to("/dev/null")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (self.folder / "slurm.conf").write_text(self._configuration())
        devices = f"{self.folder}/dev/gpu[0-{GPUS_PER_NODE - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName=node[1-{len(NODES)}] Name=gpu File={devices}\n")

    def _configuration(self) -> str:
        controller_port, *ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 "
            f"Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=True)
        )
        return CONFIGURATION.format(
            folder=self.folder,
            controller_port=controller_port,
            max_array_size=self.max_array_size,
            nodes=nodes,
            grace=GRACE_SECONDS,
        )

    def _launch(self, name: str, program: str, *arguments: str) -> None:
        path = _find(program)
        assert path is not None
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [path, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=dying_with(os.getpid()),  # noqa: PLW1509 (should pytest be killed)
            )

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.terminate()
        try:
            daemon.wait(5)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


_MUNGE_FILES = {
    "socket": "run/munge.socket",
    "pid-file": "run/munged.pid",
    "log-file": "log/munged.log",
    "seed-file": "run/munged.seed",
    "key-file": "munge.key",
}


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def _environment(pid: int) -> set[bytes]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
