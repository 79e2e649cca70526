"""Real runs of the toy pair: chains, steps, rounds, the account and vLLM's own counters say one and the same."""

import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from specreason_batch.accounting.account import account
from specreason_batch.accounting.figures import RunReport
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.prices import Prices
from specreason_batch.clock import WallClock
from specreason_batch.engine import Engine
from specreason_batch.progress import Progress
from specreason_batch.run import run_plan
from specreason_batch.schedules import Stopped
from specreason_batch.signals import StopSignal
from specreason_batch.types import Phase, Role
from specreason_batch.vllm_engine import VllmEngine
from tests.conftest import toy_engine_config
from tests.test_toy import plan_for, run

pytestmark = pytest.mark.vllm
NUM_PROMPTS = 60
RUNS = {
    "specreason": ["policy=specreason", "schedule=lockstep"],
    "waves": ["policy=specreason", "schedule=waves"],
    "base_only": ["policy=base_only"],
    "base_direct": ["policy=base_direct"],
    "draft_only": ["policy=draft_only"],
    "random": ["policy=random", "policy.accept_rate=0.7"],
}
PHASES_AT = {Role.draft: [Phase.draft], Role.base: [Phase.grade, Phase.rewrite, Phase.answer]}


@dataclass
class VllmCounts:
    """What one engine's own statistics have added up, as vLLM hands them to its loggers."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0

    def record(self, scheduler_stats: Any = None, iteration_stats: Any = None, **_: Any) -> None:
        if iteration_stats is not None:
            self.prompt += iteration_stats.prompt_token_stats.total
            self.cached += iteration_stats.prompt_token_stats.cached_tokens
            self.generated += iteration_stats.num_generation_tokens


@dataclass(frozen=True)
class CountedPair:
    """The toy pair with vLLM's statistics on."""

    engines: Mapping[Role, Engine]
    counts: Mapping[Role, VllmCounts]

    def reset(self) -> None:
        for counts in self.counts.values():
            counts.prompt = counts.cached = counts.generated = 0


@pytest.fixture(scope="module")
def pair() -> Iterator[CountedPair]:
    clock = WallClock()
    engines = {
        role: VllmEngine(toy_engine_config(role, vllm_args={"disable_log_stats": False}), clock=clock)
        for role in (Role.base, Role.draft)
    }
    counts = {role: VllmCounts() for role in engines}
    for role, engine in engines.items():
        engine._llm.llm_engine.logger_manager.record = counts[role].record
    yield CountedPair(engines, counts)
    for engine in engines.values():
        engine.close()


def account_of(output: Path) -> RunReport:
    return account(RunFiles(output, "run"), Prices())


def values(report: RunReport, *sections: str) -> dict[str, Any]:
    return {figure.name: figure.value for name in sections for figure in report.section(name).figures}


def sums(frame: pl.LazyFrame | None) -> dict[str, Any]:
    assert frame is not None
    return frame.select(pl.selectors.numeric().sum()).collect().row(0, named=True)


@pytest.mark.parametrize("name", RUNS)
def test_tokens_agree_in_chains_steps_rounds_the_account_and_vllms_own_counters(
    pair: CountedPair, tmp_path: Path, name: str
) -> None:
    pair.reset()
    run(pair.engines, tmp_path, f"limit={NUM_PROMPTS}", *RUNS[name])
    files = RunFiles(tmp_path, name)
    chains, steps, rounds = sums(files.chains), sums(files.steps), sums(files.rounds)
    answering = Role.draft if name == "draft_only" else Role.base

    # Generated: vLLM's count, the rounds' and the chains'.
    by_draft = chains["num_draft_tokens_kept"] + chains["num_draft_tokens_rejected"]
    written = {Role.draft: by_draft, Role.base: chains["num_base_tokens"]}
    written[answering] += chains["num_answer_tokens"]
    grades = rounds["grade_num_requests"]
    assert pair.counts[Role.draft].generated == written[Role.draft]
    assert pair.counts[Role.base].generated == written[Role.base] + grades
    assert rounds["draft_num_generated_tokens"] == by_draft
    assert rounds["rewrite_num_generated_tokens"] == chains["num_base_tokens"]
    assert rounds["answer_num_generated_tokens"] == chains["num_answer_tokens"]
    assert rounds["grade_num_generated_tokens"] == grades
    of_steps = steps["num_tokens"] + steps["rejected_num_tokens"]
    assert of_steps == by_draft + chains["num_base_tokens"]

    # Sent, and found in the cache.
    at = {role: [phase for phase in phases if phase is not Phase.answer] for role, phases in PHASES_AT.items()}
    at[answering].append(Phase.answer)
    for role, phases in at.items():
        assert pair.counts[role].prompt == sum(rounds[f"{phase}_num_prompt_tokens"] for phase in phases)
        assert pair.counts[role].cached == sum(rounds[f"{phase}_num_cached_tokens"] for phase in phases)
    assert chains["num_grade_prompt_tokens"] == rounds["grade_num_prompt_tokens"]
    assert chains["num_cached_prompt_tokens"] == sum(counts.cached for counts in pair.counts.values())

    # The account says the same.
    found = values(account_of(tmp_path), "tokens")
    assert found["generated_tokens"] + grades == sum(counts.generated for counts in pair.counts.values())
    assert found["prompt_tokens"] == sum(counts.prompt for counts in pair.counts.values())
    assert found["uncommitted_tokens"] == found["redone_tokens"] == found["redone_after_kill_tokens"] == 0


