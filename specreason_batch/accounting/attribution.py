"""A chain's share of the measured time: given out by a rule, never measured (docs/accounting.md).

A batch's time belongs to all its chains. The seconds of a shard's rounds are given to the shard's committed chains:

    draft     drafting            in proportion to the tokens that the draft generated for the chain
    grade     grading (lockstep)  in proportion to its grades
    rewrite   rewriting and answers (lockstep)  in proportion to base and answer tokens
    base      the base at work (other schedules, where grades and rewrites overlap)  in proportion to base and answer
              tokens + PREFILL_WEIGHT x computed prompt tokens
    between   our own code, files, waiting for nothing  in proportion to requests

Lockstep's first three are clocked. In the other schedules the time with a request outstanding anywhere is divided
between the engines as their busy seconds are, which may overlap. Where nobody has any of what a kind of time goes by,
it goes to all chains alike. So the shares of a shard's chains sum to the seconds of its rounds, whatever happened in
them: work lost with an interruption, and that of chains in flight, is borne by the chains that are committed.
"""

from dataclasses import dataclass

import polars as pl

from specreason_batch.accounting.load import RunFiles
from specreason_batch.types import Phase

# What a computed prompt token weighs beside a generated one in a batch: 0.1 ms against 0.55 ms for a 32B base with 46
# chains on one H200 (docs/performance.md: arithmetic). Only the shares depend on it, never their sum.
PREFILL_WEIGHT = 0.2

KINDS = ("draft", "grade", "rewrite", "base", "between")
_KEY = ("prompt_id", "sample_index")
_CHAIN_COLUMNS = (
    *_KEY,
    "num_draft_tokens_kept",
    "num_draft_tokens_rejected",
    "num_base_tokens",
    "num_answer_tokens",
    "num_grade_prompt_tokens",
    "num_cached_prompt_tokens",
    "active_seconds",
)


def draft_answers(run: RunFiles) -> bool:
    """Whether the draft writes the answers."""
    return run.policy == "draft_only" or run.config["policy"]["answer_role"] == "draft"


def per_chain(run: RunFiles) -> pl.LazyFrame:
    """A row a committed chain; collect it with engine="streaming" where there may be a million.

    prompt_id, sample_index; num_draft_tokens_kept, num_draft_tokens_rejected, num_base_tokens, num_answer_tokens,
    num_grade_prompt_tokens, num_cached_prompt_tokens, active_seconds as in `chains`; num_drafts, num_grades,
    num_rewrites and num_answers, its requests; verdict and verdict_basis, null where not verified; and
    attributed_seconds, null where a shard's telemetry was removed.
    """
    with_path = pl.scan_parquet(
        run.files("chains"), missing_columns="insert", extra_columns="ignore", include_file_paths="path"
    )
    chains = with_path.select(
        *_CHAIN_COLUMNS, num_answers=(pl.col("answer_end") != "none").cast(pl.Int64), shard=_shard_of("chains")
    )
    counted = chains.join(_requests(run), on=_KEY, how="left").with_columns(
        pl.col("num_drafts", "num_grades", "num_rewrites").fill_null(0)
    )
    return _with_verdicts(_with_shares(counted, run).drop("shard"), run)


def _shard_of(kind: str) -> pl.Expr:
    """A shard's name from the path of one of its files."""
    return pl.col("path").str.extract(rf"([^/\\]+)[/\\]{kind}[/\\][^/\\]+$")


def _requests(run: RunFiles) -> pl.LazyFrame:
    """Requests of each chain by phase, as far as they are in its kept steps."""
    is_draft = (pl.col("author") == "draft") | pl.col("rejected_num_tokens").is_not_null()
    is_base = pl.col("author") == "base"
    rewrites = is_base.any() if run.policy == "base_direct" else is_base.sum()  # its steps are of one request
    return run.steps.group_by(_KEY).agg(
        num_drafts=is_draft.sum().cast(pl.Int64),
        num_grades=pl.col("digit_mass").is_not_null().sum().cast(pl.Int64),
        num_rewrites=rewrites.cast(pl.Int64),
    )


def _with_verdicts(chains: pl.LazyFrame, run: RunFiles) -> pl.LazyFrame:
    if run.verdicts is None:
        nothing = pl.lit(None, pl.String)
        return chains.with_columns(verdict=nothing, verdict_basis=nothing)
    verdicts = run.verdicts.select(*_KEY, "verdict", verdict_basis="basis")
    return chains.join(verdicts, on=_KEY, how="left")


def _with_shares(chains: pl.LazyFrame, run: RunFiles) -> pl.LazyFrame:
    by_shard = shard_seconds(run)
    if by_shard is None:
        return chains.with_columns(attributed_seconds=pl.lit(None, pl.Float64))
    shared = chains.join(by_shard, on="shard", how="left").with_columns(**_work(draft_answers(run)))
    return shared.select(
        *chains.collect_schema().names(),
        attributed_seconds=pl.sum_horizontal((_share(kind) for kind in KINDS), ignore_nulls=False),
    )


