"""What a person sees of a run: a live line on a terminal, a line every few seconds in a batch log.

Owns: wording and timing of output. Does not know: engines, files.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from specreason_batch.chat import VocabularyCase
from specreason_batch.engine import EngineInfo
from specreason_batch.plan import Plan, ShardPlan
from specreason_batch.probe import CacheProbe
from specreason_batch.rounds import RoundReport
from specreason_batch.types import Phase, Prompt, Role

_CASES = {
    VocabularyCase.same: "the same token ids throughout",
    VocabularyCase.other_specials: "the same ordinary token ids, other special tokens",
    VocabularyCase.different: "different vocabularies",
    None: "one model only",
}
_RATE_WINDOW_SECONDS = 30.0


class Progress:
    """Reports to one console. `seconds`: between lines where there is no terminal."""

    def __init__(self, console: Console, seconds: float):
        self._console = console
        self._seconds = seconds
        self._live: Live | None = None
        self._plan: Plan | None = None
        self._done = self._given_up = 0
        self._accepted = self._decided = self._active = 0
        self._window: deque[tuple[float, int, int]] = deque()  # (time, tokens, chains) by round
        self._last_line = time.monotonic()

    # --- before the run ---

    def introduce(self, plan: Plan) -> None:
        """The models, the vocabulary case, and the first prompt exactly as each role gets it."""
        config = plan.config
        self._print(f"{config.name}: policy {config.policy.name}, output {config.output_dir}", style="bold")
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

    # --- during the run ---

    def shard(self, shard: ShardPlan) -> None:
        self._print(f"shard {shard.shard.name}: {shard.num_chains - shard.num_done} chains to go")

    def round(self, report: RoundReport) -> None:
        stats = report.stats
        self._done += len(report.finished)
        self._given_up += sum(chain.error is not None for chain in report.finished)
        self._accepted += stats.num_accepted
        self._decided += stats.num_accepted + stats.num_rejected
        self._active = stats.num_active
        tokens = sum(phase.num_generated_tokens for name, phase in stats.phases.items() if name is not Phase.grade)
        now = time.monotonic()
        self._window.append((now, tokens, len(report.finished)))
        while now - self._window[0][0] > _RATE_WINDOW_SECONDS:
            self._window.popleft()
        self._show(now)

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

    def say(self, text: str) -> None:
        self._print(text)

    def line(self) -> str:
        """Chains done, active, acceptance, tokens/s, ETA."""
        tokens_per_second, chains_per_second = self._rates()
        acceptance = f"{self._accepted / self._decided:.0%}" if self._decided else "-"
        total = self._plan.num_chains if self._plan else 0
        left = max(0, total - self._done)
        eta = _duration(left / chains_per_second) if chains_per_second else "?"
        given_up = f" · {self._given_up} given up" if self._given_up else ""
        return (
            f"{self._done}/{total} chains · {self._active} active · {acceptance} of drafts accepted · "
            f"{tokens_per_second:.0f} tokens/s · ETA {eta}{given_up}"
        )

    def _rates(self) -> tuple[float, float]:
        if len(self._window) < 2:
            return 0.0, 0.0
        seconds = self._window[-1][0] - self._window[0][0]
        rounds = list(self._window)[1:]
        return sum(tokens for _, tokens, _ in rounds) / seconds, sum(chains for *_, chains in rounds) / seconds

    def _show(self, now: float) -> None:
        if self._live is not None:
            self._live.update(Text(self.line()))
        elif now - self._last_line >= self._seconds:
            self._last_line = now
            self._print(f"{time.strftime('%H:%M:%S')} {self.line()}")

    def _show_prompt(self, plan: Plan, prompt: Prompt) -> None:
        for role, chat in plan.formats.items():
            self._print(
                f"first prompt ({prompt.prompt_id}) as the {role} gets it, {len(chat.opening(prompt.prompt))} tokens:"
            )
            self._print(chat.opening_text(prompt.prompt), style="cyan")

    def _print(self, text: str, style: str = "") -> None:
        """As it is: no markup, no wrapping."""
        self._console.print(Text(text, style=style), soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
