"""Whatever sections hold, a report shows it: as a page that needs nothing else, as data, on the terminal."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from time import process_time
from typing import Any

import polars as pl
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jobs.generate import generate
from jobs.report import to_config
from specreason_batch.accounting.figures import Basis, Chart, ChartKind, Figure, Report, RunReport, Section, Table
from specreason_batch.config import InputConfig, PolicyConfig
from specreason_batch.report import ReportConfig
from specreason_batch.report.digits import UNKNOWN, cell, column, interval, number, quantities, quantity
from specreason_batch.report.documents import as_document, as_json, chart_frames, figures_frame, table_frames
from specreason_batch.report.drawing import prepare
from specreason_batch.report.job import HEADLINE as REAL_HEADLINE
from specreason_batch.report.job import report, write_report
from specreason_batch.report.output import check_folder, replaced
from specreason_batch.report.page import as_html
from specreason_batch.report.plot import draw
from specreason_batch.report.runs import default_output, find_runs, labels
from specreason_batch.report.side_by_side import HeadlineFigure
from specreason_batch.report.terminal import tell
from specreason_batch.store.reading import scan
from specreason_batch.types import InvalidInput
from tests.conftest import ROOT
from tests.support.configs import NUM_PROMPTS, make_config, write_models, write_prompts
from tests.support.scripted_job import scripted_engines

EVIL = '<script>alert("x")</script>&amp;</td>'
HEADLINE = [HeadlineFigure("tokens", name) for name in ("generated", "acceptance", "not_there")]
NAN, INFINITY = float("nan"), float("inf")

FIGURES = (
    Figure(name="generated", label="generated", value=1234567, unit="tokens"),
    Figure(name="acceptance", label="drafts accepted", value=66.6667, unit="%", low=61.2, high=71.93),
    Figure(name="cost", label="cost", value=0.01234, unit="USD", basis=Basis.modelled, note="at 2 USD an hour"),
    Figure(name="share", label="share", value=0.5, basis=Basis.attributed, note="by tokens"),
    Figure(name="accuracy", label="accuracy", value=None, unit="%", note="no gold answers"),
    Figure(name="ratio", label="ratio", value=NAN, low=-INFINITY, high=INFINITY, note="0 by 0"),
)
PHASES = Table(
    name="phases",
    title="By phase",
    frame=pl.DataFrame({"phase": ["draft", "base"], "num_tokens": [1234567, 8], "share": [0.25, None]}),
    labels={"phase": "what"},
    units={"share": "%"},
    note="as the engines count",
)
ENDS = Chart(
    name="ends",
    title="How chains end",
    kind=ChartKind.bar,
    frame=pl.DataFrame({"end": ["closed", "budget"], "chains": [9, 1]}),
    x="end",
    y=("chains",),
)
TOKENS = Section(
    name="tokens", title="Tokens", text="What was generated.", figures=FIGURES, tables=(PHASES,), charts=(ENDS,)
)


def run_report(label: str = "run", **changes: Any) -> RunReport:
    values = {"output_dir": f"out/{label}", "policy": "specreason", "is_finished": True, "sections": (TOKENS,)}
    return RunReport(label=label, **{**values, **changes})


def report_of(*runs: RunReport, **changes: Any) -> Report:
    return Report(runs=runs or (run_report(),), made_at=1.7e9, command="python -m jobs.report runs=out", **changes)


# --- a page, read as a browser would ---

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Every tag closed in its turn, or it is an error; what is referred to; the text."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        self.text = " ".join(self.text.split())
        assert not self.open, f"left open: {self.open}"
        assert len(set(self.ids)) == len(self.ids), "an id twice"
        assert {link[1:] for link in self.links} <= {*self.ids} and all(link[0] == "#" for link in self.links)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            assert not name.startswith("on") and name != "src", f"{name} in <{tag}>"
            if name == "id":
                self.ids.append(value or "")
            if name.endswith("href"):
                self.links.append(value or "")
            self.links += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & {*self.open}:
            self.text += f" {data}"


def page(report: Report) -> Page:
    html = as_html(report, HEADLINE)
    assert "http" not in html and "@import" not in html and "script" not in Page(html).tags
    return Page(html)


def test_the_page_needs_nothing_else_and_holds_every_figure_with_its_basis() -> None:
    found = page(report_of())
    for text in ("1,234,567 tokens", "66.7%", "(61.2 to 71.9)", "0.0123 USD", "at 2 USD an hour", "no gold answers"):
        assert text in found.text, text
    for figure in FIGURES:
        assert re.search(rf"{figure.label} {figure.basis}", found.text), figure.name
    for text in ("what", "share (%)", "0.25", "as the engines count"):
        assert text in found.text, text
    assert found.tags["svg"] == 1 and "closed" in found.text
    assert "tokens" in found.ids and "#tokens" in found.links


def test_runs_are_beside_each_other_and_unfinished_ones_say_so() -> None:
    changed = replace(TOKENS, figures=(replace(FIGURES[0], value=7, note="fewer"), *FIGURES[1:-1]))
    runs = (run_report("a"), run_report("b", sections=(changed,), is_finished=False), run_report("c", sections=()))
    comparison = Section(name="comparison", title="Side by side", text="All together.")
    found = page(report_of(*runs, comparison=comparison, warnings=("b: 3 of 9 chains",)))
    assert re.search(r"generated measured b: fewer 1,234,567 tokens 7 tokens", found.text)
    assert re.search(r"ratio measured 0 by 0", found.text)
    assert found.text.index("3 of 9 chains") < found.text.index("1,234,567") < found.text.index("All together")
    assert found.text.count("not finished") == 1 and found.tags["svg"] == 2


def test_the_same_table_of_several_runs_is_one_table_on_the_page() -> None:
    long = replace(PHASES, frame=pl.DataFrame({"n": range(1000, 1100)}), note="long")
    of_one = replace(PHASES, name="own", title="Only in b")
    changed = replace(TOKENS, tables=(replace(long, note="longer"), of_one), text="Other.")
    runs = [run_report(name, sections=(replace(TOKENS, tables=(long,)),)) for name in ("a", "c")]
    found = page(report_of(runs[0], run_report("b", sections=(changed,)), runs[1]))
    assert "a, c: long; b: longer" in found.text and "a, c: What was generated." in found.text
    assert "The first 48 of 300 rows" in found.text and found.text.count("1,015") == 3 and "1,016" not in found.text
    assert "Only in b: b" in found.text and found.tags["details"] == 1, "a long table is folded"


def test_text_from_anywhere_is_inert() -> None:
    frame = pl.DataFrame({EVIL: [EVIL, "$b_{$"], "by": [EVIL, "_hidden"], "n": [1, 2]})
    table = replace(PHASES, title=EVIL, frame=frame, labels={}, units={"n": EVIL}, note=EVIL)
    chart = Chart(
        name="evil", title=EVIL, kind=ChartKind.line, frame=frame, x=EVIL, y=("n",), by="by", marks={EVIL: 0.5}
    )
    figure = Figure(name="evil", label=EVIL, value=1, unit=EVIL, note=EVIL)
    section = Section(name="evil", title=EVIL, text=EVIL, figures=(figure,), tables=(table,), charts=(chart,))
    runs = [run_report(f"{EVIL}{n}", output_dir=EVIL, policy=EVIL, sections=(section,)) for n in range(2)]
    found = page(replace(report_of(*runs), warnings=(EVIL,), command=EVIL))
    assert found.text.count(EVIL) > 15, "it stands there as text"


def test_a_long_table_is_cut_and_says_where_the_rest_is() -> None:
    table = replace(PHASES, frame=pl.DataFrame({"n": range(1000)}))
    found = page(report_of(run_report(sections=(replace(TOKENS, tables=(table,)),))))
    assert "The first 50 of 1000 rows" in found.text and "tables/tokens__phases.parquet" in found.text
    assert found.tags["tr"] < 100


def test_a_page_of_nothing_is_a_page() -> None:
    empty = Section(name="empty", title="Empty", tables=(replace(PHASES, frame=PHASES.frame.head(0)),))
    assert "no rows" in page(report_of(run_report(sections=(empty, replace(empty, name="other", tables=()))))).text


# --- charts ---

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LONG = [f"a category with a name that goes on and on and on, number {n}" for n in range(60)]
FRAMES = {
    "empty": pl.DataFrame({"x": [], "a": [], "b": []}, schema={"x": pl.Int64, "a": pl.Float64, "b": pl.Float64}),
    "one point": pl.DataFrame({"x": [3], "a": [1.0], "b": [2.0]}),
    "nulls": pl.DataFrame({"x": [1, 2, None, 4], "a": [1.0, None, 3.0, NAN], "b": [None, INFINITY, 1.0, 2.0]}),
    "only nulls": pl.DataFrame({"x": [1, 2], "a": [None, None], "b": [NAN, NAN]}, schema_overrides={"a": pl.Float64}),
    "zeros": pl.DataFrame({"x": [1, 2], "a": [0, 0], "b": [0, 0]}),
    "negative": pl.DataFrame({"x": [1, 2, 3], "a": [-5, 3, -1], "b": [2, 2, -2]}),
    "unsorted": pl.DataFrame({"x": [3, 1, 2], "a": [3, 1, 2], "b": [1, 1, 1]}),
    "huge": pl.DataFrame({"x": [1, 2], "a": [1e12, 3e12], "b": [1e-9, 2e-9]}),
    "times": pl.DataFrame({"x": [NOON + timedelta(minutes=n) for n in range(50)], "a": range(50), "b": range(50)}),
    "durations": pl.DataFrame({"x": [timedelta(minutes=n) for n in range(5)], "a": range(5), "b": range(5)}),
    "names": pl.DataFrame({"x": LONG, "a": range(60), "b": range(60)}),
    "flags": pl.DataFrame({"x": [True, False], "a": [1, 2], "b": [2, 1]}),
    "decimals": pl.DataFrame({"x": [0.1, 0.2, 0.30000000000000004], "a": [1, 2, 3], "b": [3, 2, 1]}),
    "many": pl.DataFrame({"x": range(10_000), "a": range(10_000), "b": [n % 100 for n in range(10_000)]}),
}


def chart_of(frame: pl.DataFrame, kind: ChartKind = ChartKind.line, **changes: Any) -> Chart:
    return Chart(**{"name": "c", "title": "C", "kind": kind, "frame": frame, "x": "x", "y": ("a", "b"), **changes})


def drawn(chart: Chart, key: str = "key") -> tuple[str, str]:
    [found] = draw([chart], [key])
    return found


@pytest.mark.parametrize("kind", ChartKind)
@pytest.mark.parametrize("name", FRAMES)
def test_every_kind_of_chart_takes_awkward_data(name: str, kind: ChartKind) -> None:
    began = process_time()
    svg, left_out = drawn(chart_of(FRAMES[name], kind, marks={"p50": 1.5, "p51": 1.51, "p99": 2}))
    assert process_time() - began < 5
    assert len(svg) < 150_000
    if name in ("empty", "only nulls"):
        assert (svg, left_out) == ("", "nothing to draw")
        return
    found = Page(svg)
    assert all(mark in found.text for mark in ("p50 1.50", "p51 1.51", "p99 2"))
    assert left_out == ("the first 40 of 60 are drawn" if name == "names" else "")


@pytest.mark.parametrize("kind", ChartKind)
def test_series_may_come_one_below_the_other(kind: ChartKind) -> None:
    frame = pl.DataFrame({"x": [1, 2, 2, 3], "who": ["_a", "_a", None, None], "n": [1, 2, 3, 4]})
    chart = chart_of(frame, kind, y=("n",), by="who")
    drawing = prepare(chart)
    assert drawing is not None and list(drawing.x) == [1, 2, 3]
    assert [series.label for series in drawing.series] == ["_a", UNKNOWN]
    assert drawing.series[0].y.tolist()[:2] == [1, 2] and drawing.series[1].y.tolist()[1:] == [3, 4]
    assert "_a" in Page(drawn(chart)[0]).text, "in the legend"


def test_more_series_than_colours_are_told_apart() -> None:
    frame = pl.DataFrame({"x": [1, 2]} | {f"s{n}": [n, n] for n in range(12)})
    for kind in ChartKind:
        text = Page(drawn(chart_of(frame, kind, y=tuple(f"s{n}" for n in range(12))))[0]).text
        assert all(f"s{n}" in text for n in range(12))


def test_charts_of_several_runs_have_the_same_scales_and_colours() -> None:
    small = chart_of(pl.DataFrame({"x": [1, 2], "who": ["base", "base"], "n": [1, 2]}), y=("n",), by="who")
    great = chart_of(pl.DataFrame({"x": [1, 4], "who": ["draft", "base"], "n": [7, 1]}), y=("n",), by="who")
    apart, together = Page(drawn(small)[0]).text, [Page(svg).text for svg, _ in draw([small, great], ["a", "b"])]
    assert " 6 " not in apart and all(" 6 " in text for text in together)
    colours = [set(re.findall(r"#0072b2|#e69f00", svg)) for svg, _ in draw([great, small], ["a", "b"])]
    assert colours == [{"#0072b2", "#e69f00"}, {"#e69f00"}], "base is the second here and there"
    huge = replace(great, frame=great.frame.with_columns(pl.col("n") * 1000))
    assert "2,000" not in Page(draw([small, huge], ["a", "b"])[0][0]).text, "nothing would be seen of it"
    assert draw([small, chart_of(FRAMES["empty"])], ["a", "b"])[1] == ("", "nothing to draw")


def test_the_highest_bar_does_not_touch_the_end_of_its_axis() -> None:
    frame = pl.DataFrame({"x": [1, 2], "a": [3, 37], "b": [1, 0]})
    svg, _ = drawn(chart_of(frame, ChartKind.stacked_bar))
    bars, background = _top(svg, " clip-path=[^>]*#0072b2"), _top(svg, ' style="fill: #ffffff')
    assert background < bars - 3, "in points, from the top of the picture"


def _top(svg: str, look: str) -> float:
    """Of everything that looks like this, but the picture's own background."""
    paths = re.findall(rf'<path d="([^"]*)"{look}', svg)
    heights = [float(y) for path in paths for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)]
    return min(height for height in heights if height > 0)


