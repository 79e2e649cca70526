"""`python -m jobs.compare`: the same prompts under several choices of jobs.generate. Choices: conf/compare.yaml.

python -m jobs.compare experiment=toy limit=50 repeats=3

Words that are no choices of its own are jobs.generate's, for every variant. Each run is the main job in a process of
its own: two models' engines cannot be taken down cleanly in one, and what is compared is what a user would get. Runs
that are finished are not made again.
"""

import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from jobs.compose import compose_generate, quoted, split_words
from jobs.launch import ExitStatus, converted, run_job
from jobs.verify import verify_until_stopped
from specreason_batch.compare import CompareConfig, VariantRun, planned_runs
from specreason_batch.pairs import Command, Received, run_side_by_side
from specreason_batch.report import ReportConfig
from specreason_batch.report.job import report
from specreason_batch.schedules import Stopped
from specreason_batch.summary import Summary, summarise
from specreason_batch.types import InvalidInput
from specreason_batch.verify.config import VerifyConfig

ConfigStore.instance().store(name="compare_schema", node=CompareConfig)

RunJob = Callable[[Sequence[str], Received], int]
OWN_NAMES = tuple(field.name for field in fields(CompareConfig) if field.name != "overrides")
LISTS = re.compile(r"\+{0,2}variants\..+")
BASELINE = "base_direct"  # ratios are to it, where it is among the variants


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A run that was made, or was found to be finished, or could not be."""

    run: VariantRun
    status: int | None  # of its process; None: it was not started, because a run that it refers to failed
    summary: Summary | None = None  # None: nothing is committed

    @property
    def is_good(self) -> bool:
        return self.status == ExitStatus.finished and self.summary is not None


def compare(config: CompareConfig, console: Console, command: str = "", run_job: RunJob | None = None) -> int:
    """The whole job: its exit status. A run that fails loses none of the others.

    Raises InvalidInput before anything is started, Stopped, OSError.
    """
    began = time.monotonic()
    output = Path(config.output or f"outputs/compare/{compose_generate(config.overrides).name}")
    runs = planned_runs(config, output)
    for run in runs:
        _check(run, config)
    made = _make(runs, config, console, run_job or _run_generate)
    good = [each.run.output_dir for each in made if each.is_good]
    if good:
        if config.verify:
            verify_until_stopped(VerifyConfig(run=[str(path) for path in good]), console)
        choices = ReportConfig(runs=[str(path) for path in good], output=str(output / "report"), cost=config.cost)
        report(choices, console, command)
    console.print(speed_table(made))
    console.print(f"{len(good)} of {len(made)} runs, with verdicts and the report, in {time.monotonic() - began:.0f} s")
    return _status(made, console)


def _check(run: VariantRun, config: CompareConfig) -> None:
    """Raises InvalidInput, with the variant's name, for overrides that jobs.generate would not take."""
    try:
        compose_generate(_words(run, config))
    except InvalidInput as error:
        raise InvalidInput(f"variants.{run.variant}: {error}") from error


def _words(run: VariantRun, config: CompareConfig) -> list[str]:
    limit = "null" if config.limit is None else config.limit
    return [*run.words, f"limit={limit}", f"seed={run.seed}", f"output_dir={quoted(str(run.output_dir))}"]


def _make(runs: Sequence[VariantRun], config: CompareConfig, console: Console, run_job: RunJob) -> list[Made]:
    """One after the other. One that refers to a run that failed would take its rate from half of it: it is left out."""
    received = Received()
    received.install()
    made: list[Made] = []
    for run in runs:
        failed = {each.run.output_dir for each in made if not each.is_good}
        if failed & run.refers_to:
            made.append(Made(run=run, status=None))
        else:
            made.append(_made(run, config, console, received, run_job))
    return made


def _made(run: VariantRun, config: CompareConfig, console: Console, received: Received, run_job: RunJob) -> Made:
    """Raises Stopped if a signal came before or meanwhile."""
    _check_stop(received)
    console.rule(f"{run.name} (seed {run.seed})")
    status = run_job(_words(run, config), received)
    _check_stop(received)
    return Made(run=run, status=status, summary=summarise(run.output_dir))


def _check_stop(received: Received) -> None:
    if received.at_once:
        raise KeyboardInterrupt
    if received.any:
        raise Stopped("asked to stop")


def _run_generate(words: Sequence[str], received: Received) -> int:
    sys.stdout.flush()
    command = Command(words=[sys.executable, "-m", "jobs.generate", *words])
    return run_side_by_side([command], received)[0]


# --- what is said ---


def speed_table(made: Sequence[Made]) -> Table:
    """Chains a second of each variant: the median of its runs, and the slowest and the fastest of several."""
    speeds: dict[str, list[float]] = {}
    for each in made:
        if each.is_good and each.summary is not None:
            speeds.setdefault(each.run.variant, []).append(each.summary.chains_per_second)
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    baseline = medians.get(BASELINE)
    table = Table("variant", "runs", "chains/s", f"over {BASELINE}", title="speed, start-up left out")
    for name, median in medians.items():
        found = speeds[name]
        spread = f" ({min(found):.2f}-{max(found):.2f})" if len(found) > 1 else ""
        ratio = f"{median / baseline:.2f}x" if baseline else "-"
        table.add_row(name, f"{len(found)}", f"{median:.2f}{spread}", ratio)
    return table


def _status(made: Sequence[Made], console: Console) -> int:
    """The failed runs' own exit status where they agree."""
    failed = [each for each in made if not each.is_good]
    for each in failed:
        console.print(f"{each.run.name}: {_told(each.status)}; run the same command again", style="bold red")
    statuses = {each.status for each in failed if each.status is not None}
    return statuses.pop() if len(statuses) == 1 else ExitStatus.failed if statuses else ExitStatus.finished


def _told(status: int | None) -> str:
    if status is None:
        return "not made, for it refers to a run that failed"
    known = status in set(ExitStatus)
    return f"ended with status {status}" + (f" ({ExitStatus(status).name})" if known else "")


# --- the command line ---


def to_config(composed: DictConfig) -> CompareConfig:
    """Raises InvalidInput."""
    return converted(composed, CompareConfig)


def own_words(words: Sequence[str]) -> list[str]:
    """The command line as Hydra is to get it: other jobs' words are the list `overrides`."""
    own, others = split_words(words, OWN_NAMES)
    return [*map(quoted_items, own), *([f"overrides=[{','.join(map(quoted, others))}]"] if others else [])]


def quoted_items(word: str) -> str:
    """A variant's overrides as one would type them, in the quotes that Hydra needs around `=`."""
    name, _, text = word.partition("=")
    if not LISTS.fullmatch(name) or text[:1] + text[-1:] != "[]" or set(text) & {"'", '"'}:
        return word
    return f"{name}=[{','.join(map(quoted, _items(text[1:-1])))}]"


def _items(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    items, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def main() -> None:
    command = shlex.join(["python", "-m", "jobs.compare", *sys.argv[1:]])
    statuses: list[int] = []

    @hydra.main(version_base="1.3", config_path="../conf", config_name="compare")
    def run(composed: DictConfig) -> None:
        run_job(lambda console: statuses.append(compare(to_config(composed), console, command)))

    sys.argv[1:] = own_words(sys.argv[1:])
    run()
    sys.exit(max(statuses, default=0))


if __name__ == "__main__":
    main()
