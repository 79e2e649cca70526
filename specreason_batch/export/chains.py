"""Chains as they were committed, read part by part with their steps and verdicts. Does not know: filters, formats."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa

from specreason_batch.export.runs import Part, Run, damaged, open_file
from specreason_batch.store.verdicts import Verdict, VerdictBasis
from specreason_batch.types import InvalidInput, Message, Row

BATCH_CHAINS = 256  # that are in memory at once
KEYS = ("prompt_id", "sample_index", "step_index")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedChain:
    """A chain as it was committed."""

    run: Run
    row: Row  # of `chains`; the columns that were asked for
    steps: Sequence[Row] = ()  # of `steps`, in order; empty if they were not asked for
    verdict: Verdict | None = None
    basis: VerdictBasis | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.row["prompt_id"], self.row["sample_index"]

    @property
    def prompt(self) -> str:
        return str(self.row["prompt"])

    @property
    def thinking(self) -> str:
        return str(self.row["thinking"])

    @property
    def answer(self) -> str | None:
        """None: it was never asked for."""
        answer: str | None = self.row["answer"]
        return answer

    @property
    def num_thinking_tokens(self) -> int:
        """Of its kept steps, by whoever wrote each."""
        return int(self.row["num_draft_tokens_kept"] + self.row["num_base_tokens"])

    @property
    def turns(self) -> list[Message]:
        """What was asked: perhaps a system turn, then the user's, or a whole conversation."""
        conversation = [Message(turn["role"], turn["content"]) for turn in self.row.get("input_messages") or ()]
        turns = conversation or [Message("user", self.prompt)]
        system = self.row.get("input_system_prompt")
        system = self.run.system_prompt if system is None else system
        return turns if system is None or turns[0].role == "system" else [Message("system", system), *turns]

    @property
    def asked(self) -> str:
        """The user's words."""
        return "\n".join(turn.content for turn in self.turns if turn.role == "user")

    @property
    def is_right(self) -> bool | None:
        """None: not verified, or it cannot be said."""
        return self.verdict is Verdict.right if self.verdict in (Verdict.right, Verdict.wrong) else None

    def step_text(self, step: Row) -> str:
        return self.thinking[step["start"] : step["end"]]


def read_part_chains(
    run: Run, part: Part, columns: Sequence[str], step_columns: Sequence[str]
) -> Iterator[list[FinishedChain]]:
    """All chains of a part in their order, some at a time; steps too where some of their columns are asked for.

    Raises InvalidInput that names the file if one is damaged, or they do not fit together.
    """
    verdicts = _verdicts(part)
    steps = _steps_of(part, step_columns) if step_columns else None
    there = open_file(part.chains).schema_arrow.names
    for rows in _batches(part.chains, [name for name in columns if name in there]):
        yield [_chain(run, row, steps(row) if steps else [], verdicts) for row in rows]


def _chain(run: Run, row: Row, steps: Sequence[Row], verdicts: dict[tuple[str, int], Row]) -> FinishedChain:
    found = verdicts.get((row["prompt_id"], row["sample_index"]), {})
    verdict, basis = found.get("verdict"), found.get("basis")
    return FinishedChain(
        run=run,
        row=row,
        steps=steps,
        verdict=Verdict(verdict) if verdict else None,
        basis=VerdictBasis(basis) if basis else None,
    )


def _steps_of(part: Part, columns: Sequence[str]) -> Callable[[Row], Sequence[Row]]:
    """Takes chains in their order and gives each one's steps: a part's steps lie in the order of its chains."""
    wanted = list(dict.fromkeys([*KEYS, *columns]))
    rows = (row for batch in _batches(part.steps, wanted, BATCH_CHAINS * 8) for row in batch)

    def take(chain: Row) -> Sequence[Row]:
        found = list(islice(rows, chain["num_steps"]))
        keys = [tuple(step[name] for name in KEYS) for step in found]
        if keys != [(chain["prompt_id"], chain["sample_index"], index) for index in range(chain["num_steps"])]:
            raise InvalidInput(
                f"{part.steps} does not fit {part.chains.name} of chains/: the {chain['num_steps']} steps of "
                f"{chain['prompt_id']!r}, sample {chain['sample_index']}, are not there; the part is damaged"
            )
        return found

    return take


def _verdicts(part: Part) -> dict[tuple[str, int], Row]:
    if part.verdicts is None:
        return {}
    batches = _batches(part.verdicts, ["prompt_id", "sample_index", "verdict", "basis"])
    return {(row["prompt_id"], row["sample_index"]): row for rows in batches for row in rows}


def _batches(path: Path, columns: Sequence[str], size: int = BATCH_CHAINS) -> Iterator[list[Row]]:
    try:
        for batch in open_file(path).iter_batches(size, columns=list(columns), use_threads=False):
            yield batch.to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise damaged(path, error) from error