def _work(by_draft: bool) -> dict[str, pl.Expr]:
    """What a chain's share of each kind of time goes by."""
    drafted = pl.col("num_draft_tokens_kept") + pl.col("num_draft_tokens_rejected")
    written, answer = pl.col("num_base_tokens"), pl.col("num_answer_tokens")
    prompts = {"grade": "num_grades", "rewrite": "num_rewrites"} | ({} if by_draft else {"answer": "num_answers"})
    computed = pl.sum_horizontal(pl.col(f"{phase}_computed") * pl.col(count) for phase, count in prompts.items())
    work = {
        "draft": drafted + answer if by_draft else drafted,
        "grade": pl.col("num_grades"),
        "rewrite": written + answer,
        "base": (written if by_draft else written + answer) + PREFILL_WEIGHT * computed,
        "between": pl.sum_horizontal("num_drafts", "num_grades", "num_rewrites", "num_answers"),
    }
    return {f"{kind}_work": expression.cast(pl.Float64) for kind, expression in work.items()}


def _share(kind: str) -> pl.Expr:
    work = pl.col(f"{kind}_work")
    total = work.sum().over("shard")
    return pl.col(f"{kind}_seconds") * pl.when(total > 0).then(work / total).otherwise(1 / pl.len().over("shard"))


def shard_seconds(run: RunFiles) -> pl.LazyFrame | None:
    """A row a shard: `<kind>_seconds`, which sum to its rounds' seconds, what was generated, and the prompt tokens
    computed a request (`<phase>_computed`). None: telemetry was removed.
    """
    files = run.files("rounds")
    if not files:
        return None
    rounds = pl.scan_parquet(files, missing_columns="insert", extra_columns="ignore", include_file_paths="path")
    return (
        rounds.with_columns(**_split(), shard=_shard_of("rounds"))
        .group_by("shard")
        .agg(
            *(pl.col(f"{kind}_kind").sum().alias(f"{kind}_seconds") for kind in KINDS),
            *(pl.col(f"{phase}_num_generated_tokens").sum().alias(f"{phase}_generated") for phase in Phase),
            *(pl.col(f"{phase}_num_requests").sum().alias(f"{phase}_requests") for phase in Phase),
            *(_computed(phase).alias(f"{phase}_computed") for phase in Phase),
        )
    )


def _split() -> dict[str, pl.Expr]:
    """A round's seconds by kind."""
    clocked = pl.col("grade_seconds").is_not_null()
    draft, base = (pl.col(f"{role}_busy_seconds").fill_null(0.0) for role in ("draft", "base"))
    at_work = pl.col("seconds") - pl.col("idle_seconds")
    of_draft = pl.when(draft + base > 0).then(at_work * draft / (draft + base)).otherwise(0.0)
    of_base = pl.when(draft + base > 0).then(at_work * base / (draft + base)).otherwise(0.0)
    kinds = {
        "draft": pl.when(clocked).then(pl.col("draft_seconds")).otherwise(of_draft),
        "grade": pl.col("grade_seconds").fill_null(0.0),
        "rewrite": pl.col("rewrite_seconds").fill_null(0.0),
        "base": pl.when(clocked).then(0.0).otherwise(of_base),
    }
    rest = pl.col("seconds") - pl.sum_horizontal(kinds.values())
    return {f"{kind}_kind": expression for kind, expression in (kinds | {"between": rest}).items()}


def _computed(phase: Phase) -> pl.Expr:
    """Prompt tokens computed a request; 0 without requests."""
    requests = pl.col(f"{phase}_num_requests").sum()
    tokens = (pl.col(f"{phase}_num_prompt_tokens") - pl.col(f"{phase}_num_cached_tokens")).sum()
    return pl.when(requests > 0).then(tokens / requests).otherwise(0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """A run's seconds by what they were spent on, by the same rule. Attributed; None: there was none of it."""

    seconds: float  # of all rounds: of all shards and attempts, added up
    draft_seconds_per_token: float | None
    base_seconds_per_token: float | None  # of steps and answers
    seconds_per_grade: float | None
    num_generated_tokens: int  # in all rounds, grades not counted: work that was lost included


def rates(run: RunFiles) -> Rates | None:
    """None: telemetry was removed."""
    by_shard = shard_seconds(run)
    if by_shard is None:
        return None
    units = {phase: PREFILL_WEIGHT * pl.col(f"{phase}_computed") * pl.col(f"{phase}_requests") for phase in Phase}
    shards = by_shard.with_columns(**{f"{phase}_units": units[phase] for phase in Phase})
    total = shards.select(pl.all().exclude("shard").sum()).collect().row(0, named=True)
    by_draft = draft_answers(run)
    with_base = [Phase.rewrite] if by_draft else [Phase.rewrite, Phase.answer]
    written = sum(total[f"{phase}_generated"] for phase in with_base)
    drafted = total["draft_generated"] + (total["answer_generated"] if by_draft else 0)
    prefilled = sum(total[f"{phase}_units"] for phase in (Phase.grade, *with_base))
    grading = total["base_seconds"] * (_by(total["grade_units"], written + prefilled) or 0.0)
    return Rates(
        seconds=sum(total[f"{kind}_seconds"] for kind in KINDS),
        draft_seconds_per_token=_by(total["draft_seconds"], drafted),
        base_seconds_per_token=_by(total["rewrite_seconds"] + total["base_seconds"] - grading, written),
        seconds_per_grade=_by(total["grade_seconds"] + grading, total["grade_requests"]),
        num_generated_tokens=sum(total[f"{phase}_generated"] for phase in Phase if phase is not Phase.grade),
    )


def _by(amount: float, count: float) -> float | None:
    return amount / count if count else None
