"""Policies: one coroutine a file, each the whole method for one chain. No I/O, no batching, no configuration files."""

from dataclasses import dataclass
from typing import Protocol

from specreason_batch.chain import Chain
from specreason_batch.policies.base_direct import base_direct
from specreason_batch.policies.base_only import base_only
from specreason_batch.policies.draft_only import draft_only
from specreason_batch.policies.random import random
from specreason_batch.policies.rules import Rules
from specreason_batch.policies.specreason import specreason
from specreason_batch.types import Coroutine, Role

__all__ = ["POLICIES", "PolicySpec", "Rules"]

BOTH = frozenset(Role)


class RuledPolicy(Protocol):
    """A policy before its rules are given."""

    def __call__(self, chain: Chain, rules: Rules) -> Coroutine: ...


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy and what it needs."""

    coroutine: RuledPolicy
    roles: frozenset[Role]  # the engines that it asks for steps
    grades: bool = False
    free_running: bool = False  # always without barriers, whatever the schedule


POLICIES: dict[str, PolicySpec] = {
    "specreason": PolicySpec(specreason, BOTH, grades=True),
    "random": PolicySpec(random, BOTH),
    "base_only": PolicySpec(base_only, frozenset({Role.base}), free_running=True),
    "base_direct": PolicySpec(base_direct, frozenset({Role.base}), free_running=True),
    "draft_only": PolicySpec(draft_only, frozenset({Role.draft}), free_running=True),
}
