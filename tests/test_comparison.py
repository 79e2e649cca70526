"""Runs side by side: the paired bootstrap against others', differences by hand, and a case for every warning."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from specreason_batch.accounting import latency
from specreason_batch.accounting.bootstrap import MAX_UNITS, NUM_RESAMPLES, Array, interval, resampled_sums
from specreason_batch.accounting.comparison import compare
from specreason_batch.accounting.figures import Basis, Figure, RunReport, Section
from specreason_batch.accounting.latency_constants import LatencyConstants
from specreason_batch.accounting.load import RunFiles
from specreason_batch.rounds import PhaseStats, RoundStats
from specreason_batch.types import InvalidInput, Phase, Role
from tests.support.recorded import Done, Kept, Recorded

# --- the bootstrap ---


def mean_difference(sums: Array) -> Array:
    """Of rows (baseline, run, 1)."""
    return (sums[..., 1] - sums[..., 0]) / sums[..., 2]


def speed_up(sums: Array) -> Array:
    return sums[..., 0] / sums[..., 1]


def paired_rows(size: int, seed: int) -> Array:
    """Two values that go together, and a 1."""
    random = np.random.default_rng(seed)
    base = random.gamma(4.0, 1.0, size)
    return np.stack([base, 0.6 * base + random.gamma(2.0, 0.3, size), np.ones(size)], axis=1)


def plain_bootstrap(rows: Array, statistic: Any, num_resamples: int, seed: int) -> tuple[float, float]:
    """One resample at a time, drawn otherwise than ours."""
    random = np.random.RandomState(seed)
    found = []
    for _ in range(num_resamples):
        chosen = [rows[random.randint(len(rows))] for _ in range(len(rows))]
        found.append(statistic(np.sum(chosen, axis=0)))
    found.sort()
    return found[round(0.025 * num_resamples)], found[round(0.975 * num_resamples) - 1]


@pytest.mark.parametrize("statistic", [mean_difference, speed_up])
def test_the_interval_is_that_of_a_plain_loop(statistic: Any) -> None:
    rows = paired_rows(40, seed=1)
    low, high = interval(rows, statistic)
    other_low, other_high = plain_bootstrap(rows, statistic, 3000, seed=2)
    assert low == pytest.approx(other_low, abs=0.1 * (high - low))
    assert high == pytest.approx(other_high, abs=0.1 * (high - low))


def test_resampled_sums_are_those_of_the_rows_drawn() -> None:
    rows = paired_rows(7, seed=1)
    drawn = np.random.default_rng(3).integers(7, size=(5, 7))
    np.testing.assert_allclose(resampled_sums(rows, 5, seed=3), [rows[chosen].sum(axis=0) for chosen in drawn])


@pytest.mark.parametrize("statistic", [mean_difference, speed_up])
def test_the_interval_is_scipys(statistic: Any) -> None:
    rows = paired_rows(60, seed=4)
    found = stats.bootstrap(
        (rows[:, 0], rows[:, 1]),
        lambda base, run, axis=-1: statistic(
            np.stack([base.sum(axis), run.sum(axis), np.full(base.sum(axis).shape, base.shape[axis])], axis=-1)
        ),
        paired=True,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    low, high = interval(rows, statistic)
    assert (low, high) == pytest.approx((found.low, found.high), abs=0.07 * (high - low))


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    """150 data sets of 60 prompts with four samples each, which are alike: 95 %, but for 3 standard deviations."""
    random, covered, covered_by_chains = np.random.default_rng(6), 0, 0
    for _ in range(150):
        ability = random.beta(1.0, 1.0, 60)
        right = (random.random((60, 4)) < ability[:, None]).astype(float)
        by_prompt = np.stack([right.mean(axis=1), np.zeros(60), np.ones(60)], axis=1)
        covered += _covers(interval(by_prompt, lambda sums: sums[..., 0] / sums[..., 2]), 0.5)
        half = 1.96 * right.std() / math.sqrt(right.size)
        covered_by_chains += _covers((right.mean() - half, right.mean() + half), 0.5)
    assert covered / 150 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 150))
    assert covered_by_chains < covered - 15, "samples of one prompt taken for independent promise too much"


def _covers(found: tuple[float, float], truth: float) -> bool:
    return found[0] <= truth <= found[1]


def test_pairing_narrows_the_interval() -> None:
    """Prompts differ more than runs do."""
    rows = paired_rows(200, seed=7)
    shuffled = rows.copy()
    np.random.default_rng(8).shuffle(shuffled[:, 1])
    width, apart = (np.diff(interval(values, mean_difference)).item() for values in (rows, shuffled))
    assert width < 0.7 * apart


def test_many_prompts_are_thrown_together_without_changing_what_is_said() -> None:
    rows = paired_rows(3 * MAX_UNITS + 7, seed=9)
    differences = rows[:, 1] - rows[:, 0]
    half = 1.96 * differences.std() / math.sqrt(len(rows))
    found = interval(rows, mean_difference)
    assert found == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.1 * half)


def test_the_same_rows_give_the_same_interval() -> None:
    rows = paired_rows(30, seed=10)
    assert interval(rows, speed_up) == interval(rows, speed_up)


@pytest.mark.parametrize("rows", [paired_rows(1, seed=10), np.repeat(paired_rows(1, seed=10), 9, axis=0)])
def test_one_row_or_rows_all_alike_give_no_interval(rows: Array) -> None:
    """Not one of no width, which would be certainty."""
    assert all(math.isnan(end) for end in interval(rows, speed_up))


def test_where_a_resample_has_no_value_there_is_no_end() -> None:
    """A speed-up over nothing."""
    rows = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    with np.errstate(divide="ignore"):
        low, high = interval(rows, speed_up)
    assert low == 1.0 and not math.isfinite(high)


# --- runs by hand ---

GOOD, BAD = (0.0,) * 8 + (0.5, 0.5), (0.5, 0.5) + (0.0,) * 8
CONSTANTS = LatencyConstants(
    base_seconds_per_token=1.0, draft_seconds_per_token=0.1, grade_seconds=3.0, source="by hand"
)


def by_base(tokens: int, prompt: int = 0, right: bool | None = None, sample: int = 0, **changes: Any) -> Done:
    verdict = None if right is None else "right" if right else "wrong"
    return replace(
        Done(
            prompt_id=f"p{prompt}",
            sample_index=sample,
            steps=[Kept(tokens=tokens, by_base=True)],
            prompt=f"What is {prompt} + 2?",
            verdict=verdict,
        ),
        **changes,
    )


def by_draft(tokens: int, prompt: int = 0, right: bool | None = None, **changes: Any) -> Done:
    """One draft rejected, one kept."""
    steps = [Kept(tokens=tokens, probs=GOOD, score=8.5), Kept(tokens=10, rejected=5, probs=BAD, score=0.5)]
    return replace(by_base(tokens, prompt, right), steps=steps, **changes)


def rounds(seconds: float) -> RoundStats:
    """All of it the base's work."""
    phases = {phase: PhaseStats(0, 0, 0, 0, 0) for phase in Phase} | {Phase.rewrite: PhaseStats(1, 0, 0, 0, 10)}
    busy = {Role.draft: 0.0, Role.base: seconds}
    return RoundStats(1, 0.0, seconds=seconds, idle_seconds=0.0, busy_seconds=busy, phases=phases)


