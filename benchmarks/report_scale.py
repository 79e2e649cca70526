"""A run's report at the size of a data set: seconds and peak memory of `jobs.report` on a made-up output.

    python -m benchmarks.report_scale [--chains 100000 1000000] [--steps 50] [--folder /scratch]

Each shard of the output is one part of 1,000 chains, with verdicts, and rounds of eight shards at a time. Rows are
drawn anew for a few parts and used again under other prompt ids; texts are short, which a report never reads. The
report, all of its sections and files, is made in a process of its own, whose peak resident set is the figure. One JSON
line at the end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from specreason_batch.store.schemas import CHAINS, ENGINE_FIGURES, PHASE_COUNTS, ROUNDS, SCHEMA_VERSION, STEPS
from specreason_batch.store.verdicts import VERDICTS
from specreason_batch.types import InvalidInput, Phase, Role

PART = 1000  # chains
SAMPLES = 4  # of a prompt
ROUNDS_A_PART = 400
AT_ONCE = 8  # shards
NUM_DRAWN = 8  # parts that are drawn; the others repeat them
BYTES_A_STEP = 90  # on disk
START = 1_700_000_000.0  # of the run, seconds since the epoch
MEASURE = """
import json, sys, time
from pathlib import Path
from rich.console import Console
from specreason_batch.report import ReportConfig
from specreason_batch.report.job import report
began = time.monotonic()
made = report(ReportConfig(runs=sys.argv[1]), Console(quiet=True))
seconds = time.monotonic() - began
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) / 2**10  # since exec: getrusage's knows the parent's too
accuracy = made.runs[0].section("chains").figure("accuracy").value
print(json.dumps({"seconds": seconds, "peak_mib": peak, "accuracy": accuracy}))
"""


def write_output(folder: Path, num_chains: int, num_steps: int) -> Path:
    """A run's folder with so many chains. Raises InvalidInput if the disk does not hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = num_chains * num_steps * BYTES_A_STEP
    if shutil.disk_usage(folder).free < 2 * needed:
        raise InvalidInput(
            f"{folder}: {num_chains} chains take about {needed >> 20} MiB; allowed: half of what is free"
        )
    drawn = [_draw_part(np.random.default_rng(seed), num_steps) for seed in range(NUM_DRAWN)]
    for number in range(num_chains // PART):
        _write_shard(folder / f"shard-{number:05d}", number, drawn[number % NUM_DRAWN], num_steps)
    (folder / "run.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION, "config": _config()}))
    return folder


def _config() -> dict[str, Any]:
    return {
        "policy": {"name": "specreason", "threshold": 7.0, "answer_role": "base"},
        "judge": {"reading": "expected", "mass_floor": 0.5},
        "schedule": {"name": "lockstep"},
        "samples_per_prompt": SAMPLES,
        "limit": None,
        "input": {"path": "no/such/prompts.parquet"},
    }


def _draw_part(rng: np.random.Generator, num_steps: int) -> dict[str, dict[str, Any]]:
    """The columns of a part that do not say whose they are."""
    return {"steps": _draw_steps(rng, PART * num_steps), "chains": _draw_chains(rng, num_steps)}


def _draw_steps(rng: np.random.Generator, rows: int) -> dict[str, Any]:
    probs = rng.dirichlet(np.full(10, 0.4), rows).astype(np.float32)
    scores = probs @ np.arange(10)
    accepted = scores >= 7.0
    lengths, ids = rng.integers(8, 80, rows), pa.array(rng.integers(0, 100, 16), pa.int32())
    nothing = pa.nulls(rows)
    return {
        "author": np.where(accepted, "draft", "base"),
        "ended_by": np.where(rng.random(rows) < 0.98, "blank_line", "max_tokens"),
        "start": np.zeros(rows, np.int64),
        "end": lengths,
        "token_ids": pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * 16, pa.array(np.tile(ids, rows))),
        "num_tokens": lengths,
        "rejected_text": pa.array(np.where(accepted, None, "rejected")),
        "rejected_num_tokens": pa.array(rng.integers(8, 80, rows), mask=accepted),
        "score": scores,
        "digit_probs": pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * 10, pa.array(probs.ravel())),
        "digit_mass": probs.sum(axis=1),
        "accepted": accepted,
        "round": nothing,
    }


