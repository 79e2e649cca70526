"""The engine protocol: requests in, completions out, nothing blocks for long.

An engine owns one model. It continues token ids, and knows nothing of roles, steps, grades or chains. `vllm_engine`
implements it over vLLM; `scripted_engine` is for tests.

Engines that share a `clock.Clock` ring it whenever a `poll` may have something, so one thread can wait for all of them
at once: `clock.wait(timeout)`, then `poll(0)` on each.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from specreason_batch.clock import Clock
from specreason_batch.types import Completion, Request

Script = Callable[[Request], Completion]  # what answers in an engine without a model


class EngineDead(Exception):
    """The engine cannot go on: its process died, it raised, or it gave no output for its time-out."""


class EngineAborted(Exception):
    """The engine cut requests short (a signal reached it). Their tokens must not be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What is known of an engine once it is up."""

    model: str
    max_model_len: int  # tokens: prompt and completion together
    vocab_size: int  # ids are in [0, vocab_size)
    kv_capacity_tokens: int  # of its KV cache
    block_size: int  # tokens; the prefix cache works in whole blocks
    version: str  # of the program behind it


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
        """Forget these requests: no completion of theirs is handed out any more. Unknown ids are passed over."""
        ...

    def close(self) -> None:
        """Release the model, its memory and its processes. May be called twice."""
        ...
