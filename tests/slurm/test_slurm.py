"""The whole way through a real Slurm: whatever it does to a task, each chain is in the output once."""

import os
import signal
import sys
from pathlib import Path

import polars as pl
import pytest

from specreason_batch.store.attempts import AttemptState, read_attempts
from specreason_batch.store.reading import scan
from tests.slurm.cluster import GRACE_SECONDS, wait_for
from tests.slurm.place import ROOT, Place

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# The first run of a task takes its time, so that something can happen to it; those after it don't.
SLOW_AT_FIRST = "if [[ -n ${SLURM_RESTART_COUNT:-} ]]; then export SCRIPTED_PACE=0; fi"


def test_an_array_with_a_throttle_makes_every_row_once_and_keeps_to_it(place: Place) -> None:
    place.write_shards(6)
    place.submit("throttle=2")
    (job,) = place.jobs
    most = 0

    def all_over() -> bool:
        nonlocal most
        states = list(place.cluster.states(job).values())
        most = max(most, states.count("RUNNING"))
        return set(states) == {"COMPLETED"}

    wait_for("six tasks to complete", all_over, 120)
    assert most == 2
    assert place.chains() == place.expected(6)


def test_a_task_ahead_of_its_time_limit_requeues_itself_and_resumes(place: Place) -> None:
    place.pace, place.first = 1.0, SLOW_AT_FIRST
    place.write_shards(1)
    place.submit("time=1", "sbatch=--signal=USR2@15")  # Slurm takes 30 s more: after 15 s at the earliest
    (job,) = place.jobs
    place.wait_for_log(f"{job}_0", "is requeued", 65)
    place.cluster.wait_until(job, "COMPLETED")
    log = place.log(f"{job}_0")
    assert "signal SIGUSR2" in log and "stopped; " in log
    assert "restart 1 of at most 30" in log and "resumed: " in log
    assert place.chains() == place.expected(1)


def test_a_preempted_task_saves_within_the_grace_time_is_requeued_once_and_resumes(place: Place) -> None:
    place.pace, place.first = 0.5, SLOW_AT_FIRST
    place.write_shards(1)
    place.submit()
    (job,) = place.jobs
    place.wait_for_log(f"{job}_0", " active")
    node = place.cluster.job(f"{job}_0")["NodeList"]
    other = place.call(
        *("sbatch", "--parsable", "--partition=high", f"--nodelist={node}", "--gpus-per-node=2"),
        *("--output=/dev/null", "--wrap=sleep 1"),
    ).strip()
    place.wait_for_log(f"{job}_0", "is requeued", GRACE_SECONDS)
    place.cluster.wait_until(job, "COMPLETED")
    place.cluster.wait_until(other, "COMPLETED")
    assert place.cluster.job(f"{job}_0")["Restarts"] == "1"
    log = place.log(f"{job}_0")
    assert "signal SIGTERM" in log and "resumed: " in log
    assert place.chains() == place.expected(1)


def test_a_node_that_is_lost_while_its_task_lives_on_doubles_nothing(place: Place) -> None:
    """A split brain: the old run is seen alive first, then looks dead and is taken over, then wakes up again."""
    place.pace, place.first = 0.5, SLOW_AT_FIRST
    place.write_shards(1)
    place.submit("held_retry_seconds=1")
    (job,) = place.jobs
    place.wait_for_log(f"{job}_0", " active")
    node = place.cluster.job(f"{job}_0")["NodeList"]
    attempt = read_attempts(place.output / "s0")[-1]
    place.cluster.kill_node_daemon(node)
    try:
        place.wait_for_log(f"{job}_0", "held: another job works on what is left", 60)
        os.kill(attempt.owner.pid, signal.SIGSTOP)
        place.cluster.wait_until(job, "COMPLETED", seconds=90)
        assert place.chains() == place.expected(1)
        os.kill(attempt.owner.pid, signal.SIGCONT)
        wait_for("the old run to find out", lambda: not _lives(attempt.owner.pid), 30)
    finally:
        place.cluster.start_node(node)
    place.cluster.wait_for_nodes()
    assert place.cluster.job(f"{job}_0")["NodeList"] != node
    assert place.chains() == place.expected(1)
    states = [found.state for found in read_attempts(place.output / "s0")]
    assert states[-1] is AttemptState.finished and AttemptState.finished not in states[:-1]


