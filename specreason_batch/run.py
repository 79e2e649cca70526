"""The composition root: a plan, two engines, shards from open to commit, and the stop signal."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType

from specreason_batch.chain import Chain
from specreason_batch.clock import Clock, WallClock
from specreason_batch.config import EngineConfig, GenerateConfig, ScheduleConfig
from specreason_batch.engine import Engine
from specreason_batch.plan import Plan, ShardPlan, open_chains
from specreason_batch.probe import probe_cache, probe_grade
from specreason_batch.progress import Progress
from specreason_batch.rounds import RoundReport
from specreason_batch.schedules import (
    SCHEDULES,
    Admission,
    Capacity,
    Driver,
    Schedule,
    Stopped,
    continuous,
    overlapped,
    waves,
)
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
def started_engines(
    config: GenerateConfig, roles: frozenset[Role], progress: Progress, clock: Clock | None = None
) -> Iterator[dict[Role, Engine]]:
    """The engines of these roles, one started after the other (together they mis-measure each other's memory).

    Both ring this clock (by default one of their own). Where two CPU engines have processes of their own, those
    whose `cpu_cores` is null share out the cores that this process may use and the other does not, the base getting the
    bigger half. Elsewhere null leaves it to vLLM.
    """
    from specreason_batch.vllm_engine import VllmEngine, check_platform

    clock = clock or WallClock()
    settings = {role: config.engine(role) for role in (Role.base, Role.draft) if role in roles}
    for engine_config in settings.values():
        check_platform(engine_config, config.log.vllm_level)
    engines: dict[Role, Engine] = {}
    try:
        for role, engine_config in _with_cores(settings).items():
            with progress.stage(f"loading {role}: {engine_config.model}"):
                engines[role] = VllmEngine(engine_config, log_level=config.log.vllm_level, clock=clock)
        yield engines
    finally:
        for engine in engines.values():
            engine.close()


def _with_cores(settings: dict[Role, EngineConfig]) -> dict[Role, EngineConfig]:
    """The same, with cores for engines that leave them open while another engine works beside them."""
    from specreason_batch.vllm_engine import shared_out_cores

    open_roles = [role for role, engine in settings.items() if engine.cpu_cores is None]
    if len(settings) < 2 or not open_roles or any(engine.in_process for engine in settings.values()):
        return settings
    taken = {core for engine in settings.values() for core in engine.cpu_cores or ()}
    shares = shared_out_cores(len(open_roles), taken)
    if shares is None:
        return settings
    given = {role: replace(settings[role], cpu_cores=cores) for role, cores in zip(open_roles, shares, strict=True)}
    too_few = any(len(engine.cpu_cores or ()) < engine.tensor_parallel_size for engine in given.values())
    return settings if too_few else settings | given


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
    used = {role: engines[role] for role in plan.formats}
    capacities = {role: Capacity.of(engine.info) for role, engine in used.items()}
    config = plan.config.schedule
    admission = Admission(open_chains(plan, shard, rejects), config.active_size, capacities, config.fit_memory)
    driver = Driver(used, plan.translator, plan.policy, admission, stop.check)
    progress.shard(shard)
    try:
        for report in choose_schedule(config, plan.policy_spec.free_running)(driver):
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


def choose_schedule(config: ScheduleConfig, free_running: bool) -> Schedule:
    """The configured one with its options; `free_running` policies never wait for anything."""
    if free_running:
        return continuous
    match config.name:
        case "overlapped":
            return partial(overlapped, cohorts=config.cohorts or 1)
        case "waves":
            return waves if config.wave is None else partial(waves, wave=config.wave)
        case name:
            return SCHEDULES[name]


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
