"""Engines die, hang and run out of memory; the chains go on from their steps, and the culprit alone is set aside."""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from specreason_batch.clock import WallClock
from specreason_batch.config import GenerateConfig, PartsConfig, RecoveryConfig, ScheduleConfig
from specreason_batch.engine import BadNode, DeathCause, Engine, EngineAborted, EngineDead
from specreason_batch.engines import Engines
from specreason_batch.plan import Plan, make_plan
from specreason_batch.progress import Progress
from specreason_batch.run import run_shards
from specreason_batch.schedules import SCHEDULES, Stopped
from specreason_batch.scripted_engine import ScriptedEngine
from specreason_batch.signals import StopSignal
from specreason_batch.store.attempts import AttemptState, read_attempts
from specreason_batch.store.checkpoints import read_checkpoint
from specreason_batch.store.reading import scan
from specreason_batch.types import Completion, Request, Role
from tests.support.configs import make_config, write_prompts
from tests.support.worlds import PROMPTS
from tests.test_run import MODELS, rejects, rows, run

EVERY_SCHEDULE = pytest.mark.parametrize("schedule", sorted(SCHEDULES))
Fault = Callable[[Role, Request, int], None]  # role, request, how many engines of the role were built; raises


class Mortal(ScriptedEngine):
    """An engine that may die of a request, and then stays dead until it is closed."""

    def __init__(self, role: Role, life: int, fault: Fault, clock: WallClock, log: list[str]):
        super().__init__(self._answering, 400, order_seed=life, clock=clock)
        self._role, self._life, self._fault, self._log = role, life, fault, log
        self._model = MODELS.model(role)
        self._death: EngineDead | None = None

    def poll(self, timeout: float) -> list[Completion]:
        if self._death:
            raise self._death
        try:
            return super().poll(timeout)
        except EngineDead as death:
            self._death = death
            raise

    def close(self) -> None:
        self._log.append(f"{self._role} closed")
        super().close()

    def _answering(self, request: Request) -> Completion:
        self._fault(self._role, request, self._life)
        return self._model(request)


class Workshop:
    """Builds mortal engines, and keeps count."""

    def __init__(self, fault: Fault, together: bool = False):
        self.built: Counter[Role] = Counter()
        self.log: list[str] = []
        self.clock = WallClock()
        self._fault = fault
        self._together = together

    def build(self, role: Role) -> Engine:
        self.built[role] += 1
        return Mortal(role, self.built[role], self._fault, self.clock, self.log)

    @contextmanager
    def engines(self) -> Iterator[Engines]:
        made = Engines((Role.base, Role.draft), self.build, self._together)
        try:
            made.start()
            yield made
        finally:
            made.close()


def run_with(config: GenerateConfig, shop: Workshop, stop: StopSignal | None = None) -> str:
    """The whole job with engines that die; what it said."""
    said = io.StringIO()
    progress = Progress(Console(file=said, width=200), 1e9)
    plan = make_plan(config)
    progress.follow(plan)
    run_shards(plan, shop.engines, progress, stop or StopSignal())
    return said.getvalue()


def whole(place: Path, **changes: Any) -> dict[str, list[Any]]:
    """An uninterrupted run's rows."""
    config = make_config(place, output_dir=str(place / "whole"), **changes)
    run(config)
    return rows(config)


def once_every(count: int, cause: DeathCause = DeathCause.died) -> Fault:
    """Every so many requests of all engines, one of them dies."""
    seen = Counter[str]()

    def fault(role: Role, request: Request, life: int) -> None:
        seen["requests"] += 1
        if seen["requests"] % count == 0 and not request.request_id.startswith("probe"):
            raise EngineDead("it was killed", cause=cause)

    return fault


def opening(plan: Plan, role: Role, row: int) -> list[int]:
    return plan.formats[role].opening(f"{PROMPTS[row % len(PROMPTS)]} {row}")


def poison(plan: Plan, *victims: int, role: Role = Role.base) -> Fault:
    """Requests of these prompts kill this role's engine, every time."""
    openings = [opening(plan, role, row) for row in victims]

    def fault(at: Role, request: Request, life: int) -> None:
        prompt = request.prompt_token_ids
        if at is role and any(prompt[: len(ids)] == ids for ids in openings) and "probe" not in request.request_id:
            raise EngineDead("poisoned")

    return fault


# --- deaths that are nobody's fault ---


