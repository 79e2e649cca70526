"""Every choice is typed, ranged and refused by name before a model loads (docs/design.md, section 8)."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from jobs.launch import ExitStatus, register_schema, to_config
from jobs.report import to_config as report_config
from specreason_batch.chat import ChatFormat, load_chat_format
from specreason_batch.config import NOT_IN_FINGERPRINT, POLICY_NAMES, SCHEDULE_NAMES, GenerateConfig
from specreason_batch.judge import Judge, Question
from specreason_batch.policies import POLICIES
from specreason_batch.schedules import SCHEDULES
from specreason_batch.store.manifest import flatten
from specreason_batch.types import InvalidInput, Role
from tests.support.configs import make_config

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))

ENGINE_KEYS = {
    *(
        "model",
        "dtype",
        "max_model_len",
        "tensor_parallel_size",
        "device_ids",
        "kv_cache_gib",
        "gpu_memory_utilization",
    ),
    *(
        "kv_offload_gib",
        "cpu_cores",
        "block_size",
        "in_process",
        "engine_timeout_seconds",
        "trust_remote_code",
        "vllm_args",
    ),
    *("speculative.method", "speculative.model", "speculative.num_speculative_tokens", "speculative.args"),
    *("speculative.prompt_lookup_min", "speculative.prompt_lookup_max"),
    *("chat.think_open", "chat.think_close", "chat.template", "chat.template_kwargs", "chat.system_prompt"),
}
KEYS = {
    *("name", "output_dir", "seed", "seeded", "samples_per_prompt", "limit", "input.path", "input.shards"),
    *(f"{role}.{key}" for role in ("draft", "base") for key in ENGINE_KEYS),
    *(f"sampling.{who}.{key}" for who in ("draft", "base", "answer") for key in ("temperature", "top_p", "top_k")),
    *(
        f"policy.{key}"
        for key in ("name", "threshold", "first_n_base_steps", "accept_rate", "match_run", "answer_role")
    ),
    *(f"judge.{key}" for key in ("question", "reply_opening", "reading", "mass_floor", "labels")),
    *(f"budgets.{key}" for key in ("max_step_tokens", "thinking_tokens", "generated_tokens", "repeated_steps")),
    *("budgets.max_answer_tokens", "parts.chains", "parts.seconds", "checkpoint.seconds", "checkpoint.keep"),
    *(
        "lease.beat_seconds",
        "lease.stale_seconds",
        "recovery.max_rebuilds",
        "recovery.stop_seconds",
        "recovery.node_check",
    ),
    *(f"schedule.{key}" for key in ("name", "active_size", "fit_memory", "cohorts", "wave")),
    *("log.seconds", "log.vllm_level"),
}


@pytest.fixture(scope="module", autouse=True)
def _conf() -> Iterator[None]:
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> Any:
    """What the command line composes; output_dir otherwise takes its name from the running job."""
    return compose("generate", overrides=["output_dir=somewhere", *overrides])


def config(*overrides: str) -> GenerateConfig:
    return to_config(composed(*overrides))


# --- what composes ---


def test_there_are_experiments() -> None:
    assert "toy" in EXPERIMENTS


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_a_complete_valid_run_and_has_these_keys(experiment: str) -> None:
    found = composed(f"experiment={experiment}")
    keys = set(flatten(OmegaConf.to_container(found)))  # type: ignore[arg-type]
    for role in Role:  # dictionaries that are passed through
        keys = {key for key in keys if not key.startswith((f"{role}.vllm_args.", f"{role}.chat.template_kwargs."))}
        keys |= {f"{role}.vllm_args", f"{role}.chat.template_kwargs"}
    assert keys == KEYS
    assert to_config(found).name == experiment


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_names_nothing_outside_the_schema(experiment: str) -> None:
    """No machine's paths: models and prompts are names, or lie in the repository."""
    found = config(f"experiment={experiment}")
    for value in (found.draft.model, found.base.model, found.input.path):
        assert not value.startswith("/")


def test_the_toy_experiment_is_the_default() -> None:
    assert OmegaConf.to_container(composed()) == OmegaConf.to_container(composed("experiment=toy"))
    assert (ROOT / config().input.path).is_file()