def test_thinning_keeps_every_peak() -> None:
    values = [0.0] * 100_000
    values[77_777], values[5] = 9.0, -9.0
    drawing = prepare(chart_of(pl.DataFrame({"x": range(100_000), "a": values}), y=("a",)))
    assert drawing is not None and len(drawing.x) <= 1002
    assert (drawing.series[0].y.max(), drawing.series[0].y.min()) == (9.0, -9.0)
    assert (drawing.x[0], drawing.x[-1]) == (0, 99_999)


def test_the_same_chart_gives_the_same_bytes_and_no_two_share_ids() -> None:
    chart = chart_of(FRAMES["negative"], ChartKind.stacked_area)
    assert drawn(chart, "one") == drawn(chart, "one")
    Page(drawn(chart, "one")[0] + drawn(chart, "two")[0])


# --- as data ---


def test_json_and_parquet_hold_the_same_figures() -> None:
    comparison = Section(name="comparison", title="Side by side", figures=FIGURES[:1])
    report = report_of(run_report("a"), run_report("b"), comparison=comparison)
    document = json.loads(as_json(report), parse_constant=pytest.fail)
    sections = [(None, "comparison", document["comparison"])]
    sections += [(run["label"], name, item) for run in document["runs"] for name, item in run["sections"].items()]
    rows = [
        {"run": run, "section": section, "name": name, **figure}
        for run, section, item in sections
        for name, figure in item["figures"].items()
    ]
    assert figures_frame(report).to_dicts() == rows and len(rows) == 13
    for figure in FIGURES[:5]:
        found = document["runs"][1]["sections"]["tokens"]["figures"][figure.name]
        assert (found["value"], found["low"], found["high"]) == (figure.value, figure.low, figure.high)
        assert (found["unit"], found["basis"], found["note"]) == (figure.unit, figure.basis, figure.note)
    ratio = document["runs"][0]["sections"]["tokens"]["figures"]["ratio"]
    assert (ratio["value"], ratio["low"], ratio["high"], ratio["note"]) == (None, None, None, "0 by 0")
    table = document["runs"][0]["sections"]["tokens"]["tables"]["phases"]
    assert table["rows"] == PHASES.frame.to_dicts() and table["units"] == {"share": "%"}


