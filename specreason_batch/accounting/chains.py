"""Section `chains`: how many, how they ended, how long they are, how many are right."""

from dataclasses import dataclass

import polars as pl

from specreason_batch.accounting.distributions import bin_width, histogram, spread
from specreason_batch.accounting.figures import Basis, Chart, ChartKind, Figure, Section, Table
from specreason_batch.accounting.intervals import wilson
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.outcomes import OUTCOMES, UNVERIFIED, Estimate, Outcomes
from specreason_batch.accounting.ratios import percent
from specreason_batch.status import RunStatus

TEXT = (
    "Committed chains. Right and wrong are by the verdicts of jobs.verify; accuracy is of the chains that could be "
    "compared with a gold answer, and a chain without an answer is wrong."
)
_MEASURES = {
    "num_thinking_tokens": "thinking tokens",
    "num_answer_tokens": "answer tokens",
    "num_steps": "steps",
}
_MAX_REASONS = 50  # rows of the table of rejects


@dataclass(frozen=True, slots=True)
class Standing:
    """How far the run is."""

    num_expected: int | None  # None: the input cannot be reached
    num_in_flight: int
    is_finished: bool

    @classmethod
    def of(cls, status: RunStatus) -> "Standing":
        return cls(status.num_chains, status.num_in_flight, status.is_done)


def section(run: RunFiles, outcomes: Outcomes, standing: Standing) -> Section:
    return Section(
        name="chains",
        title="Chains",
        text=TEXT,
        figures=(*_counts(outcomes, standing), *_verdicts(outcomes), *_accuracy(outcomes)),
        tables=(_ends(outcomes), _lengths(outcomes), *_samples(outcomes), *_rejects(run)),
        charts=(
            _length_chart(outcomes, "num_thinking_tokens"),
            _length_chart(outcomes, "num_steps"),
            *_samples_chart(outcomes),
        ),
    )


def _counts(outcomes: Outcomes, standing: Standing) -> list[Figure]:
    given_up = outcomes.frame.filter(thinking_end="error").height
    expected_note = "the input cannot be reached from here" if standing.num_expected is None else ""
    return [
        Figure(name="num_chains", label="committed", value=outcomes.frame.height, unit="chains"),
        Figure(name="num_expected", label="to be made", value=standing.num_expected, unit="chains", note=expected_note),
        Figure(
            name="num_in_flight",
            label="in flight",
            value=standing.num_in_flight,
            unit="chains",
            note="" if standing.is_finished else "the run is not finished: every figure is of what is committed so far",
        ),
        Figure(name="num_prompts", label="prompts", value=outcomes.frame["prompt_id"].n_unique()),
        Figure(name="num_given_up", label="given up", value=given_up, unit="chains", note="thinking_end error"),
    ]


def _verdicts(outcomes: Outcomes) -> list[Figure]:
    note = "" if outcomes.num_verified else outcomes.note_on_correct
    counts = {
        outcome: count if outcome in _shown(outcomes) else None for outcome, count in outcomes.num_by_outcome.items()
    }
    return [
        Figure(name=f"num_{outcome}", label=outcome, value=count, unit="chains", note=note)
        for outcome, count in counts.items()
    ]


def _shown(outcomes: Outcomes) -> tuple[str, ...]:
    """Outcomes that can be told: of a run that is not verified nobody knows that none is right."""
    return OUTCOMES if outcomes.num_verified else (UNVERIFIED,)


def _accuracy(outcomes: Outcomes) -> list[Figure]:
    judged, right = outcomes.num_judged, outcomes.num_right
    agreeing, compared = outcomes.by_majority
    note = _note_on_accuracy(outcomes)
    return [
        _rate("accuracy", "accuracy over chains", right, judged, note),
        _over_prompts("accuracy_over_prompts", "accuracy, mean over prompts", outcomes.mean_over_prompts(), note),
        Figure(
            name="majority_accuracy",
            label="accuracy of the majority answer",
            value=percent(outcomes.majority_accuracy(), 1) if outcomes.max_samples > 1 else None,
            unit="%",
            note="of all judged samples of a prompt, answers compared as texts, ties shared out"
            if outcomes.max_samples > 1
            else "no prompt has several judged samples",
        ),
        _rate(
            "majority_agreement",
            "agree with the majority",
            agreeing,
            compared,
            "chains without a gold answer, compared with their prompt's other samples: says nothing of right or wrong"
            if compared
            else "no chain was compared with a majority",
        ),
    ]


def _note_on_accuracy(outcomes: Outcomes) -> str:
    if not outcomes.num_judged:
        return outcomes.note_on_correct
    return f"of {outcomes.num_judged:,} chains compared with a gold answer, of {outcomes.frame.height:,} committed"


