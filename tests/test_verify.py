"""A chain's answer is judged right only if it is; what hangs or dies is killed and counted, and no chain is touched."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from specreason_batch.store.parts import ShardPaths, ShardWriter
from specreason_batch.store.reading import scan
from specreason_batch.store.schemas import chains_schema
from specreason_batch.store.verdicts import VERDICTS, AnswerKind
from specreason_batch.types import InvalidInput
from specreason_batch.verify.compare import Comparison, Outcome, compare
from specreason_batch.verify.config import VerifyConfig
from specreason_batch.verify.extract import extract
from specreason_batch.verify.job import verify
from specreason_batch.verify.judging import Ballot, PartJudging, Sample
from specreason_batch.verify.spelling import kind_of
from specreason_batch.verify.vote import count_votes
from tests.support.commits import Uncontended

ROOT = Path(__file__).parent.parent
MATH500 = Path(__file__).parent / "data" / "math500_answers.parquet"
HANGS = "\\boxed{10^{10^{10}}}"  # SymPy works the power out
TOO_BIG = "\\boxed{(1+x)^{100000}}"  # half a gigabyte, for a comparison with 7
TIMEOUT = 2.0  # seconds for a comparison, where one hangs
PATIENCE = 300.0  # seconds for what takes two on an idle machine
Row = dict[str, Any]


def write_run(
    root: Path,
    parts: Sequence[Sequence[Row]],
    shard: str = "s0",
    samples: int = 1,
    has_gold: bool = True,
    extra: pa.Schema = pa.schema([]),  # noqa: B008
) -> Path:
    """A run with these chains; a row gives what matters of one."""
    root.mkdir(parents=True, exist_ok=True)
    manifest = {"fingerprint": "f00d", "config": {"samples_per_prompt": samples}}
    (root / "run.json").write_text(json.dumps(manifest))
    schema = chains_schema(extra, has_gold_answer=has_gold)
    for rows in parts:
        writer = ShardWriter(
            ShardPaths(root / shard),
            Uncontended(root / shard),
            schema,
            metadata={"fingerprint": "f00d"},
            chains_per_part=10**6,
            seconds_per_part=1e9,
        )
        for row in rows:
            writer.add_chain(dict.fromkeys(schema.names) | {"sample_index": 0, "thinking": ""} | row, [])
        writer.commit()
    return root


def chain(prompt_id: str, answer: str | None, gold: str | None = None, sample: int = 0, **more: Any) -> Row:
    given = {"gold_answer": gold} if gold is not None else {}
    return {"prompt_id": prompt_id, "sample_index": sample, "answer": answer} | given | more


def run(root: Path | list[str], **choices: Any) -> str:
    """Verify; what was printed."""
    console = Console(file=StringIO(), width=160)
    given = root if isinstance(root, list) else str(root)
    verify(VerifyConfig(**{"run": given, "num_workers": 2} | choices), console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def verdicts(root: Path) -> list[Row]:
    found = scan(root, "verdicts")
    return [] if found is None else found.collect().to_dicts()


def judged(root: Path) -> list[tuple[str, str | None]]:
    return [(row["verdict"], row["reason"]) for row in verdicts(root)]


def digests(root: Path) -> dict[str, str]:
    """Of every file but verdicts."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and "verdicts" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(root: Path, **choices: Any) -> str:
    with pytest.raises(InvalidInput) as error:
        run(root, **choices)
    return str(error.value)


def same(expected: str, extracted: str, kind: AnswerKind | None = None) -> bool | None:
    return compare(Comparison(kind=kind or kind_of(expected), expected=expected, extracted=extracted)).same


# --- MATH-500 ---


NO_SUM = re.compile(r"[,=<%_]|\\(?:text|mbox|in|cup|le|begin|pm|\$)|^[a-zA-Z ]+$|circ")  # one may not add to it


def changed_digit(answer: str) -> str | None:
    """A near miss: the last digit one up. None where there is no digit."""
    at = max((place for place, letter in enumerate(answer) if letter.isdecimal()), default=None)
    return None if at is None else f"{answer[:at]}{(int(answer[at]) + 1) % 10}{answer[at + 1 :]}"


