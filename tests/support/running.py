"""Running a world through the package: translator, engines, policy and schedule put together, and what came out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from specreason_batch.chain import Chain, Policy
from specreason_batch.clock import Clock, WallClock
from specreason_batch.engine import Script
from specreason_batch.policies import POLICIES, Rules
from specreason_batch.rounds import RoundReport
from specreason_batch.schedules import SCHEDULES, Admission, Capacity, Driver
from specreason_batch.scripted_engine import ScriptedEngine
from specreason_batch.simulated_engine import SimulatedEngine, VirtualClock
from specreason_batch.simulation import Hardware, Workload, repeat_token
from specreason_batch.store.schemas import chain_rows
from specreason_batch.translator import Decoding, Translator, Voice
from specreason_batch.types import Completion, Prompt, Request, Role
from tests.support.plain_loop import COUNTED_ELSEWHERE, VOLATILE, Row
from tests.support.worlds import World


def translator_of(world: World) -> Translator:
    decoding = Decoding(temperature=world.temperature, top_p=0.95, top_k=0)
    voices = {
        role: Voice(format=chat, window=world.window(role), steps=decoding, answers=decoding)
        for role, chat in world.formats.items()
    }
    return Translator(
        voices, world.judge, world.limits, world.max_answer_tokens, world.run_seed, world.seeded, world.vocabulary_case
    )


def policy_of(world: World) -> Policy:
    rules = Rules(
        threshold=world.threshold,
        first_n_base_steps=world.first_n_base_steps,
        accept_rate=world.accept_rate,
        answer_role=world.answer_role,
    )
    return partial(POLICIES[world.policy].coroutine, rules=rules)


class RecordingEngine(ScriptedEngine):
    """A scripted engine that keeps every batch, every completion handed out, and what was outstanding at each poll."""

    def __init__(self, script: Script, max_model_len: int, order_seed: int, clock: Clock, kv_capacity_tokens: int):
        super().__init__(script, max_model_len, 1 << 17, order_seed, clock, kv_capacity_tokens)
        self.submitted: list[list[Request]] = []
        self.lent: dict[str, Request] = {}  # as it was asked, its prompt still the chain's own
        self.completions: list[Completion] = []
        self.outstanding_at_poll: list[int] = []

    def submit(self, requests: Sequence[Request]) -> None:
        super().submit(requests)
        self.submitted.append(self.requests[-len(requests) :])
        self.lent |= {request.request_id: request for request in requests}

    def poll(self, timeout: float) -> list[Completion]:
        self.outstanding_at_poll.append(self.num_outstanding)
        for id, request in self._waiting.items():
            assert self.lent[id].whole_prompt() == request.prompt_token_ids, "a chain changed under its request"
        completions = super().poll(timeout)
        self.completions += completions
        return completions


@dataclass(slots=True)
class Run:
    """One run of a world, walked to its end or to where it raised."""

    world: World
    schedule: str = "lockstep"
    active_size: int = 3
    order_seed: int = 0
    policy: Policy | None = None
    wrap: Callable[[Role, Script], Script] = lambda role, script: script
    check_stop: Callable[[], None] = lambda: None
    kv_capacity: int = 1 << 20  # tokens, of each engine
    engines: dict[Role, RecordingEngine] = field(default_factory=dict)
    translator: Translator = field(init=False)
    admission: Admission = field(init=False)  # of the last driver
    chains: list[Chain] = field(default_factory=list)  # every one that was started
    reports: list[RoundReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.translator = translator_of(self.world)
        clock = WallClock()
        for index, role in enumerate(self.world.roles):
            script = self.wrap(role, self.world.model(role))
            order_seed = 2 * self.order_seed + index
            self.engines[role] = RecordingEngine(script, self.world.window(role), order_seed, clock, self.kv_capacity)

    def driver(self) -> Driver:
        capacities = {role: Capacity.of(engine.info) for role, engine in self.engines.items()}
        self.admission = Admission(self._open(), self.active_size, capacities)
        policy = self.policy or policy_of(self.world)
        return Driver(self.engines, self.translator, policy, self.admission, self.check_stop)

    def walk(self) -> Iterator[RoundReport]:
        """The schedule's reports, kept as they come."""
        for report in SCHEDULES[self.schedule](self.driver()):
            self.reports.append(report)
            yield report

    def to_end(self) -> "Run":
        for _ in self.walk():
            pass
        return self

    def _open(self) -> Iterator[Chain]:
        for prompt_id, sample_index in self.world.keys:
            prompt = Prompt(prompt_id=prompt_id, prompt=self.world.prompts[int(prompt_id[1:])])
            self.chains.append(self.translator.open(prompt, sample_index))
            yield self.chains[-1]

    @property
    def finished(self) -> list[Chain]:
        return [chain for report in self.reports for chain in report.finished]

    def rows(self) -> dict[tuple[str, int], tuple[Row, list[Row]]]:
        """The finished chains' rows without the volatile columns."""
        made = {}
        for chain in self.finished:
            assert chain.key not in made, "a chain finished twice"
            row, steps = chain_rows(chain, self.translator, has_gold_answer=False)
            made[chain.key] = _steady(row), [_steady(step) for step in steps]
        return made


def _steady(row: Row) -> Row:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in row.items()}
    return {name: value for name, value in plain.items() if name not in (*VOLATILE, *COUNTED_ELSEWHERE)}


def run_world(world: World, **settings: Any) -> Run:
    return Run(world, **settings).to_end()


def run_workload(
    workload: Workload,
    hardware: Hardware,
    *,
    num_chains: int,
    schedule: str = "lockstep",
    policy: str = "specreason",
    active_size: int = 64,
    bounded: bool = True,
) -> list[RoundReport]:
    """So many chains of a workload to their ends, in virtual time."""
    clock = VirtualClock()
    profiles = {Role.draft: hardware.draft, Role.base: hardware.base}
    roles = [role for role in Role if role in POLICIES[policy].roles]
    engines = {role: SimulatedEngine(repeat_token, profiles[role], clock) for role in roles}
    capacities = {role: Capacity.of(engine.info) for role, engine in engines.items()}
    admission = Admission(islice(workload.chains(), num_chains), active_size, capacities, bounded)
    rules = Rules(accept_rate=workload.accept_rate, threshold=5.0)
    driver = Driver(engines, workload, partial(POLICIES[policy].coroutine, rules=rules), admission)
    return list(SCHEDULES[schedule](driver))
