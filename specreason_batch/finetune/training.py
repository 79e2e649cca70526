"""TRL's trainers on encoded rows: the one file that imports torch and trl, and only when a training begins.

Does not know: what a row meant, folders but for the trainer's own.
"""

import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from specreason_batch.finetune.config import FinetuneConfig, Precision, Stage
from specreason_batch.finetune.output import WorkFolder
from specreason_batch.finetune.plan import Plan
from specreason_batch.schedules import Stopped
from specreason_batch.signals import StopSignal
from specreason_batch.types import InvalidInput

_KEPT_CHECKPOINTS = 2


@dataclass(frozen=True, slots=True)
class Rows:
    """One split, encoded."""

    dataset: Any
    num_too_long: int  # left out


def train(plan: Plan, work: WorkFolder, stop: StopSignal, console: Console) -> dict[str, Any]:
    """Train to the end and save the weights in `work.weights`; what is to be recorded of it.

    Raises InvalidInput, Stopped once a checkpoint is saved, OSError.
    """
    _be_quiet()
    with stop.at_once():
        args = _trainer_config(plan, work.path)
        with args.main_process_first(local=False):
            rows = _encoded_splits(plan, work.path)
        trainer = _trainer(plan, args, rows)
    watch = _Watch(stop, console, plan.config.checkpoint_seconds)
    trainer.add_callback(watch)
    _tell_beginning(plan, rows, work.checkpoint, console)
    trainer.train(resume_from_checkpoint=str(work.checkpoint) if work.checkpoint else None)
    if watch.is_stopped:
        raise Stopped(f"a signal, at step {trainer.state.global_step} of {trainer.state.max_steps}")
    _save(trainer, plan, work.weights)
    return _record(trainer, rows)


# --- what the trainer is given ---


def _trainer_config(plan: Plan, folder: Path) -> Any:
    """SFTConfig or DPOConfig.

    Raises InvalidInput for `trainer_args` that it does not take, or for which there is a choice of our own.
    """
    config, schema = plan.config, DPOConfig if plan.stage is Stage.dpo else SFTConfig
    own = _own_args(config, plan.stage, folder, has_validation=bool(plan.export.validation))
    known = {field.name for field in fields(schema)}
    for name in config.trainer_args:
        if name in own:
            raise InvalidInput(f"trainer_args.{name}: jobs.finetune sets it; see conf/finetune.yaml")
        if name not in known:
            raise InvalidInput(f"trainer_args.{name}: no such field of trl.{schema.__name__}")
    try:
        return schema(**own, **config.trainer_args)
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"trl.{schema.__name__} refuses these settings: {error}") from error


