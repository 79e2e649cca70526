"""The optimiser's loop over packed chains, with one warm-up and one decay, and what helps it along."""

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import Qwen2ForCausalLM

from examples.toy.packing import GRADE, NO_VERDICT, NOT_LEARNT, TEXT, Batch, PackedChain, make_batch

NUM_BATCHES_SORTED_TOGETHER = 8
LOG_EVERY = 50
GRADE_WEIGHT = 0.5  # of the mean loss of the grades, beside 1 for that of the chain's text


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    num_batches: int
    batch_size: int  # sequences
    peak_rate: float
    num_warmup: int = 100  # batches
    weight_decay: float = 0.02

    def rate(self, index: int) -> float:
        """Linear warm-up, then a cosine down to a hundredth of the peak."""
        if index < self.num_warmup:
            return self.peak_rate * (index + 1) / self.num_warmup
        done = (index - self.num_warmup) / max(1, self.num_batches - self.num_warmup)
        return self.peak_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


class Aid(Protocol):
    """A loss that helps training along and leaves nothing in the model's folder."""

    weight: float

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """Of its own, trained with the model."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """Over the batch that the model has just read."""
        ...


class VerdictProbe:
    """Reads off every token of a judged step whether the step is right so far, a few layers under the top.

    Without it the gradient has to find the whole way from a wrong result to a grade 25 tokens on at once; with it, the
    comparison is learnt where a step goes wrong, and the layers above only carry it to the grade.
    """

    weight = 1.0

    def __init__(self, model: Qwen2ForCausalLM, layers_under_top: int = 2):
        self._linear = torch.nn.Linear(model.config.hidden_size, 1)
        self._hidden = _output_of(model.model.layers[-1 - layers_under_top])

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return self._linear.parameters()

    def loss(self, batch: Batch) -> Tensor:
        judged = batch.verdicts != NO_VERDICT
        logits = self._linear(self._hidden[0][judged]).squeeze(-1)
        return binary_cross_entropy_with_logits(logits, batch.verdicts[judged])


class EarlyExit:
    """Reads the next token of a chain off the middle layer too, through the model's own norm and head.

    A grade compares a step's result with the right one. Left alone, the right one is ready only at the top, where no
    layer is left to compare it; this brings it down to the middle.
    """

    weight = 1.0

    def __init__(self, model: Qwen2ForCausalLM):
        self._model = model
        self._hidden = _output_of(model.model.layers[len(model.model.layers) // 2 - 1])

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return ()

    def loss(self, batch: Batch) -> Tensor:
        learnt = batch.kinds == TEXT
        logits = self._model.lm_head(self._model.model.norm(self._hidden[0][learnt]))
        return cross_entropy(logits, batch.targets[learnt])


def _output_of(layer: torch.nn.Module) -> list[Tensor]:
    """A list that holds the layer's last output."""
    kept: list[Tensor] = []
    layer.register_forward_hook(lambda module, inputs, output: kept.__setitem__(slice(None), [output]))
    return kept


def train(
    model: Qwen2ForCausalLM,
    new_chain: Callable[[], PackedChain],
    schedule: Schedule,
    seed: int,
    aids: Sequence[Aid] = (),
) -> float:
    """Train in place. Returns the seconds it took."""
    model.train()
    parameters = [*model.parameters(), *(parameter for aid in aids for parameter in aid.parameters())]
    decay, rate = schedule.weight_decay, schedule.peak_rate
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=decay)
    started = time.perf_counter()
    for index, batch in enumerate(_batches(new_chain, schedule, random.Random(seed))):
        losses = _train_on(model, aids, optimizer, batch, schedule.rate(index))
        if index % LOG_EVERY == 0 or index == schedule.num_batches - 1:
            _log(index, losses, time.perf_counter() - started)
    model.eval()
    return time.perf_counter() - started


def _train_on(
    model: Qwen2ForCausalLM, aids: Sequence[Aid], optimizer: torch.optim.Optimizer, batch: Batch, rate: float
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = rate
    losses = _losses(model, batch)
    losses |= {type(aid).__name__: aid.loss(batch) for aid in aids}
    weights = {"grade": GRADE_WEIGHT} | {type(aid).__name__: aid.weight for aid in aids}
    optimizer.zero_grad(set_to_none=True)
    torch.stack([loss * weights.get(name, 1.0) for name, loss in losses.items()]).sum().backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


def _losses(model: Qwen2ForCausalLM, batch: Batch) -> dict[str, Tensor]:
    """Mean loss of the chain's tokens, and of the grades if there are any."""
    output = model.model(
        input_ids=batch.ids, attention_mask=batch.visible, position_ids=batch.positions, use_cache=False
    )
    learnt = batch.kinds != NOT_LEARNT
    losses = cross_entropy(model.lm_head(output.last_hidden_state[learnt]), batch.targets[learnt], reduction="none")
    by_kind = {"text": losses[batch.kinds[learnt] == TEXT], "grade": losses[batch.kinds[learnt] == GRADE]}
    return {name: values.mean() for name, values in by_kind.items() if len(values)}


def _batches(new_chain: Callable[[], PackedChain], schedule: Schedule, rng: random.Random) -> Iterator[Batch]:
    """Batches of sequences of similar length, in random order."""
    done = 0
    while done < schedule.num_batches:
        num_chains = schedule.batch_size * NUM_BATCHES_SORTED_TOGETHER
        chains = sorted((new_chain() for _ in range(num_chains)), key=lambda c: len(c.ids))
        groups = [chains[i : i + schedule.batch_size] for i in range(0, num_chains, schedule.batch_size)]
        rng.shuffle(groups)
        yield from map(make_batch, islice(groups, schedule.num_batches - done))
        done += len(groups)


def _log(index: int, losses: dict[str, float], seconds: float) -> None:
    values = {"seconds": seconds} | losses
    print(json.dumps({"batch": index} | {name: round(value, 4) for name, value in values.items()}), flush=True)
