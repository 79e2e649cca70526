"""Other thresholds and readings, replayed: against the run itself, against cases by hand, and against plain loops."""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from jobs.generate import generate
from specreason_batch.accounting import whatif
from specreason_batch.accounting.attribution import rates
from specreason_batch.accounting.figures import Basis, Section
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.thresholds import EXPECTED, GREEDY, YES_NO, Grading, replay
from specreason_batch.config import JudgeConfig, PolicyConfig
from specreason_batch.judge import Reading
from specreason_batch.rounds import PhaseStats, RoundStats
from specreason_batch.types import Phase, Role
from tests.support.configs import make_config, write_models, write_prompts
from tests.support.recorded import Done, Kept, Recorded
from tests.support.scripted_job import scripted_engines

OWN_THRESHOLD = 7.0
MASS_FLOOR = 0.5


def digits(**probs: float) -> tuple[float, ...]:
    """Probabilities of ten digits, by d<digit>."""
    return tuple(probs.get(f"d{digit}", 0.0) for digit in range(10))


def expected_score(probs: tuple[float, ...]) -> float | None:
    """As the judge reads it."""
    mass = sum(probs)
    return sum(digit * prob for digit, prob in enumerate(probs)) / mass if mass >= MASS_FLOOR else None


def graded(drafted: int, rewritten: int, probs: tuple[float, ...], threshold: float = OWN_THRESHOLD) -> Kept:
    """A drafted step, kept or rewritten as a run of this threshold decides."""
    score = expected_score(probs)
    if score is not None and score >= threshold:
        return Kept(tokens=drafted, probs=probs, score=score)
    return Kept(tokens=rewritten, rejected=drafted, probs=probs, score=score)


def section_of(run: RunFiles) -> Section:
    section = whatif.section(run)
    assert section is not None
    return section


def at(section: Section, reading: str, threshold: float) -> dict[str, Any]:
    """The curve's row."""
    return section.table(reading).frame.filter(threshold=threshold).row(0, named=True)


# --- against the run itself ---

JUDGES = {
    Reading.expected: (JudgeConfig(question="so 0-9?", reply_opening="so: "), 4.6),
    Reading.greedy: (JudgeConfig(question="so 0-9?", reply_opening="so: ", reading=Reading.greedy), 5.0),
}


@pytest.mark.parametrize("reading", JUDGES)
@pytest.mark.parametrize("first_n_base_steps", [0, 2])
def test_at_its_own_threshold_and_reading_a_run_is_reproduced_exactly(
    reading: Reading, first_n_base_steps: int, tmp_path: Path
) -> None:
    judge, threshold = JUDGES[reading]
    write_models(tmp_path / "models")
    write_prompts(tmp_path / "prompts.parquet")
    policy = PolicyConfig(name="specreason", threshold=threshold, first_n_base_steps=first_n_base_steps)
    generate(make_config(tmp_path, judge=judge, policy=policy), Console(file=StringIO()), scripted_engines)
    run = RunFiles(tmp_path / "output", "run")
    names = ("num_draft_tokens_kept", "num_draft_tokens_rejected", "num_base_tokens", "num_answer_tokens")
    kept, rejected, base, answers = run.chains.select(pl.col(*names).sum()).collect().row(0)
    decided = run.steps.select("accepted").collect()["accepted"].drop_nulls()
    assert 0 < decided.sum() < len(decided) and base and answers, "the run says nothing"
    section = section_of(run)
    spent = rates(run)
    assert spent is not None
    assert at(section, reading, threshold) == {
        "threshold": threshold,
        "acceptance": pytest.approx(100 * decided.sum() / len(decided), rel=1e-12),
        "draft_tokens_kept": kept,
        "draft_tokens_rejected": rejected,
        "base_tokens": base,
        "answer_tokens": answers,
        "generated_tokens": kept + rejected + base + answers,
        "seconds": spent.seconds,
        "seconds_change": 0.0,
        "same_chains": 100.0,
        "same_steps": 100.0,
    }
    assert section.figure("acceptance").value == at(section, reading, threshold)["acceptance"]


def test_a_threshold_between_those_of_the_grid_is_replayed_too(tmp_path: Path) -> None:
    steps = [graded(10, 20, digits(d7=0.5, d8=0.5), threshold=7.4)]
    section = section_of(Recorded(folder=tmp_path, threshold=7.4).part([Done(steps=steps)]).open())
    assert at(section, EXPECTED, 7.4)["acceptance"] == 100.0
    assert at(section, EXPECTED, 7.5)["acceptance"] == 100.0
    assert at(section, EXPECTED, 7.75)["acceptance"] == 0.0
    assert 7.4 not in section.table(GREEDY).frame["threshold"], "it is the other reading's"


