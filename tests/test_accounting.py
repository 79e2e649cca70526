"""The account of a hand-made run: every figure is worked out here, by hand, from the rows below."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from benchmarks.report_scale import measure, write_output
from specreason_batch.accounting.account import account
from specreason_batch.accounting.figures import Chart, RunReport, Section
from specreason_batch.accounting.intervals import bootstrap_mean, clustered_rate, wilson
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.prices import Prices
from specreason_batch.accounting.tokens import num_lost_tokens
from specreason_batch.accounting.wall_clock import buckets
from specreason_batch.rounds import PhaseStats, RoundStats
from specreason_batch.store.attempts import Attempt, AttemptState, Owner, ShardProgress
from specreason_batch.store.parts import ShardPaths, ShardWriter
from specreason_batch.store.prompts import Reject
from specreason_batch.store.schemas import SCHEMA_VERSION, STEPS, chains_schema, round_row
from specreason_batch.store.verdicts import VERDICTS
from specreason_batch.types import Hardware, InvalidInput, Phase, Role
from tests.conftest import ROOT
from tests.support.commits import Uncontended

CHAINS = chains_schema(pa.schema([]), has_gold_answer=True)
PRICES = Prices(currency="EUR", device_hour={"H100": 3.0, "A100": 2.0, "A100-SXM4-40GB": 1.5}, kwh=0.5)
START = 1_700_000_000.0


# --- the run: two shards, one in lockstep on two H100 and killed once, one in waves on an A100 ---


def chain(key: tuple[str, int], ends: str, steps: int, generated: str, prompts: str, redone: int = 0) -> dict[str, Any]:
    """`generated`: draft kept, draft rejected, base, answer. `prompts`: grading, cached."""
    kept, rejected, base, answer = map(int, generated.split())
    grading, cached = map(int, prompts.split())
    thinking_end, answer_end = ends.split()
    return dict.fromkeys(CHAINS.names) | {
        "prompt_id": key[0],
        "sample_index": key[1],
        "thinking_end": thinking_end,
        "answer_end": answer_end,
        "num_steps": steps,
        "num_draft_tokens_kept": kept,
        "num_draft_tokens_rejected": rejected,
        "num_base_tokens": base,
        "num_answer_tokens": answer,
        "num_grade_prompt_tokens": grading,
        "num_cached_prompt_tokens": cached,
        "num_redone_tokens": redone,
    }


def accepted(score: float, mass: float = 0.99) -> dict[str, Any]:
    return {"author": "draft", "accepted": True, "num_tokens": 10} | grade(score, mass)


def rejected(tokens: int, score: float | None, mass: float = 0.99) -> dict[str, Any]:
    kept = {"author": "base", "accepted": False, "num_tokens": 10, "rejected_num_tokens": tokens}
    return kept | grade(score, mass)


def grade(score: float | None, mass: float) -> dict[str, Any]:
    digit = 0 if score is None else round(score)
    return {"score": score, "digit_mass": mass, "digit_probs": [mass * (number == digit) for number in range(10)]}


BY_BASE: dict[str, Any] = {"author": "base", "num_tokens": 10}

A0, A1, B0, B1, C0, D0 = ("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("d", 0)
ONE = [
    chain(A0, "closed stop", 3, "40 10 20 5", "200 300", redone=7),
    chain(A1, "closed stop", 2, "30 0 0 5", "100 80"),
    chain(B0, "budget length", 3, "0 30 60 10", "150 120"),
    chain(B1, "closed stop", 2, "20 0 10 5", "50 20"),
]
TWO = [
    chain(C0, "error none", 2, "10 5 15 0", "60 10", redone=3),
    chain(D0, "closed stop", 1, "50 0 0 5", "40 0"),
]
STEPS_OF = {
    A0: [accepted(8.2), rejected(10, 3.1, mass=0.9), accepted(7.0)],
    A1: [accepted(9.0, mass=1.0), accepted(7.4)],
    B0: [rejected(12, None, mass=0.3), rejected(18, 0.2), BY_BASE],
    B1: [accepted(8.9), BY_BASE],
    C0: [rejected(5, 6.99), accepted(7.5)],
    D0: [accepted(8.0) | {"ended_by": "think_close"}],
}
VERDICTS_OF = {
    A0: ("right", "4"),
    A1: ("wrong", "5"),
    B0: ("right", "4"),
    B1: ("right", "4"),
    C0: ("wrong", None),
    D0: ("unverifiable", "x"),
}

LOCKSTEP = [
    RoundStats(
        1,
        START,
        num_active=4,
        seconds=10.0,
        idle_seconds=1.0,
        busy_seconds={Role.draft: 3.0, Role.base: 6.0},
        request_seconds={Role.draft: 12.0, Role.base: 30.0},
        kv_load={Role.draft: 100, Role.base: 500},
        kv_capacity={Role.draft: 1000, Role.base: 1000},
        phases={
            Phase.draft: PhaseStats(4, 100, 60, 0, 100),
            Phase.grade: PhaseStats(4, 300, 100, 20, 4),
            Phase.rewrite: PhaseStats(1, 60, 40, 0, 55),
            Phase.answer: PhaseStats(0, 0, 0, 0, 0),
        },
        phase_seconds={Phase.draft: 3.0, Phase.grade: 2.0, Phase.rewrite: 4.0},
    ),
    RoundStats(
        2,
        START + 10,
        num_active=2,
        num_finished=4,
        seconds=30.0,
        idle_seconds=3.0,
        busy_seconds={Role.draft: 10.0, Role.base: 17.0},
        request_seconds={Role.draft: 20.0, Role.base: 34.0},
        kv_load={Role.draft: 100, Role.base: 900},
        kv_capacity={Role.draft: 1000, Role.base: 1000},
        phases={
            Phase.draft: PhaseStats(2, 100, 40, 0, 40),
            Phase.grade: PhaseStats(2, 200, 100, 0, 2),
            Phase.rewrite: PhaseStats(1, 40, 40, 0, 40),
            Phase.answer: PhaseStats(4, 100, 100, 0, 25),
        },
        phase_seconds={Phase.draft: 10.0, Phase.grade: 5.0, Phase.rewrite: 12.0},
    ),
]
WAVES = [
    RoundStats(
        1,
        START + 5,
        num_active=3,
        num_parked=2,
        num_waiting=1,
        seconds=20.0,
        idle_seconds=2.0,
        busy_seconds={Role.draft: 12.0, Role.base: 15.0},
        request_seconds={Role.draft: 24.0, Role.base: 45.0},
        kv_load={Role.draft: 400, Role.base: 1950},
        kv_capacity={Role.draft: 4000, Role.base: 2000},
        phases={
            Phase.draft: PhaseStats(2, 50, 10, 5, 50),
            Phase.grade: PhaseStats(2, 100, 50, 0, 2),
            Phase.rewrite: PhaseStats(1, 25, 10, 0, 20),
            Phase.answer: PhaseStats(0, 0, 0, 0, 0),
        },
    ),
    RoundStats(
        2,
        START + 25,
        num_active=1,
        num_finished=2,
        seconds=30.0,
        idle_seconds=5.0,
        busy_seconds={Role.draft: 20.0, Role.base: 10.0},
        request_seconds={Role.draft: 20.0, Role.base: 10.0},
        kv_load={Role.draft: 0, Role.base: 0},
        kv_capacity={Role.draft: 4000, Role.base: 2000},
        phases={
            Phase.draft: PhaseStats(1, 25, 10, 0, 20),
            Phase.grade: PhaseStats(1, 50, 20, 0, 1),
            Phase.rewrite: PhaseStats(1, 25, 10, 0, 10),
            Phase.answer: PhaseStats(1, 25, 10, 0, 5),
        },
    ),
]
H100S = Hardware(devices=("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"), num_cores=16)
A100 = Hardware(devices=("NVIDIA A100-PCIE-80GB",), num_cores=8)
KILLED = ShardProgress(num_chains=4, num_generated_tokens=100, startup_seconds=10, seconds=20, energy_joules=7.2e6)
RESUMED = ShardProgress(
    num_chains=4, num_generated_tokens=200, num_redone_tokens=30, startup_seconds=5, seconds=85, energy_joules=3.6e6
)
ALONE = ShardProgress(num_chains=2, num_generated_tokens=105, startup_seconds=0, seconds=60, energy_joules=3.6e6)


def write_part(
    root: Path, chains: list[dict[str, Any]], rounds: list[RoundStats], reject: Reject | None = None
) -> None:
    writer = ShardWriter(
        ShardPaths(root), Uncontended(root), CHAINS, metadata={}, chains_per_part=1000, seconds_per_part=1e9
    )
    for row in chains:
        key = {"prompt_id": row["prompt_id"], "sample_index": row["sample_index"]}
        steps = [
            dict.fromkeys(STEPS.names) | {"ended_by": "blank_line"} | key | {"step_index": index} | step
            for index, step in enumerate(STEPS_OF[key["prompt_id"], key["sample_index"]])
        ]
        writer.add_chain(row, steps, reject if row["thinking_end"] == "error" else None)
    for stats in rounds:
        writer.add_round(round_row(stats))
    writer.commit()


def write_attempt(
    root: Path, number: int, state: AttemptState, progress: ShardProgress, hardware: Hardware | None, **changes: Any
) -> None:
    owner = Owner(host="node7", pid=1, machine="", born="", slurm_job="9_0")
    attempt = Attempt(
        number=number,
        owner=owner,
        state=state,
        started_at=START,
        progress=progress,
        hardware=hardware,
        **{"beat_at": START} | changes,
    )
    (root / "attempts").mkdir(parents=True, exist_ok=True)
    (root / "attempts" / f"attempt-{number:05d}.json").write_text(json.dumps(asdict(attempt)))


def write_manifest(output: Path, policy: str = "specreason") -> None:
    config = {
        "policy": {"name": policy, "threshold": 7.0, "answer_role": "base"},
        "judge": {"reading": "expected", "mass_floor": 0.5},
        "schedule": {"name": "lockstep"},
        "samples_per_prompt": 2,
        "limit": None,
        "input": {"path": "nowhere/prompts.parquet"},
    }
    output.mkdir(exist_ok=True)
    (output / "run.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION, "config": config}))


def write_verdicts(root: Path, keys: list[tuple[str, int]]) -> None:
    """Of the shard's first part."""
    part = next((root / "chains").iterdir()).name
    rows = [
        dict.fromkeys(VERDICTS.names)
        | {"prompt_id": key[0], "sample_index": key[1], "verdict": VERDICTS_OF[key][0], "basis": "gold"}
        | {"extracted": VERDICTS_OF[key][1]}
        for key in keys
    ]
    (root / "verdicts").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=VERDICTS), root / "verdicts" / part)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """The run above, not verified."""
    folder = tmp_path / "run"
    write_manifest(folder)
    write_part(folder / "one", ONE, LOCKSTEP)
    write_attempt(folder / "one", 1, AttemptState.running, KILLED, H100S)
    write_attempt(folder / "one", 2, AttemptState.finished, RESUMED, H100S)
    lost = Reject(prompt_id="c", sample_index=0, file="two.parquet", row=3, reason="given up at step 2: odd")
    write_part(folder / "two", TWO, WAVES, lost)
    write_attempt(folder / "two", 1, AttemptState.finished, ALONE, A100)
    return folder


