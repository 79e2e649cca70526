"""What a person sees of a verification."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table

from specreason_batch.accounting.intervals import wilson
from specreason_batch.store.reading import scan
from specreason_batch.store.verdicts import Verdict, VerdictBasis


class Progress:
    """A line every `seconds`, once the first have passed, and one at the end."""

    def __init__(self, console: Console, seconds: float, num_parts: int):
        self._console, self._seconds, self._num_parts = console, seconds, num_parts
        self._num_done = self._num_chains = self._num_timeouts = self._num_deaths = 0
        self._began = self._last = time.monotonic()

    def begin(self) -> None:
        self._began = self._last = time.monotonic()

    def judged(self, num_chains: int) -> None:
        """A part is written."""
        self._num_done += 1
        self._num_chains += num_chains

    def say(self, num_timeouts: int, num_deaths: int) -> None:
        """Comparisons that were given up so far."""
        self._num_timeouts, self._num_deaths = num_timeouts, num_deaths
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._print(f"{self._num_done} of {self._num_parts} parts, {self._num_chains:,} chains")

    def close(self) -> None:
        if self._num_done:
            seconds = time.monotonic() - self._began
            self._print(
                f"{self._num_chains:,} chains in {seconds:.1f} s, {self._num_chains / max(seconds, 1e-9):,.0f} chains/s"
            )

    def _print(self, text: str) -> None:
        given_up = f"; {self._num_timeouts} timed out, {self._num_deaths} killed their worker"
        self._console.print(text + given_up, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Verdicts of the same basis and kind."""

    basis: str | None
    kind: str | None
    num_right: int
    num_wrong: int
    num_unverifiable: int

    @property
    def num_judged(self) -> int:
        return self.num_right + self.num_wrong


@dataclass(frozen=True, slots=True)
class Tally:
    """All verdicts of a run that are written."""

    groups: Sequence[Group]
    reasons: Sequence[tuple[str, str, int]]  # verdict, reason, how often


def tally(output_dir: Path) -> Tally | None:
    """None if there are none yet."""
    verdicts = scan(output_dir, "verdicts")
    if verdicts is None:
        return None
    counts = [(pl.col("verdict") == verdict).sum().alias(f"num_{verdict}") for verdict in Verdict]
    groups = verdicts.group_by("basis", "kind").agg(counts).sort("basis", "kind", nulls_last=True).collect()
    reasons = verdicts.filter(pl.col("reason").is_not_null()).group_by("verdict", "reason").len()
    ordered = reasons.sort(["len", "reason"], descending=[True, False]).collect()
    return Tally([Group(**row) for row in groups.iter_rows(named=True)], list(ordered.iter_rows()))


def tell(found: Tally | None, title: str, console: Console) -> None:
    """The closing table."""
    if found is None:
        console.print(f"{title}: no verdicts yet", highlight=False, markup=False, soft_wrap=True)
        return
    console.print(_table(found, title))
    for verdict, reason, count in found.reasons:
        console.print(f"  {count:,} {verdict}: {reason}", highlight=False, markup=False, soft_wrap=True)


def tell_next(runs: Sequence[str], tallies: Sequence[Tally | None], is_waiting: bool, console: Console) -> None:
    """What to do with the verdicts. `is_waiting`: for samples that are not there yet."""
    given = shlex.quote(f"[{','.join(runs)}]")
    bases = {group.basis for found in tallies if found for group in found.groups}
    answers = "right_or_majority" if VerdictBasis.majority in bases else "right"
    commands = [f"report runs={given}", f"export runs={given} select.answers={answers} format=... output=..."]
    for command in [f"verify run={given} again, when the run has gone on"] if is_waiting else commands:
        console.print(f"next: python -m jobs.{command}", highlight=False, markup=False, soft_wrap=True)


def _table(found: Tally, title: str) -> Table:
    table = Table(title=f"verdicts of {title}", title_justify="left")
    for name in ("compared with", "as"):
        table.add_column(name)
    for name in ("right", "wrong", "unverifiable", "right of judged", "95 %"):
        table.add_column(name, justify="right")
    for group in found.groups:
        table.add_row(group.basis or "nothing", group.kind or "-", *_figures(group))
    for basis in dict.fromkeys(group.basis for group in found.groups):
        mine = [group for group in found.groups if group.basis == basis]
        if len(mine) > 1:
            table.add_row(basis or "nothing", "all", *_figures(_sum(mine)), style="bold")
    return table


def _sum(groups: Sequence[Group]) -> Group:
    return Group(
        basis=groups[0].basis,
        kind=None,
        num_right=sum(group.num_right for group in groups),
        num_wrong=sum(group.num_wrong for group in groups),
        num_unverifiable=sum(group.num_unverifiable for group in groups),
    )


def _figures(group: Group) -> list[str]:
    counts = [f"{count:,}" for count in (group.num_right, group.num_wrong, group.num_unverifiable)]
    if not group.num_judged or group.basis is None:
        return [*counts, "-", "-"]
    low, high = wilson(group.num_right, group.num_judged)
    return [*counts, f"{group.num_right / group.num_judged:.1%}", f"{low:.1%} to {high:.1%}"]
