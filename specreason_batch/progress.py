"""What a person sees of a run: a live line on a terminal, a line every few seconds in a batch log.

Owns: wording and timing of output. Does not know: engines, files.
"""

import time
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.text import Text

from specreason_batch.chain import Chain
from specreason_batch.chat import VocabularyCase
from specreason_batch.engine import EngineInfo
from specreason_batch.plan import Plan, ShardPlan
from specreason_batch.probe import CacheProbe
from specreason_batch.rounds import RoundReport, RoundStats
from specreason_batch.types import Phase, Prompt, Role

_CASES = {
    VocabularyCase.same: "the same token ids throughout",
    VocabularyCase.other_specials: "the same ordinary token ids, other special tokens",
    VocabularyCase.different: "different vocabularies",
    None: "one model only",
}
_RATE_WINDOW_SECONDS = 30.0
_FULL = 0.9  # a KV cache's load is worth a word from here on
_HOLDS_BACK = 0.8  # and from here on it may be what keeps chains out
_IDLE = 0.05  # so is time in which neither engine has a request
_RECOMPUTED = 0.05  # so are prompt tokens that were computed before


@dataclass(slots=True)
class Window:
    """The rounds of about the last 30 seconds (at least the last one), and what they come to."""

    rounds: deque[RoundStats] = field(default_factory=deque)
    seconds: float = 0.0

    def add(self, stats: RoundStats) -> None:
        self.rounds.append(stats)
        self.seconds += stats.seconds
        while self.seconds - self.rounds[0].seconds >= _RATE_WINDOW_SECONDS:
            self.seconds -= self.rounds.popleft().seconds

    def clear(self) -> None:
        self.rounds.clear()
        self.seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated for steps and answers."""
        written = [item for stats in self.rounds for phase, item in stats.phases.items() if phase is not Phase.grade]
        return self._by_second(sum(item.num_generated_tokens for item in written))

    @property
    def chains_per_second(self) -> float:
        return self._by_second(sum(stats.num_finished for stats in self.rounds))

    @property
    def idle_share(self) -> float:
        """Of the time, with no request outstanding at either engine."""
        return self._by_second(sum(stats.idle_seconds for stats in self.rounds))

    @property
    def busy_shares(self) -> dict[Role, float]:
        """Of the time, with requests outstanding at each engine of the run."""
        roles = self.rounds[-1].busy_seconds if self.rounds else ()
        return {
            role: self._by_second(sum(stats.busy_seconds.get(role, 0.0) for stats in self.rounds))
            for role in Role
            if role in roles
        }

    @property
    def recomputed_share(self) -> float:
        """Of the prompt tokens."""
        phases = [phase for stats in self.rounds for phase in stats.phases.values()]
        num_tokens = sum(phase.num_prompt_tokens for phase in phases)
        return sum(phase.num_recomputed_tokens for phase in phases) / max(1, num_tokens)

    def _by_second(self, amount: float) -> float:
        return amount / self.seconds if self.seconds else 0.0


class Progress:
    """Reports to one console. `seconds`: between lines where there is no terminal."""

    def __init__(self, console: Console, seconds: float):
        self._console = console
        self._seconds = seconds
        self._live: Live | None = None
        self._plan: Plan | None = None
        self._done = self._given_up = 0
        self._left = 0  # chains of the shard that have not ended
        self._accepted = self._decided = 0
        self._window = Window()
        self._told: set[str] = set()  # what was explained already
        self._caches = True  # both engines' prefix caches hit, as far as is known
        self._last_line = time.monotonic()

    # --- before the run ---

    def introduce(self, plan: Plan) -> None:
        """The models, the vocabulary case, and the first prompt exactly as each role gets it."""
        config = plan.config
        self._print(
            f"{config.name}: policy {config.policy.name}, schedule {_schedule(plan)}, output {config.output_dir}",
            style="bold",
        )
        for role in plan.formats:
            self._print(f"{role}: {config.engine(role).model}")
        self._print(f"vocabularies: {plan.vocabulary_case or 'single'} ({_CASES[plan.vocabulary_case]})")
        prompt = plan.first_prompt()
        if prompt is not None:
            self._show_prompt(plan, prompt)
        self.found(plan)

    def found(self, plan: Plan) -> None:
        """How much is done already."""
        shards = len(plan.pending) + len(plan.finished)
        self.follow(plan)
        self._print(
            f"{plan.num_chains} chains in {shards} shard(s): {plan.num_done} done, {len(plan.pending)} shard(s) to go"
        )

    def follow(self, plan: Plan) -> None:
        """Count this plan's chains from here on."""
        self._plan, self._done, self._given_up = plan, plan.num_done, 0
        self._accepted = self._decided = 0
        self._window.clear()
        self._told.clear()

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Say what goes on, and how long it took."""
        began = time.monotonic()
        yield
        self._print(f"{what} ({time.monotonic() - began:.1f} s)")

    def engine_ready(self, role: Role, info: EngineInfo, cache: CacheProbe) -> None:
        self._print(
            f"{role} engine: window {info.max_model_len}, KV cache {info.kv_capacity_tokens} tokens ({info.version})"
        )
        if not cache.hits:
            self._print(
                f"{role} engine: its prefix cache does not hit ({cache.num_prompt_tokens} tokens sent twice, "
                "none cached): every step and grade computes its whole chain again",
                style="bold red",
            )
            self._caches = False

    # --- during the run ---

    def shard(
        self, shard: ShardPlan, begun: Collection[Chain] = (), num_finished: int = 0, num_redone_tokens: int = 0
    ) -> None:
        """What is found of it: `begun` chains and `num_finished` ones in a checkpoint, and tokens that are lost."""
        num_done = shard.num_done + num_finished
        self._left = shard.num_chains - num_done
        if self._plan is not None:
            self._done = self._plan.num_done + num_finished
        if not num_done and not begun:
            self._print(f"shard {shard.shard.name}: {self._left:,} chains to go")
            return
        steps = sum(len(chain.steps) for chain in begun) / max(1, len(begun))
        self._print(
            f"shard {shard.shard.name}: resumed: {num_done:,} done, {len(begun):,} in flight at {steps:.1f} "
            f"steps, {self._left - len(begun):,} to go"
        )
        if num_redone_tokens:
            self._print(f"shard {shard.shard.name}: about {num_redone_tokens:,} tokens after its checkpoint are redone")

    def round(self, report: RoundReport) -> None:
        stats = report.stats
        self._explain_waiting(stats)
        self._done += len(report.finished)
        self._left -= len(report.finished)
        self._given_up += sum(chain.error is not None for chain in report.finished)
        self._accepted += stats.num_accepted
        self._decided += stats.num_accepted + stats.num_rejected
        self._window.add(stats)
        self._explain_recomputing()
        self._show(time.monotonic())

    @contextmanager
    def running(self) -> Iterator["Progress"]:
        """Shows the live line meanwhile."""
        self._last_line = time.monotonic()
        if not self._console.is_terminal:
            yield self
            return
        with Live(console=self._console, refresh_per_second=4, transient=True) as self._live:
            yield self
        self._live = None

    @property
    def window(self) -> Window:
        """The last half minute."""
        return self._window

    def say(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(text, style="yellow")

    def line(self) -> str:
        """Chains done, active, acceptance, tokens/s, how busy the engines are, ETA; rates of the last half minute."""
        window = self._window
        total = self._plan.num_chains if self._plan else 0
        left = max(0, total - self._done)
        eta = _duration(left / window.chains_per_second) if window.chains_per_second else "?"
        parts = [
            f"{self._done}/{total} chains",
            _active(window.rounds[-1]) if window.rounds else "0 active",
            f"{self._accepted / self._decided:.0%} accepted" if self._decided else "",
            f"{window.tokens_per_second:.0f} tokens/s",
            _busy(window),
            f"ETA {eta}",
            f"{self._given_up} given up" if self._given_up else "",
        ]
        return " · ".join(part for part in parts if part)

    def _explain_waiting(self, stats: RoundStats) -> None:
        """Once: how many chains the memory holds, read off the first round that began with chains kept out."""
        if self._plan is None or "waiting" in self._told or not self._window.rounds:
            return
        before, asked = self._window.rounds[-1], self._plan.config.schedule.active_size
        role = _fullest(before)
        is_short = stats.num_active < min(asked, self._left) and _load_share(before, role) >= _HOLDS_BACK
        if not before.num_waiting and not is_short:
            return
        self._told.add("waiting")
        self._print(
            f"KV memory of the {role} engine ({before.kv_capacity[role]:,} tokens) holds {stats.num_active} of the "
            f"{asked} active chains asked for; the others wait, nothing is lost. "
            f"More room: {role}.kv_cache_gib or {role}.gpu_memory_utilization",
            style="yellow",
        )

    def _explain_recomputing(self) -> None:
        """Once: that chains fall out of the KV cache between their requests. Not before half a window is known."""
        window = self._window
        if "recomputing" in self._told or not self._caches or window.seconds < _RATE_WINDOW_SECONDS / 2:
            return
        if window.recomputed_share <= _RECOMPUTED:
            return
        self._told.add("recomputing")
        self._print(
            f"{window.recomputed_share:.0%} of the prompt tokens of the last {window.seconds:.0f} s had been computed "
            "before and had fallen out of the KV cache. "
            "A smaller schedule.active_size or more KV memory saves that work",
            style="yellow",
        )

    def _show(self, now: float) -> None:
        if self._live is not None:
            self._live.update(Text(self.line()))
        elif now - self._last_line >= self._seconds:
            self._last_line = now
            self._print(f"{time.strftime('%H:%M:%S')} {self.line()}")

    def _show_prompt(self, plan: Plan, prompt: Prompt) -> None:
        given = prompt.prompt, prompt.messages, prompt.system_prompt
        for role, chat in plan.formats.items():
            self._print(f"first prompt ({prompt.prompt_id}) as the {role} gets it, {len(chat.opening(*given))} tokens:")
            self._print(chat.opening_text(*given), style="cyan")

    def _print(self, text: str, style: str = "") -> None:
        """As it is: no markup, no wrapping."""
        self._console.print(Text(text, style=style), soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _schedule(plan: Plan) -> str:
    """Its name and its options, as one would set them."""
    config = plan.config.schedule
    options = [f"active_size={config.active_size}"]
    if not config.fit_memory:
        options.append("fit_memory=false")
    if plan.policy_spec.free_running:
        return f"continuous ({', '.join(options)}; {plan.config.policy.name} knows no other)"
    given = {"cohorts": config.cohorts, "wave": config.wave}
    options += [f"{name}={value}" for name, value in given.items() if value is not None]
    return f"{config.name} ({', '.join(options)})"


def _active(stats: RoundStats) -> str:
    """Active chains; where memory is short, how short."""
    text = f"{stats.num_active} active"
    if stats.num_waiting:
        return f"{text}, {stats.num_waiting} parked"
    if stats.kv_capacity and _load_share(stats, role := _fullest(stats)) >= _FULL:
        return f"{text}, {role} KV {_load_share(stats, role):.0%}"
    return text


def _busy(window: Window) -> str:
    """Share of the time in which each engine had requests; in which neither had, where that is much."""
    shares = window.busy_shares
    if not shares:
        return ""
    text = " ".join(f"{role} {share:.0%}" for role, share in shares.items()) + " busy"
    is_idle = len(shares) == 2 and window.idle_share >= _IDLE
    return text + (f", neither {window.idle_share:.0%}" if is_idle else "")


def _fullest(stats: RoundStats) -> Role:
    """The engine whose KV cache is nearest to its capacity."""
    return max(stats.kv_capacity, key=lambda role: _load_share(stats, role))


def _load_share(stats: RoundStats, role: Role) -> float:
    return stats.kv_load.get(role, 0) / stats.kv_capacity[role]
