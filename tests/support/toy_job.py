"""`jobs.generate` on real engines, for the nursery: vLLM takes seconds to import. It counts what they wrote."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import vllm.entrypoints.llm
import vllm.model_executor.models.qwen2  # noqa: F401

from specreason_batch.engines import Engines, started_engines
from tests.support.scripted_job import log_written, run_composed


@contextmanager
def counted_engines(*arguments: Any) -> Iterator[Engines]:
    with started_engines(*arguments) as engines:
        for engine in engines.values():
            poll = engine.poll
            engine.poll = lambda timeout, poll=poll: log_written(poll(timeout))  # type: ignore[method-assign, misc]
        yield engines


def main() -> None:
    run_composed(counted_engines)
