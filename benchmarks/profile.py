"""A cost profile of this machine's engines: experiments on each alone, then the profile that simulates them best.

    python -m benchmarks.profile

Experiments are batches of requests (so many sequences, so long a prompt, so many tokens generated, with and without a
cached prefix) and streams, where each ended request is followed by the next of its chain, as in a run. The forward
model is the simulator itself, so that what it predicts elsewhere is what it was fitted by. Prints each experiment
measured and simulated, and both profiles.
"""

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from jobs.launch import register_schema, to_config
from specreason_batch.config import GenerateConfig
from specreason_batch.engine import Engine
from specreason_batch.engines import started_engines
from specreason_batch.progress import Progress
from specreason_batch.simulated_engine import CostProfile, SimulatedEngine, VirtualClock
from specreason_batch.simulation import repeat_token
from specreason_batch.types import Request, Role, Sampling

CONF = Path(__file__).parent.parent / "conf"
REPEATS = 3
SAMPLING = Sampling(temperature=0.6, top_p=0.95)  # as runs do: on a CPU, top_p costs a sort of every row of logits
# What is fitted, with a first guess in seconds.
GUESS = {
    "pass_seconds": 1e-3,
    "sequence_seconds": 2e-5,
    "start_seconds": 1e-4,
    "prefill_token_seconds": 1e-5,
    "kv_token_seconds": 3e-7,
    "attention_seconds": 2e-8,
    "request_seconds": 2e-4,
    "latency_seconds": 5e-4,
}


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of equal requests, submitted together and drained."""

    num_sequences: int
    num_prompt_tokens: int  # new ones
    num_generated_tokens: int
    num_cached_tokens: int = 0  # of prompt before them, computed by an earlier request

    def requests(self, seed: int) -> list[Request]:
        """Prompts of random tokens; what is to be cached is the lent list, as a chain is, the rest the suffix."""
        chosen = random.Random(seed)
        return [
            Request(
                request_id=f"{seed}-{number}",
                prompt_token_ids=[chosen.randrange(100, 200) for _ in range(self.num_cached_tokens)],
                suffix_token_ids=tuple(chosen.randrange(100, 200) for _ in range(self.num_prompt_tokens)),
                max_tokens=self.num_generated_tokens,
                sampling=SAMPLING,
                seed=number,
            )
            for number in range(self.num_sequences)
        ]

    def seconds(self, engine: Engine, seed: int) -> float:
        """On this engine's clock."""
        requests = self.requests(seed)
        if self.num_cached_tokens:
            _drain(engine, [_opening(request) for request in requests])
        began = engine.clock.now()
        _drain(engine, requests)
        return engine.clock.now() - began

    def simulated_seconds(self, profile: CostProfile) -> float:
        return self.seconds(SimulatedEngine(repeat_token, profile, VirtualClock()), 0)


