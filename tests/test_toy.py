"""The real job on the real toy pair: two vLLM engines, committed files, and the figures that the toy pair promises."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import psutil
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from jobs.launch import ExitStatus, register_schema, to_config
from specreason_batch.answers import is_same_answer
from specreason_batch.chat import load_chat_format
from specreason_batch.config import ChatConfig
from specreason_batch.engine import Engine
from specreason_batch.engines import started_engines
from specreason_batch.plan import Plan, make_plan
from specreason_batch.progress import Progress
from specreason_batch.run import run_plan
from specreason_batch.signals import StopSignal
from specreason_batch.store.attempts import AttemptState, read_attempts
from specreason_batch.store.reading import scan
from specreason_batch.summary import summarise
from specreason_batch.types import Completion, Phase, Request, Role
from tests.conftest import ROOT, TOY
from tests.support.near import same

pytestmark = pytest.mark.vllm
KEYS = ["prompt_id", "sample_index"]
# What may differ between two runs of the same chains: time, what the prefix cache happened to hold, work done twice.
VOLATILE = ["active_seconds", "num_cached_prompt_tokens", "num_redone_tokens"]


def plan_for(output: Path, *overrides: str) -> Plan:
    register_schema()
    given = [f"output_dir={output}", f"input.path={TOY}/prompts/heldout.parquet"]
    given += [f"{role}.model={TOY / role}" for role in Role]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return make_plan(to_config(compose("generate", [*given, *overrides])))


def run(engines: Mapping[Role, Engine], output: Path, *overrides: str) -> Path:
    plan = plan_for(output, *overrides)
    run_plan(plan, engines, Progress(Console(quiet=True), 60), StopSignal())
    return output


def read(output: Path, kind: str) -> pl.DataFrame:
    frame = scan(output, kind)
    assert frame is not None
    order = [*KEYS, "step_index"] if kind == "steps" else KEYS
    volatile = {"chains": VOLATILE, "steps": ["round"]}[kind]
    return frame.collect().sort(order).drop(volatile)


def job(*arguments: str, check: int = 0) -> subprocess.CompletedProcess[str]:
    """`python -m jobs.generate` as a user runs it."""
    command = [sys.executable, "-m", "jobs.generate", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == check, done.stdout + done.stderr
    return done


# --- rows ---


@pytest.mark.parametrize("sampling", ["paper", "greedy"])
@pytest.mark.parametrize("policy", ["specreason", "random"])
def test_active_size_and_schedule_do_not_change_rows(
    toy_engines: dict[Role, Engine], tmp_path: Path, policy: str, sampling: str
) -> None:
    common = ["limit=12", f"policy={policy}", f"sampling={sampling}"]
    common += ["policy.accept_rate=0.7"] if policy == "random" else []
    settings = [("lockstep", 1), ("lockstep", 64), ("overlapped", 12), ("continuous", 5), ("waves", 12)]
    outputs = [
        run(
            toy_engines, tmp_path / f"{schedule}{size}", f"schedule={schedule}", f"schedule.active_size={size}", *common
        )
        for schedule, size in settings
    ]
    for kind in ("chains", "steps"):
        rows = read(outputs[0], kind)
        assert rows.height >= 12
        assert all(same(rows, read(output, kind)) for output in outputs[1:])


def test_the_base_in_one_generation_writes_what_it_writes_step_by_step(
    toy_engines: dict[Role, Engine], tmp_path: Path
) -> None:
    common = ["limit=24", "sampling=greedy"]
    outputs = [run(toy_engines, tmp_path / name, f"policy={name}", *common) for name in ("base_only", "base_direct")]
    for kind in ("chains", "steps"):
        stepwise, direct = (read(output, kind) for output in outputs)
        assert same(stepwise, direct)
    totals = [scan(output, "rounds") for output in outputs]
    asked = [
        total.select(pl.col("rewrite_num_requests").sum()).collect().item() for total in totals if total is not None
    ]
    assert asked[1] == 24 < asked[0] / 4


@pytest.mark.slow
def test_engines_apart_work_at_once_and_give_the_same_rows(toy_engines: dict[Role, Engine], tmp_path: Path) -> None:
    """Continuous: neither engine ever waits for the other, and hardly a moment passes with nothing outstanding."""
    together = run(toy_engines, tmp_path / "together", "schedule=lockstep", "limit=64")
    apart = ["draft.in_process=false", "base.in_process=false", "schedule=continuous"]
    config = plan_for(tmp_path / "none", *apart).config
    with started_engines(config, frozenset(Role), Progress(Console(quiet=True), 60)) as engines:
        run(engines, tmp_path / "warm", *apart, "limit=64")
        output = run(engines, tmp_path / "apart", *apart, "limit=64")
    for kind in ("chains", "steps"):
        assert same(read(together, kind), read(output, kind))
    rounds = scan(output, "rounds")
    assert rounds is not None
    total = rounds.select(pl.all().exclude("round", "started_at").sum()).collect().row(0, named=True)
    assert total["idle_seconds"] <= 0.03 * total["seconds"]
    assert total["draft_busy_seconds"] + total["base_busy_seconds"] > 1.3 * total["seconds"]


@pytest.mark.slow
def test_a_small_kv_cache_parks_chains_and_changes_no_row(tmp_path: Path) -> None:
    """More chains than the engines' memory holds: some wait, all come out the same."""
    small = [f"+{role}.vllm_args.num_gpu_blocks_override=41" for role in Role]
    small += [f"{role}.in_process=false" for role in Role]
    common = ["limit=40", "schedule=waves", "schedule.active_size=40"]
    config = plan_for(tmp_path / "none", *small, *common).config
    with started_engines(config, frozenset(Role), Progress(Console(quiet=True), 60)) as engines:
        assert {engine.info.kv_capacity_tokens for engine in engines.values()} == {40 * 32}
        parked = run(engines, tmp_path / "parked", *small, *common)
        crowded = run(engines, tmp_path / "crowded", *small, *common, "schedule.fit_memory=false")
    figures = {}
    for output in (parked, crowded):
        assert same(read(parked, "steps"), read(output, "steps"))
        rounds = scan(output, "rounds")
        assert rounds is not None
        recomputed = pl.sum_horizontal(pl.col([f"{phase}_num_recomputed_tokens" for phase in Phase]).sum())
        figures[output] = rounds.select(recomputed, pl.col("num_parked").sum()).collect().row(0)
    assert figures[parked][1] > 0 and figures[crowded][1] == 0
    assert figures[parked][0] < 0.5 * figures[crowded][0]