@pytest.mark.parametrize(
    ("group", "choice"),
    [
        (folder.name, path.stem)
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and folder.name not in ("engine", "experiment", "cost", "latency", "speculative")
        for path in sorted(folder.glob("*.yaml"))
    ],
)
def test_every_choice_of_every_group_composes(group: str, choice: str) -> None:
    needed = {"random": ["policy.accept_rate=0.5"], "yes_no": ["policy.threshold=0.5"]}.get(choice, [])
    found = config(f"{group}={choice}", *needed)
    assert getattr(found, group) is not None


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONF / "speculative").glob("*.yaml")))
def test_every_kind_of_speculation_composes_for_either_engine(choice: str) -> None:
    needed = {"eagle": ["base.speculative.model=head"]}.get(choice, [])
    found = config(f"speculative@base.speculative={choice}", *needed)
    assert found.base.speculative.method == choice
    assert found.draft.speculative.method == "none"


@pytest.mark.parametrize(
    ("group", "choice"),
    [(group, path.stem) for group in ("cost", "latency") for path in sorted((CONF / group).glob("*.yaml"))],
)
def test_every_table_for_reports_composes(group: str, choice: str) -> None:
    found = report_config(compose("report", overrides=["runs=mine", f"{group}={choice}"]))
    assert getattr(found, group) is not None


def test_every_policy_and_schedule_has_a_file_and_a_coroutine() -> None:
    assert {path.stem for path in (CONF / "policy").glob("*.yaml")} == set(POLICY_NAMES) == set(POLICIES)
    assert {path.stem for path in (CONF / "schedule").glob("*.yaml")} == set(SCHEDULE_NAMES) == set(SCHEDULES)


def toy_judge(choice: str, *overrides: str) -> tuple[Judge, ChatFormat, tuple[str, ...]]:
    found = config(f"judge={choice}", *overrides).judge
    chat = load_chat_format(Role.base, str(ROOT / "examples" / "toy" / "base"), config().base.chat.options())
    question = Question(
        question=found.question,
        reply_opening=found.reply_opening,
        reading=found.reading,
        mass_floor=found.mass_floor,
        labels=tuple(found.labels),
    )
    return Judge(question, chat), chat, tuple(found.labels)


@pytest.mark.parametrize("choice", ["short", "paper"])
def test_the_digit_judges_labels_are_single_tokens_of_the_toy_pair(choice: str) -> None:
    judge, chat, labels = toy_judge(choice)
    assert chat.decode(judge.label_ids) == "".join(labels)


def test_a_judge_whose_labels_the_vocabulary_lacks_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="' yes' is not a single token"):
        toy_judge("yes_no", "policy.threshold=0.5")


def test_overrides_reach_the_typed_configuration() -> None:
    found = config(
        "policy.threshold=6.5", "policy.answer_role=draft", "judge.reading=greedy", "draft.device_ids=[1,2]", "limit=3"
    )
    assert (found.policy.threshold, found.policy.answer_role, found.judge.reading) == (6.5, Role.draft, "greedy")
    assert (found.draft.device_ids, found.limit, found.base.device_ids) == ([1, 2], 3, None)


def test_cores_and_offloading_are_resources_that_do_not_change_rows() -> None:
    found = config("draft.cpu_cores=[1]", "base.cpu_cores=[0,2]", "draft.in_process=false", "base.in_process=false")
    assert (found.draft.cpu_cores, found.base.cpu_cores, found.base.kv_offload_gib) == ([1], [0, 2], None)
    names = {f"{role}.{name}" for role in Role for name in ("cpu_cores", "kv_offload_gib")}
    assert names <= set(NOT_IN_FINGERPRINT)


def test_vllms_own_arguments_and_the_templates_are_passed_through() -> None:
    found = config("+base.vllm_args.quantization=fp8", "+draft.chat.template_kwargs.enable_thinking=true")
    assert found.base.vllm_args == {"quantization": "fp8"}
    assert found.draft.vllm_args == {}
    assert found.draft.chat.options().template_kwargs == {"enable_thinking": True}


# --- what is refused ---

