"""How a model is spoken to: chat template, think tags, step boundary and vocabulary, per role.

Owns: turning text into one role's token ids (`ChatFormat`), and finding out how two roles' vocabularies relate.
Does not know: chains, policies, engines. Imports transformers only when a model's tokenizer is loaded.

Templates strip earlier thinking from assistant messages, so a chain is never rebuilt through one: only the text before
the reply and the text of a turn change are taken from it, by rendering sentinels and cutting (docs/design.md, 5).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from specreason_batch.types import InvalidInput, Message, Role

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def _sentinel(name: str) -> str:
    return f"<<sentinel-{name}-4f1c>>"


SYSTEM, USER, REPLY, QUESTION = map(_sentinel, ("system", "user", "reply", "question"))
_SENTINELS = re.compile(r"<<sentinel-\w+-4f1c>>")


# Beginnings with and without a space, blank lines, characters of several bytes, markup as text.
_ROUND_TRIPS = (" so", "so", "x = 3.\n\n", "\n\nWait,  two  spaces\n", "é€😀", "  indented", "$\\frac{1}{2}$ </think>")


class VocabularyCase(StrEnum):
    """How the two roles' token ids relate (docs/design.md, section 5)."""

    same = "same"  # (a) the same ids throughout
    other_specials = "other_specials"  # (b) the same ordinary ids, other special tokens
    different = "different"  # (c) another vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What a user may say about a role's chat format."""

    think_open: str = "<think>"
    think_close: str = "</think>"
    template: str | None = None  # a Jinja chat template in place of the tokenizer's own
    template_kwargs: Mapping[str, Any] | None = None  # e.g. enable_thinking
    system_prompt: str | None = None


