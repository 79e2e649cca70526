"""The engine protocol: requests in, completions out, nothing blocks for long.

An engine owns one model. It continues token ids, and knows nothing of roles, steps, grades or chains. `vllm_engine`
implements it over vLLM; `scripted_engine` is for tests.

Engines that share a `clock.Clock` ring it whenever a `poll` may have something, so one thread can wait for all of them
at once: `clock.wait(timeout)`, then `poll(0)` on each.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from specreason_batch.clock import Clock
from specreason_batch.types import Completion, Request, Role

Script = Callable[[Request], Completion]  # what answers in an engine without a model


class DeathCause(StrEnum):
    """Why an engine cannot go on; it decides what may help."""

    died = "died"  # a process of it was killed, or something was raised that says no more
    out_of_memory = "out_of_memory"  # fewer chains at a time may live
    silent = "silent"  # no output for its time-out
    aborted = "aborted"  # it cut requests short
    starting = "starting"  # it never came up
    device = "device"  # the accelerator reported an error


class EngineDead(Exception):
    """The engine cannot go on: its process died, it raised, or it gave no output for its time-out. Close it."""

    def __init__(self, message: str = "", *, cause: DeathCause = DeathCause.died, role: Role | None = None):
        super().__init__(message)
        self.cause = cause
        self.role = role  # set by whoever knows it; an engine does not


class EngineAborted(EngineDead):
    """The engine cut requests short (a signal reached it). Their tokens must not be used."""

    def __init__(self, message: str = "", *, role: Role | None = None):
        super().__init__(message, cause=DeathCause.aborted, role=role)


class BadNode(Exception):
    """This machine's trouble: a restart here will not cure it, one elsewhere may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What is known of an engine once it is up."""

    model: str
    max_model_len: int  # tokens: prompt and completion together
    vocab_size: int  # ids are in [0, vocab_size)
    kv_capacity_tokens: int  # of its KV cache
    block_size: int  # tokens; the prefix cache works in whole blocks
    version: str  # of the program behind it


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationStats:
    """What speculative decoding came to, over the requests that an engine has completed."""

    num_drafts: int = 0  # times that tokens were guessed ahead
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0

    def __add__(self, other: "SpeculationStats") -> "SpeculationStats":
        return SpeculationStats(
            num_drafts=self.num_drafts + other.num_drafts,
            num_drafted_tokens=self.num_drafted_tokens + other.num_drafted_tokens,
            num_accepted_tokens=self.num_accepted_tokens + other.num_accepted_tokens,
        )

    def __str__(self) -> str:
        if not self.num_drafts:
            return "nothing was guessed"
        share, kept = self.num_accepted_tokens / self.num_drafted_tokens, self.num_accepted_tokens / self.num_drafts
        return f"{share:.1%} of {self.num_drafted_tokens:,} guessed tokens accepted, {1 + kept:.2f} tokens a pass"


@runtime_checkable
class Speculating(Protocol):
    """An engine that may decode speculatively."""

    @property
    def speculation(self) -> SpeculationStats | None:
        """Since it was started; None: it does not speculate, or cannot tell."""
        ...


class Engine(Protocol):
    """Submit any number of requests at any time; poll until nothing is outstanding."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def clock(self) -> Clock: ...

    @property
    def num_outstanding(self) -> int:
        """Requests submitted whose completion has not been handed out by `poll`."""
        ...

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. An invalid one comes back from `poll` as `refused`; the others are not touched by it.

        Raises EngineDead.
        """
        ...

    def poll(self, timeout: float) -> list[Completion]:
        """Completions that are ready, in no particular order; empty if there are none after about `timeout` seconds.

        Raises EngineDead; whatever was outstanding is then lost.
        """
        ...

    def abort(self, request_ids: Collection[str]) -> None:
        """Forget these requests: no completion of theirs is handed out any more.

        Unknown ids are passed over; a dead engine has nothing to forget.
        """
        ...

    def close(self) -> None:
        """Release the model, its memory and its processes, of a dead or hung engine too. May be called twice."""
        ...