@EVERY_SCHEDULE
@pytest.mark.parametrize("together", [False, True])
def test_after_deaths_chains_go_on_from_their_steps_and_rows_are_the_same(
    place: Path, schedule: str, together: bool
) -> None:
    changes: dict[str, Any] = {"schedule": ScheduleConfig(name=schedule, active_size=5), "samples_per_prompt": 2}
    wanted = whole(place, **changes)
    config = make_config(place, **changes)
    shop = Workshop(once_every(45), together)
    said = run_with(config, shop)
    assert rows(config) == wanted
    assert sum(shop.built.values()) > 4 and "building it again" in said
    if together:
        assert shop.built[Role.base] == shop.built[Role.draft]
    assert rejects(config) == []
    (attempt,) = read_attempts(Path(config.output_dir) / "prompts")
    assert attempt.state is AttemptState.finished
    deaths = (sum(shop.built.values()) - 2) // (2 if together else 1)
    assert attempt.progress.num_rebuilds == deaths


def test_only_the_engine_that_died_is_built_again(place: Path) -> None:
    def fault(role: Role, request: Request, life: int) -> None:
        if role is Role.draft and life == 1 and request.request_id == "9":
            raise EngineDead("dead")

    shop = Workshop(fault)
    run_with(make_config(place), shop)
    assert shop.built == {Role.draft: 2, Role.base: 1}
    assert shop.log[0] == "draft closed" and len(shop.log) == 3


def test_requests_that_an_engine_cuts_short_count_as_its_death(place: Path) -> None:
    def fault(role: Role, request: Request, life: int) -> None:
        if role is Role.base and life == 1 and request.request_id == "20":
            raise EngineAborted("cut")

    config = make_config(place)
    shop = Workshop(fault)
    wanted = whole(place)
    run_with(config, shop)
    assert shop.built[Role.base] == 2 and rows(config) == wanted


def test_redone_tokens_are_counted_apart_and_nothing_else_of_a_row_differs(place: Path) -> None:
    config = make_config(place, schedule=ScheduleConfig(name="continuous", active_size=8))
    run_with(config, Workshop(once_every(60)))
    made = scan(Path(config.output_dir), "chains")
    rounds = scan(Path(config.output_dir), "rounds")
    assert made is not None and rounds is not None
    chains, total = made.collect(), rounds.collect()
    kept = chains.select("num_draft_tokens_kept", "num_draft_tokens_rejected", "num_base_tokens", "num_answer_tokens")
    written = sum(kept.sum().row(0))
    generated = sum(total[f"{phase}_num_generated_tokens"].sum() for phase in ("draft", "rewrite", "answer"))
    assert chains["num_redone_tokens"].sum() > 0
    assert generated == written + chains["num_redone_tokens"].sum(), "to the token"


# --- culprits ---


@EVERY_SCHEDULE
@pytest.mark.parametrize("role", list(Role))
def test_one_poisoned_prompt_among_64_is_found_and_set_aside_and_the_others_finish(
    place: Path, schedule: str, role: Role
) -> None:
    write_prompts(place / "prompts.parquet", 64)
    changes: dict[str, Any] = {"schedule": ScheduleConfig(name=schedule, active_size=64)}
    wanted = whole(place, **changes)
    config = make_config(place, **changes)
    shop = Workshop(poison(make_plan(config), 41, role=role))
    run_with(config, shop)
    made = rows(config)
    given_up = [row for row in made["chains"] if row["thinking_end"] == "error"]
    assert [row["prompt_id"] for row in given_up] == ["p41"]
    assert [row for row in made["chains"] if row["prompt_id"] != "p41"] == [
        row for row in wanted["chains"] if row["prompt_id"] != "p41"
    ]
    (reject,) = rejects(config)
    assert reject["prompt_id"] == "p41" and "killed the engine" in reject["reason"]
    assert shop.built[role] - 1 <= 2 + 6 + 1, "two deaths among others, then one a halving"
    assert make_plan(config).pending == []


def test_two_poisoned_prompts_are_both_found(place: Path) -> None:
    write_prompts(place / "prompts.parquet", 24)
    config = make_config(place, schedule=ScheduleConfig(name="waves", active_size=16))
    shop = Workshop(poison(make_plan(config), 3, 17))
    run_with(config, shop)
    assert sorted(row["prompt_id"] for row in rejects(config)) == ["p17", "p3"]
    assert len([row for row in rows(config)["chains"] if row["thinking_end"] != "error"]) == 22


def test_the_only_chain_may_be_the_culprit(place: Path) -> None:
    write_prompts(place / "prompts.parquet", 1)
    config = make_config(place)
    run_with(config, Workshop(poison(make_plan(config), 0)))
    (reject,) = rejects(config)
    assert reject["prompt_id"] == "p0"


