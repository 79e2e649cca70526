"""`jobs.generate` as a process of its own, but for its engines: `python -m tests.support.scripted_job OVERRIDE...`.

Everything from the composed configuration to the exit status is the real job's. The engines answer from a scripted
world; SCRIPTED_PACE is the seconds that a poll of theirs takes, SCRIPTED_LOG a file that gets a byte a written step,
SCRIPTED_SLICE the seconds between the reports of schedules without rounds; SCRIPTED_CLOCK=jumping says what it does.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from hydra import compose, initialize_config_dir

from jobs.generate import StartEngines, generate
from jobs.launch import register_schema, run_job, to_config
from specreason_batch.clock import Clock, WallClock
from specreason_batch.config import GenerateConfig
from specreason_batch.engine import Engine
from specreason_batch.engines import Engines
from specreason_batch.progress import Progress
from specreason_batch.schedules import gates
from specreason_batch.scripted_engine import ScriptedEngine
from specreason_batch.types import Completion, Role
from tests.support.worlds import World

CONF = Path(__file__).parent.parent.parent / "conf"
WORLD = World(seed=21, close_rate=0.03)


def overrides(folder: Path) -> list[str]:
    """What makes the toy experiment a scripted run over `folder`'s models/ (support.configs.write_models)."""
    return [
        *(f"{role}.model={folder}/models/{role}" for role in Role),
        *(f"{role}.max_model_len=400" for role in Role),
        "judge.question='so 0-9?'",
        "judge.reply_opening='so: '",
        "policy.threshold=4.0",
        "budgets.max_step_tokens=12",
        "budgets.thinking_tokens=60",
        "budgets.max_answer_tokens=6",
    ]


class PacedEngine(ScriptedEngine):
    """A scripted engine whose polls take time, and that counts what it wrote."""

    def poll(self, timeout: float) -> list[Completion]:
        time.sleep(float(os.environ.get("SCRIPTED_PACE", "0")))
        return log_written(super().poll(timeout))


def log_written(completions: list[Completion]) -> list[Completion]:
    """The same; a byte for each step and answer among them goes into SCRIPTED_LOG."""
    if log := os.environ.get("SCRIPTED_LOG"):
        with Path(log).open("a") as file:
            file.write("w" * sum(1 for completion in completions if not completion.logprobs))
    return completions


@contextmanager
def scripted_engines(
    config: GenerateConfig, roles: frozenset[Role], progress: Progress, clock: Clock | None = None
) -> Iterator[Engines]:
    """In place of `started_engines`."""
    clock = clock or WallClock()

    def build(role: Role) -> Engine:
        seed = sorted(Role).index(role)
        return PacedEngine(WORLD.model(role), config.engine(role).max_model_len, order_seed=seed, clock=clock)

    engines = Engines(sorted(roles), build)
    engines.start()
    yield engines


def _jump() -> None:
    """Have the wall clock jump an hour back and forth at every look."""
    steady, looks = time.time, count()
    time.time = lambda: steady() + 3600 * (-1) ** next(looks)


def main() -> None:
    if os.environ.get("SCRIPTED_CLOCK") == "jumping":
        _jump()
    gates.SLICE_SECONDS = float(os.environ.get("SCRIPTED_SLICE", gates.SLICE_SECONDS))
    run_composed(scripted_engines)


def run_composed(start_engines: StartEngines) -> None:
    """The real job on these engines; its overrides are the command line's."""
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("generate", sys.argv[1:])
    run_job(lambda console: generate(to_config(composed), console, start_engines))


if __name__ == "__main__":
    main()
