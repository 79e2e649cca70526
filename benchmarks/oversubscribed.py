"""More chains than a small KV cache holds, with memory-aware admission and without, on the toy pair.

    python -m benchmarks.oversubscribed [--tokens 4000] [--fitting 24] [--repeats 3] [--times 1]

Both engines get a KV cache of so many tokens. `--times 8` puts each question eight times into its prompt, so that a
chain is long and costs much to compute again. Runs of specreason: at the size that fits, at four times that size with
admission, and at four times that size without. Prints medians, seconds a chain over the fitting size's, and how many
prompt tokens had to be computed again; one JSON line.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table

from benchmarks.profile import toy_config
from specreason_batch.engine import Engine
from specreason_batch.engines import started_engines
from specreason_batch.plan import make_plan
from specreason_batch.progress import Progress
from specreason_batch.run import run_plan
from specreason_batch.signals import StopSignal
from specreason_batch.store.reading import scan
from specreason_batch.types import Phase, Role

HELD_OUT = Path(__file__).parent.parent / "examples" / "toy" / "prompts" / "heldout.parquet"
BLOCK = 32
SCHEDULES_SHOWN = ("lockstep", "overlapped", "continuous", "waves")


@dataclass(slots=True)
class Run:
    """One setting, and what was measured."""

    schedule: str
    name: str
    overrides: list[str]
    seconds: list[float] = field(default_factory=list)
    recomputed: int = 0
    parked: int = 0
    mean_active: float = 0.0


def runs(fitting: int) -> list[Run]:
    found = []
    for schedule in SCHEDULES_SHOWN:
        for name, active, fit_memory in (
            ("fits", fitting, True),
            ("4x, admission", 4 * fitting, True),
            ("4x, none", 4 * fitting, False),
        ):
            given = [
                f"schedule={schedule}",
                f"schedule.active_size={active}",
                f"schedule.fit_memory={str(fit_memory).lower()}",
            ]
            found.append(Run(schedule, name, given))
    return found


def measure(run: Run, engines: Mapping[Role, Engine], common: list[str]) -> float:
    """Seconds from the first request to the last committed part."""
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(toy_config(*common, *run.overrides, f"output_dir={folder}"))
        began = time.monotonic()
        run_plan(plan, engines, Progress(Console(quiet=True), 1e9), StopSignal())
        seconds = time.monotonic() - began
        rounds = scan(Path(folder), "rounds")
        assert rounds is not None
        run.recomputed, run.parked, run.mean_active = (
            rounds.select(
                pl.sum_horizontal(pl.col([f"{phase}_num_recomputed_tokens" for phase in Phase]).sum()),
                pl.col("num_parked").sum().alias("parked"),
                ((pl.col("num_active") * pl.col("seconds")).sum() / pl.col("seconds").sum()).alias("active"),
            )
            .collect()
            .row(0)
        )
    return seconds


def write_shard(path: Path, num_rows: int, times: int) -> None:
    """The first held-out prompts, each question so many times over."""
    prompts = pl.read_parquet(HELD_OUT).head(num_rows)
    prompts.with_columns(pl.concat_str([pl.col("prompt")] * times, separator="\n")).write_parquet(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4_000)
    parser.add_argument("--fitting", type=int, default=24)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    blocks = arguments.tokens // BLOCK + 1  # vLLM keeps one to itself
    shard = Path(tempfile.mkdtemp()) / "prompts.parquet"
    write_shard(shard, arguments.prompts, arguments.times)
    common = [f"input.path={shard}", "budgets.thinking_tokens=128"]
    common += [f"+{role}.vllm_args.num_gpu_blocks_override={blocks}" for role in Role]
    console = Console(width=120)
    shown = runs(arguments.fitting)
    with started_engines(toy_config(*common), frozenset(Role), Progress(console, 1e9)) as engines:
        for repeat in range(arguments.repeats + 1):
            for run in shown:
                seconds = measure(run, engines, common)
                if repeat:
                    run.seconds.append(seconds)
        capacities = {role: engine.info.kv_capacity_tokens for role, engine in engines.items()}
    table = Table("schedule", "active size", "active, mean", "median s", "over fitting", "recomputed tokens", "parked")
    for run in shown:
        fits = next(other for other in shown if other.schedule == run.schedule)
        median = statistics.median(run.seconds)
        table.add_row(
            run.schedule,
            run.name,
            f"{run.mean_active:.0f}",
            f"{median:.2f}",
            f"{median / statistics.median(fits.seconds):.2f}x",
            f"{run.recomputed:,}",
            str(run.parked),
        )
    console.print(f"KV tokens: {capacities}; {arguments.prompts} prompts")
    console.print(table)
    figures = [{"schedule": run.schedule, "run": run.name, "seconds": run.seconds} for run in shown]
    print(json.dumps({"runs": figures, "python": platform.python_version(), "machine": platform.machine()}))


if __name__ == "__main__":
    main()
