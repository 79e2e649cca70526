"""What a process has used: seconds from its very start, joules from a counter, both once only."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from specreason_batch.engine import EngineDead
from specreason_batch.meter import Meter, find_hardware, process_start
from specreason_batch.plan import make_plan
from specreason_batch.progress import Progress
from specreason_batch.run import run_shards
from specreason_batch.signals import StopSignal
from specreason_batch.store.attempts import Attempt, read_attempts
from tests.support.configs import make_config
from tests.test_shard import Workshop


def attempts(place: Path, *shards: str) -> list[Attempt]:
    return [attempt for shard in shards or ("prompts",) for attempt in read_attempts(place / "out" / shard)]


def test_seconds_run_from_the_process_start() -> None:
    code = "import time; time.sleep(0.4); from specreason_batch.meter import *; print(Meter(process_start()).seconds)"
    began = time.monotonic()
    seconds = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.4 <= seconds <= time.monotonic() - began + 0.02  # the kernel counts in ticks of 10 ms
    assert process_start() < began


def test_a_meter_begins_anew_after_each_record() -> None:
    counter = iter([10.0, 25.0, 40.0, 41.0])
    meter = Meter(time.monotonic() - 5)
    assert meter.joules is None
    meter.count_joules(lambda: next(counter))
    assert meter.seconds >= 5 and meter.joules == 10.0
    meter.restart()
    assert meter.seconds < 5 and meter.joules == 40.0 - 25.0


def test_hardware_says_what_the_process_may_use() -> None:
    import os

    hardware = find_hardware(("H200", "H200"))
    assert hardware.devices == ("H200", "H200") and hardware.cpu
    assert hardware.num_cores == len(os.sched_getaffinity(0))


def test_attempts_account_for_all_of_a_runs_time(place: Path) -> None:
    """Two shards: start-up is on the first one's record, and the records leave no gap."""
    (place / "prompts").mkdir()
    for name in ("a", "b"):
        (place / "prompts" / f"{name}.parquet").write_bytes((place / "prompts.parquet").read_bytes())
    config = make_config(place, output_dir=str(place / "out"))
    config.input.path = str(place / "prompts")
    plan = make_plan(config)
    shop = Workshop(lambda role, request, life: None)
    began = time.monotonic() - 3  # as if planning had taken so long
    run_shards(plan, shop.engines, Progress(Console(quiet=True), 1e9), StopSignal(), began=began)
    seconds = time.monotonic() - began
    first, second = attempts(place, "a", "b")
    assert first.hardware == second.hardware == find_hardware()
    assert first.progress.startup_seconds >= 3 > second.progress.startup_seconds
    recorded = sum(attempt.progress.startup_seconds + attempt.progress.seconds for attempt in (first, second))
    assert recorded == pytest.approx(seconds, rel=0.02)
    assert first.progress.energy_joules is None


def test_an_attempt_whose_engines_never_start_has_its_time_on_record(place: Path) -> None:
    def engines() -> None:
        raise EngineDead("it died while starting")

    plan = make_plan(make_config(place, output_dir=str(place / "out")))
    with pytest.raises(EngineDead):
        run_shards(plan, engines, Progress(Console(quiet=True), 1e9), StopSignal(), began=time.monotonic() - 7)  # type: ignore[arg-type]
    (attempt,) = attempts(place)
    assert attempt.progress.startup_seconds >= 7 and attempt.progress.seconds == 0 and attempt.hardware is None