# --- by hand ---

EIGHT, SIX, TWO = digits(d8=1.0), digits(d6=1.0), digits(d2=1.0)
CHAINS = [
    # read as 8, 6, 2: kept, rewritten, rewritten
    Done(prompt_id="a", steps=[graded(10, 0, EIGHT), graded(20, 30, SIX), graded(5, 15, TWO)], answer=4),
    # by the base, unasked; then read as 6, 8: rewritten, kept
    Done(prompt_id="b", steps=[Kept(tokens=7, by_base=True), graded(8, 21, SIX), graded(12, 0, EIGHT)], answer=6),
]
PHASES = {
    Phase.draft: PhaseStats(5, 0, 0, 0, 55),
    Phase.grade: PhaseStats(5, 0, 0, 0, 5),
    Phase.rewrite: PhaseStats(4, 0, 0, 0, 66),
    Phase.answer: PhaseStats(2, 0, 0, 0, 10),
}
ROUNDS = RoundStats(
    1,
    0.0,
    seconds=100.0,
    idle_seconds=4.0,
    busy_seconds={Role.draft: 10.0, Role.base: 76.0},
    phases=PHASES,
    phase_seconds={Phase.draft: 10.0, Phase.grade: 10.0, Phase.rewrite: 76.0},  # a second a base token
)


def test_a_lower_threshold_by_hand(tmp_path: Path) -> None:
    section = section_of(Recorded(folder=tmp_path).part(CHAINS, [ROUNDS]).open())
    assert section.figure("rewrite_ratio").value == pytest.approx((30 + 15 + 21) / (20 + 5 + 8))
    assert section.figure("base_seconds_per_token").value == pytest.approx(1.0)
    assert at(section, EXPECTED, 6.0) == {
        "threshold": 6.0,
        "acceptance": 80.0,  # all but the 2
        "draft_tokens_kept": 10 + 12 + 20 + 8,
        "draft_tokens_rejected": 5,
        "base_tokens": 7 + 15,  # the two rewrites of 30 and 21 are not needed
        "answer_tokens": 10,
        "generated_tokens": 50 + 5 + 22 + 10,
        "seconds": pytest.approx(100 - 51),
        "seconds_change": pytest.approx(-51),
        "same_chains": 0.0,
        "same_steps": pytest.approx(100 * 2 / 6),  # a's first; b's first
    }


def test_a_higher_threshold_by_hand(tmp_path: Path) -> None:
    section = section_of(Recorded(folder=tmp_path).part(CHAINS, [ROUNDS]).open())
    more = 2 * (10 + 12)  # rewrites that the run did not make: two tokens a token of the draft
    assert at(section, EXPECTED, 9.0) == {
        "threshold": 9.0,
        "acceptance": 0.0,
        "draft_tokens_kept": 0,
        "draft_tokens_rejected": 55,
        "base_tokens": 73 + more,
        "answer_tokens": 10,
        "generated_tokens": 55 + 73 + more + 10,
        "seconds": pytest.approx(100 + more),
        "seconds_change": pytest.approx(more),
        "same_chains": 0.0,
        "same_steps": pytest.approx(100 * 2 / 6),  # none of a's; b's first two
    }


def test_the_readings_differ_where_the_likeliest_digit_is_not_the_mean(tmp_path: Path) -> None:
    """A two-headed grade: the mean is 6.3, the likeliest digit 9."""
    steps = [graded(10, 20, digits(d9=0.6, d2=0.3, d3=0.1))]
    section = section_of(Recorded(folder=tmp_path).part([Done(steps=steps)]).open())
    assert at(section, EXPECTED, 6.25)["acceptance"] == 100.0
    assert at(section, EXPECTED, 7.0)["acceptance"] == 0.0
    assert at(section, GREEDY, 9.0)["acceptance"] == 100.0


def test_a_likeliest_token_that_may_be_no_digit_is_told_and_counts_as_rejected(tmp_path: Path) -> None:
    """Only the sum of what is no digit was recorded: 0.4 of it may be one token, likelier than the 9."""
    steps = [graded(10, 20, digits(d9=0.35, d8=0.25)), graded(10, 20, digits(d9=0.6))]
    section = section_of(Recorded(folder=tmp_path).part([Done(steps=steps)]).open())
    assert section.figure("num_uncertain").value == 1
    assert at(section, GREEDY, 0.0)["acceptance"] == 50.0
    assert at(section, EXPECTED, 8.5)["acceptance"] == 100.0


