"""Schedules decide when requests run, nothing else: each gives the plain loop's rows (docs/design.md, 3 and 5)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specreason_batch.chain import Chain
from specreason_batch.engine import EngineAborted
from specreason_batch.policies import POLICIES, Rules
from specreason_batch.rounds import RoundReport, RoundStats
from specreason_batch.schedules import SCHEDULES, Admission, Capacity, Driver, Stopped
from specreason_batch.simulated_engine import CostProfile, SimulatedEngine, VirtualClock
from specreason_batch.simulation import Workload, repeat_token
from specreason_batch.types import (
    AnswerEnd,
    Completion,
    Coroutine,
    FinishReason,
    GradeOf,
    Phase,
    Request,
    Role,
    ThinkingEnd,
    Write,
    WriteAnswer,
)
from tests.support.plain_loop import plain_rows
from tests.support.running import Run, Script, run_world
from tests.support.worlds import PROMPTS, World, worlds

EVERY_SCHEDULE = pytest.mark.parametrize("schedule", sorted(SCHEDULES))
BUSY = World(prompts=PROMPTS, num_samples=2, windows=(4096, 4096), threshold=3.0, seed=11)


@EVERY_SCHEDULE
@pytest.mark.parametrize("active_size", [1, 3, 64])
@settings(max_examples=25, deadline=None)
@given(world=worlds(), order_seed=st.integers(0, 1000))
def test_rows_are_the_plain_loops_whatever_the_schedule_the_active_size_and_the_order_of_completions(
    schedule: str, active_size: int, world: World, order_seed: int
) -> None:
    run = run_world(world, schedule=schedule, active_size=active_size, order_seed=order_seed)
    assert run.rows() == plain_rows(world)


def test_the_worlds_of_these_tests_reach_every_end() -> None:
    """Guards the property above: a world generator that never gets somewhere proves nothing about it."""
    ends: Counter[str] = Counter()
    steps: Counter[tuple[str, Any]] = Counter()
    for seed in range(30):
        for changes in ({}, {"windows": (130, 125)}, {"stuck_rate": 0.9}, {"blank_line": False, "policy": "random"}):
            for chain, rows in plain_rows(replace(World(seed=seed), **changes)).values():
                ends.update([chain["thinking_end"], chain["answer_end"]])
                steps.update((name, row[name]) for row in rows for name in ("ended_by", "accepted"))
                steps.update(("unreadable", True) for row in rows if row["digit_mass"] is not None and not row["score"])
    assert set(ends) == {"closed", "budget", "context", "repetition", "stop", "length"}
    wanted = {"blank_line", "think_close", "end_of_text", "max_tokens", "special"}
    assert {value for name, value in steps if name == "ended_by"} == wanted
    assert steps["accepted", True] and steps["accepted", False] and steps["unreadable", True]


# --- seeds ---


@EVERY_SCHEDULE
@settings(max_examples=30, deadline=None)
@given(world=worlds())
def test_no_two_requests_of_a_run_share_a_seed(schedule: str, world: World) -> None:
    world = replace(world, seeded=True, temperature=0.6)
    run = run_world(world, schedule=schedule)
    sampled = [request for engine in run.engines.values() for request in engine.requests if not _is_grade(request)]
    seeds = [request.seed for request in sampled]
    assert None not in seeds
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 63 for seed in seeds if seed is not None)


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"seeded": False}])
def test_greedy_and_unseeded_requests_carry_no_seed(changes: dict[str, Any]) -> None:
    run = run_world(replace(BUSY, **changes))
    assert {request.seed for engine in run.engines.values() for request in engine.requests} == {None}


def test_a_request_id_is_never_used_twice() -> None:
    run = run_world(BUSY, schedule="continuous")
    ids = [request.request_id for engine in run.engines.values() for request in engine.requests]
    assert len(set(ids)) == len(ids)


# --- what runs when ---


@settings(max_examples=30, deadline=None)
@given(world=worlds(policies=("specreason", "random")), active_size=st.sampled_from([1, 3, 64]))
def test_lockstep_makes_one_batch_of_all_drafts_one_of_all_grades_one_of_all_rewrites(
    world: World, active_size: int
) -> None:
    run = Run(replace(world, answer_role=Role.base), active_size=active_size)
    sizes: list[dict[Role, list[list[Request]]]] = []
    for _ in run.walk():
        sizes.append({role: engine.submitted for role, engine in run.engines.items()})
        for engine in run.engines.values():
            engine.submitted = []
    for report, batches in zip(run.reports, sizes, strict=True):
        steps = [step for chain in run.finished for step in chain.steps if step.round == report.stats.round]
        drafted = sum(step.rejected is not None or step.written.author is Role.draft for step in steps)
        graded = sum(step.grade is not None for step in steps)
        written = sum(step.written.author is Role.base for step in steps)
        assert [len(batch) for batch in batches[Role.draft]] == _nonzero(drafted)
        assert [len(batch) for batch in batches[Role.base]] == _nonzero(graded, written + len(report.finished))
        assert not graded or all(_is_grade(request) for request in batches[Role.base][0])


@settings(max_examples=30, deadline=None)
@given(world=worlds(), active_size=st.sampled_from([1, 2, 5, 64]))
def test_lockstep_fills_the_slots_of_finished_chains_in_the_next_round(world: World, active_size: int) -> None:
    run = Run(world, active_size=active_size)
    left = len(world.keys)
    for report in run.walk():
        assert report.stats.num_active == min(active_size, left)
        assert report.stats.num_finished == len(report.finished)
        left -= len(report.finished)
    assert left == 0


@EVERY_SCHEDULE
@pytest.mark.parametrize("active_size", [1, 3, 7])
def test_never_more_than_active_size_chains_are_outstanding(schedule: str, active_size: int) -> None:
    """A policy that asks for one thing at a time has as many requests outstanding as it has chains."""
    run = Run(BUSY, schedule=schedule, active_size=active_size)
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, sum(engine.num_outstanding for engine in run.engines.values()))

    run.check_stop = look
    run.to_end()
    assert most == active_size


def test_continuous_refills_a_slot_at_once() -> None:
    """base_only has exactly one request outstanding for every active chain, at every poll."""
    world = replace(BUSY, policy="base_only", num_samples=4)
    run = Run(world, schedule="continuous", active_size=5)
    answered: list[int] = []
    engine = run.engines[Role.base]

    def look() -> None:
        done = sum(_is_answer(world, Role.base, request) for request in engine.requests) - sum(
            _is_answer(world, Role.base, request) for request in engine._waiting.values()
        )
        answered.append(done)
        assert engine.num_outstanding == min(5, len(world.keys) - done)

    run.check_stop = look
    run.to_end()
    assert answered[-1] < len(world.keys) == len(run.finished)


@EVERY_SCHEDULE
def test_chains_are_opened_only_when_a_slot_is_free(schedule: str) -> None:
    """Prompts are read as they are needed: a shard of any length costs no memory."""
    run = Run(BUSY, schedule=schedule, active_size=2)
    for _ in run.walk():
        assert len(run.chains) <= len(run.finished) + 2


@EVERY_SCHEDULE
@pytest.mark.parametrize("active_size", [1, 5, 64])
def test_a_walk_that_rests_is_offered_once(schedule: str, active_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it waited at a gate or has just moved on; a gate that counts it twice opens early."""
    refill = Driver.refill

    def watched(driver: Driver, at_rest: list[Any]) -> list[Any]:
        assert len(set(map(id, at_rest))) == len(at_rest)
        return refill(driver, at_rest)

    monkeypatch.setattr(Driver, "refill", watched)
    run_world(BUSY, schedule=schedule, active_size=active_size)


