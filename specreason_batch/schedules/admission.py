"""Which chains may walk: as many as the configuration allows and both engines' KV caches hold.

Over a cache's capacity, prefixes are evicted between a chain's requests and every grade computes its whole chain again.
So chains are admitted while they fit, with a reserve; as they grow, the youngest are parked, and parked ones come back
before new ones begin.

A part of the capacity stays free. An engine lets go of what was least recently used, and a chain that drafts leaves the
base's cache alone for a while: without slack it loses its prefix to what ended chains and rejected drafts left behind.
"""

from bisect import insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from specreason_batch.chain import Chain
from specreason_batch.engine import EngineInfo
from specreason_batch.schedules.walk import Walk
from specreason_batch.types import Role

ADMIT_SHARE = 0.90  # of the capacity: no chain enters that would take the load over it
PARK_SHARE = 0.95  # of the capacity: over it the youngest are parked


@dataclass(frozen=True, slots=True)
class Capacity:
    """One engine's KV cache."""

    tokens: int
    block_size: int

    @classmethod
    def of(cls, info: EngineInfo) -> "Capacity":
        return cls(info.kv_capacity_tokens, info.block_size)

    def need(self, num_tokens: float) -> int:
        """Tokens of cache that a sequence takes: whole blocks, the last one begun."""
        return (int(num_tokens) // self.block_size + 1) * self.block_size


@dataclass(slots=True)
class Admission:
    """The active walks in the order in which they were started, and those parked for want of memory.

    `capacities`: of each role's cache. `bounded`: whether they count, or `active_size` alone.
    """

    chains: Iterator[Chain]
    active_size: int
    capacities: Mapping[Role, Capacity]
    bounded: bool = True
    active: list[Walk] = field(default_factory=list)
    parked: list[Walk] = field(default_factory=list)  # oldest first
    num_parked: int = 0  # times that a walk was parked
    load: dict[Role, int] = field(init=False)  # tokens of cache that the active walks need
    _extra: float = 0.0  # mean tokens that a request adds to its chain's: its suffix and what it generates
    _num_requests: int = 0
    _next: Chain | None = None  # read, and waiting for room

    def __post_init__(self) -> None:
        self.load = dict.fromkeys(self.capacities, 0)

    def observe(self, num_extra_tokens: int) -> None:
        """A request has ended that took this many tokens beyond its chain's."""
        self._num_requests += 1
        self._extra += (num_extra_tokens - self._extra) / self._num_requests

    def update(self, walk: Walk) -> None:
        """Its chain has grown."""
        for role, need in self._needs(walk.chain).items():
            self.load[role] += need - walk.needs.get(role, 0)
            walk.needs[role] = need

    def leave(self, walk: Walk) -> None:
        self.active.remove(walk)
        walk.is_active = False
        for role, need in walk.needs.items():
            self.load[role] -= need
        walk.needs = {}

    def enter(self, walk: Walk) -> None:
        insort(self.active, walk, key=lambda other: other.number)
        walk.is_active = True
        self.update(walk)

    def park_surplus(self) -> None:
        """Park the youngest walks until the others fit; one that has requests outstanding goes once it is at rest."""
        if not self.bounded:
            return
        over = {role: self.load[role] - PARK_SHARE * capacity.tokens for role, capacity in self.capacities.items()}
        for walk in self.active[:0:-1]:  # the oldest always stays
            if all(tokens <= 0 for tokens in over.values()):
                return
            for role in over:
                over[role] -= walk.needs[role]
            if walk.is_at_rest:
                self._park(walk)

    def unpark(self) -> Walk | None:
        """The oldest parked walk, if there is room for it."""
        if not self.parked or not self._fits(self.parked[0].chain):
            return None
        return self.parked.pop(0)

    def next_chain(self) -> Chain | None:
        """A new chain, if there is one and room for it. Parked ones come first."""
        if self.parked or len(self.active) >= self.active_size:
            return None
        if self._next is None:
            self._next = next(self.chains, None)
        if self._next is None or not self._fits(self._next):
            return None
        chain, self._next = self._next, None
        return chain

    @property
    def read_ahead(self) -> list[Chain]:
        """The chain that was read and waits for room, if there is one."""
        return [] if self._next is None else [self._next]

    def _park(self, walk: Walk) -> None:
        self.leave(walk)
        insort(self.parked, walk, key=lambda other: other.number)
        self.num_parked += 1

    def _fits(self, chain: Chain) -> bool:
        return not (self.bounded and self.active) or all(
            self.load[role] + need <= ADMIT_SHARE * self.capacities[role].tokens
            for role, need in self._needs(chain).items()
        )

    def _needs(self, chain: Chain) -> dict[Role, int]:
        return {
            role: capacity.need(len(chain.contexts[role].ids) + self._extra)
            for role, capacity in self.capacities.items()
        }
