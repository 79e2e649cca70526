"""What a workload would take on given hardware: the real schedules and policies over simulated engines.

Owns: workloads (lengths and acceptance in place of models) and what is read off a simulated run. The machine is
`simulated_engine`'s, its figures are `profiles`'.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

from specreason_batch.chain import Chain, Context, Limits
from specreason_batch.policies import POLICIES, Rules
from specreason_batch.rounds import RoundStats
from specreason_batch.schedules import Admission, Capacity, Driver, Schedule
from specreason_batch.seeds import stable_coin, stable_seed, stable_uniform
from specreason_batch.simulated_engine import CostProfile, SimulatedEngine, VirtualClock
from specreason_batch.types import (
    AnswerEnd,
    Ask,
    Completion,
    EndedBy,
    FinishReason,
    Grade,
    GradeOf,
    Prompt,
    Request,
    Result,
    Role,
    Sampling,
    Write,
    WriteAnswer,
    WriteThinking,
    WrittenAnswer,
    WrittenStep,
)

GREEDY = Sampling(temperature=0.0)
ACCEPTED = Grade((0.0,) * 9 + (1.0,), 1.0, 9.0)
REJECTED = Grade((1.0,) + (0.0,) * 9, 1.0, 0.0)
NO_LIMIT = 1 << 40
UNLIMITED = Limits(max_step_tokens=NO_LIMIT, thinking_tokens=NO_LIMIT, repeated_steps=NO_LIMIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Lengths in tokens, and how often a draft is kept. It stands where the translator stands: it makes requests of
    asks. Everything is drawn from the seed, by chain and step, so that nothing depends on the schedule.

    A request's `seed` is the token that its completion repeats; the token says which step it is, and what became of it.
    """

    step_tokens: float  # mean
    step_spread: float = 0.5  # standard deviation of a step's length over its mean (normal, at least one token)
    num_steps: int = 100  # a chain, mean; uniform from half to one and a half
    prompt_tokens: int = 100
    turn_tokens: int = 70  # the grading turn
    answer_tokens: int = 1
    accept_rate: float = 0.7  # of the drafts; 0-1
    seed: int = 0

    def chains(self) -> Iterator[Chain]:
        """As many as anybody wants."""
        for number in itertools.count():
            chain_seed = stable_seed(self.seed, number)
            contexts = {role: Context([0] * self.prompt_tokens, NO_LIMIT, 0) for role in Role}
            yield Chain(Prompt(prompt_id=str(number), prompt=""), 0, chain_seed, UNLIMITED, contexts)

    def request(self, chain: Chain, ask: Ask, request_id: str) -> Request:
        index = len(chain.steps)
        match ask:
            case Write(role=role):
                closes = index + 1 >= self._num_steps(chain)
                return request_of(
                    chain, ask, request_id, self._step_length(chain, role), step_token(index, role, closes)
                )
            case GradeOf(draft=draft):
                accepted = stable_coin(self.accept_rate, chain.seed, index)
                return grade_request_of(chain, ask, request_id, draft, self.turn_tokens, accepted)
            case WriteAnswer():
                return request_of(chain, ask, request_id, self.answer_tokens)
            case WriteThinking():
                raise NotImplementedError("simulated chains are written step by step")

    def result(self, chain: Chain, ask: Ask, completion: Completion) -> Result:
        return result_of(ask, completion)

    def _step_length(self, chain: Chain, role: Role) -> int:
        drawn = NormalDist(self.step_tokens, self.step_spread * self.step_tokens) if self.step_spread else None
        uniform = stable_uniform(chain.seed, len(chain.steps), role)
        return max(1, round(drawn.inv_cdf(uniform) if drawn else self.step_tokens))

    def _num_steps(self, chain: Chain) -> int:
        return max(1, round(self.num_steps * (0.5 + stable_uniform(chain.seed, "steps"))))


def request_of(
    chain: Chain, ask: Ask, request_id: str, num_tokens: int, token: int = 0, suffix: tuple[int, ...] = ()
) -> Request:
    """A request whose completion is this token so many times."""
    return Request(
        request_id=request_id,
        prompt_token_ids=chain.contexts[ask.engine].ids,
        suffix_token_ids=suffix,
        max_tokens=num_tokens,
        sampling=GREEDY,
        seed=token,
    )


