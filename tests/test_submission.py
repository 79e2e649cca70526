"""What is submitted, decided without a Slurm: tasks, commands, GPUs, and what an end of the jobs means."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from jobs.array_task import combine, wants_requeue
from jobs.compose import compose_generate
from jobs.launch import ExitStatus
from jobs.submit import OWN_NAMES, split_words
from specreason_batch.config import GenerateConfig
from specreason_batch.pairs import Command, Received, run_side_by_side
from specreason_batch.slurm import Allocation, JobState, SlurmError
from specreason_batch.submission import (
    Shard,
    Stage,
    Submission,
    SubmitConfig,
    TaskSettings,
    chained,
    done_mark,
    earlier_submissions,
    generate_stage,
    next_plan_path,
    queued_shards,
    queued_stages,
    queued_task_names,
    share_gpus,
    share_out,
    step_stages,
    steps_left,
)
from specreason_batch.types import InvalidInput

ROOT = Path(__file__).parent.parent
SHOWN = "JobId=7 ArrayJobId=5 ArrayTaskId=2 JobName=x Reason=None JobState=RUNNING Restarts=1 ExcNodeList=(null) A"


def shards(number: int) -> list[Shard]:
    return [Shard(index=index, name=f"s{index}") for index in range(number)]


# --- tasks ---


@pytest.mark.parametrize("number", [1, 2, 6, 7, 10, 1000])
@pytest.mark.parametrize("max_tasks", [1, 3, 7, 1001])
@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_every_shard_is_one_tasks_and_no_task_is_empty(number: int, max_tasks: int, pairs: int) -> None:
    tasks = share_out(shards(number), SubmitConfig(pairs_per_task=pairs), max_tasks)
    assert [shard for task in tasks for shard in task] == shards(number)
    sizes = [len(task) for task in tasks]
    assert len(tasks) <= max_tasks and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    assert len(tasks) <= -(-number // pairs), "no more nodes than the pairs need"


def test_a_number_of_shards_a_task_is_kept_or_refused() -> None:
    config = SubmitConfig(shards_per_task=4)
    assert [len(task) for task in share_out(shards(10), config, 3)] == [3, 3, 4]
    with pytest.raises(InvalidInput, match=r"shards_per_task: 4 makes more tasks of 10 shards.*\(2\).*at least 5"):
        share_out(shards(10), config, 2)
    assert share_out([], config, 2) == []


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = Submission(
        overrides=["limit=3", "output_dir='a b'"],
        tasks=[[Shard(index=0)], shards(2)],
        settings=TaskSettings(pairs=2, stage=True),
        jobs={"generate": "12"},
    )
    path = next_plan_path(tmp_path)
    plan.write(path)
    assert Submission.read(path) == plan and earlier_submissions(tmp_path) == [plan]
    assert next_plan_path(tmp_path).name == "submission-00002.json"
    path.write_text("{}")
    with pytest.raises(InvalidInput, match="not a plan that jobs"):
        Submission.read(path)


def test_what_is_in_the_queue_is_known_by_array_and_task() -> None:
    earlier = [
        Submission(overrides=[], tasks=[shards(2), [Shard(index=2)]], jobs={"generate": "10", "after-0": "11"}),
        Submission(overrides=[], tasks=[[Shard(index=4)]], jobs={"generate": "20"}),
        Submission(overrides=[], tasks=[[Shard(index=5)]]),  # ended before it was submitted
    ]
    queue: dict[str, set[int | None]] = {"10": {1}, "11": {None}, "99": {0}}
    assert queued_shards(earlier, queue) == [Shard(index=2)]
    assert queued_task_names(earlier, queue) == ["10_1"]
    assert queued_stages(earlier, queue) == {"generate": "10", "after-0": "11"}


def test_shards_are_the_same_by_name_where_both_have_one() -> None:
    assert Shard(index=1, name="a").is_same_as(Shard(index=2, name="a"))
    assert not Shard(index=1, name="a").is_same_as(Shard(index=1, name="b"))
    assert Shard(index=1, name="a").is_same_as(Shard(index=1))


# --- commands ---


def test_the_pipeline_is_a_chain_in_which_each_waits_for_the_one_before(tmp_path: Path) -> None:
    config = SubmitConfig(before=["prepare a", "prepare b"], after=["verify"], throttle=2, time="01:00:00")
    before = step_stages("before", config.before, tmp_path, config)
    after = step_stages("after", config.after, tmp_path, config)
    array = generate_stage(tmp_path / "slurm" / "plan.json", 6, config, gpus_per_pair=2)
    stages = chained(before, [array], after)
    assert [(stage.name, stage.needs) for stage in stages] == [
        ("before-0", None),
        ("before-1", "before-0"),
        ("generate", "before-1"),
        ("after-0", "generate"),
    ]
    words = stages[2].command({"before-1": "8"})
    assert words[:4] == ["sbatch", "--parsable", "--dependency=afterok:8", "--kill-on-invalid-dep=yes"]
    assert {"--array=0-5%2", "--gpus-per-node=2", "--time=01:00:00"} <= set(words)
    assert stages[3].shell_line().startswith('after_0=$(sbatch --parsable --dependency=afterok:"$generate" ')
    assert [stage.name for stage in chained([], [], after)] == ["after-0"]


def test_what_follows_waits_for_tasks_of_earlier_submissions_too() -> None:
    stage = Stage(name="after-0", words=["x"], needs="generate", needs_too=("5_1", "5_2"))
    assert "--dependency=afterok:7:5_1:5_2" in stage.command({"generate": "7"})
    assert "--dependency=afterok:5_1" in Stage(name="after-0", words=["x"], needs_too=("5_1",)).command({})


def test_steps_that_finished_well_are_left_out(tmp_path: Path) -> None:
    config = SubmitConfig(after=["a", "b", "c"])
    assert len(steps_left("after", config.after, tmp_path, config)) == 3
    mark = done_mark(tmp_path, "after-0", "a")
    mark.parent.mkdir()
    mark.touch()
    left = steps_left("after", config.after, tmp_path, config)
    assert [(stage.name, stage.needs) for stage in left] == [("after-1", None), ("after-2", "after-1")]


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({}, "--gpus-per-node=2"),
        ({"pairs_per_task": 4}, "--gpus-per-node=8"),
        ({"pairs_per_task": 4, "gpus_per_pair": 1, "gpu_type": "h200"}, "--gpus-per-node=h200:4"),
        ({"gpus_per_pair": 0}, "--gpus-per-node=0"),
    ],
)
def test_gpus_are_asked_for_as_the_pairs_need_them(changes: dict[str, object], option: str) -> None:
    words = generate_stage(Path("o/slurm/p.json"), 1, SubmitConfig(**changes), gpus_per_pair=2).words  # type: ignore[arg-type]
    assert option in words


def test_a_pair_gets_gpus_of_its_own_or_the_task_is_refused() -> None:
    assert share_gpus(["0", "1", "2", "3"], 2, 2) == [["0", "1"], ["2", "3"]]
    assert share_gpus(["GPU-a", "GPU-b"], 2, 1) == [["GPU-a"], ["GPU-b"]]
    assert share_gpus([], 1, 0) == [[]]
    with pytest.raises(InvalidInput, match=r"was given 2 GPUs \(0,1\) and needs 4: 2 pair\(s\) with 2 each"):
        share_gpus(["0", "1"], 2, 2)
    with pytest.raises(InvalidInput, match=r"was given 0 GPUs \(none\) and needs 1"):
        share_gpus([], 1, 1)


# --- the command line ---


def test_its_own_words_are_told_from_those_of_generate() -> None:
    own, others = split_words(["limit=3", "throttle=2", "+policy.x=1", "dry_run=true", "--cfg", "job", "seed=1"])
    assert own == ["throttle=2", "dry_run=true", "--cfg", "job"]
    assert others == ["limit=3", "+policy.x=1", "seed=1"]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("sbatch=--mem=200G --exclude=n[1-3],n5", ["--mem=200G --exclude=n[1-3],n5"]),
        ("""after=python -c 'print("a=\\\\n")'""", ["""python -c 'print("a=\\\\n")'"""]),
        ("""before=["a b=1", 'c']""", ["a b=1", "c"]),
        ("after=[]", []),
    ],
)
def test_a_command_is_typed_as_in_a_shell(word: str, value: list[str]) -> None:
    ((quoted,), _) = split_words([word])
    assert OverridesParser.create().parse_override(quoted).value() == value


def test_no_choice_is_both_its_own_and_one_of_generate() -> None:
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert not OWN_NAMES & ({field.name for field in fields(GenerateConfig)} | groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"throttle": 0}, "throttle: 0 is out of range; allowed: at least 1"),
        ({"num_shards": 3}, "num_shards: 3 goes with `before` steps only"),
        ({"after": [" "]}, "after: an empty command"),
        ({"max_requeues": -1}, "max_requeues: -1 is out of range"),
    ],
)
def test_a_choice_out_of_range_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        SubmitConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["limitt=3", "limit=x", "policy=none_such", "limit=0", "limit"])
def test_what_generate_would_refuse_is_refused(word: str) -> None:
    with pytest.raises(InvalidInput):
        compose_generate([word])


def test_the_folder_is_the_one_that_generate_would_take() -> None:
    assert compose_generate(["limit=3", "policy=base_only"]).output_dir == "outputs/toy/policy-base_only"


def test_a_dry_run_needs_no_slurm_and_writes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.submit", "dry_run=true", f"output_dir={tmp_path}/a b", "pairs_per_task=1"],
        cwd=ROOT,
        env={**os.environ, "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no Slurm answers here" in done.stdout and "generate=$(sbatch --parsable" in done.stdout
    assert f"'{tmp_path}/a b/slurm/submission-00001.json'" in done.stdout
    assert list(tmp_path.iterdir()) == []


# --- what Slurm says ---


def test_a_task_is_named_by_array_and_number() -> None:
    here = Allocation.of({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"})
    assert (here.name, here.restarts, here.gpus) == ("7_2", 0, ())
    here = Allocation.of({"SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "3", "CUDA_VISIBLE_DEVICES": "1,GPU-x"})
    assert (here.name, here.restarts, here.gpus) == ("9", 3, ("1", "GPU-x"))
    assert Allocation.of({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}).gpus == ()
    assert Allocation.of({}).name is None


@pytest.mark.parametrize(
    ("state", "reason", "restarts", "may"),
    [
        ("RUNNING", "None", 1, True),
        ("RUNNING", "None", 0, False),  # a former run of a job that runs elsewhere by now
        ("COMPLETING", "TimeLimit", 1, True),
        ("COMPLETING", "None", 1, False),  # cancelled: a requeue would bring it back to life
        ("PENDING", "BeginTime", 1, False),
    ],
)
def test_only_the_latest_run_of_a_job_that_nobody_cancelled_is_requeued(
    state: str, reason: str, restarts: int, may: bool
) -> None:
    line = SHOWN.replace("RUNNING", state).replace("Reason=None", f"Reason={reason}")
    assert JobState.parse(line).may_be_requeued(restarts) is may


def test_what_scontrol_never_says_is_an_error() -> None:
    assert JobState.parse(SHOWN).excluded is None
    with pytest.raises(SlurmError, match="cannot be read"):
        JobState.parse("slurm_load_jobs error: Invalid job id specified")


# --- what an end means ---


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([0, 0], ExitStatus.finished),
        ([0, 75], ExitStatus.stopped),
        ([1, 75], ExitStatus.stopped),
        ([1, 0], ExitStatus.failed),
        ([71, 75], ExitStatus.bad_node),
        ([2, 75], ExitStatus.invalid),
        ([69, 0], ExitStatus.held),
        ([69, 1], ExitStatus.failed),
        ([-signal.SIGTERM], ExitStatus.stopped),
        ([-signal.SIGKILL], ExitStatus.failed),
        ([99], ExitStatus.failed),
        ([130, 75], ExitStatus.interrupted),
    ],
)
def test_of_several_ends_the_one_that_matters_most_counts(statuses: list[int], expected: ExitStatus) -> None:
    assert combine(statuses) is expected


def test_a_task_goes_back_in_line_where_another_run_helps() -> None:
    wanted = {status for status in ExitStatus if wants_requeue(status, restarts=0)}
    assert wanted == {ExitStatus.stopped, ExitStatus.bad_node}
    assert wants_requeue(ExitStatus.held, restarts=1), "the holder may be its own former run on a lost node"


# --- jobs side by side ---

LISTENER = """
import signal, sys, time
got = []
for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
    signal.signal(number, lambda n, frame: got.append(n))
