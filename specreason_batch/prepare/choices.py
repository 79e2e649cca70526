"""Multiple-choice questions: which choice is right, in what order they are shown. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from string import ascii_uppercase
from typing import Any

from specreason_batch.prepare.config import GoldIs
from specreason_batch.prepare.faults import Kind, RowFault
from specreason_batch.seeds import stable_seed

_MAX = len(ascii_uppercase)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of a question's answers, as the input has it."""

    label: str
    position: int  # from 0; where the input leaves others out, they count
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Its choices in the input's order, and the right one."""

    choices: tuple[Choice, ...]
    right: Choice

    def shown(self, prompt_id: str, seed: int | None) -> tuple[list[str], str]:
        """The choices' texts in the order they are shown in, and the right one's letter. `seed` None: not shuffled."""
        order = list(self.choices)
        if seed is not None:
            order.sort(key=lambda choice: stable_seed("choices", seed, prompt_id, choice.position))
        return [choice.text for choice in order], ascii_uppercase[order.index(self.right)]


def as_lines(texts: Sequence[str]) -> str:
    """`A. first` and so on, a line each."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, texts, strict=False))


def read_question(given: Any, gold: Any, gold_is: GoldIs | None) -> Question:
    """`given`: a list of texts, letter -> text, or {text: [...], label: [...]}. Raises RowFault."""
    choices, has_labels = _read_choices(given)
    return Question(choices=tuple(choices), right=_right(choices, gold, gold_is, has_labels))


def _read_choices(given: Any) -> tuple[list[Choice], bool]:
    """The choices, and whether they have labels of their own. Raises RowFault."""
    if isinstance(given, Mapping) and set(given) == {"text", "label"}:
        pairs = _labelled(given["label"], given["text"])
    elif isinstance(given, Mapping):  # a struct has the choices that other rows have too, as null
        pairs = [(name, text) for name, text in given.items() if text is not None]
    elif isinstance(given, list):
        pairs = list(zip_longest(ascii_uppercase[: len(given)], given))
    else:
        raise RowFault(Kind.bad_choices, f"{_type(given)}; allowed: a list of texts, or letter -> text")
    positions = {name: place for place, name in enumerate(given)} if isinstance(given, Mapping) else {}
    _check(pairs)
    choices = [
        Choice(label=str(label), position=positions.get(label, place), text=text)
        for place, (label, text) in enumerate(pairs)
    ]
    return choices, isinstance(given, Mapping)


def _labelled(labels: Any, texts: Any) -> list[tuple[Any, Any]]:
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        raise RowFault(Kind.bad_choices, "`label` and `text` are not lists of the same length")
    return list(zip(labels, texts, strict=True))


def _check(pairs: Sequence[tuple[Any, Any]]) -> None:
    if not 2 <= len(pairs) <= _MAX:
        raise RowFault(Kind.bad_choices, f"{len(pairs)} of them; allowed: 2 to {_MAX}")
    for label, text in pairs:
        if not isinstance(text, str) or not text.strip():
            raise RowFault(Kind.bad_choices, f"choice {label} is {_type(text)} or empty; allowed: text")
    if len({str(label) for label, _ in pairs}) < len(pairs):
        raise RowFault(Kind.bad_choices, "two have the same label")


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__


# --- the right one ---


def _right(choices: Sequence[Choice], gold: Any, gold_is: GoldIs | None, has_labels: bool) -> Choice:
    """Raises RowFault if none is named, or more than one could be meant."""
    if isinstance(gold, float) and gold.is_integer():
        gold = int(gold)  # what a column of whole numbers becomes where some are missing
    if gold is None or isinstance(gold, bool) or not isinstance(gold, str | int):
        raise RowFault(
            Kind.no_gold, f"the gold answer is {_type(gold)}; allowed: a letter, a number or a choice's text"
        )
    readings = [gold_is] if gold_is else [GoldIs.letter, GoldIs.number, GoldIs.text]
    found: list[Choice] = []
    for reading in readings:
        found.extend(choice for choice in _NAMED[reading](choices, gold) if choice not in found)
        if reading is GoldIs.letter and has_labels and found:
            break  # the input's own labels are what its gold answers name
    if not found:
        raise RowFault(Kind.no_gold, f"{_short(gold)} names none of the {len(choices)} choices")
    if len(found) > 1:
        labels = " or ".join(choice.label for choice in found)
        raise RowFault(Kind.no_gold, f"{_short(gold)} may mean {labels}; gold_answer_is can say which")
    return found[0]


def _by_letter(choices: Sequence[Choice], gold: str | int) -> list[Choice]:
    """`b`, `B.`, `(B)`; labels may be numbers."""
    label = str(gold).strip().removeprefix("(").rstrip(".):").upper()
    return [choice for choice in choices if choice.label.upper() == label]


def _by_number(choices: Sequence[Choice], gold: str | int, first: int = 0) -> list[Choice]:
    text = str(gold).strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 4):
        return []
    return [choice for choice in choices if choice.position == int(text) - first]


def _by_number_from_1(choices: Sequence[Choice], gold: str | int) -> list[Choice]:
    return _by_number(choices, gold, first=1)


def _by_text(choices: Sequence[Choice], gold: str | int) -> list[Choice]:
    return [choice for choice in choices if choice.text.strip() == str(gold).strip()]


_NAMED = {
    GoldIs.letter: _by_letter,
    GoldIs.number: _by_number,
    GoldIs.number_from_1: _by_number_from_1,
    GoldIs.text: _by_text,
}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
