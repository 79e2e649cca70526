"""The Engine protocol over vLLM's offline `LLM`, by its own enqueue and step.

Owns: everything that is peculiar to vLLM, its traps (docs/vllm.md) and the two platforms; what concerns speculative
decoding is in `vllm_speculation`. No other files import vllm.
Does not know: roles, steps, grades, chains.
"""

import copy
import gc
import logging
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from specreason_batch.clock import Clock, WallClock
from specreason_batch.config import EngineConfig
from specreason_batch.engine import DeathCause, EngineDead, EngineInfo, SpeculationStats
from specreason_batch.engine_processes import EngineProcesses, Failure
from specreason_batch.types import Completion, FinishReason, InvalidInput, Request, Sampling
from specreason_batch.vllm_speculation import (
    check_cpu_speculation,
    counts_guesses,
    guesses_of,
    keep_torch_threads,
    kernels_left_alone,
    repair_cpu_workers,
    speculative_arguments,
    speculative_config,
)

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

CPU_KV_GIB = 4  # default KV cache of a CPU engine
CPU_BLOCK_SIZE = 32  # the least that vLLM's CPU attention takes; short blocks mean short re-prefills
MAX_SEED = 1 << 63
SPECULATIVE_LOGPROBS = 20  # what to ask for where logprob_token_ids does not work
CLOSE_SECONDS = 3.0  # that a living engine's processes get to end by themselves
BINDING = "VLLM_CPU_OMP_THREADS_BIND"


