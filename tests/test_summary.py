"""The closing table of a hand-made output, worked out by hand."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from specreason_batch.rounds import PhaseStats, RoundStats
from specreason_batch.store.parts import ShardPaths, ShardWriter
from specreason_batch.store.schemas import STEPS, chains_schema, round_row
from specreason_batch.summary import EngineUse, Summary, summarise, summary_table
from specreason_batch.types import Phase, Role
from tests.support.commits import Uncontended

GOLD = chains_schema(pa.schema([]), has_gold_answer=True)


def chain(prompt_id: str, end: str, answer: str, num_blank: int = 0) -> dict[str, Any]:
    given = {"prompt_id": prompt_id, "sample_index": 0, "thinking_end": end, "gold_answer": "4"}
    return dict.fromkeys(GOLD.names) | given | {"answer": answer, "num_unsplit_blank_lines": num_blank}


def step(
    prompt_id: str, author: str, accepted: bool | None = None, rejected: int | None = None, mass: float | None = None
) -> dict[str, Any]:
    row = dict.fromkeys(STEPS.names) | {"prompt_id": prompt_id, "sample_index": 0, "author": author}
    score = None if mass is None or mass < 0.5 else 5.0
    ends = {"ended_by": "blank_line", "accepted": accepted, "rejected_num_tokens": rejected}
    return row | ends | {"digit_mass": mass, "score": score}


def attempt(root: Path, chains: list[dict[str, Any]], steps: list[dict[str, Any]], rounds: list[RoundStats]) -> None:
    """One attempt's committed part."""
    writer = ShardWriter(
        ShardPaths(root), Uncontended(root), GOLD, metadata={}, chains_per_part=1000, seconds_per_part=1e9
    )
    for row in chains:
        writer.add_chain(row, [item for item in steps if item["prompt_id"] == row["prompt_id"]])
    for stats in rounds:
        writer.add_round(round_row(stats))
    writer.commit()


