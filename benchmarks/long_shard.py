"""A short shard and one ten times as long: chains/s and this process's memory must not depend on the length.

    python -m benchmarks.long_shard [--prompts 1000 10000] [--policy specreason] [--active 64]

The toy's held-out prompts over and over, under ids of their own; engines in processes of their own. Memory is this
process's resident set after the first tenth and at the end of each shard, in MiB. One JSON line at the end.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.profile import toy_config
from specreason_batch.engines import started_engines
from specreason_batch.plan import make_plan
from specreason_batch.progress import Progress
from specreason_batch.rounds import RoundReport
from specreason_batch.run import run_plan
from specreason_batch.signals import StopSignal
from specreason_batch.types import Role

HELD_OUT = Path(__file__).parent.parent / "examples" / "toy" / "prompts" / "heldout.parquet"


class MemoryWatch(Progress):
    """Silent, but for a look at this process's memory after every round."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True), 1e9)
        self.samples: list[tuple[int, float]] = []  # chains finished, MiB
        self._num_finished = 0

    def round(self, report: RoundReport) -> None:
        super().round(report)
        self._num_finished += len(report.finished)
        self.samples.append((self._num_finished, psutil.Process().memory_info().rss / 2**20))


def write_shard(path: Path, num_rows: int) -> None:
    rows = pq.read_table(HELD_OUT).to_pylist()
    repeated = [{**rows[index % len(rows)], "prompt_id": f"p{index}"} for index in range(num_rows)]
    pq.write_table(pa.Table.from_pylist(repeated), path, row_group_size=1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--policy", default="specreason")
    parser.add_argument("--schedule", default="waves")
    parser.add_argument("--active", type=int, default=64)
    arguments = parser.parse_args()
    common = [
        f"policy={arguments.policy}",
        f"schedule={arguments.schedule}",
        f"schedule.active_size={arguments.active}",
    ]
    console = Console(width=120)
    table = Table("prompts", "seconds", "chains/s", "MiB at a tenth", "MiB at the end")
    figures = []
    with (
        tempfile.TemporaryDirectory() as folder,
        started_engines(toy_config(*common), frozenset(Role), Progress(console, 1e9)) as engines,
    ):
        for number, num_prompts in enumerate((100, *arguments.prompts)):  # the first to warm up
            shard = Path(folder) / f"{num_prompts}.parquet"
            write_shard(shard, num_prompts)
            config = toy_config(*common, f"input.path={shard}", f"output_dir={folder}/out-{number}")
            watch = MemoryWatch()
            plan = make_plan(config)
            began = time.monotonic()
            run_plan(plan, engines, watch, StopSignal())
            seconds = time.monotonic() - began
            tenth = next(memory for count, memory in watch.samples if count >= num_prompts / 10)
            row = {"prompts": num_prompts, "seconds": seconds, "tenth_mib": tenth, "end_mib": watch.samples[-1][1]}
            figures.append(row)
            if number:
                table.add_row(
                    f"{num_prompts:,}",
                    f"{seconds:.1f}",
                    f"{num_prompts / seconds:.1f}",
                    f"{tenth:.0f}",
                    f"{row['end_mib']:.0f}",
                )
    console.print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
