"""What is read and written: prompts, parts, the manifest; committed or not at all (docs/design.md, section 6)."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specreason_batch.config import GenerateConfig
from specreason_batch.plan import make_plan
from specreason_batch.rounds import RoundStats
from specreason_batch.store import parts as parts_module
from specreason_batch.store.manifest import claim_output, file_identity, fingerprint, fingerprint_fields, read_manifest
from specreason_batch.store.parts import ShardPaths, ShardWriter, check_source, commit_table
from specreason_batch.store.prompts import PromptShard, Reject, list_shards
from specreason_batch.store.reading import acceptance_rate, rejected_rows, scan
from specreason_batch.store.schemas import (
    CHAINS,
    REJECTS,
    ROUNDS,
    SCHEMA_VERSION,
    STEPS,
    chain_rows,
    chains_schema,
    round_row,
)
from specreason_batch.types import InvalidInput, Prompt, Role
from tests.support.commits import Uncontended
from tests.support.configs import make_config, write_models
from tests.support.running import Run, run_world
from tests.support.worlds import PROMPTS, World

EXTRA = pa.schema({"level": pa.int32(), "tags": pa.list_(pa.string())})


@pytest.fixture(scope="module")
def run() -> Run:
    return run_world(World(prompts=PROMPTS, windows=(4096, 4096)))


# --- schemas ---


def test_row_keys_are_the_schemas_names(run: Run) -> None:
    """`Table.from_pylist` drops an unknown key and nulls a misspelt one without a word."""
    prompt = replace(run.finished[0].prompt, gold_answer="4", extra={"level": 3, "tags": ["a"]})
    chain = replace(run.finished[0], prompt=prompt)
    row, steps = chain_rows(chain, run.translator, has_gold_answer=True)
    assert set(row) == set(chains_schema(EXTRA, has_gold_answer=True).names)
    assert all(set(step) == set(STEPS.names) for step in steps) and steps
    assert set(round_row(RoundStats(1, 0.0))) == set(ROUNDS.names)
    reject = Reject(prompt_id="p", sample_index=None, file="f", row=1, reason="r")
    assert set(reject.as_row()) == set(REJECTS.names)


def test_chains_carry_the_inputs_other_columns_under_names_of_their_own(run: Run) -> None:
    schema = chains_schema(EXTRA, has_gold_answer=True)
    assert schema.names[: len(CHAINS)] == CHAINS.names
    assert schema.names[len(CHAINS) :] == ["gold_answer", "input_level", "input_tags"]
    assert schema.field("input_tags").type == pa.list_(pa.string())
    assert "gold_answer" not in chains_schema(EXTRA, has_gold_answer=False).names


def test_every_value_survives_parquet(run: Run, tmp_path: Path) -> None:
    rows = [chain_rows(chain, run.translator, False) for chain in run.finished]
    writer = writer_at(tmp_path)
    for row, steps in rows:
        writer.add_chain(row, steps)
    writer.commit()
    assert _read(tmp_path, "chains") == [row for row, _ in rows]
    written = [step for _, steps in rows for step in steps]
    for read, step in zip(_read(tmp_path, "steps"), written, strict=True):
        assert read["token_ids"] == list(step["token_ids"])
        assert (read["digit_probs"] is None) == (step["digit_probs"] is None)
        if step["digit_probs"] is not None:
            assert read["digit_probs"] == pytest.approx(list(step["digit_probs"]), abs=1e-7)
        assert {name: read[name] for name in read if name not in ("token_ids", "digit_probs")} == {
            name: step[name] for name in step if name not in ("token_ids", "digit_probs")
        }


def test_step_spans_and_tokens_slice_the_stored_thinking(run: Run) -> None:
    for chain in run.finished:
        row, steps = chain_rows(chain, run.translator, False)
        assert "".join(row["thinking"][step["start"] : step["end"]] for step in steps) == row["thinking"]
        assert row["num_steps"] == len(steps)


# --- parts ---


def writer_at(root: Path, chains_per_part: int = 1000, seconds_per_part: float = 1e9) -> ShardWriter:
    return ShardWriter(
        paths=ShardPaths(root),
        lease=Uncontended(root),
        chains_schema=CHAINS,
        metadata={"fingerprint": "f00d", "source": "5:abc"},
        chains_per_part=chains_per_part,
        seconds_per_part=seconds_per_part,
    )


def add(writer: ShardWriter, prompt_id: str, num_steps: int = 2, reject: bool = False) -> None:
    chain = dict.fromkeys(CHAINS.names) | {"prompt_id": prompt_id, "sample_index": 0}
    steps = [
        dict.fromkeys(STEPS.names) | {"prompt_id": prompt_id, "sample_index": 0, "step_index": index}
        for index in range(num_steps)
    ]
    found = Reject(prompt_id=prompt_id, sample_index=0, file="f", row=0, reason="r") if reject else None
    writer.add_chain(chain, steps, found)


def _read(root: Path, kind: str) -> list[dict[str, Any]]:
    return [row for path in ShardPaths(root).committed(kind) for row in pq.read_table(path).to_pylist()]


def _ids(root: Path, kind: str = "chains") -> list[str]:
    return [row["prompt_id"] for row in _read(root, kind)]


def _files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.fixture
def failing_write(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make writing one kind of file fail half-way, as a full disk does."""
    whole = pq.write_table

    def fail_at(kind: str) -> None:
        def write(table: pa.Table, file: Any, **options: Any) -> None:
            if table.schema.metadata[b"kind"].decode() == kind:
                file.write(b"PAR1 half a file")
                raise OSError(28, "No space left on device")
            whole(table, file, **options)

        monkeypatch.setattr(pq, "write_table", write)

    return fail_at


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, failing_write: Callable[[str], None]) -> None:
    failing_write("x")
    table = pa.table({"a": [1]}).replace_schema_metadata({"kind": "x"})
    with pytest.raises(OSError, match="No space left"):
        commit_table(table, tmp_path / "part.parquet", Uncontended(tmp_path))
    assert _files(tmp_path) == []


