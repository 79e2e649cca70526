"""One chain on its way through its policy: what it asks for, and what has come back."""

from collections.abc import Container
from dataclasses import dataclass, field

from specreason_batch.chain import Chain
from specreason_batch.types import Ask, Coroutine, Phase, Result, Role


@dataclass(slots=True)
class Loose:
    """What a walk's requests took since its chain last grew. Lost with the walk: a restart begins at the last step."""

    num_grade_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generated_tokens: int = 0


@dataclass(slots=True, eq=False)
class Walk:
    """A chain, its coroutine, and the asks that the coroutine waits for."""

    chain: Chain
    coroutine: Coroutine
    number: int  # in the order of starting
    started: float  # the clock's seconds
    asks: tuple[Ask, ...] = ()
    results: dict[int, Result] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)  # places of the asks whose requests are on their way
    needs: dict[Role, int] = field(default_factory=dict)  # tokens of each KV cache, while active
    known: dict[Role, int] = field(default_factory=dict)  # tokens of its chain that each engine has computed
    loose: Loose = field(default_factory=Loose)
    is_active: bool = False  # neither parked nor over
    asks_tuple: bool = False  # the policy yielded a tuple, and is sent one

    @property
    def is_over(self) -> bool:
        return not self.asks

    @property
    def is_at_rest(self) -> bool:
        return not self.sent

    @property
    def can_advance(self) -> bool:
        """Whether everything that was asked for is there."""
        return len(self.results) == len(self.asks)

    def unsent(self, phases: Container[Phase]) -> list[int]:
        """Places of the asks of these phases that have neither a result nor a request on its way."""
        return [
            place
            for place, ask in enumerate(self.asks)
            if ask.phase in phases and place not in self.results and place not in self.sent
        ]

    def advance(self) -> None:
        """Send the results in; the coroutine runs to its next asks, or to its end."""
        results = tuple(self.results[place] for place in range(len(self.asks)))
        sent = (results if self.asks_tuple else results[0]) if results else None
        self.results = {}
        try:
            asked = self.coroutine.send(sent)
        except StopIteration:
            self.asks = ()
            return
        self.asks_tuple = isinstance(asked, tuple)
        self.asks = asked if isinstance(asked, tuple) else (asked,)

    def settle(self) -> None:
        """The chain has grown or ended: what that took is the chain's from here on."""
        usage, loose = self.chain.usage, self.loose
        usage.num_grade_prompt_tokens += loose.num_grade_prompt_tokens
        usage.num_cached_prompt_tokens += loose.num_cached_prompt_tokens
        self.loose = Loose()

    def give_up(self, why: str) -> None:
        self.settle()
        self.coroutine.close()
        self.chain.give_up(why)
        self.asks, self.results = (), {}