def base_run(folder: Path, chains: Sequence[Done], seconds: float | None = 40.0, **changes: Any) -> Recorded:
    recorded = Recorded(folder=folder / "base_only", policy="base_only", **changes)
    return recorded.part(chains, [] if seconds is None else [rounds(seconds)])


def draft_run(folder: Path, chains: Sequence[Done], seconds: float | None = 20.0, **changes: Any) -> Recorded:
    recorded = Recorded(folder=folder / "specreason", **changes)
    return recorded.part(chains, [] if seconds is None else [rounds(seconds)])


def account_of(run: RunFiles, money: float | None, unit: str = "GPU-s", is_finished: bool = True) -> RunReport:
    """Of its cost alone."""
    cost = Section(
        name="cost",
        title="Cost",
        figures=(
            Figure(name="device_seconds_per_chain", label="", value=12.0, unit=unit),
            Figure(name="money_per_chain", label="", value=money, unit="EUR"),
        ),
    )
    return RunReport(
        label=run.label, output_dir=str(run.output_dir), policy=run.policy, is_finished=is_finished, sections=(cost,)
    )


def difference(section: Section, measure: str, run: str = "specreason") -> dict[str, Any]:
    """The row of one run in one measure's table."""
    return section.table(measure).frame.filter(run=run).row(0, named=True)