@pytest.fixture
def report(output: Path) -> RunReport:
    """Of the run above, verified."""
    write_verdicts(output / "one", [A0, A1, B0, B1])
    write_verdicts(output / "two", [C0, D0])
    return make(output)


def make(output: Path, prices: Prices = PRICES) -> RunReport:
    return account(RunFiles(output, "hand-made"), prices)


def values(section: Section) -> dict[str, float | int | None]:
    return {figure.name: figure.value for figure in section.figures}


def chart(section: Section, name: str) -> Chart:
    return {chart.name: chart for chart in section.charts}[name]


def rows(section: Section, name: str, *columns: str) -> list[tuple[Any, ...]]:
    return section.table(name).frame.select(columns).rows()


# --- every figure ---


def test_tokens(report: RunReport) -> None:
    section = report.section("tokens")
    assert values(section) == {
        "generated_tokens": 150 + 45 + 105 + 30 + 10 + 30,
        "kept_tokens": 285,
        "draft_kept_tokens": 150,
        "draft_rejected_tokens": 45,
        "base_step_tokens": 105,
        "answer_tokens": 30,
        "redone_tokens": 10,
        "redone_after_kill_tokens": 30,
        "wasted_share": pytest.approx(100 * (45 + 10 + 30) / 370),
        "rounds_generated_tokens": 210 + 125 + 30,
        "uncommitted_tokens": 365 - (150 + 45 + 105 + 30 + 10),
        "grade_prompt_tokens": 600,
        "grade_new_tokens": 650 - 270,
        "grade_cached_tokens": 270,
        "prompt_tokens": 275 + 650 + 150 + 125,
        "cached_share": pytest.approx(100 * (120 + 270 + 100 + 110) / 1200),
        "recomputed_share": pytest.approx(100 * 25 / 1200),
    }
    assert rows(section, "phases", "phase", "num_requests", "num_prompt_tokens", "num_new_tokens", "cached_share") == [
        ("draft", 9, 275, 155, pytest.approx(100 * 120 / 275)),
        ("grade", 9, 650, 380, pytest.approx(100 * 270 / 650)),
        ("rewrite", 4, 150, 50, pytest.approx(100 * 100 / 150)),
        ("answer", 5, 125, 15, pytest.approx(88.0)),
    ]
    assert section.table("generated").frame["num_tokens"].sum() == 370
    assert chart(section, "generated").frame.rows() == [("draft", 150, 0, 45), ("base", 105, 30, 0)]


