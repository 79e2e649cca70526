"""One run on the test cluster: its prompts, its output, and the commands that a user would type."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from specreason_batch.store.reading import scan
from specreason_batch.submission import Submission
from tests.slurm.cluster import Cluster, wait_for
from tests.support.scripted_job import overrides
from tests.test_run import write_prompts

ROOT = Path(__file__).parent.parent.parent
PROMPTS_PER_SHARD = 6

# Stands in as PYTHON: `-m jobs.generate` is the scripted job, all else is Python itself.
STAND_IN = """#!/usr/bin/env bash
if [[ $1 == -m && $2 == jobs.generate ]]; then
    shift 2
    {first}
    exec {python} -m tests.support.scripted_job "$@"
fi
exec {python} "$@"
"""


@dataclass(slots=True)
class Place:
    """Folder and cluster of one test. `first`: a shell line that each job starts with."""

    cluster: Cluster
    folder: Path
    pace: float = 0.0  # seconds that a poll of the scripted engines takes
    first: str = ":"
    jobs: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def write_shards(self, number: int) -> None:
        for shard in range(number):
            names = [f"s{shard}p{row}" for row in range(PROMPTS_PER_SHARD)]
            columns = {"prompt_id": names, "gold_answer": ["6"] * PROMPTS_PER_SHARD}
            write_prompts(self.folder / "prompts" / f"s{shard}.parquet", PROMPTS_PER_SHARD, **columns)

    def words(self) -> list[str]:
        """What a user of the scripted job types after the job's name."""
        return [
            *overrides(self.folder),
            f"input.path={self.folder}/prompts",
            f"output_dir={self.output}",
            "schedule=lockstep",
            "schedule.active_size=3",
            "log.seconds=1",
            "checkpoint.seconds=0",
            "lease.beat_seconds=0.3",
            "lease.stale_seconds=3",
        ]

    def submit(self, *words: str, check: bool = True) -> str:
        """`python -m jobs.submit` with these words beside the run's own; what it prints."""
        printed = self.call(sys.executable, "-m", "jobs.submit", *self.words(), "gpus_per_pair=1", *words, check=check)
        self.jobs += [id for plan in self.plans[-1:] for id in plan.jobs.values() if id not in self.jobs]
        return printed

    def call(self, *words: str, check: bool = True) -> str:
        """A command on the login node."""
        stand_in = self.folder / "python"
        stand_in.write_text(STAND_IN.format(python=sys.executable, first=self.first))
        stand_in.chmod(0o755)
        return self.cluster.call(
            *words,
            folder=ROOT,
            check=check,
            PYTHON=str(stand_in),
            SCRIPTED_PACE=str(self.pace),
            TMPDIR=str(self.folder),
        )

    @property
    def plans(self) -> list[Submission]:
        return [Submission.read(path) for path in sorted((self.output / "slurm").glob("submission-*.json"))]

    def log(self, task: str) -> str:
        path = self.output / "slurm" / f"{task}.log"
        return path.read_text() if path.exists() else ""

    def wait_for_log(self, task: str, text: str, seconds: float = 60.0) -> None:
        wait_for(f"{text!r} in the log of {task}", lambda: text in self.log(task), seconds)

    def chains(self) -> Counter[tuple[str, int]]:
        """How often each chain stands in the output."""
        frame = scan(self.output, "chains")
        rows = [] if frame is None else frame.select("prompt_id", "sample_index").collect().rows()
        return Counter((prompt_id, sample_index) for prompt_id, sample_index in rows)

    def expected(self, num_shards: int) -> Counter[tuple[str, int]]:
        """Each chain of these shards once."""
        return Counter({(f"s{shard}p{row}", 0): 1 for shard in range(num_shards) for row in range(PROMPTS_PER_SHARD)})

    def cancel_everything(self) -> None:
        for job in self.jobs:
            self.cluster.call("scancel", "--quiet", job, check=False)
        wait_for(
            "an empty queue",
            lambda: not self.cluster.call("squeue", "--noheader", "--states=all", "--format=%T").count("COMPLETING"),
        )
