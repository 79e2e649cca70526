"""An engine without a model, for tests: a function answers each request.

It hands completions out late, a few a poll and in an order of its own, as a real engine may; and it refuses what the
real one refuses.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from random import Random

from specreason_batch.clock import Clock, WallClock
from specreason_batch.engine import EngineInfo, Script
from specreason_batch.types import Completion, Request


class ScriptedEngine:
    """Answers `script(request)` for every valid request; `requests` keeps what was asked, its prompt whole."""

    def __init__(
        self,
        script: Script,
        max_model_len: int = 4096,
        vocab_size: int = 1 << 17,
        order_seed: int = 0,
        clock: Clock | None = None,
        kv_capacity_tokens: int = 1 << 20,
    ):
        self.clock = clock or WallClock()
        self.info = EngineInfo(
            model="scripted",
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            kv_capacity_tokens=kv_capacity_tokens,
            block_size=16,
            version="scripted",
        )
        self.requests: list[Request] = []
        self.batches: list[int] = []  # sizes of what was submitted together
        self._script = script
        self._random = Random(order_seed)
        self._waiting: dict[str, Request] = {}

    @property
    def num_outstanding(self) -> int:
        return len(self._waiting)

    def submit(self, requests: Sequence[Request]) -> None:
        self.batches.append(len(requests))
        for request in requests:
            assert request.request_id not in self._waiting
            whole = replace(request, prompt_token_ids=list(request.whole_prompt()), suffix_token_ids=())
            self.requests.append(whole)
            self._waiting[request.request_id] = whole
        self.clock.ring()

    def poll(self, timeout: float) -> list[Completion]:
        ids = self._random.sample(sorted(self._waiting), k=self._random.randint(0, len(self._waiting)))
        completions = [self._answer(self._waiting.pop(id)) for id in ids]
        if self._waiting:
            self.clock.ring()
        return completions

    def abort(self, request_ids: Collection[str]) -> None:
        for id in request_ids:
            self._waiting.pop(id, None)

    def close(self) -> None:
        self._waiting.clear()

    def _answer(self, request: Request) -> Completion:
        if len(request.prompt_token_ids) + request.max_tokens > self.info.max_model_len:
            return Completion.refusal(request, "longer than the window")
        if not all(0 <= id < self.info.vocab_size for id in request.prompt_token_ids):
            return Completion.refusal(request, "token id out of range")
        return self._script(request)
