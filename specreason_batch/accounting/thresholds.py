"""What other thresholds would have decided about the drafts that a run graded, and where such a replay stops knowing.

The grades of a run are known; what follows a changed decision is not, for the chain would have gone on from another
step. So a replay holds exactly for chains without a changed decision, and for every chain up to its first one.

Counted part by part (a chain's steps are all in one), in bins between the thresholds: memory does not grow with a run.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from specreason_batch.accounting.load import RunFiles

Array = NDArray[Any]
EXPECTED, GREEDY, YES_NO = "expected", "greedy", "yes_no"  # judge.reading
_COLUMNS = (
    *("prompt_id", "sample_index", "step_index", "author", "accepted", "num_tokens", "rejected_num_tokens"),
    *("score", "digit_probs", "digit_mass"),
)
_CHAIN = ("prompt_id", "sample_index")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grading:
    """How a run read its grades, and what it asked of them."""

    reading: str
    mass_floor: float
    threshold: float

    @classmethod
    def of(cls, run: RunFiles) -> "Grading":
        judge, policy = run.config["judge"], run.config["policy"]
        return cls(reading=judge["reading"], mass_floor=judge["mass_floor"], threshold=policy["threshold"])

    @property
    def thresholds(self) -> dict[str, list[float]]:
        """Those to replay, by reading; the run's own is among its reading's."""
        grids = {EXPECTED: np.arange(0, 9.25, 0.25), GREEDY: np.arange(0.0, 10.0), YES_NO: np.arange(21) / 20}
        readings = (YES_NO,) if self.reading == YES_NO else (EXPECTED, GREEDY)
        return {
            name: sorted({*grids[name].tolist(), *([self.threshold] if name == self.reading else [])})
            for name in readings
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Tokens and decisions of the run as it was, over committed chains. Exact."""

    num_chains: int = 0
    num_steps: int = 0
    num_graded: int = 0
    num_accepted: int = 0
    num_uncertain: int = 0  # grades whose likeliest token is not known to be a digit, read as unreadable by `greedy`
    draft_tokens_kept: int = 0
    draft_tokens_rejected: int = 0
    base_tokens: int = 0
    rewrite_tokens: int = 0  # of base_tokens, those in place of a rejected draft

    def __add__(self, other: "Recorded") -> "Recorded":
        return Recorded(**{name: getattr(self, name) + getattr(other, name) for name in Recorded.__slots__})

    @property
    def rewrite_ratio(self) -> float | None:
        """Tokens of a rewrite by tokens of the draft that it replaced. None: nothing was rewritten."""
        return self.rewrite_tokens / self.draft_tokens_rejected if self.draft_tokens_rejected else None


@dataclass(slots=True)
class Curves:
    """Counts at each threshold of one reading."""

    thresholds: Array
    accepted: Array = field(init=False)  # drafts
    accepted_tokens: Array = field(init=False)  # of those drafts
    rejected_anew_tokens: Array = field(init=False)  # of drafts that the run kept: their rewrites are not known
    saved_tokens: Array = field(init=False)  # of rewrites that the run made and that would not be needed
    same_chains: Array = field(init=False)  # chains without a changed decision
    same_steps: Array = field(init=False)  # steps before their chain's first changed decision

    def __post_init__(self) -> None:
        for name in _COUNTS:
            setattr(self, name, np.zeros(len(self.thresholds)))

    def add(self, steps: pl.DataFrame, score: Array) -> None:
        """One part's steps, all of each chain's, in order; and their scores, NaN where there is none."""
        graded = steps["digit_mass"].is_not_null().to_numpy()
        kept = steps["accepted"].fill_null(False).to_numpy()[graded]
        written = steps["num_tokens"].to_numpy()[graded]
        drafted = np.where(kept, written, steps["rejected_num_tokens"].fill_null(0).to_numpy()[graded])
        place = self._place(np.nan_to_num(score[graded], nan=-np.inf))
        self.accepted += self._from(place, None)
        self.accepted_tokens += self._from(place, drafted)
        self.rejected_anew_tokens += (drafted * kept).sum() - self._from(place, drafted * kept)
        self.saved_tokens += self._from(place, written * ~kept)
        self._add_unchanged(steps, score)

    def _place(self, values: Array) -> Array:
        """The number of thresholds that a value reaches: those are the first ones."""
        return np.searchsorted(self.thresholds, values, side="right")

    def _from(self, place: Array, weights: Array | None) -> Array:
        """Sums at each threshold over those that reach it."""
        counted = np.bincount(place, weights, minlength=len(self.thresholds) + 1)
        return counted[::-1].cumsum()[::-1][1:]

    def _add_unchanged(self, steps: pl.DataFrame, score: Array) -> None:
        """Up to a step no decision changes where each rejected score so far < threshold <= each accepted one."""
        scores = pl.Series("new_score", score).fill_nan(-np.inf)
        bounds = steps.with_columns(
            above=pl.when(~pl.col("accepted")).then(scores).otherwise(-np.inf),
            upto=pl.when(pl.col("accepted")).then(scores).otherwise(np.inf),
        ).select(
            pl.col("above").cum_max().over(_CHAIN),
            pl.col("upto").cum_min().over(_CHAIN),
            last=pl.int_range(pl.len()).over(_CHAIN) == pl.len().over(_CHAIN) - 1,
        )
        first, end = self._place(bounds["above"].to_numpy()), self._place(bounds["upto"].to_numpy())
        last = bounds["last"].to_numpy()
        self.same_steps += self._within(first, end)
        self.same_chains += self._within(first[last], end[last])

    def _within(self, first: Array, end: Array) -> Array:
        """How many ranges [first, end) of threshold numbers hold each threshold."""
        some = first < end
        size = len(self.thresholds) + 1
        begun, ended = (np.bincount(places[some], minlength=size) for places in (first, end))
        return (begun - ended).cumsum()[:-1]


