"""Chains/s of policies and schedules on the toy pair, side by side in one process.

    python -m benchmarks.policies [--prompts 200] [--repeats 3] [--active 64]

Engines start once, every run is done once before it counts, and repeats go round robin, so that drift of the machine
hits all alike. The last row is the base writing each chain in one generation, with no step boundaries and no loop of
ours: what going step by step costs the baseline. Prints medians, ratios to base_only, and one JSON line.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from jobs.launch import register_schema, to_config
from specreason_batch.config import GenerateConfig
from specreason_batch.engine import Engine
from specreason_batch.engines import started_engines
from specreason_batch.plan import make_plan
from specreason_batch.progress import Progress
from specreason_batch.run import run_plan
from specreason_batch.signals import StopSignal
from specreason_batch.store.prompts import PromptShard
from specreason_batch.types import Prompt, Request, Role, Sampling

CONF = Path(__file__).parent.parent / "conf"
RUNS = {
    "base_only": ["policy=base_only"],
    "draft_only": ["policy=draft_only"],
    "specreason, lockstep": ["policy=specreason", "schedule=lockstep"],
    "specreason, overlapped": ["policy=specreason", "schedule=overlapped"],
    "specreason, continuous": ["policy=specreason", "schedule=continuous"],
    "specreason, waves": ["policy=specreason", "schedule=waves"],
    "random 0.8, lockstep": ["policy=random", "policy.accept_rate=0.8", "schedule=lockstep"],
    "random 0.8, waves": ["policy=random", "policy.accept_rate=0.8", "schedule=waves"],
}
ONE_GENERATION = "base in one generation"


def measure_run(engines: Mapping[Role, Engine], overrides: list[str]) -> float:
    """Seconds of one run, from its first request to its last committed part."""
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(_config([*overrides, f"output_dir={folder}"]))
        began = time.monotonic()
        run_plan(plan, engines, Progress(Console(quiet=True), 1e9), StopSignal())
        return time.monotonic() - began


def measure_one_generation(base: Engine, overrides: list[str]) -> float:
    """Seconds for the base to write all chains and answers, each in one request, at most `active_size` at a time."""
    config = _config([*overrides, "policy=base_only", f"output_dir={tempfile.mkdtemp()}"])
    plan = make_plan(config)
    chat = plan.formats[Role.base]
    sampling = Sampling(temperature=0.6, top_p=0.95, stop_token_ids=tuple(chat.end_ids))
    items = PromptShard.open(Path(config.input.path)).prompts(config.limit)
    prompts = [item.prompt for item in items if isinstance(item, Prompt)]
    waiting = [
        Request(
            request_id=f"whole-{number}",
            prompt_token_ids=chat.opening(prompt),
            max_tokens=config.budgets.thinking_tokens,
            sampling=sampling,
            seed=number,
        )
        for number, prompt in enumerate(prompts)
    ]
    began = time.monotonic()
    while waiting or base.num_outstanding:
        room = config.schedule.active_size - base.num_outstanding
        base.submit(waiting[:room])
        del waiting[:room]
        base.poll(0.5)
    return time.monotonic() - began


def _config(overrides: list[str]) -> GenerateConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose("generate", overrides))


def _table(medians: dict[str, float], num_prompts: int) -> Table:
    table = Table("run", "median s", "chains/s", "over base_only", title=f"{num_prompts} prompts")
    for name, seconds in medians.items():
        ratio = medians["base_only"] / seconds
        table.add_row(name, f"{seconds:.2f}", f"{num_prompts / seconds:.1f}", f"{ratio:.2f}x")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--active", type=int, default=64)
    arguments = parser.parse_args()
    register_schema()
    common = [f"limit={arguments.prompts}", f"schedule.active_size={arguments.active}"]
    console = Console()
    config = _config([*common, "output_dir=unused"])
    with started_engines(config, frozenset(Role), Progress(console, 1e9)) as engines:
        runs: dict[str, Callable[[], float]] = {
            name: lambda given=given: measure_run(engines, [*given, *common])  # type: ignore[misc]
            for name, given in RUNS.items()
        }
        runs[ONE_GENERATION] = lambda: measure_one_generation(engines[Role.base], common)
        for run in runs.values():
            run()
        seconds = {name: [] for name in runs}  # type: dict[str, list[float]]
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                seconds[name].append(run())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    console.print(_table(medians, arguments.prompts))
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    print(json.dumps({"seconds": seconds, "prompts": arguments.prompts, "active": arguments.active, **versions}))


if __name__ == "__main__":
    main()