def test_the_parts_of_the_wall_clock_add_up_to_the_attempts(report: RunReport) -> None:
    section = report.section("wall_clock")
    found = values(section)
    assert found["attempt_seconds"] == 10 + 20 + 5 + 85 + 60
    assert found["elapsed_seconds"] == 55
    assert rows(section, "parts", "part", "seconds") == [
        ("startup", 15.0),
        ("draft", 13.0),
        ("grade", 7.0),
        ("rewrite", 16.0),
        ("between", 4.0),
        ("draft_alone", 3.0 + 15.0),
        ("base_alone", 6.0 + 5.0),
        ("both", 9.0 + 5.0),
        ("neither", 2.0 + 5.0),
        ("rest", 20 + 85 + 60 - 90.0),
    ]
    assert section.table("parts").frame["seconds"].sum() == found["attempt_seconds"]
    assert {name: found[f"{name}_seconds"] for name, _ in rows(section, "parts", "part", "seconds")} == dict(
        rows(section, "parts", "part", "seconds")
    )


def test_engines_and_rates(report: RunReport) -> None:
    found = values(report.section("wall_clock"))
    wanted = {
        "rounds_seconds": 90.0,
        "draft_busy_share": 100 * 45 / 90,
        "draft_mean_requests": 76 / 90,
        "draft_mean_batch": 76 / 45,
        "draft_peak_kv_share": 10.0,
        "base_busy_share": 100 * 48 / 90,
        "base_mean_requests": 119 / 90,
        "base_mean_batch": 119 / 48,
        "base_peak_kv_share": 97.5,
        "idle_share": 100 * 11 / 90,
        "num_parked": 2,
        "most_waiting": 1,
        "chains_per_second": 6 / 180,
        "tokens_per_second": 365 / 90,
    }
    assert {name: found[name] for name in wanted} == {name: pytest.approx(value) for name, value in wanted.items()}


