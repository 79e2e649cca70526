"""Section `latency`: three ways to time a chain, which must not be taken for one another (docs/accounting.md).

The batch's throughput is measured; what a chain is given of the batch's time is attributed; the latency of one chain
alone, the paper's figure, is modelled: its own formula, on constants that somebody measured or assumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from specreason_batch.accounting.attribution import Rates, draft_answers, per_chain, rates, shard_seconds
from specreason_batch.accounting.figures import Basis, Figure, Section
from specreason_batch.accounting.latency_constants import LatencyConstants
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.ratios import percent, ratio
from specreason_batch.types import Phase

TEXT = (
    "Throughput is of the whole batch, and measured. A chain's turnaround is how long it took in the batch, waiting "
    "included; its attributed seconds are a share of the batch's time, given out by a rule, and sum to all of it. The "
    "single-stream latency is neither: it is the paper's formula for one chain alone, which adds up tokens and grades "
    "at constant costs and knows no batch."
)
BASE_ALONE = ("base_direct", "base_only")  # policies without a draft; the first is the better baseline for speed
_QUANTILES = (0.5, 0.9, 0.99)
_NO_ROUNDS = "the rounds files were removed"
_MACHINE = "of machine time: the rounds' seconds of all shards, those that ran side by side added up"


def section(run: RunFiles, constants: LatencyConstants | None = None) -> Section:
    """`constants`: None leaves the modelled figures out."""
    cost = None if constants is None else StreamCost.of(run, constants)
    columns = {"active": pl.col("active_seconds"), "attributed": pl.col("attributed_seconds")}
    found = _statistics(per_chain(run).with_columns(**columns, **({} if cost is None else cost.columns)))
    return Section(
        name="latency",
        title="Latency",
        text=TEXT,
        figures=(
            *_throughput(rates(run), run.num_chains),
            *_spread("active", "turnaround of a chain", found, Basis.measured, _TURNAROUND),
            *_spread("attributed", "attributed time of a chain", found, Basis.attributed, _ATTRIBUTED),
            *_prices(rates(run)),
            *(_modelled(cost, found) if cost is not None else ()),
        ),
    )


_TURNAROUND = "from its first request to its last completion, waiting for others included"
_ATTRIBUTED = "a share of the rounds' seconds by tokens, grades and requests; it sums to all of them"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCost:
    """The paper's latency formula for one run's chains: columns over those of `per_chain`, in seconds."""

    constants: LatencyConstants
    grade_seconds: float | None  # None: it goes by prompt tokens, and nobody knows how many
    has_draft: bool  # False: the base alone, which the formula gives the time to first token
    by_draft: bool  # who answers

    @classmethod
    def of(cls, run: RunFiles, constants: LatencyConstants) -> "StreamCost":
        return cls(
            constants=constants,
            grade_seconds=_grade_seconds(run, constants),
            has_draft=run.policy not in BASE_ALONE,
            by_draft=draft_answers(run),
        )

    @property
    def columns(self) -> dict[str, pl.Expr]:
        """What the formula adds up, and `alone`: the base alone, over as many tokens as the chain has."""
        kept, answer = pl.col("num_draft_tokens_kept"), pl.col("num_answer_tokens")
        drafted = kept + pl.col("num_draft_tokens_rejected") + (answer if self.by_draft else 0)
        written = pl.col("num_base_tokens") + (0 if self.by_draft else answer)
        first = self.constants.time_to_first_token_seconds
        parts = {
            "stream_draft": drafted * self.constants.draft_seconds_per_token,
            "stream_base": written * self.constants.base_seconds_per_token + (0.0 if self.has_draft else first),
            "stream_grade": pl.col("num_grades") * pl.lit(self.grade_seconds, pl.Float64),
        }
        length = kept + pl.col("num_base_tokens") + answer
        return {
            **parts,
            "stream": pl.sum_horizontal(parts.values(), ignore_nulls=False),
            "alone": length * self.constants.base_seconds_per_token + first,
        }


def _grade_seconds(run: RunFiles, constants: LatencyConstants) -> float | None:
    """Of one grade: the constant, or a prefill of what a grade of this run computed on average."""
    if constants.grade_seconds is not None:
        return constants.grade_seconds
    shards = shard_seconds(run)
    if shards is None:
        return None
    tokens, grades = (pl.col(f"{Phase.grade}_{name}") for name in ("computed", "requests"))
    computed, number = shards.select((tokens * grades).sum(), grades.sum().alias("grades")).collect().row(0)
    assert constants.base_prefill_seconds_per_token is not None
    return constants.base_prefill_seconds_per_token * (ratio(computed, number) or 0.0)


def _statistics(chains: pl.LazyFrame) -> dict[str, float | None]:
    """Means and percentiles of the chains' seconds, by the column's name: `active_mean`, `active_p50` ..."""
    names = [name for name in chains.collect_schema().names() if name in _COLUMNS]
    means = [pl.col(name).mean().alias(f"{name}_mean") for name in names]
    spread = [
        pl.col(name).quantile(at, "linear").alias(f"{name}_p{100 * at:.0f}") for name in names for at in _QUANTILES
    ]
    return chains.select(*means, *spread).collect(engine="streaming").row(0, named=True)


_COLUMNS = ("active", "attributed", "stream", "stream_draft", "stream_base", "stream_grade", "alone")


def _throughput(spent: Rates | None, num_chains: int) -> Iterator[Figure]:
    seconds, tokens = (spent.seconds, spent.num_generated_tokens) if spent else (None, None)
    note = _MACHINE if spent else _NO_ROUNDS
    yield _figure("chains_per_second", "throughput", ratio(num_chains, seconds), "chains/s", note=note)
    yield _figure("tokens_per_second", "generated tokens a second", ratio(tokens, seconds), "tokens/s", note=note)
    yield _figure("seconds_per_chain", "machine time a chain", ratio(seconds, num_chains), "s", note=note)


def _spread(name: str, label: str, found: dict[str, float | None], basis: Basis, note: str) -> Iterator[Figure]:
    words = {"mean": "mean"} | {f"p{100 * at:.0f}": f"{100 * at:.0f} % of chains within" for at in _QUANTILES}
    for kind, word in words.items():
        value = found[f"{name}_{kind}"]
        why = note if value is not None else _NO_ROUNDS
        yield _figure(f"{name}_seconds_{kind}", f"{label}: {word}", value, "s", basis, why)


def _prices(spent: Rates | None) -> Iterator[Figure]:
    """What a token of each role and a grade took of the batch's time."""
    base = spent.base_seconds_per_token if spent else None
    prices = {
        "base_seconds_per_token": ("a base token, steps and answers", base),
        "draft_seconds_per_token": ("a draft token", spent.draft_seconds_per_token if spent else None),
        "seconds_per_grade": ("a grade", spent.seconds_per_grade if spent else None),
    }
    for name, (label, value) in prices.items():
        if value is not None:
            yield _figure(name, f"time of {label}, in the batch", value, "s", Basis.attributed)
    if spent and spent.seconds_per_grade is not None and base:
        yield _figure(
            "grade_in_base_tokens",
            "a grade, in the batch, costs as much as",
            spent.seconds_per_grade / base,
            "base tokens",
            Basis.attributed,
        )


