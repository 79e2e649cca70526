"""What each model is trained on: packed chains of fresh problems and of the draft's own steps.

Everything goes through the project's `ChatFormat` and `Judge`, so a grade is learnt over the very ids of a real run.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from examples.toy.packing import PackedChain
from examples.toy.task import Problem, Step, answer_text, corrupted_step, current_value, expected_step, random_problem
from specreason_batch.chat import ChatFormat
from specreason_batch.judge import Judge

RIGHT_LABEL, WRONG_LABEL = 9, 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """A problem, the steps that were kept, and what the draft had written for each."""

    problem: Problem
    steps: list[Step]
    drafts: list[Step] = field(default_factory=list)

    def is_right(self, index: int) -> bool:
        return self.steps[index] == expected_step(self.problem, self.steps[:index])


@dataclass(slots=True)
class Writer:
    """Packs attempts into training sequences, in one role's ids."""

    chat: ChatFormat
    rng: random.Random
    excluded_prompts: Collection[str]  # the held-out ones
    _text_ids: dict[str, list[int]] = field(default_factory=dict)

    def fresh_problem(self) -> Problem:
        while True:
            problem = random_problem(self.rng)
            if problem.prompt not in self.excluded_prompts:
                return problem

    def fresh_attempt(self) -> Attempt:
        problem = self.fresh_problem()
        return Attempt(problem, problem.right_chain())

    def pack(self, attempt: Attempt) -> tuple[PackedChain, list[int]]:
        """The chain and its answer, wrong steps as context only; and where in the trunk each step starts and ends."""
        packed = PackedChain()
        packed.extend(self.chat.opening(attempt.problem.prompt))
        bounds = [len(packed.ids)]
        for index, step in enumerate(attempt.steps):
            packed.extend(self.ids(step.text), learnt=attempt.is_right(index))
            bounds.append(len(packed.ids))
        self._finish(packed, attempt)
        return packed, bounds

    def ids(self, text: str) -> list[int]:
        if text not in self._text_ids:
            self._text_ids[text] = self.chat.encode_text(text)
        return self._text_ids[text]

    def _finish(self, packed: PackedChain, attempt: Attempt) -> None:
        """Thinking cut short is closed for the model, as a budget does it, and answered with the value so far."""
        packed.extend([self.chat.think_close_id], learnt=attempt.steps[-1].closes)
        answer = self.ids(answer_text(current_value(attempt.problem, attempt.steps)))
        packed.extend([*answer, self.chat.tokenizer.eos_token_id], learnt=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradeLesson:
    """How a judge's question is mixed in."""

    judge: Judge
    share: float  # of the sequences
    num_pairs: int  # a sequence: each a right and a wrong step at the same place, so that every batch is balanced


@dataclass(slots=True, kw_only=True)
class BaseLessons:
    """The base's sequences: right chains and draft-written ones, with grading turns branching off them."""

    writer: Writer
    attempts: Sequence[Attempt] = ()  # the draft's; none: fresh ones only
    grade_lessons: Sequence[GradeLesson] = ()
    fresh_share: float = 0.5
    cut_share: float = 0.05

    def __call__(self) -> PackedChain:
        attempt = self._cut(self._attempt())
        packed, bounds = self.writer.pack(attempt)
        if self.grade_lessons:
            self._attach_grades(packed, bounds, attempt)
        return packed

    def _attempt(self) -> Attempt:
        rng = self.writer.rng
        fresh = not self.attempts or rng.random() < self.fresh_share
        return self.writer.fresh_attempt() if fresh else rng.choice(self.attempts)

    def _cut(self, attempt: Attempt) -> Attempt:
        """Now and then the chain so far, as a budget leaves it."""
        rng = self.writer.rng
        if rng.random() >= self.cut_share:
            return attempt
        kept = rng.randrange(1, len(attempt.steps) + 1)
        return Attempt(attempt.problem, attempt.steps[:kept], attempt.drafts[:kept])

    def _attach_grades(self, packed: PackedChain, bounds: Sequence[int], attempt: Attempt) -> None:
        rng = self.writer.rng
        [lesson] = rng.choices(self.grade_lessons, [lesson.share for lesson in self.grade_lessons])
        for index in rng.sample(range(len(attempt.steps)), min(lesson.num_pairs, len(attempt.steps))):
            is_right = attempt.is_right(index)
            ids, expected = self._step_ids(attempt, index, attempt.steps[index])
            packed.judge(bounds[index], ids, expected, is_right)
            self._attach(packed, bounds[index + 1], lesson.judge.turn, is_right, lesson.judge)
            self._attach_wrong(packed, bounds, attempt, index, lesson.judge)

    def _attach_wrong(
        self, packed: PackedChain, bounds: Sequence[int], attempt: Attempt, index: int, judge: Judge
    ) -> None:
        """A wrong step beside the chain: the draft's own where it was rejected, else one of our making."""
        before = attempt.steps[:index]
        drafted = attempt.drafts[index : index + 1]
        wrong = drafted[0] if drafted and drafted != [expected_step(attempt.problem, before)] else None
        wrong = wrong or corrupted_step(attempt.problem, before, self.writer.rng)
        ids, expected = self._step_ids(attempt, index, wrong)
        start = len(packed.ids)
        self._attach(packed, bounds[index], [*ids, *judge.turn], False, judge)
        packed.judge(start, ids, expected, False)

    def _step_ids(self, attempt: Attempt, index: int, step: Step) -> tuple[list[int], list[int]]:
        """A step's ids beside those of the right step in its place."""
        return self.writer.ids(step.text), self.writer.ids(expected_step(attempt.problem, attempt.steps[:index]).text)

    def _attach(self, packed: PackedChain, start: int, ids: list[int], is_right: bool, judge: Judge) -> None:
        label = RIGHT_LABEL if is_right else WRONG_LABEL
        packed.attach(start, ids, judge.label_ids[label])
