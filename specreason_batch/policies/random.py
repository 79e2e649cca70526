"""The control for grading: drafts are kept by a coin of a given rate, and nothing is graded."""

from specreason_batch.chain import Chain
from specreason_batch.policies.rules import Rules
from specreason_batch.types import Coroutine, Role, Write, WriteAnswer


def random(chain: Chain, rules: Rules) -> Coroutine:
    while chain.is_thinking:
        if rules.base_writes_next(chain):
            chain.append((yield Write(Role.base)))
            continue
        draft = yield Write(Role.draft)
        if rules.coin_accepts(chain):
            chain.append(draft, accepted=True)
        else:
            chain.append((yield Write(Role.base)), rejected=draft, accepted=False)
    chain.answer = yield WriteAnswer(rules.answer_role)
