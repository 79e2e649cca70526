"""SpecReason (arXiv 2504.07891, section 3): the draft writes a step, the base grades it, and rewrites the rejected."""

from specreason_batch.chain import Chain
from specreason_batch.policies.rules import Rules
from specreason_batch.types import Coroutine, GradeOf, Role, Write, WriteAnswer


def specreason(chain: Chain, rules: Rules) -> Coroutine:
    while chain.is_thinking:
        if rules.base_writes_next(chain):
            chain.append((yield Write(Role.base)))
            continue
        draft = yield Write(Role.draft)
        grade = yield GradeOf(draft)
        if rules.accepts(grade):
            chain.append(draft, grade=grade, accepted=True)
        else:
            chain.append((yield Write(Role.base)), rejected=draft, grade=grade, accepted=False)
    chain.answer = yield WriteAnswer(rules.answer_role)
