"""One writer a shard, with real processes: races, deaths, suspensions, full disks, clocks that jump."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from multiprocessing.synchronize import Barrier as BarrierType
from pathlib import Path
from typing import Any

import pytest

from specreason_batch.config import LeaseConfig
from specreason_batch.store import attempts
from specreason_batch.store.attempts import (
    Attempt,
    AttemptState,
    Lease,
    LeaseHeld,
    LeaseLost,
    Owner,
    ShardProgress,
    attempt_files,
    fence,
    read_attempts,
)

QUICK = LeaseConfig(beat_seconds=0.05, stale_seconds=0.4)
PATIENT = LeaseConfig(beat_seconds=0.05, stale_seconds=5.0)  # a loaded machine's owner is not taken for dead
MUTE = LeaseConfig(beat_seconds=1e6, stale_seconds=3e6)  # an owner that gives no sign of life after the first
SPAWN = multiprocessing.get_context("spawn")
FOR_THE_SILENT = LeaseConfig(beat_seconds=0.05, stale_seconds=1.5)
NUM_RACERS = 8
ELSEWHERE = Owner(host="node7", pid=4711, machine="another boot", born="1", slurm_job="815_3")


def forge(root: Path, owner: Owner = ELSEWHERE, number: int = 1, **changes: Any) -> Path:
    """An attempt's file as its owner would have left it."""
    path = root / "attempts" / f"attempt-{number:05d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = replace(Attempt(number=number, owner=owner, started_at=0.0, beat_at=0.0), **changes)
    path.write_text(json.dumps(asdict(attempt)))
    return path


def dead_owner() -> Owner:
    """A process of this machine that has ended."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    return replace(Owner.current(), pid=gone.pid)


@contextmanager
def held(root: Path, config: LeaseConfig = QUICK) -> Iterator[Lease]:
    lease = Lease.acquire(root, config)
    try:
        yield lease
    finally:
        lease.end(AttemptState.stopped)


def stage(lease: Lease, name: str = "part") -> Path:
    staged = lease.staging / name
    staged.write_text(name)
    return staged


def seconds(action: Callable[[], Any]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


# --- races ---


def race(folder: Path, names: list[str], barrier: BarrierType, results: Any) -> None:
    """A racer's whole life: at each shard it starts with the others, and a winner holds until all have answered."""
    for name in names:
        lease = None
        barrier.wait()
        with suppress(LeaseHeld):
            lease = Lease.acquire(folder / name, FOR_THE_SILENT if name.startswith("elsewhere") else PATIENT)
        barrier.wait()
        if lease is not None:
            lease.check()
            results.put((name, os.getpid(), lease.number))
            lease.end(AttemptState.finished)


def run_race(folder: Path, names: list[str]) -> dict[str, list[tuple[int, int]]]:
    """Pids and attempt numbers of each shard's winners."""
    barrier, results = SPAWN.Barrier(NUM_RACERS), SPAWN.Queue()
    racers = [
        SPAWN.Process(target=race, args=(folder, names, barrier, results), daemon=True) for _ in range(NUM_RACERS)
    ]
    for racer in racers:
        racer.start()
    winners: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    for _ in names:
        name, pid, number = results.get(timeout=60)
        winners[name].append((pid, number))
    for racer in racers:
        racer.join(30)
    assert [racer.exitcode for racer in racers] == [0] * NUM_RACERS
    assert results.empty()
    return winners


@pytest.mark.slow
def test_of_eight_processes_exactly_one_gets_the_lease(tmp_path: Path) -> None:
    """At a new shard, at one whose owner died here, at one whose owner elsewhere is silent, at one that was stopped."""
    dead = dead_owner()
    names = [f"new-{index}" for index in range(60)]
    for index in range(40):
        forge(tmp_path / f"dead-{index}", dead)
        forge(tmp_path / f"stopped-{index}", number=3, state=AttemptState.stopped)
    for index in range(3):
        forge(tmp_path / f"elsewhere-{index}")
    names += [path.name for path in sorted(tmp_path.iterdir())]
    winners = run_race(tmp_path, names)
    assert {name: len(found) for name, found in winners.items()} == dict.fromkeys(names, 1)
    expected = {"new": 1, "dead": 2, "elsewhere": 2, "stopped": 4}
    assert all(found[0][1] == expected[name.split("-")[0]] for name, found in winners.items())
    assert len({pid for [(pid, _)] in winners.values()}) > 1  # else it was no race
    assert not [*tmp_path.glob("*/.staging-*"), *tmp_path.glob("*/.fenced-*")]


