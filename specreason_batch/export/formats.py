"""What a row is, by format: columns, and a chain's rows (docs/distillation.md explains each column).

Row builders return exactly their schema's names: `Table.from_pylist` would drop an unknown key without a word.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import pyarrow as pa

from specreason_batch.export.chains import KEYS, FinishedChain
from specreason_batch.export.config import ExportConfig, Format
from specreason_batch.export.rendering import Target, messages, reply, thinking_and_answer
from specreason_batch.export.runs import Run, unify
from specreason_batch.store.schemas import STEPS
from specreason_batch.types import Message, Role, Row

_TEXT = pa.string()
_MESSAGES = pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))
_ORIGIN = [("run", _TEXT), ("prompt_id", _TEXT), ("sample_index", pa.int64())]
_STEP_COLUMNS = ("author", "start", "end", "rejected_text", "score", "accepted")


class Lost(StrEnum):
    """Why a rejected draft makes no row, although its chain is kept."""

    identical = "the base wrote the same text again, but for white space at its ends"
    unreadable = "its grade was unreadable"
    blank = "the draft or the rewrite is white space alone"


@dataclass(frozen=True, slots=True)
class Made:
    """What a chain makes."""

    rows: list[dict[str, Any]]
    lost: Counter[Lost] = field(default_factory=Counter)


class RowMaker(Protocol):
    """One format."""

    @property
    def schema(self) -> pa.Schema: ...
    @property
    def chain_columns(self) -> Sequence[str]:
        """Of `chains`, beyond those that every export reads."""
        ...

    @property
    def step_columns(self) -> Sequence[str]: ...
    @property
    def makes_one(self) -> bool:
        """Whether every chain makes one row, whatever it holds."""
        ...

    def make(self, chain: FinishedChain) -> Made: ...


def row_maker(config: ExportConfig, runs: Sequence[Run], target: Target | None) -> RowMaker:
    match config.format:
        case Format.sft_messages:
            return _Whole(_schema(messages=_MESSAGES), None, _as_messages)
        case Format.prompt_completion if config.conversational:
            return _Whole(_schema(prompt=_MESSAGES, completion=_MESSAGES), None, _as_turns)
        case Format.prompt_completion:
            return _Whole(_schema(prompt=_TEXT, completion=_TEXT), target, _as_prompt_and_completion)
        case Format.text:
            return _Whole(_schema(text=_TEXT), target, _as_text)
        case Format.step_preferences:
            assert target is not None
            return _StepPreferences(target)
        case Format.stepwise_supervision:
            return _StepwiseSupervision()
        case Format.raw:
            return _Raw(unify([run.folder for run in runs], [run.columns for run in runs]))


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([*columns.items(), *_ORIGIN])


def _origin(chain: FinishedChain) -> dict[str, Any]:
    prompt_id, sample_index = chain.key
    return {"run": chain.run.fingerprint, "prompt_id": prompt_id, "sample_index": sample_index}


# --- whole chains ---


def _as_messages(chain: FinishedChain, _target: Target | None) -> dict[str, Any]:
    return {"messages": messages([*chain.turns, Message("assistant", reply(chain))])}


def _as_turns(chain: FinishedChain, _target: Target | None) -> dict[str, Any]:
    return {"prompt": messages(chain.turns), "completion": messages([Message("assistant", reply(chain))])}


def _as_prompt_and_completion(chain: FinishedChain, target: Target | None) -> dict[str, Any]:
    assert target is not None
    return {"prompt": target.opening(chain.turns), "completion": thinking_and_answer(chain) + target.end}


def _as_text(chain: FinishedChain, target: Target | None) -> dict[str, Any]:
    return {"text": "".join(_as_prompt_and_completion(chain, target).values())}


class _Build(Protocol):
    def __call__(self, chain: FinishedChain, target: Target | None, /) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class _Whole:
    """One row a chain."""

    schema: pa.Schema
    target: Target | None
    build: _Build
    chain_columns: Sequence[str] = ()
    step_columns: Sequence[str] = ()
    makes_one: bool = True

    def make(self, chain: FinishedChain) -> Made:
        return Made([self.build(chain, self.target) | _origin(chain)])


# --- steps ---


def _is_rejection(step: Row) -> bool:
    return step["rejected_text"] is not None


def _why_lost(chain: FinishedChain, step: Row) -> Lost | None:
    """Why a step's rejected draft tells nothing; None: it does."""
    written, rejected = chain.step_text(step), step["rejected_text"]
    if step["score"] is None:
        return Lost.unreadable
    if not written.strip() or not rejected.strip():
        return Lost.blank
    return Lost.identical if written.strip() == rejected.strip() else None