def test_attempts_are_listed_with_what_each_lost(report: RunReport) -> None:
    columns = ("shard", "attempt", "state", "host", "startup_seconds", "seconds", "num_redone_tokens")
    assert rows(report.section("wall_clock"), "attempts", *columns) == [
        ("one", 1, "running", "node7", 10, 20, 0),
        ("one", 2, "finished", "node7", 5, 85, 30),
        ("two", 1, "finished", "node7", 0, 60, 0),
    ]


def test_what_is_shown_over_time_is_all_there_was_shards_side_by_side_added_up(output: Path) -> None:
    run = RunFiles(output, "")
    assert run.rounds is not None
    frame = buckets(run.rounds)
    width = 55 / 120
    assert frame["seconds"].to_list() == pytest.approx([number * width for number in range(120)])
    total = {name: frame[name].sum() * width for name in frame.columns}
    assert total["draft_tokens"] == pytest.approx(210)
    assert total["answer_tokens"] == pytest.approx(30)
    assert total["finished"] == pytest.approx(6)
    assert total["base_requests"] == pytest.approx(119)
    assert total["active"] == pytest.approx(4 * 10 + 2 * 30 + 3 * 20 + 1 * 30)
    (at_12,) = frame.filter(pl.col("seconds").is_between(12 - width, 12, closed="right")).rows(named=True)
    assert at_12["active"] == pytest.approx(2 + 3)
    assert at_12["base_requests"] == pytest.approx(34 / 30 + 45 / 20)
    assert at_12["base_kv"] == pytest.approx((900 + 1950) / 3000)
    assert at_12["draft_tokens"] == pytest.approx(40 / 30 + 50 / 20)


def test_cost(report: RunReport) -> None:
    section = report.section("cost")
    h100, a100 = 2 * (10 + 20 + 5 + 85) / 3600, 60 / 3600
    money = 3.0 * h100 + 2.0 * a100 + 0.5 * 4.0
    assert values(section) == {
        "device_hours": pytest.approx(h100 + a100),
        "core_hours": 0,
        "energy_kwh": pytest.approx(4.0),
        "money": pytest.approx(money),
        "money_per_chain": pytest.approx(money / 6),
        "money_per_1000_kept_tokens": pytest.approx(money / 0.285),
        "money_per_correct_answer": pytest.approx(money / 3),
        "device_seconds_per_chain": pytest.approx(300 / 6),
        "device_seconds_per_1000_kept_tokens": pytest.approx(300 / 0.285),
        "device_seconds_per_correct_answer": pytest.approx(100),
    }
    assert section.figure("money").unit == "EUR"
    assert rows(section, "devices", "device", "price") == [
        ("NVIDIA A100-PCIE-80GB", 2.0),
        ("NVIDIA H100 80GB HBM3", 3.0),
    ]


