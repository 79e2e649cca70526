"""What is said to Slurm and heard from it: where a process finds itself, requeueing, the site's limits, what is queued.

Owns: the commands of scontrol and squeue and how their output reads; how each behaves was tried on a real one
(tests/slurm). Does not know: shards, configurations.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DEFAULT_MAX_ARRAY_SIZE = 1001  # Slurm's own, where the site did not say
_COMMAND_SECONDS = 60.0  # a controller that is busy or restarting is waited for


class SlurmError(Exception):
    """A Slurm command failed. The message is what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Where this process finds itself: a job, or one task of an array."""

    job_id: str | None  # None: not under Slurm
    array_job_id: str | None
    array_task: int | None
    restarts: int  # how often this job was requeued
    node: str
    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES names them

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Allocation":
        task = environment.get("SLURM_ARRAY_TASK_ID")
        devices = environment.get("CUDA_VISIBLE_DEVICES", "")
        return cls(
            job_id=environment.get("SLURM_JOB_ID"),
            array_job_id=environment.get("SLURM_ARRAY_JOB_ID"),
            array_task=None if task is None else int(task),
            restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),  # not set at the first run
            node=environment.get("SLURMD_NODENAME") or os.uname().nodename,
            gpus=tuple(name for name in devices.split(",") if name and name != "NoDevFiles"),
        )

    @property
    def name(self) -> str | None:
        """What scontrol takes: `<array>_<task>`. The bare array id would mean all its tasks."""
        return self.job_id if self.array_task is None else f"{self.array_job_id}_{self.array_task}"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What the controller says of one job."""

    state: str  # RUNNING, COMPLETING, PENDING ...
    reason: str
    restarts: int
    excluded: str | None  # nodes it must not run on

    @classmethod
    def parse(cls, line: str) -> "JobState":
        """Of `scontrol show job --oneliner`. Raises SlurmError for anything else."""
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        try:
            excluded = fields["ExcNodeList"]
            return cls(
                state=fields["JobState"],
                reason=fields["Reason"],
                restarts=int(fields["Restarts"]),
                excluded=None if excluded == "(null)" else excluded,
            )
        except (KeyError, ValueError) as error:
            raise SlurmError(f"scontrol show job: cannot be read: {line!r}") from error

    def may_be_requeued(self, restarts: int) -> bool:
        """Whether a run that counts so many restarts is still the job's latest, and nobody has cancelled it.

        `scontrol requeue` brings cancelled jobs back to life, so it must not be asked once the job is going down: but
        for its time limit, everything that takes a running job down either requeues it itself or means it.
        """
        alive = self.state == "RUNNING" or (self.state == "COMPLETING" and self.reason == "TimeLimit")
        return alive and self.restarts == restarts


def requeue(allocation: Allocation, *, elsewhere: bool = False, delay_seconds: float = 0) -> str:
    """Put this job back into the queue, if that is not done already; returns a line that says what came of it.

    Slurm then ends this process: SIGCONT and SIGTERM, and SIGKILL after the site's KillWait. Ignore SIGTERM before.
    `elsewhere`: not on this node again. `delay_seconds`: not before. Both can be said only once the job is pending.
    Raises SlurmError.
    """
    name = allocation.name
    assert name is not None
    found = read_job(name)
    if found.restarts > allocation.restarts:
        return f"Slurm has requeued {name} itself"
    if not found.may_be_requeued(allocation.restarts):
        return f"{name} is not requeued: its state is {found.state} ({found.reason})"
    _call("scontrol", "requeue", name)
    if elsewhere:
        excluded = ",".join(filter(None, [found.excluded, allocation.node]))
        _call("scontrol", "update", f"JobId={name}", f"ExcNodeList={excluded}")
    if delay_seconds:
        _call("scontrol", "update", f"JobId={name}", f"StartTime=now+{delay_seconds:.0f}")
    return f"{name} is requeued" + (f", not on {allocation.node} again" if elsewhere else "")


def read_job(name: str) -> JobState:
    """Raises SlurmError."""
    return JobState.parse(_call("scontrol", "show", "job", "--oneliner", name).strip())


def max_array_size() -> int:
    """The site's MaxArraySize: an array's highest task number is one less. Raises SlurmError."""
    for line in _call("scontrol", "show", "config").splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize":
            return max(1, int(value))
    return DEFAULT_MAX_ARRAY_SIZE


def queued_tasks() -> dict[str, set[int | None]]:
    """Tasks in the queue, waiting or running, by their array's (or job's) id; None: a job without tasks.

    Raises SlurmError.
    """
    found: dict[str, set[int | None]] = {}
    for line in _call("squeue", "--noheader", "--array", "--format=%F %K").splitlines():
        job_id, task = line.split()
        found.setdefault(job_id, set()).add(int(task) if task.isdigit() else None)
    return found


def submit(command: Sequence[str]) -> str:
    """Run an sbatch command with --parsable; returns the job id. Raises SlurmError."""
    return _call(*command).strip().split(";")[0]  # ;<cluster>


def is_installed() -> bool:
    return shutil.which("sbatch") is not None


def answers() -> bool:
    """Whether there is a cluster to be asked."""
    try:
        return is_installed() and bool(_call("scontrol", "ping"))
    except SlurmError:
        return False


def _call(*words: str) -> str:
    """Standard output. Raises SlurmError."""
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMMAND_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{words[0]}: {error}") from error
    if done.returncode != 0:
        raise SlurmError(f"{' '.join(words[:3])}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
