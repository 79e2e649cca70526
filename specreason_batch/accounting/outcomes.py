"""What became of each chain: its lengths, its ends and, where the run was verified, its verdict. One row a chain."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import comb

import polars as pl

from specreason_batch.accounting.intervals import bootstrap_mean
from specreason_batch.accounting.load import RunFiles
from specreason_batch.store.verdicts import Verdict, VerdictBasis

KEYS = ["prompt_id", "sample_index"]
UNVERIFIED = "unverified"
OUTCOMES = (*(verdict.value for verdict in Verdict), UNVERIFIED)
_JUDGED = (Verdict.right, Verdict.wrong)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts, with its 95 % interval by bootstrap."""

    value: float
    low: float
    high: float
    num_prompts: int


@dataclass(frozen=True)
class Outcomes:
    """All committed chains; texts stay on disk."""

    frame: (
        pl.DataFrame
    )  # KEYS, thinking_end, answer_end, num_steps, num_thinking_tokens, num_answer_tokens, num_tokens,
    # outcome (one of OUTCOMES), is_judged (right or wrong by a gold answer), extracted

    @classmethod
    def of(cls, run: RunFiles) -> "Outcomes":
        thinking = pl.col("num_draft_tokens_kept") + pl.col("num_base_tokens")
        chains = run.chains.select(
            *(*KEYS, "thinking_end", "answer_end", "num_steps", "num_answer_tokens"),
            num_thinking_tokens=thinking,
            num_tokens=thinking + pl.col("num_answer_tokens"),
        )
        if run.verdicts is None:
            unverified = {"verdict": pl.String, "basis": pl.String, "extracted": pl.String}
            joined = chains.with_columns(pl.lit(None, kind).alias(name) for name, kind in unverified.items())
        else:
            joined = chains.join(run.verdicts.select(*KEYS, "verdict", "basis", "extracted"), on=KEYS, how="left")
        is_gold = pl.col("basis") == VerdictBasis.gold.value
        frame = joined.with_columns(
            outcome=pl.col("verdict").fill_null(UNVERIFIED),
            is_judged=(is_gold & pl.col("verdict").is_in([verdict.value for verdict in _JUDGED])).fill_null(False),
        )
        return cls(frame.drop("verdict").collect(engine="streaming"))

    @cached_property
    def num_by_outcome(self) -> dict[str, int]:
        """0 for those that there are none of."""
        counted = dict(self.frame.group_by("outcome").len().iter_rows())
        return {outcome: counted.get(outcome, 0) for outcome in OUTCOMES}

    @property
    def num_verified(self) -> int:
        return self.frame.height - self.num_by_outcome[UNVERIFIED]

    @cached_property
    def num_judged(self) -> int:
        """Right or wrong by a gold answer."""
        return int(self.frame["is_judged"].sum())

    @cached_property
    def num_right(self) -> int:
        """By a gold answer."""
        return self.frame.filter("is_judged", outcome=Verdict.right.value).height

    @property
    def num_correct(self) -> int | None:
        """Right answers by gold, of the whole run; None, and `note_on_correct` says why, where they are not known."""
        return None if self.num_by_outcome[UNVERIFIED] or not self.num_judged else self.num_right

    @property
    def note_on_correct(self) -> str:
        if not self.num_verified:
            return "the run is not verified: python -m jobs.verify"
        if missing := self.num_by_outcome[UNVERIFIED]:
            return f"{missing:,} chains are not verified yet: python -m jobs.verify"
        return "right by the gold answer" if self.num_judged else "no chain could be compared with a gold answer"

    @property
    def by_majority(self) -> tuple[int, int]:
        """Chains that agree with the majority of their prompt's samples, for want of a gold answer; of so many."""
        compared = self.frame.filter(
            pl.col("basis") == VerdictBasis.majority.value, pl.col("outcome").is_in([*map(str, _JUDGED)])
        )
        return compared.filter(outcome=Verdict.right.value).height, compared.height

    @cached_property
    def _prompts(self) -> list[tuple[int, int, int]]:
        """(judged samples, right ones, number of prompts that have so many)."""
        right = (pl.col("outcome") == Verdict.right.value).sum()
        prompts = self.frame.filter("is_judged").group_by("prompt_id").agg(samples=pl.len(), right=right)
        return prompts.group_by("samples", "right").len().sort("samples", "right").rows()

    @property
    def max_samples(self) -> int:
        """Judged ones of a prompt, at most."""
        return max((samples for samples, _, _ in self._prompts), default=0)

    def mean_over_prompts(self) -> Estimate | None:
        """Each prompt's share of right answers. None: nothing is judged."""
        return _estimate([(right / samples, count) for samples, right, count in self._prompts])

    def pass_at_k(self) -> Iterator[tuple[int, Estimate]]:
        """For each k: whether one of k samples is right, without bias (arXiv 2107.03374); prompts with k or more."""
        for k in range(1, self.max_samples + 1):
            enough = [prompt for prompt in self._prompts if prompt[0] >= k]
            found = _estimate(
                [(1 - comb(samples - right, k) / comb(samples, k), count) for samples, right, count in enough]
            )
            assert found is not None
            yield k, found

    def majority_accuracy(self) -> float | None:
        """Of the most frequent answer among each prompt's judged samples, ties shared out; None: nothing is judged.

        Answers are counted as texts: two spellings of one number are two answers.
        """
        judged = self.frame.lazy().filter("is_judged")
        right = (pl.col("outcome") == Verdict.right.value).any()
        votes = judged.drop_nulls("extracted").group_by("prompt_id", "extracted").agg(votes=pl.len(), right=right)
        most = votes.filter(pl.col("votes") == pl.col("votes").max().over("prompt_id"))
        chosen = most.group_by("prompt_id").agg(pl.col("right").mean())
        prompts = judged.select("prompt_id").unique().join(chosen, on="prompt_id", how="left")
        found: float | None = prompts.select(pl.col("right").fill_null(0.0).mean()).collect().item()
        return found


def _estimate(units: list[tuple[float, int]]) -> Estimate | None:
    """Of prompts by their values: (value, number of prompts)."""
    if not units:
        return None
    values, counts = zip(*units, strict=True)
    total = sum(counts)
    mean = sum(value * count for value, count in units) / total
    return Estimate(mean, *bootstrap_mean(values, counts), num_prompts=total)