def test_acceptance(report: RunReport) -> None:
    section = report.section("acceptance")
    scores = [8.2, 3.1, 7.0, 9.0, 7.4, 0.2, 8.9, 6.99, 7.5, 8.0]
    wanted = {
        "num_steps": 13,
        "draft_step_share": 100 * 7 / 13,
        "num_decided": 11,
        "num_accepted": 7,
        "acceptance": 100 * 7 / 11,
        "chain_acceptance_mean": 100 * (2 / 3 + 1 + 0 + 1 + 1 / 2 + 1) / 6,
        "chain_acceptance_p50": 100 * (2 / 3 + 1) / 2,
        "tokens_per_rejected_draft": 45 / 4,
        "tokens_per_accepted_draft": 10,
        "num_graded": 11,
        "num_unreadable": 1,
        "unreadable_share": 100 / 11,
        "score_mean": sum(scores) / 10,
        "digit_mass_mean": (0.9 + 1.0 + 0.3 + 8 * 0.99) / 11,
    }
    found = values(section)
    assert {name: found[name] for name in wanted} == {name: pytest.approx(value) for name, value in wanted.items()}
    half = 100 * 1.959964 * (302 / 121) ** 0.5 / 11  # deviations by chain: 1, 8, -14, 4, -3, 4 elevenths
    assert section.figure("acceptance").low == pytest.approx(100 * 7 / 11 - half)
    assert section.figure("acceptance").high == pytest.approx(min(100, 100 * 7 / 11 + half))


def test_acceptance_by_step_by_end_by_score_by_digit_and_by_chain(report: RunReport) -> None:
    section = report.section("acceptance")
    assert rows(section, "by_step", "step_index", "num_steps", "num_decided", "num_accepted", "num_unreadable") == [
        (0, 6, 6, 4, 1),
        (1, 5, 4, 2, 0),
        (2, 2, 1, 1, 0),
    ]
    assert section.table("by_step").frame["score_mean"][1] == pytest.approx((3.1 + 7.4 + 0.2 + 7.5) / 4)
    assert rows(section, "by_end", "ended_by", "num_steps", "num_decided", "num_accepted") == [
        ("blank_line", 12, 10, 6),
        ("think_close", 1, 1, 1),
    ]
    filled = chart(section, "scores").frame.filter(pl.col("accepted") + pl.col("rejected") > 0)
    assert filled.rows() == [
        (0.0, 0, 1),
        (3.0, 0, 1),
        (6.5, 0, 1),
        (7.0, 2, 0),
        (7.5, 1, 0),
        (8.0, 2, 0),
        (8.5, 2, 0),
    ]
    assert chart(section, "scores").frame.height == 18
    assert chart(section, "scores").marks == {"threshold": 7.0}
    masses = chart(section, "digit_mass").frame
    assert masses.filter(pl.col("accepted") + pl.col("rejected") > 0).rows() == [(0.3, 0, 1), (0.9, 0, 1), (0.95, 7, 2)]
    assert rows(section, "digits", "digit", "num_grades", "num_accepted") == [
        (0, 2, 0),
        (3, 1, 0),
        (7, 3, 2),
        (8, 3, 3),
        (9, 2, 2),
    ]
    by_chain = chart(section, "by_chain").frame
    assert dict(by_chain.filter(pl.col("num_chains") > 0).rows()) == {0.0: 1, 50.0: 1, 65.0: 1, 95.0: 3}


def test_chains(report: RunReport) -> None:
    section = report.section("chains")
    assert values(section) == {
        "num_chains": 6,
        "num_expected": 6,
        "num_in_flight": 0,
        "num_prompts": 4,
        "num_given_up": 1,
        "num_right": 3,
        "num_wrong": 2,
        "num_unverifiable": 1,
        "num_unverified": 0,
        "accuracy": pytest.approx(60),
        "accuracy_over_prompts": pytest.approx(50),
        "majority_accuracy": pytest.approx(100 * (0.5 + 1 + 0) / 3),
        "majority_agreement": None,
    }
    assert report.is_finished
    accuracy = section.figure("accuracy")
    assert (accuracy.low, accuracy.high) == (pytest.approx(23.07, abs=0.01), pytest.approx(88.24, abs=0.01))
    over_prompts = section.figure("accuracy_over_prompts")
    assert (over_prompts.low, over_prompts.high) == (0, 100)  # three prompts at 0, 50 and 100 %
    assert rows(section, "pass_at_k", "k", "pass_at_k", "num_prompts") == [(1, 50.0, 3), (2, 100.0, 2)]
    assert rows(section, "ends", "thinking_end", "answer_end", "num_chains", "num_right", "num_wrong") == [
        ("closed", "stop", 4, 2, 1),
        ("budget", "length", 1, 1, 0),
        ("error", "none", 1, 0, 1),
    ]
    assert rows(section, "rejects", "reason", "is_chain", "count") == [("given up at step …: odd", True, 1)]