def test_math500_is_judged_as_people_would(tmp_path: Path) -> None:
    """Its solutions and its answers as a sum right; another problem's answers, and its own with a digit changed, wrong.

    Where the other problem has the same answer, spelt the same, the pair is left out: calling it right is no mistake.
    """
    rows = pq.read_table(MATH500).to_pylist()
    assert len(rows) == 500
    solved = [chain(row["unique_id"], row["solution"], row["answer"]) for row in rows]
    respelt = [
        chain(row["unique_id"], f"\\boxed{{{row['answer']}+1-1}}", row["answer"])
        for row in rows
        if not NO_SUM.search(row["answer"])
    ]
    rotated, near = [], []
    for row, other in zip(rows, [*rows[137:], *rows[:137]], strict=True):
        if other["answer"] != row["answer"]:
            rotated.append(chain(row["unique_id"], other["solution"], row["answer"]))
        if (changed := changed_digit(row["answer"])) is not None:
            near.append(chain(row["unique_id"], f"\\boxed{{{changed}}}", row["answer"]))
    seconds = {}
    for name, chains in (("solved", solved), ("respelt", respelt), ("rotated", rotated), ("near", near)):
        began = time.monotonic()
        print(run(write_run(tmp_path / name, [chains])))
        seconds[name] = time.monotonic() - began
    for name, expected in (("solved", "right"), ("respelt", "right"), ("rotated", "wrong"), ("near", "wrong")):
        found = verdicts(tmp_path / name)
        missed = [row for row in found if row["verdict"] != expected]
        print(f"{name}: {len(found) - len(missed)} of {len(found)} {expected}, {seconds[name]:.1f} s")
        for row in missed:
            print("  ", {key: row[key] for key in ("prompt_id", "extracted", "expected", "verdict", "reason")})
        assert len(missed) <= 0.01 * len(found)
    assert len(respelt) > 400 and len(rotated) == 497 and len(near) > 480


# --- what is the same, and what is not ---

