"""Which chains walk, by the memory that they need; and that rows do not depend on it."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specreason_batch.chain import Chain, Context
from specreason_batch.rounds import RoundStats
from specreason_batch.schedules import SCHEDULES, Admission, Capacity
from specreason_batch.schedules.admission import ADMIT_SHARE, PARK_SHARE
from specreason_batch.schedules.walk import Walk
from specreason_batch.simulated_engine import CostProfile
from specreason_batch.simulation import NO_LIMIT, UNLIMITED, Hardware, Simulated, Workload, simulate
from specreason_batch.types import Prompt, Role, Write
from tests.support.plain_loop import plain_rows
from tests.support.running import Run, run_workload, run_world
from tests.support.worlds import PROMPTS, World, worlds

EVERY_SCHEDULE = pytest.mark.parametrize("schedule", sorted(SCHEDULES))
BUSY = World(prompts=PROMPTS, num_samples=2, windows=(4096, 4096), threshold=3.0, seed=11)

# --- the rule ---

CAPACITIES = {Role.draft: Capacity(2_000, 16), Role.base: Capacity(1_000, 16)}


def make_chains(lengths: list[tuple[int, int]]) -> Iterator[Chain]:
    for index, (draft, base) in enumerate(lengths):
        contexts = {Role.draft: Context([0] * draft, NO_LIMIT, 0), Role.base: Context([0] * base, NO_LIMIT, 0)}
        yield Chain(Prompt(prompt_id=str(index), prompt=""), 0, index, UNLIMITED, contexts)


def make_admission(lengths: list[tuple[int, int]], active_size: int = 64, bounded: bool = True) -> Admission:
    return Admission(make_chains(lengths), active_size, CAPACITIES, bounded)


def start(admission: Admission) -> Walk | None:
    """What a driver does to begin with the next chain."""
    chain = admission.next_chain()
    if chain is None:
        return None
    walk = Walk(chain, iter(()), int(chain.prompt.prompt_id), 0.0, asks=(Write(Role.draft),))  # type: ignore[arg-type]
    admission.enter(walk)
    return walk


def start_all(admission: Admission) -> list[Walk]:
    return list(iter(lambda: start(admission), None))


def grow(admission: Admission, walk: Walk, num_tokens: int) -> None:
    for context in walk.chain.contexts.values():
        context.ids.extend([0] * num_tokens)
    admission.update(walk)


def need(chain: Chain, role: Role) -> int:
    return (len(chain.contexts[role].ids) // 16 + 1) * 16


def total(walks: list[Walk], role: Role) -> int:
    return sum(need(walk.chain, role) for walk in walks)


class Machine:
    """An admission under any sequence of events, checked after each."""

    def __init__(self, admission: Admission):
        self.admission = admission
        self.num_parked = 0

    def do(self, what: str, which: int, num_tokens: int) -> None:
        active = self.admission.active
        walk = active[which % len(active)] if active else None
        if what == "start":
            self.begin()
        elif what == "return":
            self.come_back()
        elif what == "park":
            self.park()
        elif walk and what == "grow":
            grow(self.admission, walk, num_tokens)
        elif walk and what == "leave":
            self.admission.leave(walk)
        elif walk and what == "send":
            walk.sent = set() if walk.sent else {0}
        self.check()

    def begin(self) -> None:
        has_parked, others = bool(self.admission.parked), list(self.admission.active)
        if start(self.admission) is not None:
            assert not has_parked
            self.check_entered(others)

    def come_back(self) -> None:
        parked, others = list(self.admission.parked), list(self.admission.active)
        walk = self.admission.unpark()
        if walk is not None:
            assert walk is min(parked, key=lambda walk: walk.number)
            self.admission.enter(walk)
            self.check_entered(others)
        else:
            assert not parked or others

    def park(self) -> None:
        """A walk at rest goes where it and its elders are too much for a cache; the oldest never."""
        active = list(self.admission.active)
        over = [
            walk
            for index, walk in enumerate(active)
            if any(total(active[: index + 1], role) > PARK_SHARE * CAPACITIES[role].tokens for role in Role)
        ]
        going = [walk for walk in over if not walk.sent and walk is not active[0] and self.admission.bounded]
        self.admission.park_surplus()
        assert self.admission.active == [walk for walk in active if walk not in going]
        assert set(going) <= set(self.admission.parked)
        self.num_parked += len(going)

    def check_entered(self, others: list[Walk]) -> None:
        if others and self.admission.bounded:
            for role, capacity in CAPACITIES.items():
                assert total(self.admission.active, role) <= ADMIT_SHARE * capacity.tokens

    def check(self) -> None:
        admission = self.admission
        assert admission.load == {role: total(admission.active, role) for role in Role}
        assert len(admission.active) <= admission.active_size
        assert all(walk.is_active for walk in admission.active)
        assert not any(walk.is_active or walk.sent for walk in admission.parked)
        for walks in (admission.active, admission.parked):
            assert [walk.number for walk in walks] == sorted(walk.number for walk in walks)
        assert admission.num_parked == self.num_parked


LENGTHS = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=12)
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["start", "start", "grow", "grow", "park", "return", "send", "leave"]),
        st.integers(0, 11),
        st.integers(1, 300),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, events=EVENTS, active_size=st.integers(1, 6), bounded=st.booleans())
def test_the_load_is_what_the_active_walks_need_and_enters_and_leaves_by_the_rule(
    lengths: list[tuple[int, int]], events: list[tuple[str, int, int]], active_size: int, bounded: bool
) -> None:
    machine = Machine(make_admission(lengths, active_size, bounded))
    for event in events:
        machine.do(*event)


@pytest.mark.parametrize(("num_tokens", "whole_blocks"), [(0, 16), (15, 16), (16, 32), (31.5, 32), (47.9, 48)])
def test_a_sequence_needs_whole_blocks_with_one_begun(num_tokens: float, whole_blocks: int) -> None:
    assert Capacity(1_000, 16).need(num_tokens) == whole_blocks


def test_chains_enter_until_one_cache_would_be_nine_tenths_full() -> None:
    """Of 1,000 tokens at the base 900 are given away: 18 chains of 48 take 864."""
    admission = make_admission([(1, 40)] * 30)
    assert len(start_all(admission)) == 18
    assert admission.load == {Role.draft: 18 * 16, Role.base: 864}


def test_the_draft_caches_size_counts_as_the_bases_does() -> None:
    assert len(start_all(make_admission([(100, 1)] * 20))) == 1_800 // 112


def test_a_chain_that_does_not_fit_is_first_in_line_when_there_is_room() -> None:
    admission = make_admission([(1, 500), (1, 500), (1, 10)])
    (first,) = start_all(admission)
    assert start(admission) is None
    admission.leave(first)
    assert [walk.chain.prompt.prompt_id for walk in start_all(admission)] == ["1", "2"]


def test_a_chain_that_is_too_long_for_the_cache_walks_alone() -> None:
    admission = make_admission([(1, 5_000), (1, 5_000)])
    assert len(start_all(admission)) == 1
    admission.park_surplus()
    assert len(admission.active) == 1


def test_the_youngest_are_parked_until_the_others_fit_and_come_back_before_new_ones_oldest_first() -> None:
    admission = make_admission([(1, 200)] * 9, active_size=4)
    walks = start_all(admission)
    assert admission.load[Role.base] == 4 * 208 and len(walks) == 4
    for walk in walks:
        grow(admission, walk, 100)
    admission.park_surplus()
    assert admission.active == walks[:3] and admission.parked == [walks[3]]  # 3 times 304 are 912
    for walk in walks[:3]:
        grow(admission, walk, 100)
    admission.park_surplus()
    assert admission.active == walks[:2] and admission.parked == walks[2:]  # 2 times 416 are 832
    assert admission.unpark() is None and admission.next_chain() is None
    admission.leave(walks[0])
    assert admission.next_chain() is None
    assert admission.unpark() is walks[2]
    admission.enter(walks[2])
    assert admission.unpark() is None and admission.next_chain() is None
    assert admission.active == walks[1:3]


def test_a_walk_with_requests_outstanding_is_counted_as_going_but_stays_until_it_is_at_rest() -> None:
    admission = make_admission([(1, 200)] * 4)
    walks = start_all(admission)
    for walk in walks:
        grow(admission, walk, 100)
    walks[3].sent = {0}
    admission.park_surplus()
    assert admission.active == walks
    walks[3].sent = set()
    admission.park_surplus()
    assert admission.active == walks[:3]


def test_a_walk_that_comes_back_takes_its_place_among_the_others_by_age() -> None:
    """Of four, 416 tokens each, the two youngest are too much; the very youngest is busy and stays."""
    admission = make_admission([(1, 200)] * 4)
    walks = start_all(admission)
    walks[3].sent = {0}
    for walk in walks:
        grow(admission, walk, 200)
    admission.park_surplus()
    assert admission.active == [walks[0], walks[1], walks[3]]
    admission.leave(walks[0])
    admission.leave(walks[1])
    assert admission.unpark() is walks[2]
    admission.enter(walks[2])
    assert admission.active == walks[2:]


def test_unbounded_only_the_active_size_counts() -> None:
    admission = make_admission([(1, 5_000)] * 9, active_size=7, bounded=False)
    walks = start_all(admission)
    assert len(walks) == 7
    admission.park_surplus()
    assert admission.active == walks and not admission.parked
    assert admission.load[Role.base] == 7 * 5_008


def test_what_requests_add_to_their_chains_is_counted_at_its_mean() -> None:
    admission = make_admission([(1, 100)] * 20)
    for extra in (10, 30, 50):
        admission.observe(extra)
    assert len(start_all(admission)) == 900 // 144  # 130 tokens each


# --- under schedules ---


@EVERY_SCHEDULE
@settings(max_examples=20, deadline=None)
@given(
    world=worlds(),
    kv_capacity=st.sampled_from([16, 150, 300, 500]),
    active_size=st.sampled_from([2, 5, 64]),
    order_seed=st.integers(0, 1000),
)
def test_rows_are_the_plain_loops_however_small_the_caches_are(
    schedule: str, world: World, kv_capacity: int, active_size: int, order_seed: int
) -> None:
    run = run_world(world, schedule=schedule, kv_capacity=kv_capacity, active_size=active_size, order_seed=order_seed)
    assert run.rows() == plain_rows(world)
    assert not run.admission.active and not run.admission.parked
    assert run.admission.load == dict.fromkeys(run.engines, 0)


@EVERY_SCHEDULE
def test_chains_are_parked_where_the_caches_are_small_and_every_one_ends(schedule: str) -> None:
    run = Run(BUSY, schedule=schedule, kv_capacity=600, active_size=64)
    for report in run.walk():
        stats = report.stats
        assert stats.num_waiting == len(run.admission.parked)
        assert stats.kv_load == {role: sum(walk.needs[role] for walk in run.admission.active) for role in run.engines}
        assert stats.kv_capacity == dict.fromkeys(Role, 600)
    assert sum(report.stats.num_parked for report in run.reports) > 0
    assert len(run.finished) == len(BUSY.keys)
    assert run.rows() == plain_rows(BUSY)


# Two chains of 32 tokens that grow by 16 a step, on a base of 160 tokens: 144 for those that enter, 152 in all.
GROWING = Workload(step_tokens=16, step_spread=0.0, num_steps=8, prompt_tokens=32, answer_tokens=16)


def growing_stats(kv_capacity: int, bounded: bool = True, workload: Workload = GROWING) -> list[RoundStats]:
    profile = CostProfile(host_seconds=0.25, pass_seconds=0.5, kv_capacity_tokens=kv_capacity)
    hardware = Hardware(draft=profile, base=profile)
    reports = run_workload(workload, hardware, num_chains=2, policy="base_only", bounded=bounded)
    return [report.stats for report in reports]


def test_a_round_says_how_many_chains_wait_how_often_one_was_parked_and_what_the_active_ones_need() -> None:
    """Each of six steps. A request takes 16 tokens beyond its chain's: 80 for each chain after the first step, 96 after
    the second, up to 160; an answer adds nothing.
    """
    stats = growing_stats(160)
    figures = [(item.num_active, item.num_waiting, item.num_parked, item.kv_load[Role.base]) for item in stats]
    alone = [96, 112, 128, 144, 160, 160]
    assert figures[:2] == [(2, 0, 0, 160), (1, 1, 1, 96)]
    assert figures[2:7] == [(1, 1, 0, load) for load in alone[1:]]
    assert figures[7:] == [(1, 0, 0, load) for load in alone]


# --- what eviction costs ---


def recomputed(stats: list[RoundStats]) -> list[int]:
    return [sum(phase.num_recomputed_tokens for phase in item.phases.values()) for item in stats]


@pytest.mark.parametrize("prompt_tokens", [32, 40])
def test_nothing_is_computed_twice_where_everything_fits_but_blocks_begun(prompt_tokens: int) -> None:
    assert set(recomputed(growing_stats(1_000, workload=replace(GROWING, prompt_tokens=prompt_tokens)))) == {0}


def test_nothing_is_computed_twice_where_chains_are_parked_in_time_but_what_the_parked_one_lost() -> None:
    """One is parked after its first step and leaves 32 tokens in the cache. Its elder's answer, with 144 in all, takes
    16 of them.
    """
    assert [number for number in recomputed(growing_stats(160)) if number] == [16]


def test_what_was_evicted_and_computed_again_is_counted() -> None:
    """Both walk in 80 tokens, one request at a time. Kept of both after round 1: 32 tokens each.

    Round 2: the first needs 64, which leaves 16 of the second's 32. It then keeps 48; the second needs 64, which leaves
    16 of them. Round 3: the first computes 32 of its 48 again and needs 80; nothing is left of the second's 48.
    """
    assert recomputed(growing_stats(80, bounded=False))[:3] == [0, 16, 32 + 48]


# --- what oversubscription costs ---

MS = 1e-3
SMALL = Hardware(  # about 16 chains fit
    base=CostProfile(
        host_seconds=2 * MS,
        pass_seconds=13.5 * MS,
        kv_token_seconds=0.26 / 5_000 * 4 * MS,
        prefill_token_seconds=0.11 * MS,
        kv_capacity_tokens=16_000,
    ),
    draft=CostProfile(
        host_seconds=1 * MS,
        pass_seconds=0.7 * MS,
        sequence_seconds=0.03 * MS,
        prefill_token_seconds=0.005 * MS,
        kv_capacity_tokens=32_000,
    ),
)
SHORT_TURNS = Workload(step_tokens=32, turn_tokens=10, accept_rate=0.8, num_steps=40)


@cache
def on_small(schedule: str, active_size: int, bounded: bool = True, seconds: float = 150.0) -> Simulated:
    return simulate(SCHEDULES[schedule], "specreason", SHORT_TURNS, SMALL, active_size, seconds, bounded)


def best_that_fits(schedule: str) -> float:
    """Tokens/s."""
    return max(on_small(schedule, size).tokens_per_second for size in (16, 20))


@EVERY_SCHEDULE
def test_four_times_the_chains_that_fit_cost_a_fifth_more_at_most(schedule: str) -> None:
    over = on_small(schedule, 64)
    assert over.num_parked > 0
    assert over.tokens_per_second >= best_that_fits(schedule) / 1.2


@EVERY_SCHEDULE
def test_without_admission_they_cost_twice_as_much_or_more(schedule: str) -> None:
    """Guards the test above: memory is what this workload lacks."""
    collapsed = on_small(schedule, 64, bounded=False, seconds=300.0)
    assert collapsed.num_parked == 0
    assert collapsed.tokens_per_second <= best_that_fits(schedule) / 2
    assert collapsed.num_recomputed_tokens > 10 * on_small(schedule, 64).num_recomputed_tokens


@EVERY_SCHEDULE
def test_chains_that_fit_are_neither_parked_nor_computed_twice(schedule: str) -> None:
    fitting = on_small(schedule, 12, seconds=60.0)
    assert fitting.num_parked == fitting.num_recomputed_tokens == 0