class VllmEngine:
    """One model under vLLM.

    `in_process` engines do their work inside `poll`, one scheduler step a call, and ring the clock as long as there is
    work left; others work in a process of their own, and ring when it has put something out or has died.
    """

    _in_process: ClassVar[weakref.WeakSet["VllmEngine"]] = weakref.WeakSet()  # those that live

    def __init__(self, config: EngineConfig, log_level: str = "ERROR", clock: Clock | None = None):
        """Load the model. Without a clock it rings one that nobody hears. Processes of its own end with this thread.

        Raises InvalidInput where vLLM does not take the configuration, EngineDead where it dies while starting.
        Whatever is raised, by a signal handler too, its processes are gone.
        """
        check_platform(config, log_level)
        _set_environment(config)
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError

        self._refusals = (VLLMValidationError, ValueError)
        self._deaths = (EngineDeadError,)
        self._speculative = bool(speculative_config(config))
        self._speculation = SpeculationStats()
        self._timeout = config.engine_timeout_seconds
        self.clock = clock or WallClock()
        self._processes = None if config.in_process else EngineProcesses()
        try:
            self._llm: Any = self._start(config)
        except BaseException:
            _end(self._processes)
            raise
        self._last_resort = weakref.finalize(self, _end, self._processes)  # at exit too, if nobody has closed it
        self._engine: Any = self._llm.llm_engine
        self._outputs_queue: Any = getattr(self._engine.engine_core, "outputs_queue", None)  # None: in-process
        assert (self._outputs_queue is None) == config.in_process
        if self._outputs_queue is not None:
            _ring_after(self._outputs_queue, "put_nowait", self.clock)
            _ring_after(self._engine.engine_core, "shutdown", self.clock)  # vLLM's monitor calls it at a sudden death
        else:
            self._in_process.add(self)
        self._templates: dict[Sampling, Any] = {}
        self._outstanding: set[str] = set()
        self._refused: list[Completion] = []
        self._last_sign_of_life = time.monotonic()
        self._lost = False  # its processes cannot be asked to end
        self._closed = False
        self.info = _read_info(self._engine, config)

    @property
    def num_outstanding(self) -> int:
        return len(self._outstanding) + len(self._refused)

    @property
    def speculation(self) -> SpeculationStats | None:
        return self._speculation if self._speculative and counts_guesses() else None

    def submit(self, requests: Sequence[Request]) -> None:
        if not self._outstanding:
            self._last_sign_of_life = time.monotonic()
        for request in requests:
            self._submit_one(request)
        self._ring_if_ready()

    def poll(self, timeout: float) -> list[Completion]:
        completions, self._refused = self._refused, []
        if not completions and self._outstanding and self._output_within(timeout):
            outputs = self._step()
            completions = [self._completion(output) for output in outputs if output.request_id in self._outstanding]
        self._ring_if_ready()
        return completions

    def abort(self, request_ids: Collection[str]) -> None:
        known = self._outstanding.intersection(request_ids)
        self._outstanding -= known
        if known:
            with suppress(*self._deaths):  # a dead engine has forgotten them
                self._engine.abort_request(list(known))

    def close(self) -> None:
        """Let the engine go before the interpreter does: at exit it would take seconds and print alarm.

        Takes under CLOSE_SECONDS + engine_processes.KILL_SECONDS, whatever state the engine is in.
        """
        if self._closed:
            return
        self._closed = True
        self._outstanding.clear()
        try:
            if self._processes is None:
                self._close_in_process()
            else:
                self._close_processes(self._processes)
        finally:
            self._last_resort()
            del self._llm, self._engine

    # --- start, end, death ---

    def _start(self, config: EngineConfig) -> Any:
        from vllm import LLM

        try:
            with ExitStack() as stack:
                stack.enter_context(_bound_to(config.cpu_cores, config.tensor_parallel_size))
                if self._processes is not None:
                    stack.enter_context(self._processes.starting())
                    stack.enter_context(_killed_if_it_fails(self._processes))
                stack.enter_context(kernels_left_alone())
                llm = LLM(**llm_arguments(config))
                repair_cpu_workers(llm)
                return llm
        except (RuntimeError, MemoryError, TimeoutError, *self._deaths) as error:
            message = f"the engine for {config.model!r} died while starting: {self._failure(error).reason}"
            raise EngineDead(message, cause=DeathCause.starting) from error
        except (TypeError, ValueError, OSError) as error:  # pydantic's ValidationError is a ValueError
            raise InvalidInput(f"vLLM does not take model {config.model!r} as configured: {error}") from error

    def _close_in_process(self) -> None:
        self._in_process.discard(self)
        with _groups_kept(bool(self._in_process)):
            self._engine.engine_core.shutdown()

    def _close_processes(self, processes: EngineProcesses) -> None:
        processes.lower_shield()
        if self._lost:
            processes.kill()
        self._engine.engine_core.shutdown(timeout=CLOSE_SECONDS)

    def _failure(self, error: BaseException) -> Failure:
        """What is known of it: the engine's processes know more than the exception here that tells of their end."""
        told = Failure.of(error)
        found = self._processes.failure() if self._processes is not None else told
        return found if found.reason else told

    def _death(self, error: BaseException) -> EngineDead:
        self._lost = True
        failure = self._failure(error)
        return EngineDead(f"the engine for {self.info.model!r} died: {failure.reason}", cause=failure.cause)

    # --- requests ---

    def _submit_one(self, request: Request) -> None:
        if fault := self._fault(request):
            return self._refuse(request, fault)
        prompt = {"type": "token", "prompt_token_ids": request.whole_prompt()}
        try:
            self._engine.add_request(request.request_id, prompt, self._parameters(request))
        except self._deaths as error:
            raise self._death(error) from error
        except self._refusals as error:
            return self._refuse(request, str(error))
        self._outstanding.add(request.request_id)

    def _fault(self, request: Request) -> str | None:
        """What vLLM would accept and then do wrongly: near the window it cuts completions short and says nothing."""
        if not request.num_prompt_tokens or request.max_tokens < 1:
            return "an empty prompt, or max_tokens under 1"
        needed = request.num_prompt_tokens + request.max_tokens
        if needed > self.info.max_model_len:
            return f"{needed} tokens do not fit the window of {self.info.max_model_len}"
        if request.seed is not None and not 0 <= request.seed < MAX_SEED:
            return f"seed {request.seed} is not in [0, 2^63): vLLM takes -1 for none, and larger ones kill it"
        return None

    def _refuse(self, request: Request, error: str) -> None:
        self._refused.append(Completion.refusal(request, error))

    def _parameters(self, request: Request) -> Any:
        """A shallow copy of the kind's SamplingParams: building one from scratch costs ten times as much."""
        template = self._templates.get(request.sampling)
        if template is None:
            template = self._templates[request.sampling] = self._template(request.sampling)
        parameters = copy.copy(template)
        parameters.seed, parameters.max_tokens = request.seed, request.max_tokens
        return parameters

    def _template(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        labels = list(sampling.logprob_token_ids)
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_token_ids=list(sampling.stop_token_ids),
            stop=list(sampling.stop_strings),
            include_stop_str_in_output=bool(sampling.stop_strings),
            detokenize=bool(sampling.stop_strings),
            logprobs=SPECULATIVE_LOGPROBS if labels and self._speculative else None,
            logprob_token_ids=labels if labels and not self._speculative else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )

    # --- completions ---

    def _ring_if_ready(self) -> None:
        """One ring stands for everything that was put out since the last wait, so what a poll leaves rings again."""
        queue = self._outputs_queue
        if self._refused or (self._outstanding and (queue is None or queue.queue)):
            self.clock.ring()

    def _output_within(self, timeout: float) -> bool:
        """Whether `step` has something to return without blocking; in-process it always works a step."""
        queue = self._outputs_queue
        if queue is None:
            return True
        with queue.not_empty:
            if queue.queue or queue.not_empty.wait(timeout):
                return True
        self._check_alive()
        silent = time.monotonic() - self._last_sign_of_life
        if silent > self._timeout:
            self._lost = True
            message = f"no output of the engine for {self.info.model!r} for {silent:.0f} s"
            raise EngineDead(message, cause=DeathCause.silent)
        return False

    def _check_alive(self) -> None:
        """A killed engine process puts nothing into the queue; vLLM's monitor only marks it dead."""
        try:
            self._engine.engine_core.ensure_alive()
        except self._deaths as error:
            raise self._death(error) from error

    def _step(self) -> list[Any]:
        try:
            outputs: list[Any] = self._engine.step()
        except self._deaths as error:
            raise self._death(error) from error
        except Exception as error:
            self.abort(list(self._outstanding))  # else it still holds them, and the next completions would be theirs
            failure = Failure.of(error)
            message = f"the engine for {self.info.model!r} raised {failure.reason}"
            raise EngineDead(message, cause=failure.cause) from error
        self._last_sign_of_life = time.monotonic()
        return [output for output in outputs if output.finished]

    def _completion(self, output: Any) -> Completion:
        self._outstanding.discard(output.request_id)
        generated = output.outputs[0]
        self._speculation += guesses_of(generated)
        first = generated.logprobs[0] if generated.logprobs else {}
        return Completion(
            request_id=output.request_id,
            token_ids=tuple(generated.token_ids),
            finish_reason=_finish_reason(generated.finish_reason),
            logprobs={id: entry.logprob for id, entry in first.items()},
            num_cached_tokens=output.num_cached_tokens or 0,
        )


