"""An export at the size of a data set: chains/s, peak memory and disk of `jobs.export` on a made-up output.

    python -m benchmarks.export_scale [--chains 100000 400000] [--formats sft_messages step_preferences]
                                      [--select select.per_prompt=1 near_duplicates.threshold=0.8] [--folder /scratch]
    python -m benchmarks.export_scale --decide 1000000 10000000

Each shard of the output is one part of 1,000 chains, four samples a prompt, with verdicts; texts are drawn word by
word, no two alike. Each export runs in a process of its own, whose peak resident set is the figure. `--decide`:
what grows with the chains alone, the decisions on a made-up survey of so many (duplicates, two of a prompt, the split).
One JSON line at the end.
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
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from jobs.compose import compose_generate
from specreason_batch.export.groups import MARKS
from specreason_batch.store.manifest import claim_output, fingerprint_fields
from specreason_batch.store.schemas import CHAINS, SCHEMA_VERSION, STEPS
from specreason_batch.store.verdicts import VERDICTS
from specreason_batch.types import InvalidInput, Role

PART = 1000  # chains
LINES = 100_000  # of a file of a made-up survey
SAMPLES = 4  # of a prompt
NUM_WORDS = 20_000  # of the language
WORDS_A_STEP = 30
REJECTED = 0.3  # share of the drafts
BYTES_A_STEP = 400  # on disk
FIGURES = """
seconds, cpu_seconds = time.monotonic() - began, time.process_time()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) / 2**10  # since exec: getrusage's knows the parent's too
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak}))
"""
EXPORT = (
    """
import json, sys, time
from pathlib import Path
from jobs.launch import run_job
from jobs.export import export_until_stopped, to_config
from hydra import compose, initialize_config_dir
with initialize_config_dir(sys.argv[1], version_base="1.3"):
    config = to_config(compose("export", sys.argv[2:]))
began = time.monotonic()
run_job(lambda console: export_until_stopped(config, console))
"""
    + FIGURES
)
DECIDE = (
    """