OUT_OF_RANGE = [
    ("seed=-1", "seed: -1 is out of range; allowed: at least 0"),
    ("samples_per_prompt=0", "samples_per_prompt: 0 is out of range; allowed: at least 1"),
    ("limit=0", "limit: 0 is out of range; allowed: at least 1"),
    ("output_dir=''", "output_dir: '' is empty; allowed: text"),
    ("input.path=''", "input.path: '' is empty; allowed: text"),
    ("input.shards=[-1]", "input.shards: [-1] is out of range; allowed: one or more shard numbers, from 0"),
    *[
        (f"{role}.{setting}", f"{role}.{message}")
        for role in ("draft", "base")
        for setting, message in [
            ("model=''", "model: '' is empty; allowed: text"),
            ("max_model_len=15", "max_model_len: 15 is out of range; allowed: at least 16"),
            ("tensor_parallel_size=0", "tensor_parallel_size: 0 is out of range; allowed: at least 1"),
            ("kv_cache_gib=0", "kv_cache_gib: 0 is out of range; allowed: at least 1"),
            ("gpu_memory_utilization=0", "gpu_memory_utilization: 0.0 is out of range; allowed: over 0.0 to 1.0"),
            ("gpu_memory_utilization=1.1", "gpu_memory_utilization: 1.1 is out of range; allowed: over 0.0 to 1.0"),
            ("kv_offload_gib=0", "kv_offload_gib: 0 is out of range; allowed: at least 1"),
            ("cpu_cores=[]", "cpu_cores: [] is out of range; allowed: one or more different core numbers, from 0"),
            (
                "cpu_cores=[1,1]",
                "cpu_cores: [1, 1] is out of range; allowed: one or more different core numbers, from 0",
            ),
            ("cpu_cores=[-1]", "cpu_cores: [-1] is out of range; allowed: one or more different core numbers, from 0"),
            ("block_size=0", "block_size: 0 is out of range; allowed: at least 1"),
            ("engine_timeout_seconds=0.5", "engine_timeout_seconds: 0.5 is out of range; allowed: at least 1"),
            (
                "speculative.method=guess",
                "speculative.method: 'guess' is unknown; allowed: none, draft_model, ngram, eagle, eagle3",
            ),
            *[
                (f"speculative.{name}=0", f"speculative.{name}: 0 is out of range; allowed: at least 1")
                for name in ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max")
            ],
            ("chat.think_open=''", "chat.think_open: '' is empty; allowed: text"),
            ("chat.think_close=''", "chat.think_close: '' is empty; allowed: text"),
        ]
    ],
    *[
        (f"sampling.{who}.{setting}", f"sampling.{who}.{message}")
        for who in ("draft", "base", "answer")
        for setting, message in [
            ("temperature=-0.1", "temperature: -0.1 is out of range; allowed: 0.0 to 5.0"),
            ("temperature=5.1", "temperature: 5.1 is out of range; allowed: 0.0 to 5.0"),
            ("temperature=0.005", "temperature: 0.005 is neither greedy (0) nor at least 0.01"),
            ("temperature=nan", "temperature: nan is out of range; allowed: 0.0 to 5.0"),
            ("top_p=0", "top_p: 0.0 is out of range; allowed: over 0.0 to 1.0"),
            ("top_p=1.1", "top_p: 1.1 is out of range; allowed: over 0.0 to 1.0"),
            ("top_k=-1", "top_k: -1 is out of range; allowed: at least 0"),
        ]
    ],
    (
        "policy.name=oracle",
        "policy.name: 'oracle' is unknown; allowed: specreason, base_only, base_direct, draft_only, random",
    ),
    ("policy.threshold=-1", "policy.threshold: -1.0 is out of range; allowed: 0.0 to 9.0"),
    ("policy.threshold=12", "policy.threshold: 12.0 is out of range; allowed: 0.0 to 9.0"),
    ("policy.first_n_base_steps=-1", "policy.first_n_base_steps: -1 is out of range; allowed: at least 0"),
    ("policy.accept_rate=1.1", "policy.accept_rate: 1.1 is out of range; allowed: 0.0 to 1.0"),
    ("judge.question=''", "judge.question: '' is empty; allowed: text"),
    ("judge.reply_opening=''", "judge.reply_opening: '' is empty; allowed: text"),
    ("judge.mass_floor=1.5", "judge.mass_floor: 1.5 is out of range; allowed: 0.0 to 1.0"),
    ("judge.labels=[a,b]", "judge.labels: 2 labels; reading expected takes 10"),
    ("budgets.max_step_tokens=0", "budgets.max_step_tokens: 0 is out of range; allowed: at least 1"),
    ("budgets.thinking_tokens=0", "budgets.thinking_tokens: 0 is out of range; allowed: at least 1"),
    ("budgets.generated_tokens=0", "budgets.generated_tokens: 0 is out of range; allowed: at least 1"),
    ("budgets.max_answer_tokens=0", "budgets.max_answer_tokens: 0 is out of range; allowed: at least 1"),
    ("budgets.repeated_steps=1", "budgets.repeated_steps: 1 is out of range; allowed: at least 2"),
    ("schedule.name=random", "schedule.name: 'random' is unknown; allowed: lockstep, overlapped, continuous, waves"),
    ("schedule.cohorts=2", "schedule.cohorts: 2 does nothing in lockstep; allowed: null"),
    ("schedule.wave=0.5", "schedule.wave: 0.5 does nothing in lockstep; allowed: null"),
    ("schedule.active_size=0", "schedule.active_size: 0 is out of range; allowed: at least 1"),
    ("parts.chains=0", "parts.chains: 0 is out of range; allowed: at least 1"),
    ("parts.seconds=-1", "parts.seconds: -1.0 is out of range; allowed: at least 0"),
    ("checkpoint.seconds=-1", "checkpoint.seconds: -1.0 is out of range; allowed: at least 0"),
    ("checkpoint.keep=0", "checkpoint.keep: 0 is out of range; allowed: at least 1"),
    ("lease.beat_seconds=0", "lease.beat_seconds: 0.0 is out of range; allowed: at least 0.05"),
    ("lease.stale_seconds=20", "lease.stale_seconds: 20.0 is out of range; allowed: at least 30.0"),
    ("recovery.max_rebuilds=-1", "recovery.max_rebuilds: -1 is out of range; allowed: at least 0"),
    ("recovery.stop_seconds=0", "recovery.stop_seconds: 0.0 is out of range; allowed: at least 1"),
    ("log.seconds=0", "log.seconds: 0.0 is out of range; allowed: at least 0.1"),
    ("log.vllm_level=LOUD", "log.vllm_level: 'LOUD' is unknown; allowed: DEBUG, INFO, WARNING, ERROR"),
]


