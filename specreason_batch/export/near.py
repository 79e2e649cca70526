"""Nearly the same texts, by MinHash with banding (datasketch). What is compared lies on disk, not in memory.

An index of the usual kind holds every band of every text in dictionaries: several kilobytes a chain. Here the sketches
are written one after the other, 4 bytes a value, and each band is looked at in turn: 8 bytes a chain, sorted, so that
equal ones come to lie side by side.
"""

import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]

from specreason_batch.export.config import NearDuplicatesConfig
from specreason_batch.export.filters import Filter
from specreason_batch.export.groups import Marks
from specreason_batch.export.measures import ngrams, words

_REPRESENTATIVES = 8  # of a bucket, with which a text is compared: its cost stays linear
_SEED = 1  # of the permutations
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing

Sketches = np.ndarray[Any, np.dtype[np.uint32]]
Rows = np.ndarray[Any, np.dtype[np.intp]]


class Sketcher:
    """Texts to sketches: `num_perm` values of 32 bits."""

    def __init__(self, config: NearDuplicatesConfig):
        self._shingle_words = config.shingle_words
        self._empty = MinHash(config.num_perm, seed=_SEED, hashfunc=zlib.crc32, scheme="affine32")

    def sketch(self, text: str) -> bytes | None:
        """None for a text without a word, which is not compared."""
        found = words(text)
        if not found:
            return None
        shingles = ngrams(found, self._shingle_words) or [" ".join(found)]
        sketch = self._empty.copy()
        sketch.update_batch([shingle.encode() for shingle in set(shingles)])
        return bytes(sketch.hashvalues.tobytes())


def remove_near_duplicates(
    marks: Marks, sketches: Iterable[list[bytes | None]], config: NearDuplicatesConfig, path: Path
) -> None:
    """Kept chains that are nearly the same as an earlier kept one, whose place is the value.

    `sketches`: of all chains in order, some at a time. They lie at `path` meanwhile. Raises OSError.
    """
    places = _write(chain.from_iterable(sketches), marks.frame["removed"].is_null(), path)
    if not len(places):
        return
    found = _search(np.memmap(path, dtype=np.uint32, mode="r", shape=(len(places), config.num_perm)), config)
    path.unlink()
    later, earlier = (places[np.fromiter(rows, np.intp, len(found))] for rows in (found.keys(), found.values()))
    marks.remove(Filter.near_duplicate, pl.DataFrame({"place": later, "value": earlier}))


def _write(sketches: Iterable[bytes | None], is_kept: Iterable[bool], path: Path) -> Rows:
    """Those of kept chains one after the other; the chains' places."""
    places = array("q")
    with path.open("wb") as file:
        for place, (sketch, kept) in enumerate(zip(sketches, is_kept, strict=True)):
            if kept and sketch is not None:
                file.write(sketch)
                places.append(place)
    return np.frombuffer(places, np.int64)


def _search(sketches: Sketches, config: NearDuplicatesConfig) -> dict[int, int]:
    """Earlier rows by later ones."""
    assert config.threshold is not None
    plan = MinHashLSH(threshold=config.threshold, num_perm=config.num_perm)
    found: dict[int, int] = {}
    for band in range(plan.b):
        for bucket in _buckets(sketches[:, band * plan.r : (band + 1) * plan.r]):
            _compare([row for row in bucket.tolist() if row not in found], sketches, config.threshold, found)
    return found


def _buckets(band: Sketches) -> Iterator[Rows]:
    """Positions with the same values in the band, in order, where there are several."""
    marks = np.zeros(len(band), np.uint64)
    for column in range(band.shape[1]):
        marks = (marks ^ band[:, column]) * _MIX
        marks ^= marks >> np.uint64(29)
    order = np.argsort(marks, kind="stable")
    edges = np.flatnonzero(np.diff(marks[order])) + 1
    starts, ends = np.r_[0, edges], np.r_[edges, len(order)]
    for bucket in np.flatnonzero(ends - starts > 1):
        yield order[starts[bucket] : ends[bucket]]


def _compare(bucket: Sequence[int], sketches: Sketches, threshold: float, found: dict[int, int]) -> None:
    """Each with the first few of the bucket that are not near-duplicates themselves."""
    representatives: list[int] = []
    for row in bucket:
        values = sketches[row]
        same = next((other for other in representatives if np.mean(sketches[other] == values) >= threshold), None)
        if same is not None:
            found[row] = same
        elif len(representatives) < _REPRESENTATIVES:
            representatives.append(row)
