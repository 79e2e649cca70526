"""A run that is asked to stop leaves within its time, whatever it is at."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.launch import ExitStatus
from specreason_batch.schedules import Stopped
from specreason_batch.signals import STATUS_INTERRUPTED, STATUS_STOPPED, STOP_SIGNALS, StopSignal

ROOT = Path(__file__).parent.parent
PRELUDE = """
import ctypes, signal, sys, time
from specreason_batch.signals import StopSignal
stop = StopSignal(seconds={seconds})
with stop.installed():
    print("ready", flush=True)
    {body}
"""
# A call into C that no signal interrupts: a mutex locked twice.
STUCK = "lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64); lock(mutex); lock(mutex)"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_remembered_until_it_is_looked_at(number: signal.Signals) -> None:
    stop = StopSignal()
    before = signal.getsignal(number)
    with stop.installed():
        stop.check()
        signal.raise_signal(number)
        with pytest.raises(Stopped, match=number.name):
            stop.check()
    assert signal.getsignal(number) is before


def test_where_nothing_is_to_be_saved_a_signal_ends_whatever_runs() -> None:
    stop = StopSignal()
    began = time.monotonic()
    with stop.installed(), pytest.raises(Stopped, match="SIGUSR2"), stop.at_once():
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.raise_signal(signal.SIGUSR2)
        time.sleep(30)
    assert time.monotonic() - began < 5


def test_a_signal_that_came_before_is_noticed_at_the_door() -> None:
    stop = StopSignal()
    with stop.installed():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), stop.at_once():
            raise AssertionError("not reached")


def test_once_everything_is_saved_a_repeated_signal_does_not_change_the_exit_status() -> None:
    stop = StopSignal()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with pytest.raises(Stopped), stop.installed():
            signal.raise_signal(signal.SIGTERM)
            stop.check()
        for number in STOP_SIGNALS:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_sleeping_ends_with_the_signal() -> None:
    stop = StopSignal()
    stop.sleep(0.05)
    with stop.installed():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            stop.sleep(30)


def start(body: str, seconds: float = 30.0) -> subprocess.Popen[str]:
    script = PRELUDE.format(seconds=seconds, body=body)
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("body", [STUCK, "time.sleep(60)", "\n    while True: pass"])
def test_a_second_interrupt_ends_the_process_at_once_whatever_the_main_thread_is_at(body: str) -> None:
    process = start(body)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, "the first one leaves time to save"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == STATUS_INTERRUPTED == ExitStatus.interrupted
    assert time.monotonic() - began < 2
    assert "interrupted at once" in errors


@pytest.mark.parametrize("body", [STUCK, "\n    while True: pass"])
def test_a_main_thread_that_does_not_come_back_is_ended_after_the_stated_time(body: str) -> None:
    process = start(body, seconds=1.0)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # Slurm repeats itself; that makes it neither sooner nor later
    _, errors = process.communicate(timeout=20)
    assert process.returncode == STATUS_STOPPED == ExitStatus.stopped
    assert 0.9 < time.monotonic() - began < 3
    assert "the last checkpoint holds" in errors


def test_a_process_that_leaves_in_time_is_left_alone() -> None:
    process = start("\n    stop.sleep(60)", seconds=5.0)
    process.send_signal(signal.SIGUSR2)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Stopped: signal SIGUSR2" in errors
