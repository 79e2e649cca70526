"""`make demo`: the main job on the embedded toy pair's held-out prompts, then the baselines on the same engines.

A first-time user's look at the tool, in about a minute; everything it runs is the real job with `experiment=toy`.
"""

import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from jobs.launch import register_schema, run_job, to_config
from specreason_batch.config import GenerateConfig
from specreason_batch.engine import Engine
from specreason_batch.engines import started_engines
from specreason_batch.plan import Plan, make_plan
from specreason_batch.progress import Progress
from specreason_batch.run import probe_engines, run_plan
from specreason_batch.show import show_chain
from specreason_batch.signals import StopSignal
from specreason_batch.summary import Summary, summarise, summary_table
from specreason_batch.types import Completion, Request, Role

NUM_PROMPTS = 200
OUTPUT = Path("outputs") / "demo"
CONF = Path(__file__).parent.parent / "conf"
# random keeps drafts at the rate that specreason's grades kept them
BASELINES = {"base_only": [], "draft_only": [], "random": [f"policy.match_run={OUTPUT}/specreason"]}


class TimedEngine:
    """An engine, and the seconds spent inside it: what is left of a run's wall-clock is our own code."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.info = engine.info
        self.clock = engine.clock
        self.seconds = 0.0
        self.num_requests = 0

    @property
    def num_outstanding(self) -> int:
        return self._engine.num_outstanding

    def submit(self, requests: Sequence[Request]) -> None:
        self.num_requests += len(requests)
        began = time.perf_counter()
        self._engine.submit(requests)
        self.seconds += time.perf_counter() - began

    def poll(self, timeout: float) -> list[Completion]:
        began = time.perf_counter()
        done = self._engine.poll(timeout)
        self.seconds += time.perf_counter() - began
        return done

    def abort(self, request_ids: Collection[str]) -> None:
        self._engine.abort(request_ids)

    def close(self) -> None:
        self._engine.close()


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    summary: Summary
    own_seconds: float  # outside the engines, rows and files included
    num_requests: int

    @property
    def own_microseconds_per_request(self) -> float:
        return self.own_seconds / self.num_requests * 1e6


def demo(console: Console) -> None:
    """Raises what `jobs.generate` raises."""
    began = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    config = _config("specreason", [])
    progress = Progress(console, config.log.seconds)
    plan = make_plan(config)
    progress.introduce(plan)
    stop = StopSignal()
    with stop.installed(), started_engines(config, frozenset(Role), progress) as engines:
        probe_engines(plan, engines, progress)
        runs = {"specreason": _run(plan, engines, progress, stop)}
        seconds = time.monotonic() - began
        console.print(summary_table(runs["specreason"].summary, f"{config.output_dir} (specreason)"))
        console.rule("one of its chains")
        console.print(show_chain(Path(config.output_dir)))
        console.rule("the same prompts under the other policies")
        for name, overrides in [*BASELINES.items(), ("specreason", [f"output_dir={OUTPUT}/specreason-again"])]:
            progress.say(f"policy {name}")
            again = make_plan(_config(name, overrides))
            progress.follow(again)
            runs[f"{name}, again" if name in runs else name] = _run(again, engines, progress, stop)
    console.print(comparison_table({name: run.summary for name, run in runs.items()}))
    warm = runs["specreason, again"]
    progress.say(f"{NUM_PROMPTS} prompts under specreason in {seconds:.1f} s, engine start included")
    progress.say(
        f"our own code, rows and files included: {warm.own_microseconds_per_request:.0f} us a request "
        f"({warm.num_requests:,} requests, {warm.own_seconds:.2f} s outside the engines)"
    )


def comparison_table(summaries: Mapping[str, Summary]) -> Table:
    """Policies side by side."""
    table = Table("policy", "accuracy", "steps by draft", "drafts accepted", "cached", "seconds", "chains/s")
    for name, summary in summaries.items():
        table.add_row(
            name,
            "-" if summary.accuracy is None else f"{summary.accuracy:.1%}",
            f"{summary.draft_step_share:.1%}",
            "-" if summary.acceptance is None else f"{summary.acceptance:.1%}",
            f"{summary.cached_share:.1%}",
            f"{summary.seconds:.1f}",
            f"{summary.chains_per_second:.1f}",
        )
    return table


def _run(plan: Plan, engines: Mapping[Role, Engine], progress: Progress, stop: StopSignal) -> Run:
    timed = {role: TimedEngine(engine) for role, engine in engines.items()}
    began = time.perf_counter()
    with progress.running():
        run_plan(plan, timed, progress, stop)
    seconds = time.perf_counter() - began - sum(engine.seconds for engine in timed.values())
    summary = summarise(Path(plan.config.output_dir))
    assert summary is not None
    return Run(summary, seconds, sum(engine.num_requests for engine in timed.values()))


def _config(policy: str, overrides: list[str]) -> GenerateConfig:
    given = [f"limit={NUM_PROMPTS}", f"policy={policy}", f"output_dir={OUTPUT}/{policy}", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose("generate", given))


def main() -> None:
    register_schema()
    run_job(demo)


if __name__ == "__main__":
    main()
