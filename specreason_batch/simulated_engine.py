"""An engine without a model and a clock without time: what schedules and policies would take on given hardware.

An engine works in passes, as vLLM does: each running sequence decodes one token, new ones are prefilled beside, up to a
token limit; memory is a KV cache of which what is not in use holds earlier prefixes, least recently used first out. A
`CostProfile` says what a pass takes; a function answers each request. Two engines on one device share its time.

Left out: prefixes shared between chains, the blocks that a rejected draft leaves behind, asynchronous scheduling.
"""

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from specreason_batch.engine import EngineInfo, Script
from specreason_batch.types import Completion, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class CostProfile:
    """What one engine's pass costs, in seconds, and what the engine holds, in tokens."""

    host_seconds: float  # of each pass, not on the device
    pass_seconds: float  # of each pass on the device: the weights read
    sequence_seconds: float = 0.0  # for each sequence in the pass
    start_seconds: float = 0.0  # for each sequence that begins in the pass
    kv_token_seconds: float = 0.0  # for each token of context that a decoding sequence reads
    prefill_token_seconds: float = 0.0
    attention_seconds: float = 0.0  # for each prefilled token and each token of context before it
    request_seconds: float = 0.0  # of the caller's time, for each request
    latency_seconds: float = 0.0  # from the end of a request's last pass until the caller can have it
    max_batched_tokens: int = 8192  # a pass
    max_sequences: int = 1024  # running at a time
    kv_capacity_tokens: int = 1 << 30
    block_size: int = 16
    chunked_prefill: bool = True
    max_model_len: int = 1 << 20

    def at_context(self, num_tokens: int) -> "CostProfile":
        """The same where every chain counts as so long: a short simulation then shows a long run's steady state."""
        return replace(
            self,
            sequence_seconds=self.sequence_seconds + self.kv_token_seconds * num_tokens,
            kv_token_seconds=0.0,
            prefill_token_seconds=self.prefill_token_seconds + self.attention_seconds * num_tokens,
            attention_seconds=0.0,
        )


class VirtualClock:
    """Virtual seconds. Waiting, and the caller's own work, let the engines' passes go on; nothing else takes time.

    `cores`: on which engines and caller compute, where that is what they compete for; None: nobody lacks one. A
    fraction stands for cores that slow each other down.
    """

    def __init__(self, cores: float | None = None) -> None:
        self._cores = cores
        self._now = 0.0
        self._rung = False
        self._engines: list[SimulatedEngine] = []

    def now(self) -> float:
        return self._now

    def ring(self) -> None:
        self._rung = True

    def wait(self, timeout: float) -> None:
        end = self._now + timeout
        while not self._rung and self._now < end:
            self._go_on(end, self._begin_passes())
        self._rung = False

    def spend(self, seconds: float) -> None:
        """The caller works for so long; longer where it has to share a core."""
        while seconds > 0:
            share = self._begin_passes(callers=1)
            began, end = self._now, self._now + seconds / share
            self._go_on(end, share)
            seconds = 0.0 if self._now == end else seconds - (self._now - began) * share

    def add(self, engine: "SimulatedEngine") -> None:
        self._engines.append(engine)

    def _begin_passes(self, callers: int = 0) -> float:
        """Every engine that can work does; how much of a core each has."""
        for engine in self._engines:
            engine.begin_pass()
        wanted = callers + sum(engine.work is not None for engine in self._engines)
        return 1.0 if self._cores is None else min(1.0, self._cores / max(1, wanted))

    def _go_on(self, end: float, share: float) -> None:
        """To the next event, `end` at the latest; `share` of a core for everybody."""
        working = [engine for engine in self._engines if engine.work is not None]
        speeds = [share * self._speed(engine) for engine in working]
        events = [engine.work.next_event / speed for engine, speed in zip(working, speeds, strict=True) if engine.work]
        events += [engine.next_delivery - self._now for engine in self._engines if engine.next_delivery is not None]
        seconds = max(0.0, min(events, default=end - self._now))
        if seconds >= end - self._now:
            seconds, self._now = end - self._now, end
        else:
            self._now += seconds
        for engine, speed in zip(working, speeds, strict=True):
            engine.go_on(seconds * speed)
        for engine in self._engines:
            engine.deliver()

    def _speed(self, engine: "SimulatedEngine") -> float:
        """Those that compute on one device share its time; host time is everybody's own."""
        assert engine.work is not None
        if engine.work.host_seconds > 0:
            return 1.0
        sharing = sum(
            other.device == engine.device and other.work is not None and other.work.host_seconds <= 0
            for other in self._engines
        )
        return 1.0 / sharing


