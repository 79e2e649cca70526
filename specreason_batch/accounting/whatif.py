"""Section `whatif`: acceptance, tokens and cost at other thresholds and readings, from the grades that a run recorded.

What such a replay cannot know after a chain's first changed decision stands beside every curve (docs/accounting.md).
"""

from dataclasses import dataclass

import polars as pl

from specreason_batch.accounting.attribution import rates
from specreason_batch.accounting.figures import Basis, Chart, ChartKind, Figure, Section, Table
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.ratios import percent
from specreason_batch.accounting.thresholds import GREEDY, Curves, Grading, Recorded, replay

TEXT = (
    "Each recorded grade is read and decided on anew at other thresholds. This is exact for the drafts that were "
    "graded. It is not a forecast of another run: after a chain's first changed decision the chain would have gone on "
    "from another step, to drafts and grades that nobody has seen. The curves take it that those would be like the "
    "recorded ones; the shares of chains and steps that no changed decision comes before say how much rests on that. "
    "Whether answers would be right at another threshold, a replay cannot know at all: run it on a pilot."
)
_LABELS = {
    "acceptance": "drafts accepted",
    "draft_tokens_kept": "draft, kept",
    "draft_tokens_rejected": "draft, rejected",
    "base_tokens": "base, steps",
    "answer_tokens": "answers",
    "generated_tokens": "generated",
    "seconds": "machine time",
    "seconds_change": "machine time, change",
    "same_chains": "chains without a changed decision",
    "same_steps": "steps before the first changed decision",
}
_TOKENS = ("draft_tokens_kept", "draft_tokens_rejected", "base_tokens", "answer_tokens")
_SHARES = ("acceptance", "seconds_change", "same_chains", "same_steps")
_UNITS = dict.fromkeys((*_TOKENS, "generated_tokens"), "tokens") | dict.fromkeys(_SHARES, "%") | {"seconds": "s"}


