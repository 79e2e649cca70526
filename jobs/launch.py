"""What every job's entry point shares: conversion of the composed configuration, and exit statuses."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from specreason_batch.config import GenerateConfig
from specreason_batch.engine import BadNode, EngineDead
from specreason_batch.schedules import Stopped
from specreason_batch.store.attempts import LeaseHeld, LeaseLost
from specreason_batch.types import InvalidInput

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

BATCH_LOG_WIDTH = 140  # columns of a table where there is no terminal


class ExitStatus(IntEnum):
    """How a job ended (docs/slurm.md)."""

    finished = 0
    failed = 1  # engines keep dying, the disk is full ...; what was saved is safe
    invalid = 2  # configuration or input cannot be used; nothing was started
    held = 69  # another job works on what is left (EX_UNAVAILABLE)
    bad_node = 71  # this machine's trouble: run me again elsewhere (EX_OSERR)
    stopped = 75  # a signal; everything is saved: run me again (EX_TEMPFAIL)
    interrupted = 130  # a second Ctrl-C


def register_schema() -> None:
    """Put the typed schema where conf/ can refer to it."""
    ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)


def to_config(composed: DictConfig) -> GenerateConfig:
    """Raises InvalidInput."""
    return converted(composed, GenerateConfig)


def converted(composed: DictConfig, schema: type[Config]) -> Config:
    """The one conversion, of every job; validates. Raises InvalidInput."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise InvalidInput("\n".join(f"{name}: not set; it needs a value" for name in missing))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, schema)
    if unknown := list(_unknown_fields(config)):
        raise InvalidInput("\n".join(f"{name}: no such field" for name in unknown))
    return config


def _unknown_fields(section: Any, path: str = "") -> Iterator[str]:
    """Fields that Hydra's `+` has added beside the schema: a typo that would silently do nothing."""
    known = {field.name for field in fields(section)}
    for name, value in vars(section).items():
        if name not in known:
            yield f"{path}{name}"
        elif is_dataclass(value):
            yield from _unknown_fields(value, f"{path}{name}.")


def run_job(job: Callable[[Console], Any]) -> None:
    """Run a job; a user's mistake ends in one message and a non-zero status, never a traceback."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is first imported
    console = Console(width=None if sys.stdout.isatty() else BATCH_LOG_WIDTH)
    errors = Console(stderr=True)
    try:
        job(console)
    except InvalidInput as error:
        _leave(errors, f"error: {error}", ExitStatus.invalid)
    except Stopped as error:
        _leave(errors, f"stopped: {error}; everything is saved; run the same command again", ExitStatus.stopped)
    except KeyboardInterrupt:
        _leave(errors, "interrupted at once; what is saved is safe", ExitStatus.interrupted)
    except LeaseHeld as error:
        _leave(errors, f"held: another job works on what is left:\n{error}", ExitStatus.held)
    except LeaseLost as error:
        _leave(errors, f"lost: {error}", ExitStatus.held)
    except BadNode as error:
        _leave(errors, f"bad node: {error}; run the same command elsewhere", ExitStatus.bad_node)
    except (EngineDead, OSError) as error:
        _leave(errors, f"failed: {error}; what is saved is safe; run the same command again", ExitStatus.failed)


def _leave(console: Console, message: str, status: ExitStatus) -> None:
    console.print(message, style="bold red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(status)
