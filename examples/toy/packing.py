"""Training sequences: a chain's token ids as a trunk, and grading turns as blocks that branch off it.

A block sees the trunk up to where it branches off, and itself; its positions go on from there. So one sequence trains
the chain and several grades of it, each over exactly the ids that the judge would send for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PADDING_SEGMENT = -1
NO_VERDICT = -1.0
TRUNK = 0
NOT_LEARNT, TEXT, GRADE = range(3)  # what a target is


@dataclass(slots=True)
class PackedChain:
    """One sequence under construction: the whole trunk first, then its blocks."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)  # TRUNK, or the block's number
    limits: list[int] = field(default_factory=list)  # how much of the trunk a block's token sees
    targets: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)  # of the targets
    verdicts: list[float] = field(default_factory=list)  # at a graded step's tokens: 1 right so far, 0 wrong

    def extend(self, ids: Sequence[int], learnt: bool = False) -> None:
        """Add to the trunk; `learnt`: whether predicting these ids is."""
        kind = TEXT if learnt else NOT_LEARNT
        if self.ids and ids:
            self.targets[-1], self.kinds[-1] = ids[0], kind
        self._append(ids, start=len(self.ids), segment=TRUNK)
        num_known = max(len(ids) - 1, 0)
        self.targets += [*ids[1:], 0][: len(ids)]
        self.kinds += [kind] * num_known + [NOT_LEARNT] * (len(ids) - num_known)

    def judge(self, start: int, ids: Sequence[int], expected: Sequence[int], is_right: bool) -> None:
        """Say of each token of the step at `start` whether the step is right so far."""
        pairs = enumerate(zip(ids, expected, strict=False))
        differs = next((offset for offset, (id, right) in pairs if id != right), len(expected))
        for offset in range(len(ids)):
            self.verdicts[start + offset] = float(offset < differs)
        self.verdicts[start + len(ids) - 1] = float(is_right)

    def attach(self, start: int, ids: Sequence[int], label_id: int) -> None:
        """Branch a block off after `start` tokens of the trunk; only the label after its last token is learnt."""
        self._append(ids, start=start, segment=self.segments[-1] + 1)
        self.targets += [0] * (len(ids) - 1) + [label_id]
        self.kinds += [NOT_LEARNT] * (len(ids) - 1) + [GRADE]

    def _append(self, ids: Sequence[int], start: int, segment: int) -> None:
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.segments += [segment] * len(ids)
        self.limits += [start] * len(ids)
        self.verdicts += [NO_VERDICT] * len(ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded tensors of several sequences, [batch, length]; `visible` is [batch, 1, query, key]."""

    ids: Tensor
    positions: Tensor
    visible: Tensor
    targets: Tensor
    kinds: Tensor
    verdicts: Tensor


def make_batch(chains: Sequence[PackedChain]) -> Batch:
    segments = _padded([chain.segments for chain in chains], PADDING_SEGMENT)
    limits = _padded([chain.limits for chain in chains], 0)
    return Batch(
        ids=_padded([chain.ids for chain in chains], 0),
        positions=_padded([chain.positions for chain in chains], 0),
        visible=_visibility(segments, limits),
        targets=_padded([chain.targets for chain in chains], 0),
        kinds=_padded([chain.kinds for chain in chains], NOT_LEARNT),
        verdicts=_padded([chain.verdicts for chain in chains], NO_VERDICT),
    )


def _visibility(segments: Tensor, limits: Tensor) -> Tensor:
    order = torch.arange(segments.shape[1])
    same_segment = segments[:, :, None] == segments[:, None, :]
    trunk_before = (segments[:, None, :] == TRUNK) & (order[None, None, :] < limits[:, :, None])
    return ((same_segment | trunk_before) & (order[None, :] <= order[:, None]))[:, None]


def _padded(rows: Sequence[Sequence[float]], filler: float) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows])