LOCKSTEP = RoundStats(
    1,
    0.0,
    seconds=10.0,
    idle_seconds=1.0,
    busy_seconds={Role.draft: 3.0, Role.base: 6.0},
    request_seconds={Role.draft: 12.0, Role.base: 30.0},
    kv_load={Role.draft: 200, Role.base: 900},
    kv_capacity={Role.draft: 4000, Role.base: 1000},
    phases={
        Phase.draft: PhaseStats(4, 100, 60, 0, 40),
        Phase.grade: PhaseStats(4, 200, 100, 20, 4),
        Phase.rewrite: PhaseStats(1, 60, 40, 0, 12),
        Phase.answer: PhaseStats(1, 40, 40, 0, 6),
    },
    phase_seconds={Phase.draft: 3.0, Phase.grade: 1.5, Phase.rewrite: 4.5},
)
WAVES = RoundStats(
    1,
    20.0,
    seconds=30.0,
    idle_seconds=0.5,
    num_parked=5,
    num_waiting=3,
    busy_seconds={Role.draft: 17.0, Role.base: 29.0},
    request_seconds={Role.draft: 48.0, Role.base: 170.0},
    kv_load={Role.draft: 400, Role.base: 1900},
    kv_capacity={Role.draft: 4000, Role.base: 2000},  # another attempt's engine holds more
    phases={phase: PhaseStats(1, 150, 60, 15, 10) for phase in Phase},
)
LAST = replace(WAVES, round=2, num_parked=0, num_waiting=1, kv_load={Role.draft: 100, Role.base: 1000})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Two attempts: one in lockstep, then one in waves on engines with more memory."""
    attempt(
        tmp_path / "shard",
        [chain("a", "closed", "\\boxed{4}")],
        [step("a", "draft", True, None, 0.9), step("a", "base", False, 7, 0.7), step("a", "base")],
        [LOCKSTEP],
    )
    attempt(
        tmp_path / "shard",
        [chain("b", "closed", "\\boxed{5}"), chain("c", "budget", "4", num_blank=2)],
        [step("b", "draft", True, None, 0.8), step("b", "base", False, 5, 0.2), step("c", "draft", True, None, 0.4)],
        [WAVES, LAST],
    )
    return tmp_path


def test_every_figure_is_the_one_worked_out_by_hand(output: Path) -> None:
    found = summarise(output)
    assert found == Summary(
        num_chains=3,
        accuracy=pytest.approx(1 / 3),
        num_gold=3,
        thinking_ends={"closed": 2, "budget": 1},
        step_ends={"blank_line": 6},
        num_unsplit_blank_lines=2,
        mean_steps=2.0,
        draft_step_share=0.5,
        acceptance=pytest.approx(3 / 5),
        num_graded=5,
        num_unreadable=2,
        mean_digit_mass=pytest.approx(0.6),
        tokens={"draft": 60, "rewrite": 32, "answer": 26},
        rejected_tokens=12,
        cached_share=pytest.approx((240 + 8 * 60) / 1600),
        grade_prompt_tokens=500,
        recomputed_tokens=20 + 8 * 15,
        recomputed_share=pytest.approx(140 / 1600),
        seconds=70.0,
        phase_seconds={"draft": 3.0, "grade": 1.5, "rewrite": 4.5},
        engines={
            Role.draft: EngineUse(
                busy_share=pytest.approx(37 / 70),
                mean_requests=pytest.approx(108 / 70),
                peak_kv_load=400,
                kv_capacity=4000,
            ),
            Role.base: EngineUse(
                busy_share=pytest.approx(64 / 70),
                mean_requests=pytest.approx(370 / 70),
                peak_kv_load=1900,
                kv_capacity=2000,
            ),
        },
        idle_share=pytest.approx(2 / 70),
        num_parked=5,
        most_waiting=3,
    )


def test_the_table(output: Path) -> None:
    assert table(output) == [
        ("chains", "3 (closed 2, budget 1)"),
        ("accuracy", "33.3% of 3 with a gold answer (exact match of \\boxed{})"),
        ("steps a chain", "2.0, 50.0% of them by the draft"),
        ("drafts accepted", "60.0%"),
        ("grades", "5, 2 unreadable, mean digit mass 0.600, 500 prompt tokens"),
        ("steps ended by", "blank_line 6"),
        ("tokens generated", "draft 60, rewrite 32, answer 26; 12 of the draft's rejected"),
        ("prompt tokens cached", "45.0%"),
        ("rounds, wall-clock", "70.0 s, 0.0 chains/s"),
        ("blank lines of two tokens", "2 steps hold one; it ends no step"),
        ("by phase", "draft 3.0 s, grade 1.5 s, rewrite 4.5 s"),
        ("engines busy", "draft 52.9%, base 91.4% of the time; neither 2.9%"),
        ("requests at them, mean", "draft 1.5, base 5.3"),
        ("KV tokens needed, most", "draft 400 of 4,000 (10.0%), base 1,900 of 2,000 (95.0%)"),
        ("chains parked", "5 times for want of KV memory, at most 3 at once"),
        ("prompt tokens recomputed", "140 that had been evicted, 8.8%"),
    ]


def test_the_peak_is_the_greatest_share_not_the_most_tokens(tmp_path: Path) -> None:
    """An attempt on a smaller engine may have been the tight one."""
    tight = replace(LOCKSTEP, kv_load={Role.draft: 200, Role.base: 990})
    attempt(tmp_path / "shard", [chain("a", "closed", "4")], [step("a", "base")], [tight, WAVES])
    found = summarise(tmp_path)
    assert found is not None
    assert (found.engines[Role.base].peak_kv_load, found.engines[Role.base].kv_capacity) == (990, 1000)


def test_a_policy_with_one_model_has_figures_of_one_engine(tmp_path: Path) -> None:
    alone = RoundStats(
        1,
        0.0,
        seconds=8.0,
        idle_seconds=2.0,
        busy_seconds={Role.base: 6.0},
        request_seconds={Role.base: 20.0},
        kv_load={Role.base: 500},
        kv_capacity={Role.base: 1000},
    )
    attempt(tmp_path / "shard", [chain("a", "closed", "4")], [step("a", "base")], [alone])
    found = summarise(tmp_path)
    assert found is not None and set(found.engines) == {Role.base}
    lines = dict(table(tmp_path))
    assert lines["engines busy"] == "base 75.0% of the time"
    assert lines["requests at them, mean"] == "base 2.5"
    assert not {"chains parked", "prompt tokens recomputed", "by phase"} & set(lines)


def test_nothing_is_summarised_before_a_chain_is_committed(tmp_path: Path) -> None:
    attempt(tmp_path / "shard", [], [], [LOCKSTEP])
    assert pq.read_table(next(tmp_path.glob("*/rounds/*.parquet"))).num_rows == 1
    assert summarise(tmp_path) is None


def table(output: Path) -> list[tuple[str, str]]:
    """The rendered table's cells."""
    summary = summarise(output)
    assert summary is not None
    rendered = summary_table(summary, "title")
    console = Console(file=io.StringIO(), width=160)
    console.print(rendered)
    names, values = (list(column.cells) for column in rendered.columns)
    return [(str(name), str(value)) for name, value in zip(names, values, strict=True)]
