"""One shard from open to commit: stop anywhere and resume gives the same rows once each (docs/design.md, 5 and 6)."""

import io
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from specreason_batch.chat import VocabularyCase
from specreason_batch.clock import WallClock
from specreason_batch.config import GenerateConfig, InputConfig, PartsConfig, PolicyConfig, ScheduleConfig
from specreason_batch.engine import EngineAborted, EngineDead
from specreason_batch.plan import Plan, make_plan
from specreason_batch.progress import Progress
from specreason_batch.run import run_plan
from specreason_batch.schedules import SCHEDULES, Stopped, continuous, lockstep, overlapped, waves
from specreason_batch.scripted_engine import ScriptedEngine
from specreason_batch.shard import choose_schedule
from specreason_batch.signals import StopSignal
from specreason_batch.store.parts import ShardPaths, ShardWriter
from specreason_batch.store.reading import scan
from specreason_batch.store.schemas import ROUNDS
from specreason_batch.summary import summarise
from specreason_batch.types import Completion, FinishReason, InvalidInput, Request, Role
from tests.support.configs import NUM_PROMPTS, make_config, write_prompts
from tests.support.plain_loop import VOLATILE, Row
from tests.support.worlds import PROMPTS, World

MODELS = World(seed=21, close_rate=0.03)


def engines(plan: Plan, script: Callable[[Role], Any] = MODELS.model) -> dict[Role, ScriptedEngine]:
    clock = WallClock()
    return {
        role: ScriptedEngine(script(role), plan.config.engine(role).max_model_len, order_seed=index, clock=clock)
        for index, role in enumerate(plan.formats)
    }


@dataclass(slots=True)
class Counted(StopSignal):
    """A stop signal that comes at the nth look."""

    after: int = 1 << 60
    looks: int = field(default=0)

    def check(self) -> None:
        self.looks += 1
        if self.looks > self.after:
            self.number = signal.SIGTERM
        StopSignal.check(self)


def run(config: GenerateConfig, stop: StopSignal | None = None, script: Callable[[Role], Any] = MODELS.model) -> Plan:
    """The whole job but for real engines."""
    plan = make_plan(config)
    progress = Progress(Console(file=io.StringIO()), 1e9)
    progress.introduce(plan)
    run_plan(plan, engines(plan, script), progress, stop or StopSignal())
    return plan


def rows(config: GenerateConfig) -> dict[str, list[Row]]:
    """Committed chains and steps in order of their keys, without what may differ by attempt."""
    found: dict[str, list[Row]] = {}
    for kind, key in (
        ("chains", ["prompt_id", "sample_index"]),
        ("steps", ["prompt_id", "sample_index", "step_index"]),
    ):
        frame = scan(Path(config.output_dir), kind)
        rows = [] if frame is None else frame.sort(key).collect().rows(named=True)
        found[kind] = [{name: value for name, value in row.items() if name not in VOLATILE} for row in rows]
    return found


