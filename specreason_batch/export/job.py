"""One export from runs to folder: look at every chain, decide, write, put in place. The composition root of `export`.

Everything is read twice: what is kept depends on all chains, and texts are not held. Nothing is kept of an export that
was stopped: the same command starts again.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from specreason_batch.export.card import SplitCounts, Summary, card, token_histogram
from specreason_batch.export.config import ExportConfig, Format
from specreason_batch.export.evaluation import EvaluationPrompts
from specreason_batch.export.filters import MEANINGS, Filter, Removed
from specreason_batch.export.formats import Lost, RowMaker, row_maker
from specreason_batch.export.groups import Marks, code_of, filter_of
from specreason_batch.export.near import Sketchbook
from specreason_batch.export.output import CARD, Aside, Split, is_exported, write_manifest, write_text
from specreason_batch.export.rendering import Target, load_target
from specreason_batch.export.runs import FinishedChain, Run, open_runs
from specreason_batch.export.survey import Survey, read_all
from specreason_batch.prepare.output import left_behind, staged
from specreason_batch.store.manifest import model_identity
from specreason_batch.types import InvalidInput

VERSION = 1  # of what is made of the same runs and choices
_WHOLE = (Format.sft_messages, Format.prompt_completion)
_TWINS = (Filter.duplicate, Filter.near_duplicate)  # their value is another chain's place


def export(config: ExportConfig, console: Console, check: Callable[[], None] = lambda: None) -> Summary | None:
    """The whole job; None if it was done already. `check` is called often, and may raise to stop it.

    Raises InvalidInput, OSError, and what `check` raises; then nothing has been written.
    """
    output = Path(config.output).resolve()
    runs = open_runs(config.runs, config.allow_unfinished, config.select.needs_verdicts)
    evaluation = EvaluationPrompts.read(config.decontaminate)
    target = load_target(config, runs[0])
    made_from = {
        "version": VERSION,
        "runs": [run.identity() for run in runs],
        "choices": config.row_fields(),
        "evaluation": evaluation.fingerprints if evaluation else [],
        "tokenizer": model_identity(config.tokenizer) if config.tokenizer else None,
    }
    if is_exported(output, made_from):
        console.print(f"{config.output}: already exported from the same runs by the same choices", soft_wrap=True)
        return None
    for folder in left_behind(output):
        console.print(f"note: {folder} is of an export that was killed, or is under way elsewhere", soft_wrap=True)
    progress = _Progress(console, config.log_seconds, sum(part.num_chains for run in runs for part in run.parts), check)
    maker = row_maker(config, runs, target)
    with staged(output) as folder:
        sketchbook = _sketchbook(config, folder)
        marks = Survey.of(config, runs, maker, target, evaluation, sketchbook).take(runs, progress.looked_at)
        _check_kept(marks, config, runs)
        writer = _Writer(config=config, maker=maker, marks=marks, evaluation=evaluation, folder=folder)
        writer.write(runs, progress.written)
        summary = writer.summary(_notes(config, target))
        write_text(folder / CARD, card(config, runs, summary))
        write_manifest(folder, made_from, summary.counts())
        check()
    _tell(summary, config, console)
    return summary


def _sketchbook(config: ExportConfig, folder: Path) -> Sketchbook | None:
    if config.near_duplicates.threshold is None:
        return None
    return Sketchbook(folder / "sketches.bin", config.near_duplicates)


def _check_kept(marks: Marks, config: ExportConfig, runs: Sequence[Run]) -> None:
    """Raises InvalidInput if there is nothing to train on, naming what removed it."""
    num_kept = marks.kept.height
    if not num_kept:
        counts = marks.num_removed
        lines = [f"  {count} by {by}: {MEANINGS[by]}" for by, count in counts.items()]
        hint = _hint(config, marks, counts)
        raise InvalidInput(
            "\n".join([f"select: nothing is left of {marks.frame.height} chains; removed:", *lines, *hint])
        )
    if marks.kept["is_validation"].all():
        raise InvalidInput(
            f"validation: {config.validation:g} leaves nothing to train on of {num_kept} chain(s); allowed: less, or 0"
        )


def _hint(config: ExportConfig, marks: Marks, counts: dict[Filter, int]) -> list[str]:
    if Filter.answers not in counts or marks.frame["is_right"].sum() == 0:
        return []
    return ["  there are right answers, but by a majority alone: select.answers=right_or_majority takes them"]


def _notes(config: ExportConfig, target: Target | None) -> list[str]:
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


@dataclass(slots=True)
class _Progress:
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

    def _say(self, text: str) -> None:
        self.check()
        now = time.monotonic()
        if now - self._last >= self.seconds:
            self._last = now
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(slots=True, kw_only=True)
class _Writer:
    """The second pass: kept chains to rows, and the others aside."""

    config: ExportConfig
    maker: RowMaker
    marks: Marks
    evaluation: EvaluationPrompts | None
    folder: Path
    lost: Counter[Lost] = field(default_factory=Counter)
    _splits: dict[bool, Split] = field(default_factory=dict)  # by whether it is validation
    _twins: dict[int, tuple[str, str, int] | None] = field(default_factory=dict)  # chains that others are like

    def write(self, runs: Sequence[Run], tick: Callable[[int], None]) -> None:
        """Raises InvalidInput, OSError, and what `tick` raises."""
        for is_validation, name in ((False, "train"), (True, "validation")):
            num_rows = int(self._kept(is_validation)["rows"].sum())
            self._splits[is_validation] = Split(
                self.folder, name, self.maker.schema, num_rows, self.config.rows_per_file
            )
        aside = Aside(self.folder) if self.config.aside else None
        self._twins = dict.fromkeys(self._twin_places()) if aside else {}
        place = 0
        for chains in read_all(runs, self.maker.chain_columns, self.maker.step_columns, tick):
            self._write_batch(chains, place, aside)
            place += len(chains)
        assert place == self.marks.frame.height, "the runs changed meanwhile"
        for split in self._splits.values():
            split.close()
        if aside:
            aside.close()

    def _write_batch(self, chains: Sequence[FinishedChain], place: int, aside: Aside | None) -> None:
        columns = self.marks.frame[place : place + len(chains)].select("removed", "value", "is_validation")
        rows: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for here, (chain, (removed, value, is_validation)) in enumerate(
            zip(chains, columns.iter_rows(), strict=True), start=place
        ):
            if here in self._twins:
                self._twins[here] = (chain.run.fingerprint, *chain.key)
            if removed is None:
                made = self.maker.make(chain)
                self.lost += made.lost
                rows[is_validation] += made.rows
            elif aside:
                self._put_aside(aside, chain, Removed(filter_of(removed), value))
        for is_validation, found in rows.items():
            self._splits[is_validation].add(found)

    def _put_aside(self, aside: Aside, chain: FinishedChain, removed: Removed) -> None:
        prompt_id, sample_index = chain.key
        row = {"run": chain.run.fingerprint, "prompt_id": prompt_id, "sample_index": sample_index}
        aside.add(removed.by, row | {"reason": self._reason(removed)})

    def _reason(self, removed: Removed) -> str:
        if removed.by in _TWINS and removed.value is not None:
            run, prompt_id, sample_index = self._twins[int(removed.value)] or ("", "", 0)
            return f"{MEANINGS[removed.by]}: {prompt_id}, sample {sample_index}, of run {run}"
        if removed.by is Filter.evaluation and self.evaluation and removed.value is not None:
            return f"{MEANINGS[removed.by]}: {self.evaluation.prompts[int(removed.value)]}"
        return removed.reason()

    def _twin_places(self) -> list[int]:
        """Always earlier than the chains that are like them."""
        codes = [code_of(by) for by in _TWINS]
        return self.marks.frame.filter(pl.col("removed").is_in(codes))["value"].cast(pl.Int64).to_list()

    def _kept(self, is_validation: bool) -> pl.DataFrame:
        return self.marks.kept.filter(pl.col("is_validation") == is_validation)

    def summary(self, notes: Sequence[str]) -> Summary:
        kept = self.marks.kept
        counts = {name: self._counts(is_validation) for name, is_validation in (("train", False), ("validation", True))}
        return Summary(
            num_chains=self.marks.frame.height,
            removed=self.marks.num_removed,
            splits={name: split for name, split in counts.items() if split.num_rows},
            tokens=token_histogram(kept["tokens"]),
            num_tokens=int(kept["tokens"].cast(pl.UInt64).sum()),
            lost=self.lost,
            notes=notes,
        )

    def _counts(self, is_validation: bool) -> SplitCounts:
        kept, split = self._kept(is_validation), self._splits[is_validation]
        return SplitCounts(
            num_prompts=kept["prompt"].n_unique(),
            num_chains=kept.height,
            num_rows=split.num_rows,
            num_files=split.num_files,
        )


def _tell(summary: Summary, config: ExportConfig, console: Console) -> None:
    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    say(f"{summary.num_chains} chains, {summary.num_kept} kept")
    for by, count in summary.removed.items():
        say(f"  {count} removed by {by}: {MEANINGS[by]}")
    for why, count in sorted(summary.lost.items()):
        say(f"  {count} rejected drafts make no row: {why}")
    if not config.select.needs_verdicts:
        say("answers: right and wrong ones alike (select.answers=right, after jobs.verify, keeps the right ones)")
    if config.validation and "validation" not in summary.splits:
        say(f"validation: none; {config.validation:g} of so few prompts came to nothing")
    for note in summary.notes:
        say(f"note: {note}")
    splits = ", ".join(
        f"{name} {split.num_rows} rows of {split.num_prompts} prompts in {split.num_files} file(s)"
        for name, split in summary.splits.items()
    )
    say(f"{config.output}: {splits}", style="bold")
