"""What an export says while it works and when it is done. Does not know: how anything is decided."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console

from specreason_batch.export.card import Summary
from specreason_batch.export.config import ExportConfig, Format
from specreason_batch.export.filters import MEANINGS
from specreason_batch.export.rendering import Target

_WHOLE = (Format.sft_messages, Format.prompt_completion)


@dataclass(slots=True)
class Progress:
    """A line every `seconds`, once the first have passed; and the stop signal in between."""

    console: Console
    seconds: float
    num_chains: int
    check: Callable[[], None]
    _last: float = field(default_factory=time.monotonic)

    def looked_at(self, num_read: int) -> None:
        self._say(f"{num_read} of {self.num_chains} chains looked at")

    def written(self, num_read: int) -> None:
        self._say(f"{num_read} of {self.num_chains} chains written or left out")

    def put_aside(self, num_read: int) -> None:
        self._say(f"{num_read} of {self.num_chains} chains, those left out put aside")

    def _say(self, text: str) -> None:
        self.check()
        now = time.monotonic()
        if now - self._last >= self.seconds:
            self._last = now
            say(self.console, text)


def say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def notes_on(config: ExportConfig, target: Target | None) -> list[str]:
    """What would spoil a training without a word."""
    notes = []
    conversational = config.format in _WHOLE and config.conversational
    if conversational and target is not None and not target.keeps_thinking:
        notes.append(
            f"The chat template of {config.tokenizer} drops the thinking from an assistant's message: a trainer which "
            "renders these messages with it would train on the answers alone. Use the format `text`, "
            "`prompt_completion` with `conversational=false`, or a template that keeps it."
        )
    elif conversational and target is None:
        notes.append(
            "Many chat templates drop the thinking from an assistant's message. Whether a model's does, an export with "
            "`tokenizer=` tells; `text` and `prompt_completion` with `conversational=false` do not depend on it."
        )
    if config.format is Format.step_preferences:
        notes.append(
            "Chosen and rejected are steps in mid-thought. TRL's DPOTrainer appends the tokenizer's `eos_token` to "
            "both; docs/distillation.md of specreason_batch says how to keep it from that."
        )
    return notes


def tell(summary: Summary, config: ExportConfig, console: Console) -> None:
    say(console, f"{summary.num_chains} chains, {summary.num_kept} kept")
    for by, count in summary.removed.items():
        say(console, f"  {count} removed by {by}: {MEANINGS[by]}")
    for why, count in sorted(summary.lost.items()):
        say(console, f"  {count} rejected drafts make no row: {why}")
    if not config.select.needs_verdicts:
        say(
            console,
            "answers: right and wrong ones alike (select.answers=right, after jobs.verify, keeps the right ones)",
        )
    if config.validation and "validation" not in summary.splits:
        say(console, f"validation: none; {config.validation:g} of so few prompts came to nothing")
    for note in summary.notes:
        say(console, f"note: {note}")
    splits = ", ".join(
        f"{name} {split.num_rows} rows of {split.num_prompts} prompts in {split.num_files} file(s)"
        for name, split in summary.splits.items()
    )
    say(console, f"{config.output}: {splits}", style="bold")
