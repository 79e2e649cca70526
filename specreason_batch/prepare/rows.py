"""One input row to one prompt, or why not. Pure: does not know files, Arrow, other rows.

A row's content is what makes it this prompt: text, messages, system prompt, choices (as the input has them, before they
are shuffled) and the template's other fields. Ids are made from it where there are none, and duplicates found by it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from specreason_batch.prepare.choices import Question, as_lines, read_question
from specreason_batch.prepare.config import GoldIs
from specreason_batch.prepare.faults import Kind, RowFault
from specreason_batch.prepare.mapping import Mapped
from specreason_batch.prepare.templates import Template, TemplateFailed

DIGEST_BYTES = 16
Message = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides what a row becomes."""

    mapped: Mapped
    template: Template
    gold_is: GoldIs | None
    shuffle_seed: int | None  # None: choices keep their order

    @property
    def other_fields(self) -> list[str]:
        """Columns that the template names by their own names."""
        return sorted(self.template.fields - {"prompt", "choices"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A row of the output, but for the columns that are carried through."""

    prompt_id: str
    id_was_made: bool
    digest: bytes  # of the content
    prompt: str
    gold_answer: str | None = None
    messages: list[Message] | None = None
    system_prompt: str | None = None
    choices: list[str] | None = None  # as shown

    def value(self, name: str) -> Any:
        return getattr(self, name)


def make_row(values: Mapping[str, Any], recipe: Recipe) -> Ready:
    """`values`: the row's columns that the recipe reads. Raises RowFault."""
    mapped = recipe.mapped
    messages = _messages(values[mapped.messages]) if mapped.messages else None
    text = messages[-1]["content"] if messages else _text(values[mapped.prompt or ""], "prompt")
    system_prompt = _system_prompt(values[mapped.system_prompt], messages) if mapped.system_prompt else None
    given = mapped.read_choices(values) if mapped.choices else None
    others = {name: _field(name, values[name]) for name in recipe.other_fields}
    digest = _digest([text if messages is None else messages, system_prompt, given, others])
    own_id = _prompt_id(values[mapped.prompt_id]) if mapped.prompt_id else None
    ready = Ready(
        prompt_id=own_id or digest.hex(),
        id_was_made=own_id is None,
        digest=digest,
        prompt=text,
        messages=messages,
        system_prompt=system_prompt,
    )
    gold = values[mapped.gold_answer] if mapped.gold_answer else None
    if mapped.choices:
        ready = _with_question(ready, read_question(given, gold, recipe.gold_is), recipe)
    else:
        ready = replace(ready, gold_answer=_gold_answer(gold))
    return _checked(_rendered(ready, others, recipe.template))


def id_of(values: Mapping[str, Any], mapped: Mapped) -> str | None:
    """A row's own id as far as it can be read, for the record of what was left out."""
    value = values[mapped.prompt_id] if mapped.prompt_id else None
    usable = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value).encode(errors="replace").decode() if usable else None


# --- its parts ---


def _text(value: Any, name: str) -> str:
    if value is not None and not isinstance(value, str):
        raise RowFault(Kind.not_text, f"{name} is {type(value).__name__}")
    if value is None or not value.strip():
        raise RowFault(Kind.no_prompt)
    return value


def _prompt_id(value: Any) -> str | None:
    """None: the row has none of its own."""
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowFault(Kind.bad_id, f"it is {type(value).__name__}; allowed: text or a whole number")
    return str(value)


def _gold_answer(value: Any) -> str | None:
    if isinstance(value, list | dict):
        raise RowFault(Kind.bad_gold, f"it is {type(value).__name__}; allowed: text or a number")
    return None if value is None else str(value)


def _system_prompt(value: Any, messages: list[Message] | None) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise RowFault(Kind.bad_system_prompt, f"it is {type(value).__name__}; allowed: text")
    if messages and messages[0]["role"] == "system":
        raise RowFault(Kind.bad_system_prompt, "messages has a system turn too")
    return value


def _messages(value: Any) -> list[Message]:
    """Optionally a system turn, then user and assistant in turn, the user first and last. Raises RowFault."""
    if not isinstance(value, list) or not value:
        raise RowFault(Kind.bad_messages, "null, empty or no list")
    turns = [_turn(place, turn) for place, turn in enumerate(value)]
    spoken = turns[1:] if turns[0]["role"] == "system" else turns
    for place, turn in enumerate(spoken, start=len(turns) - len(spoken)):
        wanted = "assistant" if (place - len(turns) + len(spoken)) % 2 else "user"
        if turn["role"] != wanted:
            raise RowFault(Kind.bad_messages, f"turn {place} is the {turn['role']}'s; allowed here: {wanted}")
    if not spoken or spoken[-1]["role"] != "user":
        raise RowFault(Kind.bad_messages, "the last turn is not the user's")
    return turns


def _turn(place: int, turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise RowFault(Kind.bad_messages, f"turn {place} is {type(turn).__name__}; allowed: role and content")
    if turn.get("role") not in ("system", "user", "assistant"):
        role = repr(turn.get("role"))[:40]
        raise RowFault(Kind.bad_messages, f"turn {place} has role {role}; allowed: system, user, assistant")
    content = turn.get("content")
    if not isinstance(content, str) or not content.strip():
        raise RowFault(Kind.bad_messages, f"turn {place} has no text")
    if more := sorted(name for name, value in turn.items() if name not in ("role", "content") and value is not None):
        raise RowFault(Kind.bad_messages, f"turn {place} has {more[0]!r:.40}; allowed: role and content")
    return {"role": turn["role"], "content": content}


def _field(name: str, value: Any) -> Any:
    if value is None:
        raise RowFault(Kind.template_failed, f"{name} is null")
    return value


# --- put together ---


def _with_question(ready: Ready, question: Question, recipe: Recipe) -> Ready:
    texts, letter = question.shown(ready.prompt_id, recipe.shuffle_seed)
    return replace(ready, choices=texts, gold_answer=letter)


def _rendered(ready: Ready, others: Mapping[str, Any], template: Template) -> Ready:
    """With the template filled; of a conversation, it makes the last turn."""
    if template.is_plain:
        return ready
    try:
        prompt = template.fill({**others, "prompt": ready.prompt, "choices": as_lines(ready.choices or [])})
    except TemplateFailed as error:
        raise RowFault(Kind.template_failed, str(error)) from error
    if not prompt.strip():
        raise RowFault(Kind.no_prompt, "the template made nothing of it")
    messages = ready.messages and [*ready.messages[:-1], {"role": "user", "content": prompt}]
    return replace(ready, prompt=prompt, messages=messages)


def _checked(ready: Ready) -> Ready:
    """Half of a surrogate pair, which JSON can spell, is not text. Raises RowFault."""
    said = [turn["content"] for turn in ready.messages or ()]
    for text in (ready.prompt_id, ready.prompt, ready.gold_answer, ready.system_prompt, *said, *(ready.choices or ())):
        if text is not None and not _is_unicode(text):
            raise RowFault(Kind.not_text, "half of a surrogate pair in it")
    return ready


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(content: object) -> bytes:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
