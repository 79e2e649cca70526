"""Verdicts: whether a chain's answer is right. Written beside the chains, a file a part, never into them.

`<shard>/verdicts/<part>.parquet` has one row for each row of `<shard>/chains/<part>.parquet`. They are derived: a
later verification with other settings replaces them. `store.reading.scan(output_dir, "verdicts")` reads them.
"""

from enum import StrEnum

import pyarrow as pa


class Verdict(StrEnum):
    """What became of a chain's answer."""

    right = "right"
    wrong = "wrong"  # a chain that gave no answer is wrong too; `reason` says so
    unverifiable = "unverifiable"  # nothing to compare with, or it could not be compared; `reason` says why


class AnswerKind(StrEnum):
    """How an answer is compared."""

    math = "math"  # by what it means: 1/2 is \\frac{1}{2} is 0.5
    choice = "choice"  # a letter
    number = "number"
    text = "text"  # the same string, but for case and white space


class VerdictBasis(StrEnum):
    """What an answer was compared with."""

    gold = "gold"
    majority = "majority"  # of the prompt's samples, where there is no gold answer


VERDICTS = pa.schema(
    [
        pa.field("prompt_id", pa.string()),
        pa.field("sample_index", pa.int64()),
        pa.field("verdict", pa.string()),  # Verdict
        pa.field("basis", pa.string()),  # VerdictBasis; null: there was nothing to compare with
        pa.field("kind", pa.string()),  # AnswerKind; null: nothing was compared
        pa.field("extracted", pa.string()),  # the chain's final answer as text; null: none was found
        pa.field("expected", pa.string()),  # what it was compared with
        pa.field("reason", pa.string()),  # null for a plain right or wrong
        pa.field("seconds", pa.float64()),  # that the comparison took
    ]
)
