"""Section `comparison`: runs side by side, and their differences to a baseline over the prompts that both have.

An interval is of the prompts (and samples) that happened to be drawn, by paired bootstrap. The machine's own noise is
in no interval: a run is timed once, and only repeats would show how much two timings of one run differ.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from specreason_batch.accounting import comparability
from specreason_batch.accounting.attribution import per_chain, rates
from specreason_batch.accounting.bootstrap import Array, interval
from specreason_batch.accounting.figures import Basis, Chart, ChartKind, Figure, RunReport, Section, Table
from specreason_batch.accounting.latency import BASE_ALONE, StreamCost
from specreason_batch.accounting.latency_constants import LatencyConstants
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.ratios import percent, ratio
from specreason_batch.types import InvalidInput

TEXT = (
    "Every run against one baseline. Differences are over the prompts that both have, with 95 % confidence intervals "
    "by paired bootstrap over prompts, all samples of a prompt together. Speeds are of machine time: they compare runs "
    "on equal hardware only. The measured speed-up has no interval: each run was timed once, and how much two timings "
    "of one run differ is not known from one. The attributed one has an interval for the choice of prompts, not for "
    "the machine."
)


class Against(StrEnum):
    """How a run's value is set against the baseline's."""

    difference = "difference"  # run less baseline
    ratio = "ratio"  # run by baseline
    speed_up = "speed-up"  # baseline by run: over 1 is faster


@dataclass(frozen=True)
class Compared:
    """One run's part in a comparison."""

    run: RunFiles
    account: RunReport | None
    constants: LatencyConstants | None

    @property
    def label(self) -> str:
        return self.run.label

    @cached_property
    def prompts(self) -> pl.DataFrame:
        """Sums over each prompt's chains: a row a prompt, in prompt_id order. NaN: unknown."""
        cost = StreamCost.of(self.run, self.constants).columns["stream"] if self.constants else pl.lit(None, pl.Float64)
        is_gold = pl.col("verdict_basis") == "gold"
        kept = pl.sum_horizontal("num_draft_tokens_kept", "num_base_tokens", "num_answer_tokens")
        columns = {
            "chains": pl.lit(1),
            "right": (is_gold & (pl.col("verdict") == "right")).fill_null(False),
            "judged": (is_gold & pl.col("verdict").is_in(["right", "wrong"])).fill_null(False),
            "kept": kept,
            "generated": kept + pl.col("num_draft_tokens_rejected"),
            "seconds": pl.col("attributed_seconds").fill_null(np.nan),
            "stream": cost.fill_null(np.nan),
        }
        sums = per_chain(self.run).select("prompt_id", **columns).group_by("prompt_id").agg(pl.col(*columns).sum())
        return sums.with_columns(pl.col(*columns).cast(pl.Float64)).collect(engine="streaming").sort("prompt_id")

    @cached_property
    def totals(self) -> dict[str, float]:
        """Over all its prompts."""
        return self.prompts.select(pl.all().exclude("prompt_id").sum()).row(0, named=True)

    @cached_property
    def chains_per_second(self) -> float | None:
        spent = rates(self.run)
        return ratio(self.run.num_chains, spent.seconds) if spent else None

    def figure(self, section: str, name: str) -> Figure | None:
        """Of its account; None: there is no such one."""
        found = [item for item in self.account.sections if item.name == section] if self.account else []
        return next((figure for item in found for figure in item.figures if figure.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What two runs are compared in: a share or a mean of each, and how the two are set against each other."""

    name: str
    title: str
    above: str  # columns of Compared.prompts: their sums' quotient is the run's value
    below: str
    unit: str
    against: Against
    scale: float = 1.0
    basis: Basis = Basis.measured
    note: str = ""

    def values(self, first: Array, other: Array, columns: list[str]) -> Array:
        """Baseline's value, run's value and what is between them, in the last axis; from sums in the last axis."""
        above, below = columns.index(self.above), columns.index(self.below)
        with np.errstate(divide="ignore", invalid="ignore"):
            base, run = (self.scale * sums[..., above] / sums[..., below] for sums in (first, other))
            between = {
                Against.difference: run - base,
                Against.ratio: run / base,
                Against.speed_up: base / run,
            }
        return np.stack([base, run, between[self.against]], axis=-1)


MEASURES = (
    Measure(
        name="accuracy",
        title="Accuracy",
        above="right",
        below="judged",
        unit="%",
        against=Against.difference,
        scale=100.0,
        note="difference in points; over prompts with a chain that was compared with a gold answer in both",
    ),
    Measure(
        name="speed_up_attributed",
        title="Attributed time a chain",
        above="seconds",
        below="chains",
        unit="s",
        against=Against.speed_up,
        basis=Basis.attributed,
        note="of the machine time of a chain; its interval is of the prompts, not of the machine",
    ),
    Measure(
        name="generated_tokens",
        title="Generated tokens a chain",
        above="generated",
        below="chains",
        unit="tokens",
        against=Against.ratio,
        note="rejected drafts count, grades do not",
    ),
    Measure(
        name="kept_tokens",
        title="Kept tokens a chain",
        above="kept",
        below="chains",
        unit="tokens",
        against=Against.ratio,
        note="thinking and answer: how long the chains are",
    ),
    Measure(
        name="speed_up_stream",
        title="Latency of a chain alone, by the paper's formula",
        above="stream",
        below="chains",
        unit="s",
        against=Against.speed_up,
        basis=Basis.modelled,
        note="each run's own tokens and grades at constant costs: what a batch does with them is not in it",
    ),
)


def compare(
    runs: Sequence[RunFiles],
    accounts: Sequence[RunReport] = (),
    constants: LatencyConstants | None = None,
    baseline: str | None = None,
) -> tuple[Section, tuple[str, ...]]:
    """The section, and what a reader must know before any figure.

    `accounts`: of the same runs, by label; costs are theirs. `constants`: None leaves the formula out. `baseline`: a
    label; None: the first run of the base alone, else the first. Raises InvalidInput if no run has that label.
    """
    by_label = {account.label: account for account in accounts}
    compared = [Compared(run, by_label.get(run.label), constants) for run in runs]
    first = _baseline(compared, baseline)
    others = [run for run in compared if run is not first]
    is_known = {"stream": constants is not None, "right": any(run.totals["judged"] for run in compared)}
    measures = [measure for measure in MEASURES if is_known.get(measure.above, True)]
    section = Section(
        name="comparison",
        title="Comparison",
        text=f"{TEXT} The baseline is {first.label}.",
        tables=(_side_by_side(compared, first), *(_differences(measure, first, others) for measure in measures)),
        charts=(_throughput(compared),),
    )
    return section, tuple(_warnings(compared, first, others))


def _baseline(compared: Sequence[Compared], label: str | None) -> Compared:
    if label is not None:
        found = [run for run in compared if run.label == label]
        if not found:
            raise InvalidInput(f"baseline: {label!r}; allowed: one of {', '.join(run.label for run in compared)}")
        return found[0]
    alone = [run for policy in BASE_ALONE for run in compared if run.run.policy == policy]
    return (alone or list(compared))[0]


def _warnings(compared: Sequence[Compared], first: Compared, others: Sequence[Compared]) -> Iterator[str]:
    for run in compared:
        if run.account and not run.account.is_finished:
            yield f"{run.label} is not finished: its figures are of what is committed so far, its time is of more"
    if not any(run.run.files("verdicts") for run in compared):
        yield "no run is verified: which answers are right is not known (python -m jobs.verify)"
    for other in others:
        yield from comparability.Prompts.of(first.run, other.run).warnings(first.run, other.run)
        yield from comparability.warnings(first.run, other.run)


# --- side by side ---

_COLUMNS: dict[str, tuple[Any, str, str]] = {  # type, unit, label
    "run": (pl.String, "", "run"),
    "policy": (pl.String, "", "policy"),
    "chains": (pl.Int64, "", "chains"),
    "accuracy": (pl.Float64, "%", "accuracy"),
    "acceptance": (pl.Float64, "%", "drafts accepted"),
    "kept_tokens": (pl.Float64, "tokens", "kept tokens a chain"),
    "generated_tokens": (pl.Float64, "tokens", "generated tokens a chain"),
    "chains_per_second": (pl.Float64, "chains/s", "throughput"),
    "speed_up": (pl.Float64, "x", "speed-up"),
    "device_seconds": (pl.Float64, "s", "device time a chain"),
    "money": (pl.Float64, "", "cost of a chain"),
}


def _side_by_side(compared: Sequence[Compared], first: Compared) -> Table:
    rows = [_row(run, first) for run in compared]
    units = {name: unit for name, (_, unit, _) in _COLUMNS.items() if unit}
    for column, figure in {"device_seconds": "device_seconds_per_chain", "money": "money_per_chain"}.items():
        found = {cost.unit for run in compared if (cost := run.figure("cost", figure)) is not None}
        units |= {column: found.pop()} if len(found) == 1 else {}
    return Table(
        name="runs",
        title="Side by side",
        frame=pl.DataFrame(rows, schema={name: kind for name, (kind, _, _) in _COLUMNS.items()}),
        labels={name: label for name, (_, _, label) in _COLUMNS.items()},
        units=units,
        note=f"each run over all its own chains, as measured; the speed-up is of the throughput, over {first.label}'s; "
        "money is by the price table",
    )


def _row(compared: Compared, first: Compared) -> dict[str, Any]:
    total = compared.totals
    costs = {name: compared.figure("cost", f"{name}_per_chain") for name in ("device_seconds", "money")}
    return {
        "run": compared.label,
        "policy": compared.run.policy,
        "chains": compared.run.num_chains,
        "accuracy": percent(total["right"], total["judged"]),
        "acceptance": _acceptance(compared.run),
        "kept_tokens": ratio(total["kept"], total["chains"]),
        "generated_tokens": ratio(total["generated"], total["chains"]),
        "chains_per_second": compared.chains_per_second,
        "speed_up": ratio(compared.chains_per_second, first.chains_per_second),
        **{name: None if figure is None else figure.value for name, figure in costs.items()},
    }


def _acceptance(run: RunFiles) -> float | None:
    """None: the run decided nothing."""
    accepted = pl.col("accepted")
    return percent(*run.steps.select(accepted.sum(), accepted.count().alias("n")).collect(engine="streaming").row(0))


def _throughput(compared: Sequence[Compared]) -> Chart:
    rows = {"run": [run.label for run in compared], "throughput": [run.chains_per_second for run in compared]}
    return Chart(
        name="throughput",
        title="Throughput",
        kind=ChartKind.bar,
        frame=pl.DataFrame(rows, schema={"run": pl.String, "throughput": pl.Float64}),
        x="run",
        y=("throughput",),
        y_label="chains/s of machine time",
    )


# --- differences ---


def _differences(measure: Measure, first: Compared, others: Sequence[Compared]) -> Table:
    rows = [_difference(measure, first.prompts, other.prompts) | {"run": other.label} for other in others]
    unit = "points" if measure.against is Against.difference else "x"
    types = dict.fromkeys(("baseline", "value", "difference", "low", "high"), pl.Float64)
    return Table(
        name=measure.name,
        title=f"{measure.title}: {measure.against} to {first.label}",
        frame=pl.DataFrame(rows, schema={"run": pl.String, "num_prompts": pl.Int64, **types}),
        labels={
            "num_prompts": "prompts in both",
            "value": "this run",
            "difference": measure.against,
            "low": "95 % from",
            "high": "to",
        },
        units={"baseline": measure.unit, "value": measure.unit} | dict.fromkeys(("difference", "low", "high"), unit),
        basis=measure.basis,
        note=measure.note,
    )


def _difference(measure: Measure, first: pl.DataFrame, other: pl.DataFrame) -> dict[str, float | int | None]:
    """Of one measure over the prompts that both have something of it for; null where it is unknown."""
    columns = [measure.above, measure.below]
    paired = first.select("prompt_id", *columns).join(
        other.select("prompt_id", *columns), on="prompt_id", suffix="_other"
    )
    paired = paired.filter(pl.col(measure.below) > 0, pl.col(f"{measure.below}_other") > 0).sort("prompt_id")
    sums = paired.drop("prompt_id").to_numpy()
    if not len(sums) or np.isnan(sums).any():
        return {"num_prompts": len(sums)}
    between = _statistic(measure, columns)
    base, run, difference = between(sums.sum(axis=0))
    low, high = interval(sums, lambda drawn: between(drawn)[..., 2])
    found = {"baseline": base, "value": run, "difference": difference, "low": low, "high": high}
    return {"num_prompts": len(sums)} | {name: float(x) if np.isfinite(x) else None for name, x in found.items()}


def _statistic(measure: Measure, columns: list[str]) -> Callable[[Array], Array]:
    """Of rows that hold the baseline's columns, then the run's."""
    return lambda sums: measure.values(sums[..., : len(columns)], sums[..., len(columns) :], columns)