# --- who is refused, and who is taken over ---


def test_a_live_owners_shard_is_refused_naming_host_pid_and_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "92")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "90")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with held(tmp_path, PATIENT) as lease:
        owner = read_attempts(tmp_path)[0].owner
        said: list[str] = []
        with pytest.raises(LeaseHeld, match=rf"{owner.host} pid {os.getpid()}, Slurm job 90_2 works on it") as refused:
            Lease.acquire(tmp_path, PATIENT, say=said.append)
        assert "attempt 1" in str(refused.value)
        assert owner.slurm_restarts == 3
        assert f"{owner.host} pid {os.getpid()}" in said[0] and "5 s" in said[0] and len(said) == 1
        lease.check()


def test_a_job_that_is_no_array_is_named_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "92")
    assert Owner.current().slurm_job == "92"


def test_an_owner_elsewhere_is_taken_over_after_stale_seconds_and_not_before(tmp_path: Path) -> None:
    forge(tmp_path)
    said: list[str] = []
    began = time.monotonic()
    lease = Lease.acquire(tmp_path, QUICK, say=said.append)
    assert QUICK.stale_seconds <= time.monotonic() - began < QUICK.stale_seconds + 1
    lease.end(AttemptState.finished)
    assert lease.number == 2
    assert "node7 pid 4711, Slurm job 815_3" in said[0]


def test_a_silent_owner_that_shows_life_just_in_time_is_refused(tmp_path: Path) -> None:
    path = forge(tmp_path)
    timer = threading.Timer(QUICK.stale_seconds / 2, forge, (tmp_path,), {"beat": 1})
    timer.start()
    with pytest.raises(LeaseHeld, match="node7"):
        Lease.acquire(tmp_path, QUICK)
    timer.join()
    assert list(attempt_files(tmp_path).values()) == [path]


def test_an_owner_that_died_on_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    forge(tmp_path, dead_owner())
    assert seconds(lambda: Lease.acquire(tmp_path, PATIENT).end(AttemptState.stopped)) < 1


def test_a_pid_that_was_given_to_another_process_is_no_life(tmp_path: Path) -> None:
    forge(tmp_path, replace(Owner.current(), born="12"))
    assert seconds(lambda: Lease.acquire(tmp_path, PATIENT).end(AttemptState.stopped)) < 1


def test_a_process_that_waits_for_its_parent_to_ask_is_dead(tmp_path: Path) -> None:
    """A zombie keeps its pid and its birth."""
    child = subprocess.Popen(["sleep", "60"])
    owner = replace(Owner.current(), pid=child.pid, born=attempts._birth(child.pid) or "")
    assert not owner.is_surely_dead
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owner.is_surely_dead
    child.wait()


def test_another_users_process_that_is_hidden_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise FileNotFoundError(path)

    owner, gone = Owner.current(), dead_owner()
    monkeypatch.setattr(attempts, "_machine", lambda: owner.machine)
    monkeypatch.setattr(Path, "read_text", refuse)  # as with hidepid; signal 0 still tells that it is there
    assert not owner.is_surely_dead
    assert replace(owner, pid=gone.pid).is_surely_dead


def test_a_live_process_of_this_machine_that_is_silent_is_taken_over_after_stale_seconds(tmp_path: Path) -> None:
    forge(tmp_path, Owner.current())
    assert QUICK.stale_seconds <= seconds(lambda: Lease.acquire(tmp_path, QUICK).end(AttemptState.stopped)) < 2


