"""The final answer within the text that a chain wrote after its thinking. Pure; rather none than a guess.

In this order, the first that is there: what the last `\\boxed{...}` holds; what the last "the answer is ..." or
"answer: ..." says; a rule of the kind's own. Where there is a `\\boxed{`, nothing else is looked at: one that is empty
or never closed is none.
"""

import re

from specreason_batch.answers import extract_boxed
from specreason_batch.store.verdicts import AnswerKind
from specreason_batch.verify.spelling import LETTERS, read_letter, read_number, unwrapped

_MAX_BARE = 200  # characters of a text that is taken for an answer as a whole
_STATED = re.compile(r"\banswer(?:\s+is\b\s*:?|\**\s*:)[\s*]*(\S[^\n]*)", re.IGNORECASE)
_MATH = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_SENTENCE_END = re.compile(r"[.;!?](?=\s|$)|[*]{2}")
_STARTS_WITH_LETTER = re.compile(rf"\(?[{LETTERS}](?![\w'])")
_LETTER_IN_PARENTHESES = re.compile(rf"\(([{LETTERS}])\)")
_NUMBER = re.compile(r"(?<![\w.,])[+-]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w|[.,]?\d)")
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}\s+[a-zA-Z]{2,}")


def extract(text: str | None, kind: AnswerKind | None) -> str | None:
    """The final answer, white space around it aside; None if there is none. `kind` None: not known yet."""
    text = (text or "").strip()
    return boxed(text) if "\\boxed{" in text else _stated(text, kind) or _by_kind(text, kind)


def boxed(text: str) -> str | None:
    """What the last `\\boxed{...}` holds; None if that is nothing."""
    return (extract_boxed(text) or "").strip() or None


def _stated(text: str, kind: AnswerKind | None) -> str | None:
    """What the last "the answer is" says."""
    found = _STATED.findall(text)
    if not found:
        return None
    said = found[-1].strip()
    if kind is AnswerKind.choice:
        return _leading_letter(said)
    if kind is AnswerKind.number and (number := _NUMBER.match(unwrapped(said))):
        return number[0]
    if math := _MATH.match(said):
        return next(group for group in math.groups() if group).strip() or None
    return _SENTENCE_END.split(said)[0].strip() or None


def _leading_letter(said: str) -> str | None:
    found = _STARTS_WITH_LETTER.match(unwrapped(said))
    return found[0].strip("()") if found else None


def _by_kind(text: str, kind: AnswerKind | None) -> str | None:
    """Where nothing marks the answer."""
    if kind is AnswerKind.choice:
        letters = _LETTER_IN_PARENTHESES.findall(text)
        return read_letter(text) or (letters[-1] if letters else None)
    if kind is AnswerKind.number:
        numbers = _NUMBER.findall(text)
        return numbers[-1] if numbers and read_number(numbers[-1]) is not None else None
    return _bare(text, kind)


def _bare(text: str, kind: AnswerKind | None) -> str | None:
    """The text as a whole, if it is one short line; mathematics must not be among prose."""
    is_answer = 0 < len(text) <= _MAX_BARE and "\n" not in text
    return text if is_answer and (kind is AnswerKind.text or not _PROSE.search(unwrapped(text))) else None
