"""`jobs.generate` on real engines, for the nursery: vLLM takes seconds to import."""

import vllm.entrypoints.llm
import vllm.model_executor.models.qwen2  # noqa: F401

from specreason_batch.engines import started_engines
from tests.support.scripted_job import run_composed


def main() -> None:
    run_composed(started_engines)
