"""The grading turn: what the base is asked about a drafted step, and how its reply is read (paper, section 3).

Owns: the question, the labels and their token ids, and log-probabilities -> Grade. Pure.
Does not know: chains, thresholds (a policy's), engines.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from specreason_batch.chat import ChatFormat
from specreason_batch.types import Grade, InvalidInput

DIGITS = tuple("0123456789")


class Reading(StrEnum):
    """How a score is read from the label probabilities."""

    expected = "expected"  # mean digit over the renormalised digits, 0-9
    greedy = "greedy"  # the likeliest token, if it is a digit, 0-9
    yes_no = "yes_no"  # probability of yes, 0-1


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The grading turn in words."""

    question: str
    reply_opening: str  # the words before the label, put into the base's mouth after its think tag
    reading: Reading = Reading.expected
    mass_floor: float = 0.5  # label mass under which a grade is unreadable (greedy: not used)
    labels: tuple[str, ...] = DIGITS  # yes_no: (no, yes)


class Judge:
    """A `Question` in the base's token ids."""

    def __init__(self, question: Question, base: ChatFormat):
        """Raises InvalidInput if a label is not a single token after `reply_opening`."""
        self.question = question
        self.turn = base.turn_change(question.question, question.reply_opening)  # appended to chain and drafted step
        self.label_ids = tuple(self._label_id(label, base) for label in question.labels)
        if len(set(self.label_ids)) != len(self.label_ids):
            raise InvalidInput(f"judge.labels: {list(question.labels)} do not have token ids of their own")

    def read(self, logprobs: Mapping[int, float], likeliest_id: int) -> Grade:
        """Log-probabilities at the one generated position, and the greedy token there, to a grade.

        A label missing from `logprobs` counts as probability zero.
        """
        probs = tuple(math.exp(logprobs[id]) if id in logprobs else 0.0 for id in self.label_ids)
        return Grade(probs, mass := sum(probs), self._score(probs, mass, likeliest_id))

    def _score(self, probs: tuple[float, ...], mass: float, likeliest_id: int) -> float | None:
        if self.question.reading is Reading.greedy:
            return float(self.label_ids.index(likeliest_id)) if likeliest_id in self.label_ids else None
        if mass <= 0.0 or mass < self.question.mass_floor:
            return None
        return sum(value * prob for value, prob in enumerate(probs)) / mass

    def _label_id(self, label: str, base: ChatFormat) -> int:
        longer = base.turn_change(self.question.question, self.question.reply_opening + label)
        if len(longer) != len(self.turn) + 1 or longer[:-1] != self.turn:
            raise InvalidInput(
                f"judge.reply_opening: after {self.question.reply_opening!r} the label {label!r} is not a single token "
                f"of the base's vocabulary (ids {longer[len(self.turn) - 1 :]})"
            )
        return longer[-1]