def test_samples_of_a_prompt_are_chains_of_their_own(toy_engines: dict[Role, Engine], tmp_path: Path) -> None:
    output = run(toy_engines, tmp_path, "limit=4", "samples_per_prompt=6", "sampling.draft.temperature=1.5")
    chains = read(output, "chains")
    assert chains.select(KEYS).n_unique() == chains.height == 24
    assert chains["seed"].n_unique() == 24
    assert chains.group_by("prompt_id").agg(pl.col("thinking").n_unique())["thinking"].max() > 1


def test_never_accepting_equals_base_only_step_by_step(toy_engines: dict[Role, Engine], tmp_path: Path) -> None:
    never = run(toy_engines, tmp_path / "never", "limit=12", "policy=random", "policy.accept_rate=0")
    base = run(toy_engines, tmp_path / "base", "limit=12", "policy=base_only")
    what = [*KEYS, "author", "ended_by", "start", "end", "token_ids"]
    assert read(never, "steps").select(what).equals(read(base, "steps").select(what))
    assert read(never, "chains")["answer"].equals(read(base, "chains")["answer"])


def test_always_accepting_equals_draft_only_step_by_step(toy_engines: dict[Role, Engine], tmp_path: Path) -> None:
    always = run(toy_engines, tmp_path / "always", "limit=12", "policy.threshold=0", "judge.mass_floor=0")
    draft = run(toy_engines, tmp_path / "draft", "limit=12", "policy=draft_only")
    what = [*KEYS, "author", "ended_by", "start", "end", "token_ids"]
    assert read(always, "steps").select(what).equals(read(draft, "steps").select(what))


