"""What a person reads while a run goes on: exact lines of hand-made reports."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from specreason_batch.config import PolicyConfig, ScheduleConfig
from specreason_batch.engine import EngineInfo
from specreason_batch.plan import Plan, make_plan
from specreason_batch.probe import CacheProbe
from specreason_batch.progress import Progress
from specreason_batch.rounds import PhaseStats, RoundReport, RoundStats
from specreason_batch.types import Phase, Role
from tests.support.configs import make_config, write_models
from tests.support.running import Run
from tests.support.worlds import World


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and 40 prompts."""
    folder = tmp_path_factory.mktemp("place")
    write_models(folder / "models")
    ids = [f"p{index}" for index in range(40)]
    pq.write_table(pa.table({"prompt_id": ids, "prompt": ids}), folder / "prompts.parquet")
    return folder


class Reader:
    """A progress whose batch log can be read."""

    def __init__(self, plan: Plan | None = None, seconds: float = 1e9):
        self._file = io.StringIO()
        self.progress = Progress(Console(file=self._file), seconds)
        if plan is not None:
            self.progress.follow(plan)

    def see(self, **changes: Any) -> str:
        """Report one round; the line after it."""
        self.progress.round(report(**changes))
        return self.progress.line()

    @property
    def log(self) -> list[str]:
        return self._file.getvalue().splitlines()


def report(num_finished: int = 0, **changes: Any) -> RoundReport:
    """A round of 10 s with 4 active chains."""
    values: dict[str, Any] = {
        "num_active": 4,
        "seconds": 10.0,
        "busy_seconds": {Role.draft: 4.0, Role.base: 9.75},
        "idle_seconds": 0.25,
        "kv_load": {Role.draft: 100, Role.base: 600},
        "kv_capacity": {Role.draft: 1000, Role.base: 1000},
    }
    chains = Run(World(prompts=("x",) * num_finished))._open()
    return RoundReport(RoundStats(1, 0.0, num_finished=num_finished, **(values | changes)), list(chains))


def phases(**changes: PhaseStats) -> dict[Phase, PhaseStats]:
    return {phase: changes.get(phase, PhaseStats()) for phase in Phase}


def plan_of(place: Path, **changes: Any) -> Plan:
    output = place / f"output{len(list(place.iterdir()))}"
    output.mkdir()
    return make_plan(make_config(place, output_dir=str(output), **changes))


# --- the line ---


def test_the_line_of_a_calm_run(place: Path) -> None:
    reader = Reader(plan_of(place))
    assert reader.progress.line() == "0/40 chains · 0 active · 0 tokens/s · ETA ?"
    tokens = phases(
        draft=PhaseStats(num_generated_tokens=700),
        grade=PhaseStats(num_generated_tokens=50),
        rewrite=PhaseStats(num_generated_tokens=200),
        answer=PhaseStats(num_generated_tokens=100),
    )
    line = reader.see(num_finished=4, num_accepted=3, num_rejected=1, phases=tokens)
    assert line == "4/40 chains · 4 active · 75% accepted · 100 tokens/s · draft 40% base 98% busy · ETA 0:01:30", (
        "tokens of grades are not thinking"
    )


def test_shares_and_rates_are_those_of_the_last_half_minute() -> None:
    reader = Reader()
    tokens = phases(draft=PhaseStats(num_generated_tokens=1000))
    assert "100 tokens/s" in reader.see(phases=tokens)
    quiet: dict[str, Any] = {"busy_seconds": {Role.draft: 1.0, Role.base: 9.0}, "idle_seconds": 0.0}
    assert "50 tokens/s · draft 25% base 94% busy" in reader.see(**quiet)
    assert "33 tokens/s · draft 20% base 92% busy" in reader.see(**quiet)
    assert "0 tokens/s · draft 10% base 90% busy" in reader.see(**quiet)


