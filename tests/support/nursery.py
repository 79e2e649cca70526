"""Starts real jobs as processes of their own in a fraction of a second: it has imported what they need, and forks.

`python -m tests.support.nursery MODULE`, where MODULE's `main()` is the job. A line of JSON on standard input,
`{"argv": [...], "env": {...}, "log": path}`, starts one and is answered with its process id; when it is over, with its
exit status (negative: the signal). The test kills what it likes in between.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parent.parent.parent


class Nursery:
    """The test's side."""

    def __init__(self, module: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.nursery", module],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, _type: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def start(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> int:
        """A new job's process id."""
        assert self._process.stdin is not None
        order = {"argv": list(argv), "env": dict(env or {}), "log": str(log)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """The job's exit status; negative: the number of the signal that ended it."""
        return int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


PRELOADED = (
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2",
    "hydra._internal.config_loader_impl",
)


def _serve(module: str) -> None:
    main = importlib.import_module(module).main
    for name in PRELOADED:  # imported late by the job, and slow to import
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _be_the_job(main, order)
        print(pid, file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _be_the_job(main, order) -> None:  # type: ignore[no-untyped-def]
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ.update(order["env"])
    sys.argv[1:] = order["argv"]
    status = 0
    try:
        main()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException as error:
        print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
