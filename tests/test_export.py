"""Runs become data sets that datasets and polars open as they are; what is left out is counted, by name."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jobs.export import to_config
from jobs.launch import ExitStatus
from specreason_batch.config import ChatConfig
from specreason_batch.export import (
    DecontaminateConfig,
    ExportConfig,
    NearDuplicatesConfig,
    SelectConfig,
    export,
)
from specreason_batch.export.config import Answers, Best, Format, TokensBy
from specreason_batch.export.evaluation import COMMON, EvaluationPrompts
from specreason_batch.export.filters import Filter
from specreason_batch.export.groups import MARKS, Marks, remove_beyond, split
from specreason_batch.export.measures import foreign_share, num_repeated, repeated_share, words
from specreason_batch.export.output import REMOVED
from specreason_batch.schedules import Stopped
from specreason_batch.store.attempts import AttemptState, LeaseHeld
from specreason_batch.types import AnswerEnd, InvalidInput, Role, ThinkingEnd
from tests.support.finished import TOY, Finished, Told, draft_only, write_run

ROOT = Path(__file__).parent.parent
MATH = ROOT / "tests" / "data" / "math500-excerpt.parquet"
DRAFT = str(TOY / "draft")
Row = dict[str, Any]


def simple(number: int, sample_index: int = 0, **changes: Any) -> Finished:
    """A chain of three steps: a kept draft, a rewrite of a rejected one, a step of the base's own."""
    steps = [
        Told(text=f"First {number}, sample {sample_index}.\n\n", score=8.5),
        Told(text=f"Then {number + 1}.\n\n", rejected=f"Then {number + 2}.\n\n", score=1.5),
        Told(text="So it ends.\n", author=Role.base),
    ]
    given = {"prompt_id": f"p{number}", "prompt": f"What comes after {number}?", "steps": steps}
    return Finished(**{**given, "sample_index": sample_index, **changes})


def run_of(folder: Path, chains: Sequence[Finished], **options: Any) -> str:
    return str(write_run(folder, chains, **options))


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """20 prompts in 3 shards, two samples each, parts of four."""
    chains = [simple(number, sample) for number in range(20) for sample in range(2)]
    return run_of(tmp_path_factory.mktemp("twenty") / "run", chains, num_shards=3, part_chains=4)


