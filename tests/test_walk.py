"""From a public data set as it is to chains: MATH problems, prepared, run by the toy pair, which knows none of it."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from specreason_batch.engine import Engine
from specreason_batch.types import Role
from tests.conftest import ROOT
from tests.test_toy import read, run

EXCERPT = ROOT / "tests" / "data" / "math500-excerpt.parquet"

pytestmark = pytest.mark.vllm


def test_math_problems_become_shards_and_shards_become_chains(toy_engines: dict[Role, Engine], tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts", tmp_path / "out"
    words = [f"input={EXCERPT}", f"output={prompts}", "template=math", "num_shards=2", "holdout=4"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.prepare", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shards = [pl.read_parquet(path) for path in sorted(prompts.glob("*.parquet"))]
    assert [shard.height for shard in shards] == [8, 8]
    run(toy_engines, output, f"input.path={prompts}", "budgets.thinking_tokens=96")
    problems = pl.read_parquet(EXCERPT)
    chains = read(output, "chains")
    rejects = pl.concat([pl.read_parquet(path) for path in output.glob("*/rejects/*.parquet")] or [pl.DataFrame()])
    assert chains.height + rejects.height == 16 and chains.height >= 8
    for row in chains.rows(named=True):
        (problem,) = problems.filter(pl.col("unique_id") == row["prompt_id"]).rows(named=True)
        assert problem["problem"].strip() in row["prompt"] and "\\boxed" in row["prompt"]
        assert (row["gold_answer"], row["input_subject"]) == (problem["answer"], problem["subject"])
        assert row["num_steps"] > 0 and row["thinking_end"] in ("closed", "budget", "repetition", "context")
    steps = read(output, "steps")
    assert steps.height == chains["num_steps"].sum()
    assert all("leaves no room" in reason for reason in (rejects["reason"] if rejects.height else []))
    assert json.loads((output / "run.json").read_text())["config"]["input"]["path"] == str(prompts)
