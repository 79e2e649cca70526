"""How a run stands, shard by shard, from its files alone; with the Slurm queue's view where there is one.

Owns: what counts as done, in flight, idle and failed, and the sums over all shards. Cheap: it lists folders and reads
metadata, never rows. Does not know: engines, how it is shown. Nothing here writes.
"""

import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specreason_batch.store.attempts import Attempt, AttemptState, ShardProgress, attempt_files
from specreason_batch.store.manifest import read_manifest
from specreason_batch.store.parts import ShardPaths
from specreason_batch.store.prompts import list_shards
from specreason_batch.types import InvalidInput

_STALE_SECONDS = 90.0  # of runs that were configured before there were leases
_FAILURES = (AttemptState.failed, AttemptState.bad_node)  # a stop is none, though it too says why
_MAX_ATTEMPTS_READ = 20  # a shard's newest ones: for its last error and its acceptance
_NUM_READERS = 8  # shards at a time: on a network file system, waiting is all the work
_QUEUE_SECONDS = 10.0  # that squeue may take


class ShardState(StrEnum):
    """How a shard stands."""

    in_flight = "in_flight"  # its newest attempt shows signs of life
    failed = "failed"  # its newest attempt failed, or its output is damaged
    idle = "idle"  # chains are missing and nobody works on them
    done = "done"


class Detail(StrEnum):
    """Why a shard is idle, or how it failed."""

    new = "new"  # no attempt so far
    stopped = "stopped"  # by a signal, everything saved
    lost = "lost"  # taken over by an attempt that left no record
    silent = "silent"  # no sign of life for the lease's stale_seconds
    gone = "gone"  # its process, which ran on this machine, is no more
    nameless = "nameless"  # the newest attempt's file is not whole
    undone = "undone"  # finished, and chains files are missing since
    failed = "failed"
    node = "node"  # the machine's trouble
    damaged = "damaged"  # a Parquet file cannot be read


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedJob:
    """One line of squeue."""

    id: str  # <job>, or <array>_<task>
    state: str  # Slurm's short form: PD, R, CG ...
    reason: str  # why it waits; "None" while it runs


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatus:
    """One shard. Rates, and what is in flight, are 0 unless it is in flight."""

    name: str
    state: ShardState
    detail: Detail | None = None  # None: in flight, or done
    num_done: int = 0  # committed chains, given-up ones included
    num_chains: int | None = None  # to be made in all; None: the input cannot be reached
    num_in_flight: int = 0  # chains begun and not committed
    mean_steps_in_flight: float = 0.0
    num_rejects: int = 0  # unusable input rows, and chains that were given up
    tokens_per_second: float = 0.0  # generated, of the last half minute
    chains_per_second: float = 0.0  # finished, likewise
    num_accepted: int = 0  # drafts, by its newest attempts (20 at most)
    num_decided: int = 0  # drafts accepted or rejected, likewise
    eta_seconds: float | None = None  # by its present rate; None: unknown
    beat_age_seconds: float | None = None  # since the newest attempt's last sign of life; None: no attempt on record
    num_attempts: int = 0
    last_error: str | None = None  # of its newest attempt that failed
    last_error_at: float | None = None  # seconds since the epoch, by the clock of that attempt's machine
    host: str | None = None  # of the newest attempt
    pid: int | None = None
    slurm_job: str | None = None
    queued: QueuedJob | None = None  # that job in squeue's view

    @property
    def acceptance(self) -> float | None:
        """None: nothing was decided."""
        return self.num_accepted / self.num_decided if self.num_decided else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """All shards of a run, in name order, and their sums."""

    output: str
    read_at: float  # seconds since the epoch
    input_path: str
    input_reachable: bool  # False: shards that were never started are not among the shards
    shards: tuple[ShardStatus, ...]
    queue: tuple[QueuedJob, ...] | None  # None: no squeue, no answer, or nothing to ask it for

    @property
    def num_shards(self) -> dict[str, int]:
        """By state."""
        states = [shard.state for shard in self.shards]
        return {state.value: states.count(state) for state in ShardState}

    @property
    def num_done(self) -> int:
        return sum(shard.num_done for shard in self.shards)

    @property
    def num_chains(self) -> int | None:
        """None if one shard's is not known, or no shard is."""
        counts = [shard.num_chains for shard in self.shards if shard.num_chains is not None]
        return sum(counts) if self.shards and len(counts) == len(self.shards) else None

    @property
    def num_in_flight(self) -> int:
        return sum(shard.num_in_flight for shard in self.shards)

    @property
    def num_rejects(self) -> int:
        return sum(shard.num_rejects for shard in self.shards)

    @property
    def tokens_per_second(self) -> float:
        return sum(shard.tokens_per_second for shard in self.shards)

    @property
    def chains_per_second(self) -> float:
        return sum(shard.chains_per_second for shard in self.shards)

    @property
    def acceptance(self) -> float | None:
        decided = sum(shard.num_decided for shard in self.shards)
        return sum(shard.num_accepted for shard in self.shards) / decided if decided else None

    @property
    def eta_seconds(self) -> float | None:
        """Until all shards are done, by the present rate of those in flight; 0 if they are, None where none is."""
        return _eta(self.num_done, self.num_chains, self.chains_per_second)

    @property
    def oldest_beat_seconds(self) -> float | None:
        """Since the last sign of life of the shard in flight that was silent for longest."""
        ages = [shard.beat_age_seconds for shard in self.shards if shard.state is ShardState.in_flight]
        return max((age for age in ages if age is not None), default=None)

    @property
    def last_failure(self) -> ShardStatus | None:
        """The shard with the newest error, of those that are not done all the same."""
        failures = [shard for shard in self.shards if shard.last_error and shard.state is not ShardState.done]
        return max(failures, key=lambda shard: shard.last_error_at or 0.0, default=None)

    @property
    def is_done(self) -> bool:
        return bool(self.shards) and all(shard.state is ShardState.done for shard in self.shards)