@pytest.mark.parametrize(
    "content", ["", '{"number": 1, "owner": {"host": "no', "[1]", "7", '"x"', '{"number": 1}', "{}"]
)
def test_an_attempts_file_that_is_not_whole_is_outlived(tmp_path: Path, content: str) -> None:
    """Its maker was killed between making and filling it, or its machine before the file was on disk."""
    forge(tmp_path).write_text(content)
    assert read_attempts(tmp_path) == []
    said: list[str] = []
    began = time.monotonic()
    lease = Lease.acquire(tmp_path, QUICK, say=said.append)
    assert QUICK.stale_seconds <= time.monotonic() - began < 2
    assert lease.number == 2
    lease.end(AttemptState.stopped)
    assert "left no name" in said[0]


def test_an_attempts_file_that_is_filled_meanwhile_is_its_makers(tmp_path: Path) -> None:
    forge(tmp_path).write_text("")
    timers = [threading.Timer(0.1 * beat, forge, (tmp_path,), {"beat": beat}) for beat in (1, 2)]
    for timer in timers:
        timer.start()
    with pytest.raises(LeaseHeld, match="node7"):
        Lease.acquire(tmp_path, QUICK)
    for timer in timers:
        timer.join()
    assert list(attempt_files(tmp_path)) == [1]


def test_files_of_other_names_are_no_attempts(tmp_path: Path) -> None:
    path = forge(tmp_path, number=2, state=AttemptState.stopped)
    for name in ("attempt-00009.json.bak", "attempt-copy.json", "attempt-00008 (1).json", ".attempt-00007.new"):
        (path.parent / name).write_text("")
    assert list(attempt_files(tmp_path)) == [2]