def check_platform(config: EngineConfig, log_level: str = "ERROR") -> None:
    """Raises InvalidInput for what this machine cannot do, before a model is loaded."""
    _turn_down(log_level)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _check_cpu_arguments(config)
        _check_cores(config)
    elif config.cpu_cores is not None:
        raise InvalidInput(f"cpu_cores: {config.cpu_cores} binds CPU engines only; allowed on a GPU: null")


def gpu_library() -> Any | None:
    """NVML's Python binding where engines run on NVIDIA GPUs: what `devices` asks."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    from vllm.utils.import_utils import import_pynvml

    return import_pynvml()


def shared_out_cores(engines: int, taken: Collection[int] = ()) -> list[list[int]] | None:
    """Cores for each of these CPU engines out of those not taken, the first getting more; None: leave it to vLLM.

    That is on GPUs, where threads cannot be bound, and where the user's environment binds them. A physical core's
    hardware threads go to one engine, which uses one of them; with fewer cores than engines all of them share all.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or BINDING in os.environ or not hasattr(os, "sched_getaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    usable = sorted(allowed.difference(taken) or allowed, key=lambda core: (_siblings(core), core))
    if len(usable) < engines:
        return [usable] * engines
    ends = [-(-len(usable) * n // engines) for n in range(engines + 1)]
    return [_one_a_physical_core(usable[low:high]) for low, high in pairwise(ends)]


def llm_arguments(config: EngineConfig) -> dict[str, Any]:
    """What `vllm.LLM` is given; the configuration's `vllm_args` have the last word."""
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {
        "model": config.model,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "tensor_parallel_size": config.tensor_parallel_size,
        "trust_remote_code": config.trust_remote_code,
        "block_size": config.block_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "device_ids": config.device_ids,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if current_platform.is_cpu():
        arguments |= {
            "block_size": config.block_size or CPU_BLOCK_SIZE,
            "gpu_memory_utilization": None,
            "enforce_eager": True,
            # A seeded request whose prefill is chunked kills the CPU engine.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(config.max_model_len, 8192),
        }
    else:
        if config.kv_cache_gib is not None:
            arguments["kv_cache_memory_bytes"] = config.kv_cache_gib << 30
            if config.gpu_memory_utilization is None:
                # Sizes nothing then, but vLLM wants it free at the start: its 0.92 would refuse the second engine.
                arguments["gpu_memory_utilization"] = 0.01
        arguments["kv_offloading_size"] = config.kv_offload_gib
    arguments |= speculative_arguments(config, on_cpu=current_platform.is_cpu())
    given = {name: value for name, value in arguments.items() if value is not None}
    return given | config.vllm_args


def _check_cpu_arguments(config: EngineConfig) -> None:
    """Refuse here what would kill a CPU engine later, or end its start with the process's state in pieces."""
    if config.kv_offload_gib is not None:
        raise InvalidInput(f"kv_offload_gib: {config.kv_offload_gib} needs a GPU; allowed on a CPU: null")
    if config.vllm_args.get("kv_offloading_size"):
        raise InvalidInput("vllm_args.kv_offloading_size: KV offloading needs a GPU; allowed on a CPU: none")
    if config.vllm_args.get("enable_chunked_prefill"):
        raise InvalidInput("vllm_args.enable_chunked_prefill: True kills a CPU engine at its first seeded request")
    if config.vllm_args.get("max_num_batched_tokens", config.max_model_len) < config.max_model_len:
        raise InvalidInput(
            f"vllm_args.max_num_batched_tokens: {config.vllm_args['max_num_batched_tokens']} is under max_model_len="
            f"{config.max_model_len}; a CPU engine cannot prefill in chunks"
        )
    check_cpu_speculation(config)
    blocks = config.vllm_args.get("num_gpu_blocks_override")
    block_size = config.vllm_args.get("block_size", config.block_size or CPU_BLOCK_SIZE)
    needed = -(-config.max_model_len // block_size) + 1  # vLLM keeps one to itself
    if blocks is not None and blocks < needed:
        raise InvalidInput(
            f"vllm_args.num_gpu_blocks_override: {blocks} blocks do not hold max_model_len={config.max_model_len}; "
            f"allowed: at least {needed}"
        )


def _check_cores(config: EngineConfig) -> None:
    if config.cpu_cores is None:
        return
    if not hasattr(os, "sched_getaffinity"):
        raise InvalidInput(f"cpu_cores: {config.cpu_cores} cannot be bound on this system; allowed: null")
    usable = os.sched_getaffinity(0)
    if barred := set(config.cpu_cores) - usable:
        raise InvalidInput(f"cpu_cores: this process may not use {sorted(barred)}; allowed: some of {sorted(usable)}")


def _siblings(core: int) -> tuple[int, ...]:
    """The hardware threads of this core's physical core."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        parts = [part.split("-") for part in path.read_text().strip().split(",")]
    except OSError:
        return (core,)
    return tuple(core for part in parts for core in range(int(part[0]), int(part[-1]) + 1))


def _one_a_physical_core(cores: list[int]) -> list[int]:
    return sorted({_siblings(core): core for core in reversed(cores)}.values())


@contextmanager
def _bound_to(cores: list[int] | None, workers: int) -> Iterator[None]:
    """Meanwhile, processes started from this thread run on these cores only, one OpenMP thread a core.

    vLLM binds a worker's OpenMP threads and nothing else. What they wait for, the engine's scheduler, would run on the
    other engine's cores and halve its speed, so the affinity is handed down too. This process keeps its own: it is
    given back to this thread and to those that began meanwhile.
    """
    if cores is None:
        yield
        return
    threads, allowed, binding = _own_threads(), os.sched_getaffinity(0), os.environ.get(BINDING)
    os.environ[BINDING] = "|".join(",".join(map(str, cores[rank::workers])) for rank in range(workers))
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        for thread in {0} | (_own_threads() - threads):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, allowed)
        if binding is None:
            del os.environ[BINDING]
        else:
            os.environ[BINDING] = binding


def _own_threads() -> set[int]:
    """Of this process, those of libraries included."""
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


def _end(processes: EngineProcesses | None) -> None:
    if processes is not None:
        processes.end()


@contextmanager
def _killed_if_it_fails(processes: EngineProcesses) -> Iterator[None]:
    """Meanwhile vLLM's way to end engine processes begins with killing these.

    It would ask them to end, which those that are still starting do not, and wait five seconds before it kills them.
    Other threads end other engines.
    """
    from vllm.v1.engine.utils import CoreEngineProcManager

    shutdown: Callable[..., None] = CoreEngineProcManager.shutdown
    thread = threading.get_ident()

    def kill_first(manager: Any, timeout: float | None = None) -> None:
        if threading.get_ident() == thread:
            processes.kill()
        shutdown(manager, timeout)

    CoreEngineProcManager.shutdown = kill_first
    try:
        yield
    finally:
        CoreEngineProcManager.shutdown = shutdown


@contextmanager
def _groups_kept(kept: bool) -> Iterator[None]:
    """Meanwhile, an in-process engine that ends leaves torch's process groups alone: others work with them."""
    from vllm.v1.engine import core

    clean_up = core.cleanup_dist_env_and_memory
    if kept:
        core.cleanup_dist_env_and_memory = gc.collect
    try:
        yield
    finally:
        core.cleanup_dist_env_and_memory = clean_up


def _ring_after(target: Any, method: str, clock: Clock) -> None:
    """Have this one object's method ring when it is done."""
    call = getattr(target, method)

    def ringing(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        finally:
            clock.ring()

    setattr(target, method, ringing)


def _turn_down(log_level: str) -> None:
    """vLLM's and torch's chatter, here and in the engine's processes; some of it comes before vLLM sets up its log."""
    os.environ["VLLM_LOGGING_LEVEL"] = log_level
    logging.getLogger("vllm").setLevel(log_level)
    if log_level == "ERROR":
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        logging.getLogger("torch._library.triton").setLevel(log_level)
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def _set_environment(config: EngineConfig) -> None:
    """vLLM reads these when an engine is built, so each engine sets its own before; an in-process one freezes them."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if config.in_process else "1"
    os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"  # a forked process loads no plugin: no engine_child
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib or CPU_KV_GIB)
    keep_torch_threads()
    from vllm.envs import disable_envs_cache

    disable_envs_cache()


def _read_info(engine: Any, config: EngineConfig) -> EngineInfo:
    import vllm

    model, cache = engine.vllm_config.model_config, engine.vllm_config.cache_config
    return EngineInfo(
        model=config.model,
        max_model_len=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        kv_capacity_tokens=_kv_capacity(cache, model.max_model_len),
        block_size=cache.block_size,
        version=f"vllm {vllm.__version__}",
    )


def _kv_capacity(cache: Any, window: int) -> int:
    """Tokens that requests can hold at once, in whole blocks.

    One block of the pool belongs to no request. vLLM's own figure counts it, and is short by the unused end of each
    window's last block; it is needed for models whose layers keep several tables, where a token takes several blocks.
    """
    usable = cache.num_gpu_blocks - 1
    if not cache.kv_cache_size_tokens:
        return int(usable * cache.block_size)
    windows = cache.kv_cache_size_tokens / window  # that the whole pool holds
    blocks_a_window = -(-window // cache.block_size)
    blocks = round(windows * blocks_a_window * usable / cache.num_gpu_blocks)
    return int(blocks * cache.block_size)


def _finish_reason(reason: str | None) -> FinishReason:
    """Anything but stop and length (abort, error, repetition) leaves tokens that must not be used."""
    return FinishReason(reason) if reason in ("stop", "length") else FinishReason.abort
