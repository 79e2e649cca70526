"""Section `wall_clock`: where the attempts' time went, how busy the engines were, and how that changed over time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from specreason_batch.accounting.figures import Chart, ChartKind, Figure, Section, Table
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.ratios import percent, ratio
from specreason_batch.store.attempts import AttemptState
from specreason_batch.types import Phase, Role

TEXT = (
    "Seconds of all attempts, added up: shards that ran side by side count each. Start-up is what a process did before "
    "its first shard, loading models mostly. In lockstep a moment belongs to one phase. In the other schedules phases "
    "overlap: how long each engine had requests is known, alone or both at once, but not which phase the time was for."
)
_NO_ROUNDS = "the rounds files were removed"
_NO_ATTEMPTS = "no attempt's file is there"
_NUM_BUCKETS = 120
_LOCKSTEP = {
    "draft": "drafting",
    "grade": "grading",
    "rewrite": "rewriting and answers",
    "between": "between the phases",
}
_FREE = {
    "draft_alone": "the draft engine alone",
    "base_alone": "the base engine alone",
    "both": "both engines at once",
    "neither": "neither engine",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocked:
    """Seconds by the attempts' own records; what is missing counts as None."""

    startup: float | None
    shards: float | None  # since each attempt began with its shard
    is_partial: bool  # some attempt did not end in order: its record is as of its last sign of life

    @classmethod
    def of(cls, run: RunFiles) -> "Clocked":
        attempts = run.attempts
        return cls(
            startup=sum(attempt.progress.startup_seconds for attempt in attempts) if attempts else None,
            shards=sum(attempt.progress.seconds for attempt in attempts) if attempts else None,
            is_partial=any(attempt.state is AttemptState.running for attempt in attempts),
        )

    @property
    def total(self) -> float | None:
        return None if self.startup is None or self.shards is None else self.startup + self.shards


def section(run: RunFiles) -> Section:
    clocked = Clocked.of(run)
    rounds = None if run.rounds is None else _totals(run.rounds)
    parts = _parts(clocked, rounds)
    charts = () if run.rounds is None else _charts_over_time(buckets(run.rounds))
    return Section(
        name="wall_clock",
        title="Wall-clock",
        text=TEXT,
        figures=(*_time_figures(clocked, rounds, parts), *_engine_figures(rounds), *_rates(run, clocked, rounds)),
        tables=(_part_table(parts), *_attempts(run)),
        charts=(_part_chart(parts), *charts),
    )


# --- where the time went ---


def _totals(rounds: pl.LazyFrame) -> dict[str, Any]:
    """Sums over rounds; a role that the policy does without counts as 0."""
    is_lockstep = pl.col("draft_seconds").is_not_null()
    busy = {role: pl.col(f"{role}_busy_seconds").fill_null(0.0) for role in Role}
    working = pl.col("seconds") - pl.col("idle_seconds")  # of at least one engine
    free = {
        "draft_alone": working - busy[Role.base],
        "base_alone": working - busy[Role.draft],
        "both": busy[Role.draft] + busy[Role.base] - working,
        "neither": pl.col("idle_seconds"),
    }
    phases = {name: pl.col(f"{name}_seconds").fill_null(0.0) for name in ("draft", "grade", "rewrite")}
    phases["between"] = pl.col("seconds") - pl.sum_horizontal(*phases.values())
    sums = [
        pl.col("seconds", "idle_seconds", "num_finished", "num_parked").sum(),
        pl.col("num_waiting").max(),
        pl.len().alias("num_rounds"),
        is_lockstep.sum().alias("num_lockstep"),
        *(expression.filter(is_lockstep).sum().alias(f"lockstep_{name}") for name, expression in phases.items()),
        *(expression.filter(~is_lockstep).sum().alias(f"free_{name}") for name, expression in free.items()),
        *(expression for role in Role for expression in _engine_sums(role)),
        pl.sum_horizontal(f"{phase}_num_generated_tokens" for phase in Phase if phase is not Phase.grade)
        .sum()
        .alias("num_generated_tokens"),
        (_first_second(pl.col("started_at")) + pl.col("seconds")).max().alias("last_second"),
        _first_second(pl.col("started_at")).min().alias("first_second"),
    ]
    return rounds.select(sums).collect(engine="streaming").row(0, named=True)


