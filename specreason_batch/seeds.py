"""Stable seeds and coins: a chain does not depend on its batch, node or attempt (docs/design.md, section 5)."""

import hashlib

_BITS = 63  # vLLM keeps seeds as int64


def stable_seed(*parts: object) -> int:
    """A 63-bit hash of the parts' text; the same on every machine and in every Python."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> (64 - _BITS)


def stable_coin(probability: float, *parts: object) -> bool:
    """True with this probability, decided by the parts alone."""
    return stable_seed(*parts, "coin") < probability * (1 << _BITS)


def stable_uniform(*parts: object) -> float:
    """A number strictly between 0 and 1, decided by the parts alone."""
    return (stable_seed(*parts, "uniform") + 0.5) / (1 << _BITS)
