"""What users bring becomes shards that generate reads; what can't be used is refused by name, or left out by row."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jobs.prepare import to_config
from specreason_batch.prepare import ColumnsConfig, PrepareConfig, prepare
from specreason_batch.prepare.choices import as_lines, read_question
from specreason_batch.prepare.config import GoldIs
from specreason_batch.prepare.faults import Kind, RowFault
from specreason_batch.prepare.templates import READY, load_template
from specreason_batch.store.prompts import PromptShard, Reject, list_shards
from specreason_batch.store.row_files import even_sizes
from specreason_batch.store.schemas import REJECTS
from specreason_batch.types import InvalidInput, Prompt

ROOT = Path(__file__).parent.parent
MATH = Path(__file__).parent / "data" / "math500-excerpt.parquet"
Row = dict[str, Any]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[Row], schema: pa.Schema | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def run(source: Path | str, output: Path, columns: Row | None = None, **choices: Any) -> str:
    """Prepare; what was printed."""
    console = Console(file=StringIO(), width=200)
    config = PrepareConfig(input=str(source), output=str(output), columns=ColumnsConfig(**(columns or {})), **choices)
    prepare(config, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def shards(output: Path) -> list[list[Row]]:
    return [pq.read_table(path).to_pylist() for path in sorted(output.glob("*.parquet"))]


def kept(output: Path) -> list[Row]:
    return [row for shard in shards(output) for row in shard]


def held_out(output: Path) -> list[Row]:
    path = output / "holdout" / "holdout.parquet"
    return pq.read_table(path).to_pylist() if path.exists() else []


def rejects(output: Path) -> list[Row]:
    path = output / "rejects" / "rejects.parquet"
    return pq.read_table(path).to_pylist() if path.exists() else []


def questions(number: int) -> list[Row]:
    return [{"id": f"q{n}", "question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(number)]


def refused(source: Path | str, output: Path, columns: Row | None = None, **choices: Any) -> str:
    """The message; nothing was written."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(InvalidInput) as error:
        run(source, output, columns, **choices)
    assert sorted(output.parent.rglob("*")) == before, "it left something behind"
    return str(error.value)


# --- what comes out ---


def test_math500_goes_through_as_it_is(tmp_path: Path) -> None:
    said = run(MATH, tmp_path / "prompts")
    assert "problem -> prompt, unique_id -> prompt_id, answer -> gold_answer" in said
    assert "20 rows of 1 file(s): 20 kept, none left out" in said
    [shard] = list_shards(str(tmp_path / "prompts"))
    prompts = list(PromptShard.open(shard).prompts())
    given = pq.read_table(MATH).to_pylist()
    assert [(p.prompt_id, p.prompt, p.gold_answer, p.extra["level"]) for p in prompts if isinstance(p, Prompt)] == [
        (row["unique_id"], row["problem"], row["answer"], row["level"]) for row in given
    ]


def test_a_template_asks_and_the_bare_problem_is_kept_beside(tmp_path: Path) -> None:
    said = run(MATH, tmp_path / "prompts", template="math")
    first = kept(tmp_path / "prompts")[0]
    assert first["prompt"].startswith(first["problem"]) and first["prompt"].endswith("inside \\boxed{}.")
    assert first["prompt"] in said, "the first prompt is shown"


@settings(max_examples=100)
@given(st.integers(1, 10_000), st.integers(1, 300))
def test_sizes_of_shards_differ_by_at_most_one(num_rows: int, num_shards: int) -> None:
    sizes = even_sizes(num_rows, num_shards)
    assert sum(sizes) == num_rows and len(sizes) == num_shards and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("choices", "sizes"), [({"num_shards": 7}, 7), ({"shard_rows": 450}, 6), ({}, 3)])
