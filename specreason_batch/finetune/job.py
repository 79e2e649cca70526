"""One training from export to model folder. The composition root of `finetune`.

Everything that can be refused without torch is refused before it is imported.
"""

import os
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from specreason_batch import __version__
from specreason_batch.finetune.card import card
from specreason_batch.finetune.config import FinetuneConfig
from specreason_batch.finetune.output import WorkFolder, is_finetuned
from specreason_batch.finetune.plan import Plan, make_plan
from specreason_batch.signals import StopSignal
from specreason_batch.types import InvalidInput

_PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets")


def finetune(config: FinetuneConfig, console: Console) -> None:
    """The whole job. Raises InvalidInput, LeaseHeld, OSError, and Stopped once everything is saved."""
    plan = make_plan(config)
    made_from = plan.made_from()
    work = WorkFolder(Path(config.output).resolve())
    if is_finetuned(work.output, made_from):
        console.print(f"{config.output}: nothing to do: trained already, on the same data by the same settings")
        return
    stop = StopSignal(config.stop_seconds)
    with stop.installed():
        if _is_first():
            with work.claimed(made_from):
                _train(plan, work, stop, console)
        else:
            _train(plan, work, stop, Console(quiet=True))


def _train(plan: Plan, work: WorkFolder, stop: StopSignal, console: Console) -> None:
    try:
        from specreason_batch.finetune.training import train
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"jobs.finetune: {error}; install the extra: pip install 'specreason-batch[train]'"
        ) from error
    trained = train(plan, work, stop, console)
    if _is_first():
        record = {"made_from": plan.made_from(), "versions": _versions()} | trained
        work.commit(plan.parent, record, card(plan, record))
        console.print(f"{plan.config.output}: {record['num_steps']} steps in {record['seconds']:.0f} s", style="bold")


def _versions() -> dict[str, str]:
    return {"specreason_batch": __version__, **{package: version(package) for package in _PACKAGES}}


def _is_first() -> bool:
    """Of the processes that torchrun or accelerate has started: it owns the folders, and speaks."""
    return os.environ.get("RANK", "0") == "0"