def run(runs: str | list[str], output: Path, format: str = "sft_messages", **choices: Any) -> str:
    """Export; what was printed."""
    console = Console(file=StringIO(), width=200)
    given = [runs] if isinstance(runs, str) else runs
    tokenizer = DRAFT if format in ("text", "step_preferences") else None
    defaults = {"tokenizer": tokenizer, "validation": 0.0}
    export(ExportConfig(runs=given, output=str(output), format=Format(format), **{**defaults, **choices}), console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def refused(runs: str | list[str], output: Path, format: str = "sft_messages", **choices: Any) -> str:
    """The message; nothing was written."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(InvalidInput) as error:
        run(runs, output, format, **choices)
    assert sorted(output.parent.rglob("*")) == before, "it left something behind"
    return str(error.value)


def rows(output: Path, name: str = "train") -> list[Row]:
    files = sorted((output / "data").glob(f"{name}-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def keys(output: Path, name: str = "train") -> list[tuple[str, int]]:
    return [(row["prompt_id"], row["sample_index"]) for row in rows(output, name)]


def removed(output: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((output / "export.json").read_text())["counts"]["removed"]
    return found


# --- what comes out ---


def test_datasets_and_polars_open_the_folder_as_it_is(
    twenty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    output = tmp_path / "dataset"
    run(twenty, output, validation=0.3, rows_per_file=7, aside=True)
    cache = str(tmp_path / "cache")
    by_card = datasets.load_dataset(str(output), cache_dir=cache)
    by_files = datasets.load_dataset("parquet", data_dir=str(output / "data"), cache_dir=cache)
    frames = {name: pl.read_parquet(output / "data" / f"{name}-*.parquet") for name in ("train", "validation")}
    assert {name: len(part) for name, part in by_card.items()} == {name: len(rows(output, name)) for name in frames}
    for name, frame in frames.items():
        assert by_card[name].to_list() == by_files[name].to_list() == frame.to_dicts() == rows(output, name)
    assert sum(frame.height for frame in frames.values()) == 40


def test_files_are_even_and_say_how_many_they_are(twenty: str, tmp_path: Path) -> None:
    run(twenty, tmp_path / "dataset", rows_per_file=15)
    files = sorted((tmp_path / "dataset" / "data").iterdir())
    assert [file.name for file in files] == [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    assert sorted(pq.read_metadata(file).num_rows for file in files) == [13, 13, 14]


def test_the_same_runs_and_choices_give_the_same_bytes(twenty: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        select = SelectConfig(per_prompt=1, best=Best.highest_grade)
        run(twenty, tmp_path / name, "step_preferences", validation=0.2, aside=True, name="one", select=select)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_the_card_tells_what_it_is_and_what_was_left_out(twenty: str, tmp_path: Path) -> None:
    run(twenty, tmp_path / "d", validation=0.3, license="mit", name="Twenty: a test", select=SelectConfig(per_prompt=1))
    text = (tmp_path / "d" / "README.md").read_text()
    card = yaml.safe_load(text.split("---\n")[1])
    paths = [entry["path"] for entry in card["configs"][0]["data_files"]]
    assert card["license"] == "mit" and card["pretty_name"] == "Twenty: a test"
    assert card["size_categories"] == ["n<1K"] and paths == ["data/train-*.parquet", "data/validation-*.parquet"]
    assert "| per_prompt | 20 |" in text and "40 chains were read, 20 are kept" in text
    manifest = json.loads((Path(twenty) / "run.json").read_text())
    assert manifest["fingerprint"] in text and "threshold 7" in text and f"{TOY}/base" in text
    assert manifest["fingerprint_fields"]["base.model.model.safetensors"] in text
    assert "| 8 to 15 |" not in text and "| 0 to 31 | 20 | █" in text


def test_the_card_names_the_licences_of_the_prompts(tmp_path: Path) -> None:
    chains = [simple(n, columns={"input_license": "mit" if n < 2 else "cc0-1.0"}) for n in range(3)]
    for name, some, expected in (("two", chains, None), ("one", chains[:2], "mit")):
        source = run_of(tmp_path / f"run-{name}", some, extra=[("license", pa.string())])
        run(source, tmp_path / name)
        text = (tmp_path / name / "README.md").read_text()
        assert "| mit | 2 |" in text and ("| cc0-1.0 | 1 |" in text) == (expected is None)
        assert yaml.safe_load(text.split("---\n")[1]).get("license") == expected


# --- formats ---

ONE = simple(7)
REPLY = "<think>\nFirst 7, sample 0.\n\nThen 8.\n\nSo it ends.\n</think>\n\nThe answer is 4."
OPENING = "<|im_start|>user\nWhat comes after 7?<|im_end|>\n<|im_start|>assistant\n<think>\n"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run_of(tmp_path_factory.mktemp("one") / "run", [ONE])


def only(runs: str, output: Path, format: str, **choices: Any) -> Row:
    run(runs, output, format, **choices)
    [row] = rows(output)
    assert row.pop("run") == json.loads((Path(runs) / "run.json").read_text())["fingerprint"]
    assert (row.pop("prompt_id"), row.pop("sample_index")) == ("p7", 0)
    return row


def test_messages_hold_the_reply_as_the_engines_produced_it(one: str, tmp_path: Path) -> None:
    asked = {"role": "user", "content": "What comes after 7?"}
    said = {"role": "assistant", "content": REPLY}
    assert only(one, tmp_path / "a", "sft_messages") == {"messages": [asked, said]}
    assert only(one, tmp_path / "b", "prompt_completion") == {"prompt": [asked], "completion": [said]}


def test_text_is_the_opening_by_the_template_and_the_reply_to_its_end(one: str, tmp_path: Path) -> None:
    completion = REPLY.removeprefix("<think>\n") + "<|im_end|>"
    assert only(one, tmp_path / "a", "text") == {"text": OPENING + completion}
    row = only(one, tmp_path / "b", "prompt_completion", conversational=False, tokenizer=DRAFT)
    assert row == {"prompt": OPENING, "completion": completion}


def test_a_preference_is_the_rewrite_over_the_draft_after_the_chain_so_far(one: str, tmp_path: Path) -> None:
    assert only(one, tmp_path / "a", "step_preferences") == {
        "prompt": f"{OPENING}First 7, sample 0.\n\n",
        "chosen": "Then 8.\n\n",
        "rejected": "Then 9.\n\n",
        "chosen_score": None,
        "rejected_score": 1.5,
        "step_index": 1,
    }


def test_stepwise_supervision_labels_kept_steps_and_ends_in_the_rejected_ones(one: str, tmp_path: Path) -> None:
    run(one, tmp_path / "a", "stepwise_supervision")
    assert [(row["completions"], row["labels"]) for row in rows(tmp_path / "a")] == [
        (["First 7, sample 0.", "Then 8.", "So it ends."], [True, True, True]),
        (["First 7, sample 0.", "Then 9."], [True, False]),
    ]
    assert rows(tmp_path / "a")[0]["prompt"] == "What comes after 7?"


def test_a_drafts_step_without_a_grade_ends_the_supervision(tmp_path: Path) -> None:
    steps = [Told(text="Good.\n\n"), Told(text="Nobody knows.\n\n", score=None), Told(text="Good too.\n\n")]
    source = run_of(tmp_path / "run", [simple(1, steps=steps)])
    run(source, tmp_path / "a", "stepwise_supervision")
    assert [row["completions"] for row in rows(tmp_path / "a")] == [["Good."]]


def test_drafts_that_teach_nothing_make_no_row_and_are_counted(tmp_path: Path) -> None:
    steps = [
        Told(text="Same.\n\n", rejected="Same.\n"),
        Told(text="A.\n\n", rejected="B.\n\n", score=None),
        Told(text="C.\n\n", rejected=" \n\n"),
        Told(text="D.\n\n", rejected="E.\n\n"),
    ]
    source = run_of(tmp_path / "run", [simple(1, steps=steps)])
    for format, expected in (("step_preferences", 1), ("stepwise_supervision", 2)):
        run(source, tmp_path / format, format)
        assert len(rows(tmp_path / format)) == expected
        counts = json.loads((tmp_path / format / "export.json").read_text())["counts"]
        assert counts["lost_drafts"] == {"identical": 1, "unreadable": 1, "blank": 1}


def test_raw_rows_are_the_chains_with_their_steps_inside(tmp_path: Path) -> None:
    extra = {"columns": {"input_level": 3}}
    chains = [simple(n, verdict="right", **extra) for n in range(3)]
    source = run_of(tmp_path / "run", chains, extra=[("level", pa.int64())])
    run(source, tmp_path / "a", "raw")
    for row, chain in zip(rows(tmp_path / "a"), chains, strict=True):
        assert {name: row[name] for name in chain.row()} == chain.row()
        assert (row["verdict"], row["verdict_basis"]) == ("right", "gold")
        hidden = ("prompt_id", "sample_index", "step_index")
        expected = [{name: value for name, value in step.items() if name not in hidden} for step in chain.step_rows()]
        assert row["steps"] == expected


def test_raw_rows_of_runs_with_other_columns_have_them_all(tmp_path: Path) -> None:
    one = run_of(tmp_path / "one", [simple(1, columns={"input_a": 1})], extra=[("a", pa.int64())])
    two = run_of(tmp_path / "two", [simple(2, columns={"input_b": "x"})], extra=[("b", pa.string())])
    run([one, two], tmp_path / "both", "raw")
    assert [(row["input_a"], row["input_b"]) for row in rows(tmp_path / "both")] == [(1, None), (None, "x")]
    three = run_of(tmp_path / "three", [simple(3, columns={"input_a": "x"})], extra=[("a", pa.string())])
    assert "different types" in refused([one, three], tmp_path / "out", "raw")


def test_conversations_and_system_prompts_are_asked_as_they_were(tmp_path: Path) -> None:
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    extra = [("messages", pa.list_(turn)), ("system_prompt", pa.string())]
    asked = [("user", "Hi"), ("assistant", "?"), ("user", "2+2")]
    messages = [{"role": role, "content": content} for role, content in asked]
    chains = [
        simple(0, columns={"input_messages": messages, "input_system_prompt": None}),
        simple(1, columns={"input_messages": None, "input_system_prompt": "My own."}),
        simple(2, columns={"input_messages": None, "input_system_prompt": None}),
    ]
    source = run_of(tmp_path / "run", chains, extra=extra, chat=ChatConfig(system_prompt="Be brief."))
    run(source, tmp_path / "a")
    found = [[(turn["role"], turn["content"]) for turn in row["messages"][:-1]] for row in rows(tmp_path / "a")]
    assert found == [
        [("system", "Be brief."), *asked],
        [("system", "My own."), ("user", "What comes after 1?")],
        [("system", "Be brief."), ("user", "What comes after 2?")],
    ]
    run(source, tmp_path / "b", "text")
    assert rows(tmp_path / "b")[1]["text"].startswith("<|im_start|>system\nMy own.<|im_end|>\n<|im_start|>user\nWhat")


@pytest.mark.parametrize("format", list(Format))
def test_rows_have_just_their_schemas_columns(one: str, tmp_path: Path, format: Format) -> None:
    """`Table.from_pylist` would null a misspelt one: no column but the scores may be all null."""
    run(one, tmp_path / "a", format)
    table = pq.read_table(tmp_path / "a" / "data" / "train-00000-of-00001.parquet")
    null = {name for name in table.column_names if table[name].null_count == len(table)}
    assert null <= {"chosen_score", "verdict", "verdict_basis"}


def test_a_beginning_of_text_that_the_tokenizer_adds_is_not_in_the_text_too(one: str, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DRAFT)
    bos = tokenizer.convert_ids_to_tokens(0)
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "model")
    run(one, tmp_path / "a", "text", tokenizer=str(tmp_path / "model"))
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")(rows(tmp_path / "a")[0]["text"]).input_ids
    assert ids.count(0) == 1 and ids[0] == 0


def test_a_template_that_drops_thinking_is_told_of(one: str, tmp_path: Path) -> None:
    said = run(one, tmp_path / "a", tokenizer=DRAFT)
    assert "drops the thinking" in said and "drops the thinking" in (tmp_path / "a" / "README.md").read_text()
    keeping = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    keeping += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert "drops the thinking" not in run(one, tmp_path / "b", tokenizer=DRAFT, chat_template=keeping)


# --- the split ---

PROMPT = st.tuples(st.integers(0, 12), st.integers(0, 12))  # an id, a wording


@settings(max_examples=200, deadline=None)
@given(st.lists(PROMPT, min_size=1, max_size=40), st.floats(0, 0.99), st.integers(0, 3))
def test_no_prompt_is_on_both_sides_whatever_its_ids(pairs: list[tuple[int, int]], share: float, seed: int) -> None:
    lines = [{**dict.fromkeys(MARKS), "prompt_id": id, "wording": wording} for id, wording in pairs]
    marks = Marks(pl.DataFrame(lines, schema=MARKS).with_row_index("place"))
    split(marks, share, seed)
    assert marks.frame["place"].to_list() == list(range(len(pairs)))
    sides = marks.frame["is_validation"].to_list()
    for shared in (0, 1):
        assert len({(pair[shared], side) for pair, side in zip(pairs, sides, strict=True)}) == len(
            {pair[shared] for pair in pairs}
        )


def test_a_prompt_under_two_ids_in_two_runs_is_on_one_side(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", [simple(n) for n in range(40)])
    again = [simple(n, prompt_id=f"other{n}", prompt=f"  what comes AFTER {n} ") for n in range(40)]
    same_id = [simple(n, sample_index=1, prompt=f"Tell me what comes after {n}, please.") for n in range(40)]
    second = run_of(tmp_path / "b", [*again, *same_id], seed=1)
    run([first, second], tmp_path / "d", validation=0.4)
    sides = {
        name: {re.sub(r"\D", "", row["messages"][0]["content"]) for row in found}
        for name in ("train", "validation")
        if (found := rows(tmp_path / "d", name))
    }
    assert len(sides) == 2 and not sides["train"] & sides["validation"]
    assert len(rows(tmp_path / "d")) + len(rows(tmp_path / "d", "validation")) == 120


def test_the_split_does_not_depend_on_what_else_is_there(twenty: str, tmp_path: Path) -> None:
    run(twenty, tmp_path / "all", validation=0.3)
    few = run_of(tmp_path / "few", [simple(n) for n in range(0, 20, 2)])
    run(few, tmp_path / "some", validation=0.3)
    assert set(keys(tmp_path / "some", "validation")) == {
        key for key in keys(tmp_path / "all", "validation") if key[1] == 0 and int(key[0][1:]) % 2 == 0
    }


# --- preferences ---

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=12)
STEP = st.tuples(TEXT, st.none() | TEXT, st.none() | st.floats(0, 9))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(STEP, min_size=1, max_size=5), min_size=1, max_size=4))
def test_a_preferences_prompt_is_exactly_the_chain_so_far(
    tmp_path_factory: pytest.TempPathFactory, told: list[list[tuple[str, str | None, float | None]]]
) -> None:
    folder = tmp_path_factory.mktemp("preferences")
    chains = [
        simple(n, steps=[Told(text=text, rejected=rejected, score=score) for text, rejected, score in steps])
        for n, steps in enumerate(told)
    ]
    wanted = sum(
        step.rejected is not None
        and step.score is not None
        and bool(step.text.strip())
        and bool(step.rejected.strip())
        and step.text.strip() != step.rejected.strip()
        for chain in chains
        for step in chain.steps
    )
    source = run_of(folder / "run", chains)
    if not wanted:
        assert "nothing_to_learn" in refused(source, folder / "a", "step_preferences")
        return
    run(source, folder / "a", "step_preferences")
    run(source, folder / "b", "text")
    whole = {(row["prompt_id"]): row["text"] for row in rows(folder / "b")}
    found = rows(folder / "a")
    assert len(found) == wanted
    for row in found:
        chain = chains[int(row["prompt_id"][1:])]
        before = "".join(step.text for step in chain.steps[: row["step_index"]])
        assert row["prompt"].endswith(f"<think>\n{before}")
        assert row["chosen"] != row["rejected"]
        assert whole[row["prompt_id"]].startswith(row["prompt"] + row["chosen"])
        assert row["chosen"] == chain.steps[row["step_index"]].text


# --- filters ---


def test_each_filter_removes_its_own_and_says_how_many(tmp_path: Path) -> None:
    long = [Told(text="word " * 500)]
    loop = [Told(text="and so it goes on and on\n\n")] * 40
    chains = [
        simple(0),
        simple(1, thinking_end="budget"),
        simple(2, answer_end="length"),
        simple(3, thinking_end="error", answer_end="none", answer=None),
        simple(4, steps=[Told(text="I write </think> here.\n\n")]),
        simple(5, prompt="What does <think> mean?"),
        simple(6, steps=long),
        simple(7, steps=loop),
        simple(8, steps=[Told(text="Это совсем другой язык, и мысли тоже.\n\n")]),
        simple(0, sample_index=1, steps=simple(0).steps),
    ]
    source = run_of(tmp_path / "run", chains)
    select = SelectConfig(max_tokens=450, max_repeated_ngrams=0.3, max_foreign_letters=0.1)
    said = run(source, tmp_path / "d", select=select, aside=True)
    expected = {
        "thinking_end": ["p1", "p3"],
        "answer_end": ["p2"],
        "markup": ["p4", "p5"],
        "tokens": ["p6"],
        "repetition": ["p7"],
        "foreign_letters": ["p8"],
        "duplicate": ["p0"],
    }
    assert removed(tmp_path / "d") == {name: len(ids) for name, ids in expected.items()}
    aside = {path.stem: pq.read_table(path) for path in (tmp_path / "d" / "removed").iterdir()}
    assert {name: table["prompt_id"].to_pylist() for name, table in aside.items()} == expected
    assert all(table.schema.equals(REMOVED) for table in aside.values())
    assert aside["tokens"]["reason"][0].as_py().endswith(": 504")
    assert "p0, sample 0, of run" in aside["duplicate"]["reason"][0].as_py()
    assert keys(tmp_path / "d") == [("p0", 0)] and "2 removed by markup" in said


def test_right_answers_are_those_by_gold_and_by_majority_where_asked(tmp_path: Path) -> None:
    verdicts = [("right", "gold"), ("wrong", "gold"), ("right", "majority"), ("unverifiable", None)]
    chains = [simple(n, verdict=verdict, basis=basis) for n, (verdict, basis) in enumerate(verdicts)]
    source = run_of(tmp_path / "run", chains)
    for answers, expected in (("all", "p0 p1 p2 p3"), ("right", "p0"), ("right_or_majority", "p0 p2")):
        run(source, tmp_path / answers, select=SelectConfig(answers=Answers(answers)))
        assert [id for id, _ in keys(tmp_path / answers)] == expected.split()


def test_without_gold_answers_only_right_says_what_is_there(tmp_path: Path) -> None:
    source = run_of(tmp_path / "run", [simple(n, verdict="right", basis="majority") for n in range(3)])
    said = refused(source, tmp_path / "d", select=SelectConfig(answers=Answers.right))
    assert "nothing is left of 3 chains" in said and "3 by answers" in said and "right_or_majority" in said


def test_a_run_without_verdicts_is_refused_with_the_command(one: str, tmp_path: Path) -> None:
    for select in (SelectConfig(answers=Answers.right), SelectConfig(min_pass_rate=0.1)):
        said = refused(one, tmp_path / "d", select=select)
        assert f"python -m jobs.verify run={one}" in said and "1 of 1 part(s)" in said


def test_the_pass_rate_counts_all_samples_of_a_prompt(tmp_path: Path) -> None:
    right = {0: [], 1: [0], 2: [0, 1, 2], 3: [0, 1, 2, 3]}
    chains = [
        simple(n, sample, verdict="right" if sample in right[n] else "wrong") for n in range(4) for sample in range(4)
    ]
    chains += [simple(9, verdict="unverifiable", basis=None)]
    source = run_of(tmp_path / "run", chains, num_shards=2)
    select = SelectConfig(answers=Answers.right, min_pass_rate=0.2, max_pass_rate=0.9)
    run(source, tmp_path / "d", select=select)
    assert sorted(keys(tmp_path / "d")) == [("p1", 0), ("p2", 0), ("p2", 1), ("p2", 2)]
    run(source, tmp_path / "e", select=SelectConfig(max_pass_rate=0.5), aside=True)
    reasons = pq.read_table(tmp_path / "e" / "removed" / "pass_rate.parquet").to_pylist()
    assert {row["prompt_id"]: row["reason"].rpartition(": ")[2] for row in reasons if row["prompt_id"] != "p9"} == {
        "p2": "0.75",
        "p3": "1",
    }


SAMPLES = [
    simple(0, 0, steps=[Told(text="a a a a a a\n\n", score=5.0)]),
    simple(0, 1, steps=[Told(text="b b b\n\n", score=6.0), Told(text="b\n\n", rejected="c\n\n", score=0.0)]),
    simple(0, 2, steps=[Told(text="d d d d d\n\n", author=Role.base)]),
    simple(0, 3, steps=[Told(text="e e e e\n\n", score=9.0)]),
]


@pytest.mark.parametrize(
    ("best", "kept"), [("first", [0, 1]), ("shortest", [1, 3]), ("highest_grade", [1, 3]), ("most_draft", [0, 3])]
)
def test_the_best_samples_of_a_prompt_are_kept_by_a_stated_rule(tmp_path: Path, best: str, kept: list[int]) -> None:
    """Rejected drafts' grades do not count; of equals the first stays."""
    source = run_of(tmp_path / "run", SAMPLES)
    run(source, tmp_path / "d", select=SelectConfig(per_prompt=2, best=Best(best)))
    assert [sample for _, sample in keys(tmp_path / "d")] == kept


def test_samples_of_one_prompt_in_two_runs_are_one_prompts(tmp_path: Path) -> None:
    one = run_of(tmp_path / "one", SAMPLES)
    two = run_of(tmp_path / "two", [simple(0, prompt_id="else", steps=[Told(text="f\n\n")])], seed=1)
    run([one, two], tmp_path / "d", select=SelectConfig(per_prompt=1))
    assert keys(tmp_path / "d") == [("else", 0)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30), st.integers(1, 4))
