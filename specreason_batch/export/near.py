"""Nearly the same texts, by MinHash with banding (datasketch). What is compared lies on disk, not in memory.

An index of the usual kind holds every band of every text in dictionaries: several kilobytes a chain. Here the sketches
are written one after the other, 4 bytes a value, and each band is looked at in turn: 8 bytes a chain, sorted, so that
equal ones come to lie side by side.
"""

import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class Sketchbook:
    """Sketches of chains by their place, in a file that is this process's own."""

    path: Path
    config: NearDuplicatesConfig
    _places: "array[int]" = field(default_factory=lambda: array("Q"))
    _file: Any = None
    _empty: Any = None

    def add(self, place: int, text: str) -> None:
        """Texts without a word are not compared. Raises OSError."""
        if self._file is None:
            self._file = self.path.open("wb")
            self._empty = MinHash(self.config.num_perm, seed=_SEED, hashfunc=zlib.crc32, scheme="affine32")
        found = words(text)
        if not found:
            return
        shingles = ngrams(found, self.config.shingle_words) or [" ".join(found)]
        sketch = self._empty.copy()
        sketch.update_batch([shingle.encode() for shingle in set(shingles)])
        self._file.write(sketch.hashvalues.tobytes())
        self._places.append(place)

    def remove_near_duplicates(self, marks: Marks) -> None:
        """Kept chains that are nearly the same as an earlier kept one, whose place is the value. Removes the file."""
        if not self._places:
            return
        self._file.close()
        sketches = np.memmap(self.path, dtype=np.uint32, mode="r", shape=(len(self._places), self.config.num_perm))
        is_kept = marks.frame["removed"].is_null().to_numpy()[np.frombuffer(self._places, np.uint64)]
        found = self._search(sketches, np.flatnonzero(is_kept))
        del sketches
        self.path.unlink()
        pairs = [(self._places[later], float(self._places[earlier])) for later, earlier in found.items()]
        marks.remove(Filter.near_duplicate, pl.DataFrame(pairs, schema=["place", "value"], orient="row"))

    def _search(self, sketches: Sketches, rows: Rows) -> dict[int, int]:
        """Earlier ones by later ones, among these rows of the sketches."""
        assert self.config.threshold is not None
        plan = MinHashLSH(threshold=self.config.threshold, num_perm=self.config.num_perm)
        found: dict[int, int] = {}
        for band in range(plan.b):
            for bucket in _buckets(sketches[rows, band * plan.r : (band + 1) * plan.r]):
                alive = [row for row in rows[bucket].tolist() if row not in found]
                _compare(alive, sketches, self.config.threshold, found)
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
