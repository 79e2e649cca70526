"""A chain as text: what was asked, and the reply as the engines produced it. Does not know: what rows look like.

Chat templates strip thinking from assistant messages, so a reply is never rendered through one: only the opening is
(chat.ChatFormat), and thinking, think-close and answer are appended as they are. Nothing is added or stripped.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specreason_batch.chat import ChatFormat, ChatOptions, load_chat_format
from specreason_batch.export.chains import FinishedChain
from specreason_batch.export.config import ExportConfig
from specreason_batch.export.runs import Run
from specreason_batch.types import InvalidInput, Message, Role

_PROBE = "probe-7d21"


@dataclass(frozen=True, slots=True)
class Target:
    """The model that will be trained, as far as its tokenizer says how it is spoken to."""

    chat: ChatFormat
    template: str | None  # in place of the tokenizer's own
    template_kwargs: dict[str, Any]

    def opening(self, turns: Sequence[Message]) -> str:
        """The text before the reply's thinking, without what the tokenizer puts there itself.

        Raises InvalidInput if the template does not take these turns.
        """
        text = self.chat.opening_text("", turns)
        return text.removeprefix(self._own_beginning)

    @property
    def end(self) -> str:
        """The end-of-text, by which the reply ends."""
        return str(self.chat.tokenizer.eos_token)

    @property
    def _own_beginning(self) -> str:
        """A beginning-of-text that encoding a text adds: in the text too, a trainer would get it twice."""
        tokenizer = self.chat.tokenizer
        adds = tokenizer.bos_token is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        return str(tokenizer.bos_token) if adds else ""

    def num_tokens(self, text: str) -> int:
        return len(self.chat.encode_text(text))

    @property
    def keeps_thinking(self) -> bool:
        """Whether its template leaves the thinking in an assistant's message."""
        options = self.chat.options
        reply = f"{options.think_open}\n{_PROBE}\n{options.think_close}\n\nDone."
        rendered = self.chat.tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": reply}],
            chat_template=self.template,
            tokenize=False,
            **self.template_kwargs,
        )
        return _PROBE in rendered


def load_target(config: ExportConfig, run: Run) -> Target | None:
    """None: no tokenizer is given. Raises InvalidInput if it cannot serve."""
    if not config.tokenizer:
        return None
    think_open, think_close = run.think_tags
    options = ChatOptions(
        think_open=think_open,
        think_close=think_close,
        template=_template(config.chat_template),
        template_kwargs=config.template_kwargs,
    )
    try:
        chat = load_chat_format(Role.draft, config.tokenizer, options)
    except InvalidInput as error:
        raise InvalidInput(
            f"tokenizer: {config.tokenizer!r} cannot serve ({error}); allowed: a model folder with a fast tokenizer, "
            "and a chat template there or in chat_template"
        ) from error
    return Target(chat, options.template, config.template_kwargs)


def _template(given: str | None) -> str | None:
    if given is None or not given.endswith(".jinja"):
        return given
    try:
        return Path(given).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"chat_template: {given} cannot be read: {error}") from error


def markup_pattern(runs: Iterable[Run], target: Target | None) -> re.Pattern[str]:
    """Think tags, and the special tokens of the tokenizer that is given."""
    texts = {tag for run in runs for tag in run.think_tags} | set(target.chat.special_ids if target else ())
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def thinking_and_answer(chain: FinishedChain) -> str:
    """What follows the opened think tag."""
    _, think_close = chain.run.think_tags
    return f"{chain.thinking}{think_close}{chain.answer or ''}"


def reply(chain: FinishedChain) -> str:
    """The assistant's message, think tags included."""
    think_open, _ = chain.run.think_tags
    return f"{think_open}\n{thinking_and_answer(chain)}"


def messages(turns: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]