class ChatFormat:
    """One role's chat format, as token ids.

    Text that a user or a model wrote is always encoded with special-token parsing off: a literal `</think>` in a prompt
    stays text. Only what the template itself says becomes special tokens.
    """

    def __init__(
        self, role: Role, tokenizer: "PreTrainedTokenizerFast", options: ChatOptions, eos_ids: Sequence[int] = ()
    ):
        """Raises InvalidInput if the tokenizer cannot serve (no chat template, no end-of-text token ...)."""
        self.role = role
        self.options = options
        self.tokenizer = tokenizer
        self._markup: Tokenizer = tokenizer.backend_tokenizer
        self._plain = _without_added_tokens(self._markup)
        # Runs of blanks that some tokenizers add are ordinary text; every other added token is markup.
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = {token.content: id for id, token in added if token.special or token.content.strip()}
        self._special_pattern = _alternatives(self.special_ids)
        self.think_close_ids = self._spelt_markup(options.think_close)
        eos = {*eos_ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])}
        self.end_ids = frozenset(eos)
        if not self.end_ids:
            raise InvalidInput(f"{role} model: its tokenizer names no end-of-text token (eos_token)")
        self._openings: dict[tuple[str, ...], str] = {}  # by the roles of the turns
        self._opening([_user("")])
        turns = (("user", USER), ("assistant", REPLY), ("user", QUESTION))
        conversation = [{"role": turn, "content": content} for turn, content in turns]
        self._turn_change = self._render(conversation).rpartition(REPLY)[2]
        self._trims = f" {USER} " not in self._render([{"role": "user", "content": f" {USER} "}])

    # --- text to ids ---

    def opening_text(self, prompt: str, messages: Sequence[Message] = (), system_prompt: str | None = None) -> str:
        """The text before the reply, think tag included, for a person to look at. Raises what `opening` does."""
        return self._fill(*self._opening(messages or [_user(prompt)], system_prompt))

    def opening(self, prompt: str, messages: Sequence[Message] = (), system_prompt: str | None = None) -> list[int]:
        """Token ids before the reply, think tag included.

        `messages`: a conversation in place of the prompt. `system_prompt`: in place of the configuration's. Raises
        InvalidInput if the template does not take these turns.
        """
        return self._encode(*self._opening(messages or [_user(prompt)], system_prompt))

    def turn_change(self, question: str, reply_opening: str) -> list[int]:
        """Token ids that end the reply in mid-thought, put a question as the user, and open the next reply.

        `reply_opening` are the words put into the model's mouth; the model continues right after them.
        """
        return self._encode(self._turn_change + reply_opening, {QUESTION: question})

    def encode_text(self, text: str) -> list[int]:
        """Text to ids, no special token recognised."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens shown, white space untouched."""
        return str(self._markup.decode(list(ids), skip_special_tokens=False))

    # --- the vocabulary ---

    @cached_property
    def ordinary_vocabulary(self) -> dict[str, int]:
        """Entries that are not added tokens, by string."""
        vocabulary: dict[str, int] = self._markup.get_vocab(with_added_tokens=True)
        return {entry: id for entry, id in vocabulary.items() if entry not in self.special_ids}

    @property
    def think_close_id(self) -> int | None:
        """The one token that closes thinking; None where the tag takes several, and is found by its text."""
        return self.think_close_ids[0] if len(self.think_close_ids) == 1 else None

    @cached_property
    def marker_ids(self) -> frozenset[int]:
        """Ids that cannot be part of a step: think tags, end-of-text and every other special token."""
        close = self.think_close_ids if self.think_close_id is not None else ()
        return frozenset({*self.special_ids.values(), *self.end_ids, *close})

    @cached_property
    def blank_line_ids(self) -> frozenset[int]:
        """Ordinary entries whose text contains a blank line."""
        return frozenset(id for id, text in self._entry_texts.items() if "\n\n" in text)

    @cached_property
    def blank_ids(self) -> frozenset[int]:
        """Ordinary entries of white space alone."""
        return frozenset(id for id, text in self._entry_texts.items() if not text.strip())

    @cached_property
    def max_id(self) -> int:
        return max(max(self.ordinary_vocabulary.values()), max(self.marker_ids))

    @cached_property
    def _entry_texts(self) -> dict[int, str]:
        ids = list(self.ordinary_vocabulary.values())
        texts = self._markup.decode_batch([[id] for id in ids], skip_special_tokens=False)
        return dict(zip(ids, texts, strict=True))

    # --- the template ---

    def _opening(self, messages: Sequence[Message], system_prompt: str | None = None) -> tuple[str, dict[str, str]]:
        """The rendered opening of a conversation, sentinels in place of its contents, and what they stand for."""
        system_prompt = self.options.system_prompt if system_prompt is None else system_prompt
        if system_prompt is not None and messages[0].role != "system":
            messages = [Message("system", system_prompt), *messages]
        sentinels = [_sentinel(f"{message.role}{index}") for index, message in enumerate(messages)]
        roles = tuple(message.role for message in messages)
        if roles not in self._openings:
            turns = zip(roles, sentinels, strict=True)
            self._openings[roles] = self._render([{"role": role, "content": content} for role, content in turns])
        contents = [message.content for message in messages]
        return self._openings[roles], dict(zip(sentinels, contents, strict=True))

    def _render(self, messages: list[dict[str, str]]) -> str:
        template = self.options.template or self.tokenizer.chat_template
        if not template:
            raise InvalidInput(
                f"{self.role} model: its tokenizer has no chat template; give one with {self.role}.chat.template"
            )
        text = self._apply_template(messages)
        for sentinel in [message["content"] for message in messages]:
            if sentinel not in text and sentinel.strip() not in text:
                turn = sentinel.split("-")[1].rstrip("0123456789")
                raise InvalidInput(f"{self.role} model: its chat template drops the {turn} turn")
        if self.options.think_close in _SENTINELS.split(text)[-1]:  # after the last content
            raise InvalidInput(
                f"{self.role} model: its chat template closes thinking before the reply; allowed: one that leaves it "
                f"open (see {self.role}.chat.template_kwargs)"
            )
        if text.rstrip().endswith(self.options.think_open):
            return text
        return f"{text}{self.options.think_open}\n"

    def _apply_template(self, messages: list[dict[str, str]]) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.options.template,
                tokenize=False,
                add_generation_prompt=True,
                **(self.options.template_kwargs or {}),
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InvalidInput(f"{self.role} model: its chat template does not take {roles}: {error}") from error
        return str(text)

    def _fill(self, text: str, contents: Mapping[str, str]) -> str:
        return _SENTINELS.sub(lambda found: _trimmed(contents[found[0]], self._trims), text)

    def _encode(self, rendered: str, contents: Mapping[str, str]) -> list[int]:
        """Special tokens of the template become their ids; the text between them, contents included, is plain."""
        ids: list[int] = []
        for piece in self._special_pattern.split(rendered) if self._special_pattern else [rendered]:
            if piece in self.special_ids:
                ids.append(self.special_ids[piece])
            elif piece:
                ids.extend(self.encode_text(self._fill(piece, contents)))
        return ids

    def _spelt_markup(self, text: str) -> tuple[int, ...]:
        return (int(self.special_ids[text]),) if text in self.special_ids else tuple(self.encode_text(text))