# --- policies that ask for several things at once ---


def two_drafts(chain: Chain) -> Coroutine:
    """Two drafts of each step, both graded; the better one is kept, or the base writes."""
    while chain.is_thinking:
        drafts = yield Write(Role.draft, candidate=0), Write(Role.draft, candidate=1)
        grades = yield tuple(GradeOf(draft) for draft in drafts)
        score, best = max((grade.score or 0.0, -index) for index, grade in enumerate(grades))
        if score >= 4.0:
            chain.append(drafts[-best], grade=grades[-best], accepted=True)
        else:
            chain.append((yield Write(Role.base)), rejected=drafts[0], grade=grades[0], accepted=False)
    chain.answer = yield WriteAnswer()


def both_write(chain: Chain) -> Coroutine:
    """Draft and base write the same step; the shorter is kept. A tuple of one is a tuple."""
    while chain.is_thinking:
        draft, base = yield Write(Role.draft), Write(Role.base)
        assert (draft.author, base.author) == (Role.draft, Role.base)
        (grade,) = yield (GradeOf(draft),)
        kept = min(draft, base, key=lambda step: step.num_tokens)
        chain.append(kept, grade=grade, accepted=kept is draft)
    chain.answer = yield WriteAnswer()


@pytest.mark.parametrize("policy", [two_drafts, both_write])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 32), order_seed=st.integers(0, 100))
def test_a_policy_of_tuples_gives_the_same_rows_in_every_schedule(policy: Any, seed: int, order_seed: int) -> None:
    world = replace(BUSY, seed=seed, num_samples=1)
    runs = [
        run_world(world, schedule=schedule, active_size=size, order_seed=order_seed, policy=policy)
        for schedule in sorted(SCHEDULES)
        for size in (1, 4, 64)
    ]
    assert len(runs[0].rows()) == len(PROMPTS)
    assert all(run.rows() == runs[0].rows() for run in runs[1:])