def _rate(name: str, label: str, successes: int, trials: int, note: str) -> Figure:
    low, high = wilson(successes, trials)
    return Figure(
        name=name,
        label=label,
        value=percent(successes, trials),
        unit="%",
        low=100 * low if trials else None,
        high=100 * high if trials else None,
        note=f"{note}; Wilson interval" if trials else note,
    )


def _over_prompts(name: str, label: str, estimate: Estimate | None, note: str) -> Figure:
    if estimate is None:
        return Figure(name=name, label=label, value=None, unit="%", note=note)
    return Figure(
        name=name,
        label=label,
        value=100 * estimate.value,
        unit="%",
        low=100 * estimate.low,
        high=100 * estimate.high,
        note=f"{estimate.num_prompts:,} prompts; interval by bootstrap over prompts",
    )


def _ends(outcomes: Outcomes) -> Table:
    counted = outcomes.frame.group_by("thinking_end", "answer_end").agg(
        pl.len().alias("num_chains"),
        *((pl.col("outcome") == outcome).sum().alias(f"num_{outcome}") for outcome in _shown(outcomes)),
    )
    return Table(
        name="ends",
        title="How thinking and answer ended",
        frame=counted.with_columns(share=100 * pl.col("num_chains") / outcomes.frame.height).sort(
            "num_chains", "thinking_end", "answer_end", descending=[True, False, False]
        ),
        labels={"num_chains": "chains"} | {f"num_{outcome}": outcome for outcome in OUTCOMES},
        units={"share": "%"},
    )


def _lengths(outcomes: Outcomes) -> Table:
    """A row for each measure, of all chains and of those of each outcome."""
    groups = {"all": outcomes.frame}
    if outcomes.num_verified:
        groups |= {outcome: outcomes.frame.filter(outcome=outcome) for outcome in OUTCOMES}
    rows = [
        frame.select(pl.lit(label).alias("length"), pl.lit(group).alias("chains"), *spread(measure))
        for measure, label in _MEASURES.items()
        for group, frame in groups.items()
        if frame.height
    ]
    return Table(
        name="lengths",
        title="Lengths of chains",
        frame=pl.concat(rows),
        note="of kept steps; percentiles interpolated" + ("" if outcomes.num_verified else "; the run is not verified"),
    )


def _length_chart(outcomes: Outcomes, measure: str) -> Chart:
    highest = outcomes.frame[measure].max()
    assert isinstance(highest, int)
    frame = histogram(outcomes.frame, measure, "outcome", bin_width(highest))
    return Chart(
        name=measure.removeprefix("num_"),
        title=f"Chains by {_MEASURES[measure]}",
        kind=ChartKind.stacked_bar,
        frame=frame,
        x="edge",
        y=tuple(outcome for outcome in OUTCOMES if outcome in frame.columns),
        labels={} if outcomes.num_verified else {UNVERIFIED: "chains (not verified)"},
        x_label=_MEASURES[measure],
        y_label="chains",
        note="x: lower edge of the bin",
    )


def _samples(outcomes: Outcomes) -> list[Table]:
    """Of runs with several samples a prompt."""
    if outcomes.max_samples < 2:
        return []
    rows = [
        {
            "k": k,
            "pass_at_k": 100 * found.value,
            "low": 100 * found.low,
            "high": 100 * found.high,
            "num_prompts": found.num_prompts,
        }
        for k, found in outcomes.pass_at_k()
    ]
    return [
        Table(
            name="pass_at_k",
            title="A right answer among k samples",
            frame=pl.DataFrame(rows),
            labels={"pass_at_k": "pass@k", "num_prompts": "prompts"},
            units=dict.fromkeys(("pass_at_k", "low", "high"), "%"),
            basis=Basis.measured,
            note="unbiased (arXiv 2107.03374), over prompts with k judged samples or more; 95 % interval by bootstrap",
        )
    ]


def _samples_chart(outcomes: Outcomes) -> list[Chart]:
    return [
        Chart(
            name=table.name,
            title=table.title,
            kind=ChartKind.line,
            frame=table.frame,
            x="k",
            y=("pass_at_k", "low", "high"),
            labels=table.labels,
            y_label="%",
        )
        for table in _samples(outcomes)
    ]


def _rejects(run: RunFiles) -> list[Table]:
    """Reasons that differ in numbers alone are one."""
    if run.rejects is None:
        return []
    given_up = pl.col("sample_index").is_not_null().alias("is_chain")
    reason = pl.col("reason").str.replace_all(r"\d+", "…")
    counted = run.rejects.group_by(reason, given_up).len("count").sort("count", "reason", descending=[True, False])
    return [
        Table(
            name="rejects",
            title="Unusable input rows, and chains that were given up",
            frame=counted.head(_MAX_REASONS).collect(engine="streaming"),
            labels={"is_chain": "a chain"},
            note=f"the {_MAX_REASONS} most frequent reasons at most; … stands for a number",
        )
    ]
