"""One export from runs to folder: look at every chain, decide, write, put in place. The composition root of `export`.

Everything is read twice: what is kept depends on all chains, and texts are not held. An export that was stopped, or
killed, goes on from its work folder: parts that were looked at and files that were filled are not made again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
from rich.console import Console

from specreason_batch.export.card import Summary, card, token_histogram
from specreason_batch.export.config import ExportConfig
from specreason_batch.export.evaluation import EvaluationPrompts
from specreason_batch.export.filters import MEANINGS, Filter
from specreason_batch.export.formats import row_maker
from specreason_batch.export.groups import Marks
from specreason_batch.export.output import CARD, is_exported, write_manifest
from specreason_batch.export.rendering import Target, load_target
from specreason_batch.export.runs import Run, all_parts, open_runs
from specreason_batch.export.survey import Survey, decide, licenses
from specreason_batch.export.telling import Progress, notes_on, tell
from specreason_batch.export.work import WorkFolder
from specreason_batch.export.writing import Removals, write_rows
from specreason_batch.store.durable import write_text
from specreason_batch.store.manifest import model_identity
from specreason_batch.types import InvalidInput

VERSION = 1  # of what is made of the same runs and choices


def export(config: ExportConfig, console: Console, check: Callable[[], None] = lambda: None) -> None:
    """The whole job. `check` is called often, and may raise to stop it; what is done by then is kept.

    Raises InvalidInput, after which nothing is left; LeaseHeld, OSError, and what `check` raises.
    """
    work = WorkFolder(Path(config.output).resolve())
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
    if is_exported(work.output, made_from):
        console.print(f"{config.output}: already exported from the same runs by the same choices", soft_wrap=True)
        return
    progress = Progress(console, config.log_seconds, sum(part.num_chains for _, _, part in all_parts(runs)), check)
    with work.claimed(made_from):
        summary = _make(config, runs, evaluation, target, work, progress)
        write_text(work.dataset / CARD, card(config, runs, summary))
        write_manifest(work.dataset, made_from, summary.counts())
        check()
        work.commit()
    tell(summary, config, console)


def _make(
    config: ExportConfig,
    runs: Sequence[Run],
    evaluation: EvaluationPrompts | None,
    target: Target | None,
    work: WorkFolder,
    progress: Progress,
) -> Summary:
    maker = row_maker(config, runs, target)
    survey = Survey.of(config, runs, maker, target, evaluation)
    parts = list(all_parts(runs))
    for number, (place, run, part) in enumerate(parts):
        survey.take(run, part, place, work.survey(number), progress.looked_at)
    surveys = [work.survey(number) for number in range(len(parts))]
    marks = decide(config, surveys, work.sketches)
    _check_kept(marks, config)
    splits = write_rows(config, runs, maker, marks, work.dataset, progress.written)
    if config.aside:
        Removals(marks=marks, evaluation=evaluation).write(runs, work.dataset, progress.put_aside)
    return Summary(
        num_chains=marks.frame.height,
        removed=marks.num_removed,
        splits=splits,
        num_tokens=int(marks.kept["tokens"].cast(pl.UInt64).sum()),
        tokens=token_histogram(marks.kept["tokens"]),
        lost=marks.lost,
        licenses=licenses(surveys, marks),
        notes=notes_on(config, target),
    )


def _check_kept(marks: Marks, config: ExportConfig) -> None:
    """Raises InvalidInput if there is nothing to train on, naming what removed it."""
    num_kept = marks.kept.height
    if not num_kept:
        counts = marks.num_removed
        lines = [f"  {count} by {by}: {MEANINGS[by]}" for by, count in counts.items()]
        if Filter.answers in counts:
            lines.append(f"  {_hint(marks)}")
        raise InvalidInput("\n".join([f"select: nothing is left of {marks.frame.height} chains; removed:", *lines]))
    if marks.kept["is_validation"].all():
        raise InvalidInput(
            f"validation: {config.validation:g} leaves nothing to train on of {num_kept} chain(s); allowed: less, or 0"
        )


def _hint(marks: Marks) -> str:
    if marks.frame["is_right"].null_count() == marks.frame.height:
        return "no chain's answer could be judged: do the prompts have gold answers (a column gold_answer)?"
    if marks.frame["is_right"].any():
        return "there are right answers, but by a majority alone: select.answers=right_or_majority takes them"
    return "no answer is right"