def side_by_side(section: Section, run: str) -> dict[str, Any]:
    return section.table("runs").frame.filter(run=run).row(0, named=True)


FOUR_BASE = [by_base(100, prompt, right) for prompt, right in enumerate([True, True, False, False])]
FOUR_DRAFT = [by_draft(40, prompt, right) for prompt, right in enumerate([True, True, True, False])]


def four(folder: Path) -> list[RunFiles]:
    return [draft_run(folder, FOUR_DRAFT).open(), base_run(folder, FOUR_BASE).open()]


# --- differences ---


def test_every_difference_by_hand(tmp_path: Path) -> None:
    runs = four(tmp_path)
    section, warnings = compare(runs, [account_of(runs[0], 0.5), account_of(runs[1], 2.0)], CONSTANTS)
    assert not warnings
    expected = {
        "accuracy": (50.0, 75.0, 25.0),
        "speed_up_attributed": (10.0, 5.0, 2.0),
        "device_seconds": (12.0, 12.0, 1.0),
        "money": (2.0, 0.5, 0.25),
        "generated_tokens": (100.0, 55.0, 0.55),
        "kept_tokens": (100.0, 50.0, 0.5),
        "speed_up_stream": (100.0, 4.5 + 10 + 6, 100 / 20.5),
    }
    for name, (baseline, value, between) in expected.items():
        row = difference(section, name)
        assert row["num_prompts"] == 4
        assert (row["baseline"], row["value"], row["difference"]) == pytest.approx((baseline, value, between)), name
    accuracy, kept = difference(section, "accuracy"), difference(section, "kept_tokens")
    assert (accuracy["low"], accuracy["high"]) == (0.0, 75.0)
    assert (kept["low"], kept["high"]) == (None, None), "all prompts are alike"
    bases = {table.name: table.basis for table in section.tables}
    assert {bases["speed_up_attributed"], bases["device_seconds"]} == {Basis.attributed}
    assert {bases["speed_up_stream"], bases["money"]} == {Basis.modelled}
    assert section.table("money").units["baseline"] == "EUR"


def test_side_by_side_is_each_run_over_its_own_chains(tmp_path: Path) -> None:
    runs = four(tmp_path)
    section, _ = compare(runs, [account_of(runs[0], 0.5), account_of(runs[1], None)])
    assert side_by_side(section, "specreason") == {
        "run": "specreason",
        "policy": "specreason",
        "chains": 4,
        "accuracy": 75.0,
        "acceptance": 50.0,
        "kept_tokens": 50.0,
        "generated_tokens": 55.0,
        "chains_per_second": 0.2,
        "speed_up": 2.0,
        "device_seconds": 12.0,
        "money": 0.5,
    }
    base = side_by_side(section, "base_only")
    assert (base["acceptance"], base["money"], base["speed_up"]) == (None, None, 1.0)
    assert difference(section, "money")["difference"] is None, "one of the two is not known"


def test_the_interval_of_the_accuracy_is_that_of_the_paired_prompts(tmp_path: Path) -> None:
    rights = np.random.default_rng(11).random((2, 50)) < [[0.5], [0.7]]
    base = [by_base(9, prompt, bool(right)) for prompt, right in enumerate(rights[0])]
    other = [by_draft(9, prompt, bool(right)) for prompt, right in enumerate(rights[1])]
    section, _ = compare([draft_run(tmp_path, other).open(), base_run(tmp_path, base).open()])
    low, high = plain_bootstrap(np.stack([*100.0 * rights, np.ones(50)], axis=1), mean_difference, 2000, seed=12)
    row = difference(section, "accuracy")
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=4.0)


def test_samples_of_a_prompt_are_one_unit(tmp_path: Path) -> None:
    """Each chain made eight times: nothing new is known of prompts, and no interval is narrower."""
    once = compare(four(tmp_path / "once"))[0]
    copies = {
        name: [replace(chain, sample_index=sample) for chain in chains for sample in range(8)]
        for name, chains in {"base": FOUR_BASE, "draft": FOUR_DRAFT}.items()
    }
    runs = [draft_run(tmp_path, copies["draft"], 160.0).open(), base_run(tmp_path, copies["base"], 320.0).open()]
    often = compare(runs)[0]
    for table in once.tables[1:]:
        row, again = difference(once, table.name), difference(often, table.name)
        assert list(again.values())[1:] == pytest.approx(list(row.values())[1:]), table.name


