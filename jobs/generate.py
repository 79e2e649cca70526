"""`python -m jobs.generate`: prompt shards in, chains and steps out. Every choice is in conf/ (docs/design.md, 8)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from jobs.launch import register_schema, run_job, to_config
from specreason_batch.config import GenerateConfig
from specreason_batch.engines import Engines, started_engines
from specreason_batch.meter import process_start
from specreason_batch.plan import make_plan
from specreason_batch.progress import Progress
from specreason_batch.run import run_shards
from specreason_batch.signals import StopSignal
from specreason_batch.summary import summarise, summary_table
from specreason_batch.types import Role

register_schema()

StartEngines = Callable[[GenerateConfig, frozenset[Role], Progress], AbstractContextManager[Engines]]


def generate(config: GenerateConfig, console: Console, start_engines: StartEngines = started_engines) -> None:
    """The whole job. Raises what `run_shards` does."""
    progress = Progress(console, config.log.seconds)
    stop = StopSignal(config.recovery.stop_seconds)
    with stop.installed():
        with stop.at_once():
            plan = make_plan(config)
            progress.introduce(plan)
        if not plan.pending:
            progress.say("nothing to do: every chain is committed")
        with progress.running():
            run_shards(
                plan,
                lambda: start_engines(config, plan.policy_spec.roles, progress),
                progress,
                stop,
                began=process_start(),
            )
    summary = summarise(Path(config.output_dir))
    if summary is not None:
        console.print(summary_table(summary, f"{config.output_dir} ({config.policy.name})"))


@hydra.main(version_base="1.3", config_path="../conf", config_name="generate")
def main(composed: DictConfig) -> None:
    run_job(lambda console: generate(to_config(composed), console))


if __name__ == "__main__":
    main()
