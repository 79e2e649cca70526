"""Section `tokens`: what was generated and sent, by role and phase, and how much of it was thrown away."""

from dataclasses import dataclass
from itertools import pairwise

import polars as pl

from specreason_batch.accounting.figures import Chart, ChartKind, Figure, Section, Table
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.ratios import percent
from specreason_batch.store.attempts import Attempt, AttemptState
from specreason_batch.store.schemas import PHASE_COUNTS
from specreason_batch.types import Phase, Role

TEXT = (
    "Generated tokens are those of steps and answers; a grade is one token more and stands with the grades. Tokens by "
    "author are of committed chains. Those by phase are as the rounds counted them: they hold the work in flight too, "
    "and what was lost with chains in flight."
)
_NO_ROUNDS = "the rounds files were removed"
_CUT_SHORT = (AttemptState.running, AttemptState.lost)  # states of attempts that may have lost what they generated


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedTokens:
    """Sums over committed chains, and what is known to have been generated twice."""

    draft_kept: int
    draft_rejected: int
    base_steps: int
    answers: int
    grade_prompts: int
    cached_prompts: int  # of all requests
    redone: int  # lost in an orderly stop or an engine's death
    redone_after_kill: int | None  # lost with a killed process, as far as is known; None: no attempt is on record

    @classmethod
    def of(cls, run: RunFiles) -> "CommittedTokens":
        names = {
            "draft_kept": "num_draft_tokens_kept",
            "draft_rejected": "num_draft_tokens_rejected",
            "base_steps": "num_base_tokens",
            "answers": "num_answer_tokens",
            "grade_prompts": "num_grade_prompt_tokens",
            "cached_prompts": "num_cached_prompt_tokens",
            "redone": "num_redone_tokens",
        }
        sums = run.chains.select(pl.col(column).sum().alias(name) for name, column in names.items())
        lost = sum(map(num_lost_tokens, run.attempts_by_shard.values())) if run.attempts else None
        return cls(**sums.collect(engine="streaming").row(0, named=True), redone_after_kill=lost)

    @property
    def kept(self) -> int:
        return self.draft_kept + self.base_steps + self.answers

    @property
    def wasted(self) -> int:
        return self.draft_rejected + self.redone + (self.redone_after_kill or 0)

    @property
    def generated(self) -> int:
        return self.kept + self.wasted


def num_lost_tokens(attempts: list[Attempt]) -> int:
    """Tokens that one shard's killed attempts generated and lost, each counted once.

    An attempt's own figure is of all that was lost since the checkpoint that it found. Where the attempt before it was
    killed without leaving a newer one, that is everything that one generated, and what it had itself found lost.
    """
    return sum(
        min(found.progress.num_redone_tokens, killed.progress.num_generated_tokens)
        for killed, found in pairwise(attempts)
        if killed.state in _CUT_SHORT
    )


def section(run: RunFiles) -> Section:
    committed, phases = CommittedTokens.of(run), count_phases(run)
    return Section(
        name="tokens",
        title="Tokens",
        text=TEXT,
        figures=(*_generated(committed), *_uncommitted(committed, phases), *_prompts(committed, phases)),
        tables=(_by_author(committed), *_by_phase(phases)),
        charts=(_author_chart(committed, Role(run.config["policy"]["answer_role"])), *_prompt_chart(phases)),
    )


def count_phases(run: RunFiles) -> pl.DataFrame | None:
    """What the rounds counted: a row a phase, columns PHASE_COUNTS. None: there are no rounds."""
    if run.rounds is None:
        return None
    sums = run.rounds.select(pl.col(f"{phase}_{count}").sum() for phase in Phase for count in PHASE_COUNTS)
    total = sums.collect(engine="streaming").row(0, named=True)
    return pl.DataFrame(
        [{"phase": phase.value} | {count: total[f"{phase}_{count}"] for count in PHASE_COUNTS} for phase in Phase]
    )


def _generated(tokens: CommittedTokens) -> list[Figure]:
    def figure(name: str, label: str, value: int | None, note: str = "") -> Figure:
        return Figure(name=name, label=label, value=value, unit="tokens", note=note)

    unknown = None if tokens.redone_after_kill is not None else "what kills lost is unknown: no attempt's file is there"
    return [
        figure("generated_tokens", "generated", tokens.generated, unknown or "kept, rejected and redone"),
        figure("kept_tokens", "kept", tokens.kept, "draft steps kept, base steps and answers"),
        figure("draft_kept_tokens", "draft steps kept", tokens.draft_kept),
        figure("draft_rejected_tokens", "drafts rejected", tokens.draft_rejected),
        figure("base_step_tokens", "steps by the base", tokens.base_steps),
        figure("answer_tokens", "answers", tokens.answers),
        figure("redone_tokens", "redone after stops", tokens.redone, "lost when a run was stopped or an engine died"),
        figure(
            "redone_after_kill_tokens",
            "redone after kills",
            tokens.redone_after_kill,
            unknown or "lost with a killed process since its last checkpoint, as of its last sign of life",
        ),
        Figure(
            name="wasted_share",
            label="thrown away",
            value=percent(tokens.wasted, tokens.generated),
            unit="%",
            note=unknown or "rejected and redone, of generated",
        ),
    ]