def test_an_interrupted_write_leaves_the_file_that_was_there(
    tmp_path: Path, failing_write: Callable[[str], None]
) -> None:
    table = pa.table({"a": [1]}).replace_schema_metadata({"kind": "x"})
    commit_table(table, tmp_path / "part.parquet", Uncontended(tmp_path))
    failing_write("x")
    with pytest.raises(OSError, match="No space left"):
        other = pa.table({"a": [2]}).replace_schema_metadata({"kind": "x"})
        commit_table(other, tmp_path / "part.parquet", Uncontended(tmp_path))
    assert pq.read_table(tmp_path / "part.parquet").to_pylist() == [{"a": 1}]
    assert _files(tmp_path) == ["part.parquet"]


@pytest.mark.parametrize("kind", ["rejects", "steps", "chains"])
def test_a_part_that_failed_half_way_is_no_output_and_the_next_attempt_removes_it(
    tmp_path: Path, failing_write: Callable[[str], None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = writer_at(tmp_path)
    add(first, "a")
    first.commit()
    before = _files(tmp_path)
    failing_write(kind)
    add(first, "b", reject=True)
    with pytest.raises(OSError, match="No space left"):
        first.commit()
    assert _ids(tmp_path) == ["a"] and _ids(tmp_path, "steps") == ["a", "a"]
    assert ShardPaths(tmp_path).done_keys() == {("a", 0)}
    ShardPaths(tmp_path).remove_uncommitted(Uncontended(tmp_path))
    assert _files(tmp_path) == before
    monkeypatch.undo()
    second = writer_at(tmp_path)
    add(second, "b")
    second.commit()
    assert _ids(tmp_path) == ["a", "b"]


def test_a_part_whose_commit_failed_is_committed_by_the_next_try(
    tmp_path: Path, failing_write: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writer_at(tmp_path)
    add(writer, "a")
    failing_write("chains")
    with pytest.raises(OSError, match="No space left"):
        writer.commit()
    monkeypatch.undo()
    writer.commit()
    assert (_ids(tmp_path), _ids(tmp_path, "steps")) == (["a"], ["a", "a"])
    assert ShardPaths(tmp_path).remove_uncommitted(Uncontended(tmp_path)) == 0


def test_chains_are_committed_after_their_steps_and_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(parts_module, "commit_table", lambda table, path, lease: order.append(path.parent.name))
    writer = writer_at(tmp_path)
    add(writer, "a", reject=True)
    writer.add_round(round_row(RoundStats(1, 0.0)))
    writer.commit()
    assert order.index("chains") > max(order.index("steps"), order.index("rejects"))


def test_readers_pass_over_steps_without_chains_and_temporary_files(tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    writer = writer_at(shard)
    add(writer, "a")
    writer.commit()
    orphan = pq.read_table(ShardPaths(shard).committed("steps")[0])
    commit_table(orphan, shard / "steps" / "part-00001-dead.parquet", Uncontended(shard))
    (shard / "chains" / ".part-00001-dead.parquet.0.tmp").write_bytes(b"PAR1 half")
    found = scan(tmp_path, "steps")
    assert found is not None and found.collect().height == 2
    chains = scan(tmp_path, "chains")
    assert chains is not None and chains.collect()["prompt_id"].to_list() == ["a"]
    assert ShardPaths(shard).remove_uncommitted(Uncontended(shard)) == 1
    assert not list(tmp_path.glob("*/*/part-*dead*"))


def test_removing_what_is_uncommitted_touches_no_output(tmp_path: Path) -> None:
    writer = writer_at(tmp_path)
    add(writer, "a", reject=True)
    writer.add_round(round_row(RoundStats(1, 0.0)))
    writer.commit()
    writer.write_input_rejects([Reject(prompt_id="x", sample_index=None, file="f", row=3, reason="r")])
    before = _files(tmp_path)
    assert ShardPaths(tmp_path).remove_uncommitted(Uncontended(tmp_path)) == 0
    assert _files(tmp_path) == before and len(before) == 5


@pytest.mark.parametrize(("num_chains", "expected"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_a_part_closes_at_its_size(tmp_path: Path, num_chains: int, expected: int) -> None:
    writer = writer_at(tmp_path, chains_per_part=2)
    for index in range(num_chains):
        add(writer, f"p{index}")
        writer.commit_if_due()
    assert len(ShardPaths(tmp_path).parts("chains")) == expected
    writer.commit()
    assert _ids(tmp_path) == [f"p{index}" for index in range(num_chains)]


def test_a_part_closes_at_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    writer = writer_at(tmp_path, seconds_per_part=600.0)
    now += 700.0
    writer.commit_if_due()
    assert _files(tmp_path) == [], "there is nothing to commit"
    writer.commit()
    add(writer, "a")
    now += 599.0
    writer.commit_if_due()
    assert _ids(tmp_path) == []
    now += 1.0
    writer.commit_if_due()
    assert _ids(tmp_path) == ["a"]


def test_a_commit_with_nothing_writes_nothing(tmp_path: Path) -> None:
    writer_at(tmp_path).commit()
    assert _files(tmp_path) == []


def test_two_attempts_never_write_the_same_file(tmp_path: Path) -> None:
    first, second = writer_at(tmp_path), writer_at(tmp_path)
    for writer, prompt_id in ((first, "a"), (second, "b"), (first, "c")):
        add(writer, prompt_id)
        writer.commit()
    assert sorted(_ids(tmp_path)) == ["a", "b", "c"]
    assert len(set(ShardPaths(tmp_path).parts("chains"))) == 3


def test_rounds_without_chains_are_kept_and_make_nothing_done(tmp_path: Path) -> None:
    writer = writer_at(tmp_path)
    writer.add_round(round_row(RoundStats(1, 0.0)))
    writer.commit()
    assert ShardPaths(tmp_path).done_keys() == set()
    assert len(ShardPaths(tmp_path).parts("rounds")) == 1


def test_every_file_carries_the_fingerprint_the_schema_version_and_its_source(tmp_path: Path) -> None:
    writer = writer_at(tmp_path)
    add(writer, "a", reject=True)
    writer.add_round(round_row(RoundStats(1, 0.0)))
    writer.commit()
    for kind in ("chains", "steps", "rounds", "rejects"):
        (path,) = (tmp_path / kind).iterdir()
        metadata = {key.decode(): value.decode() for key, value in pq.read_schema(path).metadata.items()}
        wanted = {"fingerprint": "f00d", "source": "5:abc", "schema_version": SCHEMA_VERSION, "kind": kind}
        assert metadata.items() >= wanted.items()
        assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


def test_output_of_another_input_is_refused(tmp_path: Path) -> None:
    writer = writer_at(tmp_path)
    add(writer, "a")
    writer.commit()
    check_source(ShardPaths(tmp_path), "5:abc")
    with pytest.raises(InvalidInput, match=r"another content of this input shard \(5:abc, now 6:xyz\)"):
        check_source(ShardPaths(tmp_path), "6:xyz")


def test_input_rejects_are_put_in_place_and_taken_away(tmp_path: Path) -> None:
    writer = writer_at(tmp_path)
    reject = Reject(prompt_id="x", sample_index=None, file="f", row=3, reason="empty")
    for _ in range(2):
        writer.write_input_rejects([reject])
    assert rejected_rows(ShardPaths(tmp_path)) == {3}
    assert pq.read_table(tmp_path / "rejects" / "input.parquet").to_pylist() == [reject.as_row()]
    writer.write_input_rejects([])
    assert rejected_rows(ShardPaths(tmp_path)) == set()


def test_acceptance_is_accepted_by_decided_steps(tmp_path: Path) -> None:
    writer = writer_at(tmp_path / "shard")
    add(writer, "a", num_steps=5)
    for step, accepted in zip(writer._steps, (True, True, True, False, None), strict=True):
        step["accepted"] = accepted
    writer.commit()
    assert acceptance_rate(tmp_path) == 0.75


@pytest.mark.parametrize("what", ["nothing", "ungraded"])
def test_a_run_that_graded_nothing_has_no_acceptance(tmp_path: Path, what: str) -> None:
    if what == "ungraded":
        writer = writer_at(tmp_path / "shard")
        add(writer, "a")
        writer.commit()
    with pytest.raises(InvalidInput, match=r"policy\.match_run: .*no graded steps"):
        acceptance_rate(tmp_path)


# --- prompts ---


def shard_of(path: Path, **columns: Any) -> PromptShard:
    pq.write_table(pa.table(columns), path / "shard.parquet")
    return PromptShard.open(path / "shard.parquet")


def test_every_row_is_a_prompt_or_a_reject_with_its_place(tmp_path: Path) -> None:
    ids = ["a", None, "", "b", "a", "c", "d", "e"]
    texts: list[str | None] = ["one", "x", "x", None, "again", "  \n", "", "five"]
    found = list(shard_of(tmp_path, prompt_id=ids, prompt=texts).prompts())
    assert [(item.prompt_id, item.row) for item in found if isinstance(item, Prompt)] == [("a", 0), ("e", 7)]
    rejects = {item.row: (item.prompt_id, item.reason) for item in found if isinstance(item, Reject)}
    assert rejects == {
        1: (None, "prompt_id is null or empty"),
        2: ("", "prompt_id is null or empty"),
        3: ("b", "prompt is null or empty"),
        4: ("a", "prompt_id was used by an earlier row"),
        5: ("c", "prompt is null or empty"),
        6: ("d", "prompt is null or empty"),
    }


def test_a_prompt_is_passed_on_as_it_is(tmp_path: Path) -> None:
    text = "  <think>é😀\n\n</think> "
    (found,) = shard_of(tmp_path, prompt_id=["a"], prompt=[text]).prompts()
    assert isinstance(found, Prompt) and found.prompt == text


def test_integer_ids_are_text_and_gold_answers_too(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, prompt_id=[7, 8], prompt=["x", "y"], gold_answer=[4, None], level=[1, 2])
    found = [item for item in shard.prompts() if isinstance(item, Prompt)]
    assert [(item.prompt_id, item.gold_answer, item.extra) for item in found] == [
        ("7", "4", {"level": 1}),
        ("8", None, {"level": 2}),
    ]
    assert shard.has_gold_answer and shard.extra_schema.names == ["level"]


@pytest.mark.parametrize(("limit", "rows"), [(None, 2500), (1, 1), (1500, 1500), (9999, 2500)])
def test_a_limit_takes_the_first_rows_over_any_number_of_batches(tmp_path: Path, limit: int | None, rows: int) -> None:
    shard = shard_of(tmp_path, prompt_id=list(range(2500)), prompt=["x"] * 2500)
    assert [item.prompt_id for item in shard.prompts(limit)] == [str(index) for index in range(rows)]


def test_an_empty_file_has_no_prompts(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, prompt_id=pa.array([], pa.string()), prompt=pa.array([], pa.string()))
    assert (shard.num_rows, list(shard.prompts())) == (0, [])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["x"]}, "no column 'prompt_id'; it has prompt"),
        ({"prompt_id": ["a"], "text": ["x"]}, "no column 'prompt'; it has prompt_id, text"),
        ({"prompt_id": ["a"], "prompt": [1]}, "column 'prompt' is int64; allowed: string"),
        ({"prompt_id": [1.5], "prompt": ["x"]}, "column 'prompt_id' is double; allowed: string or integer"),
        (
            {"prompt_id": ["a"], "prompt": ["x"], "messages": ["hello"]},
            r"column 'messages' is string; allowed: list<.*struct<role: string, content: string>> \(or another name\)",
        ),
        (
            {"prompt_id": ["a"], "prompt": ["x"], "messages": [[{"role": "user"}]]},
            "column 'messages' is list<.*role: string>>; allowed: list",
        ),
        (
            {"prompt_id": ["a"], "prompt": ["x"], "system_prompt": [1]},
            "column 'system_prompt' is int64; allowed: string",
        ),
    ],
)
def test_a_file_with_the_wrong_columns_is_refused_by_name(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=f"shard.parquet: {message}"):
        shard_of(tmp_path, **columns)


def turns(*pairs: tuple[str | None, str | None]) -> list[dict[str, str | None]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_conversations_and_system_prompts_are_read_and_carried_through(tmp_path: Path) -> None:
    conversation = turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    columns = {"messages": [conversation, None], "system_prompt": [None, "be brief"]}
    shard = shard_of(tmp_path, prompt_id=["a", "b"], prompt=["c", "d"], **columns)
    first, second = shard.prompts()
    assert isinstance(first, Prompt) and isinstance(second, Prompt)
    assert first.messages == (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    assert (second.messages, first.system_prompt, second.system_prompt) == ((), None, "be brief")
    assert first.extra == {"messages": conversation, "system_prompt": None}
    assert {"messages", "system_prompt"} <= set(shard.extra_schema.names)


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (turns(("user", "a"), ("assistant", "b")), "messages: the last turn is not the user's"),
        (turns(("tool", "a")), "messages[0].role is 'tool'; allowed: system, user, assistant"),
        (turns((None, "a")), "messages[0].role is None; allowed: system, user, assistant"),
        (turns(("user", "")), "messages[0].content is null or empty"),
        (turns(("user", "a"), ("user", None)), "messages[1].content is null or empty"),
        (
            turns(("user", "a"), ("system", "s"), ("user", "b")),
            "messages[1] is a system turn; allowed: as the first one",
        ),
        ([None], "messages[0].role is None"),
    ],
)
def test_a_malformed_conversation_is_a_reject(tmp_path: Path, conversation: Any, reason: str) -> None:
    columns = {"messages": pa.array([conversation, turns(("user", "x"))])}
    shard = shard_of(tmp_path, prompt_id=["a", "b"], prompt=["c", "d"], **columns)
    first, second = shard.prompts()
    assert isinstance(first, Reject) and first.reason.startswith(reason)
    assert isinstance(second, Prompt)


@pytest.mark.parametrize("content", [b"", b"not parquet", None])
def test_a_torn_file_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "torn.parquet"
    pq.write_table(pa.table({"prompt_id": ["a"], "prompt": ["x"]}), path)
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.raises(InvalidInput, match=r"input\.path: .*torn\.parquet is not a readable Parquet file"):
        PromptShard.open(path)


def test_shards_are_a_file_a_folder_or_a_glob_in_name_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.parquet").touch()
    (tmp_path / "other.txt").touch()
    names = [path.stem for path in list_shards(str(tmp_path))]
    assert names == ["a", "b", "c"]
    assert list_shards(str(tmp_path / "b.parquet")) == [tmp_path / "b.parquet"]
    assert [path.stem for path in list_shards(str(tmp_path / "[bc].parquet"))] == ["b", "c"]


@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.parquet", "."])
def test_no_shard_at_all_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidInput, match=r"input\.path: no Parquet file at .*allowed: a file, a folder"):
        list_shards(str(tmp_path / path))


def test_two_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.parquet").touch()
    with pytest.raises(InvalidInput, match="two shards have the name 'a'"):
        list_shards(str(tmp_path / "*" / "*.parquet"))


# --- the manifest ---


@pytest.fixture
def config(tmp_path: Path) -> GenerateConfig:
    write_models(tmp_path / "models")
    pq.write_table(pa.table({"prompt_id": ["a"], "prompt": ["x"]}), tmp_path / "prompts.parquet")
    return make_config(tmp_path)


BOTH = frozenset(Role)


def _print(config: GenerateConfig, roles: frozenset[Role] = BOTH) -> str:
    return fingerprint(fingerprint_fields(config, roles))


CHANGES_ROWS: dict[str, Any] = {
    "seed": 1,
    "seeded": False,
    "samples_per_prompt": 2,
    "policy.threshold": 6.0,
    "policy.name": "random",
    "policy.first_n_base_steps": 1,
    "judge.question": "Other?",
    "judge.reply_opening": "So: ",
    "judge.mass_floor": 0.4,
    "judge.reading": "greedy",
    "budgets.thinking_tokens": 5,
    "budgets.max_step_tokens": 5,
    "budgets.repeated_steps": 2,
    "sampling.draft.temperature": 0.5,
    "sampling.base.top_p": 0.5,
    "sampling.answer.top_k": 5,
    "draft.max_model_len": 300,
    "base.dtype": "float32",
    "base.chat.system_prompt": "Be brief.",
    "draft.vllm_args": {"quantization": "fp8"},
}
CHANGES_NO_ROW: dict[str, Any] = {
    "name": "other",
    "output_dir": "elsewhere",
    "limit": 3,
    "input.shards": [0],
    "schedule.name": "continuous",
    "schedule.active_size": 7,
    "parts.chains": 1,
    "parts.seconds": 1.0,
    "checkpoint.seconds": 1.0,
    "lease.stale_seconds": 99.0,
    "recovery.max_rebuilds": 1,
    "log.seconds": 1.0,
    "draft.in_process": False,
    "base.tensor_parallel_size": 2,
    "base.device_ids": [1],
    "draft.kv_cache_gib": 2,
    "base.gpu_memory_utilization": 0.5,
    "draft.engine_timeout_seconds": 5.0,
}


def _changed(config: GenerateConfig, name: str, value: Any) -> None:
    *path, last = name.split(".")
    target: Any = config
    for step in path:
        target = getattr(target, step)
    assert hasattr(target, last)
    setattr(target, last, value)


@pytest.mark.parametrize("name", sorted(CHANGES_ROWS))
def test_the_fingerprint_changes_with_what_changes_rows(config: GenerateConfig, name: str) -> None:
    before = _print(config)
    _changed(config, name, CHANGES_ROWS[name])
    assert _print(config) != before


@pytest.mark.parametrize("name", sorted(CHANGES_NO_ROW))
def test_the_fingerprint_stays_with_what_cannot_change_rows(config: GenerateConfig, name: str) -> None:
    before = _print(config)
    _changed(config, name, CHANGES_NO_ROW[name])
    assert _print(config) == before


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ],
)
def test_the_fingerprint_changes_with_any_byte_that_makes_the_model(
    config: GenerateConfig, role: Role, file: str
) -> None:
    """generation_config.json names ends of text, at which steps and answers end."""
    before = _print(config)
    path = Path(config.engine(role).model) / file
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))
    assert _print(config) != before


