"""kill -9 at random moments until it is done: every row once, none lost, and little work done twice."""

import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

from jobs.launch import ExitStatus
from specreason_batch.store.reading import scan
from tests.support.configs import write_models, write_prompts
from tests.support.near import same
from tests.support.nursery import Nursery
from tests.support.plain_loop import VOLATILE, Row
from tests.support.scripted_job import overrides

NUM_PROMPTS = 60
ACTIVE = 8
SCHEDULES = ("lockstep", "continuous", "waves", "overlapped")


@dataclass(slots=True)
class Toll:
    """What the kills cost."""

    kills: int = 0
    lost: int = 0
    doubled: int = 0
    redone: int = 0  # steps written that an uninterrupted run would not have written

    def __str__(self) -> str:
        return f"{self.kills} kills: {self.lost} rows lost, {self.doubled} rows doubled, {self.redone} steps redone"


def rows(output: Path, kind: str) -> list[Row]:
    """Committed rows in order of their keys, without what may differ by attempt."""
    frame = scan(output, kind)
    if frame is None:
        return []
    key = ["prompt_id", "sample_index"] + (["step_index"] if kind == "steps" else [])
    return frame.drop(VOLATILE, strict=False).sort(key).collect().rows(named=True)


def count(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def kill_until_done(nursery: Nursery, argv: Sequence[str], folder: Path, longest: float, chance: random.Random) -> int:
    """Start the job again and again, each time killed; the number of kills.

    One in four is killed within `longest` seconds of its start, the others of having the shard.
    """
    for kills in range(1000):
        env = {"SCRIPTED_PACE": "0.004", "SCRIPTED_SLICE": "0.03", "SCRIPTED_LOG": str(folder / "steps")}
        pid = nursery.start(argv, folder / "job.log", env)
        if chance.random() < 0.75:
            _wait_for_attempt(folder / "out", pid)
        if _killed(pid, chance.uniform(0, longest)):
            assert nursery.wait() == -signal.SIGKILL
        else:
            assert nursery.wait() == ExitStatus.finished, (folder / "job.log").read_text()[-2000:]
            return kills
    raise AssertionError


def _wait_for_attempt(output: Path, pid: int) -> None:
    """Until the job has taken a shard, or is over."""
    before = len(list(output.glob("*/attempts/*.json")))
    while len(list(output.glob("*/attempts/*.json"))) == before and not _is_over(pid):
        time.sleep(0.005)


def _killed(pid: int, after: float) -> bool:
    """Whether it was still there to be killed."""
    end = time.monotonic() + after
    while time.monotonic() < end:
        time.sleep(0.002)
        if _is_over(pid):
            return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def _is_over(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def compare(output: Path, reference: Path, toll: Toll) -> None:
    for kind in ("chains", "steps"):
        made, wanted = rows(output, kind), rows(reference, kind)
        keys = [(row["prompt_id"], row["sample_index"], row.get("step_index")) for row in made]
        toll.doubled += len(keys) - len(set(keys))
        toll.lost += len({(row["prompt_id"], row["sample_index"], row.get("step_index")) for row in wanted} - {*keys})
        frames = [pl.DataFrame(rows, infer_schema_length=None) for rows in (made, wanted)]
        assert same(*frames)
    for shard in output.glob("*/chains"):
        assert len(list(shard.parent.glob("checkpoints/*"))) <= 2, "a kill right after the last commit leaves them"
        assert len(list(shard.parent.glob(".staging-*"))) <= 1


@pytest.mark.slow
def test_a_hundred_kills_of_the_scripted_job_lose_and_double_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_models(tmp_path / "models")
    for name in ("x", "y"):
        write_prompts(tmp_path / "shards" / f"{name}.parquet", 30, prompt_id=[f"{name}{row}" for row in range(30)])
    chance, toll = random.Random(4), Toll()
    common = [
        *overrides(tmp_path),
        f"input.path={tmp_path}/shards",
        f"schedule.active_size={ACTIVE}",
        *("parts.chains=4", "checkpoint.seconds=0", "samples_per_prompt=2"),
    ]
    with Nursery("tests.support.scripted_job") as nursery:
        pid = nursery.start(
            [*common, f"output_dir={tmp_path}/whole"], tmp_path / "log", {"SCRIPTED_LOG": str(tmp_path / "steps")}
        )
        assert pid and nursery.wait() == ExitStatus.finished, (tmp_path / "log").read_text()
        run = 0
        while toll.kills < 100:
            folder = tmp_path / f"run{run}"
            folder.mkdir()
            schedule = SCHEDULES[run % len(SCHEDULES)]
            argv = [*common, f"output_dir={folder}/out", f"schedule={schedule}"]
            toll.kills += kill_until_done(nursery, argv, folder, 0.5, chance)
            compare(folder / "out", tmp_path / "whole", toll)
            toll.redone += count(folder / "steps") - count(tmp_path / "steps")
            run += 1
    with capsys.disabled():
        print(f"\n{toll} ({run} runs of {2 * NUM_PROMPTS} chains, {count(tmp_path / 'steps')} steps each)")
    assert (toll.lost, toll.doubled) == (0, 0)
    assert toll.redone <= toll.kills * ACTIVE * 4, "a checkpoint after every round: each chain redoes a step or two"


@pytest.mark.slow
@pytest.mark.vllm
def test_ten_kills_of_the_toy_pair_lose_and_double_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance, toll = random.Random(7), Toll()
    common = ["limit=70", "schedule.active_size=12", "parts.chains=10", "checkpoint.seconds=0", "log.seconds=1"]
    with Nursery("tests.support.toy_job") as nursery:
        nursery.start(
            [*common, f"output_dir={tmp_path}/whole"], tmp_path / "log", {"SCRIPTED_LOG": str(tmp_path / "steps")}
        )
        assert nursery.wait() == ExitStatus.finished, (tmp_path / "log").read_text()
        run = 0
        while toll.kills < 10:
            folder = tmp_path / f"run{run}"
            folder.mkdir()
            toll.kills += kill_until_done(nursery, [*common, f"output_dir={folder}/out"], folder, 12.0, chance)
            compare(folder / "out", tmp_path / "whole", toll)
            toll.redone += count(folder / "steps") - count(tmp_path / "steps")
            run += 1
    with capsys.disabled():
        print(f"\ntoy pair, {toll} ({run} runs of 70 chains, {count(tmp_path / 'steps')} steps each)")
    assert (toll.lost, toll.doubled) == (0, 0)
    assert 0 < toll.redone <= toll.kills * 12 * 4