def test_candidates_of_one_step_have_seeds_of_their_own() -> None:
    run = run_world(replace(BUSY, num_samples=1), policy=two_drafts)
    drafts = run.engines[Role.draft].requests
    assert len({request.seed for request in drafts}) == len(drafts)
    pairs = Counter(tuple(request.prompt_token_ids) for request in drafts)
    assert set(pairs.values()) == {2}


def test_lockstep_sends_a_tuples_parts_in_the_phases_that_they_belong_to() -> None:
    run = Run(BUSY, policy=both_write, active_size=64)
    next(run.walk())
    num_chains = len(BUSY.keys)
    assert [len(batch) for batch in run.engines[Role.draft].submitted] == [num_chains]
    assert [len(batch) for batch in run.engines[Role.base].submitted] == [num_chains]


# --- what engines may do wrong ---


def refusing(victim: int, what: Phase) -> Any:
    """Refuse every request of one phase whose prompt starts with this chain's opening."""

    def wrap(role: Role, script: Script) -> Script:
        def answer(request: Request) -> Completion:
            opening = BUSY.formats[role].opening(PROMPTS[victim])
            if request.prompt_token_ids[: len(opening)] == opening and _phase(BUSY, role, request) is what:
                return Completion(
                    request_id=request.request_id, token_ids=(), finish_reason=FinishReason.refused, error="too odd"
                )
            return script(request)

        return answer

    return wrap


@EVERY_SCHEDULE
@pytest.mark.parametrize("phase", [Phase.draft, Phase.grade, Phase.rewrite, Phase.answer])
def test_a_refused_request_gives_up_its_chain_and_no_other(schedule: str, phase: Phase) -> None:
    world = replace(BUSY, num_samples=1, threshold=6.0)
    run = run_world(world, schedule=schedule, wrap=refusing(1, phase))
    given_up = {chain.key: chain for chain in run.finished if chain.error is not None}
    assert set(given_up) == {("p1", 0)}
    chain = given_up["p1", 0]
    assert chain.thinking_end is ThinkingEnd.error
    assert chain.answer is None
    assert "too odd" in (chain.error or "")
    expected = plain_rows(world)
    rows = run.rows()
    row, steps = rows.pop(("p1", 0))
    assert row["answer_end"] == AnswerEnd.none and row["answer"] is None
    kept = expected.pop(("p1", 0))[1][: len(steps)]
    assert [step["token_ids"] for step in steps] == [step["token_ids"] for step in kept]
    assert rows == expected


@EVERY_SCHEDULE
def test_a_chain_given_up_in_the_middle_of_a_tuple_takes_no_other_with_it(schedule: str) -> None:
    world = replace(BUSY, num_samples=1)
    whole = run_world(world, schedule=schedule, policy=two_drafts)
    run = run_world(world, schedule=schedule, policy=two_drafts, wrap=refusing(2, Phase.draft))
    expected = whole.rows()
    rows = run.rows()
    assert rows.pop(("p2", 0))[0]["thinking_end"] == "error"
    expected.pop(("p2", 0))
    assert rows == expected
    assert all(engine.num_outstanding == 0 for engine in run.engines.values())