def test_never_more_than_k_and_never_a_better_one_left_out(lines: list[tuple[int, int]], k: int) -> None:
    marked = [{**dict.fromkeys(MARKS), "prompt": prompt, "rank": float(rank)} for prompt, rank in lines]
    marks = Marks(pl.DataFrame(marked, schema=MARKS).with_row_index("place"))
    remove_beyond(marks, k)
    kept = set(marks.kept["place"])
    for prompt in range(4):
        order = sorted((rank, place) for place, (of, rank) in enumerate(lines) if of == prompt)
        assert {place for _, place in order[:k]} == {place for _, place in order if place in kept}


def test_tokens_are_counted_by_the_tokenizer_given(one: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    run(one, tmp_path / "d", tokenizer=DRAFT, select=SelectConfig(tokens_by=TokensBy.tokenizer))
    counts = json.loads((tmp_path / "d" / "export.json").read_text())["counts"]
    plain = REPLY.removeprefix("<think>\n").replace("</think>", "")
    least = len(AutoTokenizer.from_pretrained(DRAFT)(plain).input_ids)
    assert least < counts["tokens"] <= least + 10
    said = refused(
        one, tmp_path / "e", tokenizer=DRAFT, select=SelectConfig(tokens_by=TokensBy.tokenizer, max_tokens=9)
    )
    assert "1 by tokens" in said


# --- near-duplicates ---


def story(*changed: int) -> list[Told]:
    text = [f"word{n}" if n not in changed else f"new{n}" for n in range(120)]
    return [Told(text=" ".join(text) + "\n\n")]


def test_near_duplicates_are_found_and_others_are_not(tmp_path: Path) -> None:
    chains = [
        simple(0, steps=story()),
        simple(0, sample_index=1, steps=story(60)),
        simple(0, sample_index=2, steps=story(*range(0, 120, 7))),
        simple(0, sample_index=3, steps=[Told(text=" ".join(f"else{n}" for n in range(120)))]),
        simple(0, sample_index=4, steps=story(61)),
    ]
    source = run_of(tmp_path / "run", chains)
    run(source, tmp_path / "d", near_duplicates=NearDuplicatesConfig(threshold=0.8), aside=True)
    assert [sample for _, sample in keys(tmp_path / "d")] == [0, 2, 3]
    reasons = pq.read_table(tmp_path / "d" / "removed" / "near_duplicate.parquet")["reason"].to_pylist()
    assert all("p0, sample 0, of run" in reason for reason in reasons)
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"README.md", "data", "export.json", "removed"}