def test_a_round_longer_than_the_window_stands_alone() -> None:
    reader = Reader()
    reader.see(num_finished=2)
    line = reader.see(seconds=40.0, busy_seconds={Role.draft: 10.0, Role.base: 30.0}, idle_seconds=0.0)
    assert line == "2/0 chains · 4 active · 0 tokens/s · draft 25% base 75% busy · ETA ?"


def test_time_in_which_neither_engine_has_a_request_shows_where_it_is_much() -> None:
    busy = {Role.draft: 4.0, Role.base: 5.0}
    assert "draft 40% base 50% busy, neither 12% ·" in Reader().see(busy_seconds=busy, idle_seconds=1.2)
    assert "draft 40% base 50% busy ·" in Reader().see(busy_seconds=busy, idle_seconds=0.4)


def test_a_policy_with_one_model_shows_one_engine() -> None:
    alone = {"kv_load": {Role.base: 1}, "kv_capacity": {Role.base: 1000}}
    line = Reader().see(busy_seconds={Role.base: 9.0}, idle_seconds=1.0, **alone)
    assert line == "0/0 chains · 4 active · 0 tokens/s · base 90% busy · ETA ?"


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"kv_load": {Role.draft: 100, Role.base: 890}}, "· 4 active ·"),
        ({"kv_load": {Role.draft: 100, Role.base: 900}}, "· 4 active, base KV 90% ·"),
        ({"kv_load": {Role.draft: 970, Role.base: 950}}, "· 4 active, draft KV 97% ·"),
        ({"kv_load": {Role.draft: 100, Role.base: 950}, "num_parked": 3, "num_waiting": 2}, "· 4 active, 2 parked ·"),
    ],
)
def test_memory_shows_only_where_it_is_short(changes: dict[str, Any], shown: str) -> None:
    assert shown in Reader().see(**changes)


def test_the_line_of_a_big_run_in_trouble_fits_a_log(place: Path) -> None:
    reader = Reader(plan_of(place), seconds=0.0)
    assert reader.progress._plan is not None
    reader.progress._done, reader.progress._given_up = 99_000, 12
    given: dict[str, Any] = {"num_active": 187, "num_waiting": 69, "num_accepted": 740, "num_rejected": 260}
    tokens = phases(draft=PhaseStats(num_generated_tokens=123_450))
    line = reader.see(phases=tokens, busy_seconds={Role.draft: 4.1, Role.base: 10.0}, idle_seconds=0.0, **given)
    assert line == (
        "99000/40 chains · 187 active, 69 parked · 74% accepted · 12345 tokens/s · draft 41% base 100% busy · "
        "ETA ? · 12 given up"
    )
    assert len(reader.log[-1].replace("99000/40", "99000/100000").replace("ETA ?", "ETA 12:34:56")) <= 140
    assert reader.log[-1][8:] == f" {line}", "the time before it"


# --- what is said once ---

CROWDED: dict[str, Any] = {
    "num_active": 2,
    "num_waiting": 1,
    "num_parked": 1,
    "kv_load": {Role.draft: 6000, Role.base: 5800},
    "kv_capacity": {Role.draft: 9000, Role.base: 6144},
}


def test_waiting_chains_are_explained_once_by_the_first_round_that_began_with_some(place: Path) -> None:
    reader = Reader(plan_of(place, schedule=ScheduleConfig(name="waves", active_size=256)))
    reader.see()
    reader.see(**(CROWDED | {"num_active": 7}))  # how many there were when it began says nothing of the memory
    assert reader.log == []
    for _ in range(3):
        reader.see(**CROWDED)
    assert reader.log == [
        "KV memory of the base engine (6,144 tokens) holds 2 of the 256 active chains asked for; "
        "the others wait, nothing is lost. More room: base.kv_cache_gib or base.gpu_memory_utilization"
    ]