def test_waiting_for_an_owner_ends_where_the_run_is_to_stop(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(pause: float) -> None:
        assert 0 < pause <= QUICK.beat_seconds
        raise Stop

    forge(tmp_path)
    with pytest.raises(Stop):
        Lease.acquire(tmp_path, QUICK, wait=stop)
    assert list(attempt_files(tmp_path)) == [1]
    assert not list(tmp_path.glob(".staging-*"))


# --- suspended owners and fences ---


def own(root: Path) -> None:
    """A process that takes a shard, stages a file, waits to be asked, tries to commit, and says what came of it."""
    lease = Lease.acquire(root, QUICK)
    staged = stage(lease)
    print("held", flush=True)
    sys.stdin.readline()
    for attempt in (lambda: lease.commit(staged, root / "committed"), lease.check):
        try:
            attempt()
            print("done", flush=True)
        except (LeaseLost, OSError) as error:
            print(f"{type(error).__name__}: {error}", flush=True)
    lease.end(AttemptState.finished)


def start_owner(root: Path) -> "subprocess.Popen[str]":
    code = f"from pathlib import Path; from tests.test_attempts import own; own(Path({str(root)!r}))"
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "held\n"
    return owner


def test_a_suspended_owner_that_wakes_up_after_a_takeover_commits_nothing(tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    with pytest.raises(LeaseHeld, match=f"pid {owner.pid}"):
        Lease.acquire(tmp_path, QUICK)
    owner.send_signal(signal.SIGSTOP)
    with held(tmp_path) as lease:
        owner.send_signal(signal.SIGCONT)
        said, _ = owner.communicate("go on\n", timeout=30)
        commit, check = said.splitlines()
        assert commit.startswith(f"LeaseLost: shard {tmp_path.name} was taken over by {lease._attempt.owner}")
        assert check.startswith("LeaseLost")
        assert owner.returncode == 0
        lease.commit(stage(lease), tmp_path / "mine")
        lease.check()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempts", "mine"]
    assert [attempt.state for attempt in read_attempts(tmp_path)] == [AttemptState.lost, AttemptState.stopped]


def test_an_owner_that_was_suspended_and_not_taken_over_goes_on(tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    owner.send_signal(signal.SIGSTOP)
    time.sleep(2 * QUICK.stale_seconds)
    owner.send_signal(signal.SIGCONT)
    assert owner.communicate("go on\n", timeout=30)[0] == "done\ndone\n"
    assert (tmp_path / "committed").read_text() == "part"
    assert [attempt.state for attempt in read_attempts(tmp_path)] == [AttemptState.finished]


def hammer(folder: Path, num_rounds: int) -> None:
    """An owner that never looks back: four threads commit until they are told to end, whatever goes wrong.

    Two of them hold the staging folder by its handle, as a network file system's client on another machine would.
    """
    for index in range(num_rounds):
        root = folder / f"shard-{index}"
        lease = Lease.acquire(root, MUTE)
        (root / "committed").mkdir()
        threads = [threading.Thread(target=_hammer, args=(lease, root, name, name in "cd")) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _hammer(lease: Lease, root: Path, name: str, by_handle: bool) -> None:
    source = os.open(lease.staging, os.O_RDONLY)
    target = os.open(root / "committed", os.O_RDONLY)
    count = 0
    while count % 64 or not (root / "enough").exists():
        count += 1
        with suppress(OSError, LeaseLost):
            if by_handle:
                os.close(os.open(f"{name}{count}", os.O_CREAT | os.O_WRONLY, dir_fd=source))
                os.replace(f"{name}{count}", f"{name}{count}", src_dir_fd=source, dst_dir_fd=target)
            else:
                lease.commit(stage(lease, f"{name}{count}"), root / "committed" / f"{name}{count}")
    os.close(source)
    os.close(target)


@pytest.mark.slow
def test_nothing_of_a_former_owner_appears_once_acquire_has_returned(tmp_path: Path) -> None:
    num_rounds, total = 60, 0
    old = SPAWN.Process(target=hammer, args=(tmp_path, num_rounds), daemon=True)
    old.start()
    for index in range(num_rounds):
        root = tmp_path / f"shard-{index}"
        give_up = time.monotonic() + 30
        while len(list(root.glob("committed/*"))) < 20:
            assert time.monotonic() < give_up and old.is_alive()
        time.sleep(random.uniform(0, 0.02))
        lease = Lease.acquire(root, LeaseConfig(beat_seconds=0.01, stale_seconds=0.03))
        before = set(os.listdir(root / "committed"))
        time.sleep(0.05)
        assert set(os.listdir(root / "committed")) == before
        lease.check()
        total += len(before)
        (root / "enough").touch()
        lease.end(AttemptState.finished)
        assert not [*root.glob(".staging-*"), *root.glob(".fenced-*")]
    old.join(30)
    assert old.exitcode == 0
    print(f"{total} files committed by former owners, none of them late, in {num_rounds} takeovers")


def suspend_in(monkeypatch: pytest.MonkeyPatch, name: str, meanwhile: Callable[[], None]) -> None:
    """Let the next call of this function of the module be preceded by something else, as if its process had slept."""
    real = getattr(attempts, name)

    def late(*values: Any, **named: Any) -> Any:
        monkeypatch.setattr(attempts, name, real)
        meanwhile()
        return real(*values, **named)

    monkeypatch.setattr(attempts, name, late)


def test_an_owner_suspended_before_its_fence_does_not_fence_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    successors: list[Lease] = []
    suspend_in(
        monkeypatch,
        "fence",
        lambda: successors.append(Lease.acquire(tmp_path, LeaseConfig(beat_seconds=1, stale_seconds=0))),
    )
    late = Lease.acquire(tmp_path, MUTE)
    assert [late.number, successors[0].number] == [1, 2]
    with pytest.raises(LeaseLost):
        late.check()
    successors[0].check()
    successors[0].commit(stage(successors[0]), tmp_path / "mine")
    for lease in (late, *successors):
        lease.end(AttemptState.finished)
    assert [attempt.state for attempt in read_attempts(tmp_path)] == [AttemptState.lost, AttemptState.finished]


def test_an_attempt_suspended_before_its_file_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster: list[Lease] = []
    suspend_in(monkeypatch, "_create", lambda: faster.append(Lease.acquire(tmp_path, MUTE)))
    with pytest.raises(LeaseHeld, match=f"pid {os.getpid()}.* was faster"):
        Lease.acquire(tmp_path, QUICK)
    faster[0].check()
    assert list(tmp_path.glob(".staging-*")) == [faster[0].staging]
    faster[0].end(AttemptState.finished)


def test_a_newer_attempt_that_a_stale_listing_hides_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(tmp_path, state=AttemptState.stopped)
    stale = attempt_files(tmp_path)
    with held(tmp_path) as lease:
        monkeypatch.setattr(attempts, "attempt_files", lambda root: stale)
        with pytest.raises(LeaseHeld, match="was faster"):
            Lease.acquire(tmp_path, QUICK)
        lease.check()


def test_a_fence_takes_everything_of_earlier_attempts(tmp_path: Path) -> None:
    for name in (".staging-00001-aa", ".staging-00002-bb", ".staging-00003-cc", ".fenced-00001-dd"):
        (tmp_path / name / "folder").mkdir(parents=True)
        (tmp_path / name / "folder" / "file").touch()
    fence(tmp_path, keep=tmp_path / ".staging-00002-ee")
    assert [path.name for path in tmp_path.iterdir()] == [".staging-00003-cc"]
    fence(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_fence_that_cannot_empty_a_folder_fails_and_gives_the_shard_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".staging-00001-aa").mkdir()
    forge(tmp_path, state=AttemptState.stopped)
    monkeypatch.setattr(attempts, "_FENCE_SECONDS", 0.05)
    monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
    with pytest.raises(OSError, match="cannot be emptied"):
        Lease.acquire(tmp_path, QUICK)
    assert read_attempts(tmp_path)[-1].state is AttemptState.failed


def test_files_that_nfs_keeps_for_a_process_of_this_machine_hold_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ".staging-00001-aa"
    folder.mkdir()
    (folder / ".nfs000000001").touch()
    monkeypatch.setattr(attempts, "_FENCE_SECONDS", 0.05)
    monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
    fence(tmp_path)
    assert not folder.exists()


def test_a_commit_on_a_stale_handle_is_a_lost_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*paths: Path) -> None:
        raise OSError(errno.ESTALE, "stale file handle")

    with held(tmp_path, MUTE) as lease:
        staged = stage(lease)
        fence(tmp_path)
        monkeypatch.setattr(os, "replace", stale)
        with pytest.raises(LeaseLost):
            lease.commit(staged, tmp_path / "part")


def test_a_former_owner_removes_nothing(tmp_path: Path) -> None:
    """What it takes for left behind by its predecessor may be half of what its successor is committing."""
    former = Lease.acquire(tmp_path, MUTE)
    (tmp_path / "steps").write_text("")
    former.remove(tmp_path / "steps")
    former.remove(tmp_path / "never there")
    assert not (tmp_path / "steps").exists() and not list(former.staging.iterdir())
    with held(tmp_path, LeaseConfig(beat_seconds=0.05, stale_seconds=0.1)) as lease:
        lease.commit(stage(lease), tmp_path / "steps")
        with pytest.raises(LeaseLost):
            former.remove(tmp_path / "steps")
        assert (tmp_path / "steps").exists()
    former.end(AttemptState.stopped)


# --- disks ---


def test_a_failed_commit_of_the_owner_is_no_lost_lease(tmp_path: Path) -> None:
    with held(tmp_path) as lease:
        with pytest.raises(FileNotFoundError):
            lease.commit(stage(lease), tmp_path / "no folder" / "part")
        with pytest.raises(FileNotFoundError):
            lease.commit(lease.staging / "never written", tmp_path / "part")
        lease.check()


def test_a_vanished_shard_folder_is_an_error_and_no_lost_lease(tmp_path: Path) -> None:
    root = tmp_path / "shard"
    with held(root) as lease:
        staged = stage(lease)
        shutil.rmtree(root)
        with pytest.raises(FileNotFoundError, match="shard"):
            lease.check()
        with pytest.raises(FileNotFoundError, match="shard"):
            lease.commit(staged, root / "part")
    assert not root.exists()


def test_an_owner_that_cannot_say_that_it_lives_stops_after_stale_seconds(tmp_path: Path) -> None:
    with held(tmp_path) as lease:
        shutil.rmtree(tmp_path / "attempts")
        last = time.monotonic()
        lease.check()
        with pytest.raises(FileNotFoundError, match="attempt-00001"):
            while time.monotonic() - last < 5:
                lease.check()
                time.sleep(0.01)
        assert time.monotonic() - last >= QUICK.stale_seconds - 2 * QUICK.beat_seconds


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte free."""
    path = folder / "filling"
    with path.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return path


def is_refused(lease: Lease) -> bool:
    try:
        lease.check()
    except OSError:
        return True
    return False


def wait_until(condition: Callable[[], bool], limit: float = 10.0) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit
        time.sleep(0.01)


def test_a_full_disk_stops_the_owner_and_space_heals_it(small_disk: Path) -> None:
    root = small_disk / "shard"
    with held(root) as lease:
        filling = fill(small_disk)
        wait_until(lambda: is_refused(lease))
        with pytest.raises(OSError, match="No space left") as refused:
            lease.check()
        assert refused.value.errno == errno.ENOSPC
        assert read_attempts(root)[0].number == 1  # what stood there is whole
        filling.unlink()
        wait_until(lambda: not is_refused(lease))
    assert read_attempts(root)[0].state is AttemptState.stopped


def test_an_attempt_on_a_full_disk_keeps_nobody_waiting(small_disk: Path) -> None:
    forge(small_disk, state=AttemptState.stopped)
    filling = fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        Lease.acquire(small_disk, PATIENT)
    assert list(attempt_files(small_disk)) == [1]
    assert not list(small_disk.glob(".staging-*"))
    filling.unlink()
    assert seconds(lambda: Lease.acquire(small_disk, PATIENT).end(AttemptState.stopped)) < 1


def test_a_read_only_disk_stops_the_owner(small_disk: Path) -> None:
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    with held(small_disk) as lease:
        staged = stage(lease)
        subprocess.run(remount, check=True)
        with pytest.raises(OSError, match="Read-only"):
            lease.commit(staged, small_disk / "part")
        wait_until(lambda: is_refused(lease))
    with pytest.raises(OSError, match="Read-only"):
        Lease.acquire(small_disk, QUICK)


# --- clocks, records, ends ---


def test_a_clock_that_jumps_changes_nothing_about_who_holds_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps, real = random.Random(5), time.time
    monkeypatch.setattr(time, "time", lambda: real() + jumps.choice((-1e9, -3600, 0, 3600, 1e9)))
    forge(tmp_path / "silent")
    assert QUICK.stale_seconds <= seconds(lambda: Lease.acquire(tmp_path / "silent", QUICK)) < 2
    with held(tmp_path / "shard", PATIENT) as lease:
        for _ in range(5):
            with pytest.raises(LeaseHeld):
                Lease.acquire(tmp_path / "shard", PATIENT)
            lease.check()
        lease.commit(stage(lease), tmp_path / "part")


def test_what_an_attempt_reports_stands_in_its_next_sign_of_life(tmp_path: Path) -> None:
    with held(tmp_path) as lease:
        assert read_attempts(tmp_path)[0].progress == ShardProgress()
        progress = ShardProgress(num_chains=7, num_done=3, mean_steps_in_flight=1.5, tokens_per_second=9.0)
        lease.report(progress)
        wait_until(lambda: read_attempts(tmp_path)[0].progress == progress)
        assert read_attempts(tmp_path)[0].beat >= 1
        assert read_attempts(tmp_path)[0].owner == Owner.current()


@pytest.mark.parametrize("state", [state for state in AttemptState if state is not AttemptState.running])
def test_an_attempt_that_has_ended_leaves_the_shard_to_the_next_at_once(tmp_path: Path, state: AttemptState) -> None:
    lease = Lease.acquire(tmp_path, PATIENT)
    stage(lease)
    lease.report(ShardProgress(num_done=3))
    lease.end(state, "why")
    (first,) = read_attempts(tmp_path)
    assert (first.state, first.error, first.progress.num_done) == (state, "why", 3)
    assert not list(tmp_path.glob(".*"))
    assert not lease._thread.is_alive()
    assert seconds(lambda: Lease.acquire(tmp_path, PATIENT).end(AttemptState.finished)) < 1
    assert [attempt.number for attempt in read_attempts(tmp_path)] == [1, 2]


def test_a_former_owner_that_ends_without_having_noticed_says_lost(tmp_path: Path) -> None:
    former = Lease.acquire(tmp_path, MUTE)
    with held(tmp_path, LeaseConfig(beat_seconds=0.05, stale_seconds=0.1)) as lease:
        former.end(AttemptState.finished)
        lease.check()
    assert [attempt.state for attempt in read_attempts(tmp_path)] == [AttemptState.lost, AttemptState.stopped]
