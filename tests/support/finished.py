"""Finished runs by hand, through the code that writes real ones: for what reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from specreason_batch.config import ChatConfig, EngineConfig, LeaseConfig, PolicyConfig
from specreason_batch.store.attempts import AttemptState, Lease
from specreason_batch.store.manifest import claim_output, fingerprint_fields
from specreason_batch.store.parts import ShardPaths, ShardWriter, write_table
from specreason_batch.store.schemas import CHAINS, SCHEMA_VERSION, STEPS, chains_schema
from specreason_batch.store.verdicts import VERDICTS
from specreason_batch.types import Role
from tests.support.configs import make_config

TOY = Path(__file__).parents[2] / "examples" / "toy"


@dataclass(frozen=True, kw_only=True)
class Told:
    """A step: its text, and the draft that it replaced."""

    text: str
    rejected: str | None = None  # then the base wrote the step
    score: float | None = 8.0  # of the kept draft, or of the rejected one
    author: Role = Role.draft

    def row(self, prompt_id: str, sample_index: int, index: int, start: int) -> dict[str, Any]:
        by_base = self.rejected is not None or self.author is Role.base
        is_graded = self.rejected is not None or not by_base
        return {
            **dict.fromkeys(STEPS.names),
            "prompt_id": prompt_id,
            "sample_index": sample_index,
            "step_index": index,
            "author": Role.base if by_base else Role.draft,
            "ended_by": "blank_line",
            "start": start,
            "end": start + len(self.text),
            "token_ids": [1],
            "num_tokens": len(self.text.split()),
            "rejected_text": self.rejected,
            "rejected_num_tokens": None if self.rejected is None else len(self.rejected.split()),
            "score": self.score if is_graded else None,
            "accepted": self.rejected is None if is_graded and self.score is not None else None,
        }


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A chain."""

    prompt_id: str
    prompt: str
    steps: Sequence[Told]
    answer: str | None = "\n\nThe answer is 4."
    sample_index: int = 0
    thinking_end: str = "closed"
    answer_end: str = "stop"
    verdict: str | None = None  # right, wrong, unverifiable
    basis: str | None = "gold"
    columns: Mapping[str, Any] | None = None  # input_<name>, and any of `chains` in place of its own

    @property
    def thinking(self) -> str:
        return "".join(step.text for step in self.steps)

    def row(self) -> dict[str, Any]:
        steps = self.step_rows()
        return {
            **dict.fromkeys(CHAINS.names, 0),
            "prompt_id": self.prompt_id,
            "sample_index": self.sample_index,
            "prompt": self.prompt,
            "thinking": self.thinking,
            "answer": self.answer,
            "thinking_end": self.thinking_end,
            "answer_end": self.answer_end,
            "num_steps": len(self.steps),
            "num_draft_tokens_kept": sum(row["num_tokens"] for row in steps if row["author"] == Role.draft),
            "num_base_tokens": sum(row["num_tokens"] for row in steps if row["author"] == Role.base),
            "num_answer_tokens": len((self.answer or "").split()),
            "active_seconds": 1.0,
            **(self.columns or {}),
        }

    def step_rows(self) -> list[dict[str, Any]]:
        starts = [sum(len(step.text) for step in self.steps[:index]) for index in range(len(self.steps))]
        return [
            step.row(self.prompt_id, self.sample_index, index, start)
            for index, (step, start) in enumerate(zip(self.steps, starts, strict=True))
        ]

    def verdict_row(self) -> dict[str, Any]:
        key = {"prompt_id": self.prompt_id, "sample_index": self.sample_index}
        return dict.fromkeys(VERDICTS.names) | key | {"verdict": self.verdict, "basis": self.basis}


def write_run(
    folder: Path,
    chains: Sequence[Finished],
    *,
    part_chains: int = 1000,
    num_shards: int = 1,
    extra: Sequence[tuple[str, pa.DataType]] = (),
    state: AttemptState = AttemptState.finished,
    chat: ChatConfig | None = None,
    **changes: Any,
) -> Path:
    """An output folder of these chains, prompts in turn to shards. `extra`: the input's other columns, own names."""
    engines = {role: EngineConfig(model=str(TOY / role), max_model_len=400, chat=chat or ChatConfig()) for role in Role}
    values = {"output_dir": str(folder), "draft": engines[Role.draft], "base": engines[Role.base]} | changes
    config = make_config(folder / "nowhere", **values)
    roles = {"draft_only": frozenset({Role.draft})}.get(config.policy.name, frozenset(Role))
    fingerprint = claim_output(folder, fingerprint_fields(config, roles), config)
    prompts = list(dict.fromkeys(chain.prompt_id for chain in chains))
    for shard in range(num_shards):
        mine = {prompt_id for index, prompt_id in enumerate(prompts) if index % num_shards == shard}
        metadata = {"fingerprint": fingerprint, "source": "test", "schema_version": SCHEMA_VERSION}
        write_shard(
            folder / f"shard-{shard:05d}",
            [chain for chain in chains if chain.prompt_id in mine],
            chains_schema(pa.schema(list(extra)), has_gold_answer=False),
            metadata,
            part_chains,
            state,
        )
    return folder


def write_shard(
    root: Path,
    chains: Sequence[Finished],
    schema: pa.Schema,
    metadata: dict[str, str],
    part_chains: int,
    state: AttemptState,
) -> None:
    lease = Lease.acquire(root, LeaseConfig())
    paths = ShardPaths(root)
    writer = ShardWriter(paths, lease, schema, metadata, part_chains, 1e9)
    for chain in chains:
        writer.add_chain(chain.row(), chain.step_rows())
        writer.commit_if_due()
    writer.commit()
    for path in paths.committed("chains"):
        write_verdicts(path, chains)
    lease.end(state)


def write_verdicts(chains_part: Path, chains: Sequence[Finished]) -> None:
    """Beside a part, where any of its chains has one."""
    table = pa.parquet.read_table(chains_part, columns=["prompt_id", "sample_index"])
    keys = set(zip(*(column.to_pylist() for column in table.columns), strict=True))
    rows = [chain.verdict_row() for chain in chains if chain.verdict and (chain.prompt_id, chain.sample_index) in keys]
    if rows:
        path = chains_part.parents[1] / "verdicts" / chains_part.name
        path.parent.mkdir(exist_ok=True)
        write_table(pa.Table.from_pylist(rows, schema=VERDICTS), path)


def draft_only() -> PolicyConfig:
    return PolicyConfig(name="draft_only", answer_role=Role.draft)
