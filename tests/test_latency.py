"""Shares of the measured time, and the paper's formula, against cases worked out by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specreason_batch.accounting import latency
from specreason_batch.accounting.attribution import PREFILL_WEIGHT, per_chain, rates
from specreason_batch.accounting.figures import Basis
from specreason_batch.accounting.latency_constants import LatencyConstants, read_calibration
from specreason_batch.rounds import PhaseStats, RoundStats
from specreason_batch.types import InvalidInput, Phase, Role
from tests.conftest import ROOT
from tests.support.recorded import Done, Kept, Recorded

GOOD = (0.0,) * 8 + (0.5, 0.5)
BAD = (0.5, 0.5) + (0.0,) * 8
ACCEPTED = Kept(tokens=10, probs=GOOD, score=8.5)
REJECTED = Kept(tokens=12, rejected=8, probs=BAD, score=0.5)
OWN = Kept(tokens=20, by_base=True)
CHAINS = [
    Done(prompt_id="a", steps=[ACCEPTED, REJECTED], answer=6, active_seconds=2.0),  # draft 18, base 12, 2 grades
    Done(prompt_id="b", steps=[ACCEPTED], answer=4, active_seconds=4.0),  # draft 10, 1 grade
]
PHASES = {
    Phase.draft: PhaseStats(3, 100, 60, 0, 28),
    Phase.grade: PhaseStats(3, 300, 150, 0, 3),
    Phase.rewrite: PhaseStats(1, 60, 40, 0, 12),
    Phase.answer: PhaseStats(2, 80, 60, 0, 10),
}
LOCKSTEP = RoundStats(
    1,
    0.0,
    seconds=20.0,
    idle_seconds=2.5,
    busy_seconds={Role.draft: 7.0, Role.base: 10.5},
    phases=PHASES,
    phase_seconds={Phase.draft: 7.0, Phase.grade: 6.0, Phase.rewrite: 4.4},
)
OVERLAPPING = RoundStats(
    1, 0.0, seconds=20.0, idle_seconds=2.0, busy_seconds={Role.draft: 9.0, Role.base: 18.0}, phases=PHASES
)
CONSTANTS = LatencyConstants(
    base_seconds_per_token=1.0,
    draft_seconds_per_token=0.1,
    grade_seconds=3.0,
    time_to_first_token_seconds=2.0,
    source="by hand",
)


def attributed(run: Any) -> dict[str, float]:
    return dict(per_chain(run).select("prompt_id", "attributed_seconds").collect().iter_rows())


def test_lockstep_gives_its_phases_out_by_tokens_grades_and_requests(tmp_path: Path) -> None:
    run = Recorded(folder=tmp_path).part(CHAINS, [LOCKSTEP]).open()
    # a: 2 drafts, 2 grades, 1 rewrite, 1 answer; b: 1, 1, 0, 1; 2.6 s between the phases
    assert attributed(run) == {
        "a": pytest.approx(7.0 * 18 / 28 + 6.0 * 2 / 3 + 4.4 * 18 / 22 + 2.6 * 6 / 9),
        "b": pytest.approx(7.0 * 10 / 28 + 6.0 * 1 / 3 + 4.4 * 4 / 22 + 2.6 * 3 / 9),
    }


def test_where_engines_overlap_their_time_is_divided_as_their_busy_seconds_are(tmp_path: Path) -> None:
    run = Recorded(folder=tmp_path).part(CHAINS, [OVERLAPPING]).open()
    # computed prompt tokens a request: grade 50, rewrite 20, answer 10
    work = {"a": 18 + PREFILL_WEIGHT * (100 + 20 + 10), "b": 4 + PREFILL_WEIGHT * (50 + 10)}
    total = sum(work.values())
    assert attributed(run) == {
        "a": pytest.approx(6.0 * 18 / 28 + 12.0 * work["a"] / total + 2.0 * 6 / 9),
        "b": pytest.approx(6.0 * 10 / 28 + 12.0 * work["b"] / total + 2.0 * 3 / 9),
    }


def test_a_shards_time_stays_with_its_chains(tmp_path: Path) -> None:
    """A slow node's shard costs more, and nobody else pays for it."""
    recorded = Recorded(folder=tmp_path).part(CHAINS[:1], [LOCKSTEP], shard="slow")
    slow = attributed(recorded.part(CHAINS[1:], [OVERLAPPING], shard="other").open())
    assert slow == {"a": pytest.approx(20.0), "b": pytest.approx(20.0)}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.lists(
        st.tuples(
            st.lists(st.lists(st.sampled_from([ACCEPTED, REJECTED, OWN]), max_size=4), min_size=1, max_size=4),
            st.lists(st.sampled_from([LOCKSTEP, OVERLAPPING]), min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    answer=st.integers(0, 9),
    answer_role=st.sampled_from(["draft", "base"]),
)
def test_shares_sum_to_the_measured_time_whatever_happened(
    shards: list[Any], answer: int, answer_role: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also where a shard's chains have none of what a kind of time goes by, and where attempts had other schedules."""
    recorded = Recorded(folder=tmp_path_factory.mktemp("run"), answer_role=answer_role)
    for number, (chains, rounds) in enumerate(shards):
        done = [Done(prompt_id=f"{number}-{i}", steps=steps, answer=answer) for i, steps in enumerate(chains)]
        recorded.part(done, rounds, shard=f"shard-{number}")
    shares = attributed(recorded.open())
    assert sum(shares.values()) == pytest.approx(sum(20.0 * len(rounds) for _, rounds in shards))
    assert min(shares.values()) >= 0


def test_without_telemetry_nothing_is_attributed(tmp_path: Path) -> None:
    run = Recorded(folder=tmp_path).part(CHAINS).open()
    assert attributed(run) == {"a": None, "b": None}
    assert rates(run) is None
    section = latency.section(run, CONSTANTS)
    assert section.figure("chains_per_second").value is None
    assert "removed" in section.figure("attributed_seconds_mean").note
    assert section.figure("stream_seconds_mean").value is not None  # a grade's cost is a constant


def test_verdicts_come_with_the_chains(tmp_path: Path) -> None:
    judged = [Done(prompt_id="a", verdict="right"), Done(prompt_id="b", verdict="wrong", basis="majority")]
    recorded = Recorded(folder=tmp_path).part(judged).part([Done(prompt_id="c")])
    rows = per_chain(recorded.open()).select("prompt_id", "verdict", "verdict_basis").sort("prompt_id").collect().rows()
    assert rows == [("a", "right", "gold"), ("b", "wrong", "majority"), ("c", None, None)]


@pytest.mark.parametrize("stats", [LOCKSTEP, OVERLAPPING])
def test_rates_account_for_all_time_at_work(stats: RoundStats, tmp_path: Path) -> None:
    spent = rates(Recorded(folder=tmp_path).part(CHAINS, [stats]).open())
    assert spent is not None
    assert spent.draft_seconds_per_token and spent.base_seconds_per_token and spent.seconds_per_grade
    at_work = spent.draft_seconds_per_token * 28 + spent.base_seconds_per_token * 22 + spent.seconds_per_grade * 3
    assert at_work == pytest.approx(17.4 if stats is LOCKSTEP else 18.0)
    assert spent.num_generated_tokens == 50


def test_a_thinking_in_one_generation_is_one_request(tmp_path: Path) -> None:
    run = Recorded(folder=tmp_path, policy="base_direct").part([Done(steps=[OWN, OWN, OWN])]).open()
    assert per_chain(run).select("num_rewrites").collect().item() == 1


# --- the formula ---


def values(section: Any) -> dict[str, float | None]:
    return {figure.name: figure.value for figure in section.figures}


def test_each_way_of_timing_says_what_it_is(tmp_path: Path) -> None:
    section = latency.section(Recorded(folder=tmp_path).part(CHAINS, [LOCKSTEP]).open(), CONSTANTS)
    bases = {figure.name: figure.basis for figure in section.figures}
    assert {bases["chains_per_second"], bases["active_seconds_p50"]} == {Basis.measured}
    assert {bases["attributed_seconds_p50"], bases["seconds_per_grade"]} == {Basis.attributed}
    assert {bases["stream_seconds_mean"], bases["alone_seconds_mean"]} == {Basis.modelled}
    assert values(section)["chains_per_second"] == pytest.approx(0.1)
    assert values(section)["tokens_per_second"] == pytest.approx(50 / 20)
    assert values(section)["active_seconds_p50"] == pytest.approx(3.0)
    assert values(section)["attributed_seconds_mean"] == pytest.approx(10.0)
    assert not any(name.startswith("stream") for name in values(latency.section(Recorded(folder=tmp_path).open())))


def test_the_formula_by_hand(tmp_path: Path) -> None:
    found = values(latency.section(Recorded(folder=tmp_path).part(CHAINS, [LOCKSTEP]).open(), CONSTANTS))
    first, second = 1.8 + 18 + 2 * 3, 1.0 + 4 + 3  # draft tokens, base and answer tokens, grades
    assert found["stream_seconds_mean"] == pytest.approx((first + second) / 2)
    assert found["stream_draft_share"] == pytest.approx(100 * 2.8 / (first + second))
    assert found["stream_base_share"] == pytest.approx(100 * 22 / (first + second))
    assert found["stream_grade_share"] == pytest.approx(100 * 9 / (first + second))
    assert found["alone_seconds_mean"] == pytest.approx((2 + 28 + 2 + 14) / 2)
    assert found["stream_speed_up"] == pytest.approx(46 / (first + second))


def test_without_a_cost_a_grade_it_goes_by_the_prompt_tokens_that_a_grade_computed(tmp_path: Path) -> None:
    by_prompt = LatencyConstants(
        base_seconds_per_token=1.0, draft_seconds_per_token=0.1, base_prefill_seconds_per_token=0.02, source="by hand"
    )
    found = values(latency.section(Recorded(folder=tmp_path).part(CHAINS, [LOCKSTEP]).open(), by_prompt))
    assert found["stream_grade_share"] == pytest.approx(100 * 3 / (2.8 + 22 + 3))  # 50 tokens a grade: 1 s


@pytest.mark.parametrize("policy", ["base_only", "base_direct"])
def test_the_base_alone_waits_for_its_first_token_and_is_as_fast_as_itself(policy: str, tmp_path: Path) -> None:
    run = Recorded(folder=tmp_path, policy=policy).part([Done(steps=[OWN], answer=5)], [OVERLAPPING]).open()
    found = values(latency.section(run, CONSTANTS))
    assert (found["stream_seconds_mean"], found["stream_speed_up"]) == (27.0, 1.0)


def test_a_draft_that_answers_is_paid_as_a_draft(tmp_path: Path) -> None:
    run = Recorded(folder=tmp_path, answer_role="draft").part([Done(steps=[ACCEPTED], answer=5)], [LOCKSTEP]).open()
    assert values(latency.section(run, CONSTANTS))["stream_seconds_mean"] == pytest.approx(1.5 + 3)


def test_an_independent_reruns_shares_give_its_own_speed_up(tmp_path: Path) -> None:
    """RuthvikAtte/specreason, 167 chains: 46.4 % of steps accepted, 57 % of drafted tokens thrown away, a grade costs 3
    base tokens; 68 % of the time the base, 20 % the draft, 11 % grading; about 1.2x. From the tokens and shares follows
    the rest.
    """
    rewritten = 35  # tokens a rewrite: what makes 3 tokens a grade 11 % of the time, where the base has 68 %
    kept = rewritten * 0.536 * (43 / 57) / 0.464  # tokens a kept draft: 57 % of them are in rejected ones
    steps = [Kept(tokens=rewritten, rejected=rewritten, probs=BAD, score=0.5)] * 536
    steps += [Kept(tokens=round(kept), probs=GOOD, score=8.5)] * 464
    pair = LatencyConstants(base_seconds_per_token=1.0, draft_seconds_per_token=0.168, grade_seconds=3.0, source="RA")
    found = values(latency.section(Recorded(folder=tmp_path).part([Done(steps=steps)]).open(), pair))
    assert found["stream_base_share"] == pytest.approx(68, abs=1)
    assert found["stream_draft_share"] == pytest.approx(20, abs=1)
    assert found["stream_grade_share"] == pytest.approx(11, abs=1)
    assert found["stream_speed_up"] == pytest.approx(1.2, abs=0.02)


# The same rerun's 16 chains of one AIME problem, one at a time, as it counted and timed them (results/60/summary.json):
# base tokens, draft tokens accepted and rejected, steps graded; seconds of the base, the draft and grading.
CLOCKED = (
    (397, 1572, 568, 98, 10.599, 20.808, 15.854),
    (157, 2126, 90, 92, 4.006, 20.424, 14.624),
    (217, 800, 332, 57, 5.735, 11.337, 8.787),
    (238, 5519, 441, 251, 7.023, 59.078, 43.106),
    (1000, 4933, 928, 332, 31.481, 70.118, 58.337),
    (349, 2080, 925, 109, 10.276, 25.651, 16.639),
    (453, 2029, 349, 93, 18.487, 21.475, 14.469),
    (477, 943, 410, 32, 19.631, 9.658, 4.858),
    (313, 2218, 294, 129, 12.617, 25.857, 19.646),
    (331, 989, 307, 39, 12.768, 9.981, 5.662),
    (221, 3285, 90, 160, 6.01, 33.36, 25.283),
    (247, 1703, 169, 98, 7.724, 19.376, 14.718),
    (416, 914, 298, 33, 18.06, 9.185, 4.771),
    (352, 3812, 343, 157, 14.639, 36.764, 25.212),
    (95, 2221, 83, 110, 2.564, 22.164, 15.692),
    (486, 2086, 385, 125, 19.251, 25.356, 18.947),
)


def clocked_chain(number: int) -> Done:
    """Of its tokens: one rewrite, and the other grades on accepted drafts."""
    base, kept, rejected, grades, *_ = CLOCKED[number]
    others = [Kept(tokens=0, probs=GOOD, score=8.5)] * (grades - 2)
    rewrite = Kept(tokens=base, rejected=rejected, probs=BAD, score=0.5)
    return Done(prompt_id=f"{number:02d}", steps=[rewrite, Kept(tokens=kept, probs=GOOD, score=8.5), *others])


def test_the_formula_foretells_what_chains_alone_took_on_a_clock(tmp_path: Path) -> None:
    """Constants from the first eight chains; each of the others within 10 %, all of them within 2 %."""
    base, kept, rejected, grades, base_seconds, draft_seconds, grade_seconds = map(sum, zip(*CLOCKED[:8], strict=True))
    constants = LatencyConstants(
        base_seconds_per_token=base_seconds / base,
        draft_seconds_per_token=draft_seconds / (kept + rejected),
        grade_seconds=grade_seconds / grades,
        source="a rerun's clock",
    )
    run = Recorded(folder=tmp_path).part([clocked_chain(number) for number in range(8, 16)]).open()
    columns = latency.StreamCost.of(run, constants).columns
    found = per_chain(run).sort("prompt_id").select(columns["stream"].alias("seconds")).collect()["seconds"].to_list()
    took = [sum(chain[4:]) for chain in CLOCKED[8:]]
    assert found == [pytest.approx(seconds, rel=0.1) for seconds in took]
    assert sum(found) == pytest.approx(sum(took), rel=0.02)
    mean = values(latency.section(run, constants))["stream_seconds_mean"]
    assert mean == pytest.approx(sum(found) / 8)


# --- constants ---


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "latency").glob("*.yaml")), ids=lambda path: path.stem)
def test_named_constants_are_valid(path: Path) -> None:
    assert LatencyConstants(**yaml.safe_load(path.read_text())).source


