"""Real runs of the toy pair: chains, steps, rounds, the account and vLLM's own counters say one and the same."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
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
from specreason_batch.store.attempts import AttemptState, read_attempts
from specreason_batch.types import Completion, Phase, Role
from specreason_batch.vllm_engine import VllmEngine
from tests.conftest import toy_engine_config
from tests.test_toy import plan_for, run

pytestmark = pytest.mark.vllm
Poll = Callable[[float], list[Completion]]
RUNS = {
    "specreason": ["policy=specreason", "schedule=lockstep"],
    "waves": ["policy=specreason", "schedule=waves"],
    "samples": ["policy=specreason", "schedule=overlapped", "samples_per_prompt=3"],
    "base_only": ["policy=base_only"],
    "base_direct": ["policy=base_direct"],
    "draft_only": ["policy=draft_only"],
    "random": ["policy=random", "policy.accept_rate=0.7"],
}
LOCKSTEP_PARTS = ("draft", "grade", "rewrite", "between")
FREE_PARTS = ("draft_alone", "base_alone", "both", "neither")
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
    run(pair.engines, tmp_path, "limit=24", *RUNS[name])
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
    plan = plan_for(tmp_path, "limit=100", *RUNS[name])
    began = time.monotonic()
    run_plan(plan, pair.engines, Progress(Console(quiet=True), 60), StopSignal())
    measured = time.monotonic() - began
    section = account_of(tmp_path).section("wall_clock")
    parts = dict(section.table("parts").frame.select("part", "seconds").rows())
    assert 0.98 * measured <= sum(parts.values()) <= measured
    assert all(seconds >= 0 for seconds in parts.values())
    rounds = sums(RunFiles(tmp_path, name).rounds)
    clocked = LOCKSTEP_PARTS if name == "specreason" else FREE_PARTS
    assert sum(parts[part] for part in clocked) == pytest.approx(rounds["seconds"])
    if name == "specreason":  # a phase is its requests' time and our own before and after them
        assert parts["draft"] >= rounds["draft_busy_seconds"]
        assert parts["grade"] + parts["rewrite"] >= rounds["base_busy_seconds"]
        assert parts["between"] <= rounds["idle_seconds"]
    elapsed = section.figure("elapsed_seconds").value
    assert elapsed == pytest.approx(rounds["seconds"], abs=rounds["idle_seconds"] + 0.01)  # before a round begins


@dataclass(slots=True)
class AfterDrafts(StopSignal):
    """A stop signal that comes with the nth draft: before it is graded, so that it is lost."""

    num_left: int = 0

    def watch(self, poll: Poll) -> Poll:
        def watched(timeout: float) -> list[Completion]:
            completions = poll(timeout)
            self.num_left -= len(completions)
            self.number = signal.SIGTERM if self.num_left <= 0 else None
            return completions

        return watched


@pytest.mark.parametrize("name", ["specreason", "waves", "random"])
def test_a_run_that_was_stopped_twice_and_resumed_still_reconciles(
    pair: CountedPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What rounds counted is in committed chains or was done twice; what aborted requests had, vLLM alone knows."""
    pair.reset()
    plan, draft = ["limit=24", "schedule.active_size=8", *RUNS[name]], pair.engines[Role.draft]
    for num_drafts in (28, 20):
        stop = AfterDrafts(num_left=num_drafts)
        with monkeypatch.context() as patched, pytest.raises(Stopped):
            patched.setattr(draft, "poll", stop.watch(draft.poll))
            run_plan(plan_for(tmp_path, *plan), pair.engines, Progress(Console(quiet=True), 60), stop)
    run(pair.engines, tmp_path, *plan)
    report = account_of(tmp_path)
    found = values(report, "tokens", "chains")
    assert report.is_finished and found["num_chains"] == 24
    assert found["redone_tokens"] > 0 or name == "random"  # which keeps a draft without waiting for a grade
    assert found["redone_after_kill_tokens"] == 0
    assert found["uncommitted_tokens"] == 0
    assert found["rounds_generated_tokens"] == found["generated_tokens"]
    rounds = sums(RunFiles(tmp_path, name).rounds)
    graded = rounds["grade_num_generated_tokens"]
    assert sum(counts.generated for counts in pair.counts.values()) >= found["generated_tokens"] + graded
    attempts = report.section("wall_clock").table("attempts").frame
    assert attempts["state"].to_list() == ["stopped", "stopped", "finished"]
    assert attempts["num_generated_tokens"].sum() == found["generated_tokens"]
    parts = report.section("wall_clock").table("parts").frame["part"].to_list()
    assert parts == ["startup", *(FREE_PARTS if name == "waves" else LOCKSTEP_PARTS), "rest"]  # of rounds cut short too


@dataclass(slots=True)
class Snapshot(StopSignal):
    """Copies a run's folder as soon as a kill -9 would cost work, which is what it would leave behind; then stops."""

    root: Path = Path()  # of the run's only shard
    copy: Path = Path()  # of the run

    def check(self) -> None:
        if self.number is None and self.would_lose:
            shutil.copytree(self.root.parent, self.copy, ignore=shutil.ignore_patterns(".attempt-*"))
            self.number = signal.SIGTERM
        StopSignal.check(self)

    @property
    def would_lose(self) -> bool:
        """Of an attempt that saves no checkpoint before its end."""
        newest = read_attempts(self.root)[-1]
        return newest.state is AttemptState.running and newest.progress.num_generated_tokens > 0


def test_what_a_kill_lost_is_counted_once_and_the_rest_reconciles(
    pair: CountedPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, gone on with, killed without a newer checkpoint, and gone on with in what that left behind."""
    plan, draft = ["limit=24", "schedule.active_size=8", *RUNS["specreason"]], pair.engines[Role.draft]
    plan += ["lease.beat_seconds=0.05", "lease.stale_seconds=1", "checkpoint.seconds=3600"]
    stop, kill = AfterDrafts(num_left=20), Snapshot(root=tmp_path / "run" / "heldout", copy=tmp_path / "killed")
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(draft, "poll", stop.watch(draft.poll))
        run_plan(plan_for(tmp_path / "run", *plan), pair.engines, Progress(Console(quiet=True), 60), stop)
    with pytest.raises(Stopped):
        run_plan(plan_for(tmp_path / "run", *plan), pair.engines, Progress(Console(quiet=True), 60), kill)
    run(pair.engines, kill.copy, *plan)
    report = account_of(kill.copy)
    found = values(report, "tokens")
    attempts = report.section("wall_clock").table("attempts").frame
    assert attempts["state"].to_list() == ["stopped", "running", "finished"]
    assert found["redone_after_kill_tokens"] == attempts["num_generated_tokens"][1] > 0
    assert found["generated_tokens"] == attempts["num_generated_tokens"].sum()
    assert found["rounds_generated_tokens"] == found["generated_tokens"] - found["redone_after_kill_tokens"]
    assert found["uncommitted_tokens"] == 0