AskQueue = Callable[[set[str]], tuple[QueuedJob, ...] | None]


def read_queue(job_ids: set[str]) -> tuple[QueuedJob, ...] | None:
    """squeue's lines for these jobs, all tasks of their arrays included; None if there is no squeue, or no answer."""
    jobs = ",".join(sorted({job.split("_")[0] for job in job_ids}))
    command = ["squeue", "--noheader", "--array", f"--jobs={jobs}", "--format=%i|%t|%r"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_QUEUE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):  # not on a Slurm machine, or every job has left the queue
        return None
    lines = [line.strip().split("|", 2) for line in answer.stdout.splitlines()]
    return tuple(QueuedJob(id=line[0], state=line[1], reason=line[2]) for line in lines if len(line) == 3)


class StatusReader:
    """Reads a run's status again and again; what cannot change is read once."""

    def __init__(self, output_dir: Path, ask_queue: AskQueue = read_queue):
        self._output_dir = output_dir
        self._ask_queue = ask_queue
        self._num_rows: dict[Path, int] = {}  # of parts and input files, which never change

    def read(self) -> RunStatus:
        """Raises InvalidInput if the folder holds no run."""
        run = _Run.read(self._output_dir)
        names = sorted({*run.inputs, *_started(self._output_dir)})
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            shards = list(readers.map(lambda name: self._shard(run, name), names))
        queue = self._queue(shards)
        jobs = {job.id: job for job in queue or ()}
        return RunStatus(
            output=str(self._output_dir),
            read_at=time.time(),
            input_path=run.input_path,
            input_reachable=bool(run.inputs),
            shards=tuple(replace(shard, queued=jobs.get(shard.slurm_job or "")) for shard in shards),
            queue=queue,
        )

    def _queue(self, shards: Iterable[ShardStatus]) -> tuple[QueuedJob, ...] | None:
        asked = {shard.slurm_job for shard in shards if shard.slurm_job and shard.state is not ShardState.done}
        return self._ask_queue(asked) if asked else None

    def _shard(self, run: "_Run", name: str) -> ShardStatus:
        paths = ShardPaths(self._output_dir / name)
        shard = _attempted(name, paths.root, run.stale_seconds)
        try:
            return self._counted(shard, run, paths)
        except _Damaged as damage:
            return replace(
                shard, state=ShardState.failed, detail=Detail.damaged, last_error=str(damage), last_error_at=time.time()
            )

    def _counted(self, shard: ShardStatus, run: "_Run", paths: ShardPaths) -> ShardStatus:
        """With its chains counted. Raises _Damaged."""
        parts = paths.parts("chains")
        done = sum(self._rows(paths.file("chains", part)) for part in parts)
        given_up = sum(self._rows(paths.file("rejects", part)) for part in {*parts} & {*paths.parts("rejects")})
        unusable = _num_rows(paths.file("rejects", "input"))
        expected = self._expected(shard, run, unusable)
        shard = replace(shard, num_done=done, num_chains=expected, num_rejects=unusable + given_up)
        if shard.state is ShardState.in_flight:
            return replace(shard, eta_seconds=_eta(done, expected, shard.chains_per_second))
        if shard.num_chains is None and shard.detail is Detail.undone:
            return replace(shard, state=ShardState.done, detail=None, num_chains=done, eta_seconds=0.0)
        if expected is not None and done >= expected:
            return replace(shard, state=ShardState.done, detail=None, eta_seconds=0.0)
        return shard

    def _expected(self, shard: ShardStatus, run: "_Run", unusable: int) -> int | None:
        """Chains to be made in all: as the newest attempt counted, and as the input has rows.

        The attempt knows a `limit` of its own, the files know of unusable rows that it did not live to report.
        """
        counted = shard.num_chains
        path = run.inputs.get(shard.name)
        rows = self._input_rows(path) if path else None
        if rows is None:
            return counted
        most = min(rows, run.limit or rows) * run.samples_per_prompt
        if counted is not None and counted > most:
            return counted
        return min(most - unusable * run.samples_per_prompt, most if counted is None else counted)

    def _input_rows(self, path: Path) -> int | None:
        try:
            return self._rows(path)
        except _Damaged:
            return None

    def _rows(self, path: Path) -> int:
        if path not in self._num_rows:
            self._num_rows[path] = _num_rows(path)
        return self._num_rows[path]


