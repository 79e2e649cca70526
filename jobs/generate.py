"""`python -m jobs.generate`: prompt shards in, chains and steps out. Every choice is in conf/ (docs/design.md, 8)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from jobs.launch import register_schema, run_job, to_config
from specreason_batch.config import GenerateConfig
from specreason_batch.engine import Engine
from specreason_batch.plan import make_plan
from specreason_batch.progress import Progress
from specreason_batch.run import StopSignal, probe_engines, run_plan, started_engines
from specreason_batch.summary import summarise, summary_table
from specreason_batch.types import Role

register_schema()

StartEngines = Callable[[GenerateConfig, frozenset[Role], Progress], AbstractContextManager[dict[Role, Engine]]]


def generate(config: GenerateConfig, console: Console, start_engines: StartEngines = started_engines) -> None:
    """The whole job. Raises InvalidInput, Stopped, EngineDead, OSError."""
    progress = Progress(console, config.log.seconds)
    plan = make_plan(config)
    progress.introduce(plan)
    stop = StopSignal()
    if not plan.pending:
        progress.say("nothing to do: every chain is committed")
    else:
        with stop.installed(), start_engines(config, plan.policy_spec.roles, progress) as engines:
            probe_engines(plan, engines, progress)
            with progress.running():
                run_plan(plan, engines, progress, stop)
    summary = summarise(Path(config.output_dir))
    if summary is not None:
        console.print(summary_table(summary, f"{config.output_dir} ({config.policy.name})"))


@hydra.main(version_base="1.3", config_path="../conf", config_name="generate")
def main(composed: DictConfig) -> None:
    run_job(lambda console: generate(to_config(composed), console))


if __name__ == "__main__":
    main()
