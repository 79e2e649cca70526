"""One task of the array from start to exit status: its shards, a job an engine pair, and whether it goes back in line.

Owns: what the jobs' exit statuses and the signals mean for the task (docs/slurm.md). Does not know: Slurm's commands,
what the jobs do.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.compose import compose_generate, quoted
from jobs.launch import ExitStatus
from specreason_batch.config import GenerateConfig
from specreason_batch.pairs import STOP_SIGNALS, Command, Received, run_side_by_side
from specreason_batch.slurm import Allocation, SlurmError, requeue
from specreason_batch.store.prompts import list_shards
from specreason_batch.submission import Shard, Submission, TaskSettings, gpus_needed, share_gpus
from specreason_batch.types import InvalidInput, Role

SCRATCH_VARIABLE = "SPECREASON_SCRATCH"  # a folder on the node's own disk, this job's alone; removed at its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one array task is to do, and where it finds itself."""

    overrides: list[str]
    shards: list[Shard]  # none: all that the overrides select
    settings: TaskSettings
    log_folder: Path  # of the pairs, where there are several
    here: Allocation
    scratch: Path | None

    @classmethod
    def of(cls, words: Sequence[str], here: Allocation) -> "Task":
        """From a plan file, or from overrides: then an array's task number is its shard's. Raises InvalidInput."""
        number = here.array_task or 0
        if len(words) == 1 and "=" not in words[0]:
            submission, folder = Submission.read(Path(words[0])), Path(words[0]).parent
        else:
            own = [] if here.array_task is None else [Shard(index=number)]
            submission = Submission(overrides=list(words), tasks=[*[[]] * number, own])
            folder = Path()
        if number >= len(submission.tasks):
            raise InvalidInput(f"{words[0]}: it has no task {number}; allowed: 0 to {len(submission.tasks) - 1}")
        return cls(
            overrides=submission.overrides,
            shards=submission.tasks[number],
            settings=submission.settings,
            log_folder=folder,
            here=here,
            scratch=_scratch(),
        )

    @property
    def num_pairs(self) -> int:
        return max(1, min(self.settings.pairs, len(self.shards)))


def run_task(words: Sequence[str], received: Received) -> int:
    """The exit status. Requeues the task where that is called for."""
    try:
        task = Task.of(words, Allocation.of(os.environ))
        if task.here.restarts > task.settings.max_requeues:
            _say(f"requeued {task.here.restarts} times, allowed: {task.settings.max_requeues}: ended; submit again")
            return ExitStatus.failed
        with _removed(task.scratch):
            statuses = _run_jobs(task, received)
    except (InvalidInput, OSError) as error:
        _say(f"error: {error}")
        return ExitStatus.invalid if isinstance(error, InvalidInput) else ExitStatus.failed
    status = ExitStatus.interrupted if received.at_once else combine(statuses)
    received.ignore()  # a requeue ends this process with signals; it must get to its exit
    _say(f"jobs ended with {_listed(statuses)}: {status.name}; {_decide(task, status, received)}")
    return status


# --- running ---


def _run_jobs(task: Task, received: Received) -> list[int]:
    config = compose_generate(task.overrides)
    shares = share_gpus(task.here.gpus, task.num_pairs, gpus_needed(config))
    indices = _indices(task.shards, config)
    _introduce(task, config, indices, shares)
    staged = _staged(task, config, received) if task.settings.stage else []
    if received.any:
        return [ExitStatus.stopped]
    commands = [_command(task, pair, indices, share, staged) for pair, share in enumerate(shares)]
    return run_side_by_side(commands, received, ends_all=lambda status: status == ExitStatus.bad_node)