@dataclass(frozen=True, slots=True)
class _StepPreferences:
    """One row a rejected draft: what the base wrote in its place is preferred, after the chain so far."""

    target: Target
    chain_columns: Sequence[str] = ()
    step_columns: Sequence[str] = _STEP_COLUMNS
    makes_one: bool = False

    @property
    def schema(self) -> pa.Schema:
        own = [("prompt", _TEXT), ("chosen", _TEXT), ("rejected", _TEXT)]
        scores = [("chosen_score", pa.float64()), ("rejected_score", pa.float64())]
        return pa.schema([*own, *scores, *_ORIGIN, ("step_index", pa.int64())])

    def make(self, chain: FinishedChain) -> Made:
        rejections = [step for step in chain.steps if _is_rejection(step)]
        opening = self.target.opening(chain.turns) if rejections else ""
        lost = Counter(why for step in rejections if (why := _why_lost(chain, step)))
        return Made([self._row(chain, step, opening) for step in rejections if not _why_lost(chain, step)], lost)

    def _row(self, chain: FinishedChain, step: Row, opening: str) -> dict[str, Any]:
        return {
            "prompt": opening + chain.thinking[: step["start"]],
            "chosen": chain.step_text(step),
            "rejected": step["rejected_text"],
            "chosen_score": None,  # what the base writes is not graded
            "rejected_score": step["score"],
            **_origin(chain),
            "step_index": step["step_index"],
        }


@dataclass(frozen=True, slots=True)
class _StepwiseSupervision:
    """A row for the chain's steps, and one for each rejected draft, which ends the steps before it."""

    chain_columns: Sequence[str] = ()
    step_columns: Sequence[str] = _STEP_COLUMNS
    makes_one: bool = False

    @property
    def schema(self) -> pa.Schema:
        own = [("prompt", _TEXT), ("completions", pa.list_(_TEXT)), ("labels", pa.list_(pa.bool_()))]
        return pa.schema([*own, *_ORIGIN])

    def make(self, chain: FinishedChain) -> Made:
        """Nothing for a chain in which the base graded nothing."""
        steps = list(_labelled(chain))
        if all(step["score"] is None for step in steps):
            return Made([])
        rejections = [step for step in steps if _is_rejection(step)]
        lost = Counter(why for step in rejections if (why := _why_lost(chain, step)))
        kept = self._row(chain, steps, None)
        ends = [
            self._row(chain, steps[: step["step_index"]], step["rejected_text"])
            for step in rejections
            if not _why_lost(chain, step)
        ]
        return Made([kept, *ends], lost)

    def _row(self, chain: FinishedChain, steps: Sequence[Row], rejected: str | None) -> dict[str, Any]:
        right = [text for step in steps if (text := chain.step_text(step).strip())]
        wrong = [] if rejected is None else [rejected.strip()]
        labels = [True] * len(right) + [False] * len(wrong)
        return {"prompt": chain.prompt, "completions": [*right, *wrong], "labels": labels, **_origin(chain)}


def _labelled(chain: FinishedChain) -> Iterator[Row]:
    """Its steps, up to the first one of the draft's own that was not graded: nobody vouches for that one."""
    for step in chain.steps:
        if step["author"] == Role.draft and step["score"] is None:
            return
        yield step


# --- as it is ---


@dataclass(frozen=True, slots=True)
class _Raw:
    """One row a chain: its columns, its verdict, its steps within."""

    columns: pa.Schema
    makes_one: bool = True

    @property
    def chain_columns(self) -> Sequence[str]:
        return list(self.columns.names)

    @property
    def step_columns(self) -> Sequence[str]:
        return [name for name in STEPS.names if name not in KEYS]

    @property
    def schema(self) -> pa.Schema:
        steps = pa.list_(pa.struct([STEPS.field(name) for name in self.step_columns]))
        verdict = [("verdict", _TEXT), ("verdict_basis", _TEXT)]
        return pa.schema([("run", _TEXT), *self.columns, *verdict, ("steps", steps)])

    def make(self, chain: FinishedChain) -> Made:
        steps = [{name: step[name] for name in self.step_columns} for step in chain.steps]
        there = {name: chain.row.get(name) for name in self.columns.names}
        verdict = {"verdict": chain.verdict, "verdict_basis": chain.basis}
        return Made([{"run": chain.run.fingerprint, **there, **verdict, "steps": steps}])