import json, sys, time
from pathlib import Path
from specreason_batch.export.config import ExportConfig, Format, SelectConfig
from specreason_batch.export.survey import decide
config = ExportConfig(runs=["made up"], output="none", format=Format.raw, select=SelectConfig(per_prompt=2))
began = time.monotonic()
marks = decide(config, sorted(Path(sys.argv[1]).iterdir()), Path("not needed"))
assert 0 < marks.kept.height < marks.frame.height
"""
    + FIGURES
)
CONF = Path(__file__).parent.parent / "conf"


def write_output(folder: Path, num_chains: int, num_steps: int) -> Path:
    """A run's folder with so many chains. Raises InvalidInput if the disk does not hold it and its exports."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = num_chains * num_steps * BYTES_A_STEP
    if shutil.disk_usage(folder).free < 3 * needed:
        raise InvalidInput(
            f"{folder}: {num_chains} chains take about {needed >> 20} MiB; allowed: a third of what is free"
        )
    config = compose_generate([f"output_dir={folder}", f"samples_per_prompt={SAMPLES}"])
    metadata = {"schema_version": SCHEMA_VERSION, "source": "made up"}
    metadata["fingerprint"] = claim_output(folder, fingerprint_fields(config, frozenset(Role)), config)
    words = _words(np.random.default_rng(0))
    for number in range(num_chains // PART):
        _write_shard(folder / f"shard-{number:05d}", number, words, num_steps, metadata)
    return folder


def _words(rng: np.random.Generator) -> list[str]:
    letters = rng.integers(ord("a"), ord("z") + 1, (NUM_WORDS, 10)).astype(np.uint8)
    return [bytes(row[:length]).decode() for row, length in zip(letters, rng.integers(2, 10, NUM_WORDS), strict=True)]


def _write_shard(root: Path, number: int, words: list[str], num_steps: int, metadata: dict[str, str]) -> None:
    rng = np.random.default_rng(number)
    index = np.arange(PART)
    prompts = index // SAMPLES
    keys = {
        "prompt_id": np.char.add(f"prompt-{number:05d}-", prompts.astype(str)),
        "sample_index": index % SAMPLES,
    }
    steps = [_text(rng, words) for _ in range(PART * num_steps)]
    asked = np.array([_text(rng, words) for _ in range(PART // SAMPLES + 1)])[prompts]
    chains = keys | {"prompt": asked} | _chains(rng, steps, num_steps)
    repeated = {name: np.repeat(values, num_steps) for name, values in keys.items()}
    order = {"step_index": np.tile(np.arange(num_steps), PART)}
    _write(root, "steps", STEPS, repeated | order | _steps(rng, words, steps, num_steps), metadata)
    _write(root, "chains", CHAINS, chains, metadata)
    _write(root, "verdicts", VERDICTS, keys | _verdicts(rng), metadata)


def _text(rng: np.random.Generator, words: list[str]) -> str:
    return " ".join([words[number] for number in rng.integers(0, NUM_WORDS, WORDS_A_STEP)]) + "\n\n"


def _chains(rng: np.random.Generator, steps: list[str], num_steps: int) -> dict[str, Any]:
    counts = {name: rng.integers(0, 40 * num_steps, PART) for name in CHAINS.names if name.startswith("num_")}
    return counts | {
        "thinking": ["".join(steps[start : start + num_steps]) for start in range(0, len(steps), num_steps)],
        "answer": np.full(PART, "\n\nSo it is \\boxed{4}."),
        "thinking_end": rng.choice(["closed", "budget"], PART, p=[0.9, 0.1]),
        "answer_end": rng.choice(["stop", "length"], PART, p=[0.95, 0.05]),
        "num_steps": np.full(PART, num_steps),
        "active_seconds": rng.random(PART),
        "seed": np.arange(PART),
    }


def _steps(rng: np.random.Generator, words: list[str], steps: list[str], num_steps: int) -> dict[str, Any]:
    rows = len(steps)
    accepted = rng.random(rows) >= REJECTED
    lengths = np.array([len(step) for step in steps]).reshape(PART, num_steps)
    ends = np.cumsum(lengths, axis=1)
    tokens = pa.array(rng.integers(0, 100_000, rows * 2 * WORDS_A_STEP), pa.int32())
    probs = pa.array(rng.dirichlet(np.full(10, 0.4), rows).astype(np.float32).ravel())
    return {
        "author": np.where(accepted, "draft", "base"),
        "ended_by": np.full(rows, "blank_line"),
        "start": (ends - lengths).ravel(),
        "end": ends.ravel(),
        "token_ids": pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * 2 * WORDS_A_STEP, tokens),
        "num_tokens": np.full(rows, 2 * WORDS_A_STEP),
        "rejected_text": [None if kept else _text(rng, words) for kept in accepted],
        "rejected_num_tokens": pa.array(np.full(rows, 2 * WORDS_A_STEP), mask=accepted),
        "score": np.where(accepted, 8.0, 3.0),
        "digit_probs": pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * 10, probs),
        "digit_mass": np.ones(rows),
        "accepted": accepted,
        "round": np.zeros(rows, np.int64),
    }


def _verdicts(rng: np.random.Generator) -> dict[str, Any]:
    same = {"basis": "gold", "kind": "math", "expected": "4", "extracted": "4"}
    verdicts = {"verdict": rng.choice(["right", "wrong", "unverifiable"], PART, p=[0.7, 0.25, 0.05])}
    return {name: np.full(PART, value) for name, value in same.items()} | verdicts | {"seconds": np.zeros(PART)}


def _write(root: Path, kind: str, schema: pa.Schema, columns: dict[str, Any], metadata: dict[str, str]) -> None:
    rows = len(columns["prompt_id"])
    arrays = [_as_array(columns.get(field.name, pa.nulls(rows)), field.type) for field in schema]
    table = pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata | {"kind": kind}))
    (root / kind).mkdir(parents=True)
    pq.write_table(table, root / kind / "part-00000-made.parquet", compression="zstd")