# --- decontamination ---

PROBLEMS: list[str] = pl.read_parquet(MATH)["problem"].to_list()
EDITS: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "case, white space and punctuation": lambda text: "  " + text.upper().replace(".", " .").replace("$", " $ "),
    "words around it": lambda text: f"Solve this carefully, please: {text} Put the answer inside a box.",
    "a word in it": lambda text: " ".join([*(given := text.split())[:-3], "finally", *given[-3:]]),
}


def evaluation(files: list[str], **choices: Any) -> EvaluationPrompts:
    found = EvaluationPrompts.read(DecontaminateConfig(files=files, **choices))
    assert found is not None
    return found


@pytest.mark.parametrize("edit", EDITS)
def test_planted_evaluation_problems_are_found(edit: str) -> None:
    index = evaluation([str(MATH)])
    long = [(n, text) for n, text in enumerate(PROBLEMS) if edit in list(EDITS)[:2] or len(words(text)) >= 16]
    assert len(long) > 12
    for number, problem in long:
        assert index.find(EDITS[edit](problem)) == number


def test_unrelated_problems_are_not(tmp_path: Path) -> None:
    """Each problem against the nineteen others, and the toy's against all."""
    for ngram in (13, 8):
        for number, problem in enumerate(PROBLEMS):
            others = tmp_path / f"{ngram}-{number}.jsonl"
            others.write_text("".join(json.dumps({"problem": text}) + "\n" for text in PROBLEMS if text != problem))
            assert evaluation([str(others)], ngram=ngram).find(problem) is None
        toy = pl.read_parquet(TOY / "prompts" / "heldout.parquet")["prompt"]
        index = evaluation([str(MATH)], ngram=ngram)
        assert not any(index.find(prompt) is not None for prompt in toy)


