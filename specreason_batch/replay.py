"""Recorded chains once more, in virtual time: what the same work would have taken with another schedule, active size or
hardware. What was written and decided stays as it was.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from specreason_batch.chain import Chain, Context
from specreason_batch.rounds import RoundStats
from specreason_batch.schedules import Admission, Capacity, Driver, Schedule
from specreason_batch.simulation import (
    NO_LIMIT,
    UNLIMITED,
    Hardware,
    grade_request_of,
    request_of,
    result_of,
    step_token,
)
from specreason_batch.types import (
    Ask,
    Completion,
    Coroutine,
    GradeOf,
    Prompt,
    Request,
    Result,
    Role,
    Write,
    WriteAnswer,
    WriteThinking,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """Who wrote a step and what became of it, in tokens."""

    draft_tokens: int | None  # None: the draft was not asked
    graded: bool
    base_tokens: int | None  # None: the draft's was kept


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedChain:
    """A finished chain, in tokens."""

    prompt_tokens: int
    steps: Sequence[RecordedStep]
    answer_tokens: int
    answer_role: Role = Role.base


@dataclass(frozen=True, slots=True)
class Recording:
    """Chains of a run. It stands where the translator stands, and its `policy` where the run's stood."""

    recorded: Sequence[RecordedChain]
    turn_tokens: int  # the grading turn's
    roles: tuple[Role, ...] = tuple(Role)  # whose engines the run had

    def chains(self) -> Iterator[Chain]:
        for number, recorded in enumerate(self.recorded):
            contexts = {role: Context([0] * recorded.prompt_tokens, NO_LIMIT, 0) for role in self.roles}
            yield Chain(Prompt(prompt_id=str(number), prompt="", row=number), 0, number, UNLIMITED, contexts)

    def policy(self, chain: Chain) -> Coroutine:
        """Ask for what was asked for."""
        recorded = self.recorded[chain.prompt.row]
        for step in recorded.steps:
            draft = (yield Write(Role.draft)) if step.draft_tokens is not None else None
            grade = (yield GradeOf(draft)) if draft is not None and step.graded else None
            if draft is not None and step.base_tokens is None:
                chain.append(draft, grade=grade, accepted=True)
            else:
                chain.append((yield Write(Role.base)), rejected=draft, grade=grade, accepted=False)
        if recorded.answer_tokens:
            chain.answer = yield WriteAnswer(recorded.answer_role)

    def request(self, chain: Chain, ask: Ask, request_id: str) -> Request:
        recorded, index = self.recorded[chain.prompt.row], len(chain.steps)
        match ask:
            case Write(role=role):
                step = recorded.steps[index]
                num_tokens = step.draft_tokens if role is Role.draft else step.base_tokens
                assert num_tokens is not None
                return request_of(chain, ask, request_id, num_tokens, step_token(index, role))
            case GradeOf(draft=draft):
                kept = recorded.steps[index].base_tokens is None
                return grade_request_of(chain, ask, request_id, draft, self.turn_tokens, kept)
            case WriteAnswer():
                return request_of(chain, ask, request_id, recorded.answer_tokens)
            case WriteThinking():
                raise NotImplementedError("simulated chains are written step by step")

    def result(self, chain: Chain, ask: Ask, completion: Completion) -> Result:
        return result_of(ask, completion)


def replay(
    recording: Recording, schedule: Schedule, hardware: Hardware, active_size: int, fit_memory: bool = True
) -> list[RoundStats]:
    """The rounds that it would have had, in virtual seconds."""
    engines = {role: engine for role, engine in hardware.engines(hardware.clock()).items() if role in recording.roles}
    capacities = {role: Capacity.of(engine.info) for role, engine in engines.items()}
    admission = Admission(recording.chains(), active_size, capacities, fit_memory)
    driver = Driver(engines, recording, recording.policy, admission)
    return [report.stats for report in schedule(driver)]
