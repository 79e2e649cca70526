"""An engine's processes towards the job that started them, with stand-ins that hold no engine."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from specreason_batch import engine_child
from specreason_batch.engine import BadNode, DeathCause, EngineAborted, EngineDead
from specreason_batch.engine_child import MARK, SHIELD, LastWords, class_names, word, word_file
from specreason_batch.engine_processes import RECENT_SECONDS, EngineProcesses, Failure
from specreason_batch.types import InvalidInput, Role
from tests.conftest import ROOT

SPAWN = multiprocessing.get_context("spawn")
PARENT = """
import time
from tests.test_engine_child import EngineProcesses, started, with_grandchild

if __name__ == "__main__":
    processes = EngineProcesses()
    child = started(processes, with_grandchild)
    print(*processes.alive(), flush=True)
    time.sleep(600)
"""


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, whose name it is given."""


OutOfMemoryError.__module__ = "torch"


# --- what the processes run: they are spawned, so these are found by name ---


def engine_like() -> None:
    """What vLLM does around the plugin: a handler that ends the process at SIGTERM, then work for ever."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    engine_child.install()
    while True:
        time.sleep(0.01)


def with_grandchild() -> None:
    worker = SPAWN.Process(target=engine_like)
    worker.start()
    _wait_for(lambda: _has_installed(worker))
    engine_like()


def without_plugin() -> None:
    time.sleep(600)


def _has_installed(child: BaseProcess) -> bool:
    folder = Path(os.environ[MARK].partition(":")[2])
    return word_file(folder, child.pid or 0).exists()


def _wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.02)


def started(processes: EngineProcesses, target: Callable[[], None]) -> BaseProcess:
    with processes.starting():
        child = SPAWN.Process(target=target)
        child.start()
        _wait_for(lambda: _has_installed(child))
    return child


@pytest.fixture
def processes() -> Iterator[EngineProcesses]:
    made = EngineProcesses()
    yield made
    made.end()


# --- signals ---


@pytest.mark.parametrize("number", engine_child.SHIELDED)
def test_a_signal_passes_until_the_shield_is_lowered(processes: EngineProcesses, number: int) -> None:
    child = started(processes, engine_like)
    for _ in range(3):
        os.kill(child.pid or 0, number)
    child.join(0.3)
    assert child.is_alive()
    processes.lower_shield()
    os.kill(child.pid or 0, number)
    child.join(10)
    assert child.exitcode is not None
    assert child.exitcode == (
        0 if number == signal.SIGTERM else -number if number == signal.SIGUSR2 else child.exitcode
    )


def test_a_process_that_is_still_importing_is_shielded_too(processes: EngineProcesses) -> None:
    with pytest.raises(InvalidInput), processes.starting():
        child = SPAWN.Process(target=without_plugin)
        child.start()
        _wait_for(lambda: _catches(child.pid or 0, signal.SIGTERM))
        os.kill(child.pid or 0, signal.SIGTERM)
        child.join(0.3)
        assert child.is_alive()


def _catches(pid: int, number: int) -> bool:
    caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_the_job_s_resource_tracker_survives_the_job_s_signals(processes: EngineProcesses) -> None:
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # another test's: a job has none before
    with processes.starting():
        pass
    tracker = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    for number in engine_child.SHIELDED:
        os.kill(tracker, number)
    time.sleep(0.3)
    assert _lives(tracker)


# --- the end ---


def test_all_processes_die_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout as output:
        pids = [int(pid) for pid in output.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    _wait_for(lambda: not any(_lives(pid) for pid in pids), 5)


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)


def test_stopped_processes_and_orphans_are_killed(processes: EngineProcesses) -> None:
    child = started(processes, with_grandchild)
    alive = processes.alive()
    assert len(alive) == 2
    for pid in alive:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    assert processes.kill()
    assert time.monotonic() - began < 5
    assert not any(_lives(pid) for pid in alive)
    assert child.exitcode == -signal.SIGKILL


def test_whatever_ends_a_start_leaves_no_process(processes: EngineProcesses) -> None:
    with pytest.raises(KeyboardInterrupt), processes.starting():
        SPAWN.Process(target=without_plugin).start()
        _wait_for(lambda: bool(processes.alive()))
        raise KeyboardInterrupt
    assert not processes.alive()
    assert MARK not in os.environ


def test_an_engine_without_the_plugin_is_refused(processes: EngineProcesses) -> None:
    with pytest.raises(InvalidInput, match="plugin specreason_engine_child"), processes.starting():
        SPAWN.Process(target=without_plugin).start()
    assert not processes.alive()


def test_processes_of_another_engine_are_left_alone(processes: EngineProcesses) -> None:
    other = EngineProcesses()
    try:
        child = started(other, engine_like)
        started(processes, engine_like)
        processes.end()
        assert child.is_alive()
    finally:
        other.end()
    assert not child.is_alive()


def test_the_plugin_does_nothing_in_the_job_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in engine_child.SHIELDED], list(logging.getLogger("vllm").handlers)
    monkeypatch.setenv(MARK, f"{os.getpid()}:{tmp_path}")
    engine_child.install()
    monkeypatch.delenv(MARK)
    engine_child.install()
    assert before == (
        [signal.getsignal(number) for number in engine_child.SHIELDED],
        list(logging.getLogger("vllm").handlers),
    )
    assert not list(tmp_path.iterdir())


# --- why ---


def test_the_cause_is_found_by_type_through_what_led_to_an_exception() -> None:
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("the step failed\nas follows") from OutOfMemoryError("no room")
    assert "torch.OutOfMemoryError" in class_names(raised.value)
    assert Failure.of(raised.value) == Failure(DeathCause.out_of_memory, "RuntimeError: the step failed")
    assert Failure.of(MemoryError("x")).cause is DeathCause.out_of_memory
    assert Failure.of(RuntimeError("CUDA out of memory")).cause is DeathCause.died


def test_what_is_logged_as_an_error_is_told_with_its_exception(processes: EngineProcesses) -> None:
    logger = logging.getLogger("tests.last_words")
    logger.propagate = False
    logger.addHandler(LastWords(word_file(processes._folder, 7)))
    logger.warning("passed over")
    logger.error("dumping input ...")
    try:
        raise OutOfMemoryError("tried to allocate 20 GiB\nof 3")
    except OutOfMemoryError:
        logger.exception("failed")
    logger.exception("and then", exc_info=ValueError("worker failed"))
    found = processes.failure()
    assert found == Failure(DeathCause.out_of_memory, "torch.OutOfMemoryError: tried to allocate 20 GiB")


def test_how_a_process_ended_is_told(processes: EngineProcesses) -> None:
    child = started(processes, engine_like)
    assert processes.failure() == Failure()
    child.kill()
    child.join(10)
    assert processes.failure() == Failure(DeathCause.died, f"{child.name} ended by SIGKILL")


def test_a_child_that_dies_while_its_death_is_told_is_told_of_with_the_next_word(processes: EngineProcesses) -> None:
    child = started(processes, engine_like)
    handler = LastWords(word_file(processes._folder, 7))
    record = logging.LogRecord("vllm", logging.ERROR, "", 0, "a worker died", None, None)
    handler.emit(record)
    child.kill()
    child.join(10)  # from here on multiprocessing has forgotten it
    handler.emit(record)
    lines = [json.loads(line) for line in word_file(processes._folder, 7).read_text().splitlines()]
    assert [line["exits"] for line in lines] == [{}, {child.name: -signal.SIGKILL}]


def test_old_and_torn_words_do_not_count(processes: EngineProcesses) -> None:
    old, new = word("old", MemoryError("survived")), word("new", ValueError("fatal"))
    new["exits"] = {"VllmWorker-1": -11}
    old["time"] = new["time"] - RECENT_SECONDS - 1
    lines = "".join(json.dumps(line) + "\n" for line in (old, new))
    word_file(processes._folder, 7).write_text(lines + '{"pid": 7, "ti')
    assert processes.failure() == Failure(DeathCause.died, "VllmWorker-1 ended by SIGSEGV; ValueError: fatal")


def test_a_process_that_logs_for_ever_fills_no_disk(tmp_path: Path) -> None:
    handler = LastWords(tmp_path / "7.jsonl")
    for _ in range(300):
        handler.emit(logging.LogRecord("vllm", logging.ERROR, "", 0, "x" * 10_000, None, None))
    assert (tmp_path / "7.jsonl").stat().st_size < 300_000


def test_the_shared_folder_is_gone_at_the_end() -> None:
    processes = EngineProcesses()
    assert (processes._folder / SHIELD).exists()
    processes.end()
    processes.end()
    assert not processes._folder.exists()


def test_deaths_say_why_and_whose() -> None:
    assert EngineDead("x").cause is DeathCause.died
    aborted = EngineAborted("cut", role=Role.base)
    assert isinstance(aborted, EngineDead)
    assert (str(aborted), aborted.cause, aborted.role) == ("cut", DeathCause.aborted, Role.base)
    assert not issubclass(BadNode, EngineDead)