def _lives(pid: int) -> bool:
    """Whether the process exists and has not ended (a dead one may wait for its parent to look)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_submitting_again_submits_what_is_neither_done_nor_queued(place: Place) -> None:
    place.write_shards(3)
    place.submit("input.shards=[1]")
    place.cluster.wait_until(place.jobs[0], "COMPLETED")
    gate = place.folder / "gate"
    place.first = f"until [[ -e {gate} ]]; do sleep 0.1; done"
    assert "3 shard(s): 1 done, 0 in the queue already, 2 to submit" in place.submit()
    job = place.jobs[1]
    for task in range(2):
        place.wait_for_log(f"{job}_{task}", "task: job")
    printed = place.submit()
    assert "3 shard(s): 1 done, 2 in the queue already, 0 to submit" in printed and "nothing to submit" in printed
    place.call("scancel", f"{job}_1")
    place.wait_for_log(f"{job}_1", "is not requeued: its state is COMPLETING")
    wait_for("the cancelled task to go", lambda: place.cluster.states(job)[f"{job}_1"] == "CANCELLED")
    follow = f'after=["ls {place.output}/s0/chains {place.output}/s2/chains"]'
    assert "3 shard(s): 1 done, 1 in the queue already, 1 to submit" in place.submit(follow)
    assert [[shard.name for shard in task] for task in place.plans[-1].tasks] == [["s2"]]
    gate.touch()
    place.cluster.wait_until(place.plans[-1].jobs["after-0"], "COMPLETED", seconds=90)
    assert place.chains() == place.expected(3)


def test_what_follows_runs_once_and_only_after_everything_before_it_went_well(place: Place) -> None:
    place.write_shards(2)
    (place.folder / "prompts").rename(place.folder / "raw")
    before = f"before=cp -r {place.folder}/raw {place.folder}/prompts"
    after = f'after=["python -c print(6*7)", "touch {place.folder}/after"]'
    place.first = "exit 1"
    place.submit(before, "num_shards=2", after)
    prepared, generated, *followed = place.jobs
    for job in followed:
        place.cluster.wait_until(job, "CANCELLED")
    assert set(place.cluster.wait_until(prepared, "COMPLETED").values()) == {"COMPLETED"}
    assert set(place.cluster.wait_until(generated, "FAILED").values()) == {"FAILED"}
    assert place.chains() == {} and not (place.folder / "after").exists()
    place.first = ":"
    place.submit(before, "num_shards=2", after)
    assert list(place.plans[-1].jobs) == ["generate", "after-0", "after-1"]
    place.cluster.wait_until(place.plans[-1].jobs["after-1"], "COMPLETED", seconds=90)
    assert place.chains() == place.expected(2)
    assert (place.folder / "after").exists()
    assert "nothing to submit" in place.submit(before, "num_shards=2", after)


def test_a_run_ends_as_a_verified_reported_exported_data_set(place: Place) -> None:
    """One command on the login node: array, verdicts, report, data set (docs/slurm.md)."""
    place.write_shards(2)
    steps = [
        f"python -m jobs.verify run={place.output} num_workers=1",
        f"python -m jobs.report runs={place.output}",
        f"python -m jobs.export runs=[{place.output}] output={place.folder}/dataset format=raw",
    ]
    place.submit(f"after={steps}".replace("'", '"'))
    place.cluster.wait_until(place.plans[-1].jobs["after-2"], "COMPLETED", seconds=300)
    verdicts = scan(place.output, "verdicts")
    assert verdicts is not None
    assert set(verdicts.select("prompt_id", "sample_index").collect().rows()) == set(place.expected(2))
    assert (place.output / "report" / "report.html").exists()
    chains = scan(place.output, "chains")
    assert chains is not None
    good = chains.filter(thinking_end="closed", answer_end="stop").select("prompt_id").collect()
    rows = pl.read_parquet(place.folder / "dataset" / "data" / "*.parquet")
    assert sorted(rows["prompt_id"]) == sorted(good["prompt_id"]) and rows.height


def test_a_task_on_a_bad_node_is_requeued_on_another(place: Place) -> None:
    place.write_shards(1)
    place.submit("recovery.node_check='test $SLURMD_NODENAME != node1'")
    (job,) = place.jobs
    place.cluster.wait_until(job, "COMPLETED")
    found = place.cluster.job(f"{job}_0")
    assert (found["Restarts"], found["ExcNodeList"]) == ("1", "node1") and found["NodeList"] != "node1"
    assert "jobs ended with 71: bad_node" in place.log(f"{job}_0")
    assert place.chains() == place.expected(1)


def test_requeueing_has_an_end_and_a_person_may_stop_a_task_for_good(place: Place) -> None:
    place.pace = 0.5
    place.write_shards(2)
    place.submit("max_requeues=0")
    (job,) = place.jobs
    for task, number, line in (
        (0, "USR2", "not requeued: max_requeues=0 is reached"),
        (1, "INT", "not requeued, as SIGINT came"),
    ):
        place.wait_for_log(f"{job}_{task}", " active")
        place.call("scancel", f"--signal={number}", f"{job}_{task}")
        place.wait_for_log(f"{job}_{task}", line)
    place.cluster.wait_until(job, "FAILED")
    assert {place.cluster.job(f"{job}_{task}")["ExitCode"] for task in range(2)} == {"75:0"}


def test_pairs_on_one_node_have_gpus_and_shards_of_their_own(place: Place) -> None:
    place.first = f'echo "$CUDA_VISIBLE_DEVICES" > {place.folder}/gpus.$$'
    place.write_shards(3)
    place.submit("pairs_per_task=2", "shards_per_task=3")
    (job,) = place.jobs
    place.cluster.wait_until(job, "COMPLETED")
    assert sorted(path.read_text().strip() for path in place.folder.glob("gpus.*")) == ["0", "1"]
    assert "GPUs 0 | 1; " in place.log(f"{job}_0")
    logs = [(place.output / "slurm" / f"{job}_0.pair{pair}.log").read_text() for pair in range(2)]
    assert "shard s0" in logs[0] and "shard s2" in logs[0] and "shard s1" in logs[1]
    assert place.chains() == place.expected(3)


def test_an_array_keeps_to_the_sites_limit(place: Place) -> None:
    place.write_shards(9)
    printed = place.submit("dry_run=true")
    assert "--array=0-4 " in printed and "(5 tasks, 9 shards)" in printed
    assert "shards_per_task: 1 makes more tasks of 9 shards than an array may have here (7)" in _refusal(
        place, "shards_per_task=1"
    )
    assert not place.output.exists()


def test_a_mistake_is_refused_before_anything_is_submitted(place: Place) -> None:
    place.write_shards(1)
    assert "throttle: 0 is out of range" in _refusal(place, "throttle=0")
    assert "throtle" in _refusal(place, "throtle=1")
    assert "policy.threshold: 11.0 is out of range" in _refusal(place, "policy.threshold=11")
    assert "invalid partition specified" in _refusal(place, "partition=nowhere")


def _refusal(place: Place, *words: str) -> str:
    """What is printed: one message, no traceback."""
    command = [sys.executable, "-m", "jobs.submit", *place.words(), *words]
    script = '"$@" 2>&1; echo "status $?"'
    printed = place.call("bash", "-c", script, "bash", *command)
    assert printed.endswith("status 2\n") and "Traceback" not in printed
    return printed


def test_the_toy_pair_runs_through_it_with_real_engines(place: Place) -> None:
    command = [sys.executable, "-m", "jobs.submit", "limit=4", f"output_dir={place.output}", "stage=true"]
    place.cluster.call(*command, folder=ROOT, PYTHON=sys.executable, TMPDIR=str(place.folder))
    place.jobs += place.plans[0].jobs.values()
    (job,) = place.jobs
    place.cluster.wait_until(job, "COMPLETED", seconds=120)
    assert len(place.chains()) == 4 and set(place.chains().values()) == {1}
    assert "copied to" in place.log(f"{job}_0")
    assert not list(place.folder.glob("specreason-*")), "the node's own disk is left as it was"