def test_contaminated_chains_are_left_out_with_the_problem_named(tmp_path: Path) -> None:
    chains = [simple(0), simple(1, prompt=EDITS["words around it"](PROBLEMS[0]))]
    source = run_of(tmp_path / "run", chains)
    run(source, tmp_path / "d", decontaminate=DecontaminateConfig(files=[str(MATH)]), aside=True)
    [row] = pq.read_table(tmp_path / "d" / "removed" / "evaluation.parquet").to_pylist()
    assert row["prompt_id"] == "p1"
    assert row["reason"].endswith(
        "math500-excerpt.parquet, row 0: convert the point 0 3 in rectangular coordinates to polar coordinates enter"
    )
    assert keys(tmp_path / "d") == [("p0", 0)]


def test_an_instruction_that_evaluation_prompts_share_is_no_contamination(tmp_path: Path) -> None:
    ask = " Please reason step by step, and put your final answer within a box at the very end."
    file = tmp_path / "eval.jsonl"
    file.write_text("".join(json.dumps({"q": f"Eval {n}.{ask}"}) + "\n" for n in range(COMMON + 1)))
    index = evaluation([str(file)], column="q")
    assert index.find(f"Something else.{ask}") is None
    file.write_text("".join(json.dumps({"q": f"Eval {n}.{ask}"}) + "\n" for n in range(COMMON)))
    assert evaluation([str(file)], column="q").find(f"Something else.{ask}") is not None


