"""Section `acceptance`: which drafts were kept, and what the grades looked like."""

from typing import Any

import polars as pl

from specreason_batch.accounting.distributions import binned, histogram, spread, with_empty_bins
from specreason_batch.accounting.figures import Chart, ChartKind, Figure, Section, Table
from specreason_batch.accounting.intervals import clustered_rate
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.outcomes import KEYS
from specreason_batch.accounting.ratios import percent, ratio

TEXT = (
    "A decision is a draft that was accepted or rejected. Of a rejected draft its length, its text and its grade are "
    "kept; how it ended is not, so acceptance by end goes by the step that stands in the chain."
)
NOTHING = "Nothing was decided in these chains: no draft was accepted or rejected."
_SCORES = {"expected": (0.5, 9.0), "greedy": (1.0, 10.0), "yes_no": (0.05, 1.0)}  # bin width, end of the scale
_MASS_BIN = 0.05
_RATE_BIN = 0.05


def section(run: RunFiles) -> Section:
    total = _totals(run)
    if not total["decided"]:
        return Section(name="acceptance", title="Acceptance", text=NOTHING, figures=_counts(total))
    chains, by_step = _by_chain(run), _by_step(run)
    grade_tables, grade_charts = (_grade_tables(run), _grade_charts(run)) if total["graded"] else ([], [])
    return Section(
        name="acceptance",
        title="Acceptance",
        text=TEXT,
        figures=(*_counts(total), _rate(total, chains), *_chain_figures(chains), *_grade_figures(total)),
        tables=(by_step, _by_end(run), *grade_tables),
        charts=(_step_chart(by_step.frame), _chain_chart(chains), *grade_charts),
    )