def test_tables_of_all_runs_are_one_with_a_column_that_says_whose() -> None:
    longer = replace(PHASES, frame=PHASES.frame.with_columns(extra=pl.lit(1), share=pl.lit(None)))
    own = replace(PHASES, name="all", frame=pl.DataFrame({"run": ["a"], "n": [1]}))
    report = report_of(
        run_report("a"),
        run_report("b", sections=(replace(TOKENS, tables=(longer,)),)),
        comparison=Section(name="comparison", title="", tables=(own,)),
    )
    found = table_frames(report)
    assert list(found) == ["comparison__all", "tokens__phases"]
    assert found["comparison__all"].to_dicts() == [{"run": "a", "n": 1}]
    assert found["tokens__phases"]["run"].to_list() == ["a", "a", "b", "b"]
    assert found["tokens__phases"]["extra"].to_list() == [None, None, 1, 1]
    assert chart_frames(report)["tokens__ends"].height == 4


@settings(max_examples=100)
@given(st.lists(st.one_of(st.none(), st.integers(-(10**12), 10**12), st.floats()), min_size=1, max_size=8))
def test_any_number_can_be_written_and_read(values: list[float | None]) -> None:
    figures = tuple(Figure(name=f"f{n}", label="", value=value, low=value, unit="s") for n, value in enumerate(values))
    report = report_of(run_report(sections=(Section(name="s", title="", figures=figures),)))
    read = json.loads(as_json(report))["runs"][0]["sections"]["s"]["figures"]
    kept = [float(f"{value:.12g}") if value is not None and abs(value) < INFINITY else None for value in values]
    assert [read[f"f{n}"]["value"] for n in range(len(values))] == kept == figures_frame(report)["value"].to_list()
    assert all(quantity(value, "s") for value in values)