@dataclass(slots=True, eq=False)
class SequenceState:
    """A request that the engine works on."""

    request: Request
    answer: Completion  # what will come of it
    num_cached: int = 0
    num_computed: int = 0  # tokens of it in the KV cache
    num_generated: int = 0

    @property
    def generated(self) -> tuple[int, ...]:
        return self.answer.token_ids[: self.num_generated]

    @property
    def num_tokens(self) -> int:
        return self.request.num_prompt_tokens + self.num_generated

    @property
    def num_to_prefill(self) -> int:
        """Its prompt, and after a preemption what it had generated."""
        return self.num_tokens - self.num_computed

    @property
    def decodes(self) -> bool:
        """Whether its next pass computes one token, the last one generated."""
        return self.num_generated > 0 and self.num_to_prefill == 1

    def start(self, num_cached: int) -> None:
        """Take what the cache holds of it; after a preemption, once more."""
        self.num_computed = num_cached
        if not self.num_generated:
            self.num_cached = num_cached

    @property
    def is_done(self) -> bool:
        return self.num_generated >= len(self.answer.token_ids)


@dataclass(slots=True)
class Work:
    """The pass under way."""

    host_seconds: float  # left
    device_seconds: float
    prefilled: list[tuple[SequenceState, int]]
    decoding: list[SequenceState]

    @property
    def next_event(self) -> float:
        return self.host_seconds if self.host_seconds > 0 else self.device_seconds


@dataclass(slots=True)
class Prefix:
    """What the cache holds of one chain."""

    chain: list[int]  # the lent list, which only grows
    num_chain: int  # its length then
    tail: tuple[int, ...]  # computed after it: a suffix, a generated step
    length: int  # tokens held, whole blocks, from the start

    def common(self, request: Request, generated: Sequence[int]) -> int:
        """Tokens held that are this request's as well, or those that it has generated."""
        if self.length <= self.num_chain:
            return self.length
        held = self.tail[: self.length - self.num_chain]
        wanted = (*request.prompt_token_ids[self.num_chain : self.length], *request.suffix_token_ids, *generated)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(held, wanted, strict=False))
        return self.num_chain + len(list(same))


