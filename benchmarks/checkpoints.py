"""What a checkpoint costs: the loop stands still while it is written. `python -m benchmarks.checkpoints`.

Chains of random token ids (which hardly compress), every second step with a rejected draft, as many as the engines may
hold, and finished ones that wait for their part. Medians of five; then one JSON line.
"""

import json
import os
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from specreason_batch.chain import Usage
from specreason_batch.config import LeaseConfig
from specreason_batch.store.attempts import AttemptState, Lease
from specreason_batch.store.checkpoints import About, Saved, read_checkpoint, write_checkpoint
from specreason_batch.types import EndedBy, Grade, Role, Step, WrittenStep

STEP_TOKENS = 60
VOCABULARY = 150_000
CASES = ((64, 8_000), (64, 32_000), (256, 8_000), (1_064, 8_000))  # chains, tokens each
REPEATS = 5


def written(author: Role, chance: random.Random) -> WrittenStep:
    ids = tuple(chance.choices(range(VOCABULARY), k=STEP_TOKENS))
    return WrittenStep(author, EndedBy.blank_line, dict.fromkeys(Role, ids), STEP_TOKENS)


def step(index: int, chance: random.Random) -> Step:
    rejected = written(Role.draft, chance) if index % 2 else None
    return Step(written(Role.base, chance), rejected, Grade((0.1,) * 10, 1.0, 4.5), rejected is None, index)


def measure(num_chains: int, num_tokens: int, root: Path) -> dict[str, float]:
    """Seconds to write and to read one, and its size in MiB."""
    chance = random.Random(0)
    chains = {
        (f"p{number}", 0): Saved(
            [step(index, chance) for index in range(num_tokens // STEP_TOKENS)], None, None, Usage()
        )
        for number in range(num_chains)
    }
    lease = Lease.acquire(root, LeaseConfig())
    about = partial(About, "f00d", "5:abc", 1, 1, 0)
    writing, reading = [], []
    for _ in range(REPEATS):
        began = time.perf_counter()
        folder = write_checkpoint(root, lease, about, chains, [], keep=2)
        writing.append(time.perf_counter() - began)
        began = time.perf_counter()
        assert read_checkpoint(root, "f00d", "5:abc", print) is not None
        reading.append(time.perf_counter() - began)
    size = sum(path.stat().st_size for path in folder.iterdir())
    lease.end(AttemptState.finished)
    return {"write": statistics.median(writing), "read": statistics.median(reading), "MiB": size / (1 << 20)}


def main() -> None:
    table = Table("chains", "tokens each", "write, s", "of a minute", "read, s", "MiB")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (num_chains, num_tokens) in enumerate(CASES):
            cost = measure(num_chains, num_tokens, Path(folder) / str(number))
            share = f"{cost['write'] / 60:.1%}"
            figures = (f"{cost['write']:.2f}", share, f"{cost['read']:.2f}", f"{cost['MiB']:.1f}")
            table.add_row(f"{num_chains:,}", f"{num_tokens:,}", *figures)
            found.append({"chains": num_chains, "tokens": num_tokens} | cost)
    Console().print(table)
    print(json.dumps({"cores": os.cpu_count(), "cases": found}))


if __name__ == "__main__":
    main()