def test_the_fingerprint_stays_when_a_model_is_moved(config: GenerateConfig, tmp_path: Path) -> None:
    before = _print(config)
    (tmp_path / "models").rename(tmp_path / "moved")
    config.draft.model = str(tmp_path / "moved" / "draft")
    config.base.model = str(tmp_path / "moved" / "base")
    assert _print(config) == before


def test_a_model_that_is_not_used_is_not_in_the_fingerprint(config: GenerateConfig) -> None:
    before = _print(config, frozenset({Role.base}))
    config.draft.model = "nowhere"
    assert _print(config, frozenset({Role.base})) == before


@pytest.mark.parametrize("size", [1, 1000, 1 << 16, (1 << 20) - 7, 5 << 20])
@pytest.mark.parametrize("place", [0.0, 1.0])
def test_a_files_identity_tells_its_first_and_last_byte(tmp_path: Path, size: int, place: float) -> None:
    path = tmp_path / "file"
    content = bytearray(size)
    path.write_bytes(bytes(content))
    before = file_identity(path)
    content[round(place * (size - 1))] = 1
    path.write_bytes(bytes(content))
    assert file_identity(path) != before
    path.write_bytes(bytes(size + 1))
    assert file_identity(path) != before


def test_a_small_file_is_read_whole_for_its_identity(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 1 << 20
    seen = set()
    for place in range(0, size, 50_021):
        content = bytearray(size)
        content[place] = 1
        path.write_bytes(bytes(content))
        seen.add(file_identity(path))
    assert len(seen) == len(range(0, size, 50_021))


def test_an_output_folder_is_claimed_once_and_again_by_the_same_configuration(config: GenerateConfig) -> None:
    output = Path(config.output_dir)
    fields = fingerprint_fields(config, BOTH)
    first = claim_output(output, fields, config)
    written = (output / "run.json").read_bytes()
    assert claim_output(output, fields, config) == first == read_manifest(output)["fingerprint"]
    assert (output / "run.json").read_bytes() == written
    assert _files(output) == ["run.json"]


def test_another_configuration_is_refused_naming_each_field_that_differs(config: GenerateConfig) -> None:
    output = Path(config.output_dir)
    claim_output(output, fingerprint_fields(config, BOTH), config)
    config.policy.threshold, config.judge.question, config.schedule.active_size = 6.5, "Other?", 9
    weights = Path(config.draft.model) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(InvalidInput) as raised:
        claim_output(output, fingerprint_fields(config, BOTH), config)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith(f"output_dir: {output} holds the output of another configuration")
    names = [line.split(":")[0].strip() for line in lines[1:]]
    assert names == ["draft.model.model.safetensors", "judge.question", "policy.threshold"]
    assert any("7.0 there, 6.5 now" in line for line in lines)


def test_a_torn_manifest_is_refused(config: GenerateConfig) -> None:
    output = Path(config.output_dir)
    claim_output(output, fingerprint_fields(config, BOTH), config)
    path = output / "run.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(InvalidInput, match=r"run\.json: no readable run manifest"):
        claim_output(output, fingerprint_fields(config, BOTH), config)


def test_the_manifest_says_what_ran(config: GenerateConfig) -> None:
    plan = make_plan(config)
    manifest = json.loads((Path(config.output_dir) / "run.json").read_text())
    assert manifest["fingerprint"] == plan.fingerprint
    assert manifest["config"]["policy"]["threshold"] == 7.0
    assert manifest["schema_version"] == SCHEMA_VERSION
    assert {"specreason_batch", "python", "transformers"} <= set(manifest["versions"])
    assert set(manifest["hardware"]) >= {"machine", "cpu_count"}
