"""Arrow schemas of everything written (docs/data.md explains each column), and rows made from chains.

Row builders return exactly the schema's names: `Table.from_pylist` would drop an unknown key and null a misspelt one
without a word.
"""

from typing import Any

import pyarrow as pa

from specreason_batch.chain import Chain
from specreason_batch.rounds import RoundStats
from specreason_batch.translator import ThinkingText, Translator
from specreason_batch.types import AnswerEnd, Phase, Role, Step

SCHEMA_VERSION = "2"

_TEXT = pa.string()
_INT = pa.int64()
_FLOAT = pa.float64()


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, type) for name, type in columns.items()])


CHAINS = _schema(
    prompt_id=_TEXT,
    sample_index=_INT,
    prompt=_TEXT,
    thinking=_TEXT,
    answer=_TEXT,
    thinking_end=_TEXT,
    answer_end=_TEXT,
    num_steps=_INT,
    num_unsplit_blank_lines=_INT,
    num_draft_tokens_kept=_INT,
    num_draft_tokens_rejected=_INT,
    num_base_tokens=_INT,
    num_answer_tokens=_INT,
    num_grade_prompt_tokens=_INT,
    num_cached_prompt_tokens=_INT,
    num_redone_tokens=_INT,
    active_seconds=_FLOAT,
    seed=_INT,
)  # then gold_answer, where the input has it, and the input's other columns as input_<name>

STEPS = _schema(
    prompt_id=_TEXT,
    sample_index=_INT,
    step_index=_INT,
    author=_TEXT,
    ended_by=_TEXT,
    start=_INT,
    end=_INT,
    token_ids=pa.list_(pa.int32()),
    num_tokens=_INT,
    rejected_text=_TEXT,
    rejected_num_tokens=_INT,
    score=_FLOAT,
    digit_probs=pa.list_(pa.float32()),
    digit_mass=_FLOAT,
    accepted=pa.bool_(),
    round=_INT,
)

PHASE_COUNTS = (
    "num_requests",
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_recomputed_tokens",
    "num_generated_tokens",
)

ENGINE_FIGURES = {"busy_seconds": _FLOAT, "request_seconds": _FLOAT, "kv_load": _INT, "kv_capacity": _INT}

ROUNDS = _schema(
    round=_INT,
    started_at=pa.timestamp("us", tz="UTC"),
    seconds=_FLOAT,
    num_active=_INT,
    num_finished=_INT,
    num_parked=_INT,
    num_waiting=_INT,
    num_accepted=_INT,
    num_rejected=_INT,
    num_unreadable=_INT,
    idle_seconds=_FLOAT,
    **{f"{role}_{figure}": type for role in Role for figure, type in ENGINE_FIGURES.items()},
    **{f"{phase}_{count}": _INT for phase in Phase for count in PHASE_COUNTS},
    draft_seconds=_FLOAT,
    grade_seconds=_FLOAT,
    rewrite_seconds=_FLOAT,
)

REJECTS = _schema(
    prompt_id=_TEXT,
    sample_index=_INT,
    file=_TEXT,
    row=_INT,
    reason=_TEXT,
)


def chains_schema(input_columns: pa.Schema, has_gold_answer: bool) -> pa.Schema:
    """CHAINS with the input's own columns, which `input_columns` holds by their own names."""
    gold = [pa.field("gold_answer", _TEXT)] if has_gold_answer else []
    return pa.schema([*CHAINS, *gold, *(column.with_name(f"input_{column.name}") for column in input_columns)])


def chain_rows(
    chain: Chain, translator: Translator, has_gold_answer: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A finished chain's row in `chains` and its rows in `steps`."""
    thinking = translator.thinking(chain)
    steps = [
        _step_row(chain, index, step, span, translator)
        for index, (step, span) in enumerate(zip(chain.steps, thinking.spans, strict=True))
    ]
    gold = {"gold_answer": chain.prompt.gold_answer} if has_gold_answer else {}
    extra = {f"input_{name}": value for name, value in chain.prompt.extra.items()}
    return _chain_row(chain, thinking, translator) | gold | extra, steps


def _chain_row(chain: Chain, thinking: ThinkingText, translator: Translator) -> dict[str, Any]:
    drafted = [step for step in chain.steps if step.written.author is Role.draft]
    return {
        "prompt_id": chain.prompt.prompt_id,
        "sample_index": chain.sample_index,
        "prompt": chain.prompt.prompt,
        "thinking": thinking.text,
        "answer": translator.answer_text(chain.answer) if chain.answer else None,
        "thinking_end": chain.thinking_end,
        "answer_end": chain.answer.ended if chain.answer else AnswerEnd.none,
        "num_steps": len(chain.steps),
        "num_unsplit_blank_lines": thinking.num_unsplit_blank_lines,
        "num_draft_tokens_kept": sum(step.written.num_tokens for step in drafted),
        "num_draft_tokens_rejected": sum(step.rejected.num_tokens for step in chain.steps if step.rejected),
        "num_base_tokens": sum(step.written.num_tokens for step in chain.steps if step.written.author is Role.base),
        "num_answer_tokens": chain.answer.num_tokens if chain.answer else 0,
        "num_grade_prompt_tokens": chain.usage.num_grade_prompt_tokens,
        "num_cached_prompt_tokens": chain.usage.num_cached_prompt_tokens,
        "num_redone_tokens": chain.usage.num_redone_tokens,
        "active_seconds": chain.usage.active_seconds,
        "seed": chain.seed,
    }


def _step_row(chain: Chain, index: int, step: Step, span: tuple[int, int], translator: Translator) -> dict[str, Any]:
    grade = step.grade
    return {
        "prompt_id": chain.prompt.prompt_id,
        "sample_index": chain.sample_index,
        "step_index": index,
        "author": step.written.author,
        "ended_by": step.written.ended_by,
        "start": span[0],
        "end": span[1],
        "token_ids": step.written.token_ids,
        "num_tokens": step.written.num_tokens,
        "rejected_text": translator.step_text(step.rejected) if step.rejected else None,
        "rejected_num_tokens": step.rejected.num_tokens if step.rejected else None,
        "score": grade.score if grade else None,
        "digit_probs": grade.probs if grade and len(grade.probs) == 10 else None,
        "digit_mass": grade.mass if grade else None,
        "accepted": step.accepted,
        "round": step.round,
    }


def round_row(stats: RoundStats) -> dict[str, Any]:
    """A row of `rounds`."""
    return {
        "round": stats.round,
        "started_at": int(stats.started_at * 1e6),
        "seconds": stats.seconds,
        "num_active": stats.num_active,
        "num_finished": stats.num_finished,
        "num_parked": stats.num_parked,
        "num_waiting": stats.num_waiting,
        "num_accepted": stats.num_accepted,
        "num_rejected": stats.num_rejected,
        "num_unreadable": stats.num_unreadable,
        "idle_seconds": stats.idle_seconds,
        **{f"{role}_{figure}": getattr(stats, figure).get(role) for role in Role for figure in ENGINE_FIGURES},
        **{f"{phase}_{count}": getattr(stats.phases[phase], count) for phase in Phase for count in PHASE_COUNTS},
        **{f"{phase}_seconds": stats.phase_seconds.get(phase) for phase in Phase if phase is not Phase.answer},
    }
