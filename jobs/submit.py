"""`python -m jobs.submit`: a jobs.generate command, handed to Slurm. Its own choices are in conf/submit.yaml.

    python -m jobs.submit experiment=toy input.path=prompts/ output_dir=outputs/mine throttle=8 dry_run=true

Words that name a choice of conf/submit.yaml are its own; all others are jobs.generate's, and are checked as that
would check them. Submitting again submits what is neither done nor in the queue.
"""

import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console

from jobs.compose import compose_generate, quoted
from jobs.launch import ExitStatus, converted, run_job
from specreason_batch import slurm
from specreason_batch.config import GenerateConfig
from specreason_batch.plan import make_plan
from specreason_batch.store.prompts import list_shards
from specreason_batch.submission import (
    FOLDER,
    GENERATE,
    SCRIPTS,
    Shard,
    Stage,
    Submission,
    SubmitConfig,
    TaskSettings,
    chained,
    earlier_submissions,
    generate_stage,
    gpus_needed,
    next_plan_path,
    queued_shards,
    queued_stages,
    queued_task_names,
    share_out,
    step_stages,
    steps_left,
)
from specreason_batch.types import InvalidInput

ConfigStore.instance().store(name="submit_schema", node=SubmitConfig)
OWN_NAMES = frozenset(field.name for field in fields(SubmitConfig))
COMMANDS = ("before", "after", "sbatch", "step_sbatch")
MULTIRUN = {"-m", "--multirun"}
NOT_PASSED_ON = ("output_dir", "input.shards")  # said anew, as they come out


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """What earlier submissions still have with Slurm."""

    shards: list[Shard]
    tasks: list[str]  # <array>_<task>
    stages: Mapping[str, str]  # job ids

    @classmethod
    def read(cls, output_dir: Path, config: SubmitConfig) -> "Queue":
        """Raises InvalidInput, SlurmError."""
        earlier = earlier_submissions(output_dir)
        if not earlier or _is_rehearsal(config):
            return cls(shards=[], tasks=[], stages={})
        tasks = slurm.queued_tasks()
        return cls(
            shards=queued_shards(earlier, tasks),
            tasks=queued_task_names(earlier, tasks),
            stages=queued_stages(earlier, tasks),
        )


def submit(words: Sequence[str], config: SubmitConfig, console: Console) -> None:
    """Plan, and submit. Raises InvalidInput, OSError."""
    _check_place(config, console)
    generate = compose_generate(words)
    path = next_plan_path(Path(generate.output_dir))
    try:
        plan, stages = _plan(words, generate, config, path, console)
        if not stages:
            console.print("nothing to submit", style="bold")
        elif config.dry_run:
            _show(plan, path, stages, console)
        else:
            _submit_stages(plan, path, stages, console)
    except slurm.SlurmError as error:
        raise InvalidInput(str(error)) from error


def _check_place(config: SubmitConfig, console: Console) -> None:
    """Raises InvalidInput if nothing can be submitted from here."""
    if not slurm.is_installed() and not config.dry_run:
        raise InvalidInput("no sbatch on PATH: this machine is no login node of a Slurm cluster (dry_run=true works)")
    if not (SCRIPTS / "generate.sbatch").is_file():
        raise InvalidInput(f"{SCRIPTS}/generate.sbatch: not here; run this in the project's folder")
    if _is_rehearsal(config):
        console.print("no Slurm answers here: what is in the queue and the site's array limit are not known")


def _plan(
    words: Sequence[str], generate: GenerateConfig, config: SubmitConfig, path: Path, console: Console
) -> tuple[Submission, list[Stage]]:
    """The tasks, and the commands in their order. Raises InvalidInput, SlurmError."""
    output_dir = Path(generate.output_dir)
    queue = Queue.read(output_dir, config)
    before = _steps_before(output_dir, config, queue)
    shards = _shards_to_make(generate, config, queue, bool(before), console)
    tasks = share_out(shards, config, _max_tasks(config))
    array = [generate_stage(path, len(tasks), config, gpus_needed(generate))] if tasks else []
    after = _steps_after(output_dir, config, queue, bool(tasks))
    plan = Submission(overrides=_passed_on(words, output_dir), tasks=tasks, settings=_settings(config))
    return plan, chained(before, array, after)


# --- what is to be done ---


def _shards_to_make(
    generate: GenerateConfig, config: SubmitConfig, queue: Queue, made_first: bool, console: Console
) -> list[Shard]:
    """Those that are neither done nor in the queue. Raises InvalidInput."""
    if made_first:
        if config.num_shards is None:
            raise InvalidInput("num_shards: not set; `before` steps need it: how many shards they are going to make")
        wanted = [Shard(index=index) for index in generate.input.shards or range(config.num_shards)]
        num_done = 0
    else:
        everything, wanted = _pending(generate)
        num_done = everything - len(wanted)
    new = [shard for shard in wanted if not any(shard.is_same_as(other) for other in queue.shards)]
    total, queued = num_done + len(wanted), len(wanted) - len(new)
    console.print(f"{total} shard(s): {num_done} done, {queued} in the queue already, {len(new)} to submit")
    return new


