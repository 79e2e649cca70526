"""The answer that most of a prompt's samples agree on, where there is no gold answer. Pure: equality is looked up."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from specreason_batch.store.verdicts import AnswerKind
from specreason_batch.verify.spelling import kind_of

IsSame = Callable[[str, str], bool]  # (the earlier sample's answer, a later one's); answers that are not equal strings


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """Its result."""

    winner: str | None  # as the first sample of the majority spelt it; None: there is no majority
    supporters: frozenset[str] = frozenset()  # every spelling of it
    reason: str | None = None  # why there is none


def common_kind(answers: Iterable[str]) -> AnswerKind:
    """How the samples' answers are compared: by their kind if they have the same, else as mathematics."""
    kinds = {kind_of(answer) for answer in answers}
    return kinds.pop() if len(kinds) == 1 else AnswerKind.math


def pairs(answers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What must be compared: two spellings each, in the order in which they first came."""
    return combinations(dict.fromkeys(answers), 2)


def count_votes(answers: Sequence[str | None], is_same: IsSame, majority: float) -> Vote:
    """`answers`: of all the prompt's samples in their order, None for one that gave none; it counts as a voter."""
    if len(answers) < 2:
        return Vote(winner=None, reason="no gold answer, and a single sample")
    classes = _classes([answer for answer in answers if answer is not None], is_same)
    classes.sort(key=len, reverse=True)
    if not classes or len(classes[0]) <= majority * len(answers):
        return Vote(winner=None, reason="no gold answer, and no majority among the samples")
    if len(classes[0]) == 1 or (len(classes) > 1 and len(classes[0]) == len(classes[1])):
        return Vote(winner=None, reason="no gold answer, and a tie among the samples")
    return Vote(winner=classes[0][0], supporters=frozenset(classes[0]))


def _classes(answers: Sequence[str], is_same: IsSame) -> list[list[str]]:
    """Each answer joins the first class whose first member it equals."""
    classes: list[list[str]] = []
    for answer in answers:
        for members in classes:
            if members[0] == answer or is_same(members[0], answer):
                members.append(answer)
                break
        else:
            classes.append([answer])
    return classes