@dataclass(slots=True)
class PrefixCache:
    """What is left of ended requests in the memory that the running ones do not need; least recently used first."""

    block_size: int
    num_tokens: int = 0
    _prefixes: OrderedDict[int, Prefix] = field(default_factory=OrderedDict)

    def look(self, sequence: SequenceState) -> int:
        """Tokens of it that need not be computed."""
        request = sequence.request
        prefix = self._prefixes.get(id(request.prompt_token_ids))
        if prefix is None:
            return 0
        usable = min(prefix.common(request, sequence.generated), sequence.num_tokens - 1)
        return usable // self.block_size * self.block_size

    def take(self, sequence: SequenceState) -> int:
        """The same; they are the sequence's from here on."""
        num_tokens = self.look(sequence)
        self._drop(id(sequence.request.prompt_token_ids))
        return num_tokens

    def put(self, request: Request, generated: Sequence[int], num_computed: int) -> None:
        chain = request.prompt_token_ids
        self._drop(id(chain))
        tail = (*request.suffix_token_ids, *generated)
        length = num_computed // self.block_size * self.block_size
        self._prefixes[id(chain)] = Prefix(chain, len(chain), tail, length)
        self.num_tokens += length

    def shrink(self, num_tokens: int) -> None:
        """Let go of the least recently used, ends first, until at most `num_tokens` are held."""
        while self.num_tokens > max(0, num_tokens):
            key, prefix = next(iter(self._prefixes.items()))
            gone = min(prefix.length, -(-(self.num_tokens - num_tokens) // self.block_size) * self.block_size)
            prefix.length -= gone
            self.num_tokens -= gone
            if prefix.length <= 0:
                del self._prefixes[key]

    def _drop(self, key: int) -> None:
        prefix = self._prefixes.pop(key, None)
        self.num_tokens -= prefix.length if prefix else 0


class SimulatedEngine:
    """The Engine protocol in virtual time. `device`: engines of one name share its time."""

    def __init__(self, script: Script, profile: CostProfile, clock: VirtualClock, device: str = "0"):
        if profile.kv_capacity_tokens < profile.max_model_len and profile.max_model_len < 1 << 20:
            raise ValueError(f"kv_capacity_tokens: {profile.kv_capacity_tokens} is under max_model_len")
        self.info = EngineInfo(
            model="simulated",
            max_model_len=profile.max_model_len,
            vocab_size=1 << 31,
            kv_capacity_tokens=profile.kv_capacity_tokens,
            block_size=profile.block_size,
            version="simulated",
        )
        self.profile = profile
        self.device = device
        self.work: Work | None = None
        self.num_passes = 0
        self.num_preempted = 0
        self.device_seconds = 0.0  # spent computing
        self._script = script
        self.clock = clock
        self._cache = PrefixCache(profile.block_size)
        self._waiting: deque[SequenceState] = deque()
        self._running: list[SequenceState] = []
        self._on_their_way: deque[tuple[float, Completion]] = deque()  # with the moment of their arrival
        self._ready: list[Completion] = []
        clock.add(self)

    @property
    def num_outstanding(self) -> int:
        return len(self._waiting) + len(self._running) + len(self._on_their_way) + len(self._ready)

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if self.profile.request_seconds:
                self.clock.spend(self.profile.request_seconds)
            if request.num_prompt_tokens + request.max_tokens > self.profile.max_model_len:
                self._hand_out(Completion.refusal(request, "longer than the window"))
            else:
                self._waiting.append(SequenceState(request, self._script(request)))

    def poll(self, timeout: float) -> list[Completion]:
        end = self.clock.now() + timeout
        while not self._ready and self.clock.now() < end and self.num_outstanding:
            self.clock.wait(end - self.clock.now())
        ready, self._ready = self._ready, []
        return ready

    def abort(self, request_ids: Collection[str]) -> None:
        gone = set(request_ids)
        self._waiting = deque(sequence for sequence in self._waiting if sequence.request.request_id not in gone)
        self._running = [sequence for sequence in self._running if sequence.request.request_id not in gone]
        self._on_their_way = deque(item for item in self._on_their_way if item[1].request_id not in gone)
        self._ready = [completion for completion in self._ready if completion.request_id not in gone]

    def close(self) -> None:
        self._waiting, self._running, self._on_their_way, self._ready = deque(), [], deque(), []

    # --- passes ---

    def begin_pass(self) -> None:
        """Schedule the next pass, if none is under way and there is anything to do."""
        if self.work is not None or not (self._waiting or self._running):
            return
        used = self._make_room()
        decoding, prefilled = self._continued()
        budget = self.profile.max_batched_tokens - len(decoding) - sum(tokens for _, tokens in prefilled)
        admitted = list(self._admitted(budget, used))
        prefilled += admitted
        device_seconds = self._device_seconds(prefilled, decoding, len(admitted))
        self.work = Work(self.profile.host_seconds, device_seconds, prefilled, decoding)
        self.num_passes += 1

    def go_on(self, seconds: float) -> None:
        """So much of the pass is done, at most up to its next event."""
        work = self.work
        assert work is not None
        if work.host_seconds > 0:
            work.host_seconds = 0.0 if work.host_seconds - seconds <= 1e-12 else work.host_seconds - seconds
            return
        work.device_seconds -= seconds
        self.device_seconds += seconds
        if work.device_seconds <= 1e-12:
            self.work = None
            self._end_pass(work)

    def _continued(self) -> tuple[list[SequenceState], list[tuple[SequenceState, int]]]:
        """The running sequences: those that decode, and those still to be prefilled with their share of the pass."""
        decoding = [sequence for sequence in self._running if sequence.decodes]
        budget = self.profile.max_batched_tokens - len(decoding)
        prefilled = []
        for sequence in self._running:
            if not sequence.decodes:
                prefilled.append((sequence, min(sequence.num_to_prefill, budget)))
                budget -= prefilled[-1][1]
        return decoding, prefilled

    def _admitted(self, budget: int, used: int) -> Iterator[tuple[SequenceState, int]]:
        """Waiting sequences that start in this pass, in their order, while tokens and memory last."""
        profile = self.profile
        while self._waiting and budget > 0 and len(self._running) < profile.max_sequences:
            sequence = self._waiting[0]
            need = self._blocks(sequence)
            if used + need > profile.kv_capacity_tokens and self._running:
                return
            uncached = sequence.num_tokens - self._cache.look(sequence)
            if uncached > budget and self._running and not profile.chunked_prefill:
                return
            sequence.start(self._cache.take(sequence))
            used += need
            self._cache.shrink(profile.kv_capacity_tokens - used)
            self._running.append(self._waiting.popleft())
            tokens = min(sequence.num_to_prefill, budget) if profile.chunked_prefill else sequence.num_to_prefill
            budget -= tokens
            yield sequence, tokens

    def _device_seconds(
        self, prefilled: list[tuple[SequenceState, int]], decoding: list[SequenceState], num_started: int
    ) -> float:
        profile = self.profile
        return (
            profile.pass_seconds
            + profile.sequence_seconds * (len(prefilled) + len(decoding))
            + profile.start_seconds * num_started
            + profile.kv_token_seconds * sum(sequence.num_computed for sequence in decoding)
            + profile.prefill_token_seconds * sum(tokens for _, tokens in prefilled)
            + profile.attention_seconds * sum(_pairs(sequence.num_computed, tokens) for sequence, tokens in prefilled)
        )

    def _end_pass(self, work: Work) -> None:
        for sequence, num_tokens in work.prefilled:
            sequence.num_computed += num_tokens
            if sequence.num_to_prefill <= 0:
                sequence.num_generated += 1
        for sequence in work.decoding:
            sequence.num_computed += 1
            sequence.num_generated += 1
        done = [sequence for sequence in self._running if sequence.is_done]
        self._running = [sequence for sequence in self._running if not sequence.is_done]
        for sequence in done:
            self._cache.put(sequence.request, sequence.answer.token_ids, sequence.num_computed)
            self._hand_out(replace(sequence.answer, num_cached_tokens=sequence.num_cached))

    # --- memory ---

    def _blocks(self, sequence: SequenceState) -> int:
        """Tokens of the cache that it takes with the token that it computes next."""
        block = self.profile.block_size
        return (max(sequence.num_computed, sequence.request.num_prompt_tokens) // block + 1) * block

    def _make_room(self) -> int:
        """Preempt the youngest until every running sequence can go on; tokens that these then take."""
        used = sum(self._blocks(sequence) for sequence in self._running)
        while used > self.profile.kv_capacity_tokens and len(self._running) > 1:
            sequence = self._running.pop()
            used -= self._blocks(sequence)
            self._cache.put(sequence.request, sequence.answer.token_ids, sequence.num_computed)
            self._waiting.appendleft(sequence)
            self.num_preempted += 1
        self._cache.shrink(self.profile.kv_capacity_tokens - used)
        return used

    # --- completions ---

    @property
    def next_delivery(self) -> float | None:
        """When the next completion arrives at the caller."""
        return self._on_their_way[0][0] if self._on_their_way else None

    def deliver(self) -> None:
        """Hand out what has arrived by now."""
        while self._on_their_way and self._on_their_way[0][0] <= self.clock.now():
            self._ready.append(self._on_their_way.popleft()[1])
            self.clock.ring()

    def _hand_out(self, completion: Completion) -> None:
        self._on_their_way.append((self.clock.now() + self.profile.latency_seconds, completion))
        self.deliver()


def _pairs(num_before: int, num_tokens: int) -> int:
    """How often a prefilled token looks at a token before it, in the cache or in its own chunk."""
    return num_before * num_tokens + num_tokens * (num_tokens - 1) // 2