@pytest.mark.parametrize(("override", "message"), OUT_OF_RANGE, ids=[override for override, _ in OUT_OF_RANGE])
def test_a_value_out_of_range_is_refused_with_field_value_and_range(override: str, message: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        config(override)
    assert message in str(raised.value).splitlines()


def test_every_field_with_a_range_has_a_case_here() -> None:
    """Fields of numbers and of names; those without a range are listed."""
    unranged = {"seeded", "fit_memory", "in_process", "trust_remote_code", "dtype", "vllm_args", "device_ids"}
    unranged |= {"chat.template", "chat.template_kwargs", "chat.system_prompt"}
    unranged |= {"speculative.model", "speculative.args"}
    unranged |= {"policy.match_run", "policy.answer_role", "judge.reading", "recovery.node_check"}
    tested = {override.split("=")[0] for override, _ in OUT_OF_RANGE}
    left = {key for key in KEYS - {"name"} if key not in unranged and key.split(".", 1)[-1] not in unranged}
    assert left == tested


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InvalidInput) as raised:
        config("policy.threshold=12", "draft.max_model_len=1", "schedule.active_size=0")
    named = [line.split(":")[0] for line in str(raised.value).splitlines()]
    assert {"policy.threshold", "draft.max_model_len", "schedule.active_size"} <= set(named)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["judge=yes_no"], "policy.threshold (reading yes_no): 7.0 is out of range; allowed: 0.0 to 1.0"),
        (["judge.reading=yes_no", "policy.threshold=0.5"], "judge.labels: 10 labels; reading yes_no takes 2"),
        (["policy=random"], "policy: random needs either accept_rate (0 to 1) or match_run (a run's output folder)"),
        (
            ["policy=random", "policy.accept_rate=0.5", "policy.match_run=x"],
            "policy: random needs either accept_rate (0 to 1) or match_run (a run's output folder)",
        ),
        (
            ["policy=base_only", "policy.answer_role=draft"],
            "policy.answer_role: draft does not run with policy base_only; allowed: base",
        ),
        (
            ["policy=draft_only", "policy.answer_role=base"],
            "policy.answer_role: base does not run with policy draft_only; allowed: draft",
        ),
        (
            ["budgets.max_answer_tokens=500", "draft.max_model_len=500"],
            "budgets.max_answer_tokens: 500 leaves nothing of draft.max_model_len=500; allowed: less than that",
        ),
        (
            ["draft.cpu_cores=[0,1,2]", "base.cpu_cores=[3,2,1]"],
            "draft.cpu_cores: [1, 2] are in base.cpu_cores too; allowed: cores of its own",
        ),
        (
            ["base.cpu_cores=[0]", "base.in_process=true"],
            "base.cpu_cores: [0] does not go with in_process=true, which binds nothing; allowed: null",
        ),
        (
            ["base.cpu_cores=[0]", "base.tensor_parallel_size=2"],
            "base.cpu_cores: [0] is fewer than tensor_parallel_size=2; allowed: at least a core each",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        config(*overrides)
    assert message in str(raised.value).splitlines()


@pytest.mark.parametrize(
    "override",
    [
        *("policy.treshold=5", "+policy.treshold=5", "+treshold=5", "policy=specreson"),
        *("seed=abc", "judge.reading=best", "experiment=nosuch"),
    ],
)
def test_a_typo_or_a_wrong_type_is_refused(override: str) -> None:
    with pytest.raises((ConfigCompositionException, InvalidInput)):
        config(override)


def test_a_field_without_a_value_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"input\.path: not set; it needs a value"):
        to_config(composed("input.path=???"))


