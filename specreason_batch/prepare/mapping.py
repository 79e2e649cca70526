"""Which input column holds what, and by what name the others are carried. Does not know: files, rows.

Columns that are given are taken; of those that are not, well-known names are looked for, and what was found is printed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

import pyarrow as pa

from specreason_batch.prepare.config import ColumnsConfig
from specreason_batch.types import InvalidInput

KNOWN: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "problem", "question"),
    "prompt_id": ("prompt_id", "unique_id", "id"),
    "gold_answer": ("gold_answer", "answer"),
    "messages": ("messages",),
    "system_prompt": ("system_prompt",),
    "choices": ("choices", "options"),
}
OWN = tuple(KNOWN)  # columns of the output that are not carried through


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """Input columns by what they hold; None: there is none."""

    prompt: str | None  # None: the last turn of messages
    prompt_id: str | None
    gold_answer: str | None
    messages: str | None
    system_prompt: str | None
    choices: tuple[str, ...]  # one, or one a choice; empty: there is none

    def columns(self) -> dict[str, str]:
        """Each input column that is used, by what it holds."""
        single = {name: getattr(self, name) for name in OWN if name != "choices"}
        several = len(self.choices) > 1
        choices = {f"choices {ascii_uppercase[i]}" if several else "choices": c for i, c in enumerate(self.choices)}
        return {name: column for name, column in {**single, **choices}.items() if column}

    def read_choices(self, values: Mapping[str, Any]) -> Any:
        """A row's choices, as the input has them."""
        if len(self.choices) == 1:
            return values[self.choices[0]]
        return {ascii_uppercase[place]: values[column] for place, column in enumerate(self.choices)}


def map_columns(given: ColumnsConfig, names: Sequence[str]) -> Mapped:
    """`names`: of the input's columns. Raises InvalidInput naming what is missing or may mean two things."""
    choices = given.choices if isinstance(given.choices, list) else [given.choices]
    for name in OWN[:-1]:
        _check_there(name, getattr(given, name), names)
    for column in choices:
        _check_there("choices", column, names)
    if len(choices) > len(ascii_uppercase):
        raise InvalidInput(f"columns.choices: {len(choices)} columns; allowed: at most {len(ascii_uppercase)}")
    found = {name: _pick(name, getattr(given, name), names) for name in OWN[:-1]}
    several = tuple(choices) if len(choices) > 1 else (_pick("choices", choices[0], names),)
    mapped = Mapped(**found, choices=tuple(name for name in several if name))
    return _checked(_either_text_or_messages(mapped, given), names)


def _check_there(name: str, column: str | None, names: Sequence[str]) -> None:
    if column and column not in names:
        raise InvalidInput(f"columns.{name}: no column {column!r}; the input has {', '.join(names)}")


def _pick(name: str, given: str | None, names: Sequence[str]) -> str | None:
    if given is not None:
        return given or None
    return next((known for known in KNOWN[name] if known in names), None)


def _either_text_or_messages(mapped: Mapped, given: ColumnsConfig) -> Mapped:
    if not (mapped.prompt and mapped.messages):
        return mapped
    if given.messages:
        return replace(mapped, prompt=None)
    if given.prompt:
        return replace(mapped, messages=None)
    raise InvalidInput(
        f"columns: the input has {mapped.prompt!r} and {mapped.messages!r}; allowed: columns.prompt={mapped.prompt} or "
        f"columns.messages={mapped.messages}, to say which holds the prompts"
    )


def _checked(mapped: Mapped, names: Sequence[str]) -> Mapped:
    if not (mapped.prompt or mapped.messages):
        raise InvalidInput(
            f"columns.prompt: none of {', '.join(KNOWN['prompt'])} or messages is there; the input has "
            f"{', '.join(names)}: say columns.prompt=..."
        )
    if mapped.choices and not mapped.gold_answer:
        raise InvalidInput(
            f"columns.gold_answer: not set, and choices ({', '.join(mapped.choices)}) need it; the input has "
            f"{', '.join(names)}; columns.choices='' for questions without choices"
        )
    return mapped


def carried_names(names: Sequence[str], mapped: Mapped, keeps_text: bool) -> dict[str, str]:
    """Input columns that are carried through, with their names in the output.

    `keeps_text`: so is the prompt's own column, since a template makes another text of it. A column that has the name
    of one of the output's own is renamed. Raises InvalidInput if its new name is taken.
    """
    used = set(mapped.columns().values()) - ({mapped.prompt} if keeps_text else set())
    carried = {name: f"original_{name}" if name in OWN else name for name in names if name not in used}
    for name, new in carried.items():
        if new != name and new in names:
            raise InvalidInput(f"columns: {name!r} would be carried as {new!r}, which is there already; rename one")
    return carried


# --- types of whole columns, where the file says them ---


def check_types(mapped: Mapped, schema: pa.Schema, where: str) -> None:
    """Of a Parquet file. Raises InvalidInput if a column is missing there or can't hold what it is mapped to."""
    for name, column in mapped.columns().items():
        if column not in schema.names:
            raise InvalidInput(f"{where}: no column {column!r} ({name}), which other files have")
        kind = name.partition(" ")[0]
        type = _plain(schema.field(column).type)
        fits, allowed = _FITS["choice" if kind != name else kind]
        if not (fits(type) or pa.types.is_null(type)):
            raise InvalidInput(f"{where}: column {column!r} is {type}; allowed for {name}: {allowed}")


def _plain(type: pa.DataType) -> pa.DataType:
    return type.value_type if pa.types.is_dictionary(type) else type


def _is_text(type: pa.DataType) -> bool:
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type))


def _is_id(type: pa.DataType) -> bool:
    return _is_text(type) or bool(pa.types.is_integer(type))


def _is_scalar(type: pa.DataType) -> bool:
    numbers = pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_decimal(type)
    return _is_text(type) or bool(numbers or pa.types.is_boolean(type))


def _is_list(type: pa.DataType) -> bool:
    return bool(pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type))


def _is_messages(type: pa.DataType) -> bool:
    return _is_list(type) and pa.types.is_struct(type.value_type) and {"role", "content"} <= _fields(type.value_type)


def _is_choices(type: pa.DataType) -> bool:
    return (_is_list(type) and _is_text(type.value_type)) or bool(pa.types.is_struct(type))


def _fields(type: pa.DataType) -> set[str]:
    return {field.name for field in type}


_FITS = {
    "prompt": (_is_text, "string"),
    "prompt_id": (_is_id, "string or integer"),
    "gold_answer": (_is_scalar, "string or number"),
    "messages": (_is_messages, "list<struct<role: string, content: string>>"),
    "system_prompt": (_is_text, "string"),
    "choices": (_is_choices, "list<string>, or struct<A: string, B: string, ...>"),
    "choice": (_is_text, "string"),
}
