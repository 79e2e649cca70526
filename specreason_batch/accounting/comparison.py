"""Section `comparison`: runs side by side, and their differences to a baseline over the prompts that both have.

An interval is of the prompts (and samples) that happened to be drawn, by paired bootstrap. The machine's own noise is
in no interval: a run is timed once, and only repeats would show how much two timings of one run differ.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    "Every run against one baseline. Differences are over the prompts that both have, every prompt counting alike, "
    "with 95 % confidence intervals by paired bootstrap over prompts, all samples of a prompt together. Speeds are of "
    "machine time: they compare runs on equal hardware only. The measured speed-up has no interval: each run was timed "
    "once, and how much two timings of one run differ is not known from one. The attributed one has an interval for "
    "the choice of prompts, not for the machine."
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
        """Sums over each prompt's chains, and `text` (comparability): a row a prompt, in order. NaN: unknown."""
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
            **{name: pl.col("attributed_seconds").fill_null(np.nan) * self._a_second(name) for name in COSTS},
            "stream": cost.fill_null(np.nan),
        }
        sums = per_chain(self.run).select("prompt_id", **columns).group_by("prompt_id").agg(pl.col(*columns).sum())
        numbers = sums.with_columns(pl.col(*columns).cast(pl.Float64))
        return numbers.join(comparability.texts(self.run), on="prompt_id").collect(engine="streaming").sort("prompt_id")

    @cached_property
    def totals(self) -> dict[str, float]:
        """Over all its prompts."""
        return self.prompts.select(pl.all().exclude("prompt_id", "text").sum()).row(0, named=True)

    @cached_property
    def chains_per_second(self) -> float | None:
        spent = rates(self.run)
        return ratio(self.run.num_chains, spent.seconds) if spent else None

    def cost(self, name: str) -> Figure | None:
        """Of a chain, by its account; None: unknown."""
        found = self.account.section("cost").figure(f"{name}_per_chain") if self.account else None
        return found if found and found.value is not None else None

    def _a_second(self, cost: str) -> float:
        """What a second of its machine time costs. NaN: unknown."""
        found, speed = self.cost(cost), self.chains_per_second
        value = found.value if found else None
        return math.nan if value is None or speed is None else value * speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What two runs are compared in: a mean over prompts of each, and how the two are set against each other."""

    name: str
    title: str
    above: str  # columns of Compared.prompts: their quotient is a prompt's value
    below: str
    unit: str
    against: Against
    scale: float = 1.0
    basis: Basis = Basis.measured
    note: str = ""

    def between(self, sums: Array) -> Array:
        """The baseline and the run set against each other; last axis: sums over prompts of both, number of prompts."""
        with np.errstate(divide="ignore", invalid="ignore"):
            base, run = sums[..., 0] / sums[..., 2], sums[..., 1] / sums[..., 2]
            between: dict[Against, Array] = {
                Against.difference: run - base,
                Against.ratio: run / base,
                Against.speed_up: base / run,
            }
        return between[self.against]


COSTS = ("device_seconds", "money")  # figures of an account, a chain; their units are the account's
_COST_NOTE = "the whole run's, start-up included, given out as its machine time is"
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
        name="device_seconds",
        title="Device time a chain",
        above="device_seconds",
        below="chains",
        unit="",
        against=Against.ratio,
        basis=Basis.attributed,
        note=_COST_NOTE,
    ),
    Measure(
        name="money",
        title="Cost of a chain",
        above="money",
        below="chains",
        unit="",
        against=Against.ratio,
        basis=Basis.modelled,
        note=f"by the price table; {_COST_NOTE}",
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
    meetings = {run.label: comparability.Prompts.of(first.prompts, run.prompts) for run in others}
    section = Section(
        name="comparison",
        title="Comparison",
        text=f"{TEXT} The baseline is {first.label}.",
        tables=(
            _side_by_side(compared, first, meetings),
            *(_differences(measure, first, others) for measure in _measures(compared)),
        ),
        charts=(_throughput(compared),),
    )
    return section, tuple(_warnings(compared, first, meetings))


def _measures(compared: Sequence[Compared]) -> Iterator[Measure]:
    """Those that something is known of."""
    units = _cost_units(compared)
    for measure in MEASURES:
        if measure.above in COSTS:
            if measure.above in units:
                yield replace(measure, unit=units[measure.above])
        elif any(run.totals[measure.below] and not math.isnan(run.totals[measure.above]) for run in compared):
            yield measure


def _cost_units(compared: Sequence[Compared]) -> dict[str, str]:
    """By cost; not of one that nobody knows, or that is in GPU-seconds here and in core-seconds there."""
    found = {name: {figure.unit for run in compared if (figure := run.cost(name))} for name in COSTS}
    return {name: units.pop() for name, units in found.items() if len(units) == 1}


def _baseline(compared: Sequence[Compared], label: str | None) -> Compared:
    if label is not None:
        found = [run for run in compared if run.label == label]
        if not found:
            raise InvalidInput(f"baseline: {label!r}; allowed: one of {', '.join(run.label for run in compared)}")
        return found[0]
    alone = [run for policy in BASE_ALONE for run in compared if run.run.policy == policy]
    return (alone or list(compared))[0]


def _warnings(
    compared: Sequence[Compared], first: Compared, meetings: Mapping[str, comparability.Prompts]
) -> Iterator[str]:
    for run in compared:
        if run.account and not run.account.is_finished:
            yield f"{run.label} is not finished: its figures are of what is committed so far, its time is of more"
    yield from comparability.unverified([run.run for run in compared])
    for run in compared:
        if run is not first:
            yield from comparability.warnings(first.run, run.run, meetings[run.label])


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
    "device_seconds": (pl.Float64, "", "device time a chain"),  # units: _cost_units
    "money": (pl.Float64, "", "cost of a chain"),
}


def _side_by_side(
    compared: Sequence[Compared], first: Compared, meetings: Mapping[str, comparability.Prompts]
) -> Table:
    rows = [_row(run) | {"speed_up": _speed_up(run, first, meetings)} for run in compared]
    units = {name: unit for name, (_, unit, _) in _COLUMNS.items() if unit} | _cost_units(compared)
    return Table(
        name="runs",
        title="Side by side",
        frame=pl.DataFrame(rows, schema={name: kind for name, (kind, _, _) in _COLUMNS.items()}),
        labels={name: label for name, (_, _, label) in _COLUMNS.items()},
        units=units,
        note=f"each run over all its own chains, as measured; the speed-up is of the throughput, over {first.label}'s; "
        "money is by the price table",
    )


def _row(compared: Compared) -> dict[str, Any]:
    total = compared.totals
    return {
        "run": compared.label,
        "policy": compared.run.policy,
        "chains": compared.run.num_chains,
        "accuracy": percent(total["right"], total["judged"]),
        "acceptance": _acceptance(compared.run),
        "kept_tokens": ratio(total["kept"], total["chains"]),
        "generated_tokens": ratio(total["generated"], total["chains"]),
        "chains_per_second": compared.chains_per_second,
        **{name: None if (cost := compared.cost(name)) is None else cost.value for name in COSTS},
    }


def _speed_up(compared: Compared, first: Compared, meetings: Mapping[str, comparability.Prompts]) -> float | None:
    """None: unknown, or of other prompts."""
    if compared is not first and not meetings[compared.label].num_common:
        return None
    return ratio(compared.chains_per_second, first.chains_per_second)


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
    keys = ["prompt_id", "text"]
    values, unit = [_by_prompt(measure, prompts) for prompts in (first, other)], pl.lit(1.0)
    paired = values[0].join(values[1], on=keys, suffix="_other").sort(keys)
    sums = paired.select("value", "value_other", unit=unit).to_numpy()
    if not len(sums) or np.isnan(sums).any():
        return {"num_prompts": len(sums)}
    low, high = interval(sums, measure.between)
    found = {
        "baseline": sums[:, 0].mean(),
        "value": sums[:, 1].mean(),
        "difference": measure.between(sums.sum(axis=0)),
        "low": low,
        "high": high,
    }
    return {"num_prompts": len(sums)} | {name: float(x) if np.isfinite(x) else None for name, x in found.items()}


def _by_prompt(measure: Measure, prompts: pl.DataFrame) -> pl.DataFrame:
    """Each prompt's value, of those that have something of it."""
    value = measure.scale * pl.col(measure.above) / pl.col(measure.below)
    return prompts.filter(pl.col(measure.below) > 0).select("prompt_id", "text", value=value)