def _draw_chains(rng: np.random.Generator, num_steps: int) -> dict[str, Any]:
    tokens = {name: rng.integers(0, 40 * num_steps, PART) for name in CHAINS.names if name.startswith("num_")}
    return tokens | {
        "thinking": np.full(PART, "so on and so forth"),
        "answer": np.full(PART, "\\boxed{4}"),
        "thinking_end": rng.choice(["closed", "budget"], PART, p=[0.9, 0.1]),
        "answer_end": rng.choice(["stop", "length"], PART, p=[0.95, 0.05]),
        "num_steps": np.full(PART, num_steps),
        "active_seconds": rng.random(PART),
        "seed": np.arange(PART),
    }


def _write_shard(root: Path, number: int, drawn: dict[str, dict[str, Any]], num_steps: int) -> None:
    index = np.arange(PART)
    keys = {
        "prompt_id": np.char.add(f"prompt-{number:05d}-", (index // SAMPLES).astype(str)),
        "sample_index": index % SAMPLES,
    }
    repeated = {name: np.repeat(values, num_steps) for name, values in keys.items()}
    order = {"step_index": np.tile(np.arange(num_steps), PART)}
    _write(root, "steps", STEPS, repeated | order | drawn["steps"])
    _write(root, "chains", CHAINS, keys | {"prompt": keys["prompt_id"]} | drawn["chains"])
    _write(root, "verdicts", VERDICTS, keys | _draw_verdicts(np.random.default_rng(number)))
    _write(root, "rounds", ROUNDS, _draw_rounds(np.random.default_rng(number), number // AT_ONCE))


def _draw_verdicts(rng: np.random.Generator) -> dict[str, Any]:
    basis = {"basis": np.full(PART, "gold"), "kind": np.full(PART, "math"), "expected": np.full(PART, "4")}
    verdicts = rng.choice(["right", "wrong", "unverifiable"], PART, p=[0.7, 0.25, 0.05])
    rest = {"verdict": verdicts, "extracted": rng.integers(0, 4, PART).astype(str), "seconds": np.zeros(PART)}
    return basis | rest | {"reason": pa.nulls(PART)}


def _draw_rounds(rng: np.random.Generator, turn: int) -> dict[str, Any]:
    seconds = rng.random(ROUNDS_A_PART)
    phases = {f"{phase}_seconds": seconds * 0.3 for phase in (Phase.draft, Phase.grade, Phase.rewrite)}
    counts = {f"{phase}_{count}": rng.integers(0, 900, ROUNDS_A_PART) for phase in Phase for count in PHASE_COUNTS}
    engines = {f"{role}_{figure}": rng.random(ROUNDS_A_PART) * 50 for role in Role for figure in ENGINE_FIGURES}
    plain = {name: rng.integers(0, 64, ROUNDS_A_PART) for name in ROUNDS.names if name.startswith("num_")}
    begun = START + ROUNDS_A_PART * turn + np.cumsum(seconds) - seconds
    time = {"round": np.arange(ROUNDS_A_PART) + 1, "started_at": (begun * 1e6).astype(np.int64), "seconds": seconds}
    return plain | counts | engines | phases | time | {"idle_seconds": seconds * 0.1}


def _write(root: Path, kind: str, schema: pa.Schema, columns: dict[str, Any]) -> None:
    arrays = [_as_array(columns[field.name], field.type) for field in schema]
    (root / kind).mkdir(parents=True)
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=schema), root / kind / "part-00000-made.parquet", compression="zstd"
    )


def _as_array(values: Any, type: pa.DataType) -> pa.Array:
    array = values if isinstance(values, pa.Array) else pa.array(values)
    return array.cast(type, safe=False)


def measure(folder: Path) -> dict[str, float]:
    """Of a report made in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--steps", type=int, default=50, help="of a chain")
    parser.add_argument("--folder", help="where to put it for as long as it takes; default: the system's")
    arguments = parser.parse_args()
    table = Table("chains", "steps", "GiB on disk", "seconds", "peak MiB")
    figures = []
    for num_chains in arguments.chains:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            output = write_output(Path(folder), num_chains, arguments.steps)
            size = sum(path.stat().st_size for path in output.rglob("*.parquet"))
            figures.append(
                {"chains": num_chains, "steps": num_chains * arguments.steps, "bytes": size} | measure(output)
            )
        row = figures[-1]
        table.add_row(
            f"{num_chains:,}",
            f"{row['steps']:,}",
            f"{size / 2**30:.2f}",
            f"{row['seconds']:.1f}",
            f"{row['peak_mib']:.0f}",
        )
    Console(width=100).print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
