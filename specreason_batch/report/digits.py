"""Values as people read them: sensible digits, thousands, units. Pure."""

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

UNKNOWN = "\N{EN DASH}"
_SMALLEST = 1e-6  # under it, and from the greatest on, powers of ten
_GREATEST = 1e15
_MAX_COLUMN_DECIMALS = 3
_SHORT_SECONDS = 0.1  # under it, milliseconds; a thousandth of it, microseconds
_LONG_SECONDS = 300  # from here on, hours and minutes are said too


def number(value: float | None) -> str:
    """Integers whole; others with three digits that say something, and one decimal up to 1,000."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    size = abs(value)
    if isinstance(value, int) or (value == int(value) and size < _GREATEST):
        return f"{int(value):,}"
    if not _SMALLEST <= size < _GREATEST:
        return f"{value:.3g}"
    return f"{value:,.{_decimals(size)}f}"


def quantity(value: float | None, unit: str) -> str:
    """`66.7%`, `1,234 tokens`, `17.5 ms`, `7,500 s (2 h 05 min)`."""
    return quantities([value], unit)[0]


def quantities(values: Sequence[float | None], unit: str) -> list[str]:
    """Values to be compared: of the same unit, with the same decimals."""
    factor, scaled_unit = scale(values, unit)
    texts = column([value if value is None or factor == 1 else value * factor for value in values])
    return [_with_unit(text, scaled_unit, value) for text, value in zip(texts, values, strict=True)]


def scale(values: Sequence[float | None], unit: str) -> tuple[float, str]:
    """What all are multiplied by to be read easily, and their unit then: short times are not in seconds."""
    greatest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    if unit != "s" or greatest >= _SHORT_SECONDS or greatest == 0:
        return 1, unit
    return (1e3, "ms") if greatest >= _SHORT_SECONDS / 1e3 else (1e6, "µs")


def column(values: Sequence[Any]) -> list[str]:
    """Cells of a table, whatever they hold; fractions have as many decimals as the one that needs most, up to three."""
    fractions = [value for value in values if isinstance(value, float) and math.isfinite(value) and value % 1]
    needed = max((_decimals(abs(value)) for value in fractions), default=0)
    if not 0 < needed <= _MAX_COLUMN_DECIMALS:
        return [cell(value) for value in values]
    decimals = next(n for n in range(1, needed + 1) if all(round(x, n) == round(x, needed) for x in fractions))
    return [
        f"{value:,.{decimals}f}" if isinstance(value, float) and math.isfinite(value) and value else cell(value)
        for value in values
    ]


def interval(low: float | None, high: float | None) -> str:
    """`61.2 to 71.9`; empty if there is none."""
    return "" if low is None and high is None else " to ".join(column([low, high]))


def cell(value: Any) -> str:
    """Of a table, whatever its column holds; the unit stands in the heading."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    if isinstance(value, timedelta):
        return quantity(value.total_seconds(), "s")
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return str(value)


def heading(name: str) -> str:
    """A column's snake_case name, spaced."""
    return name.removeprefix("num_").replace("_", " ")


def _decimals(size: float) -> int:
    return 0 if size >= 1000 else max(1, 2 - math.floor(math.log10(size)))


def _with_unit(text: str, unit: str, value: float | None) -> str:
    if text == UNKNOWN or not unit:
        return text
    if unit == "%":
        return f"{text}%"
    assert value is not None
    return f"{text} {unit}" + (f" ({_hours(value)})" if unit == "s" and value >= _LONG_SECONDS else "")


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min"
