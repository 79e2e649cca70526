"""Schedules side by side on the toy pair, engines in processes of their own, and what the simulator says of each.

    python -m benchmarks.schedules [--repeats 3] [--active 1 8 64 256] [--rates 0.5 0.7 0.9 1.0] [--save FILE]

Acceptance is forced by the `random` policy. Engines start once, every run is done once before it counts, repeats go
round robin, so that drift of the machine hits all alike. base_only has the base's core only; beside it, from before
the pair is started, stands the base alone on all cores. The same process then fits both engines' cost profiles
(`benchmarks.profile`) and replays each run's own recorded chains in virtual time: the last columns are that prediction
and its ratio to what was measured. Prints medians, and one JSON line.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table

from benchmarks.profile import fit, measure, measure_cores, show, start_profile, toy_config
from specreason_batch.config import GenerateConfig
from specreason_batch.engine import Engine
from specreason_batch.engines import started_engines
from specreason_batch.plan import Plan, make_plan
from specreason_batch.progress import Progress
from specreason_batch.replay import RecordedChain, RecordedStep, Recording, replay
from specreason_batch.run import run_plan
from specreason_batch.shard import choose_schedule
from specreason_batch.signals import StopSignal
from specreason_batch.simulation import Hardware
from specreason_batch.store.prompts import PromptShard
from specreason_batch.store.reading import scan
from specreason_batch.types import Prompt, Role

ALL_CORES = "base_only, the base alone on all cores"
SCHEDULES_SHOWN = ("lockstep", "overlapped", "continuous", "waves")
NUM_PROMPTS = {1: 16, 8: 64, 64: 256, 256: 500}  # by active size; others: four times the size


@dataclass(slots=True)
class Cell:
    """One run's setting, and what was measured."""

    name: str
    rate: float | None
    active: int
    overrides: list[str]
    seconds: list[float] = field(default_factory=list)
    idle_shares: list[float] = field(default_factory=list)
    predicted: float = 0.0
    recording: Recording | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def num_prompts(self) -> int:
        return min(500, NUM_PROMPTS.get(self.active, 4 * self.active))

    def config(self, output_dir: str) -> GenerateConfig:
        common = [f"limit={self.num_prompts}", f"schedule.active_size={self.active}", f"output_dir={output_dir}"]
        return toy_config(*common, *self.overrides)


def cells(rates: Sequence[float], actives: Sequence[int]) -> list[Cell]:
    """base_only and every schedule at every acceptance, by active size."""
    found = []
    for active in actives:
        found.append(Cell("base_only", None, active, ["policy=base_only"]))
        for rate in rates:
            forced = ["policy=random", f"policy.accept_rate={rate}"]
            found += [Cell(name, rate, active, [*forced, f"schedule={name}"]) for name in SCHEDULES_SHOWN]
    return found


def run_cell(cell: Cell, engines: Mapping[Role, Engine]) -> tuple[float, float]:
    """Seconds from the first request to the last committed part, and the idle share of its rounds."""
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(cell.config(folder))
        began = time.monotonic()
        run_plan(plan, engines, Progress(Console(quiet=True), 1e9), StopSignal())
        seconds = time.monotonic() - began
        rounds = scan(Path(folder), "rounds")
        assert rounds is not None
        idle, total = rounds.select(pl.col("idle_seconds").sum(), pl.col("seconds").sum()).collect().row(0)
        if cell.recording is None:
            cell.recording = record(Path(folder), plan)
    return seconds, idle / total


def run_all(shown: Sequence[Cell], engines: Mapping[Role, Engine], repeats: int) -> None:
    """Round robin; the first time does not count."""
    for repeat in range(repeats + 1):
        for cell in shown:
            seconds, idle = run_cell(cell, engines)
            if repeat:
                cell.seconds.append(seconds)
                cell.idle_shares.append(idle)
        print(f"repeat {repeat} of {repeats} done", flush=True)


