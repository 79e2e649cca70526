"""Speculative decoding under vLLM: what an engine is asked for, what it tells, and vLLM's faults in it on CPUs.

Owns: `speculative_config`, its statistics, and the repairs, none of which touches a GPU's engine (docs/speculative.md).
Does not know: requests, engines' lives (vllm_engine).
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from specreason_batch.config import EngineConfig
from specreason_batch.engine import SpeculationStats
from specreason_batch.types import InvalidInput

_CPU_WORKER = f"{__name__}.SpeculatingCpuWorker"

# --- what is asked for ---


def speculative_config(config: EngineConfig) -> dict[str, Any]:
    """vLLM's dictionary; empty: no speculative decoding."""
    speculative = config.speculative
    if not speculative.is_on:
        return dict(config.vllm_args.get("speculative_config") or {})
    named = {name: value for name, value in vars(speculative).items() if name != "args" and value is not None}
    return named | speculative.args


def speculative_arguments(config: EngineConfig, on_cpu: bool) -> dict[str, Any]:
    """Its part of what `vllm.LLM` is given."""
    speculative = speculative_config(config)
    if not speculative:
        return {}
    arguments: dict[str, Any] = {"speculative_config": speculative}
    if on_cpu:
        arguments["worker_extension_cls"] = _CPU_WORKER
    if counts_guesses():
        arguments["per_request_spec_decode_metrics"] = "summary"
    return arguments


def check_cpu_speculation(config: EngineConfig) -> None:
    """Raises InvalidInput for a worker class of the user's in the place of ours."""
    if speculative_config(config) and config.vllm_args.get("worker_extension_cls"):
        raise InvalidInput(
            f"vllm_args.worker_extension_cls: {config.vllm_args['worker_extension_cls']!r} stands where speculative "
            "decoding on a CPU needs its own; allowed: none"
        )


# --- what it tells ---


def counts_guesses() -> bool:
    """Whether this vLLM counts guessed tokens with each request."""
    from vllm.engine.arg_utils import EngineArgs

    return "per_request_spec_decode_metrics" in EngineArgs.__dataclass_fields__


def guesses_of(generated: Any) -> SpeculationStats:
    """Of one completed request: `histogram[n]` is how often n guessed tokens were accepted at a time."""
    metrics = getattr(generated, "spec_decode_metrics", None)
    if metrics is None:
        return SpeculationStats()
    return SpeculationStats(
        num_drafts=sum(metrics.histogram),
        num_drafted_tokens=metrics.num_draft_tokens,
        num_accepted_tokens=sum(accepted * times for accepted, times in enumerate(metrics.histogram)),
    )


# --- faults of vLLM's CPU builds ---


def repair_cpu_workers(llm: Any) -> None:
    """Repair the workers of an engine that was given ours; others are left as they are."""
    if llm.llm_engine.vllm_config.parallel_config.worker_extension_cls == _CPU_WORKER:
        llm.collective_rpc("repair_sampling")


class SpeculatingCpuWorker:
    """Mixed into the workers of a CPU engine that speculates, in whatever process they are."""

    def repair_sampling(self) -> None:
        """Two faults in how guessed tokens are checked, both seen on 0.32.0.

        The stand-in for a Triton kernel fills copies that it throws away, so that uninitialised memory is taken for
        temperature, top_p and top_k: sampled completions are wrong and differ from run to run (vllm-project/vllm issue
        55005, open). A release that has it right keeps its own. And top_k raises in a pass in which nothing was
        guessed, which ends the engine (no public issue found): no rows are then passed on.
        """
        from vllm.v1.sample import rejection_sampler

        if not _expands(rejection_sampler.expand_batch_to_tokens):
            rejection_sampler.expand_batch_to_tokens = _expand_batch_to_tokens
        constrain = rejection_sampler.apply_sampling_constraints
        if constrain.__module__ != __name__:
            rejection_sampler.apply_sampling_constraints = _constrain_if_any(constrain)


def _expands(expand: Callable[..., Any]) -> bool:
    """Whether it repeats each request's value for each of its guessed tokens."""
    import torch

    values, ends = torch.tensor([0.5, 0.0]), torch.tensor([1, 3], dtype=torch.int32)
    return bool(expand(values, ends, 3, replace_from=0, replace_to=1).tolist() == [0.5, 1.0, 1.0])


def _expand_batch_to_tokens(values: Any, ends: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Any:
    """vLLM's function of this name, by its contract. `ends`: the cumulative numbers of guessed tokens."""
    counts = ends.diff(prepend=ends.new_zeros(1))
    replaced = values.masked_fill(values == replace_from, replace_to)
    return replaced.repeat_interleave(counts, output_size=num_tokens)


def _constrain_if_any(constrain: Callable[..., Any]) -> Callable[..., Any]:
    def constrain_if_any(logits: Any, *args: Any) -> Any:
        return constrain(logits, *args) if logits.shape[0] else logits

    return constrain_if_any


def keep_torch_threads() -> None:
    """Have numba, which n-gram speculation uses, work in threads of its own, here and in the engine's processes.

    In OpenMP's it sets the number of torch's threads to that of all cores (numba/numba issue 9387): on a busy machine
    an engine of one thread became 30 times slower. vLLM never has it use more than one.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")


@contextmanager
def kernels_left_alone() -> Iterator[None]:
    """Meanwhile, kernels that vLLM has replaced in this process are not replaced again; on GPUs it replaces none.

    n-gram speculation imports numba, on one of whose objects the search for what to replace raises (`_lib_fn_wrapper`
    object has no attribute `get`; 0.32.0, no public issue found): no other in-process engine could start after that.
    """
    dispatcher: Any = sys.modules.get("vllm.triton_utils.dispatcher")
    if not getattr(dispatcher, "_registry", None):
        yield
        return
    register = dispatcher.register_kernels
    dispatcher.register_kernels = lambda overrides: None
    try:
        yield
    finally:
        dispatcher.register_kernels = register
