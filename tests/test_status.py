"""A run's status: outputs made by the store's own code, with attempts as their owners left them; figures by hand."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs import status as job
from specreason_batch.config import InputConfig, LeaseConfig
from specreason_batch.status import (
    Detail,
    QueuedJob,
    RunStatus,
    ShardState,
    ShardStatus,
    StatusReader,
    read_queue,
)
from specreason_batch.store.attempts import Attempt, AttemptState, Lease, Owner, ShardProgress
from specreason_batch.store.manifest import claim_output
from specreason_batch.store.parts import ShardPaths, ShardWriter
from specreason_batch.store.prompts import Reject
from specreason_batch.store.schemas import STEPS, chains_schema
from tests.support.configs import make_config

CHAINS = chains_schema(pa.schema([]), has_gold_answer=False)
FOREIGN = Owner(host="node7", pid=4711, machine="another boot", born="1", slurm_job="815_3")
SAMPLES = 2


def make_run(folder: Path, rows: dict[str, int], **changes: Any) -> Path:
    """Input shards with so many rows, and an output folder with nothing but run.json."""
    prompts = folder / "prompts"
    prompts.mkdir(parents=True)
    for name, num_rows in rows.items():
        table = pa.table({"prompt_id": [f"{name}-{row}" for row in range(num_rows)], "prompt": ["?"] * num_rows})
        pq.write_table(table, prompts / f"{name}.parquet")
    values = {"samples_per_prompt": SAMPLES, "input": InputConfig(path=str(prompts), shards=[0])} | changes
    config = make_config(folder, **values)
    claim_output(Path(config.output_dir), {}, config)
    return Path(config.output_dir)


def commit(output: Path, name: str, num_chains: int, num_given_up: int = 0, num_unusable: int = 0) -> None:
    """One more part of a shard, and its unusable rows."""
    lease = Lease.acquire(output.parent / "elsewhere", LeaseConfig())  # no attempt of the shard's own
    (output / name).mkdir(exist_ok=True)
    writer = ShardWriter(
        paths=ShardPaths(output / name),
        lease=lease,
        chains_schema=CHAINS,
        metadata={},
        chains_per_part=1000,
        seconds_per_part=1e9,
    )
    reject = Reject(prompt_id="p", sample_index=0, file="f", row=0, reason="why")
    for index in range(num_chains):
        step = dict.fromkeys(STEPS.names)
        writer.add_chain(dict.fromkeys(CHAINS.names), [step], reject if index < num_given_up else None)
    if num_unusable:
        writer.write_input_rejects([replace(reject, sample_index=None)] * num_unusable)
    writer.commit()
    lease.end(AttemptState.finished)


def attempt(output: Path, name: str, number: int = 1, *, age: float = 5.0, **changes: Any) -> Path:
    """An attempt's file, `age` seconds after its last sign of life."""
    path = output / name / "attempts" / f"attempt-{number:05d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Attempt(number=number, owner=FOREIGN, started_at=0.0, beat_at=time.time() - age)
    path.write_text(json.dumps(asdict(replace(made, **changes))))
    return path


def no_queue(jobs: set[str]) -> None:
    return None


def read(output: Path) -> RunStatus:
    return StatusReader(output, no_queue).read()


