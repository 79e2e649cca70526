"""The checks of a machine's GPUs, on an NVML that says what each test wants; the node check on a real shell."""

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specreason_batch.config import ChatConfig, EngineConfig, GenerateConfig
from specreason_batch.devices import GIB, DeviceWatch, run_node_check
from specreason_batch.engine import BadNode
from specreason_batch.types import InvalidInput, Role
from tests.support.configs import make_config


class NvmlError(Exception):
    """NVML's base class."""


class NotSupported(NvmlError):
    pass


class Timeout(NvmlError):
    pass


class GpuIsLost(NvmlError):
    pass


@dataclass
class Card:
    """One GPU as NVML sees it."""

    uuid: str
    free: int = 140  # GiB, of 140
    pids: dict[int, int | None] = field(default_factory=dict)  # GiB each holds; None: not told
    ecc_errors: int | None = 0  # None: not counted
    lost: bool = False
    slice_of: "Card | None" = None
    millijoules: int | None = None  # None: not counted


class FakeNvml:
    """What `devices` uses of the pynvml module."""

    NVMLError = NvmlError
    NVMLError_NotSupported = NotSupported
    NVMLError_FunctionNotFound = NotSupported
    NVMLError_Timeout = Timeout
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, nvmlEventTypeXidCriticalError = 1, 0, 8

    def __init__(self, *cards: Card, slices: tuple[Card, ...] = (), events: bool = True) -> None:
        self.cards, self.slices, self.events = list(cards), slices, events
        self.xids: deque[int] = deque()
        self.watched: list[Card] = []
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        return next(card for card in self.slices if card.uuid == uuid)

    def nvmlDeviceGetUUID(self, card: Card) -> bytes:
        return card.uuid.encode()

    def nvmlDeviceGetName(self, card: Card) -> str:
        return "H200"

    def nvmlDeviceIsMigDeviceHandle(self, card: Card) -> bool:
        return card.slice_of is not None

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, card: Card) -> Card | None:
        return card.slice_of

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> Any:
        if card.lost:
            raise GpuIsLost("GPU is lost")
        return SimpleNamespace(free=card.free * GIB, total=140 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[Any]:
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=None if held is None else held * GIB)
            for pid, held in card.pids.items()
        ]

    def nvmlDeviceGetTotalEccErrors(self, card: Card, kind: int, period: int) -> int:
        assert (kind, period) == (1, 0)
        if card.ecc_errors is None:
            raise NotSupported
        return card.ecc_errors

    def nvmlDeviceGetTotalEnergyConsumption(self, card: Card) -> int:
        if card.millijoules is None:
            raise NotSupported
        return card.millijoules

    def nvmlEventSetCreate(self) -> str:
        if not self.events:
            raise NotSupported
        return "events"

    def nvmlDeviceRegisterEvents(self, card: Card, types: int, events: str) -> None:
        assert types == self.nvmlEventTypeXidCriticalError
        self.watched.append(card)

    def nvmlEventSetWait(self, events: str, milliseconds: int) -> Any:
        if not self.xids:
            raise Timeout
        return SimpleNamespace(eventData=self.xids.popleft())


@pytest.fixture(autouse=True)
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def engine(**changes: Any) -> EngineConfig:
    return EngineConfig(**{"model": "no/such/folder", "chat": ChatConfig(), **changes})


def pair(tmp_path: Path, base: EngineConfig, draft: EngineConfig) -> GenerateConfig:
    return make_config(tmp_path, base=base, draft=draft)


def watch(tmp_path: Path, nvml: FakeNvml, *, patience: float = 0, **engines: EngineConfig) -> DeviceWatch:
    """Of the roles named."""
    config = pair(tmp_path, engines.get("base", engine()), engines.get("draft", engine()))
    return DeviceWatch(config, [Role(name) for name in engines], nvml, patience)


def cards(count: int) -> list[Card]:
    return [Card(f"GPU-{n}a{n}") for n in range(count)]