def test_an_engine_that_dies_of_everything_condemns_nobody(place: Path) -> None:
    """Rejects are for good: they wait until the engines are seen to work for others."""
    config = make_config(place, recovery=RecoveryConfig(max_rebuilds=9))

    def fault(role: Role, request: Request, life: int) -> None:
        if role is Role.base and "probe" not in request.request_id:
            raise EngineDead("broken")

    shop = Workshop(fault)
    with pytest.raises(EngineDead, match="broken"):
        run_with(config, shop)
    assert shop.built[Role.base] == 1 + 9
    assert rows(config)["chains"] == [] and rejects(config) == []
    (attempt,) = read_attempts(Path(config.output_dir) / "prompts")
    assert attempt.state is AttemptState.failed and "broken" in (attempt.error or "")
    wanted = whole(place)
    run(config)
    assert rows(config) == wanted


# --- rebuilding ---


def test_after_the_stated_number_of_rebuilds_the_run_fails_with_everything_saved(place: Path) -> None:
    schedule = ScheduleConfig(name="lockstep", active_size=4)
    config = make_config(place, recovery=RecoveryConfig(max_rebuilds=0), schedule=schedule)
    wanted = whole(place)
    plan = make_plan(config)
    with pytest.raises(EngineDead):
        run_with(config, Workshop(once_every(40)))
    found = read_checkpoint(Path(config.output_dir) / "prompts", plan.fingerprint, plan.pending[0].source, print)
    assert found is not None and any(saved.steps for saved in found.chains.values())
    run(config)
    assert rows(config) == wanted


def test_an_engine_that_cannot_start_again_ends_the_run(place: Path) -> None:
    config = make_config(place)
    shop = Workshop(once_every(40))
    whole_build = shop.build

    def build(role: Role) -> Engine:
        if shop.built[role]:
            shop.built[role] += 1
            raise EngineDead("no room", cause=DeathCause.starting)
        return whole_build(role)

    shop.build = build  # type: ignore[method-assign]
    with pytest.raises(EngineDead, match="no room"):
        run_with(config, shop)
    assert max(shop.built.values()) == 3, "tried twice"


def test_out_of_memory_lowers_the_active_size(place: Path) -> None:
    config = make_config(place, schedule=ScheduleConfig(name="continuous", active_size=8), samples_per_prompt=2)

    def fault(role: Role, request: Request, life: int) -> None:
        if role is Role.base and life == 1 and request.request_id == "30":
            raise EngineDead("CUDA out of memory", cause=DeathCause.out_of_memory)

    wanted = whole(place, samples_per_prompt=2)
    said = run_with(config, Workshop(fault))
    assert "out of memory: active_size is 4 from here on" in said
    rounds = scan(Path(config.output_dir), "rounds")
    assert rounds is not None
    active = rounds.sort("round").collect()["num_active"].to_list()
    assert max(active[:1]) > 4 and max(active[1:]) <= 4
    assert rows(config) == wanted


def test_trouble_that_a_restart_will_not_cure_is_the_nodes(place: Path) -> None:
    config = make_config(place)
    shop = Workshop(once_every(40))
    whole_build = shop.build

    def build(role: Role) -> Engine:
        if shop.built[role]:
            raise BadNode("GPU 0 is held by an orphan")
        return whole_build(role)

    shop.build = build  # type: ignore[method-assign]
    with pytest.raises(BadNode):
        run_with(config, shop)
    (attempt,) = read_attempts(Path(config.output_dir) / "prompts")
    assert attempt.state is AttemptState.bad_node
    wanted = whole(place)
    run(config)
    assert rows(config) == wanted


def test_a_signal_that_kills_the_engine_first_is_a_stop(place: Path) -> None:
    stop = StopSignal()

    def fault(role: Role, request: Request, life: int) -> None:
        if request.request_id == "25":
            stop.number = 15
            raise EngineDead("the signal reached it")

    config = make_config(place)
    with pytest.raises(Stopped):
        run_with(config, Workshop(fault), stop)
    (attempt,) = read_attempts(Path(config.output_dir) / "prompts")
    assert attempt.state is AttemptState.stopped


def test_parts_and_checkpoints_follow_every_death(place: Path) -> None:
    config = make_config(place, parts=PartsConfig(chains=2))
    wanted = whole(place)
    run_with(replace(config), Workshop(once_every(25)))
    assert rows(config) == wanted