def aborting(after: int) -> Any:
    """From the engine's nth completion on: cut short with half the tokens, as vLLM does after a signal."""

    def wrap(role: Role, script: Script) -> Script:
        count = 0

        def answer(request: Request) -> Completion:
            nonlocal count
            count += 1
            completion = script(request)
            if count <= after:
                return completion
            half = completion.token_ids[: len(completion.token_ids) // 2]
            return replace(completion, token_ids=half, finish_reason=FinishReason.abort)

        return answer

    return wrap


@EVERY_SCHEDULE
@pytest.mark.parametrize("after", [0, 5, 40])
def test_an_aborted_completion_raises_and_is_never_made_a_step(schedule: str, after: int) -> None:
    expected = plain_rows(BUSY)
    run = Run(BUSY, schedule=schedule, wrap=aborting(after))
    with pytest.raises(EngineAborted):
        run.to_end()
    assert any(chain.is_thinking for chain in run.chains)
    for chain in run.chains:
        kept = [list(step.written.token_ids) for step in chain.steps]
        assert kept == [step["token_ids"] for step in expected[chain.key][1]][: len(kept)]


@EVERY_SCHEDULE
def test_the_stop_signal_is_looked_at_before_every_poll(schedule: str) -> None:
    run = Run(BUSY, schedule=schedule)

    def stop() -> None:
        if len(run.engines[Role.base].completions) >= 10:
            raise Stopped("enough")

    run.check_stop = stop
    with pytest.raises(Stopped):
        run.to_end()
    polls = run.engines[Role.base].outstanding_at_poll
    assert 10 <= len(run.engines[Role.base].completions) <= 10 + 3
    assert polls


@EVERY_SCHEDULE
def test_an_abandoned_run_leaves_nothing_outstanding(schedule: str) -> None:
    """Else the engine's next user gets the completions of this one."""
    run = Run(BUSY, schedule=schedule)
    run.check_stop = lambda: _stop_after(run, 8)
    driver = run.driver()
    with pytest.raises(Stopped):
        for _ in SCHEDULES[schedule](driver):
            pass
    assert sum(engine.num_outstanding for engine in run.engines.values()) > 0
    driver.abandon()
    assert sum(engine.num_outstanding for engine in run.engines.values()) == 0


# --- accounts ---


@EVERY_SCHEDULE
@settings(max_examples=30, deadline=None)
@given(world=worlds(), active_size=st.sampled_from([1, 3, 64]))
def test_rounds_account_for_every_request_and_token_that_the_engines_saw(
    schedule: str, world: World, active_size: int
) -> None:
    run = run_world(world, schedule=schedule, active_size=active_size)
    assert _account(run) == _seen(run)


@EVERY_SCHEDULE
@settings(max_examples=30, deadline=None)
@given(world=worlds())
def test_rounds_and_steps_tell_the_same_story(schedule: str, world: World) -> None:
    run = run_world(world, schedule=schedule)
    stats = [report.stats for report in run.reports]
    steps = [step for chain in run.finished for step in chain.steps]
    chains = [row for row, _ in run.rows().values()]
    generated = _generated(stats)
    assert generated[Phase.draft] == sum(
        row["num_draft_tokens_kept"] + row["num_draft_tokens_rejected"] for row in chains
    )
    assert generated[Phase.rewrite] == sum(row["num_base_tokens"] for row in chains)
    assert generated[Phase.answer] == sum(row["num_answer_tokens"] for row in chains)
    assert generated[Phase.grade] == sum(step.grade is not None for step in steps)
    prompt_tokens = sum(item.phases[Phase.grade].num_prompt_tokens for item in stats)
    assert prompt_tokens == sum(row["num_grade_prompt_tokens"] for row in chains)
    cached = sum(phase.num_cached_tokens for item in stats for phase in item.phases.values())
    assert cached == sum(chain.usage.num_cached_prompt_tokens for chain in run.finished)
    for item in stats:
        own = [step for step in steps if step.round == item.round]
        assert item.num_accepted == sum(step.accepted is True for step in own)
        assert item.num_rejected == sum(step.accepted is False for step in own)
        assert item.num_unreadable == sum(step.grade is not None and step.grade.score is None for step in own)
    assert sum(item.num_finished for item in stats) == len(chains)


def test_rounds_count_what_was_generated_for_a_chain_that_was_then_given_up() -> None:
    """Its tokens were paid for: of two drafts of one step the first is refused, the second generated all the same."""
    refused: list[str] = []

    def wrap(role: Role, script: Script) -> Script:
        refuse = refusing(2, Phase.draft)(role, script)

        def answer(request: Request) -> Completion:
            completion: Completion = refuse(request)
            if completion.finish_reason is not FinishReason.refused or refused:
                return script(request)
            refused.append(request.request_id)
            return completion

        return answer

    run = run_world(replace(BUSY, num_samples=1), policy=two_drafts, wrap=wrap)
    assert len(refused) == 1
    assert _account(run) == _seen(run)


def _account(run: Run) -> dict[Phase, tuple[int, int, int, int]]:
    return {
        phase: (
            sum(report.stats.phases[phase].num_requests for report in run.reports),
            sum(report.stats.phases[phase].num_prompt_tokens for report in run.reports),
            sum(report.stats.phases[phase].num_cached_tokens for report in run.reports),
            sum(report.stats.phases[phase].num_generated_tokens for report in run.reports),
        )
        for phase in Phase
    }


def _seen(run: Run) -> dict[Phase, tuple[int, int, int, int]]:
    """The same figures from the engines' side."""
    seen = dict.fromkeys(Phase, (0, 0, 0, 0))
    for role, engine in run.engines.items():
        requests = {request.request_id: request for request in engine.requests}
        for completion in engine.completions:
            request = requests[completion.request_id]
            figures = (1, len(request.prompt_token_ids), completion.num_cached_tokens, len(completion.token_ids))
            phase = _phase(run.world, role, request)
            seen[phase] = tuple(map(sum, zip(seen[phase], figures, strict=True)))  # type: ignore[assignment]
    return seen


def _generated(stats: list[RoundStats]) -> dict[Phase, int]:
    return {phase: sum(item.phases[phase].num_generated_tokens for item in stats) for phase in Phase}


def _phase(world: World, role: Role, request: Request) -> Phase:
    """What a request is for, from what it asks: grades want log-probabilities, answers come after think-close."""
    if _is_grade(request):
        return Phase.grade
    if _is_answer(world, role, request):
        return Phase.answer
    return Phase.draft if role is Role.draft else Phase.rewrite


def _is_grade(request: Request) -> bool:
    return bool(request.sampling.logprob_token_ids)


def _is_answer(world: World, role: Role, request: Request) -> bool:
    close = list(world.formats[role].think_close_ids)
    return request.prompt_token_ids[-len(close) :] == close


def _nonzero(*sizes: int) -> list[int]:
    return [size for size in sizes if size]


def _stop_after(run: Run, num_completions: int) -> None:
    if sum(len(engine.completions) for engine in run.engines.values()) >= num_completions:
        raise Stopped("enough")


# --- time ---


class ObservedEngine(SimulatedEngine):
    """A simulated engine that keeps from when to when each of its requests was outstanding."""

    def __init__(self, profile: CostProfile, clock: VirtualClock, device: str):
        super().__init__(repeat_token, profile, clock, device)
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}

    def submit(self, requests: Sequence[Request]) -> None:
        super().submit(requests)
        self.began |= {request.request_id: self.clock.now() for request in requests}

    def poll(self, timeout: float) -> list[Completion]:
        completions = super().poll(timeout)
        self.ended |= {completion.request_id: self.clock.now() for completion in completions}
        return completions

    def num_outstanding_at(self, moment: float) -> int:
        return sum(began < moment < self.ended[id] for id, began in self.began.items())