SAME = [
    ("\\frac{1}{2}", "0.5"),
    ("1/2", "\\dfrac12"),
    ("0.5", "50\\%"),
    ("50", "50\\%"),
    ("10\\%", "0.1"),
    ("1000", "1,000"),
    ("11,\\! 111,\\! 100", "11111100"),
    ("\\$32,348", "32348"),
    ("1 000", "1000"),
    ("90^\\circ", "90"),
    ("12", "12\\text{ cm}"),
    ("12\\text{ cm}^2", "12 \\mbox{ cm}^2"),
    ("12", "x = 12"),
    ("x=12", "12"),
    ("-2,1", "1,-2"),
    ("1,2", "\\{2,1\\}"),
    ("1,2", "x=1 \\text{ or } x=2"),
    ("\\pm 2", "2,-2"),
    ("\\{1\\pm\\sqrt{5},-2\\}", "1+\\sqrt5, 1-\\sqrt5, -2"),
    ("(6,7)", "x=6, y=7"),
    ("(3, \\frac{\\pi}{2})", "\\left(3,\\pi/2\\right)"),
    ("(-\\infty, 2)", "x<2"),
    ("[-2,7]", "x \\in [-2,7]"),
    ("[-2,7]", "-2 \\le x \\le 7"),
    ("(0,9) \\cup (9,36)", "(9,36)\\cup(0,9)"),
    ("\\begin{pmatrix} -1/3 \\\\ 5/3 \\end{pmatrix}", "\\begin{bmatrix}-\\frac13\\\\ \\frac53\\end{bmatrix}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("y=2x+1", "y-2x=1"),
    ("2516_8", "2516_{8}"),
    ("\\log_2 8", "3"),
    ("0", "2-2"),
    ("18", "2(9)"),
    ("9", "\\frac{2(9)}{2}"),
    ("\\sqrt{2}", "1.41421356"),
    ("\\text{(C)}", "C"),
    ("B", "(b) it is Paris"),
    ("\\text{Evelyn}", "evelyn."),
    ("no solution", "\\text{No  solution}"),
]
DIFFERENT = [
    ("12", "1,2"),
    ("1,2", "12"),
    ("(1,2)", "1,2"),
    ("(1,2)", "(2,1)"),
    ("1,2", "(1,2)"),
    ("\\{1,2\\}", "(1,2)"),
    ("[1,2]", "(1,2)"),
    ("[1,2)", "(1,2]"),
    ("x\\in[-2,7]", "x\\in(-2,7)"),
    ("(0,9) \\cup (9,36)", "(0,36)"),
    ("1,1,2", "1,2"),
    ("1,1,2", "1,2,2"),
    ("(6,7)", "x=7, y=6"),
    ("x=6, y=7", "7,6"),
    ("2", "\\pm 2"),
    ("0", "7 0"),
    ("0", "1 000"),
    ("70", "7 0"),
    ("2.000", "2,000"),
    ("3.5", "3,5"),
    ("0.0000001", "0.0000002"),
    ("\\frac{1}{10000000}", "0.0"),
    ("\\frac13", "0.33"),
    ("11", "2(9)"),
    ("0", "10^{-9}"),
    ("0.5", "0.5\\%"),
    ("5", "0.05\\%"),
    ("2516_8", "2516_7"),
    ("x=12", "y=12"),
    ("12", "12x"),
    ("12", "12 or 13"),
    ("5", "-5"),
    ("5", "5 or maybe 6"),
    ("p-q", "q-p"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\1\\end{pmatrix}"),
    ("even", "neve"),
    ("\\text{east}", "\\text{seat}"),
    ("B", "A"),
    ("B", "B and C"),
    ("B", "B) or C)"),
    ("B", "Because"),
    ("7", "the answer is 7 I think not"),
]
UNSURE = [
    ("12\\text{ cm}", "12\\text{ m}"),
    ("864 \\mbox{ inches}^2", "864 \\mbox{ inches}^3"),
    ("6:00 \\text{ a.m.}", "6:00 \\text{ p.m.}"),
    ("2516", "2516_8"),
    ("\\heartsuit^\\spadesuit_\\frac", "5"),
]


@pytest.mark.parametrize(("expected", "extracted"), SAME)
def test_what_means_the_same_is_right(expected: str, extracted: str) -> None:
    assert same(expected, extracted) is True


@pytest.mark.parametrize(("expected", "extracted"), DIFFERENT)
def test_what_does_not_is_wrong(expected: str, extracted: str) -> None:
    assert same(expected, extracted) is False


@pytest.mark.parametrize(("expected", "extracted"), UNSURE)
def test_what_cannot_be_told_is_not_judged(expected: str, extracted: str) -> None:
    assert same(expected, extracted) is None


@pytest.mark.parametrize(
    ("gold", "kind"),
    [
        ("B", "choice"),
        ("(C).", "choice"),
        ("\\text{(E)}", "choice"),
        ("K", "math"),
        ("b", "math"),
        ("12", "number"),
        ("-1,234.50", "number"),
        ("\\$5", "number"),
        ("5%", "math"),
        ("\\frac{1}{2}", "math"),
        ("ab", "math"),
        ("even", "text"),
        ("\\text{no solution}", "text"),
    ],
)
def test_a_gold_answer_shows_how_it_is_to_be_compared(gold: str, kind: str) -> None:
    assert kind_of(gold) == kind


def test_a_named_kind_overrules_what_it_looks_like() -> None:
    assert same("1/2", "0.5") is True
    assert same("1/2", "0.5", AnswerKind.text) is False


# --- what is taken for the final answer ---


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        ("so \\boxed{1}, no, \\boxed{\\frac{1}{2}}", "math", "\\frac{1}{2}"),
        ("The answer is 4. \\boxed{5}", "number", "5"),
        ("\\boxed{5", "math", None),
        ("\\boxed{ }", "math", None),
        ("The answer is 5, that is \\boxed{1", "number", None),
        ("The answer is $x+1$, since ...", "math", "x+1"),
        ("**Answer:** \\(2\\)", "math", "2"),
        ("The final answer is x + 1. Goodbye", "math", "x + 1"),
        ("The answer is 3.5. Then 7", "number", "3.5"),
        ("The answer is: **B**", "choice", "B"),
        ("The answer is (C) because (A) is not", "choice", "C"),
        ("The answer is Because", "choice", None),
        ("The answer depends on (A)", "choice", "A"),
        ("it is (A), or rather (D)", "choice", "D"),
        ("B", "choice", "B"),
        ("**B.**", "choice", None),
        ("A good question", "choice", None),
        ("we have 12 of 1,300", "number", "1,300"),
        ("so it is 5.", "number", "5"),
        ("take x2", "number", None),
        ("\\frac{1}{2}", "math", "\\frac{1}{2}"),
        ("Therefore we see that it is 5", "math", None),
        ("no solution", "text", "no solution"),
        ("two\nlines", "text", None),
        ("", "text", None),
        (None, "number", None),
    ],
)
def test_the_final_answer_is_found_or_there_is_none(text: str | None, kind: str, answer: str | None) -> None:
    assert extract(text, AnswerKind(kind)) == answer


