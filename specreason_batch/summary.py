"""The closing table: what a run's committed output says, figure by figure. Reads files only."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from rich.table import Table

from specreason_batch.answers import is_same_answer
from specreason_batch.store.reading import scan
from specreason_batch.types import Phase, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUse:
    """How much of one engine a run used, over all its rounds."""

    busy_share: float  # of the time, with requests outstanding at it; 0-1
    mean_requests: float  # outstanding, over all the time
    peak_kv_load: int  # tokens of KV cache that the active chains needed when its share of the capacity was greatest
    kv_capacity: int  # tokens that the KV cache held then


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of one run's output, over all its attempts."""

    num_chains: int
    accuracy: float | None  # right answers by chains with a gold answer; None: no gold answers
    num_gold: int
    thinking_ends: dict[str, int]
    step_ends: dict[str, int]
    num_unsplit_blank_lines: int
    mean_steps: float
    draft_step_share: float  # kept steps written by the draft
    acceptance: float | None  # accepted by decided drafts; None: nothing was decided
    num_graded: int
    num_unreadable: int
    mean_digit_mass: float | None
    tokens: dict[str, int]  # generated, by phase
    rejected_tokens: int
    cached_share: float  # of the prompt tokens sent
    grade_prompt_tokens: int
    recomputed_tokens: int  # prompt tokens that an engine had computed before and did not find in its cache
    recomputed_share: float  # of the prompt tokens sent
    seconds: float  # wall-clock of all rounds: of all attempts and shards, added up
    phase_seconds: dict[str, float]  # lockstep only
    engines: dict[Role, EngineUse]  # only those that the policy needs
    idle_share: float  # of the time, with no request outstanding at either engine; 0-1
    num_parked: int  # times that a chain was parked for want of KV memory
    most_waiting: int  # parked at the end of a round, at most

    @property
    def chains_per_second(self) -> float:
        return self.num_chains / self.seconds if self.seconds else 0.0


def summarise(output_dir: Path) -> Summary | None:
    """None if no chain is committed yet."""
    chains, steps, rounds = (scan(output_dir, kind) for kind in ("chains", "steps", "rounds"))
    if chains is None or steps is None or rounds is None:
        return None
    right, gold = _count_right(chains)
    step = steps.select(
        count=pl.len(),
        draft=(pl.col("author") == "draft").mean(),
        acceptance=pl.col("accepted").mean(),
        graded=pl.col("digit_mass").count(),
        unreadable=(pl.col("digit_mass").is_not_null() & pl.col("score").is_null()).sum(),
        mass=pl.col("digit_mass").mean(),
        rejected=pl.col("rejected_num_tokens").sum(),
    ).collect()
    total = rounds.select(pl.all().exclude("round", "started_at").sum()).collect().row(0, named=True)
    num_chains, unsplit = chains.select(pl.len(), pl.col("num_unsplit_blank_lines").sum()).collect().row(0)
    prompt_tokens = sum(total[f"{phase}_num_prompt_tokens"] for phase in Phase)
    recomputed = sum(total[f"{phase}_num_recomputed_tokens"] for phase in Phase)
    return Summary(
        num_chains=num_chains,
        accuracy=right / gold if gold else None,
        num_gold=gold,
        thinking_ends=_counts(chains, "thinking_end"),
        step_ends=_counts(steps, "ended_by"),
        num_unsplit_blank_lines=unsplit,
        mean_steps=step["count"].item() / num_chains,
        draft_step_share=step["draft"].item() or 0.0,
        acceptance=step["acceptance"].item(),
        num_graded=step["graded"].item(),
        num_unreadable=step["unreadable"].item(),
        mean_digit_mass=step["mass"].item(),
        tokens={phase: total[f"{phase}_num_generated_tokens"] for phase in Phase if phase is not Phase.grade},
        rejected_tokens=step["rejected"].item(),
        cached_share=sum(total[f"{phase}_num_cached_tokens"] for phase in Phase) / max(1, prompt_tokens),
        grade_prompt_tokens=total["grade_num_prompt_tokens"],
        recomputed_tokens=recomputed,
        recomputed_share=recomputed / max(1, prompt_tokens),
        seconds=total["seconds"],
        phase_seconds={name: total[f"{name}_seconds"] for name in ("draft", "grade", "rewrite")},
        engines={role: use for role in Role if (use := _engine_use(rounds, role)) is not None},
        idle_share=total["idle_seconds"] / total["seconds"] if total["seconds"] else 0.0,
        num_parked=total["num_parked"],
        most_waiting=rounds.select(pl.col("num_waiting").max()).collect().item(),
    )


