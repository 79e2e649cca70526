"""Whether an answer is the expected one, by kind. Runs in a worker; pure, but for the time that it takes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from specreason_batch.store.verdicts import AnswerKind
from specreason_batch.verify.meaning import Unsure, is_same_meaning
from specreason_batch.verify.shapes import Listing, read_listing
from specreason_batch.verify.spelling import is_same_spelling, is_same_text, read_letter, read_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is to be found out."""

    kind: AnswerKind
    expected: str
    extracted: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was found out."""

    same: bool | None  # None: it could not be compared
    reason: str | None = None  # for None
    seconds: float = 0.0


def compare(comparison: Comparison) -> Outcome:
    """Never raises; may take for ever."""
    began = time.monotonic()
    try:
        same = _BY_KIND[comparison.kind](comparison.expected, comparison.extracted)
        outcome = Outcome(same=same)
    except Unsure as error:
        outcome = Outcome(same=None, reason=str(error))
    except MemoryError:
        raise
    except Exception as error:  # SymPy raises of every kind; which one is told, and nothing is judged
        outcome = Outcome(same=None, reason=f"the comparison failed: {type(error).__name__}")
    return replace(outcome, seconds=time.monotonic() - began)


def _is_same_letter(expected: str, extracted: str) -> bool:
    letter = read_letter(expected)
    return letter is not None and letter == read_letter(extracted)


def _is_same_number(expected: str, extracted: str) -> bool:
    """Exactly, where both are plain numbers; else by meaning, as 1/2 and 0.5."""
    ours, theirs = read_number(expected), read_number(extracted)
    return _is_same_math(expected, extracted) if ours is None or theirs is None else ours == theirs


def _is_same_math(expected: str, extracted: str) -> bool:
    if is_same_spelling(expected, extracted):
        return True
    ours, theirs = read_listing(expected), read_listing(extracted)
    if ours is None or theirs is None:
        return is_same_meaning(expected, extracted)
    return _is_same_listing(ours, theirs)


def _is_same_listing(expected: Listing, extracted: Listing) -> bool:
    """In the same brackets and order; sets in any order, each item once. `x=6, y=7` may be `(6,7)` and `6,7`."""
    if len(expected.items) != len(extracted.items):
        return False
    if expected.is_assignments != extracted.is_assignments:
        bare = extracted if expected.is_assignments else expected
        return bare.brackets in ("", "()") and _is_same_in_order(expected, extracted)
    if expected.brackets != extracted.brackets:
        return False
    if expected.brackets:
        return _is_same_in_order(expected, extracted)
    return _match(expected.items, list(extracted.items))


def _is_same_in_order(expected: Listing, extracted: Listing) -> bool:
    return all(map(_is_same_number, expected.items, extracted.items))


def _match(expected: Sequence[str], left: list[str]) -> bool:
    for item in expected:
        found = next((other for other in left if _is_same_number(item, other)), None)
        if found is None:
            return False
        left.remove(found)
    return True


_BY_KIND: dict[AnswerKind, Callable[[str, str], bool]] = {
    AnswerKind.math: _is_same_math,
    AnswerKind.choice: _is_same_letter,
    AnswerKind.number: _is_same_number,
    AnswerKind.text: is_same_text,
}