def test_an_evaluation_file_that_cannot_be_used_is_named(one: str, tmp_path: Path) -> None:
    missing = DecontaminateConfig(files=[str(tmp_path / "no.parquet")])
    assert "decontaminate.files" in refused(one, tmp_path / "d", decontaminate=missing)
    other = DecontaminateConfig(files=[str(MATH)], column="question")
    assert "decontaminate.column" in refused(one, tmp_path / "d", decontaminate=other)


# --- measures ---


def test_measures_worked_out_by_hand() -> None:
    assert words("The $\\frac{1}{2}$ of  \uff21-b, 日本") == ["the", "frac", "1", "2", "of", "a", "b", "日", "本"]
    assert repeated_share("a b c a b c", 3) == pytest.approx(1 / 4)
    assert repeated_share("a b", 3) == 0
    assert num_repeated(["a\n\n", " a", "b", "\n\n", "\n"]) == 1
    assert foreign_share("Find x.", "Найти x") == 1
    assert foreign_share("求 x 的值", "我们设 x, 则 \\frac{x}{y} 为 2") == 0
    assert foreign_share("求 x 的值", "We set 设") == pytest.approx(5 / 6)
    assert foreign_share("1+1", "Anything") == 0


# --- what is refused ---


def replaced(path: Path, **metadata: str) -> None:
    table = pq.read_table(path)
    given = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    pq.write_table(table.replace_schema_metadata({**given, **metadata}), path)


def only_part(runs: str, kind: str) -> Path:
    [path] = Path(runs).glob(f"*/{kind}/*.parquet")
    return path


@pytest.mark.parametrize("kind", ["chains", "steps"])
@pytest.mark.parametrize("field", ["schema_version", "fingerprint"])
def test_a_part_of_another_run_is_named(tmp_path: Path, kind: str, field: str) -> None:
    source = run_of(tmp_path / "run", [simple(1)])
    replaced(only_part(source, kind), **{field: "other"})
    said = refused(source, tmp_path / "d")
    assert str(only_part(source, kind)) in said and field in said and "other" in said


