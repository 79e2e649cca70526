"""The pair's figures on held-out problems: accuracy by method, and how well grades tell right steps from wrong ones."""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import Qwen2ForCausalLM

from examples.toy.generation import (
    GREEDY,
    PAPER,
    Accept,
    Decoding,
    ModelAuthor,
    Run,
    accept_all,
    accept_at_random,
    accept_graded,
    simulate,
)
from examples.toy.task import Problem, expected_step, read_answer
from specreason_batch.chat import ChatFormat
from specreason_batch.judge import Judge

THRESHOLD = 7.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Both models and the chat format that they share."""

    chat: ChatFormat
    draft: Qwen2ForCausalLM
    base: Qwen2ForCausalLM

    def author(self, model: Qwen2ForCausalLM, decoding: Decoding) -> ModelAuthor:
        return ModelAuthor(model, self.chat, decoding)


def measure(pair: Pair, judges: Mapping[str, Judge], problems: Sequence[Problem], seed: int) -> dict[str, object]:
    """All figures but the draft's own."""
    torch.manual_seed(seed)
    figures: dict[str, object] = {
        "base_sampled": _alone(pair, pair.base, problems, PAPER),
        "base_greedy": _alone(pair, pair.base, problems, GREEDY),
    }
    figures |= {f"draft_{name}": value for name, value in measure_draft(pair, problems).items()}
    for name, judge in judges.items():
        figures[f"specreason_{name}"] = found = _with_draft(pair, problems, accept_graded(pair.base, judge, THRESHOLD))
        rate = float(found["accepted"])
        figures[f"random_{name}"] = _with_draft(pair, problems, accept_at_random(rate, random.Random(seed)))
    return figures


def measure_draft(pair: Pair, problems: Sequence[Problem]) -> dict[str, object]:
    return {
        "sampled": _alone(pair, pair.draft, problems, PAPER),
        "greedy": _alone(pair, pair.draft, problems, GREEDY),
    }


def _alone(pair: Pair, model: Qwen2ForCausalLM, problems: Sequence[Problem], decoding: Decoding) -> dict[str, float]:
    """One model writes chain and answer."""
    author = pair.author(model, decoding)
    runs = simulate(problems, pair.chat, None, author, accept_all)
    author.write_answers(runs)
    return _summary(runs)


def _with_draft(pair: Pair, problems: Sequence[Problem], accept: Accept) -> dict[str, float]:
    draft, base = pair.author(pair.draft, PAPER), pair.author(pair.base, PAPER)
    started = time.perf_counter()
    runs = simulate(problems, pair.chat, draft, base, accept)
    base.write_answers(runs)
    return _summary(runs) | _draft_summary(runs) | {"seconds": round(time.perf_counter() - started, 1)}


def _summary(runs: Sequence[Run]) -> dict[str, float]:
    """Shares of the problems, and of the steps."""
    right = [read_answer(run.answer) == str(run.problem.gold_answer) for run in runs]
    steps = [step == expected_step(run.problem, run.steps[:i]) for run in runs for i, step in enumerate(run.steps)]
    return {
        "right": _mean(right),
        "closed": _mean([run.steps[-1].closes for run in runs]),
        "boxed": _mean([read_answer(run.answer) is not None for run in runs]),
        "right_steps": _mean(steps),
        "steps_per_chain": _mean([len(run.steps) for run in runs]),
    }


def _draft_summary(runs: Sequence[Run]) -> dict[str, float]:
    verdicts = [verdict for run in runs for verdict in run.verdicts]
    right = [is_right for run in runs for is_right in run.drafts_right]
    accepted = [verdict.accepted for verdict in verdicts]
    summary = {"accepted": _mean(accepted), "right_drafts": _mean(right)}
    if verdicts[0].score is None:
        return summary
    scores = [-1.0 if verdict.score is None else verdict.score for verdict in verdicts]
    agreed = [is_right == is_accepted for is_right, is_accepted in zip(right, accepted, strict=True)]
    unreadable = _mean([verdict.score is None for verdict in verdicts])
    return summary | {"auc": roc_auc(scores, right), "right_verdicts": _mean(agreed), "unreadable": unreadable}


def roc_auc(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Probability that a right step scores above a wrong one, ties counting half."""
    positive = torch.tensor([score for score, is_right in zip(scores, right, strict=True) if is_right])
    negative = torch.tensor([score for score, is_right in zip(scores, right, strict=True) if not is_right])
    above = (positive[:, None] > negative).float() + 0.5 * (positive[:, None] == negative).float()
    return round(above.mean().item(), 4)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)