def shards(output: Path) -> dict[str, ShardStatus]:
    return {shard.name: shard for shard in read(output).shards}


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """Six shards of ten rows, twenty chains each: done, running, killed, failed, stopped, never started."""
    output = make_run(tmp_path, dict.fromkeys("abcdef", 10), lease=LeaseConfig(beat_seconds=10, stale_seconds=60))
    commit(output, "a", 12, num_unusable=1)
    commit(output, "a", 6)
    whole = ShardProgress(num_chains=18, num_done=18, num_accepted=30, num_decided=40, tokens_per_second=99.0)
    attempt(output, "a", state=AttemptState.finished, progress=whole, age=500)
    commit(output, "b", 5, num_given_up=2)
    attempt(output, "b", 1, state=AttemptState.stopped, progress=ShardProgress(num_accepted=10, num_decided=20))
    running = ShardProgress(
        num_chains=20,
        num_done=4,
        num_in_flight=8,
        mean_steps_in_flight=4.25,
        num_accepted=50,
        num_decided=60,
        tokens_per_second=120.0,
        chains_per_second=0.5,
    )
    attempt(output, "b", 2, progress=running, age=7)
    attempt(output, "c", progress=running, age=200)
    attempt(output, "d", 1, state=AttemptState.failed, error="out of memory", age=400)
    attempt(output, "d", 2, state=AttemptState.bad_node, error="Xid 79", age=300)
    commit(output, "e", 3)
    attempt(output, "e", 1, state=AttemptState.failed, error="disk full", age=900)
    attempt(output, "e", 2, state=AttemptState.stopped, error="Stopped: signal SIGTERM", age=800)
    return output


def test_every_shard_of_the_input_stands_in_its_state(output: Path) -> None:
    found = {name: (shard.state, shard.detail) for name, shard in shards(output).items()}
    assert found == {
        "a": (ShardState.done, None),
        "b": (ShardState.in_flight, None),
        "c": (ShardState.idle, Detail.silent),
        "d": (ShardState.failed, Detail.node),
        "e": (ShardState.idle, Detail.stopped),
        "f": (ShardState.idle, Detail.new),
    }


def test_a_shard_in_flight_has_the_figures_of_its_attempts_and_files(output: Path) -> None:
    shard = shards(output)["b"]
    assert (shard.num_done, shard.num_chains, shard.num_rejects) == (5, 20, 2)
    assert (shard.num_in_flight, shard.mean_steps_in_flight, shard.tokens_per_second) == (8, 4.25, 120.0)
    assert shard.acceptance == 60 / 80  # of both attempts
    assert shard.eta_seconds == 15 / 0.5
    assert shard.beat_age_seconds == pytest.approx(7, abs=3)
    assert (shard.num_attempts, shard.host, shard.pid, shard.slurm_job) == (2, "node7", 4711, "815_3")


def test_what_nobody_works_on_has_no_rates(output: Path) -> None:
    for name in "acdef":
        shard = shards(output)[name]
        assert (shard.tokens_per_second, shard.chains_per_second, shard.num_in_flight) == (0.0, 0.0, 0)
    assert shards(output)["c"].eta_seconds is None
    assert shards(output)["a"].eta_seconds == 0.0


def test_the_last_error_is_that_of_the_newest_attempt_that_failed(output: Path) -> None:
    errors = {name: shard.last_error for name, shard in shards(output).items()}
    assert errors == {"a": None, "b": None, "c": None, "d": "Xid 79", "e": "disk full", "f": None}


def test_the_totals_are_sums_over_all_shards(output: Path) -> None:
    status = read(output)
    assert status.num_shards == {"in_flight": 1, "failed": 1, "idle": 3, "done": 1}
    assert (status.num_done, status.num_chains, status.num_rejects) == (18 + 5 + 3, 18 + 5 * 20, 1 + 2)
    assert (status.tokens_per_second, status.num_in_flight) == (120.0, 8)
    assert status.acceptance == (30 + 10 + 50 + 50) / (40 + 20 + 60 + 60)
    assert status.eta_seconds == (118 - 26) / 0.5
    assert status.oldest_beat_seconds == pytest.approx(7, abs=3)
    assert status.last_failure is not None and status.last_failure.name == "d"
    assert not status.is_done


def test_where_nothing_runs_nobody_knows_when_it_ends(output: Path) -> None:
    attempt(output, "b", 2, state=AttemptState.stopped)
    status = read(output)
    assert status.eta_seconds is None and status.oldest_beat_seconds is None
    assert "?" in shown(status)