def test_a_name_used_twice_is_a_broken_section() -> None:
    twice = replace(TOKENS, figures=(FIGURES[0], FIGURES[0]))
    for sections in ((TOKENS, TOKENS), (twice,), (replace(TOKENS, name="../x"),)):
        with pytest.raises(AssertionError, match=r"used twice|snake_case"):
            as_document(report_of(run_report(sections=sections)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, UNKNOWN),
        (NAN, UNKNOWN),
        (-INFINITY, UNKNOWN),
        (0, "0"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (1234567.8, "1,234,568"),
        (123.45, "123.5"),
        (66.6667, "66.7"),
        (-1.2345, "-1.23"),
        (0.012345, "0.0123"),
        (0.00001234, "0.0000123"),
        (0.0000001234, "1.23e-07"),
        (1e18, "1e+18"),
        (1.0, "1"),
        (0.9999, "1.000"),
    ],
)
def test_numbers_have_sensible_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_units_and_intervals() -> None:
    assert (
        quantity(66.6667, "%") == "66.7%" and quantity(12, "tokens") == "12 tokens" and quantity(None, "s") == UNKNOWN
    )
    assert quantity(59.5, "s") == "59.5 s" and quantity(7500.0, "s") == "7,500 s (2 h 05 min)"
    assert quantity(3599.9, "s") == "3,600 s (1 h 00 min)"
    assert interval(None, None) == "" and interval(1.5, None) == f"1.5 to {UNKNOWN}"
    assert quantities([0.0175, None, 0.0081], "s") == ["17.5 ms", UNKNOWN, "8.1 ms"] and quantity(8e-05, "s") == "80 µs"
    assert quantities([98.0, 99.5, 0.0], "%") == ["98.0%", "99.5%", "0%"]
    assert interval(96.0, 99.5) == "96.0 to 99.5" and column([0.5, 99.5, None, 0.0]) == ["0.5", "99.5", UNKNOWN, "0"]
    assert [cell(value) for value in (None, True, 0.5, "a", [1, None], NOON, timedelta(seconds=3))] == [
        *(UNKNOWN, "yes", "0.500", "a", f"1, {UNKNOWN}", "2026-01-01 12:00:00+00:00", "3 s")
    ]


