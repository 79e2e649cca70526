"""A chain: the only object that changes on the way from a prompt to a row, and what may happen to it.

Owns: appending steps, and every reason for thinking to end. Does not know: tokenizers, engines, files, who decided.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from specreason_batch.types import (
    Coroutine,
    EndedBy,
    Grade,
    Prompt,
    Role,
    Step,
    ThinkingEnd,
    WrittenAnswer,
    WrittenStep,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When thinking must end. Tokens are counted in the base's ids."""

    max_step_tokens: int  # >= 1
    thinking_tokens: int  # kept tokens (the paper's budget); >= 1
    generated_tokens: int | None = None  # kept and rejected ones; None: no such limit
    repeated_steps: int = 3  # >= 2


@dataclass(slots=True)
class Context:
    """One role's token ids of a chain: its opening and every kept step. Only ever grows at its end."""

    ids: list[int]
    window: int  # tokens: the engine's max_model_len
    reserve: int  # tokens kept free for think-close, the grading turn and the answer

    @property
    def room(self) -> int:
        """Tokens that the next step may take."""
        return self.window - self.reserve - len(self.ids)


@dataclass(slots=True)
class Usage:
    """What a chain's requests took of the engines: those whose results it keeps, or decided against.

    A result that is lost (the run was stopped before the chain took it up) is asked for again, and counted only then.
    """

    num_grade_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0  # of all its requests
    num_redone_tokens: int = 0  # generated, lost and generated again, as far as is known
    active_seconds: float = 0.0  # from its first request to its last completion, waiting included


@dataclass(slots=True)
class Chain:
    """One reasoning trajectory. A policy's state is a function of this object, so that a checkpoint is the chain."""

    prompt: Prompt
    sample_index: int
    seed: int  # the chain's own, from which its requests' seeds derive
    limits: Limits
    contexts: dict[Role, Context]
    steps: list[Step] = field(default_factory=list)
    answer: WrittenAnswer | None = None
    thinking_end: ThinkingEnd | None = None
    error: str | None = None
    usage: Usage = field(default_factory=Usage)
    round: int = 0  # set by the schedule: stamped on the steps appended meanwhile
    num_kept_tokens: int = 0
    num_generated_tokens: int = 0
    num_repeats: int = 0  # how many times running the last step came

    @property
    def is_thinking(self) -> bool:
        return self.thinking_end is None

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt.prompt_id, self.sample_index

    @property
    def max_next_tokens(self) -> int:
        """The most tokens that the next step may have."""
        return min(self.limits.max_step_tokens, self.max_thinking_tokens)

    @property
    def max_thinking_tokens(self) -> int:
        """The most tokens that all further steps may have."""
        return min(self._budget_left, *(context.room for context in self.contexts.values()))

    @property
    def _budget_left(self) -> int:
        left = self.limits.thinking_tokens - self.num_kept_tokens
        if self.limits.generated_tokens is None:
            return left
        return min(left, self.limits.generated_tokens - self.num_generated_tokens)

    def append(
        self,
        written: WrittenStep,
        *,
        rejected: WrittenStep | None = None,
        grade: Grade | None = None,
        accepted: bool | None = None,
    ) -> None:
        """Keep a step. Ends thinking where the step, a limit or a window says so."""
        assert self.is_thinking
        self.num_repeats = self.num_repeats + 1 if self._stalls(written) else 1
        step = Step(written, rejected, grade, accepted, self.round)
        self.steps.append(step)
        for role, context in self.contexts.items():
            context.ids.extend(written.bodies[role])
        self.num_kept_tokens += len(written.bodies[Role.base])
        self.num_generated_tokens += step.num_generated_tokens
        self.thinking_end = ThinkingEnd.closed if written.closes else self._limit_reached(written)

    def extend(self, written: Sequence[WrittenStep]) -> None:
        """Keep steps that were written in one go. Those after thinking's end are dropped; the last one counts them."""
        for index, step in enumerate(written):
            self.append(step)
            if not self.is_thinking:
                self._count_dropped(sum(later.num_tokens for later in written[index + 1 :]))
                return

    def _count_dropped(self, num_tokens: int) -> None:
        last = self.steps[-1]
        self.steps[-1] = replace(last, written=replace(last.written, num_tokens=last.written.num_tokens + num_tokens))
        self.num_generated_tokens += num_tokens

    def replay(self, steps: Iterable[Step]) -> None:
        """Keep steps that were decided on before: the chain is then as it was after them."""
        for step in steps:
            self.round = step.round
            self.append(step.written, rejected=step.rejected, grade=step.grade, accepted=step.accepted)

    def begin(self) -> None:
        """Look at the limits before the first step: a prompt may leave no room for any."""
        self.thinking_end = self._limit_reached()

    def give_up(self, why: str) -> None:
        """End the chain without an answer; `why` goes to `rejects`."""
        self.thinking_end, self.error = ThinkingEnd.error, why

    def _stalls(self, written: WrittenStep) -> bool:
        """No progress: white space alone, or the last step that was more than that once more."""
        if written.is_blank:
            return True
        last = next((step.written for step in reversed(self.steps) if not step.written.is_blank), None)
        return last is not None and last.bodies[Role.base] == written.bodies[Role.base]

    def _limit_reached(self, last: WrittenStep | None = None) -> ThinkingEnd | None:
        left = self.max_next_tokens
        nothing_fitted = last and last.ended_by is EndedBy.max_tokens and not last.bodies[Role.base]
        if (
            nothing_fitted and left < self.limits.max_step_tokens
        ):  # in another vocabulary one token may be more than that
            return ThinkingEnd.budget if self._budget_left == left else ThinkingEnd.context
        if self.num_repeats >= self.limits.repeated_steps:
            return ThinkingEnd.repetition
        if self._budget_left <= 0:
            return ThinkingEnd.budget
        if any(context.room <= 0 for context in self.contexts.values()):
            return ThinkingEnd.context
        return None


class Policy(Protocol):
    """Decides who writes each step and whether a draft is kept: one chain, straight-line."""

    def __call__(self, chain: Chain) -> Coroutine: ...
