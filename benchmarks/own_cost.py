"""What our own code costs a request: the real schedule, translator and policy over engines that answer at once.

    python -m benchmarks.own_cost

Prints microseconds a request by chain length, the engines' own seconds taken out, and one JSON line. Nothing of it may
grow with the chain. What does is the hand-over: vLLM takes a prompt as one list, so a grade's chain and turn are joined
for it; that join is shown beside.
"""

import json
import platform
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from specreason_batch.chain import Chain, Limits
from specreason_batch.chat import ChatFormat, ChatOptions, load_chat_format
from specreason_batch.clock import Clock, WallClock
from specreason_batch.engine import EngineInfo
from specreason_batch.judge import Judge, Question
from specreason_batch.policies import POLICIES, Rules
from specreason_batch.schedules import Admission, Capacity, Driver, Schedule, lockstep
from specreason_batch.translator import Decoding, Translator, Voice
from specreason_batch.types import Completion, FinishReason, Prompt, Request, Role

TOY = Path(__file__).parent.parent / "examples" / "toy"
LENGTHS = (100, 1_000, 10_000, 30_000)  # tokens of the prompt, and so of every request
NUM_CHAINS, NUM_STEPS, STEP_TOKENS, REPEATS = 32, 16, 32, 5
WINDOW = 1 << 20


class InstantEngine:
    """Answers every request at its next poll with one fixed step, or an even grade; counts its own seconds."""

    def __init__(self, step: tuple[int, ...], clock: Clock):
        self.clock = clock
        self.info = EngineInfo(
            model="instant",
            max_model_len=WINDOW,
            vocab_size=1 << 20,
            kv_capacity_tokens=1 << 30,
            block_size=16,
            version="instant",
        )
        self.seconds = 0.0
        self.num_requests = 0
        self._step = step
        self._waiting: list[Request] = []

    @property
    def num_outstanding(self) -> int:
        return len(self._waiting)

    def submit(self, requests: Sequence[Request]) -> None:
        self.num_requests += len(requests)
        self._waiting.extend(requests)
        self.clock.ring()

    def poll(self, timeout: float) -> list[Completion]:
        began = time.perf_counter()
        waiting, self._waiting = self._waiting, []
        done = [self._answer(number, request) for number, request in enumerate(waiting)]
        self.seconds += time.perf_counter() - began
        return done

    def abort(self, request_ids: Collection[str]) -> None:
        self._waiting = [request for request in self._waiting if request.request_id not in request_ids]

    def close(self) -> None:
        self._waiting = []

    def _answer(self, number: int, request: Request) -> Completion:
        labels = request.sampling.logprob_token_ids
        likely = labels[-1 - 9 * (number % 2)] if labels else 0  # every other draft is rejected
        return Completion(
            request_id=request.request_id,
            token_ids=(likely,) if labels else (number, *self._step)[: request.max_tokens],
            finish_reason=FinishReason.length if labels else FinishReason.stop,
            logprobs={label: 0.0 if label == likely else -20.0 for label in labels},
        )


def measure(chat: ChatFormat, num_prompt_tokens: int, schedule: Schedule = lockstep) -> float:
    """Seconds a request of our own code at this chain length."""
    translator = _translator(chat)
    blank = min(chat.blank_line_ids)
    clock = WallClock()
    engines = {role: InstantEngine((*range(200, 200 + STEP_TOKENS), blank), clock) for role in Role}
    chains = list(_chains(translator, num_prompt_tokens))
    capacities = {role: Capacity.of(engine.info) for role, engine in engines.items()}
    admission = Admission(iter(chains), NUM_CHAINS, capacities)
    driver = Driver(engines, translator, partial(POLICIES["specreason"].coroutine, rules=Rules()), admission)
    began = time.perf_counter()
    for _ in schedule(driver):
        pass
    seconds = time.perf_counter() - began - sum(engine.seconds for engine in engines.values())
    return seconds / sum(engine.num_requests for engine in engines.values())


def measure_copy(num_prompt_tokens: int) -> float:
    """Seconds to join a chain and its grading turn into the one list that vLLM takes."""
    ids, suffix = list(range(num_prompt_tokens)), (0,) * 40
    began = time.perf_counter()
    for _ in range(200):
        _ = [*ids, *suffix]
    return (time.perf_counter() - began) / 200


def _chains(translator: Translator, num_prompt_tokens: int) -> Iterator[Chain]:
    for number in range(NUM_CHAINS):
        chain = translator.open(Prompt(prompt_id=str(number), prompt="x"), 0)
        for context in chain.contexts.values():
            context.ids.extend([300] * (num_prompt_tokens - len(context.ids)))
        yield chain


def _translator(chat: ChatFormat) -> Translator:
    decoding = Decoding(temperature=0.6, top_p=0.95, top_k=0)
    voices = {role: Voice(format=chat, window=WINDOW, steps=decoding, answers=decoding) for role in Role}
    judge = Judge(Question(question="Is the last step right? Grade 0-9.", reply_opening="Grade: "), chat)
    limits = Limits(max_step_tokens=64, thinking_tokens=NUM_STEPS * (STEP_TOKENS + 2))
    return Translator(voices, judge, limits, max_answer_tokens=32, seed=0)


def main() -> None:
    chat = load_chat_format(Role.base, str(TOY / "base"), ChatOptions())
    measure(chat, 100)
    table = Table("tokens a request", "our code, us a request", "joining a prompt for vLLM, us", title="own cost")
    figures = {}
    for length in LENGTHS:
        own = statistics.median(measure(chat, length) for _ in range(REPEATS)) * 1e6
        copied = statistics.median(measure_copy(length) for _ in range(REPEATS)) * 1e6
        figures[length] = {"own_us": round(own, 1), "copy_us": round(copied, 1)}
        table.add_row(f"{length:,}", f"{own:.1f}", f"{copied:.1f}")
    Console().print(table)
    print(json.dumps({"own_cost": figures, "python": platform.python_version(), "machine": platform.machine()}))


if __name__ == "__main__":
    main()
