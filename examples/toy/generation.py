"""Plain transformers generation, step by step and batched: SpecReason in miniature, for making and measuring the pair.

It shares the chat format and the judge with the project, and nothing else: an independent check of the real schedules.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from transformers import Qwen2ForCausalLM

from examples.toy.task import Problem, Step, differs_in_result_only, expected_step
from specreason_batch.chat import ChatFormat
from specreason_batch.judge import Judge

MAX_STEP_TOKENS = 32
MAX_STEPS = 14
MAX_ANSWER_TOKENS = 24
BATCH_SIZE = 250

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Decoding:
    temperature: float  # 0: greedy
    top_p: float = 1.0


GREEDY = Decoding(0.0)
PAPER = Decoding(0.6, 0.95)


@dataclass(frozen=True, slots=True)
class Written:
    """A step in token ids and as text; `ids` are without think-close and end-of-text."""

    ids: list[int]
    step: Step


@dataclass(frozen=True, slots=True)
class Verdict:
    accepted: bool
    score: float | None = None


@dataclass(slots=True)
class Run:
    """One chain being written."""

    problem: Problem
    context: list[int]
    steps: list[Step] = field(default_factory=list)
    drafts: list[Step] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    drafts_right: list[bool] = field(default_factory=list)
    answer: str = ""
    num_answer_tokens: int = 0

    @property
    def expected(self) -> Step:
        return expected_step(self.problem, self.steps)

    @property
    def is_thinking(self) -> bool:
        return not (self.steps and self.steps[-1].closes) and len(self.steps) < MAX_STEPS

    def add_draft(self, draft: Written, verdict: Verdict) -> None:
        self.drafts.append(draft.step)
        self.drafts_right.append(draft.step == self.expected)
        self.verdicts.append(verdict)

    def append(self, written: Written) -> None:
        self.steps.append(written.step)
        self.context += written.ids


class Author(Protocol):
    """Who can write the next step of many runs at once."""

    def write(self, runs: Sequence[Run]) -> list[Written]: ...


Accept = Callable[[Sequence[Run], Sequence[Written]], list[Verdict]]


@dataclass(frozen=True, slots=True)
class ModelAuthor:
    model: Qwen2ForCausalLM
    chat: ChatFormat
    decoding: Decoding

    def write(self, runs: Sequence[Run]) -> list[Written]:
        stops = self.chat.blank_line_ids | self.chat.end_ids | {self.chat.think_close_id}
        rows = generate(self.model, [run.context for run in runs], stops, MAX_STEP_TOKENS, self.decoding)
        return [self._written(row) for row in rows]

    def write_answers(self, runs: Sequence[Run]) -> None:
        contexts = [[*run.context, self.chat.think_close_id] for run in runs]
        rows = generate(self.model, contexts, self.chat.end_ids, MAX_ANSWER_TOKENS, self.decoding)
        for run, row in zip(runs, rows, strict=True):
            run.answer, run.num_answer_tokens = self.chat.decode(row), len(row)

    def _written(self, row: list[int]) -> Written:
        closes = row[-1] in self.chat.end_ids | {self.chat.think_close_id}
        ids = row[:-1] if closes else row
        return Written(ids, Step(self.chat.decode(ids), closes))


@dataclass(frozen=True, slots=True)
class CheckerAuthor:
    """Writes the right step by rule."""

    chat: ChatFormat

    def write(self, runs: Sequence[Run]) -> list[Written]:
        return [Written(self.chat.encode_text(run.expected.text), run.expected) for run in runs]


def simulate(
    problems: Sequence[Problem], chat: ChatFormat, draft: Author | None, base: Author, accept: Accept
) -> list[Run]:
    """Write chains step by step: the draft first (if there is one), the base where `accept` says no. No answers yet."""
    runs = [Run(problem, chat.opening(problem.prompt)) for problem in problems]
    while active := [run for run in runs if run.is_thinking]:
        for batch in _batches_of(active):
            _round(batch, draft, base, accept)
    return runs


def _round(runs: Sequence[Run], draft: Author | None, base: Author, accept: Accept) -> None:
    left = _drafted_round(runs, draft, accept) if draft else runs
    if left:
        for run, rewrite in zip(left, base.write(left), strict=True):
            run.append(rewrite)


def _drafted_round(runs: Sequence[Run], draft: Author, accept: Accept) -> list[Run]:
    """Append what is accepted. Returns the runs that still want their step."""
    drafts = draft.write(runs)
    for run, written, verdict in zip(runs, drafts, accept(runs, drafts), strict=True):
        run.add_draft(written, verdict)
        if verdict.accepted:
            run.append(written)
    return [run for run in runs if not run.verdicts[-1].accepted]


# Ways to accept.


def accept_all(runs: Sequence[Run], drafts: Sequence[Written]) -> list[Verdict]:
    return [Verdict(True)] * len(runs)


def accept_at_random(rate: float, rng: random.Random) -> Accept:
    return lambda runs, drafts: [Verdict(rng.random() < rate) for _ in runs]


def accept_right(lenience: float, rng: random.Random) -> Accept:
    """Right steps, and some of those with nothing but a wrong result."""

    def accept(run: Run, draft: Written) -> Verdict:
        lenient = differs_in_result_only(draft.step, run.expected) and rng.random() < lenience
        return Verdict(draft.step == run.expected or lenient)

    return lambda runs, drafts: [accept(*pair) for pair in zip(runs, drafts, strict=True)]


def accept_graded(model: Qwen2ForCausalLM, judge: Judge, threshold: float) -> Accept:
    def accept(runs: Sequence[Run], drafts: Sequence[Written]) -> list[Verdict]:
        contexts = [[*run.context, *draft.ids, *judge.turn] for run, draft in zip(runs, drafts, strict=True)]
        scores = read_scores(model, judge, contexts)
        return [Verdict(score is not None and score >= threshold, score) for score in scores]

    return accept


@torch.inference_mode()
def read_scores(model: Qwen2ForCausalLM, judge: Judge, contexts: Sequence[list[int]]) -> list[float | None]:
    """The grade after each context, read as the project reads it."""
    scores: list[float | None] = []
    for batch in _batches_of(contexts):
        ids = torch.tensor(_right_padded(batch, filler=0))
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        ends = torch.tensor([len(context) - 1 for context in batch])
        logprobs = model.lm_head(hidden[torch.arange(len(batch)), ends]).log_softmax(-1)
        scores += [judge.read(dict(enumerate(row.tolist())), int(row.argmax())).score for row in logprobs]
    return scores


@torch.inference_mode()
def generate(
    model: Qwen2ForCausalLM, contexts: Sequence[list[int]], stops: frozenset[int], max_tokens: int, decoding: Decoding
) -> list[list[int]]:
    """Continue each context up to and with the first stop."""
    width = max(map(len, contexts))
    ids = torch.tensor([[0] * (width - len(context)) + context for context in contexts])
    mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
    chosen = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    options = chosen if decoding.temperature > 0 else {"do_sample": False, "temperature": None, "top_p": None}
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=max_tokens, eos_token_id=sorted(stops), pad_token_id=0, **options
    )
    return [_until_stop(row, stops) for row in output[:, width:].tolist()]


def _until_stop(row: list[int], stops: frozenset[int]) -> list[int]:
    end = next((index for index, id in enumerate(row) if id in stops), len(row) - 1)
    return row[: end + 1]


def _right_padded(rows: Sequence[list[int]], filler: int) -> list[list[int]]:
    width = max(map(len, rows))
    return [row + [filler] * (width - len(row)) for row in rows]


def _batches_of(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    return (items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE))