def _modelled(cost: StreamCost, found: dict[str, float | None]) -> Iterator[Figure]:
    source = f"constants: {cost.constants.source}"
    unpriced = f"{_NO_ROUNDS}: without grade_seconds nobody knows what a grade costs"
    note = unpriced if found["stream_mean"] is None else source
    yield from _spread("stream", "latency of a chain alone, by the paper's formula", found, Basis.modelled, note)
    for part, words in (("base", "the base's tokens"), ("draft", "the draft's tokens"), ("grade", "grades")):
        share = percent(found[f"stream_{part}_mean"], found["stream_mean"])
        yield _figure(f"stream_{part}_share", f"of that latency, {words}", share, "%", Basis.modelled, note)
    yield _figure(
        "alone_seconds_mean",
        "latency of the base alone, as many tokens: mean",
        found["alone_mean"],
        "s",
        Basis.modelled,
        f"over the tokens of these very chains; the base alone may write more or fewer. {source}",
    )
    yield _figure(
        "stream_speed_up",
        "speed-up of a chain alone, as many tokens",
        ratio(found["alone_mean"], found["stream_mean"]),
        "x",
        Basis.modelled,
        note,
    )


def _figure(
    name: str, label: str, value: float | None, unit: str, basis: Basis = Basis.measured, note: str = ""
) -> Figure:
    return Figure(name=name, label=label, value=value, unit=unit, basis=basis, note=note)
