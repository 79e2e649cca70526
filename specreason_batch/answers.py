"""The final answer of a chain, for the closing table: the last `\\boxed{...}`, compared as text.

Equality here is exact up to white space, dollar signs and a final full stop; it undercounts, and never overcounts.
"""

_BOXED = "\\boxed{"


def extract_boxed(text: str) -> str | None:
    """What the last `\\boxed{...}` holds, braces balanced; None if there is none, or it is not closed."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOXED)
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index]
    return None


def is_same_answer(answer: str | None, gold: str) -> bool:
    """Whether an answer's text says what the gold answer says."""
    extracted = extract_boxed(answer or "")
    return extracted is not None and _normal(extracted) == _normal(gold)


def _normal(text: str) -> str:
    return "".join(text.replace("$", "").split()).rstrip(".")
