"""What every schedule shares: chains walking through their policies, requests out, completions back in.

Owns: matching completions to asks, accounting them to rounds and chains, giving up a chain whose request was refused.
Does not know: when requests should run (a schedule's), what they mean (the translator's), how many chains fit
(admission's).
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from specreason_batch.chain import Chain, Policy
from specreason_batch.clock import Clock
from specreason_batch.engine import Engine, EngineAborted, EngineDead
from specreason_batch.rounds import RoundReport, RoundStats
from specreason_batch.schedules.admission import Admission
from specreason_batch.schedules.walk import Walk
from specreason_batch.types import Ask, Completion, FinishReason, GradeOf, Phase, Request, Result, Role

POLL_SECONDS = 0.5  # how often a wait looks at the stop signal


class Stopped(Exception):
    """The run was asked to stop; nothing of the chains in flight is lost but the step that each is at."""


class Translation(Protocol):
    """Asks to requests, completions to results: the translator's side that a driver needs."""

    def request(self, chain: Chain, ask: Ask, request_id: str) -> Request: ...

    def result(self, chain: Chain, ask: Ask, completion: Completion) -> Result: ...


class Outstanding(NamedTuple):
    """A request on its way, and where its result belongs."""

    walk: Walk
    place: int
    ask: Ask
    request: Request
    num_known: int  # tokens of its chain that its engine had computed when it was sent