def test_an_unreadable_grade_is_accepted_at_no_threshold(tmp_path: Path) -> None:
    steps = [graded(10, 20, digits(d9=0.3)), graded(10, 20, digits(d9=0.9))]
    section = section_of(Recorded(folder=tmp_path).part([Done(steps=steps)]).open())
    assert at(section, EXPECTED, 0.0)["acceptance"] == 50.0


def test_the_expected_reading_of_a_greedy_run_keeps_to_the_mass_floor(tmp_path: Path) -> None:
    steps = [Kept(tokens=10, probs=digits(d9=mass), score=9.0) for mass in (0.7, 0.9)]
    recorded = Recorded(folder=tmp_path, reading=GREEDY, mass_floor=0.8).part([Done(steps=steps)])
    section = section_of(recorded.open())
    assert at(section, EXPECTED, 9.0)["acceptance"] == 50.0
    assert at(section, GREEDY, 9.0)["acceptance"] == 100.0, "its own reading is as recorded"


def test_a_yes_no_run_is_replayed_by_its_own_reading_alone(tmp_path: Path) -> None:
    recorded = Recorded(folder=tmp_path, reading=YES_NO, threshold=0.7)
    yes = [Kept(tokens=10, probs=digits(d0=1.0), score=score) for score in (0.9, 0.72)]
    section = section_of(recorded.part([Done(steps=yes)]).open())
    assert [table.name for table in section.tables] == [YES_NO]
    assert at(section, YES_NO, 0.7)["acceptance"] == 100.0
    assert at(section, YES_NO, 0.75)["acceptance"] == 50.0
    assert section.table(YES_NO).frame["threshold"].max() == 1.0


# --- what it says of itself ---


def test_every_curve_says_that_it_is_modelled_and_the_section_what_cannot_be_known(tmp_path: Path) -> None:
    section = section_of(Recorded(folder=tmp_path).part(CHAINS, [ROUNDS]).open())
    assert {item.basis for item in (*section.tables, *section.charts)} == {Basis.modelled}
    assert "after a chain's first changed decision" in section.text and "cannot know" in section.text
    assert all("2 tokens a token of its draft" in table.note for table in section.tables)
    assert {"same_chains", "same_steps"} <= set(section.table(EXPECTED).frame.columns)
    assert {chart.name: chart.marks for chart in section.charts}["acceptance"] == {"this run": 7.0}


def test_a_run_that_graded_nothing_has_no_what_if(tmp_path: Path) -> None:
    steps = [Kept(tokens=9, by_base=True)]
    assert whatif.section(Recorded(folder=tmp_path, policy="base_only").part([Done(steps=steps)]).open()) is None


def test_without_telemetry_there_are_tokens_and_no_time(tmp_path: Path) -> None:
    section = section_of(Recorded(folder=tmp_path).part(CHAINS).open())
    row = at(section, EXPECTED, 9.0)
    assert (row["seconds"], row["seconds_change"], row["draft_tokens_rejected"]) == (None, None, 55)
    assert "removed" in section.figure("base_seconds_per_token").note
    assert "cost" not in [chart.name for chart in section.charts]


def test_without_any_rewrite_its_length_is_assumed_and_that_is_said(tmp_path: Path) -> None:
    section = section_of(Recorded(folder=tmp_path).part([Done(steps=[graded(10, 0, EIGHT)])]).open())
    assert section.figure("rewrite_ratio").value is None
    assert at(section, EXPECTED, 9.0)["base_tokens"] == 10
    assert "assumed: none was made" in section.table(EXPECTED).note


# --- any run, against plain loops ---

