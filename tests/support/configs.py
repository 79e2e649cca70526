"""Configurations and model folders for tests that start from files: tokenizers are whole, weights are a stand-in."""

import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specreason_batch.config import (
    BudgetConfig,
    ChatConfig,
    CheckpointConfig,
    DecodingConfig,
    EngineConfig,
    GenerateConfig,
    InputConfig,
    JudgeConfig,
    LeaseConfig,
    LogConfig,
    PartsConfig,
    PolicyConfig,
    RecoveryConfig,
    SamplingConfig,
    ScheduleConfig,
)
from specreason_batch.types import Role
from tests.support.vocabulary import make_tokenizer
from tests.support.worlds import PROMPTS

NUM_PROMPTS = 12


def write_models(folder: Path) -> None:
    """Two model folders, draft and base: everything but usable weights."""
    for role in Role:
        model = folder / role
        make_tokenizer().save_pretrained(model)
        (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "role": role}) + "\n")
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [297, 298]}) + "\n")
        header = json.dumps({"__metadata__": {"role": role}}).encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))


def make_config(folder: Path, **changes: Any) -> GenerateConfig:
    """A small valid run over `folder`'s models/ and prompts.parquet into its output/. Changes: whole groups by name."""

    def engine(role: Role) -> EngineConfig:
        return EngineConfig(model=str(folder / "models" / role), max_model_len=400, chat=ChatConfig(), in_process=True)

    values: dict[str, Any] = {
        "name": "test",
        "output_dir": str(folder / "output"),
        "input": InputConfig(path=str(folder / "prompts.parquet")),
        "draft": engine(Role.draft),
        "base": engine(Role.base),
        "sampling": SamplingConfig(draft=DecodingConfig(), base=DecodingConfig(), answer=DecodingConfig()),
        "policy": PolicyConfig(name="specreason"),
        "judge": JudgeConfig(question="so 0-9?", reply_opening="so: "),
        "budgets": BudgetConfig(max_step_tokens=12, thinking_tokens=60, max_answer_tokens=6),
        "schedule": ScheduleConfig(name="lockstep", active_size=3),
        "parts": PartsConfig(),
        "checkpoint": CheckpointConfig(),
        "lease": LeaseConfig(),
        "recovery": RecoveryConfig(),
        "log": LogConfig(seconds=1e6),
    }
    return GenerateConfig(**(values | changes))


def write_prompts(path: Path, num_rows: int = NUM_PROMPTS, **columns: Any) -> None:
    """A shard of prompts; `columns` replace or add to its own."""
    texts = [f"{PROMPTS[index % len(PROMPTS)]} {index}" for index in range(num_rows)]
    given = {"prompt_id": [f"p{index}" for index in range(num_rows)], "prompt": texts, "level": list(range(num_rows))}
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(given | columns), path)
