"""The composition root: a plan, its shards one after the other under a lease each, engines for them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType

from specreason_batch.devices import run_node_check
from specreason_batch.engine import BadNode, Engine, EngineDead
from specreason_batch.engines import Engines
from specreason_batch.ledger import Ledger
from specreason_batch.meter import Meter
from specreason_batch.plan import Plan, ShardPlan, has_work
from specreason_batch.probe import probe_cache, probe_grade
from specreason_batch.progress import Progress
from specreason_batch.schedules import Stopped
from specreason_batch.shard import ShardRun
from specreason_batch.signals import StopSignal
from specreason_batch.store.attempts import AttemptState, Lease, LeaseHeld, LeaseLost, ShardProgress
from specreason_batch.types import Role

StartEngines = Callable[[], AbstractContextManager[Engines]]


class Claim:
    """A shard under this process's lease. Leaving it says how the attempt ended."""

    def __init__(self, shard: ShardPlan, lease: Lease, meter: Meter):
        self.shard = shard
        self.lease = lease
        self.meter = meter
        self.is_opened = False  # until then, all that happens is start-up

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, _type: type | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        if not self.is_opened:
            self.lease.report(ShardProgress(startup_seconds=self.meter.seconds, energy_joules=self.meter.joules))
        self.meter.restart()
        self.lease.end(_state(error), None if error is None else f"{type(error).__name__}: {error}")


def _state(error: BaseException | None) -> AttemptState:
    match error:
        case None:
            return AttemptState.finished
        case Stopped():
            return AttemptState.stopped
        case LeaseLost():
            return AttemptState.lost
        case BadNode():
            return AttemptState.bad_node
        case _:
            return AttemptState.failed


def run_plan(plan: Plan, engines: Mapping[Role, Engine], progress: Progress, stop: StopSignal) -> None:
    """Make every chain that is still to be made, on somebody else's engines. Raises what `run_shards` does."""
    run_shards(plan, lambda: nullcontext(Engines.given(engines)), progress, stop, probed=True)


def run_shards(
    plan: Plan,
    start_engines: StartEngines,
    progress: Progress,
    stop: StopSignal,
    *,
    probed: bool = False,
    began: float | None = None,
) -> None:
    """Make every chain that is still to be made. Engines start when the first shard is ours: loading takes minutes.

    `probed`: the engines are known to be good. `began`: when the work that is accounted for began, on the monotonic
    clock; None: now. Raises Stopped (everything is saved: run me again), LeaseHeld (others work on what is left),
    LeaseLost, EngineDead, BadNode, InvalidInput, OSError.
    """
    held: list[str] = []
    meter = Meter(began)
    with ExitStack() as stack:
        engines: Engines | None = None
        for shard in plan.pending:
            stop.check()
            try:
                claim = _claim(plan, shard, meter, progress, stop)
            except LeaseHeld as error:
                held.append(f"shard {shard.shard.name}: {error}")
                progress.say(held[-1])
                continue
            with claim:
                shard.done = shard.paths.done_keys()
                if not has_work(shard, plan.config):  # its last owner has just finished it
                    continue
                if engines is None:
                    with stop.at_once():
                        run_node_check(plan.config.recovery.node_check)
                        engines = stack.enter_context(start_engines())
                        if not probed:
                            probe_engines(plan, engines, progress)
                    meter.count_joules(engines.read_joules)
                _run_shard(plan, claim, engines, progress, stop)
    if held:
        raise LeaseHeld("\n".join(held))


def _claim(plan: Plan, shard: ShardPlan, meter: Meter, progress: Progress, stop: StopSignal) -> Claim:
    lease = Lease.acquire(
        shard.paths.root,
        plan.config.lease,
        wait=stop.sleep,
        say=lambda text: progress.say(f"shard {shard.shard.name}: {text}"),
    )
    return Claim(shard, lease, meter)


def _run_shard(plan: Plan, claim: Claim, engines: Engines, progress: Progress, stop: StopSignal) -> None:
    claim.lease.describe(engines.hardware)
    ledger = Ledger.open(plan, claim.shard, claim.lease, claim.meter, progress.warn)
    claim.is_opened = True
    progress.shard(claim.shard, ledger.waiting, len(ledger.finished), ledger.progress.num_redone_tokens)
    ShardRun(plan, ledger, engines, progress, stop, lambda: probe_engines(plan, engines, progress)).to_end()


def probe_engines(plan: Plan, engines: Mapping[Role, Engine], progress: Progress) -> None:
    """Refuse engines whose grades are wrong; say loudly where the prefix cache never hits.

    Raises InvalidInput, EngineDead.
    """
    prompt = plan.first_prompt()
    for role, chat in plan.formats.items():
        ids = chat.opening(prompt.prompt if prompt else "")
        try:
            cache = probe_cache(engines[role], ids)
            progress.engine_ready(role, engines[role].info, cache)
            if role is Role.base and plan.judge is not None:
                probe_grade(engines[role], plan.judge, ids[: engines[role].info.max_model_len // 2])
        except EngineDead as death:
            death.role = role
            raise