@pytest.mark.parametrize("kind", ["chains", "steps", "verdicts"])
def test_a_torn_part_is_named(tmp_path: Path, kind: str) -> None:
    source = run_of(tmp_path / "run", [simple(1, verdict="right")])
    path = only_part(source, kind)
    path.write_bytes(path.read_bytes()[:-20])
    said = refused(source, tmp_path / "d", "step_preferences", allow_unfinished=True)
    assert str(path) in said and "damaged" in said


def test_a_run_whose_part_is_torn_is_not_finished(tmp_path: Path) -> None:
    source = run_of(tmp_path / "run", [simple(1)])
    path = only_part(source, "chains")
    path.write_bytes(path.read_bytes()[:-20])
    assert path.name in refused(source, tmp_path / "d")


def test_steps_that_are_not_the_chains_are_named(tmp_path: Path) -> None:
    source = run_of(tmp_path / "run", [simple(1), simple(2)])
    path = only_part(source, "steps")
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    assert str(path) in refused(source, tmp_path / "d", "step_preferences")
    path.unlink()
    assert f"{path} is missing" in refused(source, tmp_path / "d")


def test_runs_of_other_think_tags_do_not_mix(tmp_path: Path, one: str) -> None:
    other = run_of(tmp_path / "other", [simple(1)], chat=ChatConfig(think_open="<t>", think_close="</t>"))
    assert "</t>" in refused([one, other], tmp_path / "d")
    run(other, tmp_path / "alone")
    assert rows(tmp_path / "alone")[0]["messages"][1]["content"].startswith("<t>\nFirst 1")


def test_runs_of_other_policies_mix(tmp_path: Path, one: str) -> None:
    steps = [Told(text="Draft alone.\n\n", score=None)]
    other = run_of(tmp_path / "draft", [simple(1, steps=steps)], policy=draft_only())
    run([one, other], tmp_path / "d", "stepwise_supervision", aside=True)
    assert {row["prompt_id"] for row in rows(tmp_path / "d")} == {"p7"}
    assert removed(tmp_path / "d") == {"nothing_to_learn": 1}
    text = (tmp_path / "d" / "README.md").read_text()
    assert "| draft_only |" in text and text.count(f"| {TOY}/base |") == 1


def test_an_unfinished_run_is_refused_unless_allowed(tmp_path: Path) -> None:
    source = run_of(tmp_path / "run", [simple(1)], state=AttemptState.stopped)
    assert "not finished: 1 of 1 shard(s), the first shard-00000 (idle stopped)" in refused(source, tmp_path / "d")
    run(source, tmp_path / "d", allow_unfinished=True)
    assert len(rows(tmp_path / "d")) == 1


def test_an_empty_selection_writes_nothing_and_names_the_filter(twenty: str, tmp_path: Path) -> None:
    said = refused(twenty, tmp_path / "d", select=SelectConfig(thinking_ends=[ThinkingEnd.budget]))
    assert "nothing is left of 40 chains" in said and "40 by thinking_end" in said
    assert "validation: 0.99 leaves nothing" in refused(
        twenty, tmp_path / "d", validation=0.99, select=SelectConfig(answer_ends=[AnswerEnd.stop])
    )


def test_a_tokenizer_that_cannot_serve_is_refused(one: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DRAFT)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    said = refused(one, tmp_path / "d", "text", tokenizer=str(tmp_path / "model"))
    assert said.startswith("tokenizer: ") and "no chat template" in said
    assert "tokenizer: " in refused(one, tmp_path / "d", "text", tokenizer=str(tmp_path))
    assert "tokenizer: not set" in refused(one, tmp_path / "d", "text", tokenizer=None)


def test_a_folder_that_holds_the_same_is_left_alone_and_any_other_refused(one: str, tmp_path: Path) -> None:
    run(one, tmp_path / "d")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")}
    assert "already exported" in run(one, tmp_path / "d")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")}
    assert "choices.seed: 0, now 1" in refused(one, tmp_path / "d", seed=1)
    other = run_of(tmp_path / "other", [simple(2)])
    assert "something else" in refused(other, tmp_path / "d")
    (tmp_path / "d" / "data" / "train-00000-of-00001.parquet").write_bytes(b"x")
    assert "not as it was written" in refused(one, tmp_path / "d")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.md").write_text("keep")
    assert "is there already" in refused(one, tmp_path / "mine")


def test_all_choices_out_of_range_are_named_at_once() -> None:
    with pytest.raises(InvalidInput) as error:
        ExportConfig(
            runs=["a", "a"],
            output="d",
            format=Format.text,
            validation=1.0,
            rows_per_file=0,
            select=SelectConfig(per_prompt=0, min_pass_rate=2, max_repeated_ngrams=-1, thinking_ends=[]),
            near_duplicates=NearDuplicatesConfig(threshold=0, num_perm=3),
            decontaminate=DecontaminateConfig(ngram=2),
        )
    named = {line.split(":")[0] for line in str(error.value).splitlines()}
    selected = {"per_prompt", "min_pass_rate", "max_repeated_ngrams", "thinking_ends"}
    near = {"near_duplicates.threshold", "near_duplicates.num_perm"}
    others = {"runs", "validation", "rows_per_file", "tokenizer", "decontaminate.ngram"}
    assert named == {f"select.{name}" for name in selected} | near | others


