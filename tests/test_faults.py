"""The job as a process on bad days: full and read-only disks, vanished folders, rivals, jumping clocks."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.launch import ExitStatus
from specreason_batch.store.attempts import AttemptState, read_attempts
from specreason_batch.store.reading import scan
from tests.support.configs import write_models, write_prompts
from tests.support.nursery import Nursery
from tests.support.scripted_job import overrides
from tests.test_kills import rows

NUM_PROMPTS = 60
QUICK = ["lease.beat_seconds=0.2", "lease.stale_seconds=1.5"]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery("tests.support.scripted_job") as made:
        yield made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Path:
    """Models, prompts, and an uninterrupted run's output in `whole`."""
    folder = tmp_path_factory.mktemp("faults")
    write_models(folder / "models")
    write_prompts(folder / "prompts.parquet", NUM_PROMPTS)
    nursery.start(arguments(folder, folder / "whole"), folder / "log")
    assert nursery.wait() == ExitStatus.finished, (folder / "log").read_text()
    return folder


def arguments(place: Path, output: Path, *more: str) -> list[str]:
    common = [f"input.path={place}/prompts.parquet", "schedule.active_size=8", "checkpoint.seconds=0", *QUICK]
    return [*overrides(place), *common, f"output_dir={output}", *more]


def run(nursery: Nursery, argv: list[str], log: Path, **env: str) -> tuple[int, str]:
    """A job's exit status and what it said; never a traceback."""
    log.unlink(missing_ok=True)
    nursery.start(argv, log, env)
    status = nursery.wait()
    said = log.read_text()
    assert "Traceback" not in said
    return status, said


