"""The choices of `jobs.finetune`: typed, with their ranges. Does not know: files, models, trainers."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from math import inf
from typing import Any

from specreason_batch.config import ChatConfig
from specreason_batch.types import InvalidInput

MISSING: Any = "???"  # OmegaConf's: a value that must be given

# Where things lie, and what changes no weight.
_NOT_IN_SETTINGS = ("data", "model", "output", "stage", "log_steps", "checkpoint_seconds", "stop_seconds")


class Stage(StrEnum):
    """Which trainer."""

    auto = "auto"  # as the data's format says
    sft = "sft"  # whole chains: TRL's SFTTrainer
    dpo = "dpo"  # step preferences: TRL's DPOTrainer; the given model is policy and reference


class Precision(StrEnum):
    """What is computed in. Weights are trained in float32 either way, and saved as the given model's are."""

    auto = "auto"  # bfloat16 on a GPU that has it
    float32 = "float32"
    bfloat16 = "bfloat16"  # mixed: autocast


@dataclass(kw_only=True)
class FinetuneConfig:
    """`python -m jobs.finetune`. Raises InvalidInput that lists every field out of range."""

    data: str = MISSING  # a folder of jobs.export: sft_messages, prompt_completion, text or step_preferences
    model: str = MISSING  # the model to train: a folder, or a name in the hub's cache
    output: str = MISSING  # a folder that does not exist yet
    stage: Stage = Stage.auto
    chat: ChatConfig = field(default_factory=ChatConfig)  # as `draft.chat` of the runs that will use the model
    epochs: float = 1.0
    max_steps: int | None = None  # optimiser steps, in place of `epochs`
    batch_size: int = 8  # rows in a forward pass, on each device
    gradient_accumulation: int = 1  # forward passes in an optimiser step
    learning_rate: float | None = None  # the highest; None: 2e-5 for sft, 1e-6 for dpo
    lr_schedule: str = "cosine"  # how it falls: any of transformers' SchedulerType
    warmup: float = 0.03  # share of the steps in which it rises
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    beta: float = 0.1  # dpo: how much the policy is held to the reference
    max_length: int | None = None  # tokens; longer rows are left out. None: the model's window
    precision: Precision = Precision.auto
    gradient_checkpointing: bool = True  # less memory for more time
    seed: int = 0
    log_steps: int = 10  # optimiser steps between lines
    checkpoint_seconds: float = 600.0
    stop_seconds: float = 60.0  # from a stop signal to the end, at most
    trust_remote_code: bool = False
    trainer_args: dict[str, Any] = field(default_factory=dict)  # anything else that TRL's SFTConfig or DPOConfig takes

    def __post_init__(self) -> None:
        if problems := list(self.problems()):
            raise InvalidInput("\n".join(problems))

    def problems(self) -> Iterator[str]:
        for name in ("data", "model", "output"):
            if not getattr(self, name) or getattr(self, name) == MISSING:
                yield f"{name}: not set; it needs a value"
        yield from self.chat.problems("chat")
        for name in ("max_steps", "batch_size", "gradient_accumulation", "max_length", "log_steps"):
            yield from self._out_of_range(name, low=1)
        for name in ("epochs", "learning_rate", "beta", "max_grad_norm", "checkpoint_seconds", "stop_seconds"):
            yield from self._out_of_range(name, low=0, open_low=True)
        yield from self._out_of_range("weight_decay", low=0)
        yield from self._out_of_range("seed", low=0)
        if not 0 <= self.warmup < 1:
            yield f"warmup: {self.warmup} is out of range; allowed: a share from 0 to under 1"

    def _out_of_range(self, name: str, low: float, open_low: bool = False) -> Iterator[str]:
        value = getattr(self, name)
        if value is not None and not ((low < value if open_low else low <= value) and value < inf):
            yield f"{name}: {value} is out of range; allowed: {'over' if open_low else 'at least'} {low}"

    def peak_learning_rate(self, stage: Stage) -> float:
        return self.learning_rate or (1e-6 if stage is Stage.dpo else 2e-5)

    def settings(self, stage: Stage) -> dict[str, Any]:
        """What can change a weight, but for data and model."""
        kept = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_SETTINGS}
        unused = ["max_steps" if self.max_steps is None else "epochs", *(["beta"] if stage is Stage.sft else [])]
        used = {name: value for name, value in kept.items() if name not in unused}
        return used | {"stage": stage, "learning_rate": self.peak_learning_rate(stage)}