@dataclass(slots=True)
class TimedRun:
    """A few chains on simulated engines. Costs are powers of two, so that virtual seconds add up exactly."""

    schedule: str
    active_size: int
    shared: bool = True  # one device
    request_seconds: float = 0.0  # our own time, for each request
    opening_seconds: float = 2.0**-4  # our own time, for each chain that is opened
    step_spread: float = 0.5
    clock: VirtualClock = field(default_factory=VirtualClock)
    engines: dict[Role, ObservedEngine] = field(default_factory=dict)
    reports: list[RoundReport] = field(default_factory=list)

    @property
    def workload(self) -> Workload:
        return Workload(step_tokens=8, step_spread=self.step_spread, num_steps=6, accept_rate=0.6, seed=5)

    def to_end(self) -> "TimedRun":
        costs = {Role.draft: (2.0**-9, 2.0**-8), Role.base: (2.0**-8, 2.0**-5)}
        for role, (host, device) in costs.items():
            profile = CostProfile(host_seconds=host, pass_seconds=device, request_seconds=self.request_seconds)
            self.engines[role] = ObservedEngine(profile, self.clock, "0" if self.shared else role)
        capacities = {role: Capacity.of(engine.info) for role, engine in self.engines.items()}
        policy = partial(POLICIES["specreason"].coroutine, rules=Rules(threshold=5.0))
        driver = Driver(self.engines, self.workload, policy, Admission(self._open(), self.active_size, capacities))
        self.reports = list(SCHEDULES[self.schedule](driver))
        return self

    def _open(self) -> Iterator[Chain]:
        for chain in islice(self.workload.chains(), 9):
            self.clock.spend(self.opening_seconds)
            yield chain

    @property
    def stats(self) -> list[RoundStats]:
        return [report.stats for report in self.reports]

    @property
    def moments(self) -> list[float]:
        """When anything changed; nothing does in between."""
        engines = self.engines.values()
        changes = {moment for engine in engines for moment in (*engine.began.values(), *engine.ended.values())}
        return sorted({0.0, self.clock.now()} | changes)