@pytest.mark.parametrize("name", ["specreason", "waves", "base_only"])
def test_the_seconds_of_a_run_are_all_accounted_for(pair: CountedPair, tmp_path: Path, name: str) -> None:
    """Clocked here around the run; the account's parts come from the rounds and from the attempt's own record."""
    plan = plan_for(tmp_path, "limit=200", *RUNS[name])
    began = time.monotonic()
    run_plan(plan, pair.engines, Progress(Console(quiet=True), 60), StopSignal())
    measured = time.monotonic() - began
    section = account_of(tmp_path).section("wall_clock")
    parts = dict(section.table("parts").frame.select("part", "seconds").rows())
    assert sum(parts.values()) == pytest.approx(measured, rel=0.02)
    assert all(seconds >= 0 for seconds in parts.values())
    rounds = sums(RunFiles(tmp_path, name).rounds)
    if name == "specreason":
        busy = rounds["draft_busy_seconds"] + rounds["base_busy_seconds"]
        assert parts["draft"] + parts["grade"] + parts["rewrite"] == pytest.approx(busy, rel=0.02)
        assert parts["draft"] == pytest.approx(rounds["draft_busy_seconds"], rel=0.05)
    else:
        free = [parts[name] for name in ("draft_alone", "base_alone", "both", "neither")]
        assert sum(free) == pytest.approx(rounds["seconds"])
    assert section.figure("elapsed_seconds").value == pytest.approx(rounds["seconds"], rel=0.02)


@dataclass(slots=True)
class LookedAt(StopSignal):
    """A stop signal that comes at the nth look."""

    after: int = 0
    looks: int = 0

    def check(self) -> None:
        self.looks += 1
        if self.looks > self.after:
            self.number = signal.SIGTERM
        StopSignal.check(self)


@pytest.mark.parametrize("name", ["specreason", "waves", "random"])
def test_a_run_that_was_stopped_twice_and_resumed_still_reconciles(
    pair: CountedPair, tmp_path: Path, name: str
) -> None:
    """What rounds counted is in committed chains or was done twice; what aborted requests had, vLLM alone knows."""
    pair.reset()
    plan = ["limit=40", "schedule.active_size=16", *RUNS[name]]
    quiet = Progress(Console(quiet=True), 60)
    for looks in (60, 75):
        with pytest.raises(Stopped):
            run_plan(plan_for(tmp_path, *plan), pair.engines, quiet, LookedAt(after=looks))
    run(pair.engines, tmp_path, *plan)
    report = account_of(tmp_path)
    found = values(report, "tokens", "chains")
    assert report.is_finished and found["num_chains"] == 40
    assert found["redone_tokens"] > 0 and found["redone_after_kill_tokens"] == 0
    assert found["uncommitted_tokens"] == 0
    assert found["rounds_generated_tokens"] == found["generated_tokens"]
    rounds = sums(RunFiles(tmp_path, name).rounds)
    graded = rounds["grade_num_generated_tokens"]
    assert sum(counts.generated for counts in pair.counts.values()) >= found["generated_tokens"] + graded
    attempts = report.section("wall_clock").table("attempts").frame
    assert attempts["state"].to_list() == ["stopped", "stopped", "finished"]
    assert attempts["num_generated_tokens"].sum() == found["generated_tokens"]
