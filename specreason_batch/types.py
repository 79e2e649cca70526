"""The values that every other module speaks in (docs/design.md, section 2), all frozen.

Owns: what a prompt, a request, a completion, a grade and a step are, and what a policy may ask for.
Does not know: text, tokenizers, chat templates, engines, files, configuration.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class InvalidInput(Exception):
    """The user's configuration or input cannot be used. The message names the thing, its value and what is allowed."""


class Role(StrEnum):
    """Which of the two models."""

    draft = "draft"
    base = "base"


class EndedBy(StrEnum):
    """What ended a step."""

    blank_line = "blank_line"  # a token whose text contains a blank line; it belongs to the step
    think_close = "think_close"  # a flag of the step, not part of its body
    end_of_text = "end_of_text"  # likewise
    max_tokens = "max_tokens"  # max_step_tokens, the budget or the window
    special = "special"  # any other special token; it and what came after it were dropped


class ThinkingEnd(StrEnum):
    """Why a chain stopped thinking."""

    closed = "closed"  # a kept step closed it
    budget = "budget"  # thinking_tokens kept, or generated_tokens generated
    context = "context"  # no room for another step in one of the two windows
    repetition = "repetition"  # the same step `repeated_steps` times running
    error = "error"  # given up; a row in `rejects` says why


class AnswerEnd(StrEnum):
    """How the answer ended."""

    stop = "stop"
    length = "length"
    none = "none"  # never asked for: the chain ended in error


class FinishReason(StrEnum):
    """How an engine finished a request."""

    stop = "stop"
    length = "length"
    abort = "abort"  # cut short by a signal or an abort: the tokens must not be used
    refused = "refused"  # never reached the engine: it was invalid


class Phase(StrEnum):
    """What a request is for; the unit in which rounds are accounted."""

    draft = "draft"
    grade = "grade"
    rewrite = "rewrite"  # any step written by the base
    answer = "answer"


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One usable input row."""

    prompt_id: str
    prompt: str
    messages: tuple[Message, ...] = ()  # a whole conversation in place of the prompt; its last turn is the user's
    system_prompt: str | None = None  # in place of the configuration's
    row: int = 0  # in its file, counted from 0
    gold_answer: str | None = None
    extra: Row = field(default_factory=dict)  # the input's other columns, by their own names


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request is sampled; shared by all requests of a kind."""

    temperature: float  # >= 0; 0 is greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0: all
    stop_token_ids: tuple[int, ...] = ()  # generation ends with one of these, which is part of token_ids
    stop_strings: tuple[str, ...] = ()  # only for vocabularies that lack a suitable token
    logprob_token_ids: tuple[int, ...] = ()  # report these tokens' log-probabilities at the first position


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an engine is asked for: a continuation of `prompt_token_ids` followed by `suffix_token_ids`.

    The prompt is the chain's own list, lent until the request's completion (a chain does not change meanwhile), so that
    asking costs the same however long the chain is.
    """

    request_id: str  # unique among the engine's outstanding requests
    prompt_token_ids: list[int]
    suffix_token_ids: tuple[int, ...] = ()
    max_tokens: int  # >= 1
    sampling: Sampling
    seed: int | None = None  # 63 bits; None: the engine's own randomness

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.suffix_token_ids)

    def whole_prompt(self) -> list[int]:
        """Prompt and suffix; the lent list itself where there is no suffix."""
        return [*self.prompt_token_ids, *self.suffix_token_ids] if self.suffix_token_ids else self.prompt_token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine gives back for one request."""

    request_id: str
    token_ids: tuple[int, ...]  # stop token included
    finish_reason: FinishReason
    logprobs: Mapping[int, float] = field(default_factory=dict)  # by token id, natural log, at the first position
    num_cached_tokens: int = 0  # prompt tokens that were not computed again
    error: str | None = None  # for `refused`: what was wrong

    @classmethod
    def refusal(cls, request: Request, error: str) -> "Completion":
        """What an engine gives back for an invalid request."""
        return cls(request_id=request.request_id, token_ids=(), finish_reason=FinishReason.refused, error=error)