def test_thinking_is_looked_at_only_where_that_was_asked_for(tmp_path: Path) -> None:
    rows = [chain("a", None, "5", thinking="so \\boxed{5}"), chain("b", "\\boxed{4}", "5", thinking="\\boxed{5}")]
    write_run(tmp_path, [rows])
    run(tmp_path)
    assert judged(tmp_path) == [("wrong", "no answer"), ("wrong", None)]
    run(tmp_path, from_thinking=True)
    assert judged(tmp_path) == [("right", None), ("wrong", None)]


# --- what hangs, what dies ---


def test_what_hangs_is_killed_and_everything_else_is_judged(tmp_path: Path) -> None:
    rows = [chain(f"p{number}", f"\\boxed{{{number}.0}}", f"{number}") for number in range(60)]
    rows[20]["answer"] = rows[41]["answer"] = HANGS
    said = run(write_run(tmp_path, [rows]), timeout_seconds=TIMEOUT)
    found = judged(tmp_path)
    assert found[20] == found[41] == ("unverifiable", f"timed out after {TIMEOUT:g} s")
    assert {verdict for number, verdict in enumerate(found) if number not in (20, 41)} == {("right", None)}
    assert "2 timed out, 0 killed their worker" in said
    assert "2 unverifiable: timed out after 2 s" in said


def test_what_takes_too_much_memory_is_told_apart_from_a_wrong_answer(tmp_path: Path) -> None:
    rows = [chain(f"p{number}", f"\\boxed{{{number}}}", "7") for number in range(20)]
    rows[5]["answer"] = TOO_BIG
    said = run(write_run(tmp_path, [rows]), memory_gib=0.25)
    found = judged(tmp_path)
    assert found.pop(5) == ("unverifiable", "killed the worker, which ran out of memory")
    assert found.count(("right", None)) == 1 and found.count(("wrong", None)) == 18
    assert "0 timed out, 1 killed their worker" in said


# --- votes ---


def vote(answers: list[str | None], majority: float = 0.5) -> str | None:
    return count_votes(answers, lambda one, other: one.lower() == other.lower(), majority).winner


def test_a_majority_is_more_than_the_stated_share_and_than_any_other() -> None:
    assert vote(["a", "A", "b"]) == "a"
    assert vote(["a", "b", "B", "b"]) == "b"
    assert vote(["a", "a", "b", "c"]) is None, "half is not more than half"
    assert vote(["a", "a", None, None]) is None, "a sample without an answer is a voter"
    assert vote(["a", "a", "b", "c"], majority=0) == "a"
    assert vote(["a", "a", "b", "b"], majority=0) is None, "a tie"
    assert vote(["a", "b"], majority=0) is None, "nobody agrees"
    assert vote(["a"]) is None and vote([None, None]) is None


def test_samples_without_a_gold_answer_are_judged_by_their_majority(tmp_path: Path) -> None:
    answers = {
        "p": ["\\boxed{0.5}", "\\boxed{3}", "\\boxed{\\frac12}", "\\boxed{1/2}", None],
        "q": ["\\boxed{1}", "\\boxed{1}", "\\boxed{2}", "\\boxed{2}", "\\boxed{3}"],
        "r": ["\\boxed{A}"] * 3 + ["\\boxed{B}", "C"],
    }
    rows = [chain(name, text, sample=at) for name, texts in answers.items() for at, text in enumerate(texts)]
    random.Random(1).shuffle(rows)
    write_run(tmp_path, [rows[:6], rows[6:11], rows[11:]], samples=5, has_gold=False)
    said = run(tmp_path)
    found = {(row["prompt_id"], row["sample_index"]): row for row in verdicts(tmp_path)}
    assert [found["p", at]["verdict"] for at in range(5)] == ["right", "wrong", "right", "right", "wrong"]
    assert {found["p", at]["expected"] for at in range(5)} == {"0.5"}
    assert found["p", 4]["reason"] == "no answer"
    assert {(found["q", at]["verdict"], found["q", at]["basis"]) for at in range(5)} == {("unverifiable", None)}
    assert [(found["r", at]["verdict"], found["r", at]["kind"]) for at in (0, 4)] == [
        ("right", "choice"),
        ("wrong", "choice"),
    ]
    assert "no gold answer, and no majority among the samples" in said