def _totals(run: RunFiles) -> dict[str, Any]:
    is_kept_draft = pl.col("accepted").fill_null(False)
    return (
        run.steps.select(
            steps=pl.len(),
            drafted=(pl.col("author") == "draft").sum(),
            decided=pl.col("accepted").count(),
            accepted=pl.col("accepted").sum(),
            accepted_tokens=pl.col("num_tokens").filter(is_kept_draft).sum(),
            rejected_tokens=pl.col("rejected_num_tokens").sum(),
            graded=pl.col("digit_mass").count(),
            unreadable=_is_unreadable().sum(),
            score=pl.col("score").mean(),
            mass=pl.col("digit_mass").mean(),
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )


def _is_unreadable() -> pl.Expr:
    return pl.col("digit_mass").is_not_null() & pl.col("score").is_null()


def _counts(total: dict[str, Any]) -> tuple[Figure, ...]:
    return (
        Figure(name="num_steps", label="steps", value=total["steps"]),
        Figure(
            name="draft_step_share",
            label="steps by the draft",
            value=percent(total["drafted"], total["steps"]),
            unit="%",
        ),
        Figure(name="num_decided", label="drafts decided on", value=total["decided"]),
        Figure(name="num_accepted", label="drafts accepted", value=total["accepted"]),
    )


def _rate(total: dict[str, Any], chains: pl.DataFrame) -> Figure:
    rate = total["accepted"] / total["decided"]
    squares = chains.select(((pl.col("accepted") - rate * pl.col("decided")) ** 2).sum()).item()
    low, high = clustered_rate(rate, squares, total["decided"])
    return Figure(
        name="acceptance",
        label="acceptance",
        value=100 * rate,
        unit="%",
        low=100 * low,
        high=100 * high,
        note="accepted of decided drafts; the interval takes chains, not drafts, as independent",
    )


def _by_chain(run: RunFiles) -> pl.DataFrame:
    """A row a chain in which something was decided."""
    decided = run.steps.filter(pl.col("accepted").is_not_null())
    counted = decided.group_by(KEYS).agg(
        accepted=pl.col("accepted").sum().cast(pl.Int32), decided=pl.len().cast(pl.Int32)
    )
    rates = counted.select("accepted", "decided", rate=100 * pl.col("accepted") / pl.col("decided"))
    return rates.collect(engine="streaming")


def _chain_figures(chains: pl.DataFrame) -> list[Figure]:
    found = chains.select(spread("rate")).row(0, named=True)
    names = {"mean": "mean", "p5": "5th percentile", "p50": "median", "p95": "95th percentile"}
    return [
        Figure(name=f"chain_acceptance_{name}", label=f"acceptance of a chain, {label}", value=found[name], unit="%")
        for name, label in names.items()
    ]


def _grade_figures(total: dict[str, Any]) -> list[Figure]:
    rejected = total["decided"] - total["accepted"]
    not_graded = "" if total["graded"] else "this policy does not grade"
    return [
        Figure(
            name="tokens_per_rejected_draft",
            label="tokens of a rejected draft",
            value=ratio(total["rejected_tokens"], rejected),
            unit="tokens",
        ),
        Figure(
            name="tokens_per_accepted_draft",
            label="tokens of an accepted draft",
            value=ratio(total["accepted_tokens"], total["accepted"]),
            unit="tokens",
        ),
        Figure(name="num_graded", label="grades", value=total["graded"], note=not_graded),
        Figure(
            name="num_unreadable",
            label="unreadable grades",
            value=total["unreadable"],
            note=not_graded or "without a score; their drafts were rejected",
        ),
        Figure(
            name="unreadable_share",
            label="unreadable, of the grades",
            value=percent(total["unreadable"], total["graded"]),
            unit="%",
            note=not_graded,
        ),
        Figure(name="score_mean", label="mean score", value=total["score"], note=not_graded),
        Figure(name="digit_mass_mean", label="mean digit mass", value=total["mass"], note=not_graded),
    ]


def _decisions() -> list[pl.Expr]:
    """Of each group's steps."""
    return [
        pl.len().alias("num_steps"),
        pl.col("accepted").count().alias("num_decided"),
        pl.col("accepted").sum().alias("num_accepted"),
        (100 * pl.col("accepted").mean()).alias("acceptance"),
    ]


_DECISION_LABELS = {"num_steps": "steps", "num_decided": "decided", "num_accepted": "accepted"}


def _by_step(run: RunFiles) -> Table:
    grades = [pl.col("score").mean().alias("score_mean"), _is_unreadable().sum().alias("num_unreadable")]
    rejected = pl.col("rejected_num_tokens").mean().alias("tokens_per_rejected_draft")
    counted = run.steps.group_by("step_index").agg(*_decisions(), *grades, rejected)
    return Table(
        name="by_step",
        title="Acceptance by step index",
        frame=counted.sort("step_index").collect(engine="streaming"),
        labels=_DECISION_LABELS | {"step_index": "step", "num_unreadable": "unreadable", "score_mean": "mean score"},
        units={"acceptance": "%", "tokens_per_rejected_draft": "tokens"},
        note="later steps exist in longer chains only",
    )


def _by_end(run: RunFiles) -> Table:
    counted = run.steps.group_by("ended_by").agg(*_decisions())
    return Table(
        name="by_end",
        title="Acceptance by the end of the kept step",
        frame=counted.sort("num_steps", "ended_by", descending=[True, False]).collect(engine="streaming"),
        labels=_DECISION_LABELS,
        units={"acceptance": "%"},
        note="of a rejected draft, by the end of the step that replaced it: the draft's own is not kept",
    )


def _step_chart(by_step: pl.DataFrame) -> Chart:
    return Chart(
        name="by_step",
        title="Acceptance by step index",
        kind=ChartKind.line,
        frame=by_step.filter(pl.col("num_decided") > 0).select("step_index", "acceptance"),
        x="step_index",
        y=("acceptance",),
        x_label="step",
        y_label="%",
    )


def _chain_chart(chains: pl.DataFrame) -> Chart:
    shares = chains.select(rate=pl.col("rate") / 100, all=pl.lit("num_chains"))
    return Chart(
        name="by_chain",
        title="Chains by their acceptance",
        kind=ChartKind.bar,
        frame=histogram(shares, "rate", "all", _RATE_BIN, highest=1.0).with_columns(edge=100 * pl.col("edge")),
        x="edge",
        y=("num_chains",),
        labels={"num_chains": "chains"},
        x_label="acceptance of a chain, %",
        y_label="chains",
        note="x: lower edge of the bin; 100 % is in the last",
    )


def _grade_tables(run: RunFiles) -> list[Table]:
    """The likeliest digit of each grade, whatever the reading."""
    digits = run.steps.filter(pl.col("digit_probs").is_not_null()).select(
        "accepted", digit=pl.col("digit_probs").list.arg_max()
    )
    counted = digits.group_by("digit").agg(num_grades=pl.len(), num_accepted=pl.col("accepted").sum()).sort("digit")
    frame = counted.collect(engine="streaming")
    if frame.is_empty():
        return []
    return [
        Table(
            name="digits",
            title="The likeliest digit of a grade",
            frame=frame.with_columns(share=100 * pl.col("num_grades") / pl.col("num_grades").sum()),
            labels={"num_grades": "grades", "num_accepted": "accepted"},
            units={"share": "%"},
            note="unreadable grades included",
        )
    ]


def _grade_charts(run: RunFiles) -> list[Chart]:
    policy, reading = run.config["policy"], run.config["judge"]["reading"]
    width, highest = _SCORES[reading]
    return [
        Chart(
            name="scores",
            title="Drafts by score",
            kind=ChartKind.stacked_bar,
            frame=_decided_by_bin(run, "score", width, highest),
            x="edge",
            y=("accepted", "rejected"),
            x_label=f"score ({reading})",
            y_label="drafts",
            marks={"threshold": float(policy["threshold"])},
            note="x: lower edge of the bin; unreadable grades have no score",
        ),
        Chart(
            name="digit_mass",
            title="Grades by digit mass",
            kind=ChartKind.stacked_bar,
            frame=_decided_by_bin(run, "digit_mass", _MASS_BIN, 1.0),
            x="edge",
            y=("accepted", "rejected"),
            x_label="probability of all labels together",
            y_label="grades",
            marks={"mass_floor": float(run.config["judge"]["mass_floor"])},
            note="x: lower edge of the bin",
        ),
    ]


def _decided_by_bin(run: RunFiles, column: str, width: float, highest: float) -> pl.DataFrame:
    counts = {"accepted": pl.col("accepted").sum(), "rejected": (~pl.col("accepted")).sum()}
    bins = run.steps.filter(pl.col(column).is_not_null()).group_by(edge=binned(column, width, highest)).agg(**counts)
    return with_empty_bins(bins.collect(engine="streaming"), width)
