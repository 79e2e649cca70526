"""One shard from its first chain to its last, through stops and through the deaths of its engines.

Owns: driving the schedule, and what follows when an engine dies: both the engine and the chains go on from what is
saved. If the same chains' requests kill it again, the culprit is found by splitting. Does not know: files, signals.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from specreason_batch.chain import Chain
from specreason_batch.config import ScheduleConfig
from specreason_batch.engine import DeathCause, EngineDead
from specreason_batch.engines import Engines
from specreason_batch.ledger import Ledger
from specreason_batch.plan import Plan
from specreason_batch.progress import Progress
from specreason_batch.rounds import RoundReport
from specreason_batch.schedules import (
    SCHEDULES,
    Admission,
    Capacity,
    Driver,
    Schedule,
    continuous,
    lockstep,
    overlapped,
    waves,
)
from specreason_batch.signals import StopSignal
from specreason_batch.store.parts import ChainKey

MAX_FAILED_STARTS = 2  # of an engine that is built again, in a row


@dataclass(slots=True)
class ShardRun:
    """The work on one shard. `examine`: looks at rebuilt engines before they are used; raises if they are no good."""

    plan: Plan
    ledger: Ledger
    engines: Engines
    progress: Progress
    stop: StopSignal
    examine: Callable[[], None]
    active_size: int = field(init=False)
    _suspects: list[Chain] = field(default_factory=list)  # had requests at the engine when it last died
    _suspected: set[ChainKey] = field(default_factory=set)  # and the time before
    _num_active: int = 0  # when it died
    _num_rebuilds: int = 0  # in a row: since a chain last finished

    def __post_init__(self) -> None:
        self.active_size = self.plan.config.schedule.active_size

    def to_end(self) -> None:
        """Run until every chain is finished. Whatever ends it early, everything is saved first.

        Raises Stopped, EngineDead (after too many deaths), BadNode, LeaseLost, OSError.
        """
        schedule = choose_schedule(self.plan.config.schedule, self.plan.policy_spec.free_running)
        try:
            while True:
                try:
                    self._drive(schedule, self.ledger.chains(), self.active_size)
                    break
                except EngineDead as death:
                    self._survive(death)
            self._give_up_condemned()
            self.ledger.complete()
        except BaseException:
            self.ledger.save()
            raise
        finally:
            self.ledger.measure(())

    # --- driving ---

    def _drive(
        self,
        schedule: Schedule,
        chains: Iterable[Chain],
        active_size: int,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Run chains to their ends, or until it is enough; those that are not at their ends wait again."""
        driver = self._driver(chains, active_size)
        try:
            for report in schedule(driver):
                self._take(report, driver)
                if is_enough():
                    return
        except BaseException as error:
            if isinstance(error, EngineDead):
                self._suspects = driver.chains_at(error.role) if error.role else []
                self._num_active = len(driver.admission.active)
            if driver.is_mid_round:  # what had finished in the round that was cut short
                self.ledger.add(driver.end_round())
            raise
        finally:
            self.ledger.put_back(driver.abandon())

    def _driver(self, chains: Iterable[Chain], active_size: int) -> Driver:
        used = {role: self.engines[role] for role in self.plan.formats}
        capacities = {role: Capacity.of(engine.info) for role, engine in used.items()}
        admission = Admission(iter(chains), active_size, capacities, self.plan.config.schedule.fit_memory)
        return Driver(
            used, self.plan.translator, self.plan.policy, admission, self.stop.check, first_round=self.ledger.round
        )

    def _take(self, report: RoundReport, driver: Driver) -> None:
        self.ledger.add(report)
        self.ledger.lease.check()
        if any(chain.error is None for chain in report.finished):  # the engines work
            self._num_rebuilds = 0
            self._give_up_condemned()
        self.ledger.save_if_due(driver.in_flight)
        self.progress.round(report)
        window = self.progress.window
        self.ledger.measure(driver.in_flight(), window.tokens_per_second, window.chains_per_second)

    # --- deaths ---

    def _survive(self, death: EngineDead) -> None:
        """Build the engine again; find the culprit where the same chains were with it the last time too."""
        self.stop.check()  # it may be the signal that killed it
        again = [chain for chain in self._suspects if chain.key in self._suspected]
        self._suspected = {chain.key for chain in self._suspects}
        self._rebuild(death)
        if again:
            self._find_culprits(again, death)

    def _find_culprits(self, suspects: list[Chain], death: EngineDead) -> None:
        """Split them until every one has made a step with a living engine, or has killed one alone."""
        self.progress.say(f"{len(suspects)} chain(s) were at the engine both times: looking for the culprit")
        groups = _halves(suspects)
        while groups:
            group = groups.pop()
            if self._survives(group):
                continue
            if len(group) > 1:
                groups += _halves(group)
            else:
                self.progress.say(f"set aside: {group[0].key}, whose requests kill the {death.role} engine")
                self.ledger.condemned += self.ledger.take(group)

    def _survives(self, group: list[Chain]) -> bool:
        """Whether the engines live while these chains alone make a step each."""
        goals = [(chain, len(chain.steps)) for chain in group]
        try:
            self._drive(
                lockstep,
                self.ledger.take(group),
                len(group),
                lambda: all(len(chain.steps) > steps or chain.answer or chain.error for chain, steps in goals),
            )
        except EngineDead as death:
            self._rebuild(death)
            return False
        return True

    def _rebuild(self, death: EngineDead) -> None:
        """Save everything, then put engines in place that work. Raises the death when that was tried too often."""
        self.ledger.save()
        if death.cause is DeathCause.out_of_memory:
            self.active_size = max(1, self._num_active // 2)
            self.progress.say(f"out of memory: active_size is {self.active_size} from here on")
        for failed_starts in range(MAX_FAILED_STARTS + 1):
            limit = self.plan.config.recovery.max_rebuilds
            if self._num_rebuilds >= limit or failed_starts == MAX_FAILED_STARTS:
                raise death
            self._num_rebuilds += 1
            self.ledger.count_rebuild()
            self.progress.say(f"{death}; building it again ({self._num_rebuilds} of {limit} in a row)")
            try:
                with self.stop.at_once():
                    self.engines.rebuild(death)
                    self.examine()
                return
            except EngineDead as again:
                again.role = again.role or death.role
                death = again

    def _give_up_condemned(self) -> None:
        """Only now that the engines are seen to work for others: a broken engine condemns every chain."""
        for chain in self.ledger.condemned:
            chain.give_up("its requests killed the engine, twice among others and once alone")
            self.ledger.finish(chain)
        self.ledger.condemned = []


def _halves(group: list[Chain]) -> list[list[Chain]]:
    middle = len(group) // 2
    return [half for half in (group[middle:], group[:middle]) if half]


def choose_schedule(config: ScheduleConfig, free_running: bool) -> Schedule:
    """The configured one with its options; `free_running` policies never wait for anything."""
    if free_running:
        return continuous
    match config.name:
        case "overlapped":
            return partial(overlapped, cohorts=config.cohorts or 1)
        case "waves":
            return waves if config.wave is None else partial(waves, wave=config.wave)
        case name:
            return SCHEDULES[name]