def grade_request_of(
    chain: Chain, ask: Ask, request_id: str, draft: WrittenStep, turn_tokens: int, accepted: bool
) -> Request:
    """A request for a grade, whose one token says whether the draft is kept."""
    return request_of(chain, ask, request_id, 1, int(accepted), (*draft.token_ids, *(0,) * turn_tokens))


def result_of(ask: Ask, completion: Completion) -> Result:
    """What the tokens of such a completion say."""
    ids = completion.token_ids
    match ask:
        case Write(role=role):
            ended_by = EndedBy.think_close if _closes(ids[0]) else EndedBy.blank_line
            return WrittenStep(role, ended_by, dict.fromkeys(Role, ids), len(ids))
        case GradeOf():
            return ACCEPTED if ids[0] else REJECTED
        case WriteAnswer(role=role):
            return WrittenAnswer(role, ids, len(ids), AnswerEnd.stop)
        case WriteThinking():
            raise NotImplementedError("simulated chains are written step by step")


def repeat_token(request: Request) -> Completion:
    """The simulated engines' script."""
    assert request.seed is not None
    return Completion(
        request_id=request.request_id,
        token_ids=(request.seed,) * request.max_tokens,
        finish_reason=FinishReason.stop,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Two engines' costs, and what they share."""

    draft: CostProfile
    base: CostProfile
    shared: bool = True  # one device; False: each has its own
    cores: float | None = None  # that engines and caller compute on, of CPUs; None: nobody lacks one

    def clock(self) -> VirtualClock:
        return VirtualClock(self.cores)

    def engines(self, clock: VirtualClock) -> dict[Role, SimulatedEngine]:
        """Both, idle, on this clock."""
        return {
            Role.base: SimulatedEngine(repeat_token, self.base, clock, "0"),
            Role.draft: SimulatedEngine(repeat_token, self.draft, clock, "0" if self.shared else "1"),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a simulated run came to, from the end of its warm-up on."""

    seconds: float
    num_kept_tokens: int
    num_chains: int  # finished
    idle_share: float  # of the time, with no request outstanding
    busy_share: dict[Role, float]
    mean_requests: dict[Role, float]  # outstanding
    num_recomputed_tokens: int
    num_parked: int

    @property
    def tokens_per_second(self) -> float:
        return self.num_kept_tokens / self.seconds


def simulate(
    schedule: Schedule,
    policy: str,
    workload: Workload,
    hardware: Hardware,
    active_size: int,
    seconds: float,
    bounded: bool = True,
) -> Simulated:
    """Virtual `seconds` of an endless run, after a tenth of them to warm up. `bounded`: by KV memory too."""
    clock = hardware.clock()
    engines = hardware.engines(clock)
    started: list[Chain] = []
    capacities = {role: Capacity.of(engine.info) for role, engine in engines.items()}
    admission = Admission(_kept(workload.chains(), started), active_size, capacities, bounded)
    rules = Rules(accept_rate=workload.accept_rate, threshold=5.0)
    spec = POLICIES[policy]
    driver = Driver(engines, workload, partial(spec.coroutine, rules=rules), admission)
    stats: list[RoundStats] = []
    warm_at = warm_tokens = 0.0
    for report in schedule(driver):
        if clock.now() < 0.1 * seconds:
            warm_at, warm_tokens = clock.now(), sum(chain.num_kept_tokens for chain in started)
            continue
        stats.append(report.stats)
        if clock.now() >= seconds:
            break
    total = sum(item.seconds for item in stats)
    return Simulated(
        seconds=clock.now() - warm_at,
        num_kept_tokens=int(sum(chain.num_kept_tokens for chain in started) - warm_tokens),
        num_chains=sum(item.num_finished for item in stats),
        idle_share=sum(item.idle_seconds for item in stats) / total,
        busy_share={role: sum(item.busy_seconds.get(role, 0.0) for item in stats) / total for role in Role},
        mean_requests={role: sum(item.request_seconds.get(role, 0.0) for item in stats) / total for role in Role},
        num_recomputed_tokens=sum(phase.num_recomputed_tokens for item in stats for phase in item.phases.values()),
        num_parked=sum(item.num_parked for item in stats),
    )


def _kept(chains: Iterator[Chain], kept: list[Chain]) -> Iterator[Chain]:
    for chain in chains:
        kept.append(chain)
        yield chain


def step_token(index: int, role: Role, closes: bool = False) -> int:
    """The token that a step consists of: its place, its author, whether it closes thinking."""
    return 4 * (index + 1) + 2 * (role is Role.base) + closes


def _closes(token: int) -> bool:
    return token % 2 == 1