class _Damaged(Exception):
    """A Parquet file that cannot be read."""


def _num_rows(path: Path) -> int:
    """0 if there is no such file. Raises _Damaged."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except FileNotFoundError:
        return 0
    except (OSError, pa.ArrowException) as error:
        raise _Damaged(f"{path.parent.name}/{path.name} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class _Run:
    """What run.json says that matters here."""

    input_path: str
    inputs: dict[str, Path]  # input files by shard; empty where they cannot be reached from here
    samples_per_prompt: int
    limit: int | None
    stale_seconds: float

    @classmethod
    def read(cls, output_dir: Path) -> "_Run":
        """Raises InvalidInput. `input.shards` is passed over: it is that of the task which made run.json."""
        manifest = read_manifest(output_dir)
        try:
            config: dict[str, Any] = manifest["config"]
            path, lease = config["input"]["path"], config.get("lease") or {}
            stale_seconds = lease.get("stale_seconds", _STALE_SECONDS)
            return cls(path, _inputs(path), config["samples_per_prompt"], config["limit"], stale_seconds)
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{output_dir / 'run.json'}: it is not a run's manifest ({error!r})") from error


def _inputs(path: str) -> dict[str, Path]:
    try:
        return {shard.stem: shard for shard in list_shards(path)}
    except (InvalidInput, OSError):  # not mounted here, or a path relative to another folder
        return {}


def _started(output_dir: Path) -> set[str]:
    """Shards that have output, or an attempt."""
    return {folder.parent.name for kind in ("attempts", "chains") for folder in output_dir.glob(f"*/{kind}")}


def _attempted(name: str, root: Path, stale_seconds: float) -> ShardStatus:
    """What the attempts' files say; nothing is counted yet, and a finished attempt's shard counts as undone."""
    files = attempt_files(root)
    if not files:
        return ShardStatus(name=name, state=ShardState.idle, detail=Detail.new)
    newest, *earlier = [Attempt.read(path) for path in list(files.values())[: -_MAX_ATTEMPTS_READ - 1 : -1]]
    known = [attempt for attempt in (newest, *earlier) if attempt is not None]
    failed = next((attempt for attempt in known if attempt.state in _FAILURES), None)
    status = ShardStatus(
        name=name,
        state=ShardState.idle,
        detail=Detail.nameless,
        num_accepted=sum(attempt.progress.num_accepted for attempt in known),
        num_decided=sum(attempt.progress.num_decided for attempt in known),
        num_attempts=len(files),
        last_error=(failed.error or failed.state.value) if failed else None,
        last_error_at=failed.beat_at if failed else None,
    )
    return status if newest is None else _with_newest(status, newest, stale_seconds)


def _with_newest(status: ShardStatus, newest: Attempt, stale_seconds: float) -> ShardStatus:
    age = max(0.0, time.time() - newest.beat_at)  # the machines' clocks may differ
    state, detail = _standing(newest, age <= stale_seconds)
    progress = newest.progress if state is ShardState.in_flight else ShardProgress()
    return replace(
        status,
        state=state,
        detail=detail,
        num_chains=newest.progress.num_chains or None,
        num_in_flight=progress.num_in_flight,
        mean_steps_in_flight=progress.mean_steps_in_flight,
        tokens_per_second=progress.tokens_per_second,
        chains_per_second=progress.chains_per_second,
        beat_age_seconds=age,
        host=newest.owner.host,
        pid=newest.owner.pid,
        slurm_job=newest.owner.slurm_job,
    )


def _standing(attempt: Attempt, is_fresh: bool) -> tuple[ShardState, Detail | None]:
    match attempt.state:
        case AttemptState.running if attempt.owner.is_surely_dead:
            return ShardState.idle, Detail.gone
        case AttemptState.running if is_fresh:
            return ShardState.in_flight, None
        case AttemptState.running:
            return ShardState.idle, Detail.silent
        case AttemptState.finished:
            return ShardState.idle, Detail.undone
        case AttemptState.failed:
            return ShardState.failed, Detail.failed
        case AttemptState.bad_node:
            return ShardState.failed, Detail.node
        case AttemptState.stopped:
            return ShardState.idle, Detail.stopped
        case AttemptState.lost:
            return ShardState.idle, Detail.lost


def _eta(num_done: int, num_chains: int | None, chains_per_second: float) -> float | None:
    """Seconds; None if it cannot be told."""
    if num_chains is None:
        return None
    left = max(0, num_chains - num_done)
    if not left:
        return 0.0
    return left / chains_per_second if chains_per_second else None