def test_shards_are_as_many_as_was_said_and_hold_the_rows_in_order(tmp_path: Path, choices: Row, sizes: int) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", questions(2500))
    run(source, tmp_path / "prompts", **choices)
    found = shards(tmp_path / "prompts")
    assert len(found) == sizes
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert [row["prompt_id"] for shard in found for row in shard] == [f"q{n}" for n in range(2500)]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [*questions(300), *questions(3)])
    for name in ("a", "b"):
        run(source, tmp_path / name, holdout=20, num_shards=3, template="math")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_a_folder_and_a_glob_mix_parquet_jsonl_and_gzip(tmp_path: Path) -> None:
    rows = [{**row, "answer": str(row["answer"])} for row in questions(9)]
    write_parquet(tmp_path / "in" / "a.parquet", rows[:3])
    write_jsonl(tmp_path / "in" / "b.jsonl", rows[3:6])
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(
        gzip.compress(b"\n".join(json.dumps(row).encode() for row in rows[6:]))
    )
    (tmp_path / "in" / "notes.md").write_text("not read")
    run(tmp_path / "in", tmp_path / "folder")
    assert [row["prompt_id"] for row in kept(tmp_path / "folder")] == [f"q{n}" for n in range(9)]
    run(f"{tmp_path}/**/[ab].*", tmp_path / "glob")
    assert [row["prompt_id"] for row in kept(tmp_path / "glob")] == [f"q{n}" for n in range(6)]


def test_generate_reads_conversations_choices_and_other_columns(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "?"},
        {"role": "user", "content": "2+2"},
    ]
    source = write_jsonl(tmp_path / "in.jsonl", [{"messages": turns, "system_prompt": "Be brief.", "tags": ["a"]}])
    run(source, tmp_path / "prompts")
    [row] = kept(tmp_path / "prompts")
    assert row["messages"] == turns and row["prompt"] == "2+2" and row["system_prompt"] == "Be brief."
    schema = pq.read_schema(tmp_path / "prompts" / "shard-00000.parquet")
    assert schema.field("messages").type == pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    shard = PromptShard.open(tmp_path / "prompts" / "shard-00000.parquet")
    assert not [item for item in shard.prompts() if isinstance(item, Reject)]


def test_a_template_makes_the_last_turn_of_a_conversation(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2"}]
    source = write_jsonl(tmp_path / "in.jsonl", [{"messages": turns}])
    run(source, tmp_path / "prompts", template="Please: {{ prompt }}!")
    [row] = kept(tmp_path / "prompts")
    assert row["prompt"] == row["messages"][-1]["content"] == "Please: 2+2!" and row["messages"][0] == turns[0]


def test_a_column_with_the_name_of_another_is_carried_under_a_new_one(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "short", "long": "the long one"}])
    run(source, tmp_path / "prompts", {"prompt": "long"})
    [row] = kept(tmp_path / "prompts")
    assert row["prompt"] == "the long one" and row["original_prompt"] == "short"


def test_json_values_of_several_types_are_carried_as_json_text(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "x": 1, "y": {}}, {"prompt": "b", "x": "1"}, {"prompt": "c", "y": {"z": 2}, "new": 1.5}]
    said = run(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "prompts")
    assert "x (as JSON text)" in said
    assert [row["x"] for row in kept(tmp_path / "prompts")] == ["1", '"1"', None]
    assert [row["new"] for row in kept(tmp_path / "prompts")] == [None, None, 1.5]


# --- ids and duplicates ---


def test_ids_made_from_the_content_hold_whatever_file_or_form_it_comes_in(tmp_path: Path) -> None:
    rows = [{"prompt": "b", "x": 1}, {"prompt": "a", "x": 2}]
    run(write_jsonl(tmp_path / "one.jsonl", rows), tmp_path / "one")
    run(write_parquet(tmp_path / "two.parquet", rows[::-1]), tmp_path / "two", template="math")
    ids = [{row["x"]: row["prompt_id"] for row in kept(tmp_path / name)} for name in ("one", "two")]
    assert ids[0] == ids[1] and len(set(ids[0].values())) == 2


def test_duplicates_by_id_and_by_text_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}, {"id": 2, "prompt": "a"}, {"id": None, "prompt": "c"}]
    said = run(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "prompts")
    assert "1 prompt_id was used by an earlier row" in said and "1 same text as an earlier row" in said
    assert "ids: 1 made from the content" in said
    assert [row["prompt"] for row in kept(tmp_path / "prompts")] == ["a", "c"]
    assert [(row["prompt_id"], row["row"], row["reason"]) for row in rejects(tmp_path / "prompts")] == [
        ("1", 1, Kind.same_id),
        ("2", 2, Kind.same_text),
    ]