_COUNTS = ("accepted", "accepted_tokens", "rejected_anew_tokens", "saved_tokens", "same_chains", "same_steps")


def replay(run: RunFiles) -> tuple[Recorded, dict[str, Curves]]:
    """The run as it was, and its curves by reading."""
    grading, recorded = Grading.of(run), Recorded()
    curves = {reading: Curves(np.array(grid)) for reading, grid in grading.thresholds.items()}
    for path in run.files("steps"):
        steps = read_steps(path)
        recorded += _count(steps, grading)
        for reading, curve in curves.items():
            curve.add(steps, read_scores(steps, reading, grading))
    return recorded, curves


def read_steps(path: Path) -> pl.DataFrame:
    """A part's steps, each chain's together and in order."""
    return pl.read_parquet(path, columns=list(_COLUMNS)).sort(*_CHAIN, "step_index")


def _count(steps: pl.DataFrame, grading: Grading) -> Recorded:
    by_draft, accepted = pl.col("author") == "draft", pl.col("accepted")
    counted = steps.select(
        num_chains=pl.struct(_CHAIN).n_unique(),
        num_steps=pl.len(),
        num_graded=pl.col("digit_mass").count(),
        num_accepted=accepted.sum(),
        draft_tokens_kept=pl.col("num_tokens").filter(by_draft).sum(),
        draft_tokens_rejected=pl.col("rejected_num_tokens").sum(),
        base_tokens=pl.col("num_tokens").filter(~by_draft).sum(),
        rewrite_tokens=pl.col("num_tokens").filter(~accepted.fill_null(True)).sum(),
    ).row(0, named=True)
    uncertain = 0 if grading.reading != EXPECTED else int(_is_uncertain(steps).sum())
    return Recorded(**counted, num_uncertain=uncertain)


def read_scores(steps: pl.DataFrame, reading: str, grading: Grading) -> Array:
    """Each step's score by a reading, NaN where there is none: as recorded for the run's own, else from digit_probs."""
    if reading == grading.reading:
        return steps["score"].fill_null(np.nan).to_numpy()
    mass = steps["digit_mass"].fill_null(0.0).to_numpy()
    probs = _probs(steps)
    if reading == GREEDY:
        return np.where(_is_uncertain(steps) | (mass == 0), np.nan, probs.argmax(1))
    total = probs.sum(1)
    readable = (mass > 0) & (mass >= grading.mass_floor)
    return np.where(readable, probs @ np.arange(10.0) / np.where(total > 0, total, 1.0), np.nan)


def _probs(steps: pl.DataFrame) -> Array:
    """Ten columns; zeros where there is no grade."""
    column = steps["digit_probs"].cast(pl.List(pl.Float64)).fill_null([0.0] * 10)
    return column.list.to_array(10).to_numpy()


def _is_uncertain(steps: pl.DataFrame) -> Array:
    """Whether a token that is no digit may have been likelier than every digit: only their sum is known."""
    graded: Array = steps["digit_mass"].is_not_null().to_numpy()
    rest: Array = 1.0 - steps["digit_mass"].fill_null(0.0).to_numpy()
    uncertain: Array = graded & (_probs(steps).max(1) < rest)
    return uncertain
