"""What is known and kept of one shard: chains that wait, that finished and that are saved; its parts and checkpoints.

Owns: when something is written, and what a restart finds. Does not know: engines, schedules, why a run ends.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from specreason_batch.chain import Chain
from specreason_batch.meter import Meter
from specreason_batch.plan import Plan, ShardPlan, open_chains, prompts_of
from specreason_batch.rounds import RoundReport
from specreason_batch.store.attempts import AttemptState, Lease, ShardProgress, read_attempts
from specreason_batch.store.checkpoints import (
    About,
    Checkpoint,
    Saved,
    read_checkpoint,
    remove_checkpoints,
    write_checkpoint,
)
from specreason_batch.store.parts import ShardWriter, check_source
from specreason_batch.store.prompts import Reject
from specreason_batch.store.schemas import chain_rows, chains_schema, round_row
from specreason_batch.types import Phase

InFlight = Iterable[tuple[Chain, int]]  # begun chains, and tokens generated for each since its last step


@dataclass(slots=True)
class Ledger:
    """One shard's state, from its owner's point of view. Made by `open`."""

    plan: Plan
    shard: ShardPlan
    lease: Lease
    writer: ShardWriter
    meter: Meter
    waiting: deque[Chain] = field(default_factory=deque)  # begun, and with no driver at present
    condemned: list[Chain] = field(default_factory=list)  # killed an engine alone; given up once others finish
    finished: list[Chain] = field(default_factory=list)  # and not committed yet
    rejects: list[Reject] = field(default_factory=list)
    round: int = 0  # the last one's number; counted on over attempts
    progress: ShardProgress = field(default_factory=ShardProgress)
    _fresh: Iterator[Chain] = field(default_factory=lambda: iter(()))
    _began: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, plan: Plan, shard: ShardPlan, lease: Lease, meter: Meter, warn: Callable[[str], None]) -> "Ledger":
        """Committed parts first, then the newest good checkpoint, then the rest. `warn`: is told of torn ones.

        Raises InvalidInput if the output was made from another content of the input, OSError.
        """
        check_source(shard.paths, shard.source)
        shard.paths.remove_uncommitted(lease)
        shard.done = shard.paths.done_keys()
        startup_seconds = meter.seconds
        ledger = cls(plan, shard, lease, _writer(plan, shard, lease), meter, round=shard.paths.last_round())
        found = read_checkpoint(lease.root, plan.fingerprint, shard.source, warn)
        ledger._restore(found)
        ledger.progress = replace(
            ledger.progress, startup_seconds=startup_seconds, num_redone_tokens=_lost_tokens(lease, found)
        )
        begun = {chain.key for chain in [*ledger.waiting, *ledger.finished]}
        ledger._fresh = open_chains(plan, shard, ledger.rejects, begun)
        return ledger

    # --- what is to be done ---

    def chains(self) -> Iterator[Chain]:
        """Chains to work on: begun ones, oldest first, then new ones. Those not taken stay."""
        while self.waiting:
            yield self.waiting.popleft()
        while (chain := next(self._fresh, None)) is not None:  # `yield from` would end it with its first user
            yield chain

    def take(self, chains: Iterable[Chain]) -> list[Chain]:
        """Take these out of those that wait."""
        keys = {chain.key for chain in chains}
        taken = [chain for chain in self.waiting if chain.key in keys]
        self.waiting = deque(chain for chain in self.waiting if chain.key not in keys)
        return taken

    def put_back(self, chains: list[Chain]) -> None:
        """They go on first."""
        self.waiting.extendleft(reversed(chains))

    # --- what was done ---

    def add(self, report: RoundReport) -> None:
        """A round's figures, and the chains that ended in it."""
        for chain in report.finished:
            self.finish(chain)
        stats = report.stats
        self.writer.add_round(round_row(stats))
        self.round = stats.round
        written = (item.num_generated_tokens for phase, item in stats.phases.items() if phase is not Phase.grade)
        self.progress = replace(
            self.progress,
            num_generated_tokens=self.progress.num_generated_tokens + sum(written),
            num_accepted=self.progress.num_accepted + stats.num_accepted,
            num_decided=self.progress.num_decided + stats.num_accepted + stats.num_rejected,
        )

    def count_rebuild(self) -> None:
        """An engine is built again."""
        self.progress = replace(self.progress, num_rebuilds=self.progress.num_rebuilds + 1)

    def finish(self, chain: Chain) -> None:
        """The chain has ended, with its answer or given up."""
        row, steps = chain_rows(chain, self.plan.translator, self.shard.shard.has_gold_answer)
        self.writer.add_chain(row, steps, _reject(self.shard, chain) if chain.error else None)
        self.finished.append(chain)
        given_up = self.progress.num_given_up + (chain.error is not None)
        self.progress = replace(self.progress, num_given_up=given_up)

    # --- what is saved ---

    def save_if_due(self, in_flight: Callable[[], InFlight]) -> None:
        """Commit a part that has its size or age, and save a checkpoint after it or when it is time for one."""
        if self.writer.commit_if_due():
            self._mark_committed()
            self._checkpoint(in_flight())
        elif time.monotonic() - self._saved >= self.plan.config.checkpoint.seconds:
            self._checkpoint(in_flight())

    def save(self) -> None:
        """Everything, with no chain at work. Finished chains first: they must not wait for a checkpoint to succeed."""
        self._commit()
        self._checkpoint(())

    def complete(self) -> None:
        """Every chain is finished: commit the last part and the input's rejects; no checkpoint is needed any more."""
        assert not self.waiting and not self.condemned
        self.writer.write_input_rejects(self.rejects)
        self._commit()
        remove_checkpoints(self.lease.root, self.lease)

    def measure(self, in_flight: InFlight, tokens_per_second: float = 0.0, chains_per_second: float = 0.0) -> None:
        """Tell the lease how far the shard is."""
        steps = [len(chain.steps) for chain, _ in self._begun(in_flight)]
        self.progress = replace(
            self.progress,
            num_chains=self.shard.num_chains,
            num_done=self.shard.num_done,
            num_in_flight=len(steps) + len(self.finished),
            mean_steps_in_flight=sum(steps) / len(steps) if steps else 0.0,
            seconds=time.monotonic() - self._began,
            energy_joules=self.meter.joules,
            tokens_per_second=tokens_per_second,
            chains_per_second=chains_per_second,
        )
        self.lease.report(self.progress)

    def _commit(self) -> None:
        self.writer.commit()
        self._mark_committed()

    def _mark_committed(self) -> None:
        self.shard.done.update(chain.key for chain in self.finished)
        self.finished = []

    def _checkpoint(self, in_flight: InFlight) -> None:
        chains = {chain.key: Saved.of(chain) for chain in self.finished}
        chains |= {chain.key: Saved.of(chain, loose) for chain, loose in self._begun(in_flight)}
        about = partial(
            About,
            self.plan.fingerprint,
            self.shard.source,
            self.lease.number,
            self.round,
            self.progress.num_generated_tokens,
        )
        keep = self.plan.config.checkpoint.keep
        write_checkpoint(self.lease.root, self.lease, about, chains, self.writer.rounds, keep)
        self._saved = time.monotonic()

    def _begun(self, in_flight: InFlight) -> InFlight:
        """Begun and not finished: at work, waiting or condemned."""
        return [*in_flight, *((chain, 0) for chain in [*self.waiting, *self.condemned])]

    def _restore(self, found: Checkpoint | None) -> None:
        if found is None:
            return
        self.round, committed = max(self.round, found.about.round), self.round
        for row in found.rounds:
            if row["round"] > committed:
                self.writer.add_round(row)
        saved = {key: chain for key, chain in found.chains.items() if key not in self.shard.done}
        prompts = prompts_of(self.plan, self.shard, {prompt_id for prompt_id, _ in saved})
        for (prompt_id, sample_index), item in saved.items():
            if prompt_id not in prompts:  # beyond a smaller limit
                continue
            chain = item.restore(self.plan.translator.open(prompts[prompt_id], sample_index))
            if chain.answer is None and chain.error is None:
                self.waiting.append(chain)
            else:
                self.finish(chain)


