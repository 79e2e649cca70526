"""Lists, tuples and intervals as LaTeX spells them, taken apart at their outer commas. Pure.

Why not leave them to the mathematics library: it takes `(1,2)`, `1,2` and `{1,2}` for the same, and `1,1,2` for `1,2`.
"""

import re
from dataclasses import dataclass

from specreason_batch.verify.spelling import laid_out, read_number

_OPENING = ("\\begin", "\\{", "{", "(", "[")
_CLOSING = ("\\end", "\\}", "}", ")", "]")
_TOKEN = re.compile(r"\\begin|\\end|\\[{}]|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_ASSIGNMENT = re.compile(r"([a-zA-Z](?:_\{?\w+\}?)?)\s*=(?!=)")
_BRACKETS = {"(": ")]", "[": ")]", "\\{": ("\\}",)}


@dataclass(frozen=True, slots=True)
class Listing:
    """Several items. In order, between brackets; or a set, between braces or bare."""

    brackets: str  # "()", "[)" ...; "" for a set
    items: tuple[str, ...]  # two at least

    @property
    def is_assignments(self) -> bool:
        """`x=6, y=7`: each item names another thing."""
        names = {found[1] for item in self.items if (found := _ASSIGNMENT.match(item))}
        return not self.brackets and len(names) == len(self.items)


def read_listing(text: str) -> Listing | None:
    """None of what is a single item: an expression, a matrix, a union of intervals, a number with thousands commas.

    And of what has an item that stands for two, as 1 \\pm 2.
    """
    if read_number(text) is not None or "\\pm" in text:
        return None
    tokens = _TOKEN.findall(laid_out(text))
    first, last = (tokens[0], tokens[-1]) if tokens else ("", "")
    if last in _BRACKETS.get(first, ()) and _is_one_group(tokens):
        items = _split(tokens[1:-1])
        return Listing("" if first == "\\{" else first + last, items) if len(items) > 1 else None
    items = _split(tokens)
    return Listing("", items) if len(items) > 1 else None


def _depths(tokens: list[str]) -> list[int]:
    """Of nesting, after each token."""
    depth, depths = 0, []
    for token in tokens:
        depth += (token in _OPENING) - (token in _CLOSING)
        depths.append(depth)
    return depths


def _is_one_group(tokens: list[str]) -> bool:
    """Whether the first bracket is closed by the last."""
    depths = _depths(tokens)
    return depths[-1] == 0 and all(depth > 0 for depth in depths[:-1])


def _split(tokens: list[str]) -> tuple[str, ...]:
    """At commas outside of everything."""
    items = [""]
    for token, depth in zip(tokens, _depths(tokens), strict=True):
        if token == "," and depth == 0:
            items.append("")
        else:
            items[-1] += token
    return tuple(item.strip() for item in items)
