"""A row of an export as the token ids that an engine sees at generation. Does not know: files, trainers.

A chat template is never asked to render a reply: it would strip the thinking. The opening is ChatFormat's, as in a run;
thinking, think-close, answer and end-of-text are appended to it. TRL's own preparation would tokenise prompt and
completion together, and append an end-of-text to a step in mid-thought (docs/closing_the_loop.md).
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from specreason_batch.chat import ChatFormat
from specreason_batch.types import InvalidInput, Message, Row

IGNORED = -100  # the label of a token that is not learnt
_PROBE = "probe-5e1c"

Encode = Callable[[Row], dict[str, list[int]]]


class Encoder:
    """Rows to ids, for one model's chat format."""

    def __init__(self, chat: ChatFormat):
        self._chat = chat
        options = chat.options
        self._think_open, self._think_close = f"{options.think_open}\n", options.think_close

    def for_format(self, format: str, is_conversational: bool) -> Encode:
        """Raises InvalidInput if this tokenizer reads a rendered opening otherwise than a run makes it."""
        if not is_conversational:
            self._check_openings()
        match format:
            case "sft_messages":
                return lambda row: self._turns(row["messages"])
            case "prompt_completion" if is_conversational:
                return lambda row: self._turns([*row["prompt"], *row["completion"]])
            case "prompt_completion":
                return lambda row: self._rendered(row["prompt"] + row["completion"])
            case "text":
                return lambda row: self._rendered(row["text"])
            case _:
                return self._preference

    # --- whole chains ---

    def _turns(self, turns: list[dict[str, str]]) -> dict[str, list[int]]:
        *asked, reply = turns
        if reply["role"] != "assistant" or not reply["content"].startswith(self._think_open):
            raise InvalidInput(
                f"data: a conversation ends with {reply['role']} and {_short(reply['content'])}; allowed: the "
                f"assistant, who begins with chat.think_open and a line's end, {self._think_open!r}"
            )
        messages = [Message(turn["role"], turn["content"]) for turn in asked]
        return self._learnt(self._chat.opening("", messages), reply["content"].removeprefix(self._think_open))

    def _rendered(self, text: str) -> dict[str, list[int]]:
        opening, reply = self._cut(text)
        return self._learnt(self._opening_ids(opening), reply.removesuffix(str(self._chat.tokenizer.eos_token)))

    def _learnt(self, opening: list[int], reply: str) -> dict[str, list[int]]:
        """`reply`: thinking, think-close and answer. What comes before it is read, not learnt."""
        thinking, close, answer = reply.partition(self._think_close)
        if not close:
            raise InvalidInput(f"data: a reply without {self._think_close!r}, chat.think_close: {_short(reply)}")
        encode = self._chat.encode_text
        learnt = [*encode(thinking), *self._chat.think_close_ids, *encode(answer), self._end_id]
        return {"input_ids": opening + learnt, "labels": [IGNORED] * len(opening) + learnt}

    # --- steps ---

    def _preference(self, row: Row) -> dict[str, list[int]]:
        """Neither step gets an end-of-text: thinking goes on after it."""
        opening, thinking = self._cut(row["prompt"])
        encode = self._chat.encode_text
        return {
            "prompt_ids": self._opening_ids(opening) + encode(thinking),
            "chosen_ids": encode(row["chosen"]),
            "rejected_ids": encode(row["rejected"]),
        }

    # --- text that a chat template has rendered ---

    def _cut(self, text: str) -> tuple[str, str]:
        """Up to the reply's opening, and what follows it. The last one: earlier turns may have openings too."""
        before, opening, reply = text.rpartition(self._reply_opening)
        if not opening:
            raise InvalidInput(
                f"data: a text without {self._reply_opening!r}, by which the model's chat template opens a reply: "
                f"{_short(text)}; allowed: an export whose tokenizer is this model"
            )
        return before + opening, reply

    def _opening_ids(self, rendered: str) -> list[int]:
        return list(self._chat.tokenizer(rendered).input_ids)

    def _check_openings(self) -> None:
        probe = self._chat.opening_text(_PROBE)
        exported = (probe, probe.removeprefix(str(self._chat.tokenizer.bos_token)))  # encoding may put it there
        if self._chat.opening(_PROBE) not in [self._opening_ids(text) for text in exported]:
            raise InvalidInput(
                "data: this model's tokenizer reads a rendered chat otherwise than runs make it; allowed for it: the "
                "formats sft_messages and prompt_completion (conversational=true)"
            )

    @cached_property
    def _reply_opening(self) -> str:
        """From the end of the user's turn on."""
        return self._chat.opening_text(_PROBE).rpartition(_PROBE)[2]

    @cached_property
    def _end_id(self) -> int:
        """What the chat template puts after a reply, if an engine stops there; else the tokenizer's end-of-text."""
        eos = self._chat.tokenizer.eos_token_id
        after = next(iter(self._chat.turn_change("", "")), eos)
        return int(after if after in self._chat.end_ids or eos is None else eos)


def _short(text: Any) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