def _engine_sums(role: Role) -> Iterator[pl.Expr]:
    yield pl.col(f"{role}_busy_seconds", f"{role}_request_seconds").sum()
    yield pl.col(f"{role}_busy_seconds").count().alias(f"{role}_num_rounds")
    yield (pl.col(f"{role}_kv_load") / pl.col(f"{role}_kv_capacity")).max().alias(f"{role}_kv_peak")


def _first_second(started_at: pl.Expr) -> pl.Expr:
    """Seconds since the epoch."""
    return started_at.dt.epoch("us") / 1e6


def _parts(clocked: Clocked, rounds: dict[str, Any] | None) -> dict[str, tuple[str, float]]:
    """What the attempts' wall-clock consists of: label and seconds by name."""
    parts = {} if clocked.startup is None else {"startup": ("start-up", clocked.startup)}
    if rounds is None:
        return parts
    if rounds["num_lockstep"]:
        parts |= {name: (label, rounds[f"lockstep_{name}"]) for name, label in _LOCKSTEP.items()}
    if rounds["num_rounds"] > rounds["num_lockstep"]:
        parts |= {name: (label, rounds[f"free_{name}"]) for name, label in _FREE.items()}
    if clocked.shards is not None:
        parts["rest"] = ("opening, writing and rest", clocked.shards - rounds["seconds"])
    return parts


def _time_figures(clocked: Clocked, rounds: dict[str, Any] | None, parts: dict[str, tuple[str, float]]) -> list[Figure]:
    of_attempts = _NO_ATTEMPTS if clocked.total is None else ""
    of_rounds = _NO_ROUNDS if rounds is None else ""
    elapsed = None if rounds is None else rounds["last_second"] - rounds["first_second"]
    wall = "start-up, rounds and rest" + ("; as of the last signs of life" if clocked.is_partial else "")
    return [
        _seconds("attempt_seconds", "attempts' wall-clock", clocked.total, of_attempts or wall),
        _seconds("rounds_seconds", "of it in rounds", None if rounds is None else rounds["seconds"], of_rounds),
        _seconds("elapsed_seconds", "from the first round to the last", elapsed, of_rounds or "pauses included"),
        *(_seconds(f"{name}_seconds", label, value, _note_on(name, clocked)) for name, (label, value) in parts.items()),
    ]


def _note_on(part: str, clocked: Clocked) -> str:
    if part != "rest":
        return ""
    note = "attempts' seconds that are in no round: reading a checkpoint, writing the last part"
    cut = "; a killed or running attempt's rounds may be missing, or be newer than its last sign of life"
    return note + (cut if clocked.is_partial else "")


def _seconds(name: str, label: str, value: float | None, note: str = "") -> Figure:
    return Figure(name=name, label=label, value=value, unit="s", note=note)


def _part_table(parts: dict[str, tuple[str, float]]) -> Table:
    whole = sum(seconds for _, seconds in parts.values())
    rows = [
        {"part": name, "what": label, "seconds": seconds, "share": percent(seconds, whole)}
        for name, (label, seconds) in parts.items()
    ]
    types = {"part": pl.String, "what": pl.String, "seconds": pl.Float64, "share": pl.Float64}
    return Table(
        name="parts",
        title="Where the attempts' wall-clock went",
        frame=pl.DataFrame(rows, schema=types),
        units={"seconds": "s", "share": "%"},
    )


def _part_chart(parts: dict[str, tuple[str, float]]) -> Chart:
    return Chart(
        name="parts",
        title="Where the attempts' wall-clock went",
        kind=ChartKind.bar,
        frame=_part_table(parts).frame.select("what", "seconds"),
        x="what",
        y=("seconds",),
        y_label="s",
    )


# --- engines and rates ---