def test_lengths_are_told_apart_by_right_and_wrong(report: RunReport) -> None:
    section = report.section("chains")
    lengths = section.table("lengths").frame
    means = {(length, chains): mean for length, chains, mean in lengths.select("length", "chains", "mean").rows()}
    assert means["thinking tokens", "all"] == pytest.approx((60 + 30 + 60 + 30 + 25 + 50) / 6)
    assert means["thinking tokens", "right"] == pytest.approx((60 + 60 + 30) / 3)
    assert means["thinking tokens", "wrong"] == pytest.approx((30 + 25) / 2)
    assert means["answer tokens", "unverifiable"] == 5
    assert means["steps", "right"] == pytest.approx((3 + 3 + 2) / 3)
    (median,) = lengths.filter(length="thinking tokens", chains="all")["p50"]
    assert median == pytest.approx((30 + 50) / 2)
    histogram = chart(section, "thinking_tokens").frame
    assert histogram.filter(edge=60.0).select("right", "wrong").rows() == [(2, 0)]
    assert histogram.select(pl.sum("right", "wrong", "unverifiable")).row(0) == (3, 2, 1)


# --- what is missing is said ---


def test_a_run_that_is_not_verified_has_no_accuracy_and_says_why(output: Path) -> None:
    report = make(output)
    section = report.section("chains")
    found = values(section)
    assert (found["accuracy"], found["num_right"], found["num_wrong"], found["num_unverified"]) == (None, None, None, 6)
    assert "jobs.verify" in section.figure("num_right").note
    assert "num_right" not in section.table("ends").frame.columns
    assert "jobs.verify" in section.figure("accuracy").note
    assert set(section.table("lengths").frame["chains"]) == {"all"}
    assert chart(section, "steps").y == ("unverified",)
    correct = report.section("cost").figure("money_per_correct_answer")
    assert correct.value is None and "jobs.verify" in correct.note


def test_a_partly_verified_run_counts_the_rest_and_prices_no_correct_answer(output: Path) -> None:
    write_verdicts(output / "one", [A0, A1, B0, B1])
    report = make(output)
    assert values(report.section("chains"))["num_unverified"] == 2
    assert values(report.section("chains"))["accuracy"] == pytest.approx(75)
    assert report.section("chains").figure("accuracy").note.startswith("of 4 chains compared with a gold answer, of 6")
    correct = report.section("cost").figure("money_per_correct_answer")
    assert correct.value is None and correct.note == "2 chains are not verified yet: python -m jobs.verify"


def test_agreeing_with_a_majority_is_not_being_right(output: Path) -> None:
    write_verdicts(output / "one", [A0, A1, B0, B1])
    (path,) = (output / "one" / "verdicts").iterdir()
    pl.read_parquet(path).with_columns(basis=pl.lit("majority")).write_parquet(path)
    found = values(make(output).section("chains"))
    assert found["accuracy"] is None and found["majority_agreement"] == pytest.approx(75)


def test_a_device_without_a_price_is_named_and_money_is_unknown(output: Path) -> None:
    section = make(output, Prices(device_hour={"A100": 2.0})).section("cost")
    assert values(section)["device_hours"] == pytest.approx(300 / 3600)
    assert values(section)["money"] is None and values(section)["money_per_chain"] is None
    assert section.figure("money").note == "no price is given for NVIDIA H100 80GB HBM3"


def test_energy_that_one_driver_does_not_tell_is_unknown_and_matters_only_where_it_is_priced(output: Path) -> None:
    quiet = ShardProgress(num_chains=2, num_generated_tokens=105, seconds=60)
    write_attempt(output / "two", 1, AttemptState.finished, quiet, A100)
    section = make(output).section("cost")
    assert values(section)["energy_kwh"] is None and values(section)["money"] is None
    assert "do not tell" in section.figure("money").note
    without = make(output, Prices(device_hour=PRICES.device_hour)).section("cost")
    assert values(without)["money"] == pytest.approx(3.0 * 240 / 3600 + 2.0 * 60 / 3600)