def _as_array(values: Any, type: pa.DataType) -> pa.Array:
    array = values if isinstance(values, pa.Array) else pa.array(values)
    return array.cast(type, safe=False)


def measure(run: Path, output: Path, choices: list[str]) -> dict[str, Any]:
    """Of an export in a process of its own; what it has written is removed again."""
    given = [f"runs=[{run}]", f"output={output}", "allow_unfinished=true", *choices]
    command = [sys.executable, "-c", EXPORT, str(CONF), *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    counts = json.loads((output / "export.json").read_text())["counts"]
    rows = sum(split["rows"] for split in counts["splits"].values())
    shutil.rmtree(output)
    return figures | {"rows": rows, "choices": choices}


def write_survey(folder: Path, num_chains: int) -> None:
    """Lines of figures in files of 100,000: four samples a prompt, a tenth left out, a tenth doubled."""
    for number in range(num_chains // LINES):
        rng = np.random.default_rng(number)
        prompts = np.repeat(rng.integers(0, 2**63, LINES // SAMPLES), SAMPLES)
        doubled = rng.integers(0, 2**63, LINES)[np.where(rng.random(LINES) < 0.1, 0, np.arange(LINES))]
        drawn = {
            **dict.fromkeys(("prompt", "prompt_id", "wording"), prompts),
            "content": doubled,
            "tokens": rng.integers(100, 9000, LINES),
            "rank": rng.random(LINES),
            "rows": np.ones(LINES),
            "removed": [0 if left_out else None for left_out in rng.random(LINES) < 0.1],
        }
        columns = {name: drawn.get(name, [None] * LINES) for name in MARKS}
        pl.DataFrame(columns, schema_overrides=MARKS, strict=False).write_parquet(folder / f"{number:06d}.parquet")


def measure_decisions(num_chains: int, place: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=place) as folder:
        write_survey(Path(folder), num_chains)
        command = [sys.executable, "-c", DECIDE, folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return {"lines": num_chains} | figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, nargs="+", default=[10_000, 40_000])
    parser.add_argument("--steps", type=int, default=20, help="of a chain, of 30 words each")
    parser.add_argument("--formats", nargs="+", default=["sft_messages", "step_preferences"])
    parser.add_argument("--select", nargs="*", default=[], help="further choices of jobs.export")
    parser.add_argument("--folder", help="where to put it for as long as it takes; default: the system's")
    parser.add_argument(
        "--decide", type=int, nargs="+", default=[], help="lines of a survey; then nothing else is done"
    )
    arguments = parser.parse_args()
    if arguments.decide:
        print(json.dumps([measure_decisions(num_lines, arguments.folder) for num_lines in arguments.decide]))
        return
    tokenizer = CONF.parent / "examples" / "toy" / "draft"
    table = Table("chains", "GiB read", "format", "rows", "seconds", "chains/s", "peak MiB")
    figures = []
    for num_chains in arguments.chains:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            run = write_output(Path(folder) / "run", num_chains, arguments.steps)
            size = sum(path.stat().st_size for path in run.rglob("*.parquet"))
            for format in arguments.formats:
                choices = [f"format={format}", f"tokenizer={tokenizer}", *arguments.select]
                found = {"chains": num_chains, "bytes": size} | measure(run, Path(folder) / "dataset", choices)
                figures.append(found | {"format": format})
                table.add_row(
                    f"{num_chains:,}",
                    f"{size / 2**30:.2f}",
                    format,
                    f"{found['rows']:,}",
                    f"{found['seconds']:.1f}",
                    f"{num_chains / found['seconds']:.0f}",
                    f"{found['peak_mib']:.0f}",
                )
    Console(width=120).print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
