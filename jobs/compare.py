"""`python -m jobs.compare`: the same prompts under several choices of jobs.generate. Choices: conf/compare.yaml.

python -m jobs.compare experiment=toy limit=50 repeats=3

Each run is the main job in a process of its own: two models' engines cannot be taken down cleanly in one, and what is
compared is what a user would get. Its start-up is told apart. Runs that are finished are not made again.
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
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from jobs.compose import compose_generate, quoted
from jobs.launch import ExitStatus, run_job
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
LISTS = re.compile(r"\+{0,2}(overrides|variants\..+)")
BASELINE = "base_direct"  # ratios are to it, where it is among the variants


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A run that was made, or was found to be finished."""

    run: VariantRun
    status: int
    seconds: float  # of its process, start-up included
    summary: Summary | None  # None: nothing is committed

    @property
    def is_good(self) -> bool:
        return self.status == ExitStatus.finished and self.summary is not None


def compare(config: CompareConfig, console: Console, command: str = "", run_job: RunJob | None = None) -> int:
    """The whole job: its exit status. A run that fails loses none of the others.

    Raises InvalidInput before anything is started, Stopped, OSError.
    """
    runs = planned_runs(config)
    for run in runs:
        _check(run, config)
    received = Received()
    received.install()
    made = [_made(run, config, console, received, run_job or _run_generate) for run in runs]
    good = [each.run.output_dir for each in made if each.is_good]
    if good:
        if config.verify:
            verify_until_stopped(VerifyConfig(run=[str(path) for path in good]), console)
        choices = ReportConfig(runs=[str(path) for path in good], output=str(Path(config.output) / "report"))
        report(choices, console, command)
    console.print(speed_table(made))
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


def _made(run: VariantRun, config: CompareConfig, console: Console, received: Received, run_job: RunJob) -> Made:
    """Raises Stopped if a signal came before or meanwhile."""
    _check_stop(received)
    console.rule(f"{run.name} (seed {run.seed})")
    began = time.monotonic()
    status = run_job(_words(run, config), received)
    _check_stop(received)
    return Made(run=run, status=status, seconds=time.monotonic() - began, summary=summarise(run.output_dir))


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
    table = Table("variant", "runs", "chains/s", f"over {BASELINE}", "start-up s", title="speed, start-up left out")
    for name, median in medians.items():
        found = speeds[name]
        spread = f" ({min(found):.2f}-{max(found):.2f})" if len(found) > 1 else ""
        ratio = f"{median / baseline:.2f}x" if baseline else "-"
        table.add_row(name, f"{len(found)}", f"{median:.2f}{spread}", ratio, _start_up(name, made))
    return table


def _start_up(variant: str, made: Sequence[Made]) -> str:
    """Of the runs that were made just now: what their processes took beside the chains."""
    seconds = [
        each.seconds - each.summary.seconds
        for each in made
        if each.run.variant == variant and each.is_good and each.summary and each.seconds > each.summary.seconds
    ]
    return f"{statistics.median(seconds):.0f}" if seconds else "-"


def _status(made: Sequence[Made], console: Console) -> int:
    """The failed runs' own exit status where they agree."""
    failed = [each for each in made if not each.is_good]
    for each in failed:
        console.print(f"{each.run.name}: {_told(each.status)}; run the same command again", style="bold red")
    statuses = {each.status for each in failed}
    return statuses.pop() if len(statuses) == 1 else ExitStatus.failed if statuses else ExitStatus.finished


def _told(status: int) -> str:
    known = status in set(ExitStatus)
    return f"ended with status {status}" + (f" ({ExitStatus(status).name})" if known else "")


# --- the command line ---


def to_config(composed: DictConfig) -> CompareConfig:
    """Raises InvalidInput."""
    known = {field.name for field in fields(CompareConfig)}
    if unknown := [name for name in map(str, composed) if name not in known]:
        raise InvalidInput("\n".join(f"{name}: no such field" for name in unknown))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, CompareConfig)
    return config


def quoted_items(word: str) -> str:
    """Lists of overrides as one would type them, in the quotes that Hydra needs around `=`."""
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

    sys.argv[1:] = map(quoted_items, sys.argv[1:])
    run()
    sys.exit(max(statuses, default=0))


if __name__ == "__main__":
    main()
