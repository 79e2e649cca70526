"""What a policy's user may set: the decisions that a coroutine asks for. Pure."""

from dataclasses import dataclass

from specreason_batch.chain import Chain
from specreason_batch.seeds import stable_coin
from specreason_batch.types import Grade, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Decisions about steps, as functions of the chain."""

    threshold: float = 7.0  # a draft is kept when its score is at least this: 0-9 (yes_no: 0-1)
    first_n_base_steps: int = 0  # the base writes this many steps before the draft may
    accept_rate: float = 0.5  # random's, 0-1
    answer_role: Role = Role.base

    def base_writes_next(self, chain: Chain) -> bool:
        return len(chain.steps) < self.first_n_base_steps

    def accepts(self, grade: Grade) -> bool:
        """An unreadable grade accepts nothing."""
        return grade.score is not None and grade.score >= self.threshold

    def coin_accepts(self, chain: Chain) -> bool:
        return stable_coin(self.accept_rate, chain.seed, len(chain.steps))