@dataclass(frozen=True, slots=True)
class WrittenStep:
    """A step as one role wrote it, before anybody decided on it."""

    author: Role
    ended_by: EndedBy
    bodies: Mapping[Role, tuple[int, ...]]  # the step in each role's ids, without think-close and end-of-text
    num_tokens: int  # generated by the author for it, closing and dropped tokens included
    is_blank: bool = False  # white space alone

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The body in its author's ids."""
        return self.bodies[self.author]

    @property
    def closes(self) -> bool:
        """Whether its author wants thinking to end here (an end-of-text is a wish to close)."""
        return self.ended_by in (EndedBy.think_close, EndedBy.end_of_text)


@dataclass(frozen=True, slots=True)
class Grade:
    """What the base says of a drafted step."""

    probs: tuple[float, ...]  # raw probability of each label: the digits 0-9, or (no, yes)
    mass: float  # their sum: how much of the distribution the reading rests on
    score: float | None  # 0-9 (yes_no: 0-1); None: unreadable


@dataclass(frozen=True, slots=True)
class WrittenAnswer:
    """The text after the thinking."""

    role: Role
    token_ids: tuple[int, ...]  # without the end-of-text
    num_tokens: int  # generated, end-of-text included
    ended: AnswerEnd


@dataclass(frozen=True, slots=True)
class Step:
    """A step that stands in the chain, and what became of the draft before it."""

    written: WrittenStep
    rejected: WrittenStep | None = None  # the draft that it replaces
    grade: Grade | None = None  # of the draft: the step itself if kept, `rejected` if not
    accepted: bool | None = None  # None: nothing was decided (a step of the base's own, or draft_only)
    round: int = 0  # the round (or time slice) in which it was appended

    @property
    def num_generated_tokens(self) -> int:
        return self.written.num_tokens + (self.rejected.num_tokens if self.rejected else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a job may use of its machine."""

    devices: tuple[str, ...] = ()  # names of the GPUs that its engines run on, one each; empty: CPU engines
    num_cores: int = 1  # CPU cores that the process may use
    cpu: str = ""  # the processor's name


# What a policy may ask for. A coroutine yields one ask, or a tuple of them, and is sent the result (or a tuple).


@dataclass(frozen=True, slots=True)
class Write:
    """Write the next step. Result: WrittenStep."""

    role: Role
    candidate: int = 0  # tells several drafts of one step apart

    @property
    def engine(self) -> Role:
        return self.role

    @property
    def phase(self) -> Phase:
        return Phase.draft if self.role is Role.draft else Phase.rewrite


@dataclass(frozen=True, slots=True)
class WriteThinking:
    """Write all the thinking that is left in one generation. Result: a tuple of WrittenStep, cut where steps end."""

    role: Role

    @property
    def engine(self) -> Role:
        return self.role

    @property
    def phase(self) -> Phase:
        return Phase.draft if self.role is Role.draft else Phase.rewrite


@dataclass(frozen=True, slots=True)
class GradeOf:
    """Grade this drafted step as the next one of the chain. Result: Grade."""

    draft: WrittenStep

    @property
    def engine(self) -> Role:
        return Role.base

    @property
    def phase(self) -> Phase:
        return Phase.grade


@dataclass(frozen=True, slots=True)
class WriteAnswer:
    """Close thinking and write the answer. Result: WrittenAnswer."""

    role: Role = Role.base

    @property
    def engine(self) -> Role:
        return self.role

    @property
    def phase(self) -> Phase:
        return Phase.answer


Ask = Write | WriteThinking | GradeOf | WriteAnswer
Result = WrittenStep | tuple[WrittenStep, ...] | Grade | WrittenAnswer
Coroutine = Generator[Ask | tuple[Ask, ...], Any, None]
