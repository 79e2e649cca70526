"""Answers as text: what kind one looks like, its letter, its number, its normal spelling. Pure.

Knows no mathematics: two spellings that say the same are told apart here.
"""

import re
from fractions import Fraction

from specreason_batch.store.verdicts import AnswerKind

LETTERS = "A-J"
_LETTER = re.compile(rf"\(?([{LETTERS}])\)?\.?")
_LABEL = re.compile(rf"\(?([{LETTERS}{LETTERS.lower()}])(?:\)|[.:)](?=\s|$)|$)(.*)", re.DOTALL)
_OTHER_LABEL = re.compile(rf"(?<!\w)\(?[{LETTERS}]\)|\b(?:and|or)\s+\(?[{LETTERS}]\b")
_NUMBER = re.compile(r"([+-]?)\$?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
_WORDS = re.compile(r"(?=.*[^\W\d_]{3})[^\W\d_]+(?:[\s'-]+[^\W\d_]+)*")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_LAYOUT = re.compile(r"(?<!\\)(?:\\(?:left|right|displaystyle|q?quad)(?![a-zA-Z])|\\[,;:!()\[\]]|\$)")
_THOUSANDS_COMMA = re.compile(r"(?<=\d)(?:\{,\}|,\\!)\s*(?=\d{3})")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_COMMAND = re.compile(r"\\(?!text|math|mbox|operatorname)[a-zA-Z]+(?:\{[a-z]*matrix\})?")
_ANY_WORD = re.compile(r"[^\W\d_]+")
_BARE_WORD = re.compile(r"[^\W\d_]{3,}")
_TEXT_POWER = re.compile(_TEXT_COMMAND.pattern + r"\s*\^\s*\{?(\d)")
_JOINING = frozenset({"and", "or"})
_SPACE = re.compile(r"\s+")
_NEEDLESS_SPACE = re.compile(r"(?<!\w) | (?!\w)")


def kind_of(gold: str) -> AnswerKind:
    """What a gold answer looks like: a letter A-J, a plain number, words alone, and mathematics otherwise.

    Words are letters alone, somewhere three together: `ab` is a product, `abc` is text.
    """
    plain = unwrapped(gold)
    if _LETTER.fullmatch(plain):
        return AnswerKind.choice
    if read_number(plain) is not None:
        return AnswerKind.number
    return AnswerKind.text if _WORDS.fullmatch(plain) else AnswerKind.math


def unwrapped(text: str) -> str:
    """Without dollar signs, layout commands, \\text{} around words, a final full stop and outer white space."""
    return _SPACE.sub(" ", _TEXT_COMMAND.sub(r"\1", laid_out(text))).strip().removesuffix(".").strip()


def laid_out(text: str) -> str:
    """Without what only changes how LaTeX looks: `\\left`, thin spaces, math delimiters, `\\dfrac` for `\\frac`."""
    text = _THOUSANDS_COMMA.sub(",", text).replace("\\$", "")
    return _FRACTION.sub(r"\\frac", _LAYOUT.sub("", text)).replace("\N{MINUS SIGN}", "-").strip()


def read_letter(text: str) -> str | None:
    """`B`, `(b)`, `B.`, `B. what it says`; None if it is something else, or names a second letter."""
    found = _LABEL.fullmatch(unwrapped(text))
    if not found or _OTHER_LABEL.search(found[2]):
        return None
    return found[1].upper()


def read_number(text: str) -> Fraction | None:
    """`12`, `-0.50`, `1,234`, `$5`: exactly; None of anything else."""
    found = _NUMBER.fullmatch(unwrapped(text))
    return Fraction(found[1] + found[2].replace(",", "")) if found else None


def is_same_text(one: str, other: str) -> bool:
    """The same words: case, white space, dollar signs, \\text{} and a final full stop aside."""
    return bool(unwrapped(one)) and unwrapped(one).casefold() == unwrapped(other).casefold()


def is_same_spelling(one: str, other: str) -> bool:
    """The same LaTeX, layout and needless white space aside. Two digits that a space parts stay apart."""
    return bool(one.strip()) and _compact(one) == _compact(other)


def _compact(text: str) -> str:
    return _NEEDLESS_SPACE.sub("", _SPACE.sub(" ", laid_out(text))).removesuffix(".")


def text_words(text: str) -> frozenset[str]:
    """The words beside mathematics, in \\text{} or bare, in lower case: units, mostly, and their powers."""
    inside = " ".join(_TEXT_COMMAND.findall(text))
    powers = [f"^{found[2]}" for found in _TEXT_POWER.finditer(text)]
    bare = _TEXT_COMMAND.sub(" ", _COMMAND.sub(" ", text))
    found = [*_ANY_WORD.findall(inside), *_BARE_WORD.findall(bare)]
    return frozenset([*(word.lower() for word in found), *powers]) - _JOINING