def _lost_tokens(lease: Lease, found: Checkpoint | None) -> int:
    """Tokens that earlier attempts generated after the checkpoint, as of their last signs of life.

    An attempt that ended in order has saved everything: what it lost is in its chains' own counts.
    """
    lost = 0
    for attempt in read_attempts(lease.root):
        is_later = found is None or attempt.number >= found.about.attempt
        if attempt.number < lease.number and is_later and attempt.state is AttemptState.running:
            saved = found.about.num_generated_tokens if found and attempt.number == found.about.attempt else 0
            lost += max(0, attempt.progress.num_generated_tokens - saved)
    return lost


def _writer(plan: Plan, shard: ShardPlan, lease: Lease) -> ShardWriter:
    return ShardWriter(
        paths=shard.paths,
        lease=lease,
        chains_schema=chains_schema(shard.shard.extra_schema, shard.shard.has_gold_answer),
        metadata={"fingerprint": plan.fingerprint, "source": shard.source},
        chains_per_part=plan.config.parts.chains,
        seconds_per_part=plan.config.parts.seconds,
    )


def _reject(shard: ShardPlan, chain: Chain) -> Reject:
    return Reject(
        prompt_id=chain.prompt.prompt_id,
        sample_index=chain.sample_index,
        file=shard.shard.path.name,
        row=chain.prompt.row,
        reason=f"given up at step {len(chain.steps)}: {chain.error}",
    )