def section(run: RunFiles) -> Section | None:
    """None: the run graded nothing."""
    recorded, curves = replay(run)
    if not recorded.num_graded:
        return None
    grading, estimate = Grading.of(run), Estimate.of(run, recorded)
    frames = {reading: estimate.frame(curve) for reading, curve in curves.items()}
    marks = {"this run": grading.threshold}
    own = frames[grading.reading]
    return Section(
        name="whatif",
        title="Other thresholds",
        text=TEXT,
        figures=(*_figures(recorded, grading, estimate), *_uncertain(recorded, curves)),
        tables=tuple(_table(reading, frame, estimate) for reading, frame in frames.items()),
        charts=(
            _acceptance(frames, marks),
            _chart("tokens", "Generated tokens by threshold", ChartKind.stacked_area, own, _TOKENS, "tokens", marks),
            *(
                [_chart("cost", "Machine time by threshold", ChartKind.line, own, ("seconds",), "s", marks)]
                if estimate.seconds is not None
                else []
            ),
            _chart(
                "known",
                "How much of the replay is exact",
                ChartKind.line,
                own,
                ("same_chains", "same_steps"),
                "%",
                marks,
            ),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """From the counts at a threshold to tokens and time."""

    recorded: Recorded
    answer_tokens: int
    rewrite_ratio: float  # tokens of a rewrite by tokens of the draft
    seconds: float | None  # of the run; None: telemetry was removed
    base_seconds_per_token: float  # attributed

    @classmethod
    def of(cls, run: RunFiles, recorded: Recorded) -> "Estimate":
        spent, ratio = rates(run), recorded.rewrite_ratio
        return cls(
            recorded=recorded,
            answer_tokens=run.chains.select(pl.col("num_answer_tokens").sum()).collect(engine="streaming").item(),
            rewrite_ratio=1.0 if ratio is None else ratio,
            seconds=spent.seconds if spent else None,
            base_seconds_per_token=(spent.base_seconds_per_token or 0.0) if spent else 0.0,
        )

    def frame(self, curves: Curves) -> pl.DataFrame:
        """A row a threshold; shares in %."""
        was, seconds = self.recorded, pl.lit(self.seconds, pl.Float64)
        base = was.base_tokens + self.rewrite_ratio * pl.col("rejected_anew_tokens") - pl.col("saved_tokens")
        drafted = was.draft_tokens_kept + was.draft_tokens_rejected
        counts = pl.DataFrame({name: getattr(curves, name) for name in Curves.__slots__})
        return (
            counts.with_columns(base_tokens=base, more=(base - was.base_tokens) * self.base_seconds_per_token)
            .select(
                threshold="thresholds",
                acceptance=100 * pl.col("accepted") / was.num_graded,
                draft_tokens_kept="accepted_tokens",
                draft_tokens_rejected=drafted - pl.col("accepted_tokens"),
                base_tokens="base_tokens",
                answer_tokens=pl.lit(self.answer_tokens),
                generated_tokens=drafted + pl.col("base_tokens") + self.answer_tokens,
                seconds=seconds + pl.col("more"),
                seconds_change=100 * pl.col("more") / seconds,
                same_chains=100 * pl.col("same_chains") / was.num_chains,
                same_steps=100 * pl.col("same_steps") / was.num_steps,
            )
            .with_columns(pl.col(*_TOKENS, "generated_tokens").round().cast(pl.Int64))
        )

    @property
    def assumed(self) -> str:
        """What the tokens and the time rest on."""
        how = "as this run's rewrites were" if self.recorded.rewrite_ratio is not None else "assumed: none was made"
        return (
            f"a rewrite that the run did not make counts {self.rewrite_ratio:.3g} tokens a token of its draft ({how}); "
            "one that would not be needed, its own. Time: this run's, and its attributed seconds a base token for each "
            "base token more or less; drafting, grading and all else as it was"
        )


def _figures(recorded: Recorded, grading: Grading, estimate: Estimate) -> tuple[Figure, ...]:
    reading = f"the run's own: {grading.reading} reading"
    return (
        Figure(name="threshold", label="threshold", value=grading.threshold, note=reading),
        Figure(name="num_graded", label="graded drafts", value=recorded.num_graded),
        Figure(
            name="acceptance",
            label="drafts accepted",
            value=percent(recorded.num_accepted, recorded.num_graded),
            unit="%",
            note=reading,
        ),
        Figure(
            name="rewrite_ratio",
            label="tokens of a rewrite for each token of the rejected draft",
            value=recorded.rewrite_ratio,
            note="" if recorded.rewrite_ratio is not None else "nothing was rewritten; the curves take 1",
        ),
        Figure(
            name="base_seconds_per_token",
            label="time of a base token, in the batch",
            value=estimate.base_seconds_per_token or None,
            unit="s",
            basis=Basis.attributed,
            note="" if estimate.base_seconds_per_token else "the rounds files were removed",
        ),
    )


def _uncertain(recorded: Recorded, curves: dict[str, Curves]) -> tuple[Figure, ...]:
    if GREEDY not in curves:
        return ()
    return (
        Figure(
            name="num_uncertain",
            label="grades that the greedy reading may not have been able to read",
            value=recorded.num_uncertain,
            note="no digit is sure to have been the likeliest token; the greedy curve rejects their drafts",
        ),
    )


def _table(reading: str, frame: pl.DataFrame, estimate: Estimate) -> Table:
    return Table(
        name=reading,
        title=f"By threshold, {reading} reading",
        frame=frame,
        labels=_LABELS,
        units=_UNITS,
        basis=Basis.modelled,
        note=estimate.assumed,
    )


def _acceptance(frames: dict[str, pl.DataFrame], marks: dict[str, float]) -> Chart:
    rows = [frame.select("threshold", "acceptance", reading=pl.lit(reading)) for reading, frame in frames.items()]
    return Chart(
        name="acceptance",
        title="Drafts accepted by threshold",
        kind=ChartKind.line,
        frame=pl.concat(rows),
        x="threshold",
        y=("acceptance",),
        by="reading",
        labels=_LABELS,
        x_label="threshold",
        y_label="% of graded drafts",
        marks=marks,
        basis=Basis.modelled,
        note="exact for the recorded drafts",
    )


def _chart(
    name: str, title: str, kind: ChartKind, frame: pl.DataFrame, y: tuple[str, ...], unit: str, marks: dict[str, float]
) -> Chart:
    return Chart(
        name=name,
        title=title,
        kind=kind,
        frame=frame.select("threshold", *y),
        x="threshold",
        y=y,
        labels=_LABELS,
        x_label="threshold",
        y_label=unit,
        marks=marks,
        basis=Basis.modelled,
        note="the run's own reading",
    )