def test_the_same_question_in_another_context_is_another_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "context": "rain"}, {"prompt": "Why?", "context": "snow"}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    run(source, tmp_path / "a", template="{{ context }}: {{ prompt }}")
    run(source, tmp_path / "b")
    assert [row["prompt"] for row in kept(tmp_path / "a")] == ["rain: Why?", "snow: Why?"]
    assert len(kept(tmp_path / "b")) == 1


# --- rows that are left out ---

USER = {"role": "user", "content": "Why?"}
BAD_ROWS: list[tuple[Row, Kind]] = [
    ({"prompt": None}, Kind.no_prompt),
    ({}, Kind.no_prompt),
    ({"prompt": " \n"}, Kind.no_prompt),
    ({"prompt": 7}, Kind.not_text),
    ({"prompt": ["a"]}, Kind.not_text),
    ({"prompt": "half \ud800"}, Kind.not_text),
    ({"prompt": "a", "prompt_id": 1.5}, Kind.bad_id),
    ({"prompt": "a", "prompt_id": True}, Kind.bad_id),
    ({"prompt": "a", "gold_answer": {"x": 1}}, Kind.bad_gold),
    ({"prompt": "a", "system_prompt": 1}, Kind.bad_system_prompt),
]
BAD_MESSAGES: list[Any] = [
    *(None, [], "Why?", [None], [{"role": "user"}], [{"role": "user", "content": ""}], [{"content": "Why?"}]),
    *([{"role": "tool", "content": "x"}], [{**USER, "name": "me"}], [{"role": "system", "content": "x"}]),
    *([USER, USER], [{"role": "assistant", "content": "x"}, USER], [USER, {"role": "assistant", "content": "x"}]),
    [USER, {"role": "assistant", "content": "x"}, {"role": "system", "content": "x"}],
    [{"role": ["user"], "content": "x"}],
]


@pytest.mark.parametrize(("row", "kind"), BAD_ROWS)
def test_a_bad_row_is_left_out_with_its_place_and_reason_and_the_run_goes_on(
    tmp_path: Path, row: Row, kind: Kind
) -> None:
    columns = dict.fromkeys(("prompt", "prompt_id", "gold_answer", "system_prompt"), None)
    good = {**columns, "prompt": "fine", "prompt_id": "g"}
    run(write_jsonl(tmp_path / "in.jsonl", [good, row, {**good, "prompt": "more", "prompt_id": "h"}]), tmp_path / "out")
    assert [item["prompt"] for item in kept(tmp_path / "out")] == ["fine", "more"]
    [left] = rejects(tmp_path / "out")
    assert (left["file"], left["row"], left["sample_index"]) == ("in.jsonl", 1, None)
    assert left["reason"].startswith(kind)
    assert pq.read_schema(tmp_path / "out" / "rejects" / "rejects.parquet").equals(REJECTS)


@pytest.mark.parametrize("messages", BAD_MESSAGES)
def test_malformed_messages_are_left_out(tmp_path: Path, messages: Any) -> None:
    run(write_jsonl(tmp_path / "in.jsonl", [{"messages": [USER]}, {"messages": messages}]), tmp_path / "out")
    [left] = rejects(tmp_path / "out")
    assert left["row"] == 1 and left["reason"].startswith(Kind.bad_messages)


def test_a_row_that_its_template_cannot_take_is_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 0}, {"prompt": "c", "n": None}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    run(source, tmp_path / "out", template="{{ prompt }} {{ 1 // n }}")
    assert [(row["row"], row["reason"]) for row in rejects(tmp_path / "out")] == [
        (1, f"{Kind.template_failed}: ZeroDivisionError: integer division or modulo by zero"),
        (2, f"{Kind.template_failed}: n is null"),
    ]


def test_a_prompt_is_never_read_as_a_template(tmp_path: Path) -> None:
    text = "{{ prompt }} {% for %} \\boxed{{}} {#"
    run(write_jsonl(tmp_path / "in.jsonl", [{"prompt": text}]), tmp_path / "out", template="[{{ prompt }}]")
    assert kept(tmp_path / "out")[0]["prompt"] == f"[{text}]"