@pytest.mark.parametrize(
    ("num_active", "load", "is_short"),
    [(24, 800, True), (24, 790, False), (30, 900, False)],
    ids=["memory is full", "there is room", "as many as asked for"],
)
def test_chains_that_are_never_let_in_are_explained_too(
    place: Path, num_active: int, load: int, is_short: bool
) -> None:
    plan = plan_of(place, schedule=ScheduleConfig(name="lockstep", active_size=30))
    reader = Reader(plan)
    reader.progress.shard(plan.pending[0])
    for _ in range(2):
        reader.see(num_active=num_active, kv_load={Role.draft: 0, Role.base: load})
    assert [line.split(";")[0] for line in reader.log[1:]] == [
        "KV memory of the base engine (1,000 tokens) holds 24 of the 30 active chains asked for"
    ] * is_short


def test_the_last_chains_of_a_shard_are_not_taken_for_a_full_memory(place: Path) -> None:
    plan = plan_of(place, schedule=ScheduleConfig(name="lockstep", active_size=30))
    reader = Reader(plan)
    reader.progress.shard(plan.pending[0])
    reader.see(num_active=30, num_finished=16, kv_load={Role.draft: 0, Role.base: 850})
    reader.see(num_active=24, kv_load={Role.draft: 0, Role.base: 850})
    assert len(reader.log) == 1


def recomputing(num_tokens: int) -> dict[str, Any]:
    """A round that recomputed so many of a thousand prompt tokens."""
    grades = PhaseStats(num_prompt_tokens=900, num_recomputed_tokens=num_tokens)
    return {"phases": phases(draft=PhaseStats(num_prompt_tokens=100), grade=grades)}


def test_recomputing_is_explained_once_it_is_more_than_a_twentieth() -> None:
    reader = Reader()
    for _ in range(4):
        reader.see(**recomputing(50))
    assert reader.log == []
    reader.see(**recomputing(140))
    assert reader.log == [
        "8% of the prompt tokens of the last 30 s had been computed before and had fallen out of the KV cache. "
        "A smaller schedule.active_size or more KV memory saves that work"
    ]
    reader.see(**recomputing(500))
    assert len(reader.log) == 1


def test_recomputing_waits_for_half_a_window() -> None:
    reader = Reader()
    reader.see(**recomputing(500))
    assert reader.log == []
    reader.see(**recomputing(500))
    assert len(reader.log) == 1


def test_recomputing_is_not_explained_by_memory_where_the_cache_never_hits() -> None:
    reader = Reader()
    info = EngineInfo(model="m", max_model_len=400, vocab_size=300, kv_capacity_tokens=1000, block_size=16, version="v")
    reader.progress.engine_ready(Role.base, info, CacheProbe(num_prompt_tokens=100, num_cached_tokens=0))
    before = len(reader.log)
    for _ in range(3):
        reader.see(**recomputing(500))
    assert len(reader.log) == before == 2


def test_the_next_run_is_explained_anew(place: Path) -> None:
    plan = plan_of(place)
    reader = Reader(plan)
    for _ in range(2):
        reader.see(**CROWDED)
    reader.progress.follow(plan)
    for _ in range(2):
        reader.see(**CROWDED)
    assert len(reader.log) == 2


# --- before the run ---


@pytest.mark.parametrize(
    ("policy", "schedule", "shown"),
    [
        ("specreason", ScheduleConfig(name="lockstep", active_size=3), "schedule lockstep (active_size=3)"),
        ("specreason", ScheduleConfig(name="waves", wave=0.25), "schedule waves (active_size=64, wave=0.25)"),
        (
            "specreason",
            ScheduleConfig(name="overlapped", cohorts=2, fit_memory=False),
            "schedule overlapped (active_size=64, fit_memory=false, cohorts=2)",
        ),
        (
            "base_only",
            ScheduleConfig(name="waves", wave=0.25),
            "schedule continuous (active_size=64; base_only knows no other)",
        ),
    ],
)
def test_the_introduction_says_which_schedule_runs_with_what(
    place: Path, policy: str, schedule: ScheduleConfig, shown: str
) -> None:
    plan = plan_of(place, policy=PolicyConfig(name=policy), schedule=schedule)
    reader = Reader()
    reader.progress.introduce(plan)
    assert reader.log[0] == f"test: policy {policy}, {shown}, output {plan.config.output_dir}"