def _own_args(config: FinetuneConfig, stage: Stage, folder: Path, has_validation: bool) -> dict[str, Any]:
    own = {
        "output_dir": str(folder),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "gradient_checkpointing": config.gradient_checkpointing,
        "learning_rate": config.peak_learning_rate(stage),
        "lr_scheduler_type": config.lr_schedule,
        "warmup_steps": config.warmup,  # a share, since it is under 1
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "bf16": _computes_in_bfloat16(config.precision),
        "fp16": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "max_length": None,  # what is too long is left out, not cut
        "logging_steps": config.log_steps,
        "eval_strategy": "epoch" if has_validation else "no",
        "save_strategy": "no",  # _Watch says when
        "save_total_limit": _KEPT_CHECKPOINTS,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return own | ({"beta": config.beta} if stage is Stage.dpo else {})


def _computes_in_bfloat16(precision: Precision) -> bool:
    if precision is Precision.auto:
        return bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    return precision is Precision.bfloat16


def _encoded_splits(plan: Plan, folder: Path) -> dict[str, Rows]:
    """Raises InvalidInput for a row that cannot be encoded, or if all are too long."""
    limit = plan.config.max_length or AutoConfig.from_pretrained(plan.parent).max_position_embeddings
    splits = {"train": plan.export.train, "validation": plan.export.validation}
    rows = {name: _encoded(plan, files, limit, folder / "rows") for name, files in splits.items() if files}
    if not rows["train"].dataset:
        raise InvalidInput(
            f"max_length: every row is longer than {limit} tokens; allowed: more, up to the model's window"
        )
    return rows


def _encoded(plan: Plan, files: list[Path], limit: int, cache: Path) -> Rows:
    """On disk, so that a restart finds them."""
    read = Dataset.from_parquet([str(path) for path in files], cache_dir=str(cache))
    encoded = read.map(plan.encode, remove_columns=read.column_names, new_fingerprint=f"encoded-{files[0].stem}")
    kept = encoded.filter(partial(_fits, limit), new_fingerprint=f"kept-{files[0].stem}")
    return Rows(kept, len(encoded) - len(kept))


def _fits(limit: int, row: dict[str, list[int]]) -> bool:
    if "input_ids" in row:
        return len(row["input_ids"]) <= limit
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= limit


class _StepTrainer(DPOTrainer):
    """DPOTrainer on rows that are token ids already: it has no way to say so, and would end each step with `eos`."""

    def _prepare_dataset(self, dataset: Any, *_args: Any) -> Any:
        return dataset


def _trainer(plan: Plan, args: Any, rows: dict[str, Rows]) -> Any:
    # In float32, whatever it is saved in: small steps vanish in bfloat16 weights.
    model = AutoModelForCausalLM.from_pretrained(
        plan.parent, dtype=torch.float32, trust_remote_code=plan.config.trust_remote_code
    )
    trainer = (_StepTrainer if plan.stage is Stage.dpo else SFTTrainer)(
        model=model,
        args=args,
        train_dataset=rows["train"].dataset,
        eval_dataset=rows["validation"].dataset if "validation" in rows else None,
        processing_class=plan.chat.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _be_quiet() -> None:
    """The job says itself how far it is."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


# --- while it trains ---


class _Watch(TrainerCallback):  # type: ignore[misc]
    """After every step: has a signal come, is a checkpoint due? And what a person sees."""

    def __init__(self, stop: StopSignal, console: Console, checkpoint_seconds: float):
        self.is_stopped = False
        self._stop, self._console, self._checkpoint_seconds = stop, console, checkpoint_seconds
        self._started = self._saved = time.monotonic()

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        before = next((entry["seconds"] for entry in reversed(state.log_history) if "seconds" in entry), 0.0)
        self._saved = time.monotonic()
        self._started = self._saved - before

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        is_due = time.monotonic() - self._saved >= self._checkpoint_seconds
        stopped, due = _agreed([self._stop.number is not None, is_due], args)
        if state.global_step >= state.max_steps:
            return
        self.is_stopped = stopped
        control.should_training_stop = control.should_training_stop or stopped
        control.should_save = control.should_save or stopped or due

    def on_epoch_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """A stop ends the epoch too: there may be no time to evaluate."""
        control.should_evaluate = control.should_evaluate and not self.is_stopped

    def on_save(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        self._saved = time.monotonic()

    def on_log(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Every entry gets the seconds of training so far, those before a restart included."""
        entry = state.log_history[-1]
        entry["seconds"] = round(time.monotonic() - self._started, 3)
        values = [f"{name} {entry[name]:.4g}" for name in _SHOWN if name in entry]
        if values:
            self._say(f"step {state.global_step} of {state.max_steps} ({entry['seconds']:.0f} s): {', '.join(values)}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


_SHOWN = ("loss", "eval_loss", "mean_token_accuracy", "rewards/accuracies", "eval_rewards/accuracies")


def _agreed(flags: list[bool], args: Any) -> list[bool]:
    """What any of the processes says: they must stop, and save, at the same step."""
    if args.world_size == 1:
        return flags
    said = torch.tensor(flags, dtype=torch.int32, device=args.device)
    torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in said.tolist()]


def _tell_beginning(plan: Plan, rows: dict[str, Rows], checkpoint: Path | None, console: Console) -> None:
    counts = ", ".join(
        f"{name} {len(split.dataset)} rows" + (f" ({split.num_too_long} too long)" if split.num_too_long else "")
        for name, split in rows.items()
    )
    console.print(f"{plan.stage} of {plan.config.model}: {counts}", highlight=False, soft_wrap=True)
    if checkpoint:
        console.print(f"going on from {checkpoint.name}", highlight=False, soft_wrap=True)


# --- what is left of it ---


def _save(trainer: Any, plan: Plan, folder: Path) -> None:
    """The weights, in the type that the parent's configuration names. Every process must call it."""
    trainer.save_model(str(folder))
    dtype = AutoConfig.from_pretrained(plan.parent).dtype
    if not trainer.is_world_process_zero() or dtype in (None, torch.float32):
        return
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


def _record(trainer: Any, rows: dict[str, Rows]) -> dict[str, Any]:
    log = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return {
        "rows": {name: {"used": len(split.dataset), "too_long": split.num_too_long} for name, split in rows.items()},
        "num_steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "seconds": max((entry["seconds"] for entry in log), default=0.0),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "num_processes": trainer.args.world_size,
        "log": log,
    }