def test_the_run_is_done_when_every_shard_is(tmp_path: Path) -> None:
    output = make_run(tmp_path, {"a": 2, "b": 3})
    commit(output, "a", 4)
    commit(output, "b", 4, num_unusable=1)
    status = read(output)
    assert status.is_done and status.eta_seconds == 0.0  # without any attempt on record: files decide
    assert (status.num_done, status.num_chains) == (8, 8)


def test_a_shard_that_was_killed_after_its_last_chain_is_done(tmp_path: Path) -> None:
    """Its last sign of life did not know yet that a row was unusable."""
    output = make_run(tmp_path, {"a": 3})
    commit(output, "a", 4, num_unusable=1)
    attempt(output, "a", progress=ShardProgress(num_chains=6), age=1e4)
    assert shards(output)["a"].state is ShardState.done


def test_a_limit_of_the_newest_attempt_counts_and_not_that_of_the_pilot(tmp_path: Path) -> None:
    """run.json keeps the configuration of the first task."""
    output = make_run(tmp_path, {"a": 10, "b": 10, "c": 10}, limit=3)
    commit(output, "a", 6)
    attempt(output, "a", state=AttemptState.stopped, progress=ShardProgress(num_chains=20))
    commit(output, "b", 6)
    attempt(output, "b", state=AttemptState.finished, progress=ShardProgress(num_chains=6))
    found = shards(output)
    assert {name: (shard.num_done, shard.num_chains) for name, shard in found.items()} == {
        "a": (6, 20),
        "b": (6, 6),
        "c": (0, 6),
    }
    assert [shard.state for shard in found.values()] == [ShardState.idle, ShardState.done, ShardState.idle]


def test_a_finished_shard_whose_files_were_removed_is_to_be_done_again(tmp_path: Path) -> None:
    output = make_run(tmp_path, {"a": 2})
    attempt(output, "a", state=AttemptState.finished, progress=ShardProgress(num_chains=4))
    assert (shards(output)["a"].state, shards(output)["a"].detail) == (ShardState.idle, Detail.undone)


def test_steps_and_rejects_without_their_chains_file_count_for_nothing(tmp_path: Path) -> None:
    output = make_run(tmp_path, {"a": 2})
    commit(output, "a", 2, num_given_up=1)
    commit(output, "a", 2, num_given_up=1)
    next((output / "a" / "chains").glob("part-00001-*")).unlink()
    assert (shards(output)["a"].num_done, shards(output)["a"].num_rejects) == (2, 1)


def test_an_unreachable_input_leaves_a_question_mark_and_no_more(output: Path) -> None:
    for path in (output.parent / "prompts").iterdir():
        path.unlink()
    status = read(output)
    found = {shard.name: (shard.state, shard.num_chains) for shard in status.shards}
    assert found == {
        "a": (ShardState.done, 18),
        "b": (ShardState.in_flight, 20),
        "c": (ShardState.idle, 20),
        "d": (ShardState.failed, None),
        "e": (ShardState.idle, None),
    }
    assert status.num_chains is None and not status.input_reachable
    assert "26/?" in shown(status) and "cannot be reached" in shown(status)


def test_a_folder_with_a_manifest_alone_and_no_input_is_not_done(tmp_path: Path) -> None:
    output = make_run(tmp_path, {})
    status = read(output)
    assert not status.is_done and status.num_chains is None
    assert "no shards" in shown(status)


def test_a_clock_that_is_behind_the_owners_makes_no_negative_age(output: Path) -> None:
    attempt(output, "b", 2, age=-3600)
    assert shards(output)["b"].beat_age_seconds == 0.0
    assert shards(output)["b"].state is ShardState.in_flight


def test_a_process_that_died_on_this_machine_is_not_waited_for(output: Path) -> None:
    attempt(output, "b", 2, owner=replace(Owner.current(), born="12"), age=0)
    assert (shards(output)["b"].state, shards(output)["b"].detail) == (ShardState.idle, Detail.gone)