@dataclass(slots=True)
class Driver:
    """Moves walks forward on two engines, and keeps the round's account."""

    engines: Mapping[Role, Engine]
    translator: Translation
    policy: Policy
    admission: Admission
    check_stop: Callable[[], None] = lambda: None  # raises Stopped
    first_round: int = 0  # rounds are counted on from here
    stats: RoundStats = field(init=False)
    clock: Clock = field(init=False)  # the engines'
    _began: float = field(init=False)  # of the round, on the clock
    _tallied: float = field(init=False)  # until when the round's seconds are accounted
    _in_round: bool = False
    _finished: list[Chain] = field(default_factory=list)
    _walk_numbers: Iterator[int] = field(default_factory=itertools.count)
    _ids: Iterator[int] = field(default_factory=itertools.count)
    _outstanding: dict[str, Outstanding] = field(default_factory=dict)
    _in_phase: Counter[Phase] = field(default_factory=Counter)
    _num_outstanding: dict[Role, int] = field(init=False)

    def __post_init__(self) -> None:
        self.clock = next(iter(self.engines.values())).clock
        assert all(engine.clock is self.clock for engine in self.engines.values()), "one clock for both engines"
        self.stats = RoundStats(self.first_round, time.time())
        self._began = self._tallied = self.clock.now()
        self._num_outstanding = dict.fromkeys(self.engines, 0)

    # --- what a schedule says ---

    def refill(self, at_rest: Iterable[Walk]) -> list[Walk]:
        """The walks that may go on: of these the ones that are neither over nor parked, and those that come in."""
        at_rest = list(at_rest)
        for walk in at_rest:
            if walk.is_over:
                self.admission.leave(walk)
        self.admission.park_surplus()
        staying = [walk for walk in at_rest if walk.is_active]
        return staying + list(self._enter())

    def submit(self, walks: Iterable[Walk], phases: Iterable[Phase] = Phase) -> None:
        """Send the walks' unsent asks of these phases to their engines, one batch an engine."""
        wanted = frozenset(phases)
        batches: dict[Role, list[Request]] = {role: [] for role in self.engines}
        for walk in walks:
            for place in walk.unsent(wanted):
                ask = walk.asks[place]
                request = self.translator.request(walk.chain, ask, str(next(self._ids)))
                known = walk.known.get(ask.engine, 0)
                self._outstanding[request.request_id] = Outstanding(walk, place, ask, request, known)
                self._in_phase[ask.phase] += 1
                walk.sent.add(place)
                batches[ask.engine].append(request)
        for role, batch in batches.items():
            if batch:
                with self._naming(role):
                    self.engines[role].submit(batch)
                self._tally()

    def num_outstanding(self, role: Role) -> int:
        """Requests on their way to or at this role's engine."""
        return self._num_outstanding.get(role, 0)

    def num_in_phase(self, phase: Phase) -> int:
        """Requests of this phase on their way."""
        return self._in_phase[phase]

    @property
    def has_outstanding(self) -> bool:
        return bool(self._outstanding)

    def take(self) -> list[Walk]:
        """Wait for completions, POLL_SECONDS at most; the walks that they moved on."""
        self.check_stop()
        self.clock.wait(POLL_SECONDS)
        moved = []
        for role, engine in self.engines.items():
            if engine.num_outstanding:
                with self._naming(role):
                    completions = engine.poll(0.0)
                self._tally()
                moved += [walk for completion in completions if (walk := self._receive(completion)) is not None]
        return moved

    def drain(self) -> None:
        """Take completions until nothing is outstanding."""
        while self._outstanding:
            self.take()

    # --- stopping early ---

    def in_flight(self) -> list[tuple[Chain, int]]:
        """Chains that a restart would have to go on with, oldest first, and the tokens that each would lose."""
        walks = [(walk.chain, walk.loose.num_generated_tokens) for walk in self._unfinished]
        return walks + [(chain, 0) for chain in self.admission.read_ahead]

    def chains_at(self, role: Role) -> list[Chain]:
        """Chains with a request outstanding at this engine, oldest first."""
        walks = {item.walk.number: item.walk for item in self._outstanding.values() if item.ask.engine is role}
        return [walk.chain for _, walk in sorted(walks.items())]

    def abandon(self) -> list[Chain]:
        """Forget what is outstanding, so that the engines can be used again; the chains to go on with, oldest first.

        A chain begins again after its last step: results that it had not taken up yet are lost, and counted as redone.
        """
        for role, engine in self.engines.items():
            engine.abort([id for id, item in self._outstanding.items() if item.ask.engine is role])
        self._outstanding.clear()
        self._in_phase.clear()
        left = self._unfinished
        for walk in left:
            walk.coroutine.close()
            walk.chain.usage.num_redone_tokens += walk.loose.num_generated_tokens
        return [walk.chain for walk in left] + self.admission.read_ahead

    @property
    def _unfinished(self) -> list[Walk]:
        walks = [*self.admission.active, *self.admission.parked]
        return sorted((walk for walk in walks if not walk.is_over), key=lambda walk: walk.number)

    # --- rounds ---

    def begin_round(self) -> None:
        """A round begins where the last one ended, so that a run's rounds add up to its wall-clock time."""
        active = self.admission.active
        self.stats = RoundStats(self.stats.round + 1, time.time(), num_active=len(active))
        self._in_round = True
        for walk in active:
            walk.chain.round = self.stats.round

    @property
    def is_mid_round(self) -> bool:
        return self._in_round

    def end_round(self) -> RoundReport:
        """The round's figures and the chains that ended in it, each handed out once; also for a round cut short."""
        assert self._in_round
        self._tally()
        finished, self._finished = self._finished, []
        self.stats.num_finished = len(finished)
        self.stats.seconds, self._began = self._tallied - self._began, self._tallied
        self.stats.num_waiting = len(self.admission.parked)
        self.stats.num_parked, self.admission.num_parked = self.admission.num_parked, 0
        self.stats.kv_load = dict(self.admission.load)
        self.stats.kv_capacity = {role: engine.info.kv_capacity_tokens for role, engine in self.engines.items()}
        self._in_round = False
        return RoundReport(self.stats, finished)

    def _tally(self) -> None:
        """Account the time since the last tally by what was outstanding meanwhile."""
        now = self.clock.now()
        elapsed, self._tallied = now - self._tallied, now
        if not any(self._num_outstanding.values()):
            self.stats.idle_seconds += elapsed
        for role, count in self._num_outstanding.items():
            self.stats.busy_seconds[role] = self.stats.busy_seconds.get(role, 0.0) + elapsed * (count > 0)
            self.stats.request_seconds[role] = self.stats.request_seconds.get(role, 0.0) + elapsed * count
            self._num_outstanding[role] = self.engines[role].num_outstanding

    @contextmanager
    def _naming(self, role: Role) -> Iterator[None]:
        """A death says whose it was: engines know nothing of roles."""
        try:
            yield
        except EngineDead as death:
            death.role = role
            raise

    # --- walks ---

    def _enter(self) -> Iterator[Walk]:
        """Walks that come back, then new ones, while there is room."""
        while (walk := self.admission.unpark() or self._start()) is not None:
            walk.chain.round = self.stats.round
            self.admission.enter(walk)
            yield walk

    def _start(self) -> Walk | None:
        chain = self.admission.next_chain()
        if chain is None:
            return None
        started = self.clock.now() - chain.usage.active_seconds
        walk = Walk(chain, self.policy(chain), next(self._walk_numbers), started)
        walk.advance()
        return walk

    def _receive(self, completion: Completion) -> Walk | None:
        """Hand a completion to its walk; the walk, if it moved on."""
        sent = self._outstanding.pop(completion.request_id)
        walk, place, ask = sent.walk, sent.place, sent.ask
        self._in_phase[ask.phase] -= 1
        walk.sent.discard(place)
        self._account(sent, completion)
        if completion.finish_reason is FinishReason.abort:
            death = EngineAborted(f"the {ask.engine} engine cut request {completion.request_id} short")
            death.role = ask.engine
            raise death
        if walk.is_over:  # given up over another of its asks
            return None
        if completion.finish_reason is FinishReason.refused:
            walk.give_up(f"the {ask.engine} engine refused a request: {completion.error}")
            self._finished.append(walk.chain)
            return walk
        walk.results[place] = self.translator.result(walk.chain, ask, completion)
        if not walk.can_advance:
            return None
        self._advance(walk)
        return walk

    def _advance(self, walk: Walk) -> None:
        walk.chain.usage.active_seconds = self.clock.now() - walk.started
        num_steps = len(walk.chain.steps)
        walk.advance()
        if walk.is_over:
            walk.settle()
            self._finished.append(walk.chain)
        if len(walk.chain.steps) > num_steps:
            walk.settle()
            self.admission.update(walk)
        for step in walk.chain.steps[num_steps:]:
            self.stats.num_accepted += step.accepted is True
            self.stats.num_rejected += step.accepted is False
            self.stats.num_unreadable += step.grade is not None and step.grade.score is None

    def _account(self, sent: Outstanding, completion: Completion) -> None:
        request, loose = sent.request, sent.walk.loose
        self.stats.phases[sent.ask.phase].count(request, completion, self._num_recomputed(sent, completion))
        self.admission.observe(len(request.suffix_token_ids) + len(completion.token_ids))
        loose.num_cached_prompt_tokens += completion.num_cached_tokens
        if isinstance(sent.ask, GradeOf):
            loose.num_grade_prompt_tokens += request.num_prompt_tokens
        else:
            loose.num_generated_tokens += len(completion.token_ids)

    def _num_recomputed(self, sent: Outstanding, completion: Completion) -> int:
        """Tokens of the chain that its engine had computed before, in whole blocks, and did not find in its cache."""
        if completion.finish_reason is FinishReason.refused:
            return 0
        role, request = sent.ask.engine, sent.request
        sent.walk.known[role] = len(request.prompt_token_ids)
        block = self.engines[role].info.block_size
        known = min(sent.num_known, request.num_prompt_tokens - 1) // block * block
        return max(0, known - completion.num_cached_tokens)
