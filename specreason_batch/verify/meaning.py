"""Whether two single expressions mean the same: math-verify, and what it does not look at. Runs in a worker.

math-verify reads both with SymPy and compares them by value, as expressions, relations, intervals and matrices. It
was seen to call equal what is not (docs/verification.md), so that what it says is checked: another base, other words
or units, digits apart, numbers that only rounding makes the same. Nothing here ends a comparison that hangs.
"""

import re
from functools import lru_cache
from typing import Any

from math_verify import parse
from math_verify import verify as library_verify
from math_verify.parser import LatexExtractionConfig
from sympy import Expr, N

from specreason_batch.verify.spelling import is_same_spelling, laid_out, text_words

_BOXED = [LatexExtractionConfig(boxed_match_priority=0)]  # nothing but what stands in \boxed{}, which we put around it
_PERCENT = re.compile(r"\s*\\?%$")
_BASE = re.compile(r"\d_\{?(\d+)\}?$")
_DIGIT_ARGUMENTS = re.compile(r"\\frac\s*\d\s*\d|\\sqrt\s*\d|[_^]\s*\d")
_THOUSANDS = re.compile(r"(?<!\d)(\d{1,3})((?: \d{3})+)(?!\d)(?! \d)")
_PRODUCT = re.compile(r"(?<![_^\d])(\d+)\s*(?=\(\d+\))")
_DIGITS_APART = re.compile(r"\d\s+\d")
_RELATIVE_ROUNDING = 1e-5  # 0.333333 is 1/3; the library's own rounding is to six decimals, whatever the size
_NOTHING = 1e-60  # SymPy leaves 0.e-125 of 2 - 2

Readings = list[Any]  # SymPy objects, and the text itself; empty: it cannot be read


class Unsure(Exception):
    """Neither the same nor not. The message says why."""


def is_same_meaning(expected: str, extracted: str) -> bool:
    """Raises Unsure where the values are the same and the words beside them are not, or `expected` cannot be read."""
    expected, extracted = _tidy(expected), _tidy(extracted)
    if is_same_spelling(expected, extracted):
        return True
    ours, theirs = _base(expected), _base(extracted)
    if _is_digits_apart(expected) or _is_digits_apart(extracted) or (ours and theirs and ours != theirs):
        return False
    if not _is_read(_PERCENT.sub("", expected)):
        raise Unsure("the expected answer cannot be read as mathematics, and is not the same text")
    if not _is_same_value(expected, extracted):
        return False
    if theirs and not ours:
        raise Unsure("the same digits, but only the chain's answer names a base")
    _check_words(text_words(expected), text_words(extracted))
    return True


def _check_words(expected: frozenset[str], extracted: frozenset[str]) -> None:
    """Raises Unsure of cm and m; where only one has any, they tell nothing apart."""
    if expected and extracted and expected != extracted:
        raise Unsure("the same value with other words beside it")


def _tidy(text: str) -> str:
    """`1 000` is 1000; `2(9)` is a product, where the library reads a mixed number."""
    text = _THOUSANDS.sub(lambda found: found[0].replace(" ", ""), laid_out(text)).removesuffix(".")
    return _PRODUCT.sub(r"\1\\cdot ", text)


def _is_digits_apart(text: str) -> bool:
    """`7 0`, which the library multiplies."""
    return bool(_DIGITS_APART.search(_DIGIT_ARGUMENTS.sub("", text)))


def _base(text: str) -> str | None:
    """8 of `51_8`: the library drops it."""
    found = _BASE.search(text)
    return found[1] if found else None


def _is_same_value(expected: str, extracted: str) -> bool:
    ours, theirs = (_PERCENT.sub("", text) for text in (expected, extracted))
    percents = (ours != expected, theirs != extracted)
    if percents[0] == percents[1]:
        return _agree(ours, theirs)
    if percents[0]:
        return _agree(ours, theirs) or _agree(_hundredth(ours), theirs)
    return _agree(ours, _hundredth(theirs)) or (_is_above_one(ours) and _agree(ours, theirs))


def _hundredth(text: str) -> str:
    return rf"\frac{{{text}}}{{100}}"


def _is_above_one(text: str) -> bool:
    """Then a question may have asked for a percentage: 50% is 50, but 0.5% is not 0.5."""
    value = next(iter(_read(text)), None)
    return isinstance(value, Expr) and bool(value.is_real) and bool(abs(N(value)) > 1)


def _agree(expected: str, extracted: str) -> bool:
    """What the library says, numbers looked at again. The order of the two matters to it."""
    ours, theirs = _read(expected), _read(extracted)
    same = library_verify(ours, theirs, allow_set_relation_comp=True, timeout_seconds=None)
    return same and _is_close(ours[0], theirs[0])


def _is_close(one: Any, other: Any) -> bool:
    """True of what are not two numbers."""
    if not (isinstance(one, Expr) and isinstance(other, Expr) and one.is_number and other.is_number):
        return True
    size, apart = abs(N(one)), abs(N(one) - N(other))
    return not apart.is_finite or bool(apart <= max(_NOTHING, _RELATIVE_ROUNDING * size))


def _is_read(text: str) -> bool:
    return any(isinstance(reading, Expr) or not isinstance(reading, str) for reading in _read(text))


@lru_cache(maxsize=64)  # a prompt's samples share what they are compared with
def _read(text: str) -> Readings:
    readings: Readings = parse(
        rf"\boxed{{{text}}}", extraction_config=_BOXED, extraction_mode="first_match", parsing_timeout=None
    )
    return readings