def _command(task: Task, pair: int, indices: list[int], gpus: list[str], staged: list[str]) -> Command:
    own = ",".join(map(str, indices[pair :: task.num_pairs]))
    python = os.environ.get("PYTHON", sys.executable)
    return Command(
        words=[python, "-m", "jobs.generate", *task.overrides, *staged, f"input.shards=[{own}]"],
        environment={"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {},
        log=_pair_log(task, pair) if task.num_pairs > 1 else None,
    )


def _pair_log(task: Task, pair: int) -> Path:
    return task.log_folder / f"{task.here.name}.pair{pair}.log"


def _indices(shards: Sequence[Shard], config: GenerateConfig) -> list[int]:
    """Where the shards stand now: files may have come or gone since the submission. Raises InvalidInput."""
    numbers = {path.stem: index for index, path in enumerate(list_shards(config.input.path))}
    if not shards:
        return config.input.shards or list(numbers.values())
    if gone := [shard.name for shard in shards if shard.name is not None and shard.name not in numbers]:
        raise InvalidInput(f"input.path: {config.input.path} has no shard {gone[0]!r} any more")
    return [shard.index if shard.name is None else numbers[shard.name] for shard in shards]


def _introduce(task: Task, config: GenerateConfig, indices: list[int], shares: list[list[str]]) -> None:
    here = task.here
    gpus = " | ".join(",".join(share) or "none" for share in shares)
    logs = f", pairs' logs {_pair_log(task, 0).parent}/{here.name}.pair*.log" if task.num_pairs > 1 else ""
    _say(
        f"job {here.name}, restart {here.restarts} of at most {task.settings.max_requeues}, on {here.node}; "
        f"GPUs {gpus}; folder {Path.cwd()}; shards {indices}; output {config.output_dir}{logs}; scratch {task.scratch}"
    )


# --- the models on the node's own disk ---


def _staged(task: Task, config: GenerateConfig, received: Received) -> list[str]:
    """Overrides that name the copies. What cannot be copied is used where it lies, and the log says why."""
    made = []
    for role in Role:
        source = Path(config.engine(role).model)
        if task.scratch is None or not source.is_dir():
            _say(f"{role}.model: {source} is used where it is: {'no folder' if task.scratch else 'no scratch folder'}")
            continue
        target = task.scratch / "models" / role
        if _copy(source, target, received):
            made.append(f"{role}.model={quoted(str(target))}")
    return made


def _copy(source: Path, target: Path, received: Received) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    free = shutil.disk_usage(target.parent).free
    if size > free:
        _say(f"{source} is used where it is: {size / 1e9:.1f} GB, and {target.parent} has {free / 1e9:.1f} GB")
        return False
    command = Command(words=["cp", "-RLT", str(source), str(target)])
    done = run_side_by_side([command], received) == [0]
    _say(f"{source} {'copied to' if done else 'could not be copied to'} {target} ({size / 1e9:.1f} GB)")
    return done


def _scratch() -> Path | None:
    given = os.environ.get(SCRATCH_VARIABLE)
    return Path(given) if given else None


@dataclass(slots=True)
class _removed:
    """Removes a folder at the end."""

    folder: Path | None

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


# --- deciding ---


def combine(statuses: Sequence[int]) -> ExitStatus:
    """The task's status: of what its jobs ended with, what matters most."""
    found = [_status(status) for status in statuses]
    order = (
        ExitStatus.interrupted,
        ExitStatus.invalid,  # no retry would help
        ExitStatus.bad_node,
        ExitStatus.stopped,
        ExitStatus.failed,
        ExitStatus.held,
    )
    return next((status for status in order if status in found), ExitStatus.finished)


def _status(number: int) -> ExitStatus:
    if -number in STOP_SIGNALS:  # it came before the job listened: nothing had begun
        return ExitStatus.stopped
    return ExitStatus(number) if number in list(ExitStatus) else ExitStatus.failed


def _decide(task: Task, status: ExitStatus, received: Received) -> str:
    """Requeue where that is called for; says what was done."""
    here, settings = task.here, task.settings
    if status is ExitStatus.finished:
        return "its shards are done"
    if not wants_requeue(status, here.restarts):
        return "held by another process: that one makes it" if status is ExitStatus.held else "not requeued"
    if received.by_a_person:
        return "not requeued, as SIGINT came; submit again to go on"
    if here.name is None:
        return "not under Slurm: run the same command again"
    if here.restarts >= settings.max_requeues:
        return f"not requeued: max_requeues={settings.max_requeues} is reached; submit again to go on"
    try:
        return requeue(
            here,
            elsewhere=status is ExitStatus.bad_node,
            delay_seconds=settings.held_retry_seconds if status is ExitStatus.held else 0,
        )
    except SlurmError as error:
        return f"could not be requeued: {error}; submit again to go on"


def wants_requeue(status: ExitStatus, restarts: int) -> bool:
    """Whether another run of this task may go on where this one ended.

    Held: at a first run somebody has submitted the shard twice, and this task is the one too many. At a restart the
    holder may be this very task's former run, on a node that Slurm has lost sight of: it is looked at again later.
    """
    return status in (ExitStatus.stopped, ExitStatus.bad_node) or (status is ExitStatus.held and restarts > 0)


def _listed(statuses: Sequence[int]) -> str:
    return ", ".join(str(int(status)) for status in statuses)


def _say(text: str) -> None:
    print(f"task: {text}", flush=True)
