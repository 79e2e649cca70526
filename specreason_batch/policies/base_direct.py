"""The base alone, all thinking in one generation: what vLLM does without us, and the baseline for speed."""

from specreason_batch.chain import Chain
from specreason_batch.policies.rules import Rules
from specreason_batch.types import Coroutine, Role, WriteAnswer, WriteThinking


def base_direct(chain: Chain, rules: Rules) -> Coroutine:
    while chain.is_thinking:  # again only where a special token cut it short
        chain.extend((yield WriteThinking(Role.base)))
    chain.answer = yield WriteAnswer(rules.answer_role)