def test_a_comparison_that_hangs_does_not_decide_a_vote(tmp_path: Path) -> None:
    rows = [
        chain("p", text, sample=at) for at, text in enumerate(["\\boxed{1}", "\\boxed{1.0}", HANGS, "\\boxed{2}", "1"])
    ]
    run(write_run(tmp_path, [rows], samples=5, has_gold=False), timeout_seconds=TIMEOUT)
    assert judged(tmp_path) == [
        ("right", None),
        ("right", None),
        ("unverifiable", f"timed out after {TIMEOUT:g} s"),
        ("wrong", None),
        ("right", None),
    ]


def test_gold_answers_may_be_there_for_some_prompts_only(tmp_path: Path) -> None:
    rows = [chain("g", "\\boxed{2}", "3", at) for at in range(2)] + [
        chain("n", "\\boxed{2}", " ", at) for at in range(2)
    ]
    run(write_run(tmp_path, [rows], samples=2))
    assert [(row["verdict"], row["basis"]) for row in verdicts(tmp_path)] == [("wrong", "gold")] * 2 + [
        ("right", "majority")
    ] * 2


# --- a run that goes on ---


def test_a_part_waits_for_the_other_samples_of_its_prompts(tmp_path: Path) -> None:
    first = [chain("p", "\\boxed{1}", sample=0), chain("q", "\\boxed{1}", sample=0), chain("q", "\\boxed{1}", sample=1)]
    write_run(tmp_path, [first], samples=2, has_gold=False)
    said = run(tmp_path)
    assert "1 part(s) wait for other samples" in said and "no verdicts yet" in said
    assert "again, when the run has gone on" in said and "jobs.export" not in said
    write_run(tmp_path, [[chain("p", "\\boxed{1.0}", sample=1)]], samples=2, has_gold=False)
    assert "select.answers=right_or_majority" in run(tmp_path)
    assert judged(tmp_path) == [("right", None)] * 4


def test_only_what_is_new_or_was_made_by_other_choices_is_made(tmp_path: Path) -> None:
    write_run(tmp_path, [[chain("a", "\\boxed{1/2}", "0.5")]])
    run(tmp_path)
    [first] = tmp_path.glob("*/verdicts/*.parquet")
    made = first.stat().st_mtime_ns
    write_run(tmp_path, [[chain("b", "\\boxed{1}", "1")]])
    run(tmp_path)
    assert first.stat().st_mtime_ns == made and judged(tmp_path) == [("right", None)] * 2
    assert "nothing to do, 2 part(s) have verdicts of the same settings" in run(tmp_path, num_workers=1, log_seconds=1)
    run(tmp_path, kind="text")
    assert judged(tmp_path) == [("wrong", None), ("right", None)]
    first.write_bytes(first.read_bytes()[:100])
    run(tmp_path, kind="text")
    assert judged(tmp_path) == [("wrong", None), ("right", None)], "a damaged one is made again"


def test_chains_stay_as_they_are_and_the_files_say_what_they_were_made_by(tmp_path: Path) -> None:
    write_run(tmp_path, [[chain("a", "\\boxed{1}", "1")], [chain("b", None, "1")]])
    before = digests(tmp_path)
    run(tmp_path)
    run(tmp_path, kind="math")
    assert digests(tmp_path) == before
    chains, judged_parts = (
        sorted(path.name for path in tmp_path.glob(f"s0/{kind}/*")) for kind in ("chains", "verdicts")
    )
    assert chains == judged_parts, "a verdicts file a part, and nothing else"
    file = pq.read_schema(next(tmp_path.glob("s0/verdicts/*")))
    assert file.remove_metadata() == VERDICTS
    settings = json.loads(file.metadata[b"settings"])
    assert file.metadata[b"fingerprint"] == b"f00d" and settings["kind"] == "math"
    assert {"math-verify", "sympy"} <= set(settings["libraries"])