def whole(place: Path, output: Path) -> bool:
    return all(rows(output, kind) == rows(place / "whole", kind) for kind in ("chains", "steps"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_in_a_clear_message_damages_nothing_and_a_rerun_with_space_heals(
    place: Path, small_disk: Path, nursery: Nursery
) -> None:
    argv = arguments(place, small_disk / "out", "parts.chains=3")
    status, said = run(nursery, argv, place / "full.log")
    assert status == ExitStatus.failed
    assert "No space left on device" in said and "what is saved is safe" in said
    committed = rows(small_disk / "out", "chains")
    assert 0 < len(committed) < NUM_PROMPTS
    wanted = {row["prompt_id"]: row for row in rows(place / "whole", "chains")}
    assert all(row == wanted[row["prompt_id"]] for row in committed)
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    status, said = run(nursery, argv, place / "full.log")
    assert status == ExitStatus.finished and "resumed: " in said
    assert whole(place, small_disk / "out")


def test_a_read_only_output_is_refused_before_anything_starts_and_harms_nothing(
    place: Path, small_disk: Path, nursery: Nursery
) -> None:
    argv = arguments(place, small_disk / "out", "limit=5")
    assert run(nursery, argv, place / "ro.log")[0] == ExitStatus.finished
    before = rows(small_disk / "out", "chains")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    status, said = run(nursery, arguments(place, small_disk / "out"), place / "ro.log")
    assert status == ExitStatus.failed and "Read-only file system" in said
    assert rows(small_disk / "out", "chains") == before
    subprocess.run(["mount", "-o", "remount,rw,size=40m", str(small_disk)], check=True)
    assert run(nursery, arguments(place, small_disk / "out"), place / "ro.log")[0] == ExitStatus.finished
    assert whole(place, small_disk / "out")


def wait_for(condition: object, seconds: float = 60.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def start_slowly(nursery: Nursery, argv: list[str], log: Path) -> int:
    """A job that takes its time; returns once it has saved something."""
    log.unlink(missing_ok=True)
    output = Path(next(item for item in argv if item.startswith("output_dir=")).removeprefix("output_dir="))
    pid = nursery.start(argv, log, {"SCRIPTED_PACE": "0.05"})
    wait_for(lambda: list(output.glob("prompts/checkpoints/*")))
    return pid


@pytest.mark.parametrize("what", ["out", "out/prompts"])
def test_a_vanished_folder_is_a_clear_failure(place: Path, nursery: Nursery, what: str, tmp_path: Path) -> None:
    argv = arguments(place, tmp_path / "out", "parts.chains=3")
    start_slowly(nursery, argv, tmp_path / "log")
    (tmp_path / what).rename(tmp_path / "elsewhere")
    assert nursery.wait() == ExitStatus.failed
    said = (tmp_path / "log").read_text()
    assert "failed: " in said and "No such file or directory" in said and "Traceback" not in said
    if what == "out":
        (tmp_path / "elsewhere").rename(tmp_path / "out")
    else:
        shutil.rmtree(tmp_path / "out" / "prompts", ignore_errors=True)
        (tmp_path / "elsewhere").rename(tmp_path / "out" / "prompts")
    assert run(nursery, argv, tmp_path / "log")[0] == ExitStatus.finished
    assert whole(place, tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_saves_everything_and_the_next_run_goes_on_inside_its_chains(
    place: Path, nursery: Nursery, number: int, tmp_path: Path
) -> None:
    argv = arguments(place, tmp_path / "out", "checkpoint.seconds=1000")
    pid = nursery.start(argv, tmp_path / "log", {"SCRIPTED_PACE": "0.02"})
    wait_for(lambda: list((tmp_path / "out").glob("prompts/attempts/*")))
    time.sleep(1.0)
    began = time.monotonic()
    os.kill(pid, number)
    assert nursery.wait() == ExitStatus.stopped
    assert time.monotonic() - began < 5
    assert "everything is saved; run the same command again" in (tmp_path / "log").read_text()
    assert [item.state for item in read_attempts(tmp_path / "out" / "prompts")] == [AttemptState.stopped]
    status, said = run(nursery, argv, tmp_path / "log")
    assert status == ExitStatus.finished
    (resumed,) = [line for line in said.splitlines() if "resumed: " in line]
    assert " 8 in flight at " in resumed and "at 0.0 steps" not in resumed
    assert "are redone" not in said, "a stop in order loses nothing that is not in its chains' own counts"
    assert whole(place, tmp_path / "out")


def test_a_second_job_on_a_live_shard_leaves_with_a_clear_message(
    place: Path, nursery: Nursery, tmp_path: Path
) -> None:
    argv = arguments(place, tmp_path / "out")
    pid = start_slowly(nursery, argv, tmp_path / "log")
    with Nursery("tests.support.scripted_job") as other:
        status, said = run(other, argv, tmp_path / "other.log")
    assert status == ExitStatus.held
    assert f"pid {pid} works on it" in said and "another job works on what is left" in said
    assert nursery.wait() == ExitStatus.finished
    assert whole(place, tmp_path / "out")


def test_a_suspended_owner_that_was_replaced_commits_nothing_when_it_wakes_up(
    place: Path, nursery: Nursery, tmp_path: Path
) -> None:
    """A split brain: the same task twice, as after a node was thought dead."""
    argv = arguments(place, tmp_path / "out", "parts.chains=3")
    old = start_slowly(nursery, argv, tmp_path / "log")
    os.kill(old, signal.SIGSTOP)
    with Nursery("tests.support.scripted_job") as other:
        began = time.monotonic()
        status, _ = run(other, argv, tmp_path / "other.log")
        assert status == ExitStatus.finished and time.monotonic() - began > 1.5, "it waited for a sign of life"
    assert whole(place, tmp_path / "out")
    files = sorted((tmp_path / "out").rglob("*.parquet"))
    os.kill(old, signal.SIGCONT)
    assert nursery.wait() == ExitStatus.held
    assert "was taken over by" in (tmp_path / "log").read_text()
    assert sorted((tmp_path / "out").rglob("*.parquet")) == files
    assert whole(place, tmp_path / "out")


def test_a_jumping_clock_changes_nothing(place: Path, nursery: Nursery, tmp_path: Path) -> None:
    argv = arguments(place, tmp_path / "out", "parts.seconds=1", "checkpoint.seconds=0.2")
    status, _ = run(nursery, argv, tmp_path / "log", SCRIPTED_CLOCK="jumping", SCRIPTED_PACE="0.01")
    assert status == ExitStatus.finished
    assert whole(place, tmp_path / "out")
    rounds = scan(tmp_path / "out", "rounds")
    assert rounds is not None
    moments = rounds.collect()["started_at"]
    assert (moments.max() - moments.min()).total_seconds() > 3600, "it did jump"  # type: ignore[operator]
    (attempt,) = read_attempts(tmp_path / "out" / "prompts")
    assert 0 < attempt.progress.seconds < 120


def test_torn_files_and_leftovers_of_every_kind_are_lived_with(place: Path, nursery: Nursery, tmp_path: Path) -> None:
    argv = arguments(place, tmp_path / "out", "parts.chains=5")
    pid = start_slowly(nursery, argv, tmp_path / "log")
    os.kill(pid, signal.SIGKILL)
    assert nursery.wait() == -signal.SIGKILL
    shard = tmp_path / "out" / "prompts"
    newest = max((shard / "checkpoints").iterdir())
    (newest / "chains.parquet").write_bytes(b"PAR1")
    for kind in ("steps", "rejects"):
        (shard / kind).mkdir(exist_ok=True)
        (shard / kind / "part-00099-deadbeef.parquet").write_bytes(b"PAR1 half a file")
    (shard / ".staging-00001-deadbeef").mkdir()
    (shard / ".staging-00001-deadbeef" / "chains-part").write_bytes(b"PAR1")
    (shard / "attempts" / ".attempt-00001.new").write_text('{"number": 1')
    status, said = run(nursery, argv, tmp_path / "log")
    assert status == ExitStatus.finished
    assert f"{newest.name} cannot be used, the one before it is taken" in said
    assert whole(place, tmp_path / "out")
    assert not list(shard.rglob("*deadbeef*"))


def test_a_torn_part_is_named_and_nothing_is_overwritten(place: Path, nursery: Nursery, tmp_path: Path) -> None:
    """Committed parts were whole when they were put in place: what is torn now was damaged since, by somebody else."""
    argv = arguments(place, tmp_path / "out", "parts.chains=5", "limit=20")
    assert run(nursery, argv, tmp_path / "log")[0] == ExitStatus.finished
    part = sorted((tmp_path / "out" / "prompts" / "chains").iterdir())[1]
    part.write_bytes(part.read_bytes()[:100])
    status, said = run(nursery, arguments(place, tmp_path / "out"), tmp_path / "log")
    assert status == ExitStatus.invalid
    assert f"{part.name} is damaged" in said and "move it away" in said
    for kind in ("chains", "steps"):
        (tmp_path / "out" / "prompts" / kind / part.name).unlink()
    assert run(nursery, arguments(place, tmp_path / "out"), tmp_path / "log")[0] == ExitStatus.finished
    assert whole(place, tmp_path / "out")


def test_a_bad_node_is_told_apart_and_the_shard_is_free_at_once(place: Path, nursery: Nursery, tmp_path: Path) -> None:
    argv = arguments(place, tmp_path / "out", "limit=5")
    check = "recovery.node_check='echo the GPU is gone; exit 3'"
    status, said = run(nursery, [*argv, check], tmp_path / "log")
    assert status == ExitStatus.bad_node
    assert "bad node: " in said and "ended with status 3" in said and "the GPU is gone" in said
    (attempt,) = read_attempts(tmp_path / "out" / "prompts")
    assert attempt.state is AttemptState.bad_node
    began = time.monotonic()
    assert run(nursery, argv, tmp_path / "log")[0] == ExitStatus.finished
    assert time.monotonic() - began < 10