def test_engines_on_cpus_cost_core_hours(output: Path) -> None:
    for shard, number in (("one", 1), ("one", 2), ("two", 1)):
        write_attempt(output / shard, number, AttemptState.finished, ALONE, Hardware(num_cores=4))
    section = make(output, Prices(core_hour=0.04)).section("cost")
    assert values(section)["core_hours"] == pytest.approx(3 * 60 * 4 / 3600)
    assert values(section)["device_hours"] == 0
    assert values(section)["money"] == pytest.approx(0.04 * 0.2)
    assert section.figure("device_seconds_per_chain").unit == "core-s"


def test_attempts_that_noted_no_hardware_leave_cost_unknown_unless_they_never_worked(output: Path) -> None:
    write_attempt(output / "two", 2, AttemptState.failed, ShardProgress(num_chains=2, seconds=3), None)
    assert values(make(output).section("cost"))["money"] is not None
    write_attempt(output / "two", 2, AttemptState.finished, ALONE, None)
    section = make(output).section("cost")
    assert values(section)["money"] is None and values(section)["device_hours"] is None
    assert "hardware" in section.figure("money").note


def test_a_policy_that_decides_nothing_says_so(tmp_path: Path) -> None:
    write_manifest(tmp_path / "run", "base_only")
    key = ("e", 0)
    STEPS_OF[key] = [BY_BASE, BY_BASE]
    alone = RoundStats(1, START, seconds=8.0, idle_seconds=2.0, busy_seconds={Role.base: 6.0})
    write_part(tmp_path / "run" / "one", [chain(key, "closed stop", 2, "0 0 20 5", "0 0")], [alone])
    report = make(tmp_path / "run")
    section = report.section("acceptance")
    assert "Nothing was decided" in section.text and values(section)["num_decided"] == 0
    assert not section.tables and not section.charts
    found = values(report.section("wall_clock"))
    assert (found["base_alone_seconds"], found["draft_alone_seconds"], found["neither_seconds"]) == (6.0, 0.0, 2.0)
    assert "draft_busy_share" not in found


def test_a_run_without_telemetry_or_attempts_still_has_its_chains(output: Path) -> None:
    for path in [*output.glob("*/rounds/*"), *output.glob("*/attempts/*")]:
        path.unlink()
    report = make(output)
    found = values(report.section("tokens")) | values(report.section("wall_clock")) | values(report.section("cost"))
    assert found["kept_tokens"] == 285
    unknown: tuple[str, ...] = ("redone_after_kill_tokens", "device_hours", "device_seconds_per_chain")
    unknown += (
        "uncommitted_tokens",
        "prompt_tokens",
        "attempt_seconds",
        "rounds_seconds",
        "tokens_per_second",
        "money",
    )
    assert {name: found[name] for name in unknown} == dict.fromkeys(unknown)
    assert report.section("tokens").figure("prompt_tokens").note == "the rounds files were removed"
    assert "kills lost is unknown" in report.section("tokens").figure("generated_tokens").note
    for name in ("device_hours", "device_seconds_per_chain", "money"):
        assert report.section("cost").figure(name).note == "no attempt has noted what it ran on"


def test_a_run_whose_only_chain_was_given_up_at_once_has_unknown_shares_and_no_other_sections_break(
    tmp_path: Path,
) -> None:
    write_manifest(tmp_path / "run")
    key = ("f", 0)
    STEPS_OF[key] = []
    lost = Reject(prompt_id="f", sample_index=0, file="one.parquet", row=0, reason="too long")
    write_part(tmp_path / "run" / "one", [chain(key, "error none", 0, "0 0 0 0", "0 0")], [], lost)
    never_began = ShardProgress(num_chains=9, startup_seconds=4.0)
    write_attempt(tmp_path / "run" / "one", 1, AttemptState.bad_node, never_began, None)
    report = make(tmp_path / "run")
    found = {name: value for section in report.sections for name, value in values(section).items()}
    assert (found["num_chains"], found["num_given_up"], found["attempt_seconds"]) == (1, 1, 4.0)
    shares = ("wasted_share", "draft_step_share", "cached_share", "money_per_1000_kept_tokens", "device_hours")
    assert {name: found[name] for name in shares} == dict.fromkeys(shares)
    assert not [name for name, value in found.items() if value is not None and not math.isfinite(value)]


def test_a_run_at_work_is_accounted_as_of_what_is_committed(output: Path) -> None:
    working = ShardProgress(num_chains=9, num_in_flight=5, num_generated_tokens=105, seconds=60)
    write_attempt(output / "two", 1, AttemptState.running, working, A100, beat_at=4e9)
    report = make(output)
    found = values(report.section("chains"))
    assert not report.is_finished
    assert (found["num_chains"], found["num_expected"], found["num_in_flight"]) == (6, 13, 5)
    assert "not finished" in report.section("chains").figure("num_in_flight").note
    assert "last sign" in report.section("wall_clock").figure("attempt_seconds").note