def _engine_figures(rounds: dict[str, Any] | None) -> list[Figure]:
    if rounds is None:
        return []
    used = [role for role in Role if rounds[f"{role}_num_rounds"]]
    return [
        *(figure for role in used for figure in _engine(role, rounds)),
        Figure(
            name="idle_share",
            label="no engine had a request",
            value=percent(rounds["idle_seconds"], rounds["seconds"]),
            unit="%",
            note="of the rounds' seconds",
        ),
        Figure(
            name="num_parked",
            label="times a chain was parked",
            value=rounds["num_parked"],
            note="for want of KV memory",
        ),
        Figure(
            name="most_waiting",
            label="chains parked at once, at most",
            value=rounds["num_waiting"],
            note="in one shard",
        ),
    ]


def _engine(role: Role, rounds: dict[str, Any]) -> list[Figure]:
    busy, requests = rounds[f"{role}_busy_seconds"], rounds[f"{role}_request_seconds"]
    return [
        Figure(
            name=f"{role}_busy_share",
            label=f"{role} engine busy",
            value=percent(busy, rounds["seconds"]),
            unit="%",
            note="of the rounds' seconds, with requests outstanding at it",
        ),
        Figure(
            name=f"{role}_mean_requests",
            label=f"requests at the {role} engine, mean",
            value=ratio(requests, rounds["seconds"]),
            note="over the rounds' seconds",
        ),
        Figure(
            name=f"{role}_mean_batch",
            label=f"requests at the {role} engine while busy, mean",
            value=ratio(requests, busy),
        ),
        Figure(
            name=f"{role}_peak_kv_share",
            label=f"KV memory needed at the {role} engine, most",
            value=percent(rounds[f"{role}_kv_peak"], 1),
            unit="%",
            note="tokens that active chains need, by those that it holds, at the end of a round",
        ),
    ]


def _rates(run: RunFiles, clocked: Clocked, rounds: dict[str, Any] | None) -> list[Figure]:
    tokens, seconds = (None, None) if rounds is None else (rounds["num_generated_tokens"], rounds["seconds"])
    of_all = _NO_ATTEMPTS if clocked.total is None else "committed, by the attempts' wall-clock, start-up included"
    return [
        Figure(
            name="chains_per_second",
            label="chains a second",
            value=ratio(run.num_chains, clocked.total),
            unit="chains/s",
            note=of_all,
        ),
        Figure(
            name="tokens_per_second",
            label="generated tokens a second",
            value=ratio(tokens, seconds),
            unit="tokens/s",
            note=_NO_ROUNDS
            if rounds is None
            else "of steps and answers, rejected ones included, by the rounds' seconds",
        ),
    ]


def _attempts(run: RunFiles) -> list[Table]:
    rows = [
        {
            "shard": shard,
            "attempt": attempt.number,
            "state": attempt.state.value,
            "host": attempt.owner.host,
            "slurm_job": attempt.owner.slurm_job,
            "startup_seconds": attempt.progress.startup_seconds,
            "seconds": attempt.progress.seconds,
            "num_generated_tokens": attempt.progress.num_generated_tokens,
            "num_redone_tokens": attempt.progress.num_redone_tokens,
            "num_rebuilds": attempt.progress.num_rebuilds,
            "error": attempt.error,
        }
        for shard, attempts in run.attempts_by_shard.items()
        for attempt in attempts
    ]
    if not rows:
        return []
    return [
        Table(
            name="attempts",
            title="Attempts",
            frame=pl.DataFrame(rows, infer_schema_length=None),
            labels={
                "slurm_job": "Slurm job",
                "startup_seconds": "start-up",
                "num_generated_tokens": "generated",
                "num_redone_tokens": "redone",
                "num_rebuilds": "engines rebuilt",
            },
            units={
                "startup_seconds": "s",
                "seconds": "s",
                "num_generated_tokens": "tokens",
                "num_redone_tokens": "tokens",
            },
            note="redone: lost by earlier attempts that were killed, since the checkpoint that this one found",
        )
    ]


# --- over time ---


