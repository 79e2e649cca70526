"""The base alone, step by step: what SpecReason is compared with."""

from specreason_batch.chain import Chain
from specreason_batch.policies.rules import Rules
from specreason_batch.types import Coroutine, Role, Write, WriteAnswer


def base_only(chain: Chain, rules: Rules) -> Coroutine:
    while chain.is_thinking:
        chain.append((yield Write(Role.base)))
    chain.answer = yield WriteAnswer(rules.answer_role)