values = st.one_of(st.none(), st.text(max_size=3), st.integers(0, 3), st.booleans(), st.just("a"), st.just("b"))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.fixed_dictionaries({"prompt": values, "id": values, "answer": values, "x": values}), max_size=30),
    holdout=st.sampled_from([0, 1, 0.3]),
)
def test_every_row_is_in_a_shard_or_the_holdout_or_the_rejects_just_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], holdout: float
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    anchors = [{"prompt": f"anchor {n}", "id": f"anchor {n}", "position": n} for n in range(60)]
    given_rows = [*anchors, *({**row, "position": 60 + place} for place, row in enumerate(rows))]
    run(write_jsonl(folder / "in.jsonl", given_rows), folder / "out", holdout=holdout, num_shards=3)
    used = [row["position"] for row in [*kept(folder / "out"), *held_out(folder / "out")]]
    left_out = [row["row"] for row in rejects(folder / "out")]
    assert sorted(used + left_out) == list(range(len(given_rows)))
    for path in [*list_shards(str(folder / "out")), *(folder / "out").glob("holdout/*")]:
        assert not [item for item in PromptShard.open(path).prompts() if isinstance(item, Reject)]


# --- multiple choice ---


@settings(max_examples=200)
@given(
    texts=st.lists(st.text("abcdefg", min_size=2), min_size=2, max_size=10, unique=True),
    gold=st.integers(0, 9),
    form=st.sampled_from(GoldIs),
    prompt_id=st.text(),
    seed=st.integers(0, 9),
)
def test_the_gold_letter_follows_its_choice(
    texts: list[str], gold: int, form: GoldIs, prompt_id: str, seed: int
) -> None:
    gold %= len(texts)
    said: Any = {
        GoldIs.letter: "ABCDEFGHIJ"[gold],
        GoldIs.number: gold,
        GoldIs.number_from_1: gold + 1,
        GoldIs.text: texts[gold],
    }[form]
    question = read_question(texts, said, form if form is GoldIs.number_from_1 else None)
    shown, letter = question.shown(prompt_id, seed)
    assert shown["ABCDEFGHIJ".index(letter)] == texts[gold] and sorted(shown) == sorted(texts)
    assert question.shown(prompt_id, seed) == (shown, letter), "a stable order"
    assert question.shown(prompt_id, None) == (texts, "ABCDEFGHIJ"[gold])


@pytest.mark.parametrize(
    ("choices", "gold", "right"),
    [
        (["x", "y", "z"], "b", "y"),
        (["x", "y", "z"], "(C)", "z"),
        (["x", "y", "z"], "2", "z"),
        (["x", "y", "z"], 2.0, "z"),
        (["3", "4", "5"], "4", "4"),
        ({"A": "x", "B": "y", "C": None}, "B", "y"),
        ({"A": "x", "B": None, "C": "z"}, "C", "z"),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "1", "x"),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "y", "y"),
    ],
)
def test_a_gold_answer_is_understood_as_letter_number_or_text(choices: Any, gold: Any, right: str) -> None:
    assert read_question(choices, gold, None).right.text == right


@pytest.mark.parametrize(
    ("choices", "gold", "kind"),
    [
        (["x", "y"], None, Kind.no_gold),
        (["x", "y"], "C", Kind.no_gold),
        (["x", "y"], True, Kind.no_gold),
        (["x", "y"], 2, Kind.no_gold),
        (["x", "x"], "x", Kind.no_gold),
        (["B", "A"], "A", Kind.no_gold),
        (["x"], "A", Kind.bad_choices),
        ([str(n) for n in range(27)], "A", Kind.bad_choices),
        (["x", None], "A", Kind.bad_choices),
        (["x", 1], "A", Kind.bad_choices),
        ("x", "A", Kind.bad_choices),
        (None, "A", Kind.bad_choices),
        ({"text": ["x"], "label": ["A", "B"]}, "A", Kind.bad_choices),
    ],
)
def test_a_question_without_one_clear_right_choice_is_left_out(choices: Any, gold: Any, kind: Kind) -> None:
    with pytest.raises(RowFault) as fault:
        read_question(choices, gold, None)
    assert fault.value.kind is kind


def choice_rows(number: int) -> list[Row]:
    return [
        {"question": f"Which is {n}?", "choices": [f"{n} {c}" for c in "wxyz"], "answer": n % 4} for n in range(number)
    ]