@EVERY_SCHEDULE
@pytest.mark.parametrize("active_size", [1, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_seconds_are_accounted_by_what_was_outstanding_meanwhile(schedule: str, active_size: int, shared: bool) -> None:
    """Against when the engines saw each request come and go."""
    run = TimedRun(schedule, active_size, shared, request_seconds=2.0**-10).to_end()
    idle = 0.0
    busy = dict.fromkeys(Role, 0.0)
    requests = dict.fromkeys(Role, 0.0)
    for began, ended in pairwise(run.moments):
        counts = {role: engine.num_outstanding_at((began + ended) / 2) for role, engine in run.engines.items()}
        idle += (ended - began) * (not any(counts.values()))
        for role, count in counts.items():
            busy[role] += (ended - began) * (count > 0)
            requests[role] += (ended - began) * count
    assert sum(item.idle_seconds for item in run.stats) == idle > 0.0
    for role, engine in run.engines.items():
        assert sum(item.busy_seconds[role] for item in run.stats) == busy[role]
        assert sum(item.request_seconds[role] for item in run.stats) == requests[role]
        assert requests[role] == sum(engine.ended[id] - began for id, began in engine.began.items())


@EVERY_SCHEDULE
@pytest.mark.parametrize("active_size", [1, 4])
def test_rounds_leave_no_gap(schedule: str, active_size: int) -> None:
    run = TimedRun(schedule, active_size).to_end()
    assert len(run.reports) > 1
    assert sum(item.seconds for item in run.stats) == run.clock.now()


@pytest.mark.parametrize("active_size", [1, 4])
def test_in_lockstep_one_engine_works_or_none(active_size: int) -> None:
    for item in TimedRun("lockstep", active_size, request_seconds=2.0**-10).to_end().stats:
        assert sum(item.busy_seconds.values()) + item.idle_seconds == item.seconds


def test_one_chain_at_a_time_in_lockstep_takes_what_its_passes_take() -> None:
    """A step of 8 tokens is 8 passes, a grade or an answer one; submitting is our own time, and so is opening."""
    run = TimedRun("lockstep", 1, request_seconds=2.0**-10, step_spread=0.0).to_end()
    steps = [step for report in run.reports for chain in report.finished for step in chain.steps]
    num_rejected = sum(step.rejected is not None for step in steps)
    assert 0 < num_rejected < len(steps)
    base_passes = len(steps) + 8 * num_rejected + 9
    seconds = {Role.draft: 8 * len(steps) * (2.0**-9 + 2.0**-8), Role.base: base_passes * (2.0**-8 + 2.0**-5)}
    num_requests = 2 * len(steps) + num_rejected + 9
    for role in Role:
        assert sum(item.busy_seconds[role] for item in run.stats) == seconds[role]
        assert sum(item.request_seconds[role] for item in run.stats) == seconds[role]
    assert sum(item.idle_seconds for item in run.stats) == num_requests * 2.0**-10 + 9 * 2.0**-4


@EVERY_SCHEDULE
@settings(max_examples=15, deadline=None)
@given(world=worlds(), active_size=st.sampled_from([1, 3, 64]))
def test_no_engine_is_busy_for_longer_than_a_round_takes_and_no_time_is_left_over(
    schedule: str, world: World, active_size: int
) -> None:
    run = run_world(world, schedule=schedule, active_size=active_size)
    for report in run.reports:
        item = report.stats
        assert set(item.busy_seconds) == set(item.request_seconds) == set(world.roles)
        assert max(item.busy_seconds.values()) <= item.seconds + 1e-9
        assert item.idle_seconds + sum(item.busy_seconds.values()) >= item.seconds - 1e-9
        assert item.idle_seconds + max(item.busy_seconds.values()) <= item.seconds + 1e-9
        for role, seconds in item.busy_seconds.items():
            assert seconds - 1e-9 <= item.request_seconds[role] <= active_size * seconds + 1e-9