def test_every_prompt_counts_alike_however_many_of_its_samples_are_done(tmp_path: Path) -> None:
    """Short chains are done first: a run at work has more samples of easy prompts."""
    base = [by_base(10, 0, True), by_base(30, 1, False)]
    other = [*(by_base(10, 0, True, sample) for sample in range(4)), by_base(30, 1, False)]
    section, _ = compare([draft_run(tmp_path, other).open(), base_run(tmp_path, base).open()])
    assert side_by_side(section, "specreason")["accuracy"] == 80.0
    assert difference(section, "accuracy")["difference"] == 0.0
    assert difference(section, "kept_tokens")["difference"] == 1.0


def test_of_one_prompt_there_is_a_difference_and_no_interval(tmp_path: Path) -> None:
    runs = [draft_run(tmp_path, FOUR_DRAFT[:1]).open(), base_run(tmp_path, FOUR_BASE[:1]).open()]
    row = difference(compare(runs)[0], "kept_tokens")
    assert (row["difference"], row["low"], row["high"]) == (0.5, None, None)


def test_only_prompts_that_were_judged_in_both_have_a_part_in_the_accuracy(tmp_path: Path) -> None:
    other = [*FOUR_DRAFT[:2], replace(FOUR_DRAFT[2], basis="majority"), replace(FOUR_DRAFT[3], verdict="unverifiable")]
    section, _ = compare([draft_run(tmp_path, other).open(), base_run(tmp_path, FOUR_BASE).open()])
    row = difference(section, "accuracy")
    assert (row["num_prompts"], row["baseline"], row["value"]) == (2, 100.0, 100.0)
    assert difference(section, "kept_tokens")["num_prompts"] == 4


def test_what_nobody_knows_has_no_table_and_what_one_does_not_know_no_difference(tmp_path: Path) -> None:
    base = [replace(chain, verdict=None) for chain in FOUR_BASE]
    other = [replace(chain, verdict=None) for chain in FOUR_DRAFT]
    runs = [draft_run(tmp_path, other, seconds=None).open(), base_run(tmp_path, base).open()]
    section, _ = compare(runs)
    names = [table.name for table in section.tables]
    assert names == ["runs", "speed_up_attributed", "generated_tokens", "kept_tokens"]
    assert difference(section, "speed_up_attributed")["difference"] is None
    assert side_by_side(section, "specreason")["speed_up"] is None


def test_gpu_seconds_and_core_seconds_are_not_compared(tmp_path: Path) -> None:
    runs = four(tmp_path)
    section, _ = compare(runs, [account_of(runs[0], 0.5), account_of(runs[1], 2.0, unit="core-s")])
    names = [table.name for table in section.tables]
    assert "money" in names and "device_seconds" not in names


def test_the_formula_is_that_of_the_latency_section(tmp_path: Path) -> None:
    runs = four(tmp_path)
    row = difference(compare(runs, (), CONSTANTS)[0], "speed_up_stream")
    for run, column in zip(runs, ("value", "baseline"), strict=True):
        assert row[column] == pytest.approx(latency.section(run, CONSTANTS).figure("stream_seconds_mean").value)


def test_the_order_of_rows_shards_and_runs_does_not_matter(tmp_path: Path) -> None:
    runs = [draft_run(tmp_path, FOUR_DRAFT).open(), base_run(tmp_path, FOUR_BASE).open()]
    first = compare(runs)[0]
    turned = Recorded(folder=tmp_path / "turned").part(FOUR_DRAFT[::-1], [rounds(20.0)]).open("specreason")
    again = compare([runs[1], turned])[0]
    for table in first.tables[1:]:
        assert table.frame.equals(again.table(table.name).frame)


# --- the baseline ---


def test_the_baseline_is_the_base_alone_in_one_generation_where_there_is_such_a_run(tmp_path: Path) -> None:
    direct = Recorded(folder=tmp_path / "base_direct", policy="base_direct").part(FOUR_BASE).open()
    runs = [*four(tmp_path), direct]
    assert "baseline is base_direct" in compare(runs)[0].text
    assert "baseline is base_only" in compare(runs[:2])[0].text
    assert "baseline is specreason" in compare(runs, baseline="specreason")[0].text
    with pytest.raises(InvalidInput, match="baseline: 'x'; allowed: one of specreason, base_only, base_direct"):
        compare(runs, baseline="x")


# --- what is not comparable ---