def buckets(rounds: pl.LazyFrame) -> pl.DataFrame:
    """A row a time slice since the run's first round; a round that lies in several is shared out by seconds.

    Columns: `seconds` (the slice's start), the mean number of `active` chains and of requests at each engine,
    `<role>_kv` (share of the KV memory that active chains need, 0-1), and a second's `finished` chains and
    `<phase>_tokens` generated. Shards that run side by side add up; slices in which nothing ran are missing.
    """
    begin = _first_second(pl.col("started_at"))
    first, last = rounds.select(a=begin.min(), b=(begin + pl.col("seconds")).max()).collect(engine="streaming").row(0)
    width = max((last - first) / _NUM_BUCKETS, 1e-6)
    shared = _shared_out(rounds.with_columns(begin=begin - first), width)
    return (
        shared.group_by("bucket")
        .agg(_means(width))
        .sort("bucket")
        .select((pl.col("bucket") * width).alias("seconds"), pl.exclude("bucket"))
        .collect(engine="streaming")
    )


def _shared_out(rounds: pl.LazyFrame, width: float) -> pl.LazyFrame:
    """A row for each round and `bucket` that it lies in, with the seconds (`inside`) and the `share` of it there."""
    end = pl.col("begin") + pl.col("seconds")
    lowest = (pl.col("begin") / width).floor().cast(pl.Int64).clip(0, _NUM_BUCKETS - 1)
    highest = (end / width).ceil().cast(pl.Int64).clip(0, _NUM_BUCKETS)
    inside = pl.min_horizontal(end, (pl.col("bucket") + 1) * width) - pl.max_horizontal(
        "begin", pl.col("bucket") * width
    )
    return (
        rounds.with_columns(bucket=pl.int_ranges(lowest, pl.max_horizontal(highest, lowest + 1)))
        .explode("bucket")
        .with_columns(inside=inside)
        .with_columns(share=pl.when(pl.col("seconds") > 0).then(pl.col("inside") / pl.col("seconds")).otherwise(1.0))
    )


def _means(width: float) -> list[pl.Expr]:
    share, inside = pl.col("share"), pl.col("inside")
    loads = {role: (pl.col(f"{role}_kv_load") * inside).sum() for role in Role}
    room = {role: (pl.col(f"{role}_kv_capacity") * inside).sum() for role in Role}
    return [
        ((pl.col("num_active") * inside).sum() / width).alias("active"),
        *(((pl.col(f"{role}_request_seconds") * share).sum() / width).alias(f"{role}_requests") for role in Role),
        *(pl.when(room[role] > 0).then(loads[role] / room[role]).alias(f"{role}_kv") for role in Role),
        ((pl.col("num_finished") * share).sum() / width).alias("finished"),
        *(
            ((pl.col(f"{phase}_num_generated_tokens") * share).sum() / width).alias(f"{phase}_tokens")
            for phase in Phase
        ),
    ]


def _charts_over_time(frame: pl.DataFrame) -> tuple[Chart, ...]:
    percents = frame.select("seconds", *((100 * pl.col(f"{role}_kv")).alias(role.value) for role in Role))
    known = tuple(role.value for role in Role if percents[role.value].null_count() < percents.height)
    writing = tuple(f"{phase}_tokens" for phase in Phase if phase is not Phase.grade)
    requests = tuple(f"{role}_requests" for role in Role)
    shown = {
        "occupancy": ("Chains and requests over time", ("active", *requests), frame, "mean number"),
        "kv_load": ("KV memory that active chains need", known, percents.select("seconds", *known), "%"),
        "token_rate": ("Generated tokens a second", writing, frame, "tokens/s"),
        "chain_rate": ("Finished chains a second", ("finished",), frame, "chains/s"),
    }
    labels = {"active": "active chains"} | {name: name.removesuffix("_tokens") for name in writing}
    return tuple(
        Chart(
            name=name,
            title=title,
            kind=ChartKind.stacked_area if name == "token_rate" else ChartKind.step,
            frame=rows.select("seconds", *y),
            x="seconds",
            y=y,
            labels=labels,
            x_label="s since the run's first round",
            y_label=unit,
            note="shards side by side added up" if name != "kv_load" else "of all shards at work together",
        )
        for name, (title, y, rows, unit) in shown.items()
    )
