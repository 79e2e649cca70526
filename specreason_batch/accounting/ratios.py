"""Parts of wholes, where there may be no whole."""


def ratio(part: float | None, whole: float | None) -> float | None:
    """None where either is unknown, or the whole is nothing."""
    return None if part is None or not whole else part / whole


def percent(part: float | None, whole: float | None) -> float | None:
    """Of 100. None where either is unknown, or the whole is nothing."""
    share = ratio(part, whole)
    return None if share is None else 100 * share
