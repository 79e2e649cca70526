"""One verification from run to verdicts, part by part. The composition root of `verify`.

A few parts are under way at a time, so that one comparison that hangs does not leave the other workers without work;
what is held in memory does not grow with the run, but for the ids of one shard's prompts that must be voted on, and
for the names of parts.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from rich.console import Console

from specreason_batch.store.parts import ShardPaths
from specreason_batch.store.verdicts import AnswerKind
from specreason_batch.types import InvalidInput
from specreason_batch.verify.config import AUTO, KINDS, VerifyConfig
from specreason_batch.verify.files import (
    Row,
    Run,
    ShardChains,
    is_verified,
    remove_abandoned,
    settings_text,
    write_verdicts,
)
from specreason_batch.verify.judging import Ballot, PartJudging, Sample, read_sample
from specreason_batch.verify.telling import Progress, tally, tell, tell_next
from specreason_batch.verify.workers import Pending, Workers

VERSION = 1  # of the rules by which answers are found and compared
_LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy")
_PARTS_UNDER_WAY = 8


@dataclass(frozen=True, slots=True)
class Task:
    """A part whose verdicts are to be made."""

    run: Run
    chains: ShardChains
    part: str


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A part whose comparisons are being made."""

    task: Task
    judging: PartJudging
    pending: Pending


def verify(config: VerifyConfig, console: Console, check: Callable[[], None] = lambda: None) -> None:
    """The whole job. `check`: raises where it is to stop; parts that are done stay, the next call goes on.

    Raises InvalidInput, OSError, and what `check` raises.
    """
    runs = [Run.open(name) for name in config.runs]
    settings = settings_text(verdict_settings(config))
    plan = [Plan.make(run, config, settings) for run in runs]
    num_parts = sum(made.num_tasks for made in plan)
    progress = Progress(console, config.log_seconds, num_parts)
    for made in plan:
        for line in made.notes():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if num_parts:
        _verify((task for made in plan for task in made.tasks(config)), config, settings, progress, check)
    tallies = [tally(run.root) for run in runs]
    for run, found in zip(runs, tallies, strict=True):
        tell(found, str(run.root), console)
    progress.close()
    tell_next(config.runs, tallies, any(made.num_waiting for made in plan), console)


def verdict_settings(config: VerifyConfig) -> dict[str, Any]:
    """What can change a verdict; it stands in the metadata of every verdicts file."""
    return {"version": VERSION, **config.verdict_fields(), "libraries": {name: version(name) for name in _LIBRARIES}}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done for a run."""

    run: Run
    num_done: int  # parts that have verdicts of the same settings
    num_waiting: int  # parts that must wait for other samples of their prompts
    todo: list[tuple[ShardPaths, list[str]]]  # parts whose verdicts are to be made, by shard

    @classmethod
    def make(cls, run: Run, config: VerifyConfig, settings: str) -> "Plan":
        """Raises InvalidInput if a column is not there, or a part is damaged."""
        num_done, num_waiting, work = 0, 0, []
        for paths in run.shards:
            remove_abandoned(paths)
            chains = ShardChains(paths, config, run.samples_per_prompt)
            todo = [part for part in chains.parts if not is_verified(paths, part, settings)]
            ready = [part for part in todo if not chains.is_waiting(part)]
            num_done += len(chains.parts) - len(todo)
            num_waiting += len(todo) - len(ready)
            work.append((paths, ready))
        return cls(run, num_done, num_waiting, work)

    @property
    def num_tasks(self) -> int:
        return sum(len(parts) for _, parts in self.todo)

    def tasks(self, config: VerifyConfig) -> Iterator[Task]:
        """Shard by shard; what is known of the last one's prompts is let go."""
        for paths, parts in self.todo:
            chains = ShardChains(paths, config, self.run.samples_per_prompt)
            yield from (Task(self.run, chains, part) for part in parts)

    def notes(self) -> Iterator[str]:
        if self.num_waiting:
            yield (
                f"{self.run.root}: {self.num_waiting} part(s) wait for other samples of their prompts, which have no "
                "gold answer; verify again when the run has gone on"
            )
        if not self.num_tasks:
            yield f"{self.run.root}: nothing to do, {self.num_done} part(s) have verdicts of the same settings"


def _verify(
    tasks: Iterator[Task], config: VerifyConfig, settings: str, progress: Progress, check: Callable[[], None]
) -> None:
    """Each part is written as soon as its last comparison is made."""
    num_workers = config.num_workers or len(os.sched_getaffinity(0))
    under_way: list[UnderWay] = []
    with Workers(num_workers, config.timeout_seconds, config.memory_gib, check) as workers:
        progress.begin()
        for task in tasks:
            under_way.append(_begin(task, config, workers))
            while len(under_way) >= _PARTS_UNDER_WAY:
                under_way = _step(under_way, settings, workers, progress)
        while under_way:
            under_way = _step(under_way, settings, workers, progress)


def _begin(task: Task, config: VerifyConfig, workers: Workers) -> UnderWay:
    rows = task.chains.read(task.part)
    ballots = {
        prompt_id: Ballot([_sample(row, config) for row in found])
        for prompt_id, found in task.chains.voters(task.part).items()
    }
    judging = PartJudging([_sample(row, config) for row in rows], ballots, config.majority)
    return UnderWay(task, judging, workers.submit(judging.comparisons()))


def _sample(row: Row, config: VerifyConfig) -> Sample:
    """Raises InvalidInput if the row's kind is unknown."""
    kind = row.get("kind") or config.kind
    if kind not in KINDS:
        raise InvalidInput(
            f"kind_column: {config.kind_column!r} is {kind!r} at prompt_id {row['prompt_id']!r}; "
            f"allowed: {', '.join(KINDS)}"
        )
    return read_sample(row, None if kind == AUTO else AnswerKind(kind))


def _step(under_way: list[UnderWay], settings: str, workers: Workers, progress: Progress) -> list[UnderWay]:
    """Parts that are still under way."""
    if not any(item.pending.is_done for item in under_way):
        workers.step()
    for item in under_way:
        if item.pending.is_done:
            rows = item.judging.rows(item.pending.outcomes)
            write_verdicts(item.task.chains.paths, item.task.part, rows, item.task.run.fingerprint, settings)
            progress.judged(len(rows))
    progress.say(workers.num_timeouts, workers.num_deaths)
    return [item for item in under_way if not item.pending.is_done]