def _engine_use(rounds: pl.LazyFrame, role: Role) -> EngineUse | None:
    """None if the policy did without it: its columns are null."""
    names = ("seconds", f"{role}_busy_seconds", f"{role}_request_seconds", f"{role}_kv_load", f"{role}_kv_capacity")
    rows = rounds.select(names).drop_nulls().collect()
    if rows.is_empty():
        return None
    seconds, busy, requests, *_ = rows.sum().row(0)
    *_, load, capacity = rows.sort(pl.col(f"{role}_kv_load") / pl.col(f"{role}_kv_capacity")).row(-1)
    return EngineUse(
        busy_share=busy / seconds if seconds else 0.0,
        mean_requests=requests / seconds if seconds else 0.0,
        peak_kv_load=load,
        kv_capacity=capacity,
    )


def _counts(rows: pl.LazyFrame, column: str) -> dict[str, int]:
    """How often each value stands there, most frequent first."""
    return dict(rows.group_by(column).len().sort("len", column, descending=True).collect().iter_rows())


def _count_right(chains: pl.LazyFrame) -> tuple[int, int]:
    """Right answers, and chains that have a gold answer."""
    if "gold_answer" not in chains.collect_schema().names():
        return 0, 0
    rows = chains.select("answer", "gold_answer").filter(pl.col("gold_answer").is_not_null()).collect()
    return sum(is_same_answer(answer, gold) for answer, gold in rows.iter_rows()), rows.height


def summary_table(summary: Summary, title: str) -> Table:
    """The figures for a person."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(justify="right", style="dim")
    table.add_column()
    for name, value in _lines(summary):
        table.add_row(name, value)
    return table


def _lines(summary: Summary) -> list[tuple[str, str]]:
    lines = [
        ("chains", f"{summary.num_chains:,} ({_listed(summary.thinking_ends)})"),
        ("accuracy", _accuracy(summary)),
        ("steps a chain", f"{summary.mean_steps:.1f}, {summary.draft_step_share:.1%} of them by the draft"),
        ("drafts accepted", "-" if summary.acceptance is None else f"{summary.acceptance:.1%}"),
        ("steps ended by", _listed(summary.step_ends)),
        ("tokens generated", f"{_listed(summary.tokens)}; {summary.rejected_tokens:,} of the draft's rejected"),
        ("prompt tokens cached", f"{summary.cached_share:.1%}"),
        ("rounds, wall-clock", f"{summary.seconds:.1f} s, {summary.chains_per_second:.1f} chains/s"),
    ]
    if summary.num_graded:
        lines.insert(4, ("grades", _grades(summary)))
    if summary.num_unsplit_blank_lines:
        lines.append(
            ("blank lines of two tokens", f"{summary.num_unsplit_blank_lines:,} steps hold one; it ends no step")
        )
    if any(summary.phase_seconds.values()):
        shares = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in summary.phase_seconds.items())
        lines.append(("by phase", shares))
    return lines + _engine_lines(summary)


def _engine_lines(summary: Summary) -> list[tuple[str, str]]:
    """How the engines were used; where memory was short, what came of it."""
    lines = [
        ("engines busy", _busy(summary)),
        ("requests at them, mean", _by_engine(summary, lambda use: f"{use.mean_requests:.1f}")),
        ("KV tokens needed, most", _by_engine(summary, _kv_need)),
    ]
    if summary.num_parked:
        times = f"{summary.num_parked:,} times for want of KV memory, at most {summary.most_waiting:,} at once"
        lines.append(("chains parked", times))
    if summary.recomputed_tokens:
        tokens = f"{summary.recomputed_tokens:,} that had been evicted, {summary.recomputed_share:.1%}"
        lines.append(("prompt tokens recomputed", tokens))
    return lines


def _busy(summary: Summary) -> str:
    shares = _by_engine(summary, lambda use: f"{use.busy_share:.1%}")
    return f"{shares} of the time" + (f"; neither {summary.idle_share:.1%}" if len(summary.engines) == 2 else "")


def _kv_need(use: EngineUse) -> str:
    return f"{use.peak_kv_load:,} of {use.kv_capacity:,} ({use.peak_kv_load / use.kv_capacity:.1%})"


def _by_engine(summary: Summary, figure: Callable[[EngineUse], str]) -> str:
    return ", ".join(f"{role} {figure(use)}" for role, use in summary.engines.items())


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _accuracy(summary: Summary) -> str:
    if summary.accuracy is None:
        return "no gold answers"
    return f"{summary.accuracy:.1%} of {summary.num_gold:,} with a gold answer (exact match of \\boxed{{}})"


def _grades(summary: Summary) -> str:
    return (
        f"{summary.num_graded:,}, {summary.num_unreadable:,} unreadable, mean digit mass "
        f"{summary.mean_digit_mass:.3f}, {summary.grade_prompt_tokens:,} prompt tokens"
    )
