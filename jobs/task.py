"""`python -m jobs.task PLAN.json`, or the overrides of jobs.generate: what slurm/generate.sbatch runs.

A pre-emption that comes before anybody listens would end the task without a requeue, so it listens first and imports
the rest, which takes seconds on a busy file system, after.
"""

import sys

from specreason_batch.pairs import Received


def main() -> None:
    received = Received()
    received.install()
    from jobs.array_task import run_task

    sys.exit(run_task(sys.argv[1:], received))


if __name__ == "__main__":
    main()