# --- enough GPUs ---


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tensor_parallel_size": 4}, r"base: needs 4 GPUs \(tensor_parallel_size\); allowed: the 2 that"),
        ({"vllm_args": {"pipeline_parallel_size": 3}}, "base: needs 3 GPUs"),
        ({"device_ids": [1, 2]}, r"base.device_ids: \[2\] are not seen by the job; allowed: 0 to 1"),
        (
            {"device_ids": [1], "tensor_parallel_size": 2},
            r"base.device_ids: \[1\] is fewer than tensor_parallel_size=2",
        ),
    ],
)
def test_too_few_gpus_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        watch(tmp_path, FakeNvml(*cards(2)), base=engine(**changes))


@pytest.mark.parametrize(
    ("visible", "used"),
    [
        ("", ["GPU-1a1"]),
        ("2,3", ["GPU-3a3"]),
        ("GPU-3,GPU-0a", ["GPU-0a0"]),
        (" 0 , MIG-x", ["MIG-x"]),
    ],
)
def test_the_second_visible_gpu_is_found(
    tmp_path: Path, visible: str, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    all_cards = cards(4)
    nvml = FakeNvml(*all_cards, slices=(Card("MIG-x", slice_of=all_cards[0]),))
    devices = watch(tmp_path, nvml, base=engine(device_ids=[1]))
    assert [gpu.handle.uuid for gpu in devices._all_gpus()] == used
    assert nvml.watched == [all_cards[0] if visible.endswith("MIG-x") else gpu.handle for gpu in devices._all_gpus()]


@pytest.mark.parametrize("visible", ["4", "GPU-x", "none"])
def test_a_visible_gpu_that_is_not_there_is_named(
    tmp_path: Path, visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(InvalidInput, match=f"CUDA_VISIBLE_DEVICES: {visible} is not on this machine"):
        watch(tmp_path, FakeNvml(*cards(4)), base=engine())


# --- enough memory ---


def test_engines_that_share_a_gpu_need_their_shares_together(tmp_path: Path) -> None:
    first, second = cards(2)
    second.free, second.pids = 120, {41: 19, 42: None}
    nvml = FakeNvml(first, second)
    base = engine(tensor_parallel_size=2, gpu_memory_utilization=0.7)
    watch(tmp_path, nvml, base=base).check_before()
    draft = engine(device_ids=[1], gpu_memory_utilization=0.2)
    both = watch(tmp_path, nvml, base=base, draft=draft)
    said = r"GPU 1 \(H200\): 120.0 of 140.0 GiB are free, 126.0 are needed; held by pid 41 \(19.0 GiB\), pid 42"
    with pytest.raises(BadNode, match=said):
        both.check_before()
    both.check_before([Role.draft])


def test_memory_that_becomes_free_is_waited_for(tmp_path: Path) -> None:
    [card] = cards(1)
    card.free = 3
    end_of_a_process = threading.Timer(0.3, setattr, (card, "free", 140))
    end_of_a_process.start()
    watch(tmp_path, FakeNvml(card), patience=20, base=engine()).check_before()
    end_of_a_process.join()


def test_a_cache_of_its_own_size_is_counted_with_the_weights(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with (model / "model-1.safetensors").open("wb") as file:
        file.truncate(8 * GIB)
    devices = watch(
        tmp_path, FakeNvml(*cards(2)), base=engine(model=str(model), tensor_parallel_size=2, kv_cache_gib=137)
    )
    with pytest.raises(InvalidInput, match=r"base kv_cache_gib=137 \(141.0 GiB\) do not fit GPU 0 \(H200\)"):
        devices.check_before()


def test_shares_that_no_gpu_can_hold_are_a_mistake_and_not_the_machines_trouble(tmp_path: Path) -> None:
    devices = watch(tmp_path, FakeNvml(*cards(1)), base=engine(), draft=engine(gpu_memory_utilization=0.2))
    with pytest.raises(
        InvalidInput, match=r"base gpu_memory_utilization=0.92 .* and draft gpu_memory_utilization=0.2 "
    ):
        devices.check_before()


# --- after a death ---


def test_a_sound_gpu_is_not_blamed(tmp_path: Path) -> None:
    nvml = FakeNvml(Card("GPU-0", ecc_errors=3), Card("GPU-1", ecc_errors=None))
    devices = watch(tmp_path, nvml, base=engine(tensor_parallel_size=2))
    nvml.xids.extend([31, 45, 13])
    devices.check_after_death()


def test_a_gpu_that_failed_makes_a_bad_node(tmp_path: Path) -> None:
    nvml = FakeNvml(*cards(2))
    devices = watch(tmp_path, nvml, base=engine())
    nvml.xids.extend([45, 79, 48])
    with pytest.raises(BadNode, match="Xid 48, 79"):
        devices.check_after_death()
    devices.check_after_death()
    nvml.cards[1].lost = True
    devices.check_after_death()
    nvml.cards[0].ecc_errors = 2
    with pytest.raises(BadNode, match=r"GPU 0 \(H200\) had 2 uncorrectable memory errors"):
        devices.check_after_death()
    nvml.cards[0].lost = True
    with pytest.raises(BadNode, match="does not answer any more: GPU is lost"):
        devices.check_after_death()
    with pytest.raises(BadNode, match="does not answer: GPU is lost"):
        devices.check_before()


def test_where_the_driver_tells_no_xids_the_rest_is_still_checked(tmp_path: Path) -> None:
    nvml = FakeNvml(*cards(1), events=False)
    devices = watch(tmp_path, nvml, base=engine())
    devices.check_after_death()
    nvml.cards[0].lost = True
    with pytest.raises(BadNode):
        devices.check_after_death()


def test_a_driver_that_does_not_answer_makes_a_bad_node(tmp_path: Path) -> None:
    nvml = FakeNvml(*cards(1))
    nvml.nvmlInit = _no_driver  # type: ignore[method-assign]
    with pytest.raises(BadNode, match="does not answer: driver not loaded"):
        watch(tmp_path, nvml, base=engine())


def _no_driver() -> None:
    raise NvmlError("driver not loaded")


def test_energy_is_that_of_all_gpus_since_the_start(tmp_path: Path) -> None:
    first, second = Card("GPU-0", millijoules=5_000), Card("GPU-1", millijoules=70_000)
    devices = watch(tmp_path, FakeNvml(first, second), base=engine(tensor_parallel_size=2), draft=engine())
    assert devices.device_names == ("H200", "H200")
    assert devices.read_joules() == 0.0
    first.millijoules, second.millijoules = 6_500, 72_000
    assert devices.read_joules() == 3.5


@pytest.mark.parametrize("second", [Card("GPU-1"), Card("MIG-x", millijoules=1, slice_of=Card("GPU-2"))])
def test_energy_is_unknown_where_one_gpu_does_not_tell_its_own(
    tmp_path: Path, second: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakeNvml(Card("GPU-0", millijoules=1), second, slices=(second,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"0,{second.uuid if second.slice_of else 1}")
    assert watch(tmp_path, nvml, base=engine(tensor_parallel_size=2)).read_joules() is None


def test_without_nvml_there_is_nothing_to_check(tmp_path: Path) -> None:
    devices = DeviceWatch(pair(tmp_path, engine(tensor_parallel_size=64), engine()), list(Role), None)
    devices.check_before()
    devices.check_after_death()
    devices.close()


def test_nvml_is_let_go_once(tmp_path: Path) -> None:
    nvml = FakeNvml(*cards(1))
    devices = watch(tmp_path, nvml, base=engine())
    devices.close()
    devices.close()
    assert nvml.open == 0


# --- the user's own check ---


def test_a_node_check_that_passes_says_nothing() -> None:
    run_node_check(None)
    run_node_check("echo fine")


def test_a_node_check_that_fails_tells_the_end_of_what_it_said() -> None:
    with pytest.raises(BadNode) as raised:
        run_node_check("seq 1 9; echo no fabric >&2; exit 3")
    assert str(raised.value).endswith("ended with status 3:\n6\n7\n8\n9\nno fabric")


def test_a_node_check_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    with pytest.raises(BadNode, match="was not done after 1 s and said nothing"):
        run_node_check(f"(sleep 3; touch {tmp_path}/later) & sleep 100", timeout=1)
    time.sleep(3)
    assert not (tmp_path / "later").exists()
