"""One part's chains: what has to be compared, and the verdicts once it has been. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specreason_batch.store.verdicts import AnswerKind, Verdict, VerdictBasis
from specreason_batch.verify.compare import Comparison, Outcome
from specreason_batch.verify.extract import boxed, extract
from specreason_batch.verify.spelling import kind_of
from specreason_batch.verify.vote import Vote, common_kind, count_votes, pairs

NO_ANSWER = "no answer"
Outcomes = Mapping[Comparison, Outcome]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What of a chain is looked at."""

    prompt_id: str
    sample_index: int
    gold: str | None
    kind: AnswerKind | None  # as the gold answer or the user says; None: as the samples' answers look
    extracted: str | None


def has_gold(row: Mapping[str, Any]) -> bool:
    return row.get("gold") is not None and bool(str(row["gold"]).strip())


def read_sample(row: Mapping[str, Any], kind: AnswerKind | None) -> Sample:
    """`row`: prompt_id, sample_index, answer; gold where there is one; thinking where it may be looked at.

    `kind` None: as the answers look.
    """
    gold = str(row["gold"]) if has_gold(row) else None
    kind = kind or (kind_of(gold) if gold is not None else None)
    extracted = extract(row["answer"], kind) or boxed(row.get("thinking") or "")
    return Sample(
        prompt_id=row["prompt_id"], sample_index=row["sample_index"], gold=gold, kind=kind, extracted=extracted
    )


@dataclass(frozen=True, slots=True)
class Ballot:
    """All samples of a prompt that has no gold answer."""

    samples: Sequence[Sample]

    @property
    def kind(self) -> AnswerKind:
        return self.samples[0].kind or common_kind(self.answers())

    def answers(self) -> list[str]:
        return [sample.extracted for sample in self.samples if sample.extracted is not None]

    def comparison(self, earlier: str, later: str) -> Comparison:
        return Comparison(kind=self.kind, expected=earlier, extracted=later)

    def comparisons(self) -> Iterator[Comparison]:
        return (self.comparison(*pair) for pair in pairs(self.answers()))

    def count(self, outcomes: Outcomes, majority: float) -> Vote:
        def is_same(earlier: str, later: str) -> bool:
            return outcomes[self.comparison(earlier, later)].same is True

        return count_votes([sample.extracted for sample in self.samples], is_same, majority)


@dataclass(frozen=True, slots=True)
class PartJudging:
    """The samples of a part, and the ballots of those without a gold answer, other parts' samples included."""

    samples: Sequence[Sample]
    ballots: Mapping[str, Ballot]  # by prompt_id
    majority: float

    def comparisons(self) -> dict[Comparison, None]:
        """Each once, in order."""
        wanted = dict.fromkeys(found for sample in self.samples if (found := against_gold(sample)))
        return wanted | dict.fromkeys(found for ballot in self.ballots.values() for found in ballot.comparisons())

    def rows(self, outcomes: Outcomes) -> list[dict[str, Any]]:
        """Verdict rows, as the part's chains follow one another. `outcomes`: of all `comparisons`."""
        votes = {prompt_id: ballot.count(outcomes, self.majority) for prompt_id, ballot in self.ballots.items()}
        return [self._row(sample, outcomes, votes) for sample in self.samples]

    def _row(self, sample: Sample, outcomes: Outcomes, votes: Mapping[str, Vote]) -> dict[str, Any]:
        given = {"prompt_id": sample.prompt_id, "sample_index": sample.sample_index, "extracted": sample.extracted}
        if sample.gold is not None:
            return given | _by_gold(sample, outcomes)
        return given | _by_vote(sample, self.ballots[sample.prompt_id], votes[sample.prompt_id], outcomes)


def against_gold(sample: Sample) -> Comparison | None:
    """None where there is nothing to compare, or nothing to compare with."""
    if sample.gold is None or sample.kind is None or sample.extracted is None:
        return None
    return Comparison(kind=sample.kind, expected=sample.gold, extracted=sample.extracted)


def _by_gold(sample: Sample, outcomes: Outcomes) -> dict[str, Any]:
    basis = {"basis": VerdictBasis.gold, "kind": sample.kind, "expected": sample.gold}
    comparison = against_gold(sample)
    return basis | (_judge(outcomes[comparison]) if comparison else _verdict(Verdict.wrong, NO_ANSWER))


def _by_vote(sample: Sample, ballot: Ballot, vote: Vote, outcomes: Outcomes) -> dict[str, Any]:
    if vote.winner is None:
        judged = _verdict(Verdict.unverifiable, vote.reason) if sample.extracted else _verdict(Verdict.wrong, NO_ANSWER)
        return {"basis": None, "kind": None, "expected": None} | judged
    basis = {"basis": VerdictBasis.majority, "kind": ballot.kind, "expected": vote.winner}
    if sample.extracted is None:
        return basis | _verdict(Verdict.wrong, NO_ANSWER)
    if sample.extracted in vote.supporters:
        return basis | _verdict(Verdict.right)
    return basis | _judge(_between(vote.winner, sample.extracted, ballot, outcomes))


def _between(one: str, other: str, ballot: Ballot, outcomes: Outcomes) -> Outcome:
    """Whichever came first."""
    return outcomes.get(ballot.comparison(one, other)) or outcomes[ballot.comparison(other, one)]


def _judge(outcome: Outcome) -> dict[str, Any]:
    if outcome.same is None:
        return _verdict(Verdict.unverifiable, outcome.reason, outcome.seconds)
    return _verdict(Verdict.right if outcome.same else Verdict.wrong, None, outcome.seconds)


def _verdict(verdict: Verdict, reason: str | None = None, seconds: float = 0.0) -> dict[str, Any]:
    return {"verdict": verdict, "reason": reason, "seconds": seconds}