PROBS = st.sampled_from(
    [
        *(EIGHT, SIX, TWO, digits(d7=1.0), digits(d6=0.5, d8=0.5), digits(d9=0.6, d2=0.4), digits(d9=0.2)),
        *(digits(d0=0.3, d9=0.7), digits(d5=0.5, d6=0.25, d7=0.25), digits(d1=0.45, d8=0.55)),
    ]
)
STEP = st.one_of(
    st.builds(graded, st.integers(1, 40), st.integers(1, 40), PROBS),
    st.builds(lambda tokens: Kept(tokens=tokens, by_base=True), st.integers(1, 40)),
)
CHAIN_LISTS = st.lists(st.lists(STEP, max_size=5), min_size=1, max_size=5)
ANY_RUN = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def recorded_run(chains: Sequence[Sequence[Kept]], folder: Path, parts: int = 1) -> RunFiles:
    recorded = Recorded(folder=folder)
    done = [Done(prompt_id=f"p{number}", steps=steps) for number, steps in enumerate(chains)]
    for part in range(parts):
        recorded.part(done[part::parts], [ROUNDS] if part == 0 else ())
    return recorded.open()


def by_loops(chains: Sequence[Sequence[Kept]], threshold: float) -> dict[str, int]:
    """Counts at a threshold, a decision at a time, from the steps as they were made."""
    counts = dict.fromkeys(("accepted", "kept_tokens", "same_chains", "same_steps"), 0)
    for steps in (steps for steps in chains if steps):
        is_same = True
        for step in steps:
            if step.probs is not None:
                accepts = step.score is not None and step.score >= threshold
                drafted = step.tokens if step.rejected is None else step.rejected
                counts["accepted"] += accepts
                counts["kept_tokens"] += drafted * accepts
                is_same = is_same and accepts == (step.rejected is None)
            counts["same_steps"] += is_same
        counts["same_chains"] += is_same
    return counts


@ANY_RUN
@given(chains=CHAIN_LISTS)
def test_any_run_is_replayed_as_plain_loops_do(
    chains: list[list[Kept]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    _, curves = replay(recorded_run(chains, tmp_path_factory.mktemp("run")))
    curve = curves[EXPECTED]
    for number, threshold in enumerate(curve.thresholds):
        assert by_loops(chains, threshold) == {
            "accepted": curve.accepted[number],
            "kept_tokens": curve.accepted_tokens[number],
            "same_chains": curve.same_chains[number],
            "same_steps": curve.same_steps[number],
        }


@ANY_RUN
@given(chains=CHAIN_LISTS.filter(lambda chains: any(step.probs for steps in chains for step in steps)))
def test_a_higher_threshold_never_accepts_more_nor_costs_less(
    chains: list[list[Kept]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    section = section_of(recorded_run(chains, tmp_path_factory.mktemp("run")))
    for table in section.tables:
        steps = table.frame.select(pl.all().diff()).drop_nulls("acceptance")
        assert (steps.select("acceptance", "draft_tokens_kept").to_numpy() <= 0).all()
        assert (steps.select("draft_tokens_rejected", "base_tokens").to_numpy() >= 0).all()
        assert (steps["seconds"].to_numpy() >= -1e-9).all()
    same = section.table(EXPECTED).frame
    assert same.filter(threshold=OWN_THRESHOLD)["same_chains"].item() == 100.0
    for name in ("same_chains", "same_steps"):
        below, above = same.filter(pl.col("threshold") <= 7)[name], same.filter(pl.col("threshold") >= 7)[name]
        assert below.is_sorted() and above.is_sorted(descending=True), "it knows less the farther from the run's own"


@ANY_RUN
@given(chains=CHAIN_LISTS, parts=st.integers(2, 4))
def test_how_a_run_is_cut_into_parts_does_not_matter(
    chains: list[list[Kept]], parts: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = replay(recorded_run(chains, tmp_path_factory.mktemp("whole")))
    cut = replay(recorded_run(chains, tmp_path_factory.mktemp("cut"), parts=parts))
    assert whole[0] == cut[0]
    for reading, curve in whole[1].items():
        for name in curve.__slots__:
            np.testing.assert_array_equal(getattr(curve, name), getattr(cut[1][reading], name))


def test_the_order_of_rows_in_a_part_does_not_matter(tmp_path: Path) -> None:
    run = Recorded(folder=tmp_path).part(CHAINS).open()
    before = replay(run)[1][EXPECTED]
    path = run.files("steps")[0]
    pl.read_parquet(path).reverse().write_parquet(path)
    np.testing.assert_array_equal(replay(run)[1][EXPECTED].same_steps, before.same_steps)


def test_the_grid_holds_what_a_reading_can_tell_apart() -> None:
    grids = Grading(reading=EXPECTED, mass_floor=0.5, threshold=7.0).thresholds
    assert grids[GREEDY] == [float(digit) for digit in range(10)]
    assert (grids[EXPECTED][0], grids[EXPECTED][-1]) == (0.0, 9.0)