@pytest.mark.parametrize("content", ["", '{"number": 2, "owner', "[]"])
def test_an_attempts_file_that_is_not_whole_hides_nothing_else(output: Path, content: str) -> None:
    attempt(output, "d", 3).write_text(content)
    shard = shards(output)["d"]
    assert (shard.state, shard.detail, shard.num_attempts) == (ShardState.idle, Detail.nameless, 3)
    assert shard.last_error == "Xid 79"


def test_a_torn_part_fails_its_shard_and_no_other(output: Path) -> None:
    part = next((output / "a" / "chains").glob("part-00001-*"))
    part.write_bytes(part.read_bytes()[:100])
    found = shards(output)
    assert (found["a"].state, found["a"].detail) == (ShardState.failed, Detail.damaged)
    assert part.name in (found["a"].last_error or "")
    assert found["b"].state is ShardState.in_flight


def test_parts_are_read_once_however_often_the_status_is(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = StatusReader(output, no_queue)
    first = reader.read()
    commit(output, "e", 4)
    opened: list[str] = []
    real = pq.read_metadata
    monkeypatch.setattr(pq, "read_metadata", lambda path: opened.append(str(path)) or real(path))  # type: ignore[func-returns-value]
    assert reader.read().num_done == first.num_done + 4
    assert len([path for path in opened if "/chains/" in path]) == 1
    assert not [path for path in opened if "/prompts/" in path]


@pytest.mark.slow
def test_three_hundred_shards_of_twenty_parts_take_seconds(tmp_path: Path) -> None:
    names = [f"shard-{index:05d}" for index in range(300)]
    output = make_run(tmp_path, dict.fromkeys(names, 30))
    commit(output, names[0], 3)
    (part,) = (output / names[0] / "chains").iterdir()
    whole = part.read_bytes()
    for name in names:
        (output / name / "chains").mkdir(parents=True, exist_ok=True)
        for index in range(20):
            (output / name / "chains" / f"part-{index:05d}-abcdef01.parquet").write_bytes(whole)
        attempt(output, name, state=AttemptState.finished, progress=ShardProgress(num_chains=60))
    part.unlink()
    began = time.monotonic()
    status = read(output)
    took = time.monotonic() - began
    assert status.is_done and status.num_done == 300 * 20 * 3
    print(f"status of 300 shards with 20 parts each: {took:.2f} s")
    assert took < 10


# --- the queue ---


def test_the_queues_view_stands_beside_the_owner(output: Path) -> None:
    asked: list[set[str]] = []

    def queue(jobs: set[str]) -> tuple[QueuedJob, ...]:
        asked.append(jobs)
        return (QueuedJob(id="815_3", state="PD", reason="BeginTime"), QueuedJob(id="815_4", state="R", reason="None"))

    status = StatusReader(output, queue).read()
    assert asked == [{"815_3"}]
    queued = {shard.name: shard.queued.state if shard.queued else None for shard in status.shards}
    assert queued == {"a": "PD", "b": "PD", "c": "PD", "d": "PD", "e": "PD", "f": None}
    assert "PD (BeginTime) 815_3" in shown(status) and "squeue: 1 PD, 1 R" in shown(status)
    assert job.as_document(status)["squeue"][1] == {"id": "815_4", "state": "R", "reason": "None"}


def fake_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = folder / "bin" / "squeue"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def test_squeue_is_asked_for_whole_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(
        tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/asked; printf "90_1|R|None\\n90_2|PD|Resources\\n7|CG|x|y\\n"'
    )
    assert read_queue({"90_1", "90_2", "7"}) == (
        QueuedJob(id="90_1", state="R", reason="None"),
        QueuedJob(id="90_2", state="PD", reason="Resources"),
        QueuedJob(id="7", state="CG", reason="x|y"),
    )
    assert "--jobs=7,90 " in (tmp_path / "asked").read_text()


def test_a_squeue_that_fails_or_is_missing_is_left_out(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(output.parent, monkeypatch, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert read_queue({"90_1"}) is None
    monkeypatch.setenv("PATH", str(output.parent / "nowhere"))
    assert read_queue({"90_1"}) is None
    assert job.as_document(StatusReader(output).read())["squeue"] is None


# --- what a person and a script see ---


def shown(status: RunStatus, width: int = 140, max_shards: int | None = None) -> str:
    console = Console(width=width, record=True, force_terminal=False, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(job.render(status, width, max_shards))
    return console.export_text()


def test_the_table_holds_what_matters_in_100_columns(output: Path) -> None:
    text = shown(read(output), 100)
    assert all(len(line) <= 100 for line in text.splitlines())
    for piece in ("18/18", "5/20", "8 at 4.2", "0:00:30", "failed: node", "idle: silent", "26/118", "0:03:04"):
        assert piece in text
    assert "1 in flight, 1 failed, 3 idle, 1 done" in text
    assert "d: Xid 79" in text and "e: disk full" in text


def test_a_screen_too_small_for_all_shows_the_most_urgent(output: Path) -> None:
    text = shown(read(output), max_shards=2)
    assert "in flight" in text and "failed: node" in text and "… 4 more" in text
    assert "stopped" not in text and "26/118" in text


def test_the_json_holds_the_documented_keys(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.main([str(output), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["total"]["num_shards"] == {"in_flight": 1, "failed": 1, "idle": 3, "done": 1}
    assert (document["total"]["last_error"], document["total"]["last_error_shard"]) == ("Xid 79", "d")
    assert document["shards"][1]["state"] == "in_flight" and document["shards"][1]["acceptance"] == 0.75
    told = (Path(__file__).parent.parent / "docs" / "data.md").read_text().partition("## jobs.status --json")[2]
    keys = {*document, *document["total"], *document["shards"][0], "id", "state", "reason"}
    assert {key for key in keys if f"`{key}`" not in told} == set()


def test_every_field_of_an_attempts_file_is_documented(output: Path) -> None:
    written = json.loads((output / "b" / "attempts" / "attempt-00002.json").read_text())
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    told = text.partition("## attempts/")[2].partition("\n## ")[0]
    keys = {*written, *written["owner"], *written["progress"], *AttemptState}
    assert {key for key in keys if f"`{key}`" not in told} == set()


def test_a_plain_call_prints_the_table_and_succeeds_whatever_the_state(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.main([str(output)])
    assert "failed: node" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [None, "", '{"config": ', "[]", "{}", '{"config": {"input": 3}}', '{"config": null}']
)
def test_a_folder_without_a_readable_run_is_one_message_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    for arguments in ([], ["--json"], ["--watch"]):
        with pytest.raises(SystemExit) as left:
            job.main([str(tmp_path), *arguments])
        shown = capsys.readouterr()
        assert left.value.code == 2 and shown.out == ""
        assert shown.err.startswith("error: ") and "run.json" in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize("arguments", [["--watch", "x"], ["--watch", "0"], ["--watch", "1", "--json"], []])
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        job.main([*arguments] if not arguments else ["somewhere", *arguments])
    assert left.value.code == 2 and "usage" in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [False, True])
def test_watching_ends_when_all_is_done(tmp_path: Path, is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    output = make_run(tmp_path, {"a": 2})
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        commit(output, "a", 2)

    monkeypatch.setattr(time, "sleep", sleep)
    screen = (tmp_path / "screen").open("w")
    console = Console(file=screen, force_terminal=is_terminal, width=120, height=20)
    job.watch(StatusReader(output, no_queue), console, 3.0)
    screen.close()
    assert pauses == [3.0, 3.0]
    assert "4/4" in (tmp_path / "screen").read_text()


def test_watching_ends_quietly_at_ctrl_c(output: Path) -> None:
    command = [sys.executable, "-m", "jobs.status", str(output), "--watch", "0.2"]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    while "in flight" not in watcher.stdout.readline():
        assert watcher.poll() is None
    watcher.send_signal(signal.SIGINT)
    _, errors = watcher.communicate(timeout=30)
    assert (watcher.returncode, errors) == (0, "")