print("ready", flush=True)
while not got: time.sleep(0.02)
time.sleep(0.3)
sys.exit(len(got))
"""


def python(code: str, log: Path | None = None) -> Command:
    return Command(words=[sys.executable, "-c", code], log=log)


def test_statuses_come_in_order_and_logs_are_appended_to(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(2):
        assert run_side_by_side([python("print(1); raise SystemExit(3)", log), python("")], Received()) == [3, 0]
    assert log.read_text() == "1\n1\n"


def test_each_signal_reaches_each_job_once(tmp_path: Path) -> None:
    logs = [tmp_path / f"log{index}" for index in range(2)]
    code = f"import subprocess, sys; sys.path.insert(0, {str(ROOT)!r})\n" + SUPERVISOR.format(
        listener=LISTENER, logs=[str(log) for log in logs]
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    while not all(log.exists() and "ready" in log.read_text() for log in logs):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.communicate(timeout=20)[0] == b"[1, 1]\n"


SUPERVISOR = """
from pathlib import Path
from specreason_batch.pairs import Command, Received, run_side_by_side
received = Received()
received.install()
commands = [Command(words=[sys.executable, "-c", {listener!r}], log=Path(log)) for log in {logs!r}]
print(run_side_by_side(commands, received), flush=True)
"""


def test_a_second_interrupt_ends_the_jobs_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stubborn = LISTENER.replace("while not got", "while True")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + SUPERVISOR.format(listener=stubborn, logs=[str(log)])
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    while not (log.exists() and "ready" in log.read_text()):
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.communicate(timeout=20)[0] == b"[-9]\n"


def test_no_job_outlives_its_task(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    supervisor = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + SUPERVISOR.format(listener=code, logs=[str(log)])
    process = subprocess.Popen([sys.executable, "-c", supervisor])
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.05)
    process.kill()
    process.wait()
    pid = int(log.read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_job_may_end_the_others() -> None:
    commands = [python("raise SystemExit(71)"), python("import time; time.sleep(60)")]
    assert run_side_by_side(commands, Received(), ends_all=lambda status: status == 71) == [71, -signal.SIGTERM]