def record(output_dir: Path, plan: Plan) -> Recording:
    """The run's chains in tokens, in the order of their prompts, as they were begun."""
    chains, steps = scan(output_dir, "chains"), scan(output_dir, "steps")
    assert chains is not None and steps is not None
    chat = plan.formats[Role.base]
    items = PromptShard.open(Path(plan.config.input.path)).prompts(plan.config.limit)
    order = {item.prompt_id: number for number, item in enumerate(items) if isinstance(item, Prompt)}
    by_chain: dict[str, list[RecordedStep]] = {}
    for row in steps.sort("prompt_id", "step_index").collect().iter_rows(named=True):
        by_chain.setdefault(row["prompt_id"], []).append(_recorded_step(row))
    recorded = [
        RecordedChain(
            prompt_tokens=len(chat.opening(row["prompt"])),
            steps=by_chain[row["prompt_id"]],
            answer_tokens=row["num_answer_tokens"],
        )
        for row in sorted(chains.collect().iter_rows(named=True), key=lambda row: order[row["prompt_id"]])
    ]
    return Recording(recorded, 0, tuple(plan.formats))


def _recorded_step(row: Mapping[str, object]) -> RecordedStep:
    drafted = row["author"] == "draft"
    draft_tokens = row["num_tokens"] if drafted else row["rejected_num_tokens"]
    base_tokens = None if drafted else row["num_tokens"]
    assert draft_tokens is None or isinstance(draft_tokens, int)
    assert base_tokens is None or isinstance(base_tokens, int)
    return RecordedStep(draft_tokens=draft_tokens, graded=row["digit_mass"] is not None, base_tokens=base_tokens)


def predict(cell: Cell, hardware: Hardware) -> float:
    """Seconds in virtual time of the chains that this cell made."""
    assert cell.recording is not None
    config = cell.config("unused")
    schedule = choose_schedule(config.schedule, free_running=cell.name == "base_only")
    return sum(stats.seconds for stats in replay(cell.recording, schedule, hardware, cell.active))


def table(shown: Sequence[Cell]) -> Table:
    found = Table("active", "run", "accepted", "chains/s", "over base_only", "idle", "predicted / measured")
    for cell in shown:
        base = next(other for other in shown if other.name == "base_only" and other.active == cell.active)
        found.add_row(
            str(cell.active),
            cell.name,
            "-" if cell.rate is None else f"{cell.rate:.1f}",
            f"{cell.num_prompts / cell.median:.1f}",
            f"{base.median / cell.median:.2f}x",
            f"{statistics.median(cell.idle_shares):.1%}",
            f"{cell.predicted / cell.median:.2f}" if cell.predicted else "",
        )
    return found


def figures(shown: Sequence[Cell]) -> list[dict[str, object]]:
    return [
        {
            "run": cell.name,
            "rate": cell.rate,
            "active": cell.active,
            "chains": cell.num_prompts,
            "seconds": [round(seconds, 3) for seconds in cell.seconds],
            "idle": round(statistics.median(cell.idle_shares), 4),
            "predicted": round(cell.predicted, 3),
        }
        for cell in shown
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--active", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.7, 0.9, 1.0])
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    console = Console(width=120)
    shown = cells(arguments.rates, arguments.active)
    alone = [Cell(ALL_CORES, None, active, ["policy=base_only"]) for active in arguments.active]
    with started_engines(toy_config(), frozenset({Role.base}), Progress(console, 1e9)) as engines:
        run_all(alone, engines, arguments.repeats)
    with started_engines(toy_config(), frozenset(Role), Progress(console, 1e9)) as engines:
        measured = {role: measure(engine) for role, engine in engines.items()}
        profiles = {role: fit(measured[role], start_profile(engine)) for role, engine in engines.items()}
        cores = measure_cores(engines)
        for role in engines:
            show(console, role, measured[role], profiles[role])
        console.print(f"cores of the two at once: {cores:.2f}")
        run_all(shown, engines, arguments.repeats)
    hardware = Hardware(draft=profiles[Role.draft], base=profiles[Role.base], shared=False, cores=cores)
    for cell in shown:
        cell.predicted = predict(cell, hardware)
    shown = sorted([*alone, *shown], key=lambda cell: cell.active)
    console.print(table(shown))
    line = json.dumps({"cells": figures(shown), "python": platform.python_version(), "machine": platform.machine()})
    print(line)
    if arguments.save:
        arguments.save.write_text(line + "\n")


if __name__ == "__main__":
    main()
