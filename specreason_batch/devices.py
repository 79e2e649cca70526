"""Whether this machine's GPUs can carry a run: before engines start, and after one has died.

Owns: the checks whose failing is the machine's trouble (BadNode), so that the job goes elsewhere and does not try again
here. Everything is asked of NVML, which makes no CUDA context: one in this process would hold memory and break engines.
Does not know: vLLM, how engines are built.
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from specreason_batch.config import EngineConfig, GenerateConfig
from specreason_batch.engine import BadNode
from specreason_batch.types import InvalidInput, Role

GIB = 1 << 30
DEFAULT_UTILIZATION = 0.92  # vLLM's own where none is configured
FREEING_SECONDS = 30.0  # that memory of a process that has just ended gets to be free
CHECK_SECONDS = 0.5  # between looks at it
XID_MILLISECONDS = 500  # that the driver gets to tell what an engine died of
NODE_CHECK_SECONDS = 300.0
LAST_LINES = 5  # of a failed check's output

# Xid errors that programs cause, a killed engine among them: by NVIDIA's catalogue the GPU is sound after these.
PROGRAM_XIDS = {13, 31, 43, 45, 68, 109}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or slice of one, that the job sees."""

    number: int  # among those that the job sees
    name: str
    handle: Any  # NVML's
    whole: Any  # of the GPU that this is a slice of; `handle` where it is none

    def __str__(self) -> str:
        return f"GPU {self.number} ({self.name})"