def warnings_of(first: Recorded, other: Recorded) -> tuple[str, ...]:
    return compare([other.open(), first.open()])[1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fields": {"policy.threshold": 5.0}, "threshold": 5.0},  # what is compared
        {"fields": {"seed": 7}},
        {"fields": {"base.speculative.method": "ngram", "base.speculative.num_speculative_tokens": 3}},
        {"fields": {"judge.reading": "greedy"}, "reading": "greedy"},  # the base alone grades nothing
        {"fields": {"draft.dtype": "float16", "sampling.draft.temperature": 0.0}},  # and drafts nothing
    ],
)
def test_a_comparable_pair_has_no_warning(changes: dict[str, Any], tmp_path: Path) -> None:
    assert warnings_of(base_run(tmp_path, FOUR_BASE), draft_run(tmp_path, FOUR_DRAFT, **changes)) == ()


def test_the_draft_alone_and_the_base_alone_share_no_model_to_differ_in(tmp_path: Path) -> None:
    alone = Recorded(folder=tmp_path / "draft_only", policy="draft_only", fields={"sampling.draft.temperature": 0.0})
    assert warnings_of(base_run(tmp_path, FOUR_BASE), alone.part(FOUR_BASE)) == ()


DIFFERING = [
    ({"budgets.thinking_tokens": 1024}, "the budgets differ (budgets.thinking_tokens: 512, 1024)"),
    ({"samples_per_prompt": 4}, "the number of samples a prompt differs (samples_per_prompt: 1, 4)"),
    ({"sampling.base.temperature": 0.0}, "the sampling differs (sampling.base.temperature: 0.6, 0.0)"),
    ({"base.model.config.json": "1:z"}, "the base models differ (base.model.config.json: '1:a', '1:z')"),
    ({"base.dtype": "float16"}, "the base engines' settings differ (base.dtype: 'auto', 'float16')"),
]