def test_choices_are_shown_in_each_questions_own_order(tmp_path: Path) -> None:
    rows = choice_rows(40)
    said = run(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out")
    assert "template: multiple_choice" in said
    for given_row, row in zip(rows, kept(tmp_path / "out"), strict=True):
        right = row["choices"]["ABCD".index(row["gold_answer"])]
        assert right == given_row["choices"][given_row["answer"]]
        assert as_lines(row["choices"]) in row["prompt"] and row["prompt"].startswith(given_row["question"])
    assert len({row["gold_answer"] for row in kept(tmp_path / "out")}) == 4
    run(tmp_path / "in.jsonl", tmp_path / "kept", shuffle_choices=False)
    assert [row["choices"] for row in kept(tmp_path / "kept")] == [row["choices"] for row in rows]


def test_choices_may_be_a_column_each_and_the_right_one_among_them(tmp_path: Path) -> None:
    rows = [{"Question": "2+2", "Right": "four", "W1": "five", "W2": "six", "Note": "easy"}]
    columns = {"prompt": "Question", "choices": ["Right", "W1", "W2"], "gold_answer": "Right"}
    run(write_parquet(tmp_path / "in.parquet", rows), tmp_path / "out", columns)
    [row] = kept(tmp_path / "out")
    assert row["choices"]["ABC".index(row["gold_answer"])] == "four" and row["Note"] == "easy"


def test_a_struct_of_choices_comes_through_parquet(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "options": {"A": "x", "B": "y", "C": None}, "answer": "B"},
        {"question": "b", "options": {"A": "x", "B": "y", "C": "z"}, "answer": "D"},
    ]
    run(write_parquet(tmp_path / "in.parquet", rows), tmp_path / "out", shuffle_choices=False)
    assert [(row["choices"], row["gold_answer"]) for row in kept(tmp_path / "out")] == [(["x", "y"], "B")]
    assert rejects(tmp_path / "out")[0]["reason"] == "no gold letter: 'D' names none of the 3 choices"


# --- holdout ---


@pytest.mark.parametrize("holdout", [200, 0.2])
def test_the_holdout_is_apart_and_not_read_with_the_shards(tmp_path: Path, holdout: float) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", questions(1000))
    run(source, tmp_path / "out", holdout=holdout, num_shards=4)
    aside = {row["prompt_id"] for row in held_out(tmp_path / "out")}
    used = {row["prompt_id"] for row in kept(tmp_path / "out")}
    assert not aside & used and len(aside | used) == 1000
    assert len(aside) == 200 if holdout == 200 else 150 < len(aside) < 250
    assert [path.stem for path in list_shards(str(tmp_path / "out"))] == [f"shard-{n:05d}" for n in range(4)]


def test_who_is_held_out_by_a_share_does_not_depend_on_the_other_rows(tmp_path: Path) -> None:
    for name, rows in (("half", questions(500)), ("all", questions(1000)[::-1])):
        run(write_jsonl(tmp_path / f"{name}.jsonl", rows), tmp_path / name, holdout=0.1)
    half, all = ({row["prompt_id"] for row in held_out(tmp_path / name)} for name in ("half", "all"))
    assert half < all and half


# --- refused before anything is written ---


def torn(path: Path) -> Path:
    whole = write_parquet(path, [{"prompt": "a" * 100} for _ in range(100)]).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def text_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