def _pending(generate: GenerateConfig) -> tuple[int, list[Shard]]:
    """How many shards there are, and those with work left, by jobs.generate's own rule. Raises InvalidInput.

    Everything that jobs.generate checks before it loads models is checked on the way. A folder that holds no run yet
    is not claimed: run.json is to tell of the machine that made the rows.
    """
    numbers = {path.stem: index for index, path in enumerate(list_shards(generate.input.path))}
    if FOLDER in numbers:
        raise InvalidInput(f"input.path: a shard cannot be named {FOLDER!r}: its output would lie among the plan files")
    if (Path(generate.output_dir) / "run.json").exists():
        plan = make_plan(generate)
    else:
        with tempfile.TemporaryDirectory() as nowhere:
            plan = make_plan(replace(generate, output_dir=nowhere))
    pending = [Shard(index=numbers[shard.shard.name], name=shard.shard.name) for shard in plan.pending]
    return len(plan.pending) + len(plan.finished), pending


def _steps_before(output_dir: Path, config: SubmitConfig, queue: Queue) -> list[Stage]:
    """Those that have not finished well yet. Raises InvalidInput while some are in the queue."""
    if any(name.startswith("before-") for name in queue.stages):
        raise InvalidInput(f"before: steps of an earlier submission are in the queue: {_listed(queue.stages)}")
    return steps_left("before", config.before, output_dir, config)


def _steps_after(output_dir: Path, config: SubmitConfig, queue: Queue, any_tasks: bool) -> list[Stage]:
    """All, once the new tasks and those in the queue have gone well; without any, those that have not finished yet."""
    if not any_tasks and any(name.startswith("after-") for name in queue.stages):
        return []
    if not any_tasks and not queue.tasks:
        return steps_left("after", config.after, output_dir, config)
    stages = step_stages("after", config.after, output_dir, config)
    return [replace(stage, needs_too=() if stage.needs else tuple(queue.tasks)) for stage in stages]


def _max_tasks(config: SubmitConfig) -> int:
    """Raises SlurmError."""
    return slurm.DEFAULT_MAX_ARRAY_SIZE if _is_rehearsal(config) else slurm.max_array_size()


def _is_rehearsal(config: SubmitConfig) -> bool:
    """A dry run on a machine that knows no cluster."""
    return config.dry_run and not slurm.answers()


def _settings(config: SubmitConfig) -> TaskSettings:
    return TaskSettings(
        pairs=config.pairs_per_task,
        stage=config.stage,
        max_requeues=config.max_requeues,
        held_retry_seconds=config.held_retry_seconds,
    )


def _passed_on(words: Sequence[str], output_dir: Path) -> list[str]:
    """The overrides of every task: the user's, with the folder as it came out, which depends on their order."""
    kept = [word for word in words if _name(word) not in NOT_PASSED_ON]
    return [*kept, f"output_dir={quoted(str(output_dir))}"]


# --- saying and doing it ---


def _show(plan: Submission, path: Path, stages: Sequence[Stage], console: Console) -> None:
    console.print(f"would write {path} ({len(plan.tasks)} tasks, {plan.num_shards} shards) and run:", style="bold")
    lines = [f"export PYTHON={shlex.quote(os.environ['PYTHON'])}", *(stage.shell_line() for stage in stages)]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _submit_stages(plan: Submission, path: Path, stages: Sequence[Stage], console: Console) -> None:
    """The record grows with every job that was submitted, so that a failure in between loses none."""
    for mark in path.parent.glob("after-*.done") if plan.tasks else ():
        mark.unlink()  # what they made is out of date
    plan.write(path)
    for stage in stages:
        job_id = slurm.submit(stage.command(plan.jobs))
        plan = replace(plan, jobs={**plan.jobs, stage.name: job_id})
        plan.write(path)
        tasks = f": {len(plan.tasks)} tasks, {plan.num_shards} shards" if stage.name == GENERATE else ""
        waits = f", after {stage.needs}" if stage.needs else ""
        console.print(f"{stage.name}: job {job_id}{tasks}{waits}", highlight=False)
    console.print(f"plan and logs: {path.parent}/  watch: squeue --jobs={','.join(plan.jobs.values())}", soft_wrap=True)


def _listed(stages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} (job {id})" for name, id in stages.items())


# --- the command line ---


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The submission's own words, options of Hydra among them, and jobs.generate's."""
    own = [word for word in words if word.startswith("-") or "=" not in word or _name(word) in OWN_NAMES]
    return [_quoted(word) for word in own], [word for word in words if word not in own]


def _quoted(word: str) -> str:
    """A command or arguments as one would type them, in the quotes that Hydra needs around `=` and commas."""
    name, _, text = word.partition("=")
    if name not in COMMANDS or not text or text[0] in "['\"":
        return word
    return f"{name}=[{quoted(text)}]"


def _name(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def main() -> None:
    own, others = split_words(sys.argv[1:])
    os.environ.setdefault("PYTHON", sys.executable)  # sbatch hands the environment on: tasks run with the same one

    @hydra.main(version_base="1.3", config_path="../conf", config_name="submit")
    def run(composed: DictConfig) -> None:
        run_job(lambda console: submit(others, converted(composed, SubmitConfig), console))

    if MULTIRUN & set(own):
        print("error: a sweep (-m) cannot be submitted at once; submit its runs one by one", file=sys.stderr)
        sys.exit(ExitStatus.invalid)

    sys.argv[1:] = own
    run()


if __name__ == "__main__":
    main()
