"""Runs by hand for what accounts for them: chains as counts and grades, without texts."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from specreason_batch.accounting.load import RunFiles
from specreason_batch.rounds import RoundStats
from specreason_batch.store.attempts import Attempt, AttemptState, Owner
from specreason_batch.store.parts import ShardPaths, ShardWriter, write_table
from specreason_batch.store.schemas import CHAINS, STEPS, round_row
from specreason_batch.store.verdicts import VERDICTS
from specreason_batch.types import Hardware
from tests.support.commits import Uncontended

FIELDS = {
    "base.model.config.json": "1:a",
    "base.dtype": "auto",
    "draft.model.config.json": "1:b",
    "draft.dtype": "auto",
    "budgets.thinking_tokens": 512,
    "sampling.base.temperature": 0.6,
    "sampling.draft.temperature": 0.6,
    "judge.reading": "expected",
    "policy.name": "specreason",
    "samples_per_prompt": 1,
    "seed": 0,
}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A step that stands in a chain. `rejected`: tokens of the draft that the base replaced."""

    tokens: int
    rejected: int | None = None
    probs: tuple[float, ...] | None = None  # of the digits; None: nothing was graded
    score: float | None = None
    by_base: bool = False  # unasked for: nothing was decided

    def row(self, key: tuple[str, int], index: int) -> dict[str, Any]:
        decided = self.probs is not None
        return dict.fromkeys(STEPS.names) | {
            "prompt_id": key[0],
            "sample_index": key[1],
            "step_index": index,
            "author": "base" if self.by_base or self.rejected is not None else "draft",
            "ended_by": "blank_line",
            "num_tokens": self.tokens,
            "rejected_num_tokens": self.rejected,
            "score": self.score,
            "digit_probs": self.probs,
            "digit_mass": sum(self.probs) if self.probs is not None else None,
            "accepted": self.rejected is None if decided else None,
            "round": index + 1,
        }


@dataclass(frozen=True, kw_only=True)
class Done:
    """A committed chain."""

    prompt_id: str = "p"
    sample_index: int = 0
    steps: Sequence[Kept] = ()
    answer: int = 0  # tokens
    prompt: str = "What is 2 + 2?"
    active_seconds: float = 1.0
    verdict: str | None = None
    basis: str = "gold"

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt_id, self.sample_index

    def row(self) -> dict[str, Any]:
        steps = [step.row(self.key, 0) for step in self.steps]
        by_author = {
            author: sum(step["num_tokens"] for step in steps if step["author"] == author)
            for author in ("draft", "base")
        }
        return dict.fromkeys(CHAINS.names, 0) | {
            "prompt_id": self.prompt_id,
            "sample_index": self.sample_index,
            "prompt": self.prompt,
            "thinking": "",
            "answer": "",
            "thinking_end": "closed",
            "answer_end": "stop" if self.answer else "none",
            "num_steps": len(steps),
            "num_draft_tokens_kept": by_author["draft"],
            "num_draft_tokens_rejected": sum(step["rejected_num_tokens"] or 0 for step in steps),
            "num_base_tokens": by_author["base"],
            "num_answer_tokens": self.answer,
            "active_seconds": self.active_seconds,
        }

    def verdict_row(self) -> dict[str, Any]:
        key = {"prompt_id": self.prompt_id, "sample_index": self.sample_index}
        return dict.fromkeys(VERDICTS.names) | key | {"verdict": self.verdict, "basis": self.basis}


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A run's folder, filled part by part."""

    folder: Path
    policy: str = "specreason"
    threshold: float = 7.0
    reading: str = "expected"
    answer_role: str = "base"
    fields: dict[str, Any] = field(default_factory=dict)  # of the fingerprint, in place of FIELDS'
    mass_floor: float = 0.5
    hardware: dict[str, Any] = field(default_factory=lambda: {"machine": "x86_64", "cpu_count": 2})

    def part(
        self, chains: Sequence[Done], rounds: Sequence[RoundStats] = (), shard: str = "shard", settings: str = "{}"
    ) -> "Recorded":
        """Commit these; with verdicts if the chains have any."""
        root = self.folder / shard
        writer = ShardWriter(
            ShardPaths(root), Uncontended(root), CHAINS, metadata={}, chains_per_part=10**6, seconds_per_part=1e9
        )
        for chain in chains:
            writer.add_chain(chain.row(), [step.row(chain.key, index) for index, step in enumerate(chain.steps)])
        for stats in rounds:
            writer.add_round(round_row(stats))
        writer.commit()
        verdicts = [chain.verdict_row() for chain in chains if chain.verdict]
        if verdicts:
            self._judge(root, verdicts, settings)
        return self

    def _judge(self, root: Path, verdicts: list[dict[str, Any]], settings: str) -> None:
        (root / "verdicts").mkdir(exist_ok=True)
        newest = max((root / "chains").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        schema = VERDICTS.with_metadata({"settings": settings})
        write_table(pa.Table.from_pylist(verdicts, schema=schema), root / "verdicts" / newest.name)

    def ran_on(self, *devices: str, shard: str = "shard") -> "Recorded":
        """One more attempt on the shard, with these GPUs."""
        folder = self.folder / shard / "attempts"
        folder.mkdir(parents=True, exist_ok=True)
        attempt = Attempt(
            number=len(list(folder.iterdir())) + 1,
            owner=Owner(host="node", pid=1, machine="", born=""),
            hardware=Hardware(devices=devices),
            state=AttemptState.finished,
            started_at=0.0,
            beat_at=0.0,
        )
        (folder / f"attempt-{attempt.number:05d}.json").write_text(json.dumps(asdict(attempt)))
        return self

    @property
    def _fingerprint_fields(self) -> dict[str, Any]:
        """Those of a model that the policy has no use for are left out, as in a real run."""
        unused = {"base_only": "draft.", "base_direct": "draft.", "draft_only": "base."}.get(self.policy, "-")
        fields = {**FIELDS, "policy.name": self.policy, **self.fields}
        return {name: value for name, value in fields.items() if not name.startswith(unused)}

    def open(self, label: str | None = None) -> RunFiles:
        manifest = {
            "fingerprint": uuid.uuid4().hex,
            "fingerprint_fields": self._fingerprint_fields,
            "schema_version": "2",
            "hardware": self.hardware,
            "config": {
                "policy": {"name": self.policy, "threshold": self.threshold, "answer_role": self.answer_role},
                "judge": {"reading": self.reading, "mass_floor": self.mass_floor},
            },
        }
        (self.folder / "run.json").write_text(json.dumps(manifest))
        return RunFiles(self.folder, label or self.folder.name)
