"""The draft alone, step by step: the other end of the comparison."""

from specreason_batch.chain import Chain
from specreason_batch.policies.rules import Rules
from specreason_batch.types import Coroutine, Role, Write, WriteAnswer


def draft_only(chain: Chain, rules: Rules) -> Coroutine:
    while chain.is_thinking:
        chain.append((yield Write(Role.draft)))
    chain.answer = yield WriteAnswer(rules.answer_role)