@pytest.mark.parametrize(("fields", "message"), DIFFERING)
def test_settings_that_differ_are_named_with_both_values(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    found = warnings_of(base_run(tmp_path, FOUR_BASE), draft_run(tmp_path, FOUR_DRAFT, fields=fields))
    assert found == (f"base_only and specreason: {message}",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"judge.reading": "greedy"}, "the grading differs (judge.reading: 'expected', 'greedy')"),
        ({"draft.model.config.json": "1:z"}, "the draft models differ (draft.model.config.json: '1:b', '1:z')"),
    ],
)
def test_two_runs_that_grade_are_asked_how(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    first = Recorded(folder=tmp_path / "one").part(FOUR_DRAFT)
    other = Recorded(folder=tmp_path / "two", fields=fields).part(FOUR_DRAFT)
    _, found = compare([first.open(), other.open()])
    assert found == (f"one and two: {message}",)


def test_many_differing_settings_are_counted(tmp_path: Path) -> None:
    fields = {f"budgets.b{number}": number for number in range(5)}
    (found,) = warnings_of(base_run(tmp_path, FOUR_BASE), draft_run(tmp_path, FOUR_DRAFT, fields=fields))
    assert found.endswith("budgets.b2: None, 2; and 2 more)")


def test_hardware_is_that_of_the_attempts_or_of_the_manifest(tmp_path: Path) -> None:
    first, other = base_run(tmp_path, FOUR_BASE), draft_run(tmp_path, FOUR_DRAFT)
    assert warnings_of(first.ran_on("H200"), other.ran_on("H200")) == ()
    (found,) = warnings_of(first, other.ran_on("A100"))
    assert found.startswith("base_only and specreason: the hardware differs (H200; A100 or H200)")
    arm = base_run(tmp_path / "arm", FOUR_BASE, hardware={"machine": "arm64"})
    (found,) = warnings_of(arm, draft_run(tmp_path / "arm", FOUR_DRAFT))
    assert "the hardware differs (machine arm64; machine x86_64, cpu_count 2)" in found


def test_two_gpus_against_one_is_other_hardware(tmp_path: Path) -> None:
    first, other = base_run(tmp_path, FOUR_BASE).ran_on("H200"), draft_run(tmp_path, FOUR_DRAFT).ran_on("H200", "H200")
    (found,) = warnings_of(first, other)
    assert "the hardware differs (H200; H200, H200): times and costs are of different machines" in found


def test_a_run_that_is_not_finished_is_named(tmp_path: Path) -> None:
    runs = four(tmp_path)
    _, found = compare(runs, [account_of(runs[0], 1.0, is_finished=False), account_of(runs[1], 1.0)])
    assert found == ("specreason is not finished: its figures are of what is committed so far, its time is of more",)


def test_verdicts_that_are_not_there_or_not_alike_are_named(tmp_path: Path) -> None:
    bare = [replace(chain, verdict=None) for chain in FOUR_DRAFT]
    (found,) = warnings_of(base_run(tmp_path / "a", FOUR_BASE), draft_run(tmp_path / "a", bare))
    assert found == f"specreason is not verified: python -m jobs.verify run={tmp_path / 'a' / 'specreason'}"
    partly = draft_run(tmp_path / "b", FOUR_DRAFT[:2]).part(bare[2:])
    (found,) = warnings_of(base_run(tmp_path / "b", FOUR_BASE), partly)
    assert found.startswith("specreason is not verified in 1 of its parts")
    neither = [replace(chain, verdict=None) for chain in FOUR_BASE]
    (found,) = warnings_of(base_run(tmp_path / "c", neither), draft_run(tmp_path / "c", bare))
    assert found.startswith("no run is verified")


def test_verdicts_of_other_settings_are_named(tmp_path: Path) -> None:
    other = Recorded(folder=tmp_path / "specreason").part(FOUR_DRAFT, settings='{"kind": "text"}')
    (found,) = warnings_of(base_run(tmp_path, FOUR_BASE), other)
    assert found == "base_only and specreason: verified with different settings: their accuracies are not comparable"
    mixed = Recorded(folder=tmp_path / "mixed").part(FOUR_DRAFT[:2]).part(FOUR_DRAFT[2:], settings='{"kind": "text"}')
    found = warnings_of(base_run(tmp_path / "more", FOUR_BASE), mixed)[0]
    assert found == "the verdicts of mixed are of several settings; verify it again"


def test_prompts_that_only_one_has_are_counted_and_left_out(tmp_path: Path) -> None:
    base = [by_base(100, prompt, True) for prompt in range(4)]
    other = [by_draft(40, prompt, True) for prompt in range(2, 8)]
    runs = [draft_run(tmp_path, other).open(), base_run(tmp_path, base).open()]
    section, (found,) = compare(runs)
    assert found == (
        "base_only and specreason: different prompts (2 only in base_only, 4 only in specreason); "
        "differences are over the 2 in both, throughput is over all"
    )
    assert difference(section, "kept_tokens")["num_prompts"] == 2


def test_a_prompt_id_with_another_text_is_another_prompt(tmp_path: Path) -> None:
    other = [*FOUR_DRAFT[:3], replace(FOUR_DRAFT[3], prompt="Why?")]
    section, (found,) = compare([draft_run(tmp_path, other).open(), base_run(tmp_path, FOUR_BASE).open()])
    assert "different prompts (1 of the same prompt_id but with different texts)" in found
    assert difference(section, "accuracy")["num_prompts"] == 3


@pytest.mark.parametrize("same_ids", [True, False])
def test_runs_without_a_prompt_in_common_are_not_compared(same_ids: bool, tmp_path: Path) -> None:
    """Also where ids are row numbers of two data sets, and meet by chance."""
    other = [
        replace(chain, prompt=f"Why {number}?", prompt_id=chain.prompt_id if same_ids else f"q{number}")
        for number, chain in enumerate(FOUR_DRAFT)
    ]
    runs = [
        draft_run(tmp_path, other, hardware={"machine": "arm64"}).open(),
        base_run(tmp_path, FOUR_BASE).open(),
    ]
    section, (found,) = compare(runs, (), CONSTANTS)
    assert found.startswith("base_only and specreason: no prompt in common")
    assert found.endswith("the two cannot be compared")
    assert side_by_side(section, "specreason")["speed_up"] is None
    for table in section.tables[1:]:
        unknown = dict.fromkeys(("baseline", "value", "difference", "low", "high"))
        assert difference(section, table.name) == {"run": "specreason", "num_prompts": 0} | unknown


def test_a_warning_is_of_one_pair_and_names_it(tmp_path: Path) -> None:
    odd = Recorded(folder=tmp_path / "odd", fields={"budgets.thinking_tokens": 9}).part(FOUR_DRAFT).open()
    _, found = compare([*four(tmp_path), odd])
    assert [text.split(":")[0] for text in found] == ["base_only and odd"]