def test_what_is_committed_after_a_run_was_opened_does_not_count(output: Path) -> None:
    run = RunFiles(output, "")
    key = ("later", 0)
    STEPS_OF[key] = [accepted(8.0)]
    write_part(output / "two", [chain(key, "closed stop", 1, "10 0 0 5", "0 0")], [])
    report = account(run, PRICES)
    assert values(report.section("chains"))["num_chains"] == 6
    assert values(report.section("acceptance"))["num_steps"] == 13
    assert values(make(output).section("acceptance"))["num_steps"] == 14


def test_output_of_an_older_version_is_refused_by_the_columns_that_it_lacks(output: Path) -> None:
    for path in output.glob("*/chains/*"):
        pl.read_parquet(path).drop("num_redone_tokens").write_parquet(path)
    with pytest.raises(InvalidInput, match=r"no column num_redone_tokens: the run was written by schema version"):
        make(output)


def test_a_folder_without_chains_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path / "run")
    with pytest.raises(InvalidInput, match="no chain is committed yet"):
        RunFiles(tmp_path / "run", "")


@pytest.mark.parametrize("kind", ["chains", "steps", "rounds"])
@pytest.mark.parametrize("shard", ["one", "two"])
def test_a_damaged_file_is_refused_by_the_runs_name(output: Path, shard: str, kind: str) -> None:
    (path,) = (output / shard / kind).iterdir()
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InvalidInput, match=str(output)):
        make(output)


# --- the pieces ---


def killed(generated: int, found_lost: int, state: AttemptState = AttemptState.running) -> Attempt:
    owner = Owner(host="", pid=1, machine="", born="")
    progress = ShardProgress(num_generated_tokens=generated, num_redone_tokens=found_lost)
    return Attempt(number=1, owner=owner, state=state, started_at=0, beat_at=0, progress=progress)


def test_what_a_killed_attempt_lost_is_counted_once_however_often_it_is_found() -> None:
    """The second was killed before its first checkpoint: the third found the first one's loss again."""
    attempts = [killed(100, 0), killed(50, 40), killed(70, 90), killed(10, 20, AttemptState.finished)]
    assert num_lost_tokens(attempts) == 40 + 50 + 20
    assert num_lost_tokens([killed(100, 0, AttemptState.stopped), killed(50, 0)]) == 0
    assert num_lost_tokens([]) == 0


def test_intervals_are_those_of_the_textbook() -> None:
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = bootstrap_mean([0.0, 1.0], [700_000, 300_000])
    deviation = 1.96 * (0.3 * 0.7 / 1e6) ** 0.5
    assert (low, high) == (pytest.approx(0.3 - deviation, abs=1e-4), pytest.approx(0.3 + deviation, abs=1e-4))
    alone = clustered_rate(0.5, 100 * 0.25, 100)  # clusters of one: the plain binomial
    assert alone == (pytest.approx(0.5 - 0.098, abs=1e-3), pytest.approx(0.5 + 0.098, abs=1e-3))


def test_prices_are_found_by_the_longest_part_of_the_name_and_refused_out_of_range() -> None:
    assert PRICES.of_device("NVIDIA A100-SXM4-40GB") == 1.5
    assert PRICES.of_device("nvidia a100-pcie-80gb") == 2.0
    assert PRICES.of_device("NVIDIA L4") is None
    with pytest.raises(InvalidInput) as error:
        Prices(currency="", device_hour={"H100": -1.0, "": 2.0}, core_hour=float("inf"))
    for field in ("cost.currency", "cost.device_hour.H100: -1.0", "cost.device_hour: ''", "cost.core_hour: inf"):
        assert field in str(error.value)


def test_the_price_table_that_comes_with_it_is_one() -> None:
    given = yaml.safe_load((ROOT / "conf" / "cost" / "default.yaml").read_text())
    assert Prices(**given).of_device("NVIDIA H200") is not None


def test_memory_hardly_grows_with_the_number_of_chains(tmp_path: Path) -> None:
    """A million step rows, whose texts, token ids and digits alone are 200 MiB in memory."""
    small, large = (measure(write_output(tmp_path / str(chains), chains, 50)) for chains in (4_000, 20_000))
    assert large["peak_mib"] - small["peak_mib"] < 60
    assert large["accuracy"] == pytest.approx(100 * 0.7 / 0.95, abs=2)
