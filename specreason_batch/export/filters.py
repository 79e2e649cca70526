"""What leaves a chain out: the filters by name, and those that look at one chain alone. Does not know: files."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from specreason_batch.export.chains import FinishedChain
from specreason_batch.export.config import Answers, Format, SelectConfig
from specreason_batch.export.measures import foreign_share, num_repeated, repeated_share
from specreason_batch.store.verdicts import Verdict, VerdictBasis


class Filter(StrEnum):
    """In the order in which they are applied: a chain is counted under the first that removes it."""

    thinking_end = "thinking_end"
    answer_end = "answer_end"
    markup = "markup"
    answers = "answers"
    tokens = "tokens"
    repetition = "repetition"
    foreign_letters = "foreign_letters"
    evaluation = "evaluation"
    nothing_to_learn = "nothing_to_learn"
    pass_rate = "pass_rate"
    duplicate = "duplicate"
    near_duplicate = "near_duplicate"
    per_prompt = "per_prompt"


MEANINGS = {
    Filter.thinking_end: "thinking ended otherwise than select.thinking_ends",
    Filter.answer_end: "the answer ended otherwise than select.answer_ends, or there is none",
    Filter.markup: "its text holds think tags or special tokens, which a trainer would not take for text",
    Filter.answers: "its verdict is not among select.answers",
    Filter.tokens: "fewer tokens than select.min_tokens, or more than select.max_tokens",
    Filter.repetition: "over select.max_repeated_ngrams or select.max_repeated_steps",
    Filter.foreign_letters: "over select.max_foreign_letters in scripts that the prompt does not use",
    Filter.evaluation: "its prompt shares words with an evaluation prompt (decontaminate)",
    Filter.nothing_to_learn: "it makes no row of this format",
    Filter.pass_rate: "its prompt's pass rate is outside select.min_pass_rate and max_pass_rate, or unknown",
    Filter.duplicate: "an earlier chain makes the same rows",
    Filter.near_duplicate: "nearly the same text as an earlier chain (near_duplicates)",
    Filter.per_prompt: "select.per_prompt better samples of its prompt are there (select.best)",
}


@dataclass(frozen=True, slots=True)
class Removed:
    """What left a chain out, and the figure that decided; None: there is none."""

    by: Filter
    value: float | None = None

    def reason(self) -> str:
        """For people; `evaluation` and the duplicates, which refer to something else, say more (job)."""
        return MEANINGS[self.by] if self.value is None else f"{MEANINGS[self.by]}: {self.value:g}"


Check = Callable[[FinishedChain], Removed | None]
CountTokens = Callable[[FinishedChain], int]
FindEvaluation = Callable[[FinishedChain], int | None]  # the number of the evaluation prompt


def checks(
    select: SelectConfig, format: Format, markup: re.Pattern[str], count: CountTokens, find: FindEvaluation | None
) -> list[Check]:
    """The filters of one chain, in the order of `Filter`; only those that this configuration uses."""
    return list(_checks(select, format, markup, count, find))


def _checks(
    select: SelectConfig, format: Format, markup: re.Pattern[str], count: CountTokens, find: FindEvaluation | None
) -> Iterator[Check]:
    yield lambda chain: None if chain.row["thinking_end"] in select.thinking_ends else Removed(Filter.thinking_end)
    yield lambda chain: None if _ends_well(chain, select, format) else Removed(Filter.answer_end)
    if format is not Format.raw:
        yield lambda chain: Removed(Filter.markup) if _holds(markup, chain) else None
    if select.answers is not Answers.all:
        yield lambda chain: None if _is_right(chain, select.answers) else Removed(Filter.answers)
    if select.min_tokens is not None or select.max_tokens is not None:
        yield lambda chain: _check_tokens(count(chain), select)
    if select.max_repeated_ngrams is not None or select.max_repeated_steps is not None:
        yield lambda chain: _check_repetition(chain, select)
    if (most := select.max_foreign_letters) is not None:
        yield lambda chain: _over(Filter.foreign_letters, foreign_share(chain.asked, chain.thinking), most)
    if find:
        yield lambda chain: None if (found := find(chain)) is None else Removed(Filter.evaluation, found)


def _ends_well(chain: FinishedChain, select: SelectConfig, format: Format) -> bool:
    needs_answer = format in (Format.sft_messages, Format.prompt_completion, Format.text)
    return chain.row["answer_end"] in select.answer_ends and not (needs_answer and chain.answer is None)


def _holds(markup: re.Pattern[str], chain: FinishedChain) -> bool:
    texts = [*(turn.content for turn in chain.turns), chain.thinking, chain.answer or ""]
    return any(markup.search(text) for text in texts)


def _is_right(chain: FinishedChain, answers: Answers) -> bool:
    allowed = [VerdictBasis.gold] if answers is Answers.right else [VerdictBasis.gold, VerdictBasis.majority]
    return chain.verdict is Verdict.right and chain.basis in allowed


def _check_tokens(num_tokens: int, select: SelectConfig) -> Removed | None:
    low, high = select.min_tokens or 0, select.max_tokens or num_tokens
    return None if low <= num_tokens <= high else Removed(Filter.tokens, num_tokens)


def _check_repetition(chain: FinishedChain, select: SelectConfig) -> Removed | None:
    if (most := select.max_repeated_ngrams) is not None:
        removed = _over(Filter.repetition, repeated_share(chain.thinking, select.repeated_ngram), most)
        if removed:
            return removed
    if select.max_repeated_steps is None:
        return None
    return _over(Filter.repetition, num_repeated(map(chain.step_text, chain.steps)), select.max_repeated_steps)


def _over(by: Filter, value: float, most: float) -> Removed | None:
    return Removed(by, value) if value > most else None
