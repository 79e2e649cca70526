"""Rows of two real runs compared: floating-point figures of a model depend on the shape of its batch."""

import math

import polars as pl


def same(one: pl.DataFrame, other: pl.DataFrame) -> bool:
    """Equal to the last text and token; probabilities up to what batch shapes change in a float32."""
    floats = [name for name, type in one.schema.items() if type == pl.Float64 or type == pl.List(pl.Float32)]
    exact = one.drop(floats).equals(other.drop(floats))
    near = all(
        math.isclose(a, b, abs_tol=1e-3)
        for name in floats
        for a, b in zip(_flat(one[name]), _flat(other[name]), strict=True)
    )
    return exact and near


def _flat(column: pl.Series) -> list[float]:
    values = column.explode() if column.dtype == pl.List(pl.Float32) else column
    return [-1.0 if value is None else value for value in values.to_list()]