@dataclass(frozen=True, slots=True)
class Stream:
    """Chains that go on step by step, each as soon as its last step has ended: passes both decode and prefill."""

    num_sequences: int
    num_prompt_tokens: int
    num_generated_tokens: int  # mean; from half to one and a half
    num_steps: int = 6
    num_cached_tokens: int = 0

    def seconds(self, engine: Engine, seed: int) -> float:
        """On this engine's clock."""
        chosen = random.Random(seed)
        chains = [
            [chosen.randrange(100, 200) for _ in range(self.num_prompt_tokens)] for _ in range(self.num_sequences)
        ]
        steps_left = [self.num_steps] * self.num_sequences
        began = engine.clock.now()
        engine.submit([self.step(ids, f"{seed}-{chain}-0", chosen) for chain, ids in enumerate(chains)])
        while engine.num_outstanding:
            engine.clock.wait(1.0)
            for completion in engine.poll(0.0):
                chain = int(completion.request_id.split("-")[1])
                chains[chain] += completion.token_ids
                steps_left[chain] -= 1
                if steps_left[chain]:
                    engine.submit([self.step(chains[chain], f"{seed}-{chain}-{steps_left[chain]}", chosen)])
        return engine.clock.now() - began

    def step(self, chain: list[int], request_id: str, chosen: random.Random) -> Request:
        """A request for the chain's next step."""
        mean = self.num_generated_tokens
        return Request(
            request_id=request_id,
            prompt_token_ids=chain,
            max_tokens=chosen.randint(mean // 2, mean + mean // 2),
            sampling=SAMPLING,
            seed=100 + chosen.randrange(100),
        )

    def simulated_seconds(self, profile: CostProfile) -> float:
        return self.seconds(SimulatedEngine(repeat_token, profile, VirtualClock()), 0)


EXPERIMENTS: tuple[Batch | Stream, ...] = (
    *(Batch(sequences, 40, 24) for sequences in (1, 4, 16, 64, 256)),
    *(Batch(sequences, 400, 24) for sequences in (1, 16, 64)),
    *(Batch(sequences, tokens, 1) for sequences in (1, 8, 64) for tokens in (30, 100, 300)),
    *(Batch(sequences, 40, 1, 320) for sequences in (1, 8, 64)),
    *(Batch(sequences, 40, 10, 160) for sequences in (1, 8, 32, 128)),
    *(Stream(sequences, 60, 10) for sequences in (1, 8, 64, 256)),
    *(Stream(sequences, 60, 20) for sequences in (8, 64)),
)


TOGETHER = Stream(64, 60, 10)
TOGETHER_SECONDS = 4.0
MAX_CHAIN_TOKENS = 300
STREAM_WEIGHT = 3.0  # of a stream's error: runs are streams


def measure_cores(engines: Mapping[Role, Engine]) -> float:
    """How many cores two engines have that work at once: the sum of what each keeps of its speed alone.

    Cores share caches, memory and often a physical core, so two of them are seldom two.
    """
    alone = {role: _requests_per_second({role: engine})[role] for role, engine in engines.items()}
    beside = _requests_per_second(engines)
    return sum(beside[role] / alone[role] for role in engines)


def _requests_per_second(engines: Mapping[Role, Engine]) -> dict[Role, float]:
    """Of endless streams at these engines at once, after a second to warm up."""
    chosen = random.Random(0)
    count = dict.fromkeys(engines, 0)
    chains: dict[str, list[int]] = {}

    def step(role: Role, chain: list[int]) -> None:
        if len(chain) > MAX_CHAIN_TOKENS:
            chain = [chosen.randrange(100, 200) for _ in range(TOGETHER.num_prompt_tokens)]
        request_id = f"{role}-{count[role]}-{len(chains)}"
        chains[request_id] = chain
        engines[role].submit([TOGETHER.step(chain, request_id, chosen)])

    clock = next(iter(engines.values())).clock
    for role in engines:
        for _ in range(TOGETHER.num_sequences):
            step(role, [0] * (MAX_CHAIN_TOKENS + 1))
    warm, end = clock.now() + 1.0, clock.now() + 1.0 + TOGETHER_SECONDS
    while clock.now() < end:
        clock.wait(1.0)
        for role, engine in engines.items():
            for completion in engine.poll(0.0):
                count[role] += clock.now() >= warm
                step(role, chains[completion.request_id] + list(completion.token_ids))
    for engine in engines.values():
        engine.abort(list(chains))
    return {role: number / TOGETHER_SECONDS for role, number in count.items()}


def _opening(request: Request) -> Request:
    """A request that leaves this one's lent list in the cache."""
    return replace(request, request_id=f"{request.request_id}-opening", suffix_token_ids=(), max_tokens=1)


def _drain(engine: Engine, requests: Sequence[Request]) -> None:
    engine.submit(requests)
    while engine.num_outstanding:
        engine.clock.wait(1.0)
        engine.poll(0.0)


def measure(engine: Engine) -> list[float]:
    """Median seconds of each experiment, after one that does not count."""
    seeds = iter(range(1, 1_000_000))
    runs = [[experiment.seconds(engine, next(seeds)) for experiment in EXPERIMENTS] for _ in range(REPEATS + 1)]
    return [statistics.median(values) for values in zip(*runs[1:], strict=True)]


def fit(measured: Sequence[float], start: CostProfile) -> CostProfile:
    """The profile whose simulated experiments take what was measured: least squares of the log-ratios, damped
    Gauss-Newton over the logarithms of GUESS's figures.
    """
    values = np.log(np.array(list(GUESS.values())))
    residuals = _residuals(values, measured, start)
    damping = 1.0
    for _ in range(40):
        jacobian = np.stack(
            [(_residuals(values + 0.05 * unit, measured, start) - residuals) / 0.05 for unit in np.eye(len(values))], 1
        )
        step = np.linalg.solve(jacobian.T @ jacobian + damping * np.eye(len(values)), -jacobian.T @ residuals)
        trial = _residuals(values + step, measured, start)
        if trial @ trial < residuals @ residuals:
            values, residuals, damping = values + step, trial, damping / 3
        else:
            damping *= 4
    return _profile(values, start)


def _residuals(values: np.ndarray, measured: Sequence[float], start: CostProfile) -> np.ndarray:
    profile = _profile(values, start)
    weights = np.array([STREAM_WEIGHT if isinstance(experiment, Stream) else 1.0 for experiment in EXPERIMENTS])
    simulated = [experiment.simulated_seconds(profile) for experiment in EXPERIMENTS]
    return weights * (np.log(simulated) - np.log(measured))


def _profile(values: np.ndarray, start: CostProfile) -> CostProfile:
    return replace(start, **dict(zip(GUESS, (float(value) for value in np.exp(values)), strict=True)))


def start_profile(engine: Engine) -> CostProfile:
    """What is known without measuring. The engine's process has a core of its own: nothing overlaps inside it."""
    info = engine.info
    return CostProfile(
        host_seconds=0.0,
        pass_seconds=0.0,
        kv_capacity_tokens=info.kv_capacity_tokens,
        block_size=info.block_size,
        max_sequences=256,
        chunked_prefill=False,
    )


def show(console: Console, role: Role, measured: Sequence[float], profile: CostProfile) -> None:
    table = Table(
        "experiment", "sequences", "cached", "prompt", "generated", "measured ms", "simulated ms", "ratio", title=role
    )
    for experiment, seconds in zip(EXPERIMENTS, measured, strict=True):
        simulated = experiment.simulated_seconds(profile)
        table.add_row(
            type(experiment).__name__.lower(),
            *map(
                str,
                (
                    experiment.num_sequences,
                    experiment.num_cached_tokens,
                    experiment.num_prompt_tokens,
                    experiment.num_generated_tokens,
                ),
            ),
            f"{seconds * 1e3:.1f}",
            f"{simulated * 1e3:.1f}",
            f"{simulated / seconds:.2f}",
        )
    console.print(table)
    console.print({name: float(f"{getattr(profile, name):.3g}") for name in GUESS})


def toy_config(*overrides: str) -> GenerateConfig:
    """The toy pair, each engine in a process of its own."""
    register_schema()
    apart = ["draft.in_process=false", "base.in_process=false", "output_dir=unused"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose("generate", [*apart, *overrides]))


def main() -> None:
    console = Console(width=120)
    with started_engines(toy_config(), frozenset(Role), Progress(console, 1e9)) as engines:
        for role, engine in engines.items():
            began = time.monotonic()
            measured = measure(engine)
            console.print(f"{role}: measured in {time.monotonic() - began:.0f} s")
            show(console, role, measured, fit(measured, start_profile(engine)))
        console.print(f"cores of the two at once: {measure_cores(engines):.2f}")


if __name__ == "__main__":
    main()
