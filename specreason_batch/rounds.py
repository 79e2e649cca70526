"""The account of a round: what it did, what it took, which chains ended in it."""

from dataclasses import dataclass, field

from specreason_batch.chain import Chain
from specreason_batch.types import Completion, Phase, Request, Role


@dataclass(slots=True)
class PhaseStats:
    """What one phase took in one round."""

    num_requests: int = 0
    num_prompt_tokens: int = 0  # sent, cached ones included
    num_cached_tokens: int = 0  # of them, found in the prefix cache
    num_recomputed_tokens: int = 0  # of them, computed before by this engine and evicted since
    num_generated_tokens: int = 0

    def count(self, request: Request, completion: Completion, num_recomputed_tokens: int) -> None:
        self.num_requests += 1
        self.num_recomputed_tokens += num_recomputed_tokens
        self.num_prompt_tokens += request.num_prompt_tokens
        self.num_cached_tokens += completion.num_cached_tokens
        self.num_generated_tokens += len(completion.token_ids)


@dataclass(slots=True)
class RoundStats:
    """One round, or one time slice of a schedule without rounds: counts, tokens by phase, seconds."""

    round: int
    started_at: float  # seconds since the epoch
    num_active: int = 0  # chains at its start
    num_waiting: int = 0  # chains parked for want of KV memory, at its end
    num_parked: int = 0  # times that a chain was parked in it
    num_finished: int = 0
    num_accepted: int = 0
    num_rejected: int = 0
    num_unreadable: int = 0  # grades without a score; they count as rejected
    seconds: float = 0.0  # since the last one's end: a run's rounds leave no gap
    idle_seconds: float = 0.0  # with no request outstanding at either engine
    busy_seconds: dict[Role, float] = field(default_factory=dict)  # with requests outstanding at that engine
    request_seconds: dict[Role, float] = field(default_factory=dict)  # the same, times their number
    kv_load: dict[Role, int] = field(default_factory=dict)  # tokens of KV cache that its active chains need, at its end
    kv_capacity: dict[Role, int] = field(default_factory=dict)  # tokens
    phases: dict[Phase, PhaseStats] = field(default_factory=lambda: {phase: PhaseStats() for phase in Phase})
    phase_seconds: dict[Phase, float] = field(default_factory=dict)  # empty where phases overlap


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What a schedule hands out after each round: its figures and the chains that ended in it."""

    stats: RoundStats
    finished: list[Chain]