def load_chat_format(role: Role, model: str, options: ChatOptions, trust_remote_code: bool = False) -> ChatFormat:
    """Load a model folder's tokenizer. Raises InvalidInput naming the folder if there is none, or it cannot serve."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust side raises plain Exception for a damaged tokenizer.json
        what = "no usable tokenizer in" if Path(model).is_dir() else "neither a folder nor in the hub's cache:"
        raise InvalidInput(f"{role}.model: {what} {model!r} ({_first_line(error)})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InvalidInput(f"{role}.model: {model!r} has no fast tokenizer (tokenizer.json)")
    return ChatFormat(role, tokenizer, options, _generation_eos_ids(role, model))


def is_known_architecture(model: str) -> bool:
    """Whether transformers knows this folder's kind of model without code that the folder brings."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError):
        return False
    return True


def compare_vocabularies(draft: ChatFormat, base: ChatFormat) -> VocabularyCase:
    """Which of the three cases holds for a pair, comparing ordinary entries by string."""
    if draft.ordinary_vocabulary != base.ordinary_vocabulary:
        return VocabularyCase.different
    same = draft.special_ids == base.special_ids and draft.end_ids == base.end_ids
    return VocabularyCase.same if same else VocabularyCase.other_specials


def check_round_trip(chat: ChatFormat) -> None:
    """Whether text survives this tokenizer: where vocabularies differ, each role reads the other's steps as text.

    Raises InvalidInput for one that adds or changes characters.
    """
    for text in _ROUND_TRIPS:
        back = chat.decode(chat.encode_text(text))
        if back != text:
            raise InvalidInput(
                f"{chat.role}.model: its tokenizer turns the text {text!r} into {back!r}; allowed beside a model of "
                "another vocabulary: one that keeps text as it is"
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def _generation_eos_ids(role: Role, model: str) -> list[int]:
    """End-of-text ids beyond the tokenizer's one, from the model's generation configuration if it has any.

    Raises InvalidInput if that is damaged.
    """
    from transformers.utils import cached_file

    path = cached_file(model, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return []
    try:
        values = json.loads(Path(path).read_text())
        eos = values.get("eos_token_id") or []
        return [int(id) for id in ([eos] if isinstance(eos, int) else eos)]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InvalidInput(f"{role}.model: {path} is not a readable generation configuration: {error}") from error


def _without_added_tokens(tokenizer: "Tokenizer") -> "Tokenizer":
    """The same tokenizer with nothing but its ordinary entries, so that special-token parsing is off altogether."""
    from tokenizers import Tokenizer

    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = []
    spec["post_processor"] = None
    spec["truncation"] = spec["padding"] = None
    return Tokenizer.from_str(json.dumps(spec))


def _alternatives(tokens: Mapping[str, int]) -> re.Pattern[str] | None:
    if not tokens:
        return None
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _trimmed(text: str, trims: bool) -> str:
    return text.strip() if trims else text


def _user(content: str) -> Message:
    return Message("user", content)