def test_joined_steps_are_the_thinking_to_the_byte_and_offsets_slice_it(
    toy_engines: dict[Role, Engine], tmp_path: Path
) -> None:
    output = run(toy_engines, tmp_path, "limit=32")
    chat = load_chat_format(Role.base, str(TOY / "base"), ChatConfig().options())
    thinking = {row["prompt_id"]: row["thinking"] for row in read(output, "chains").rows(named=True)}
    steps = read(output, "steps").partition_by("prompt_id", as_dict=True)
    assert len(steps) == 32
    for (prompt_id,), rows in steps.items():
        text = thinking[prompt_id]
        assert chat.decode([id for ids in rows["token_ids"] for id in ids]).encode() == text.encode()
        assert [text[start:end] for start, end in rows.select("start", "end").rows()] == [
            chat.decode(ids) for ids in rows["token_ids"]
        ]
        assert rows["start"].to_list() == [0, *rows["end"].to_list()[:-1]]
        assert rows["end"][-1] == len(text)


class CountingEngine:
    """A real engine that also counts what really went in and came out."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.num_requests = self.num_generated = self.num_prompt = self.num_cached = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, requests: list[Request]) -> None:
        self.num_requests += len(requests)
        self.num_prompt += sum(len(request.whole_prompt()) for request in requests)
        self._engine.submit(requests)

    def poll(self, timeout: float) -> list[Completion]:
        done = self._engine.poll(timeout)
        self.num_generated += sum(len(completion.token_ids) for completion in done)
        self.num_cached += sum(completion.num_cached_tokens for completion in done)
        return done


@pytest.mark.parametrize("policy", ["specreason", "base_only"])
def test_token_counts_agree_in_chains_steps_rounds_and_engines(
    toy_engines: dict[Role, Engine], tmp_path: Path, policy: str
) -> None:
    counting = {role: CountingEngine(engine) for role, engine in toy_engines.items()}
    run(counting, tmp_path, "limit=24", f"policy={policy}")  # type: ignore[arg-type]
    chains = scan(tmp_path, "chains").sum().collect()  # type: ignore[union-attr]
    steps = scan(tmp_path, "steps").sum().collect()  # type: ignore[union-attr]
    rounds = scan(tmp_path, "rounds").sum().collect()  # type: ignore[union-attr]
    draft, base = counting[Role.draft], counting[Role.base]
    kept, rejected = chains["num_draft_tokens_kept"].item(), chains["num_draft_tokens_rejected"].item()
    assert draft.num_generated == kept + rejected == rounds["draft_num_generated_tokens"].item()
    written = chains["num_base_tokens"].item() + chains["num_answer_tokens"].item()
    graded = rounds["grade_num_requests"].item()
    assert base.num_generated == written + graded
    assert rounds["rewrite_num_generated_tokens"].item() == chains["num_base_tokens"].item()
    assert (
        steps["num_tokens"].item() + steps["rejected_num_tokens"].item()
        == kept + rejected + chains["num_base_tokens"].item()
    )
    phases = ("draft", "grade", "rewrite", "answer")
    assert sum(rounds[f"{phase}_num_prompt_tokens"].item() for phase in phases) == draft.num_prompt + base.num_prompt
    assert chains["num_cached_prompt_tokens"].item() == draft.num_cached + base.num_cached > 0
    assert rounds["grade_num_prompt_tokens"].item() == chains["num_grade_prompt_tokens"].item()


def test_the_prefix_cache_serves_most_of_what_is_sent_again(toy_engines: dict[Role, Engine], tmp_path: Path) -> None:
    output = run(toy_engines, tmp_path, "limit=32")
    rounds = scan(output, "rounds").sum().collect()  # type: ignore[union-attr]
    sent, cached = rounds["grade_num_prompt_tokens"].item(), rounds["grade_num_cached_tokens"].item()
    assert cached / sent > 0.5


# --- readers ---


def test_datasets_and_polars_read_the_output_as_it_is(toy_engines: dict[Role, Engine], tmp_path: Path) -> None:
    output = run(toy_engines, tmp_path / "out", "limit=8", "parts.chains=3")
    pattern = f"{output}/*/chains/*.parquet"
    loaded = datasets.load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == pl.read_parquet(pattern).height == 8
    assert {"thinking", "answer", "gold_answer", "thinking_end"} <= set(loaded.column_names)
    parts = sorted((output / "heldout" / "chains").glob("*.parquet"))
    assert len(parts) > 1
    metadata = pq.read_schema(parts[0]).metadata
    assert metadata[b"fingerprint"].decode() == json.loads((output / "run.json").read_text())["fingerprint"]


# --- the job as a user runs it ---


def test_the_job_says_what_it_does_and_a_rerun_does_nothing(tmp_path: Path) -> None:
    first = job("limit=8", f"output_dir={tmp_path}")
    for said in ("draft: examples/toy/draft", "vocabularies: same", "<|im_start|>user", "<think>", "accuracy"):
        assert said in first.stdout
    assert "vllm" not in first.stderr.lower()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    began = time.monotonic()
    again = job("limit=8", f"output_dir={tmp_path}")
    assert "nothing to do" in again.stdout
    assert "loading base" not in again.stdout
    assert time.monotonic() - began < 60
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == before
    other = job("limit=8", f"output_dir={tmp_path}", "policy.threshold=6", check=ExitStatus.invalid)
    assert "policy.threshold: 7.0 there, 6.0 now" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.slow
def test_a_stopped_run_goes_on_from_its_committed_parts(tmp_path: Path) -> None:
    common = ["limit=60", "schedule.active_size=4", "parts.chains=5"]
    job(*common, f"output_dir={tmp_path}/whole")
    command = [sys.executable, "-m", "jobs.generate", *common, f"output_dir={tmp_path}/stopped"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        _wait_for(lambda: len(list(tmp_path.glob("stopped/*/chains/*.parquet"))) >= 2, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == ExitStatus.stopped, errors
    assert "run the same command again" in errors
    done = read(tmp_path / "stopped", "chains").height
    assert 10 <= done < 60
    second = job(*common, f"output_dir={tmp_path}/stopped")
    assert f"resumed: {done} done, 4 in flight at " in second.stdout
    for kind in ("chains", "steps"):
        assert same(read(tmp_path / "whole", kind), read(tmp_path / "stopped", kind))


def _wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the job ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_threshold_sweep_keeps_its_runs_apart(tmp_path: Path) -> None:
    job("-m", "limit=16", "policy.threshold=1,8.9", f"output_dir={tmp_path}/" + "${policy.threshold}")
    rates = [summarise(tmp_path / threshold) for threshold in ("1.0", "8.9")]
    assert rates[0] is not None
    assert rates[1] is not None
    assert rates[0].acceptance > rates[1].acceptance  # type: ignore[operator]


@pytest.mark.slow
def test_the_same_rows_come_from_engines_in_processes_of_their_own(
    toy_engines: dict[Role, Engine], tmp_path: Path
) -> None:
    job("limit=8", f"output_dir={tmp_path}/apart", "draft.in_process=false", "base.in_process=false")
    within = run(toy_engines, tmp_path / "within", "limit=8")
    for kind in ("chains", "steps"):
        assert same(read(within, kind), read(tmp_path / "apart", kind))


# --- the toy pair's promises ---


@pytest.fixture(scope="module")
def toy_figures(toy_engines: dict[Role, Engine], tmp_path_factory: pytest.TempPathFactory) -> dict[str, pl.DataFrame]:
    """Chains of each policy on the first 200 held-out prompts, by the real job."""
    root = tmp_path_factory.mktemp("figures")
    outputs = {
        "specreason": run(toy_engines, root / "specreason", "limit=200"),
        "base_only": run(toy_engines, root / "base_only", "limit=200", "policy=base_only"),
        "draft_only": run(toy_engines, root / "draft_only", "limit=200", "policy=draft_only"),
    }
    matched = ["policy=random", f"policy.match_run={root / 'specreason'}"]
    outputs["random"] = run(toy_engines, root / "random", "limit=200", *matched)
    return {f"{kind} {name}": read(output, kind) for name, output in outputs.items() for kind in ("chains", "steps")}


def accuracy(chains: pl.DataFrame) -> float:
    right = [is_same_answer(answer, gold) for answer, gold in chains.select("answer", "gold_answer").rows()]
    return sum(right) / len(right)


def test_the_base_is_right_by_itself(toy_figures: dict[str, pl.DataFrame]) -> None:
    chains = toy_figures["chains base_only"]
    assert accuracy(chains) >= 0.95
    assert (chains["thinking_end"] == "closed").mean() >= 0.99
    assert chains["num_steps"].is_between(4, 10).mean() >= 0.95
    bodies = toy_figures["steps base_only"]["token_ids"].list.len()
    assert bodies.is_between(8, 30).mean() >= 0.95


def test_the_draft_is_often_wrong_by_itself(toy_figures: dict[str, pl.DataFrame]) -> None:
    assert 0.2 <= accuracy(toy_figures["chains draft_only"]) <= 0.7


def test_specreason_keeps_the_bases_accuracy_with_mostly_drafted_steps(toy_figures: dict[str, pl.DataFrame]) -> None:
    specreason, base = (accuracy(toy_figures[f"chains {name}"]) for name in ("specreason", "base_only"))
    assert specreason >= base - 0.03
    assert (toy_figures["steps specreason"]["author"] == "draft").mean() >= 0.5


def test_grading_is_what_keeps_it_random_acceptance_is_clearly_worse(toy_figures: dict[str, pl.DataFrame]) -> None:
    specreason, random = (accuracy(toy_figures[f"chains {name}"]) for name in ("specreason", "random"))
    assert random <= specreason - 0.15
    kept, by_coin = (toy_figures[f"steps {name}"]["accepted"].mean() for name in ("specreason", "random"))
    assert by_coin == pytest.approx(kept, abs=0.04)


def test_grades_tell_right_from_wrong_drafted_steps(toy_figures: dict[str, pl.DataFrame]) -> None:
    prompts = {row["prompt_id"]: row["prompt"] for row in toy_figures["chains specreason"].rows(named=True)}
    thinking = {row["prompt_id"]: row["thinking"] for row in toy_figures["chains specreason"].rows(named=True)}
    right, wrong = [], []
    for step in toy_figures["steps specreason"].filter(pl.col("score").is_not_null()).rows(named=True):
        text = thinking[step["prompt_id"]]
        drafted = text[step["start"] : step["end"]] if step["accepted"] else step["rejected_text"]
        verdict = is_right_step(prompts[step["prompt_id"]], text[: step["start"]], drafted)
        (right if verdict else wrong).append(step["score"])
    assert len(right) > 100
    assert len(wrong) > 50
    assert auc(right, wrong) >= 0.95


def is_right_step(prompt: str, before: str, drafted: str) -> bool:
    """An independent check of a toy step against its prompt and the value that the chain stands at."""
    start, modulus = map(int, re.findall(r"Start with (\d+) and work modulo (\d+)\.", prompt)[0])
    operations = re.findall(r"^([a-j]\)) ([-+*])(\d)$", prompt, re.MULTILINE)
    value = int(([str(start), *re.findall(r"=(\d+)\.", before)])[-1])
    number = before.count("\n\n")
    if number == len(operations):
        return drafted.strip() == f"That was the last operation, so the result is {value}."
    letter, sign, operand = operations[number]
    result = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[sign] % modulus
    return drafted.strip() == f"{letter} {value}{sign}{operand}={result}."


def auc(right: list[float], wrong: list[float]) -> float:
    """Probability that a right step's score is above a wrong one's; ties count half."""
    wins = sum((r > w) + 0.5 * (r == w) for r in right for w in wrong)
    return wins / (len(right) * len(wrong))


def test_the_pair_is_small_and_the_draft_far_smaller() -> None:
    sizes = {role: os.path.getsize(TOY / role / "model.safetensors") for role in Role}
    assert sum(sizes.values()) <= 16 << 20
    assert sizes[Role.base] >= 8 * sizes[Role.draft]
    layers = {role: json.loads((TOY / role / "config.json").read_text())["num_hidden_layers"] for role in Role}
    assert layers[Role.base] >= 4 * layers[Role.draft]


# --- engines in processes of their own, on a bad day ---


def engine_processes(pid: int) -> dict[str, list[psutil.Process]]:
    """The engines' processes under this job, by vLLM's names for them, in the order of starting."""
    found: dict[str, list[psutil.Process]] = {"EngineCore": [], "Worker": []}
    children = sorted(psutil.Process(pid).children(recursive=True), key=psutil.Process.create_time)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            title = " ".join(child.cmdline())
            for name, processes in found.items():
                if f"VLLM::{name}" in title:
                    processes.append(child)
    return found


@pytest.mark.slow
def test_killed_hung_and_signalled_engines_change_no_row_and_none_outlives_the_job(tmp_path: Path) -> None:
    """A worker is killed, an engine hangs, and every process of the job gets what Slurm sends at its end."""
    common = ["limit=120", "schedule=continuous", "schedule.active_size=4", "parts.chains=20", "checkpoint.seconds=1"]
    job(*common, f"output_dir={tmp_path}/whole")
    apart = [*common, f"output_dir={tmp_path}/apart", "draft.in_process=false", "base.in_process=false"]
    apart += [f"{role}.engine_timeout_seconds=8" for role in Role] + ["log.seconds=1"]
    log = tmp_path / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-m", "jobs.generate", *apart], cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        ) as process,
    ):
        _wait_for(lambda: list(tmp_path.glob("apart/*/checkpoints/*")), process)
        engine_processes(process.pid)["Worker"][0].kill()
        _wait_for(lambda: "building it again (1 of" in log.read_text(), process)
        _wait_for(lambda: log.read_text().count("loading ") == 3, process)
        time.sleep(1)
        engine_processes(process.pid)["EngineCore"][-1].suspend()
        _wait_for(lambda: log.read_text().count("building it again (") == 2, process)
        _wait_for(lambda: log.read_text().count("loading ") == 4, process)
        time.sleep(1)
        everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        began = time.monotonic()
        for one in everybody:
            with suppress(psutil.NoSuchProcess):  # the first to get it may have closed the others by now
                one.send_signal(signal.SIGTERM)
        assert process.wait(60) == ExitStatus.stopped, log.read_text()
        assert time.monotonic() - began < 30
        assert psutil.wait_procs(everybody, timeout=5)[1] == []
    assert "no output" in log.read_text()
    assert 0 < read(tmp_path / "apart", "chains").height < 120
    (attempt,) = read_attempts(tmp_path / "apart" / "heldout")
    assert attempt.state is AttemptState.stopped and attempt.progress.num_rebuilds == 2
    assert "resumed: " in job(*common, f"output_dir={tmp_path}/apart").stdout
    for kind in ("chains", "steps"):
        assert same(read(tmp_path / "whole", kind), read(tmp_path / "apart", kind))
