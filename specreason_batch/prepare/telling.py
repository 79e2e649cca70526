"""What a person sees of a preparation. Does not know: files."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from specreason_batch.prepare.faults import Kind
from specreason_batch.prepare.rows import Ready


class Progress:
    """A line every `seconds`, once the first have passed."""

    def __init__(self, console: Console, seconds: float):
        self._console, self._seconds = console, seconds
        self._last = time.monotonic()

    def checked(self, file: str, num_rows: int) -> None:
        """JSONL lines of a file, before any row is used."""
        self._say(f"checking {file}: {num_rows} rows")

    def read(self, num_read: int, num_rows: int, num_kept: int) -> None:
        """Rows of all files."""
        self._say(f"{num_read} of {num_rows} rows, {num_kept} kept")

    def _say(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last >= self._seconds:
            self._last = now
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What has been made of what."""

    num_files: int
    num_rows: int
    faults: Mapping[Kind, int]  # rows left out
    num_made_ids: int
    num_held_out: int
    sizes: list[int]  # rows of each shard
    mapped: Mapping[str, str]  # input columns by what they hold
    carried: Mapping[str, str]  # names in the output by those in the input
    as_json: list[str]
    template: str
    first: Ready

    @property
    def num_kept(self) -> int:
        """In shards and holdout."""
        return self.num_rows - sum(self.faults.values())

    def counts(self) -> dict[str, Any]:
        return {
            "rows": self.num_rows,
            "kept": self.num_kept,
            "holdout": self.num_held_out,
            "shards": len(self.sizes),
            "rejects": {str(kind): count for kind, count in self.faults.items()},
        }


def tell(summary: Summary, output: str, console: Console) -> None:
    """The summary, and the first prompt as it will be read."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    say("columns: " + ", ".join(f"{column} -> {name}" for name, column in summary.mapped.items()))
    say("carried: " + (", ".join(_carried(summary)) or "none"))
    if summary.num_made_ids:
        say(f"ids: {summary.num_made_ids} made from the content")
    say(f"template: {summary.template}; the first prompt:")
    say(f"--- {summary.first.prompt_id}", style="dim")
    say(summary.first.prompt)
    say("--- gold answer: " + (summary.first.gold_answer or "none"), style="dim")
    say(f"{summary.num_rows} rows of {summary.num_files} file(s): {summary.num_kept} kept, {_left_out(summary)}")
    for kind, count in summary.faults.items():
        say(f"  {count} {kind}")
    low, high = min(summary.sizes), max(summary.sizes)
    rows = f"{low}" if low == high else f"{low} or {high}"
    say(f"{output}: {len(summary.sizes)} shard(s) of {rows} prompts, {summary.num_held_out} held out", style="bold")


def _left_out(summary: Summary) -> str:
    count = sum(summary.faults.values())
    return f"{count} left out (rejects/rejects.parquet says why)" if count else "none left out"


def _carried(summary: Summary) -> list[str]:
    return [
        (name if name == new else f"{name} as {new}") + (" (as JSON text)" if name in summary.as_json else "")
        for name, new in summary.carried.items()
    ]