# --- the job ---


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", [Format.raw, Format.step_preferences])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(twenty: str, tmp_path: Path, format: Format) -> None:
    """Stopped ever later, it never shows an output, never makes a file again, and ends as if left alone."""
    choices = {"validation": 0.3, "aside": True, "rows_per_file": 3, "name": "one", "tokenizer": DRAFT}
    choices |= {"select": SelectConfig(per_prompt=1), "near_duplicates": NearDuplicatesConfig(threshold=0.9)}
    run(twenty, tmp_path / "whole", format, **choices)
    out = tmp_path / "stopped" / "d"
    config = ExportConfig(runs=[twenty], output=str(out), format=format, **choices)
    made: dict[Path, int] = {}  # files that are whole, and when they were written
    for stops_at in range(1, 1000, 3):
        calls = iter(range(1, 1000))

        def check(calls: Iterator[int] = calls, stops_at: int = stops_at) -> None:
            if next(calls) == stops_at:
                raise Stopped("test")

        try:
            export(config, Console(file=StringIO()), check)
        except Stopped:
            assert [path.name for path in out.parent.iterdir()] == [".d.exporting"]
            work = out.parent / ".d.exporting"
            now = {
                path: path.stat().st_mtime_ns
                for kind in ("survey", "dataset/data")
                for path in work.glob(f"{kind}/*.p*")
            }
            assert made.items() <= now.items()
            made = now
        else:
            break
    assert stops_at > 9 and len(made) > 12
    assert contents(out) == contents(tmp_path / "whole")
    assert [path.name for path in out.parent.iterdir()] == ["d"]


def test_what_was_begun_by_other_choices_is_begun_anew(twenty: str, tmp_path: Path) -> None:
    calls = iter(range(1000))

    def check() -> None:
        if next(calls) == 20:
            raise Stopped("test")

    begun = ExportConfig(runs=[twenty], output=str(tmp_path / "d"), format=Format.raw, rows_per_file=3)
    with pytest.raises(Stopped):
        export(begun, Console(quiet=True), check)
    assert list(tmp_path.glob(".d.exporting/dataset/data/*"))
    run(twenty, tmp_path / "d", validation=0.4)
    run(twenty, tmp_path / "e", validation=0.4, name="d")
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


def test_two_exports_to_one_output_do_not_meet(twenty: str, tmp_path: Path) -> None:
    config = ExportConfig(runs=[twenty], output=str(tmp_path / "d"), format=Format.raw)

    def meanwhile() -> None:
        with pytest.raises(LeaseHeld, match="another process's"):
            export(config, Console(quiet=True))

    export(config, Console(quiet=True), meanwhile)
    assert len(rows(tmp_path / "d")) == 40 - len(rows(tmp_path / "d", "validation"))


def job(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.export", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes, **options)


def test_the_command_exports_and_a_mistake_is_one_message(one: str, tmp_path: Path) -> None:
    process = job(f"runs=[{one}]", f"output={tmp_path / 'd'}", "format=sft_messages")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "") and "train 1 rows of 1 prompts in 1 file(s)" in out
    process = job(f"runs=[{tmp_path}]", f"output={tmp_path / 'e'}", "format=sft_messages")
    out, err = process.communicate(timeout=60)
    assert process.returncode == ExitStatus.invalid and "Traceback" not in err and "run.json" in err


def ended_by(number: signal.Signals, arguments: Sequence[str], surveys: Path, num_surveys: int) -> int:
    """The exit status of an export that a signal ends in its first pass, once so many parts were looked at."""
    process = job(*arguments)
    deadline = time.monotonic() + 100
    while len(list(surveys.glob("*.parquet"))) < num_surveys and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


def test_killed_or_told_to_stop_the_command_goes_on_where_it_was(tmp_path: Path) -> None:
    chains = [simple(n, steps=story(n % 100) * 20) for n in range(600)]
    source = run_of(tmp_path / "run", chains, part_chains=10)
    out = tmp_path / "d"
    given = [f"runs=[{source}]", f"output={out}", "format=sft_messages", "near_duplicates.threshold=0.8", "name=one"]
    surveys = tmp_path / ".d.exporting" / "survey"
    assert ended_by(signal.SIGTERM, given, surveys, 1) == ExitStatus.stopped
    assert not out.exists()
    num_done = len(list(surveys.glob("*.parquet")))
    assert ended_by(signal.SIGKILL, given, surveys, num_done + 1) == -signal.SIGKILL
    assert not out.exists()
    _, err = job(*given).communicate(timeout=100)
    near = NearDuplicatesConfig(threshold=0.8)
    run(source, tmp_path / "whole", name="one", validation=0.02, near_duplicates=near)
    assert err == "" and contents(out) == contents(tmp_path / "whole")


def test_the_command_lines_choices_are_the_schemas() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["runs=[a,b]", "output=d", "format=raw", "select.answers=right", "select.thinking_ends=[budget]"]
        config = to_config(compose("export", overrides))
        assert config.runs == ["a", "b"] and config.select.answers is Answers.right
        assert config.select.thinking_ends == [ThinkingEnd.budget]
        assert config == ExportConfig(
            runs=["a", "b"],
            output="d",
            format=Format.raw,
            select=SelectConfig(answers=Answers.right, thinking_ends=[ThinkingEnd.budget]),
        )
        for wrong in ("+select.typo=1", "+typo=1"):
            with pytest.raises(InvalidInput, match="no such field"):
                to_config(compose("export", [*overrides, wrong]))
        with pytest.raises(InvalidInput, match="runs: not set"):
            to_config(compose("export", ["output=d", "format=raw"]))


def test_every_filter_has_its_meaning() -> None:
    from specreason_batch.export.filters import MEANINGS

    assert list(MEANINGS) == list(Filter)