def _uncommitted(tokens: CommittedTokens, phases: pl.DataFrame | None) -> list[Figure]:
    """What the rounds counted beyond the chains: 0 in a finished run that nobody has killed."""
    counted = _written(phases)
    others = tokens.draft_kept + tokens.draft_rejected + tokens.base_steps + tokens.answers + tokens.redone
    return [
        Figure(
            name="rounds_generated_tokens",
            label="counted by rounds",
            value=counted,
            unit="tokens",
            note=_NO_ROUNDS if counted is None else "steps and answers",
        ),
        Figure(
            name="uncommitted_tokens",
            label="in no committed chain",
            value=None if counted is None else counted - others,
            unit="tokens",
            note=_NO_ROUNDS
            if counted is None
            else "counted by rounds, not by committed chains: in flight, lost with a kill, or of a step given up",
        ),
    ]


def _written(phases: pl.DataFrame | None) -> int | None:
    """Tokens of steps and answers."""
    return None if phases is None else int(phases.filter(pl.col("phase") != "grade")["num_generated_tokens"].sum())


def _prompts(tokens: CommittedTokens, phases: pl.DataFrame | None) -> list[Figure]:
    grade = phases.filter(pl.col("phase") == "grade") if phases is not None else None
    counts = {} if phases is None or grade is None else _prompt_counts(phases, grade)
    note = _NO_ROUNDS if phases is None else ""

    def figure(name: str, label: str, unit: str = "tokens") -> Figure:
        return Figure(name=name, label=label, value=counts.get(name), unit=unit, note=note)

    return [
        Figure(
            name="grade_prompt_tokens",
            label="grading prompts of committed chains",
            value=tokens.grade_prompts,
            unit="tokens",
        ),
        figure("grade_new_tokens", "of all grading prompts, computed"),
        figure("grade_cached_tokens", "of all grading prompts, cached"),
        figure("prompt_tokens", "prompt tokens sent"),
        figure("cached_share", "of them cached", "%"),
        figure("recomputed_share", "of them recomputed", "%"),
    ]


def _prompt_counts(phases: pl.DataFrame, grade: pl.DataFrame) -> dict[str, float | None]:
    sent, cached, recomputed = phases.select(
        pl.col("num_prompt_tokens", "num_cached_tokens", "num_recomputed_tokens").sum()
    ).row(0)
    grade_sent, grade_cached = grade.select("num_prompt_tokens", "num_cached_tokens").row(0)
    return {
        "grade_new_tokens": grade_sent - grade_cached,
        "grade_cached_tokens": grade_cached,
        "prompt_tokens": sent,
        "cached_share": percent(cached, sent),
        "recomputed_share": percent(recomputed, sent),
    }


def _by_author(tokens: CommittedTokens) -> Table:
    rows = {
        "draft, kept": tokens.draft_kept,
        "draft, rejected": tokens.draft_rejected,
        "base, steps": tokens.base_steps,
        "answers": tokens.answers,
        "redone after stops": tokens.redone,
        "redone after kills": tokens.redone_after_kill,
    }
    shares = [percent(count, tokens.generated) for count in rows.values()]
    frame = pl.DataFrame(
        {"tokens_of": list(rows), "num_tokens": list(rows.values()), "share": shares},
        schema_overrides={"share": pl.Float64},
    )
    return Table(
        name="generated",
        title="Tokens generated for committed chains",
        frame=frame,
        labels={"tokens_of": "of", "num_tokens": "tokens", "share": "share"},
        units={"num_tokens": "tokens", "share": "%"},
    )


def _by_phase(phases: pl.DataFrame | None) -> list[Table]:
    if phases is None:
        return []
    new = pl.col("num_prompt_tokens") - pl.col("num_cached_tokens")
    cached = 100 * pl.col("num_cached_tokens") / pl.col("num_prompt_tokens")
    cached_share = pl.when(pl.col("num_prompt_tokens") > 0).then(cached)
    return [
        Table(
            name="phases",
            title="Requests and tokens by phase",
            frame=phases.with_columns(num_new_tokens=new, cached_share=cached_share),
            labels={
                "num_requests": "requests",
                "num_prompt_tokens": "sent",
                "num_cached_tokens": "cached",
                "num_recomputed_tokens": "recomputed",
                "num_generated_tokens": "generated",
                "num_new_tokens": "computed",
            },
            units={"cached_share": "%"}
            | {count: "tokens" for count in (*PHASE_COUNTS, "num_new_tokens") if count.endswith("_tokens")},
            note="as counted by rounds; recomputed ones were in the cache before and had been evicted, and are among "
            "the computed",
        )
    ]


def _author_chart(tokens: CommittedTokens, answer_role: Role) -> Chart:
    answers = {role: tokens.answers if role is answer_role else 0 for role in Role}
    frame = pl.DataFrame(
        {
            "author": [role.value for role in Role],
            "kept": [tokens.draft_kept, tokens.base_steps],
            "answers": [answers[role] for role in Role],
            "rejected": [tokens.draft_rejected, 0],
        }
    )
    return Chart(
        name="generated",
        title="Tokens generated for committed chains, by author",
        kind=ChartKind.stacked_bar,
        frame=frame,
        x="author",
        y=("kept", "answers", "rejected"),
        y_label="tokens",
        note="redone ones are of either author",
    )


def _prompt_chart(phases: pl.DataFrame | None) -> list[Chart]:
    if phases is None:
        return []
    first = pl.col("num_prompt_tokens") - pl.col("num_cached_tokens") - pl.col("num_recomputed_tokens")
    return [
        Chart(
            name="phases",
            title="Prompt and generated tokens by phase",
            kind=ChartKind.stacked_bar,
            frame=phases.select(
                "phase",
                generated="num_generated_tokens",
                computed=first,
                recomputed="num_recomputed_tokens",
                cached="num_cached_tokens",
            ),
            x="phase",
            y=("generated", "computed", "recomputed", "cached"),
            y_label="tokens",
        )
    ]