def rejects(config: GenerateConfig, shard: str = "prompts") -> list[Row]:
    paths = sorted((Path(config.output_dir) / shard / "rejects").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def chain_keys(config: GenerateConfig) -> list[tuple[str, int]]:
    return [(row["prompt_id"], row["sample_index"]) for row in rows(config)["chains"]]


# --- from open to commit ---


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("policy", ["specreason", "random", "base_only", "base_direct", "draft_only"])
def test_every_prompt_becomes_one_committed_chain(place: Path, schedule: str, policy: str) -> None:
    role = Role.draft if policy == "draft_only" else Role.base
    rate = 0.5 if policy == "random" else None
    config = make_config(
        place,
        policy=PolicyConfig(name=policy, threshold=4.0, answer_role=role, accept_rate=rate),
        schedule=ScheduleConfig(name=schedule, active_size=5),
    )
    run(config)
    made = rows(config)
    assert sorted(chain_keys(config)) == sorted((f"p{index}", 0) for index in range(NUM_PROMPTS))
    for chain in made["chains"]:
        steps = [step for step in made["steps"] if step["prompt_id"] == chain["prompt_id"]]
        assert [step["step_index"] for step in steps] == list(range(chain["num_steps"]))
        assert "".join(chain["thinking"][step["start"] : step["end"]] for step in steps) == chain["thinking"]
        assert chain["input_level"] == int(chain["prompt_id"][1:])
    paths = ShardPaths(Path(config.output_dir) / "prompts")
    assert paths.parts("steps") == paths.parts("chains")
    assert {path.name for path in paths.root.iterdir()} == {"attempts", "chains", "rounds", "steps"}


@pytest.mark.parametrize(
    ("schedule", "active_size"), [("lockstep", 1), ("lockstep", 64), ("continuous", 3), ("overlapped", 4), ("waves", 7)]
)
def test_rows_do_not_depend_on_schedule_or_active_size(place: Path, schedule: str, active_size: int) -> None:
    reference = make_config(place, output_dir=str(place / "reference"))
    other = make_config(place, schedule=ScheduleConfig(name=schedule, active_size=active_size))
    run(reference)
    run(other)
    assert rows(other) == rows(reference)


def test_samples_of_one_prompt_are_chains_of_their_own(place: Path) -> None:
    config = make_config(place, samples_per_prompt=3)
    run(config)
    assert sorted(chain_keys(config)) == sorted(
        (f"p{row}", sample) for row in range(NUM_PROMPTS) for sample in range(3)
    )
    seeds = [chain["seed"] for chain in rows(config)["chains"]]
    assert len(set(seeds)) == len(seeds)
    thoughts = {chain["thinking"] for chain in rows(config)["chains"]}
    assert len(thoughts) > 2 * NUM_PROMPTS, "samples differ"


def test_more_samples_leave_the_first_ones_as_they_were(place: Path) -> None:
    one = make_config(place, output_dir=str(place / "one"))
    three = make_config(place, samples_per_prompt=3)
    run(one)
    run(three)
    assert [chain for chain in rows(three)["chains"] if chain["sample_index"] == 0] == rows(one)["chains"]


def test_every_shard_of_a_folder_is_run_into_a_folder_of_its_own(place: Path) -> None:
    for name in ("x", "y"):
        write_prompts(place / "shards" / f"{name}.parquet", 2, prompt_id=[f"{name}0", f"{name}1"])
    config = make_config(place, input=InputConfig(path=str(place / "shards")))
    assert len(run(config).pending) == 2
    assert [key for key, _ in chain_keys(config)] == ["x0", "x1", "y0", "y1"]
    assert {path.name for path in Path(config.output_dir).iterdir()} == {"run.json", "x", "y"}


def test_a_task_of_an_array_runs_its_own_shard_only(place: Path) -> None:
    for name in ("x", "y"):
        write_prompts(place / "shards" / f"{name}.parquet", 2, prompt_id=[f"{name}0", f"{name}1"])
    for shard, expected in ((1, ["y0", "y1"]), (0, ["x0", "x1", "y0", "y1"])):
        config = make_config(place, input=InputConfig(path=str(place / "shards"), shards=[shard]))
        run(config)
        assert [key for key, _ in chain_keys(config)] == expected
    with pytest.raises(InvalidInput, match=r"input\.shards: \[2\] are out of range; allowed: 0 to 1"):
        make_plan(make_config(place, input=InputConfig(path=str(place / "shards"), shards=[2])))


def test_parts_close_at_their_size_and_hold_whole_chains(place: Path) -> None:
    config = make_config(place, parts=PartsConfig(chains=2))
    run(config)
    paths = ShardPaths(Path(config.output_dir) / "prompts")
    assert len(paths.parts("chains")) >= 3
    for part in paths.parts("chains"):
        chains = pq.read_table(paths.file("chains", part)).to_pylist()
        steps = pq.read_table(paths.file("steps", part)).to_pylist()
        assert Counter(step["prompt_id"] for step in steps) == {row["prompt_id"]: row["num_steps"] for row in chains}


def test_rounds_and_the_summary_agree_with_chains_and_steps(place: Path) -> None:
    config = make_config(place, policy=PolicyConfig(name="specreason", threshold=4.0))
    run(config)
    made = rows(config)
    found = summarise(Path(config.output_dir))
    rounds = scan(Path(config.output_dir), "rounds")
    assert found is not None and rounds is not None
    assert set(rounds.collect_schema().names()) == set(ROUNDS.names)
    chains, steps = made["chains"], made["steps"]
    assert found.num_chains == len(chains) == NUM_PROMPTS
    assert found.thinking_ends == dict(Counter(chain["thinking_end"] for chain in chains))
    assert found.tokens["rewrite"] == sum(chain["num_base_tokens"] for chain in chains)
    drafted = sum(chain["num_draft_tokens_kept"] + chain["num_draft_tokens_rejected"] for chain in chains)
    assert (found.tokens["draft"], found.rejected_tokens) == (
        drafted,
        sum(chain["num_draft_tokens_rejected"] for chain in chains),
    )
    assert found.grade_prompt_tokens == sum(chain["num_grade_prompt_tokens"] for chain in chains)
    graded = [step for step in steps if step["digit_mass"] is not None]
    assert found.num_graded == len(graded)
    assert found.num_unreadable == sum(step["score"] is None for step in graded)
    assert found.acceptance == pytest.approx(sum(step["accepted"] for step in graded) / len(graded))
    assert found.draft_step_share == pytest.approx(sum(step["author"] == "draft" for step in steps) / len(steps))
    assert found.accuracy is None


# --- rows that cannot be used ---


def test_bad_rows_go_to_rejects_and_the_rest_runs(place: Path) -> None:
    write_prompts(place / "prompts.parquet", 5, prompt_id=["a", None, "c", "a", "e"], prompt=["x", "y", " ", "z", "w"])
    config = make_config(place)
    run(config)
    assert [key for key, _ in chain_keys(config)] == ["a", "e"]
    assert [(row["row"], row["file"], row["sample_index"]) for row in rejects(config)] == [
        (row, "prompts.parquet", None) for row in (1, 2, 3)
    ]
    assert make_plan(config).pending == []


def test_a_prompt_that_is_too_long_goes_to_rejects_once_and_is_not_pending_for_ever(place: Path) -> None:
    texts = ["x", "so " * 400, "y"]
    write_prompts(place / "prompts.parquet", 3, prompt_id=["a", "long", "c"], prompt=texts)
    config = make_config(place, samples_per_prompt=2)
    run(config)
    assert {key for key, _ in chain_keys(config)} == {"a", "c"}
    (reject,) = rejects(config)
    assert (reject["prompt_id"], reject["row"], reject["sample_index"]) == ("long", 1, None)
    assert "leaves no room in the draft's window of 400" in reject["reason"]
    assert make_plan(config).pending == []


def test_a_file_of_bad_rows_only_is_finished(place: Path) -> None:
    write_prompts(place / "prompts.parquet", 2, prompt_id=["a", "b"], prompt=["", "so " * 400])
    config = make_config(place)
    run(config)
    assert len(rejects(config)) == 2
    assert make_plan(config).pending == []


def test_an_empty_shard_is_finished(place: Path) -> None:
    empty = {"prompt_id": pa.array([], pa.string()), "prompt": pa.array([], pa.string())}
    pq.write_table(pa.table(empty), place / "prompts.parquet")
    assert make_plan(make_config(place)).pending == []


def test_a_chain_that_was_given_up_is_a_row_and_a_reject_and_is_not_tried_again(place: Path) -> None:
    def script(role: Role) -> Any:
        model = MODELS.model(role)

        def answer(request: Request) -> Completion:
            if role is Role.base and request.prompt_token_ids[: len(victim)] == victim:
                return Completion(
                    request_id=request.request_id, token_ids=(), finish_reason=FinishReason.refused, error="odd"
                )
            return model(request)

        return answer

    config = make_config(place)
    victim = make_plan(config).formats[Role.base].opening(f"{PROMPTS[4]} 4")
    run(config, script=script)
    ends = {row["prompt_id"]: (row["thinking_end"], row["answer_end"], row["answer"]) for row in rows(config)["chains"]}
    assert ends.pop("p4") == ("error", "none", None)
    assert len(ends) == NUM_PROMPTS - 1 and "error" not in {end for end, *_ in ends.values()}
    (reject,) = rejects(config)
    assert (reject["prompt_id"], reject["sample_index"], reject["row"]) == ("p4", 0, 4)
    assert reject["reason"] == "given up at step 0: the base engine refused a request: odd"
    assert make_plan(config).pending == []


# --- stopping, dying, resuming ---


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("stops", [[1], [30], [60], [25, 40], [15, 15, 15, 15, 15, 15]])
def test_stop_anywhere_and_resume_gives_the_same_rows_once_each(place: Path, schedule: str, stops: list[int]) -> None:
    changes: dict[str, Any] = {"schedule": ScheduleConfig(name=schedule, active_size=3), "samples_per_prompt": 2}
    whole = make_config(place, output_dir=str(place / "whole"), **changes)
    run(whole)
    config = make_config(place, **changes)
    for after in stops:
        with pytest.raises(Stopped, match="signal SIGTERM"):
            run(config, stop=Counted(after=after))
        assert len(set(chain_keys(config))) == len(chain_keys(config))
    run(config)
    assert rows(config) == rows(whole)
    assert make_plan(config).pending == []


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_chain_that_had_its_answer_when_the_stop_came_is_committed(place: Path, schedule: str) -> None:
    """Whatever was finished is kept: where rounds are long, a lost round is minutes of two engines."""
    chat = make_plan(make_config(place)).formats[Role.base]
    openings = {f"p{row}": chat.opening(f"{PROMPTS[row % len(PROMPTS)]} {row}") for row in range(NUM_PROMPTS)}
    num_answered = 0
    for after in range(10, 40, 2):
        answered: list[str] = []

        def script(role: Role, answered: list[str] = answered) -> Any:
            model = MODELS.model(role)

            def answer(request: Request) -> Completion:
                prompt = request.prompt_token_ids
                if prompt[-1] == chat.think_close_id:
                    answered.extend(key for key, ids in openings.items() if prompt[: len(ids)] == ids)
                return model(request)

            return answer

        config = make_config(
            place, output_dir=str(place / f"out{after}"), schedule=ScheduleConfig(name=schedule, active_size=3)
        )
        with pytest.raises(Stopped):
            run(config, stop=Counted(after=after), script=script)
        assert sorted(key for key, _ in chain_keys(config)) == sorted(answered), f"stopped at look {after}"
        num_answered += len(answered)
    assert num_answered > 0


@pytest.mark.parametrize("raised", [EngineDead("it died"), EngineAborted("cut"), OSError(28, "No space left")])
def test_whatever_ends_a_run_finished_chains_are_committed_and_the_next_run_goes_on(
    place: Path, raised: Exception
) -> None:
    whole = make_config(place, output_dir=str(place / "whole"))
    run(whole)

    def script(role: Role) -> Any:
        model, count = MODELS.model(role), 0

        def answer(request: Request) -> Completion:
            nonlocal count
            count += 1
            if count > 25 and role is Role.base:
                raise raised
            return model(request)

        return answer

    config = make_config(place)
    with pytest.raises(type(raised)):
        run(config, script=script)
    committed = chain_keys(config)
    assert 0 < len(committed) < NUM_PROMPTS
    run(config)
    assert rows(config) == rows(whole)


def test_a_round_is_counted_once_when_committing_it_fails(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full between two rounds: the round before is reported already, and there is none to cut short."""
    config = make_config(place, parts=PartsConfig(chains=1, seconds=600), schedule=ScheduleConfig(name="lockstep"))

    whole = ShardWriter.commit

    def full(writer: ShardWriter) -> None:
        if writer._chains:
            monkeypatch.setattr(ShardWriter, "commit", whole)
            raise OSError("no space left")

    monkeypatch.setattr(ShardWriter, "commit", full)
    with pytest.raises(OSError, match="no space left"):
        run(config)
    rounds = scan(Path(config.output_dir), "rounds")
    assert rounds is not None
    numbers = rounds.collect()["round"].to_list()
    assert numbers == list(range(1, len(numbers) + 1))


def test_engines_have_nothing_outstanding_after_a_stop(place: Path) -> None:
    plan = make_plan(make_config(place))
    made = engines(plan)
    with pytest.raises(Stopped):
        run_plan(plan, made, Progress(Console(file=io.StringIO()), 1e9), Counted(after=20))
    assert all(engine.num_outstanding == 0 for engine in made.values())
    assert all(engine.requests for engine in made.values())


def test_a_finished_run_has_nothing_to_do(place: Path) -> None:
    config = make_config(place)
    run(config)
    before = {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()}
    plan = run(config)
    assert (plan.pending, len(plan.finished), plan.num_done) == ([], 1, NUM_PROMPTS)
    assert {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()} == before


def test_only_what_is_missing_is_run_again(place: Path) -> None:
    config = make_config(place, parts=PartsConfig(chains=2))
    run(config)
    whole = rows(config)
    paths = ShardPaths(Path(config.output_dir) / "prompts")
    lost = paths.committed("chains")[1]
    lost_keys = set(pq.read_table(lost)["prompt_id"].to_pylist())
    lost.unlink()
    plan = make_plan(config)
    made = engines(plan)
    run_plan(plan, made, Progress(Console(file=io.StringIO()), 1e9), StopSignal())
    asked = {tuple(request.prompt_token_ids) for request in made[Role.draft].requests}
    for key in range(NUM_PROMPTS):
        opening = tuple(plan.formats[Role.draft].opening(f"{PROMPTS[key % len(PROMPTS)]} {key}"))
        assert (opening in asked) is (f"p{key}" in lost_keys)
    assert rows(config) == whole


def test_a_limit_is_a_pilot_that_the_whole_run_continues(place: Path) -> None:
    whole = make_config(place, output_dir=str(place / "whole"))
    run(whole)
    pilot = make_config(place, limit=4)
    run(pilot)
    assert [key for key, _ in chain_keys(pilot)] == ["p0", "p1", "p2", "p3"]
    assert make_plan(pilot).pending == []
    everything = make_config(place)
    run(everything)
    assert rows(everything) == rows(whole)


def test_a_limit_does_not_hide_later_rejects(place: Path) -> None:
    texts = ["x", "", "y", "so " * 400]
    write_prompts(place / "prompts.parquet", 4, prompt_id=["a", "b", "c", "d"], prompt=texts)
    run(make_config(place, limit=2))
    config = make_config(place)
    run(config)
    assert [row["prompt_id"] for row in rejects(config)] == ["b", "d"]
    assert [key for key, _ in chain_keys(config)] == ["a", "c"]


def test_a_changed_input_file_is_refused(place: Path) -> None:
    config = make_config(place)
    run(config)
    write_prompts(place / "prompts.parquet", prompt=["other"] * NUM_PROMPTS)
    with pytest.raises(InvalidInput, match="another content of this input shard"):
        make_plan(config)


def test_another_threshold_is_refused_in_the_same_output(place: Path) -> None:
    run(make_config(place))
    with pytest.raises(InvalidInput, match=r"policy\.threshold: 7\.0 there, 5\.0 now"):
        make_plan(make_config(place, policy=PolicyConfig(name="specreason", threshold=5.0)))


def test_another_schedule_may_continue_a_run(place: Path) -> None:
    whole = make_config(place, output_dir=str(place / "whole"))
    run(whole)
    with pytest.raises(Stopped):
        run(make_config(place), stop=Counted(after=40))
    config = make_config(place, schedule=ScheduleConfig(name="continuous", active_size=7), parts=PartsConfig(chains=3))
    run(config)
    assert rows(config) == rows(whole)


# --- plans ---


def test_a_plan_says_which_vocabulary_case_holds(place: Path) -> None:
    assert make_plan(make_config(place)).vocabulary_case is VocabularyCase.same
    alone = make_config(place, output_dir=str(place / "alone"), policy=PolicyConfig(name="base_only"))
    plan = make_plan(alone)
    assert plan.vocabulary_case is None and set(plan.formats) == {Role.base} and plan.judge is None


def test_random_takes_its_rate_from_a_finished_run(place: Path) -> None:
    graded = make_config(place, output_dir=str(place / "graded"), policy=PolicyConfig(name="specreason", threshold=3.0))
    run(graded)
    accepted = [step["accepted"] for step in rows(graded)["steps"] if step["accepted"] is not None]
    config = make_config(place, policy=PolicyConfig(name="random", match_run=graded.output_dir))
    plan = make_plan(config)
    assert plan.config.policy.accept_rate == pytest.approx(sum(accepted) / len(accepted))
    assert 0.0 < sum(accepted) < len(accepted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no config", r"base\.model: .*base has no readable config\.json"),
        ("torn config", r"base\.model: .*base has no readable config\.json"),
        ("no weights", r"base\.model: .*base holds no weights; allowed: files named \*\.safetensors"),
        ("no tokenizer", r"base\.model: .*base holds no tokenizer; allowed: a file named tokenizer\.json"),
        ("own code", r"base\.model: .*brings code of its own .*allowed: with base\.trust_remote_code=true"),
    ],
)
def test_a_model_folder_that_cannot_serve_is_refused_by_name(
    place: Path, tmp_path: Path, change: str, message: str
) -> None:
    models = tmp_path / "changed"
    shutil.copytree(place / "models", models / "models")
    write_prompts(models / "prompts.parquet")
    base = models / "models" / "base"
    match change:
        case "no config":
            (base / "config.json").unlink()
        case "torn config":
            (base / "config.json").write_text('{"model_type"')
        case "no weights":
            (base / "model.safetensors").unlink()
        case "no tokenizer":
            for path in base.glob("tokenizer*"):
                path.unlink()
        case "own code":
            (base / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    config = make_config(models)
    with pytest.raises(InvalidInput, match=message):
        make_plan(config)
    assert not Path(config.output_dir).exists()


def test_a_model_folder_without_weights_serves_where_they_are_made_up(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "models", tmp_path / "changed" / "models")
    write_prompts(tmp_path / "changed" / "prompts.parquet")
    (tmp_path / "changed" / "models" / "base" / "model.safetensors").unlink()
    config = make_config(tmp_path / "changed")
    config.base.vllm_args = {"load_format": "dummy"}
    assert make_plan(config).pending


def test_a_refused_plan_writes_nothing(place: Path) -> None:
    config = make_config(place)
    config.judge = replace(config.judge, labels=[*"012345678", "10"])
    with pytest.raises(InvalidInput, match="'10' is not a single token"):
        make_plan(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("prompt_id", ["[/x]", "[bold]", "a/b", "é 😀", "x\ny", "0"])
def test_any_prompt_id_is_shown_run_and_written_as_it_is(place: Path, prompt_id: str) -> None:
    write_prompts(place / "prompts.parquet", 1, prompt_id=[prompt_id], prompt=["[/x] so [bold]"])
    config = make_config(place)
    run(config)
    assert chain_keys(config) == [(prompt_id, 0)]
    assert rows(config)["chains"][0]["prompt"] == "[/x] so [bold]"


def test_a_schedules_options_reach_it_and_the_baselines_know_none() -> None:
    chosen = choose_schedule(ScheduleConfig(name="waves", wave=0.5), free_running=False)
    assert isinstance(chosen, partial) and (chosen.func, chosen.keywords) == (waves, {"wave": 0.5})
    chosen = choose_schedule(ScheduleConfig(name="overlapped", cohorts=2), free_running=False)
    assert isinstance(chosen, partial) and (chosen.func, chosen.keywords) == (overlapped, {"cohorts": 2})
    assert choose_schedule(ScheduleConfig(name="lockstep"), free_running=False) is lockstep
    assert choose_schedule(ScheduleConfig(name="lockstep"), free_running=True) is continuous
