"""The composition root: a plan, two engines, shards from open to commit, and the stop signal."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from specreason_batch.chain import Chain
from specreason_batch.config import GenerateConfig
from specreason_batch.engine import Engine
from specreason_batch.plan import Plan, ShardPlan, open_chains
from specreason_batch.probe import probe_cache, probe_grade
from specreason_batch.progress import Progress
from specreason_batch.rounds import RoundReport
from specreason_batch.schedules import SCHEDULES, Driver, Stopped, continuous
from specreason_batch.store.parts import ShardWriter
from specreason_batch.store.prompts import Reject
from specreason_batch.store.schemas import chain_rows, chains_schema, round_row
from specreason_batch.types import Role

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@dataclass(slots=True)
class StopSignal:
    """Set by a signal, looked at between polls."""

    number: int | None = None
    _handlers: dict[int, object] = field(default_factory=dict)

    def check(self) -> None:
        """Raises Stopped once a signal has come."""
        if self.number is not None:
            raise Stopped(f"signal {signal.Signals(self.number).name}")

    @contextmanager
    def installed(self) -> Iterator["StopSignal"]:
        """Catch the stop signals meanwhile (main thread only). A second SIGINT interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number is not None:
            raise KeyboardInterrupt
        self.number = number


@contextmanager
def started_engines(config: GenerateConfig, roles: frozenset[Role], progress: Progress) -> Iterator[dict[Role, Engine]]:
    """The engines of these roles, one started after the other (together they mis-measure each other's memory)."""
    from specreason_batch.vllm_engine import VllmEngine

    engines: dict[Role, Engine] = {}
    try:
        for role in (Role.base, Role.draft):
            if role in roles:
                with progress.stage(f"loading {role}: {config.engine(role).model}"):
                    engines[role] = VllmEngine(config.engine(role), log_level=config.log.vllm_level)
        yield engines
    finally:
        for engine in engines.values():
            engine.close()


def probe_engines(plan: Plan, engines: Mapping[Role, Engine], progress: Progress) -> None:
    """Refuse engines whose grades are wrong; say loudly where the prefix cache never hits."""
    prompt = plan.first_prompt()
    for role, chat in plan.formats.items():
        ids = chat.opening(prompt.prompt if prompt else "")
        cache = probe_cache(engines[role], ids)
        progress.engine_ready(role, engines[role].info, cache)
        if role is Role.base and plan.judge is not None:
            probe_grade(engines[role], plan.judge, ids[: engines[role].info.max_model_len // 2])


def run_plan(plan: Plan, engines: Mapping[Role, Engine], progress: Progress, stop: StopSignal) -> None:
    """Make every chain that is still to be made. Raises Stopped (finished chains committed), EngineDead, OSError."""
    for shard in plan.pending:
        run_shard(plan, shard, engines, progress, stop)


def run_shard(
    plan: Plan, shard: ShardPlan, engines: Mapping[Role, Engine], progress: Progress, stop: StopSignal
) -> None:
    """One shard from open to commit. Whatever ends it early, the chains that finished are committed first."""
    shard.paths.remove_uncommitted()
    writer = _writer(plan, shard)
    rejects: list[Reject] = []
    driver = Driver({role: engines[role] for role in plan.formats}, plan.translator, plan.policy, stop.check)
    schedule = continuous if plan.policy_spec.free_running else SCHEDULES[plan.config.schedule.name]
    chains = open_chains(plan, shard, rejects)
    progress.shard(shard)
    try:
        for report in schedule(driver, chains, plan.config.schedule.active_size):
            _add_report(plan, shard, writer, report)
            writer.commit_if_due()
            progress.round(report)
        writer.write_input_rejects(rejects)
    except BaseException:
        if driver.is_mid_round:  # what had finished in the round that was cut short
            _add_report(plan, shard, writer, driver.end_round())
        raise
    finally:
        writer.commit()
        driver.abandon()


def _writer(plan: Plan, shard: ShardPlan) -> ShardWriter:
    return ShardWriter(
        paths=shard.paths,
        chains_schema=chains_schema(shard.shard.extra_schema, shard.shard.has_gold_answer),
        metadata={"fingerprint": plan.fingerprint, "source": shard.source},
        chains_per_part=plan.config.parts.chains,
        seconds_per_part=plan.config.parts.seconds,
    )


def _add_report(plan: Plan, shard: ShardPlan, writer: ShardWriter, report: RoundReport) -> None:
    for chain in report.finished:
        row, steps = chain_rows(chain, plan.translator, shard.shard.has_gold_answer)
        writer.add_chain(row, steps, _chain_reject(shard, chain) if chain.error else None)
    writer.add_round(round_row(report.stats))


def _chain_reject(shard: ShardPlan, chain: Chain) -> Reject:
    return Reject(
        prompt_id=chain.prompt.prompt_id,
        sample_index=chain.sample_index,
        file=shard.shard.path.name,
        row=chain.prompt.row,
        reason=f"given up at step {len(chain.steps)}: {chain.error}",
    )