REFUSED: list[tuple[Callable[[Path], Any], Row, str]] = [
    (lambda at: at / "nothing", {}, "input: no file at"),
    (lambda at: text_file(at / "a.csv", "x"), {}, "of no known kind; allowed: .parquet, .jsonl"),
    (lambda at: text_file(at / "a.parquet", ""), {}, "a.parquet is not a readable Parquet file"),
    (lambda at: torn(at / "a.parquet"), {}, "a.parquet is not a readable Parquet file"),
    (lambda at: write_parquet(at / "a.parquet", [], pa.schema([("prompt", pa.string())])), {}, "no row can be used"),
    (lambda at: text_file(at / "a.jsonl", ""), {}, "has no rows"),
    (lambda at: text_file(at / "a.jsonl", '{"prompt": "a"}\n\n{"prompt":\n'), {}, "a.jsonl, line 3: not JSON"),
    (lambda at: text_file(at / "a.jsonl", '{"prompt": "a"}\n[1]\n'), {}, "a.jsonl, line 2: not a JSON object"),
    (lambda at: text_file(at / "a.jsonl", "[" * 100_000), {}, "a.jsonl, line 1: not JSON"),
    (lambda at: text_file(at / "a.jsonl.gz", "plain"), {}, "a.jsonl.gz cannot be read after line 1"),
    (lambda at: write_jsonl(at / "a.jsonl", [{"text": "a"}]), {}, "columns.prompt: none of prompt, problem, question"),
    (
        lambda at: write_jsonl(at / "a.jsonl", [{"text": "a"}]),
        {"columns": {"prompt": "txt"}},
        "columns.prompt: no column 'txt'; the input has text",
    ),
    (
        lambda at: write_jsonl(at / "a.jsonl", [{"prompt": "a", "messages": []}]),
        {},
        "allowed: columns.prompt=prompt or columns.messages=messages",
    ),
    (lambda at: write_parquet(at / "a.parquet", [{"prompt": 1}]), {}, "column 'prompt' is int64; allowed for prompt"),
    (
        lambda at: write_parquet(at / "a.parquet", [{"prompt": "a", "id": 1.5}]),
        {},
        "column 'id' is double; allowed for prompt_id: string or integer",
    ),
    (
        lambda at: write_parquet(at / "a.parquet", [{"messages": "Why?"}]),
        {},
        "column 'messages' is string; allowed for messages: list<struct<role",
    ),
    (
        lambda at: write_jsonl(at / "a.jsonl", [{"prompt": "a", "choices": ["x", "y"]}]),
        {},
        "columns.gold_answer: not set",
    ),
    (lambda at: write_jsonl(at / "a.jsonl", [{"prompt": " "}]), {}, "no row can be used: 1 x prompt is null or empty"),
    (lambda at: MATH, {"template": "maths"}, "template: 'maths' is unknown; allowed: plain, math, multiple_choice"),
    (lambda at: MATH, {"template": "{{ promt }}"}, "uses promt, which the input has not; allowed: answer, level"),
    (lambda at: MATH, {"template": "{{ prompt"}, "template: 'own text', line 1"),
    (lambda at: MATH, {"template": "{{ 1 }}"}, "uses no field"),
    (lambda at: MATH, {"template": "{{ choices }}"}, "uses choices, which the input has not"),
    (lambda at: MATH, {"template": "nowhere/own.jinja"}, "own.jinja cannot be read"),
    (lambda at: MATH, {"num_shards": 21}, "num_shards: 21 is out of range; allowed: at most the 20 prompts kept"),
    (lambda at: MATH, {"num_shards": 0}, "num_shards: 0 is out of range; allowed: at least 1"),
    (lambda at: MATH, {"holdout": 20}, "holdout: 20 leaves nothing of the 20 prompts"),
    (lambda at: MATH, {"holdout": 1.5}, "holdout: 1.5 is out of range"),
    (lambda at: MATH, {"holdout": float("nan")}, "holdout: nan is out of range"),
    (lambda at: MATH, {"columns": {"choices": 3}}, "columns.choices: 3; allowed: a column's name"),
    (lambda at: MATH, {"columns": {"prompt": "a", "messages": "b"}}, "columns.prompt: 'a' beside columns.messages='b'"),
    (lambda at: MATH, {"columns": {"prompt": "a", "prompt_id": "a"}}, "columns: 'a' is given twice"),
]


@pytest.mark.parametrize(("source", "choices", "message"), REFUSED, ids=[item[2][:40] for item in REFUSED])
def test_what_cannot_be_used_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, source: Callable[[Path], Any], choices: Row, message: str
) -> None:
    assert message in refused(source(tmp_path), tmp_path / "out", **choices)


def test_a_file_that_is_torn_further_on_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": f"{n}" * 50} for n in range(30_000)])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    assert "a.parquet" in refused(path, tmp_path / "out")
    with pytest.raises(InvalidInput, match="no row can be used"):
        run(write_jsonl(tmp_path / "a.jsonl", [{"prompt": ""}]), tmp_path / "new" / "folder" / "out")
    assert not (tmp_path / "new").exists()


def test_text_that_is_not_utf8_is_refused_in_any_column(tmp_path: Path) -> None:
    for column in ("prompt", "note"):
        table = pa.table({"prompt": ["a", "b"], "note": ["c", "d"]})
        bad = pa.array([b"fine", b"\xff\xfe"]).view(pa.string())
        table = table.set_column(table.schema.get_field_index(column), column, bad)
        pq.write_table(table, tmp_path / "a.parquet")
        assert "a.parquet, after row 0" in refused(tmp_path / "a.parquet", tmp_path / "out")
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "\ud800": 1}])
    assert "has a column '\\ud800', which is not text" in refused(source, tmp_path / "out")