def given_constants(**changes: Any) -> Callable[[], LatencyConstants]:
    values: dict[str, Any] = {
        "base_seconds_per_token": 0.02,
        "draft_seconds_per_token": 0.002,
        "grade_seconds": 0.05,
        "source": "a test",
    }
    return lambda: LatencyConstants(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_seconds_per_token": -1.0}, r"latency\.base_seconds_per_token: -1\.0; allowed: seconds, at least 0"),
        ({"draft_seconds_per_token": float("nan")}, r"latency\.draft_seconds_per_token: nan"),
        ({"grade_seconds": "fast"}, r"latency\.grade_seconds: 'fast'"),
        ({"grade_seconds": None}, "neither grade_seconds nor base_prefill_seconds_per_token"),
        ({"source": ""}, r"latency\.source: ''"),
    ],
)
def test_constants_out_of_range_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        given_constants(**changes)()


def test_constants_that_are_not_given_are_asked_for_all_at_once() -> None:
    with pytest.raises(InvalidInput) as error:
        LatencyConstants()
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "latency.base_seconds_per_token",
        "latency.draft_seconds_per_token",
        "latency.source",
        "latency",
    ]


def test_a_calibration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    constants = {"base_seconds_per_token": 0.02, "draft_seconds_per_token": 0.002, "grade_seconds": 0.05, "more": 1}
    path.write_text(json.dumps({"constants": constants, "machine": {"gpu": "H200", "cores": None}, "models": {}}))
    read = read_calibration(path)
    assert (read.base_seconds_per_token, read.grade_seconds, read.base_prefill_seconds_per_token) == (0.02, 0.05, None)
    assert read.source == "measured by jobs.calibrate (calibration.json) on gpu H200"


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"constants": 3}', '{"constants": {"grade_seconds": -1}}'])
def test_what_is_no_calibration_is_refused_by_name(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidInput, match=r"calibration\.json"):
        read_calibration(path)


def test_per_chain_can_be_streamed_and_joined_with_the_chains(tmp_path: Path) -> None:
    run = Recorded(folder=tmp_path).part(CHAINS, [LOCKSTEP]).open()
    joined = per_chain(run).join(run.chains.select("prompt_id", "thinking"), on="prompt_id")
    counted = joined.select("prompt_id", "num_drafts", "num_grades", "num_rewrites", "num_answers", "thinking")
    assert counted.sort("prompt_id").collect(engine="streaming").rows() == [
        ("a", 2, 2, 1, 1, ""),
        ("b", 1, 1, 0, 1, ""),
    ]
    assert isinstance(per_chain(run), pl.LazyFrame)
