"""How a column is spread: percentiles and histograms, as frames for tables and charts. Pure."""

import polars as pl

PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
_NUM_BINS = 30
_ROUNDING = 1e-9  # of a bin: 0.35 / 0.05 is a little less than 7
_NICE = (1, 2, 2.5, 5, 10)  # bin widths, times a power of ten


def spread(column: str) -> list[pl.Expr]:
    """Count, mean, percentiles and maximum of a column, nulls left out."""
    value = pl.col(column)
    percentiles = [value.quantile(percent / 100, "linear").alias(f"p{percent}") for percent in PERCENTILES]
    return [value.count().alias("count"), value.mean().alias("mean"), *percentiles, value.max().alias("max")]


def bin_width(highest: float) -> float:
    """A round width, at least 1, so that about thirty bins reach from 0 to here."""
    wanted = max(1.0, highest / _NUM_BINS)
    scale = 1.0
    while scale * 10 < wanted:
        scale *= 10
    return next(scale * nice for nice in _NICE if scale * nice >= wanted)


def binned(column: str, width: float, highest: float | None = None) -> pl.Expr:
    """The lower edge of each value's bin [edge, edge + width); `highest`, where there is one, is in the last bin."""
    number = (pl.col(column) / width + _ROUNDING).floor()
    if highest is not None:
        number = number.clip(upper_bound=round(highest / width) - 1)
    return (number * width).round(6)


def histogram(frame: pl.DataFrame, column: str, by: str, width: float, highest: float | None = None) -> pl.DataFrame:
    """A row a bin in order, empty ones included: its lower `edge`, then a count for each value of `by`."""
    counts = (
        frame.filter(pl.col(column).is_not_null())
        .with_columns(edge=binned(column, width, highest))
        .pivot(on=by, index="edge", values=column, aggregate_function="len", sort_columns=True)
    )
    return with_empty_bins(counts, width)


def with_empty_bins(counts: pl.DataFrame, width: float) -> pl.DataFrame:
    """Counts by `edge`, in order, with zeros for the bins between that nothing fell into."""
    if counts.is_empty():
        return counts
    number = (pl.col("edge") / width).round().cast(pl.Int64)
    low, high = counts.select(low=number.min(), high=number.max()).row(0)
    bins = pl.DataFrame({"number": range(low, high + 1)})
    numbered = counts.with_columns(number=number).drop("edge")
    edge = (pl.col("number") * width).round(6).alias("edge")
    return bins.join(numbered, on="number", how="left").fill_null(0).sort("number").select(edge, pl.exclude("number"))