# --- on the terminal ---


def told(report: Report, sections: Sequence[str] = (), width: int = 140) -> str:
    console = Console(file=StringIO(), width=width)
    tell(report, HEADLINE, sections, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_headline_is_all_unless_sections_are_asked_for() -> None:
    text = told(report_of(warnings=("mind [the] gap",)))
    assert text.startswith("warning: mind [the] gap\n")
    assert re.search(r"generated +1,234,567 tokens +measured", text) and "61.2 to 71.9" in text
    assert len(text.splitlines()) < 10 and "By phase" not in text
    text = told(report_of(), ["tokens"])
    for part in ("What was generated.", "By phase", "at 2 USD an hour", "as the engines count", "How chains end"):
        assert part in text, part


def test_more_runs_than_fit_go_below() -> None:
    runs = [run_report(f"run-{n}") for n in range(9)]
    text = told(report_of(*runs), width=80)
    assert all(f"run-{n}" in text for n in range(9)) and text.count("1,234,567 tokens") == 9
    assert max(map(len, text.splitlines())) <= 80


def test_markup_in_names_is_text() -> None:
    figure = replace(FIGURES[0], label="[red]x[/red]", note="[b]")
    runs = [run_report(f"[bold]{n}", sections=(replace(TOKENS, figures=(figure,)),)) for n in range(2)]
    text = told(report_of(*runs), ["tokens"])
    assert "[bold]0" in text and "[red]x[/red]" in text and "1: [b]" in text


# --- files ---


def written(report: Report, folder: Path) -> dict[str, bytes]:
    write_report(report, HEADLINE, folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def test_the_same_figures_give_the_same_bytes(tmp_path: Path) -> None:
    first = written(report_of(), tmp_path / "a")
    assert list(first) == [
        *(
            "charts/tokens__ends.parquet",
            "figures.parquet",
            "report.html",
            "report.json",
            "tables/tokens__phases.parquet",
        )
    ]
    assert first == written(report_of(), tmp_path / "b")
    later = written(replace(report_of(), made_at=1.8e9), tmp_path / "b")
    assert {name for name in first if first[name] != later[name]} == {"report.html", "report.json"}


def test_a_report_takes_the_place_of_an_earlier_one_and_of_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    written(report_of(), folder)
    after = written(report_of(run_report(sections=())), folder)
    assert list(after) == ["figures.parquet", "report.html", "report.json"], "nothing of the earlier one is left"
    assert [path.name for path in folder.parent.iterdir()] == ["report"], "nothing beside it"
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInput, match=r"output: .*report holds 'notes\.txt', which is of no report"):
        check_folder(folder)
    with pytest.raises(InvalidInput, match="notes"):
        write_report(report_of(), HEADLINE, folder)
    assert (folder / "notes.txt").read_text() == "mine" and len(list(folder.parent.iterdir())) == 1
    with pytest.raises(InvalidInput, match="is a file"):
        check_folder(folder / "report.html")


def test_a_link_to_a_report_stays_a_link(tmp_path: Path) -> None:
    written(report_of(), tmp_path / "elsewhere" / "report")
    (tmp_path / "report").symlink_to(tmp_path / "elsewhere" / "report")
    assert "figures.parquet" in written(report_of(run_report(sections=())), tmp_path / "report")
    assert (tmp_path / "report").is_symlink() and not (tmp_path / "elsewhere" / "report" / "tables").exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_what_comes_into_the_folder_meanwhile_stays(tmp_path: Path) -> None:
    """As when a shard of the run is called `report`, and is begun now."""
    with pytest.raises(InvalidInput, match="holds 'chains'"), replaced(tmp_path / "report") as staged:
        (staged / "report.html").touch()
        (tmp_path / "report" / "chains").mkdir(parents=True)
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["chains"]


def test_a_report_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    before = written(report_of(), tmp_path / "report")
    broken = replace(TOKENS, charts=(replace(ENDS, x="no such column"),))
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        write_report(report_of(run_report(sections=(broken,))), HEADLINE, tmp_path / "report")
    kept = {path.relative_to(tmp_path / "report").as_posix(): path for path in (tmp_path / "report").rglob("*.*")}
    assert {name: path.read_bytes() for name, path in kept.items()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


# --- which runs ---


def test_labels_are_the_shortest_ends_that_tell_runs_apart() -> None:
    paths = [Path("/out/a/run"), Path("/out/b/run"), Path("/out/c/other"), Path("/out/d/b/run")]
    assert labels(paths) == ["a/run", "out/b/run", "other", "d/b/run"]
    assert labels([Path("/out/run")]) == ["run"]


def test_a_run_given_twice_is_refused_however_it_is_spelt(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for second in (tmp_path / "run", tmp_path / "run" / ".." / "run", tmp_path / "link"):
        with pytest.raises(InvalidInput, match="given twice"):
            find_runs([str(tmp_path / "run"), str(second)])


def test_a_glob_stands_for_the_runs_it_finds(tmp_path: Path) -> None:
    for name in ("b", "a", "no-run"):
        (tmp_path / name).mkdir()
    for name in ("b", "a"):
        (tmp_path / name / "run.json").write_text("{}")
    assert find_runs([f"{tmp_path}/*"]) == [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(InvalidInput, match=r"runs: '.*c\*' finds no folder with a run\.json"):
        find_runs([f"{tmp_path}/c*"])


def test_a_report_lies_in_its_run_or_beside_its_runs(tmp_path: Path) -> None:
    assert default_output([tmp_path / "a"]) == tmp_path / "a" / "report"
    assert default_output([tmp_path / "a", tmp_path / "b"]) == tmp_path / "report"
    with pytest.raises(InvalidInput, match="output: not set"):
        default_output([tmp_path / "a", tmp_path / "b" / "c"])


# --- the whole job, on runs that the real one has made (with scripted engines) ---

EVERY_SECTION = ["chains", "tokens", "wall_clock", "cost", "acceptance", "latency", "whatif"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `specreason` and `base_only`, of two shards each."""
    folder = tmp_path_factory.mktemp("runs")
    write_models(folder / "models")
    for shard in ("one", "two"):
        write_prompts(folder / "prompts" / f"{shard}.parquet", prompt_id=[f"{shard} {n}" for n in range(NUM_PROMPTS)])
    for policy in ("specreason", "base_only"):
        config = make_config(
            folder,
            output_dir=str(folder / "out" / policy),
            input=InputConfig(path=str(folder / "prompts")),
            policy=PolicyConfig(name=policy, threshold=4.0),
        )
        generate(config, Console(file=StringIO()), scripted_engines)
    return folder / "out"


@pytest.fixture
def own(runs: Path, tmp_path: Path) -> Path:
    """Those runs, for one test alone."""
    return Path(shutil.copytree(runs, tmp_path / "out"))


def made(output: Path | None = None, **choices: Any) -> tuple[Report, str]:
    """The report, and what the terminal shows."""
    console = Console(file=StringIO(), width=140)
    found = report(ReportConfig(output=str(output) if output else None, **choices), console)
    assert isinstance(console.file, StringIO)
    return found, console.file.getvalue()


def run_job(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.report", *words]
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_job_as_a_user_runs_it(own: Path) -> None:
    done = run_job(f"runs=[{own}/specreason,{own}/base_only]", "sections=[cost]", "latency=h200_32b")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"{own}/report/report.html" in done.stdout and "base_only" in done.stdout and "core-hours" in done.stdout
    document = json.loads((own / "report" / "report.json").read_text())
    assert [run["label"] for run in document["runs"]] == ["specreason", "base_only"]
    assert document["command"].startswith("python -m jobs.report 'runs=[") and document["comparison"]["tables"]
    for run in document["runs"]:
        kept = scan(Path(run["output_dir"]), "steps")
        assert kept is not None and run["is_finished"]
        num_tokens = kept.select(pl.col("num_tokens").sum()).collect().item()
        figures = run["sections"]["tokens"]["figures"]
        assert run["sections"]["chains"]["figures"]["num_chains"]["value"] == 2 * NUM_PROMPTS
        assert figures["kept_tokens"]["value"] - figures["answer_tokens"]["value"] == num_tokens
    html = (own / "report" / "report.html").read_text()
    assert "http" not in html
    found = Page(html)
    assert {*EVERY_SECTION, "comparison"} <= {*found.ids} and found.tags["svg"] > 20
    done = run_job(f"runs={own}/specreason", "sections=[cots]")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: sections: 'cots'; allowed: headline, all, or some of [{','.join(EVERY_SECTION)}]\n"
    assert not (own / "specreason" / "report").exists()


def test_a_report_in_a_run_is_no_part_of_the_run(own: Path) -> None:
    first, text = made(runs=str(own / "specreason"), sections="all")
    assert [section.name for section in first.runs[0].sections] == EVERY_SECTION and first.comparison is None
    assert all(section.title in text for section in first.runs[0].sections) and not first.warnings
    second, text = made(runs=str(own / "specreason"))
    assert replace(second, made_at=0.0).runs[0].section("tokens").figures == first.runs[0].section("tokens").figures
    assert len(text.splitlines()) < 40
    names = {(section.name, figure.name) for section in first.runs[0].sections for figure in section.figures}
    given_constants = {("latency", "stream_seconds_mean"), ("latency", "stream_speed_up")}
    assert {(wanted.section, wanted.name) for wanted in REAL_HEADLINE} - given_constants <= names


def test_the_same_runs_give_the_same_report(runs: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        made(tmp_path / name, runs=[str(runs / "*")])
    files = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*.*"))]
    differing = {
        str(file) for file in files if (tmp_path / "a" / file).read_bytes() != (tmp_path / "b" / file).read_bytes()
    }
    assert {"report.html", "figures.parquet", "tables/cost__devices.parquet"} <= set(map(str, files))
    assert differing <= {"report.json", "report.html"}, "which say when they were made"
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("a", "b"))
    assert first | {"made_at": second["made_at"]} == second


def test_a_run_that_is_not_finished_says_so(own: Path) -> None:
    shutil.rmtree(own / "specreason" / "two")
    found, text = made(runs=[str(own / "specreason")])
    assert not found.runs[0].is_finished
    assert "warning: specreason: not finished: figures are of the 12 committed chains of 24" in text
    assert "not finished" in Page((own / "specreason" / "report" / "report.html").read_text()).text
    found, text = made(own / "both", runs=[str(own / "*")])
    assert any("specreason is not finished" in warning for warning in found.warnings)


def test_what_cannot_be_used_is_refused_by_name_and_nothing_is_written(own: Path) -> None:
    (own / "empty").mkdir()
    shutil.copytree(own / "specreason", own / "begun", ignore=lambda *_: ["one", "two"])
    run, other = str(own / "specreason"), str(own / "base_only")
    (own / "run.txt").write_text("mine")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"runs": str(own / "empty")}, r"empty/run\.json: no readable run manifest"),
        ({"runs": str(own / "nowhere")}, r"nowhere/run\.json"),
        ({"runs": [run, str(own / "begun")]}, "begun: no chain is committed yet"),
        ({"runs": [run, run + "/"]}, "given twice"),
        ({"runs": str(own / "no*")}, "finds no folder"),
        ({"runs": run, "sections": ["tokens", "x"]}, "sections: 'x'; allowed: headline, all, or some of"),
        ({"runs": [run, other], "baseline": "x"}, "baseline: 'x'; allowed: one of specreason, base_only"),
        ({"runs": run, "calibration": str(own / "x.json")}, "latency: .*x.json"),
        ({"runs": run, "output": own / "run.txt"}, "run.txt is a file"),
        ({"runs": run, "output": own / "specreason"}, "holds 'one', which is of no report"),
    ]
    before = sorted(own.rglob("*"))
    for choices, message in cases:
        with pytest.raises(InvalidInput, match=message):
            made(**choices)
        assert sorted(own.rglob("*")) == before, choices


def test_choices_out_of_range_are_all_named_at_once() -> None:
    with pytest.raises(InvalidInput, match=r"runs: not set.*\noutput: ' ' is empty.*\nsections: \[3\]; allowed"):
        ReportConfig(runs=[], output=" ", sections=[3])


@pytest.fixture
def _conf() -> Iterator[None]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


@pytest.mark.usefixtures("_conf")
def test_the_command_line_is_typed() -> None:
    words = ["runs=[a,b*]", "latency=h200_32b", "cost.device_hour.H100=1.5", "+cost.device_hour.B200=6"]
    config = to_config(compose("report", words))
    assert config.run_names == ["a", "b*"] and config.latency is not None
    assert config.cost.device_hour["H100"] == 1.5 and config.cost.device_hour["B200"] == 6
    assert to_config(compose("report", ["runs=a"])).latency is None
    with pytest.raises(InvalidInput, match="runs: not set; it needs a value"):
        to_config(compose("report", []))
    with pytest.raises(InvalidInput, match="format: no such field"):
        to_config(compose("report", ["runs=a", "+format=pdf"]))
    with pytest.raises(InvalidInput, match=r"cost\.core_hour: -1\.0 is out of range; allowed: at least 0"):
        to_config(compose("report", ["runs=a", "cost.core_hour=-1"]))
    with pytest.raises(InvalidInput, match=r"calibration: 'c\.json' beside latency"):
        to_config(compose("report", ["runs=a", "calibration=c.json", "latency=h200_32b"]))