def test_files_that_disagree_are_refused_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", [{"prompt": "a", "x": 1}])
    write_parquet(tmp_path / "in" / "b.parquet", [{"prompt": "b", "x": "1"}])
    assert "column 'x' is int64 in" in refused(tmp_path / "in", tmp_path / "out")
    write_parquet(tmp_path / "in" / "b.parquet", [{"problem": "b"}])
    assert "b.parquet: no column 'prompt' (prompt), which other files have" in refused(
        tmp_path / "in", tmp_path / "out"
    )


# --- the output folder ---


def test_preparing_again_changes_nothing_and_other_content_is_refused(tmp_path: Path) -> None:
    run(MATH, tmp_path / "out", num_shards=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert "already prepared" in run(MATH, tmp_path / "out", num_shards=2, log_seconds=3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert "(choices.num_shards: 2, now 3)" in refused(MATH, tmp_path / "out", num_shards=3)
    (tmp_path / "out" / "shard-00001.parquet").unlink()
    assert "shard-00001.parquet is not as it was written" in refused(MATH, tmp_path / "out", num_shards=2)


def test_a_folder_with_anything_else_is_refused_and_an_empty_one_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "holds 'thesis.tex' already" in refused(MATH, tmp_path / "out")
    assert "is a file" in refused(MATH, tmp_path / "out" / "thesis.tex")
    (tmp_path / "out" / "thesis.tex").unlink()
    run(MATH, tmp_path / "out")
    assert len(kept(tmp_path / "out")) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_preparation_left_is_named_and_left_alone(tmp_path: Path) -> None:
    left = tmp_path / ".out.preparing-node-7"
    left.mkdir()
    said = run(MATH, tmp_path / "out")
    assert f"{left} is of a preparation that was killed" in said and left.is_dir()


def test_a_long_preparation_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seconds = count(step=60)
    monkeypatch.setattr("specreason_batch.prepare.telling.time.monotonic", lambda: float(next(seconds)))
    said = run(write_jsonl(tmp_path / "in.jsonl", questions(3000)), tmp_path / "out")
    assert "checking in.jsonl: 1024 rows" in said and "2048 of 3000 rows, 2048 kept" in said


# --- templates and the command ---


def test_ready_templates_compile_and_use_their_fields() -> None:
    assert {name: load_template(name).fields for name in READY} == {
        "plain": {"prompt"},
        "math": {"prompt"},
        "multiple_choice": {"prompt", "choices"},
    }


def test_a_template_may_come_from_a_file(tmp_path: Path) -> None:
    text_file(tmp_path / "own.jinja", "Level {{ level }}: {{ prompt }}\n")
    run(MATH, tmp_path / "out", template=str(tmp_path / "own.jinja"))
    assert (
        kept(tmp_path / "out")[0]["prompt"].startswith("Level 2: Convert")
        and kept(tmp_path / "out")[0]["prompt"][-1] == "$"
    )


@pytest.fixture
def _conf() -> Iterator[None]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


@pytest.mark.usefixtures("_conf")
def test_the_command_line_is_typed() -> None:
    words = ["input=a", "output=b", "columns.choices=[A,B]", "gold_answer_is=number_from_1", "holdout=0.1"]
    config = to_config(compose("prepare", words))
    assert config.columns.choices == ["A", "B"] and config.gold_answer_is is GoldIs.number_from_1
    with pytest.raises(InvalidInput, match=r"input: not set; it needs a value\noutput: not set"):
        to_config(compose("prepare", []))
    with pytest.raises(InvalidInput, match=r"columns\.promt: no such field"):
        to_config(compose("prepare", [*words, "+columns.promt=x"]))


def test_the_job_ends_with_a_message_and_a_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.prepare", f"input={MATH}", f"output={tmp_path}/out"]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 shard(s) of 20 prompts, 0 held out" in done.stdout and not done.stderr
    command.append("columns.prompt=text")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: output: ")
    assert len(done.stderr.splitlines()) == 1