def test_several_runs_are_verified_at_once_and_kinds_may_come_from_a_column(tmp_path: Path) -> None:
    extra = pa.schema([pa.field("form", pa.string())])
    rows = [
        chain("a", "\\boxed{1/2}", "0.5", input_form="text"),
        chain("b", "\\boxed{1/2}", "0.5", input_form="auto"),
        chain("c", "\\boxed{1/2}", "0.5", input_form=None),
    ]
    roots = [write_run(tmp_path / name, [rows], extra=extra) for name in ("one", "two")]
    run([str(root) for root in roots], kind_column="input_form")
    for root in roots:
        assert [verdict for verdict, _ in judged(root)] == ["wrong", "right", "right"]


ANSWERS = st.sampled_from(
    [None, "", "\\boxed{1}", "\\boxed{1.0}", "\\boxed{2}", "x", "(A)", "the answer is 1", "\\boxed{"]
)
GOLDS = st.sampled_from([None, "", "1", "A", "\\frac{2}{2}", "word", "\\frac"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(GOLDS, st.lists(ANSWERS, min_size=3, max_size=3)), min_size=1, max_size=6), st.data())
def test_each_chain_has_exactly_one_verdict(
    prompts: list[tuple[str | None, list[str | None]]], data: st.DataObject
) -> None:
    """Whatever the answers are, and whichever comparisons failed."""
    samples = [
        Sample(prompt_id=str(number), sample_index=at, gold=gold or None, kind=kind, extracted=extract(answer, kind))
        for number, (gold, answers) in enumerate(prompts)
        for kind in [kind_of(gold) if gold else None]
        for at, answer in enumerate(answers)
    ]
    ballots = {
        str(number): Ballot([sample for sample in samples if sample.prompt_id == str(number)])
        for number, (gold, _) in enumerate(prompts)
        if not gold
    }
    judging = PartJudging(data.draw(st.permutations(samples)), ballots, majority=0.5)
    outcomes = {
        comparison: Outcome(same=same, reason=None if same is not None else "timed out")
        for comparison in judging.comparisons()
        for same in [data.draw(st.sampled_from([True, False, None]))]
    }
    rows = judging.rows(outcomes)
    assert [(row["prompt_id"], row["sample_index"]) for row in rows] == [
        (sample.prompt_id, sample.sample_index) for sample in judging.samples
    ]
    for row in rows:
        assert set(row) == set(VERDICTS.names), "from_pylist drops unknown names without a word"
        assert (row["expected"] is None) == (row["basis"] is None) == (row["kind"] is None)
        assert row["verdict"] != "unverifiable" or row["reason"]
        assert row["extracted"] is not None or (row["verdict"] == "wrong" and row["reason"] == "no answer")
    pa.Table.from_pylist(rows, schema=VERDICTS)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_verdicts_lie_row_by_row_beside_the_chains(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    root = tmp_path_factory.mktemp("run")
    parts = [
        [chain(f"{part}-{row}", f"\\boxed{{{row}}}", "7") for row in range(size)] for part, size in enumerate(sizes)
    ]
    run(write_run(root, parts))
    for path in root.glob("s0/chains/*.parquet"):
        mine, theirs = pq.read_table(root / "s0" / "verdicts" / path.name), pq.read_table(path)
        assert mine["prompt_id"].to_pylist() == theirs["prompt_id"].to_pylist()
        assert [row == "right" for row in mine["verdict"].to_pylist()] == [
            name.endswith("-7") for name in mine["prompt_id"].to_pylist()
        ]
    assert len(verdicts(root)) == sum(sizes)


# --- being stopped, and other processes ---


def start(root: Path, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "jobs.verify", f"run={root}", "num_workers=2", f"timeout_seconds={TIMEOUT}"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    )


def wait_for_verdicts(root: Path, process: "subprocess.Popen[str]") -> Path:
    """The first verdicts file."""
    deadline = time.monotonic() + PATIENCE
    while not (found := sorted(root.glob("*/verdicts/part-*.parquet"))):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return found[0]


OF_HALF_HANGING = [("right", None), ("unverifiable", f"timed out after {TIMEOUT:g} s"), ("right", None)]


def half_hanging(root: Path) -> Path:
    """One part that is judged at once, and one that takes two timeouts at least."""
    return write_run(root, [[chain("a", "\\boxed{1}", "1")], [chain("b", HANGS, "1"), chain("c", "\\boxed{1}", "1")]])


def test_a_signal_stops_it_and_the_next_call_goes_on(tmp_path: Path) -> None:
    process = start(half_hanging(tmp_path))
    first = wait_for_verdicts(tmp_path, process)
    made = first.stat().st_mtime_ns
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, said
    assert "stopped: signal SIGTERM" in said and "Traceback" not in said
    assert judged(tmp_path) == [("right", None)]
    run(tmp_path, timeout_seconds=TIMEOUT)
    assert first.stat().st_mtime_ns == made
    assert judged(tmp_path) == OF_HALF_HANGING


def test_a_kill_leaves_neither_half_a_file_nor_a_worker_and_changes_no_verdict(tmp_path: Path) -> None:
    process = start(half_hanging(tmp_path), VERIFY_TEST=str(tmp_path))
    wait_for_verdicts(tmp_path, process)
    assert len(with_environment(f"VERIFY_TEST={tmp_path}")) >= 3, "itself and its workers"
    process.kill()
    process.communicate(timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while with_environment(f"VERIFY_TEST={tmp_path}"):
        assert time.monotonic() < deadline, "a worker outlives its job"
        time.sleep(0.1)
    assert judged(tmp_path) == [("right", None)], "what is there is whole"
    run(tmp_path, timeout_seconds=TIMEOUT)
    assert judged(tmp_path) == OF_HALF_HANGING


def with_environment(variable: str) -> list[int]:
    """Processes of this environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # it has just ended, or is not ours
            continue
    return found


def test_two_at_once_do_no_harm(tmp_path: Path) -> None:
    parts = [[chain(f"{part}-{row}", f"\\boxed{{{row}}}", "7") for row in range(30)] for part in range(6)]
    before = digests(write_run(tmp_path, parts))
    for process in [start(tmp_path), start(tmp_path)]:
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said
    assert digests(tmp_path) == before
    assert len(verdicts(tmp_path)) == 180
    assert len(list(tmp_path.glob("s0/verdicts/*"))) == len(list(tmp_path.glob("s0/verdicts/.*"))) + 6 == 6


# --- what cannot be used ---


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    assert "is no folder" in refused(tmp_path / "nowhere")
    assert "no readable run manifest" in refused(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert "holds no committed chains yet" in refused(tmp_path)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, [[chain("a", "1", "1")], [chain("b", "1", "1")]])
    for path in sorted(tmp_path.glob("s0/chains/*")):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert f"{path} is damaged" in refused(tmp_path)
        path.write_bytes(whole)


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, [[chain("a", "1")]], has_gold=False)
    assert "gold_column" in (said := refused(tmp_path)) and "'gold_answer'; it has prompt_id" in said
    assert "'input_truth'" in refused(tmp_path, gold_column="input_truth")
    assert "kind_column" in refused(tmp_path, gold_column="prompt", kind_column="input_kind")


def test_an_unknown_kind_in_a_row_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, [[chain("a", "1", "1")]])
    assert "kind_column: 'prompt_id' is 'a' at prompt_id 'a'" in refused(tmp_path, kind_column="prompt_id")


def test_every_choice_out_of_range_is_named() -> None:
    with pytest.raises(InvalidInput) as error:
        VerifyConfig(run=[], kind="maths", majority=1.0, timeout_seconds=0, num_workers=0)
    for name in ("run", "kind", "majority", "timeout_seconds", "num_workers"):
        assert f"{name}: " in str(error.value)


def test_the_command_line_says_what_it_can_and_what_is_wrong(tmp_path: Path) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "jobs.verify", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE)
        return done.returncode, done.stdout + done.stderr

    status, said = call("--help")
    assert status == 0 and "python -m jobs.verify run=outputs/toy" in said and "timeout_seconds" in said
    status, said = call()
    assert status == 2 and "run: not set" in said
    status, said = call(f"run={tmp_path}", "+majorty=1")
    assert status == 2 and "majorty: no such field" in said and "Traceback" not in said