def test_a_configuration_made_in_python_is_validated_too(tmp_path: Path) -> None:
    assert make_config(tmp_path).seed == 0
    with pytest.raises(InvalidInput, match="samples_per_prompt: 0 is out of range"):
        make_config(tmp_path, samples_per_prompt=0)


def test_the_schema_and_the_pinned_keys_agree() -> None:
    assert {key.split(".")[0] for key in KEYS} == {field.name for field in fields(GenerateConfig)}


# --- the command ---

# Says on leaving whether anything heavy was imported.
PROBE = """
import atexit, runpy, sys
atexit.register(lambda: print("HEAVY", sorted({"vllm", "torch", "transformers"} & set(sys.modules))))
sys.argv = ["jobs.generate", *sys.argv[1:]]
runpy.run_module("jobs.generate", run_name="__main__", alter_sys=True)
"""


def command(*arguments: str, code: tuple[str, ...] = ("-m", "jobs.generate")) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *code, *arguments], cwd=ROOT, capture_output=True, check=False, text=True, timeout=120
    )


def test_the_command_refuses_with_one_message_and_status_two(tmp_path: Path) -> None:
    done = command("policy.threshold=12", f"output_dir={tmp_path / 'out'}")
    assert done.returncode == int(ExitStatus.invalid) == 2
    assert done.stderr == "error: policy.threshold: 12.0 is out of range; allowed: 0.0 to 9.0\n"
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_refusal_comes_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    done = command("policy.threshold=12", f"output_dir={tmp_path / 'out'}", code=("-c", PROBE))
    assert done.returncode == 2
    assert "HEAVY []" in done.stdout


@pytest.mark.parametrize("arguments", [["policy.treshold=5"], ["policy=specreson"]])
def test_the_command_refuses_a_typo_without_a_traceback(tmp_path: Path, arguments: list[str]) -> None:
    done = command(*arguments, f"output_dir={tmp_path / 'out'}")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert arguments[0].split("=")[0].split(".")[-1] in done.stderr
    assert not (tmp_path / "out").exists()


def test_missing_input_is_refused_with_status_two_and_no_output(tmp_path: Path) -> None:
    done = command(f"input.path={tmp_path}/none.parquet", f"output_dir={tmp_path / 'out'}", code=("-c", PROBE))
    assert done.returncode == 2
    assert "error: input.path: no Parquet file at" in done.stderr
    assert "Traceback" not in done.stderr
    assert "vllm" not in done.stdout
    assert not (tmp_path / "out").exists()
