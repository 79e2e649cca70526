"""What every schedule shares: chains walking through their policies, requests out, completions back in.

Owns: matching completions to asks, accounting them to rounds and chains, giving up a chain whose request was refused.
Does not know: when requests should run (a schedule's), what they mean (the translator's).
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from specreason_batch.chain import Chain, Policy
from specreason_batch.engine import Engine, EngineAborted
from specreason_batch.rounds import RoundReport, RoundStats
from specreason_batch.translator import Translator
from specreason_batch.types import Ask, Completion, Coroutine, FinishReason, GradeOf, Phase, Request, Result, Role

POLL_SECONDS = 0.5  # how often a wait looks at the stop signal


class Stopped(Exception):
    """The run was asked to stop; nothing of the chains in flight is lost but the step that each is at."""


@dataclass(slots=True)
class Walk:
    """One chain on its way through its policy."""

    chain: Chain
    coroutine: Coroutine
    started: float
    asks: tuple[Ask, ...] = ()
    results: dict[int, Result] = field(default_factory=dict)
    asks_tuple: bool = False  # the policy yielded a tuple, and is sent one

    @property
    def is_over(self) -> bool:
        return not self.asks

    @property
    def waiting(self) -> list[int]:
        """Places of the asks that have no result yet."""
        return [place for place in range(len(self.asks)) if place not in self.results]

    def advance(self) -> None:
        """Send the results in; the coroutine runs to its next asks, or to its end."""
        results = tuple(self.results[place] for place in range(len(self.asks)))
        sent = (results if self.asks_tuple else results[0]) if results else None
        self.results = {}
        try:
            asked = self.coroutine.send(sent)
        except StopIteration:
            self.asks = ()
            return
        self.asks_tuple = isinstance(asked, tuple)
        self.asks = asked if isinstance(asked, tuple) else (asked,)

    def give_up(self, why: str) -> None:
        self.coroutine.close()
        self.chain.give_up(why)
        self.asks, self.results = (), {}


class Outstanding(NamedTuple):
    """A request on its way, and where its result belongs."""

    walk: Walk
    place: int
    ask: Ask
    request: Request


@dataclass(slots=True)
class Driver:
    """Moves walks forward on two engines, and keeps the round's account."""

    engines: Mapping[Role, Engine]
    translator: Translator
    policy: Policy
    check_stop: Callable[[], None] = lambda: None  # raises Stopped
    stats: RoundStats = field(default_factory=lambda: RoundStats(0, time.time()))
    _began: float | None = None  # of the round; None between rounds
    _finished: list[Chain] = field(default_factory=list)
    _ids: Iterator[int] = field(default_factory=itertools.count)
    _outstanding: dict[str, Outstanding] = field(default_factory=dict)

    def start(self, chain: Chain) -> Walk:
        """Begin a chain's policy; the walk then has its first asks."""
        walk = Walk(chain, self.policy(chain), time.monotonic())
        chain.round = self.stats.round
        walk.advance()
        return walk

    def refill(self, active: list[Walk], chains: Iterator[Chain], active_size: int) -> list[Walk]:
        """Let those that are over leave; start chains until `active_size` walk or no more come; the new ones."""
        active[:] = [walk for walk in active if not walk.is_over]
        new = [self.start(chain) for chain in itertools.islice(chains, max(0, active_size - len(active)))]
        active.extend(new)
        return new

    def submit(self, walks: Iterable[Walk], phases: Iterable[Phase] = Phase) -> None:
        """Send the walks' waiting asks of these phases to their engines, one batch an engine."""
        wanted = frozenset(phases)
        batches: dict[Role, list[Request]] = {role: [] for role in self.engines}
        for walk in walks:
            for place in walk.waiting:
                ask = walk.asks[place]
                if ask.phase in wanted:
                    request = self.translator.request(walk.chain, ask, str(next(self._ids)))
                    self._outstanding[request.request_id] = Outstanding(walk, place, ask, request)
                    batches[ask.engine].append(request)
        for role, batch in batches.items():
            if batch:
                self.engines[role].submit(batch)

    def drain(self, role: Role) -> float:
        """Take completions until nothing is outstanding at this engine; seconds that it took."""
        began = time.monotonic()
        while self.engines[role].num_outstanding:
            for _ in self.take(role, POLL_SECONDS):
                pass
        return time.monotonic() - began

    def take(self, role: Role, timeout: float) -> Iterator[Walk]:
        """Completions of one poll, handed to their walks; yields each walk that moved on."""
        self.check_stop()
        for completion in self.engines[role].poll(timeout):
            walk, place, ask, request = self._outstanding.pop(completion.request_id)
            self._account(walk, ask, request, completion)
            if completion.finish_reason is FinishReason.abort:
                raise EngineAborted(f"the {role} engine cut request {completion.request_id} short")
            if walk.is_over:  # given up over another of its asks
                continue
            if completion.finish_reason is FinishReason.refused:
                self._give_up(walk, f"the {role} engine refused a request: {completion.error}")
                yield walk
                continue
            walk.results[place] = self.translator.result(ask, completion)
            if not walk.waiting:
                self._advance(walk)
                yield walk

    def abandon(self) -> None:
        """Forget what is outstanding, so that the engines can be used again."""
        for role, engine in self.engines.items():
            engine.abort([id for id, item in self._outstanding.items() if item.ask.engine is role])
        self._outstanding.clear()

    def begin_round(self, active: list[Walk]) -> None:
        self.stats = RoundStats(self.stats.round + 1, time.time(), num_active=len(active))
        self._began = time.monotonic()
        for walk in active:
            walk.chain.round = self.stats.round

    @property
    def is_mid_round(self) -> bool:
        return self._began is not None

    def end_round(self) -> RoundReport:
        """The round's figures and the chains that ended in it, each handed out once; also for a round cut short."""
        assert self._began is not None
        finished, self._finished = self._finished, []
        self.stats.num_finished = len(finished)
        self.stats.seconds = time.monotonic() - self._began
        self._began = None
        return RoundReport(self.stats, finished)

    def _advance(self, walk: Walk) -> None:
        walk.chain.usage.active_seconds = time.monotonic() - walk.started
        num_steps = len(walk.chain.steps)
        walk.advance()
        if walk.is_over:
            self._finished.append(walk.chain)
        for step in walk.chain.steps[num_steps:]:
            self.stats.num_accepted += step.accepted is True
            self.stats.num_rejected += step.accepted is False
            self.stats.num_unreadable += step.grade is not None and step.grade.score is None

    def _give_up(self, walk: Walk, why: str) -> None:
        walk.give_up(why)
        self._finished.append(walk.chain)

    def _account(self, walk: Walk, ask: Ask, request: Request, completion: Completion) -> None:
        self.stats.phases[ask.phase].count(request, completion)
        usage = walk.chain.usage
        usage.num_cached_prompt_tokens += completion.num_cached_tokens
        if isinstance(ask, GradeOf):
            usage.num_grade_prompt_tokens += request.num_prompt_tokens