class DeviceWatch:
    """The GPUs of a run's engines. Without NVML (CPU engines) it has nothing to find.

    Build it before the engines: it counts errors from here on.
    """

    def __init__(
        self,
        config: GenerateConfig,
        roles: Collection[Role],
        nvml: Any | None,
        freeing_seconds: float = FREEING_SECONDS,
    ):
        """`nvml`: the pynvml module. Raises InvalidInput for GPUs that the job does not see, BadNode."""
        self._engines = {role: config.engine(role) for role in roles}
        self._nvml: Any = nvml
        self._freeing_seconds = freeing_seconds
        self._gpus: dict[Role, list[Gpu]] = {}
        self._joules: float | None = None  # on the GPUs' counters when this was built
        if nvml is None:
            return
        try:
            nvml.nvmlInit()
            seen = _visible_gpus(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        except nvml.NVMLError as error:
            raise BadNode(f"the NVIDIA driver does not answer: {error}") from error
        self._gpus = {role: _gpus_of(role, engine, seen) for role, engine in self._engines.items()}
        self._events = self._watch_xids()
        self._ecc_errors = {gpu.number: self._num_ecc_errors(gpu) for gpu in self._all_gpus()}
        self._joules = self._joules_on_counters()

    def check_before(self, roles: Collection[Role] | None = None) -> None:
        """Whether the engines of these roles (None: all) find the memory they need, once it had time to become free.

        Raises InvalidInput where no GPU of this size would do, BadNode where somebody else holds it.
        """
        deadline = time.monotonic() + self._freeing_seconds
        for gpu, shares in self._shares(self._gpus.keys() if roles is None else roles):
            while (problem := self._memory_problem(gpu, shares)) is not None:
                if time.monotonic() >= deadline:
                    raise BadNode(problem)
                time.sleep(CHECK_SECONDS)

    def check_after_death(self) -> None:
        """Raises BadNode if a GPU has failed since this was built."""
        xids = self._new_xids()
        for gpu in self._all_gpus():
            try:
                self._nvml.nvmlDeviceGetMemoryInfo(gpu.handle)
                ecc_errors = self._num_ecc_errors(gpu)
            except self._nvml.NVMLError as error:
                raise BadNode(f"{gpu} does not answer any more: {error}") from error
            if new := ecc_errors - self._ecc_errors[gpu.number]:
                raise BadNode(f"{gpu} had {new} uncorrectable memory errors since the run began")
        if xids:
            raise BadNode(f"the NVIDIA driver reported Xid {', '.join(map(str, sorted(xids)))} since the run began")

    @property
    def device_names(self) -> tuple[str, ...]:
        """Of the GPUs that the engines run on."""
        return tuple(gpu.name for gpu in self._all_gpus())

    def read_joules(self) -> float | None:
        """What they have used since this was built. None: there are none, or the driver does not tell of each.

        A slice's share of its GPU's energy is not told.
        """
        now = self._joules_on_counters()
        return None if now is None or self._joules is None else now - self._joules

    def close(self) -> None:
        """Let NVML go. May be called twice."""
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
        self._nvml, self._gpus = None, {}

    def _all_gpus(self) -> list[Gpu]:
        return list({gpu.number: gpu for gpus in self._gpus.values() for gpu in gpus}.values())

    def _joules_on_counters(self) -> float | None:
        gpus = self._all_gpus()
        if not gpus or any(gpu.whole is not gpu.handle for gpu in gpus):
            return None
        try:
            millijoules = [int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle)) for gpu in gpus]
            return sum(millijoules) / 1000
        except self._nvml.NVMLError:
            return None

    # --- memory ---

    def _shares(self, roles: Collection[Role]) -> Iterator[tuple[Gpu, Mapping[Role, EngineConfig]]]:
        """Each GPU with the engines that share it."""
        for gpu in self._all_gpus():
            shares = {role: self._engines[role] for role in roles if gpu in self._gpus[role]}
            if shares:
                yield gpu, shares

    def _memory_problem(self, gpu: Gpu, shares: Mapping[Role, EngineConfig]) -> str | None:
        """What is wrong as things stand. Raises InvalidInput, BadNode where waiting will not help."""
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(gpu.handle)
        except self._nvml.NVMLError as error:
            raise BadNode(f"{gpu} does not answer: {error}") from error
        needs = {role: _needed_bytes(engine, memory.total) for role, engine in shares.items()}
        needed = sum(needs.values())
        if needed > memory.total:
            raise InvalidInput(_too_much(gpu, shares, needs, memory.total))
        if needed <= memory.free:
            return None
        return (
            f"{gpu}: {memory.free / GIB:.1f} of {memory.total / GIB:.1f} GiB are free, {needed / GIB:.1f} are needed; "
            f"held by {self._holders(gpu) or 'processes that NVML does not name'}"
        )

    def _holders(self, gpu: Gpu) -> str:
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(gpu.handle)
        except self._nvml.NVMLError:
            return ""
        return ", ".join(f"pid {process.pid}{_size(process.usedGpuMemory)}" for process in processes)

    # --- errors ---

    def _watch_xids(self) -> Any | None:
        """An event set; None where the driver tells nothing of Xid errors (some virtual GPUs, WSL)."""
        try:
            events = self._nvml.nvmlEventSetCreate()
            for gpu in self._all_gpus():
                self._nvml.nvmlDeviceRegisterEvents(gpu.whole, self._nvml.nvmlEventTypeXidCriticalError, events)
        except self._nvml.NVMLError:
            return None
        return events

    def _new_xids(self) -> set[int]:
        xids: set[int] = set()
        while self._nvml is not None and self._events is not None:
            try:
                xids.add(self._nvml.nvmlEventSetWait(self._events, XID_MILLISECONDS).eventData)
            except self._nvml.NVMLError_Timeout:
                break
            except self._nvml.NVMLError as error:
                raise BadNode(f"the NVIDIA driver does not answer any more: {error}") from error
        return xids - PROGRAM_XIDS

    def _num_ecc_errors(self, gpu: Gpu) -> int:
        """Uncorrectable ones since the driver was loaded; 0 on GPUs that do not count them."""
        nvml = self._nvml
        try:
            kind, period = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            return int(nvml.nvmlDeviceGetTotalEccErrors(gpu.whole, kind, period))
        except nvml.NVMLError_NotSupported:
            return 0


def run_node_check(command: str | None, timeout: float = NODE_CHECK_SECONDS) -> None:
    """The user's own check of this machine, through the shell; whatever it started has ended when this returns.

    Raises BadNode with the end of its output if its status is not 0, or after `timeout` seconds.
    """
    if command is None:
        return
    with tempfile.TemporaryFile() as output:  # a pipe would be waited for as long as anybody holds it
        status = _status_of(command, output, timeout)
        if status == 0:
            return
        how = f"was not done after {timeout:.0f} s" if status is None else f"ended with status {status}"
        raise BadNode(f"recovery.node_check: {command!r} {how}{_end_of(output)}")


def _status_of(command: str, output: IO[bytes], timeout: float) -> int | None:
    """Of a shell command; None: it did not end in time. A group of its own, so that all of it can be ended."""
    process = subprocess.Popen(
        command, shell=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end_of(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read().decode(errors="replace").splitlines()[-LAST_LINES:]
    return ":\n" + "\n".join(lines) if lines else " and said nothing"


# --- which GPUs ---


def _visible_gpus(nvml: Any, visible: str | None) -> list[Gpu]:
    """Those of CUDA_VISIBLE_DEVICES (numbers, UUIDs or their beginnings, MIG ids), in its order; unset or empty: all.

    Raises InvalidInput for one that is not there, NVMLError.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if not visible:
        return [_gpu(nvml, number, handle) for number, handle in enumerate(handles)]
    wanted = [entry.strip() for entry in visible.split(",")]
    return [_gpu(nvml, number, _handle(nvml, handles, entry)) for number, entry in enumerate(wanted)]


def _handle(nvml: Any, handles: list[Any], entry: str) -> Any:
    if entry.isdigit() and int(entry) < len(handles):
        return handles[int(entry)]
    if entry.startswith("GPU-"):
        for handle in handles:
            if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(entry):
                return handle
    if entry.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(entry)
    raise InvalidInput(
        f"CUDA_VISIBLE_DEVICES: {entry} is not on this machine; allowed: some of its {len(handles)} GPUs"
    )


def _gpu(nvml: Any, number: int, handle: Any) -> Gpu:
    whole = handle
    try:
        if nvml.nvmlDeviceIsMigDeviceHandle(handle):
            whole = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        pass  # a driver from before there were slices
    return Gpu(number, _text(nvml.nvmlDeviceGetName(handle)), handle, whole)


def _text(value: str | bytes) -> str:
    """Old NVML bindings give bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _gpus_of(role: Role, engine: EngineConfig, seen: list[Gpu]) -> list[Gpu]:
    """What vLLM will use: the first ones, or the first of `device_ids`. Raises InvalidInput."""
    count = _num_gpus(engine)
    numbers = list(range(count)) if engine.device_ids is None else engine.device_ids
    if engine.device_ids is None and count > len(seen):
        raise InvalidInput(
            f"{role}: needs {count} GPUs (tensor_parallel_size); allowed: the {len(seen)} that the job sees"
        )
    if len(numbers) < count:
        raise InvalidInput(
            f"{role}.device_ids: {numbers} is fewer than tensor_parallel_size={count}; allowed: one each"
        )
    if absent := [number for number in numbers if not 0 <= number < len(seen)]:
        raise InvalidInput(f"{role}.device_ids: {absent} are not seen by the job; allowed: 0 to {len(seen) - 1}")
    return [seen[number] for number in numbers[:count]]


def _num_gpus(engine: EngineConfig) -> int:
    arguments = engine.vllm_args
    tensor = int(arguments.get("tensor_parallel_size", engine.tensor_parallel_size))
    return tensor * int(arguments.get("pipeline_parallel_size", 1))


# --- how much memory ---


def _needed_bytes(engine: EngineConfig, total: int) -> int:
    """On each of its GPUs: its share, or the weights and the KV cache where that has a size of its own.

    Of a model that is not in a local folder, the weights are unknown and left out.
    """
    if engine.kv_cache_gib is not None:
        return engine.kv_cache_gib * GIB + _weight_bytes(engine.model) // _num_gpus(engine)
    return int(_utilization(engine) * total)


def _utilization(engine: EngineConfig) -> float:
    given = engine.vllm_args.get("gpu_memory_utilization", engine.gpu_memory_utilization)
    return DEFAULT_UTILIZATION if given is None else float(given)


def _weight_bytes(model: str) -> int:
    return sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))


def _too_much(gpu: Gpu, shares: Mapping[Role, EngineConfig], needs: Mapping[Role, int], total: int) -> str:
    """For a configuration that fits no GPU of this size, whoever else is on it."""
    parts = [f"{role} {_setting(engine)} ({needs[role] / GIB:.1f} GiB)" for role, engine in shares.items()]
    return f"{' and '.join(parts)} do not fit {gpu}; allowed: {total / GIB:.1f} GiB together"


def _setting(engine: EngineConfig) -> str:
    if engine.kv_cache_gib is not None:
        return f"kv_cache_gib={engine.kv_cache_gib}"
    return f"gpu_memory_utilization={_utilization(engine)}"


def _size(used: int | None) -> str:
    return "" if used is None else f" ({used / GIB:.1f} GiB)"
