"""`jobs.compare`: what each variant runs, in which order, and what a failure or a stop leaves."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from jobs.compare import Made, compare, own_words, speed_table, to_config
from jobs.compose import compose_generate
from jobs.launch import ExitStatus
from specreason_batch.compare import CompareConfig, VariantRun, planned_runs
from specreason_batch.pairs import STOP_SIGNALS, Received
from specreason_batch.schedules import Stopped
from specreason_batch.summary import summarise
from specreason_batch.types import InvalidInput
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _signals_as_before() -> object:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def config(*overrides: str) -> CompareConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return to_config(compose("compare", own_words(overrides)))


def runs_of(*overrides: str) -> list[VariantRun]:
    return planned_runs(config(*overrides), Path("o"))


def quiet() -> Console:
    return Console(file=StringIO(), width=160)


def shown(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


class Jobs:
    """In place of jobs.generate: it notes what it was given, and ends with the status given for a folder's name."""

    def __init__(self, statuses: dict[str, int] | None = None, stop_after: int | None = None):
        self.given: list[list[str]] = []
        self._statuses = statuses or {}
        self._stop_after = stop_after

    def __call__(self, words: Sequence[str], received: Received) -> int:
        self.given.append(list(words))
        if len(self.given) == self._stop_after:
            signal.raise_signal(signal.SIGTERM)
        return self._statuses.get(self.names[-1], ExitStatus.finished)

    @property
    def names(self) -> list[str]:
        return [Path(words[-1].partition("=")[2].strip('"')).name for words in self.given]


# --- what is run ---


def test_every_ready_variant_is_a_valid_run_with_an_output_of_its_own() -> None:
    runs = runs_of()
    assert len({run.output_dir for run in runs}) == len(runs) == 10
    composed = {run.variant: compose_generate(run.words) for run in runs}
    assert composed["random"].policy.match_run == "o/specreason"
    assert composed["specreason_decode"].base.speculative.model == composed["specreason_decode"].draft.model
    assert {name for name, found in composed.items() if found.base.speculative.is_on} == {
        *("specreason_decode", "specreason_ngram"),
        *("base_only_decode", "base_direct_decode", "base_direct_ngram"),
    }


def test_repeats_go_round_robin_with_a_seed_and_a_folder_each() -> None:
    runs = runs_of("only=[specreason,random]", "repeats=2", "seed=5")
    assert [(run.name, run.seed) for run in runs] == [
        *(("specreason", 5), ("random", 5)),
        *(("specreason.2", 6), ("random.2", 6)),
    ]
    assert runs[1].words[-1] == "policy.match_run=o/specreason"
    assert runs[3].words[-1] == "policy.match_run=o/specreason.2"


def test_variants_of_the_user_s_own_can_be_added_and_taken_away() -> None:
    runs = runs_of("+variants.strict=[policy.threshold=9]", "~variants.random")
    assert "random" not in {run.variant for run in runs}
    assert runs[-1].words == ("policy.threshold=9",)


def test_other_words_are_every_variant_s(tmp_path: Path) -> None:
    words = ["experiment=toy", "schedule=continuous", "limit=3", "+base.vllm_args={max_num_seqs: 8}", "repeats=2"]
    jobs = Jobs()
    compare(config(*words, "only=[random,base_only]", f"output={tmp_path}"), quiet(), run_job=jobs)
    assert len(jobs.given) == 4
    for given in jobs.given:
        assert given[:3] == ["experiment=toy", "schedule=continuous", "+base.vllm_args={max_num_seqs: 8}"]
        assert "limit=3" in given


def test_output_goes_to_the_experiment_s_own_folder_unless_told() -> None:
    jobs = Jobs()
    compare(config("experiment=toy", "only=[base_only]", "verify=false"), quiet(), run_job=jobs)
    assert jobs.given[0][-1] == 'output_dir="outputs/compare/toy/base_only"'


@pytest.mark.parametrize(
    ("word", "items"),
    [
        ("+variants.a=[x=1]", ["x=1"]),
        ("++variants.a=[x=[1,2], +y.z={a: 1, b: 2}]", ["x=[1,2]", "+y.z={a: 1, b: 2}"]),
        ("""+variants.a=['x=1',"y=2"]""", ["x=1", "y=2"]),
        ("+variants.a=[]", []),
    ],
)
def test_overrides_are_listed_as_one_would_type_them(word: str, items: list[str]) -> None:
    assert config(word).variants["a"] == items


REFUSED = [
    (["only=[oracle]"], "only: 'oracle' is no variant; allowed: specreason, base_only, "),
    (["repeats=0"], "repeats: 0 is out of range; allowed: at least 1"),
    (["limit=0"], "limit: 0 is out of range; allowed: at least 1"),
    (["seed=-1"], "seed: -1 is out of range; allowed: at least 0"),
    (["output=' '"], "output: ' ' is empty; allowed: null or a folder"),
    (["+variants={a%b: []}"], "variants: 'a%b'; allowed: names of letters, digits, _ and -"),
    (["+variants.mine=[seed=3]"], "variants.mine: 'seed=3' is the same for all"),
    (["+variants.mine=[experiment=toy]"], "variants.mine: 'experiment=toy' is the same for all"),
    (["output_dir=x"], "output_dir=x: each variant has a folder of its own; allowed: output=<a folder for all>"),
    (["+variants.mine=['policy.match_run={nobody}']"], "variants.mine: 'policy.match_run={nobody}' names no variant"),
    (["variants.specreason=['policy.match_run={random}']"], "names no variant before it; allowed: none"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_a_wrong_choice_is_refused_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        config(*overrides)
    assert message in str(raised.value)


@pytest.mark.parametrize("word", ["nonsense=1", "overrides=[a=1]", "experiment=no_such", "policy.threshold=99"])
def test_a_word_that_jobs_generate_does_not_take_is_refused_before_anything_starts(word: str, tmp_path: Path) -> None:
    jobs = Jobs()
    with pytest.raises(InvalidInput):
        compare(config(f"output={tmp_path}", word), quiet(), run_job=jobs)
    assert jobs.given == []


@pytest.mark.parametrize("word", ["policy.threshold=99", "policy=oracle", "no.such.field=1", "policy.threshold"])
def test_a_variant_that_does_not_compose_is_refused_before_anything_starts(word: str, tmp_path: Path) -> None:
    jobs = Jobs()
    with pytest.raises(InvalidInput, match=r"^variants\.mine: "):
        compare(config(f"output={tmp_path}", f"+variants.mine=['{word}']"), quiet(), run_job=jobs)
    assert jobs.given == []
    assert list(tmp_path.iterdir()) == []


# --- failures, stops ---


def test_a_run_that_fails_loses_none_of_the_others_and_is_named(tmp_path: Path) -> None:
    jobs, console = Jobs({"base_only": ExitStatus.bad_node}), quiet()
    status = compare(config("only=[specreason,base_only,draft_only]", f"output={tmp_path}"), console, run_job=jobs)
    assert jobs.names == ["specreason", "base_only", "draft_only"]
    assert "base_only: ended with status 71 (bad_node)" in shown(console)
    assert status != ExitStatus.finished


def test_a_run_that_refers_to_a_failed_one_is_not_made(tmp_path: Path) -> None:
    """It would keep the rate of half a run for good: a folder takes no other configuration."""
    jobs, console = Jobs({"specreason": ExitStatus.failed}), quiet()
    status = compare(config("only=[specreason,random,draft_only]", f"output={tmp_path}"), console, run_job=jobs)
    assert jobs.names == ["specreason", "draft_only"]
    assert "random: not made, for it refers to a run that failed" in shown(console)
    assert status == ExitStatus.failed


def test_a_signal_stops_before_the_next_run(tmp_path: Path) -> None:
    jobs = Jobs(stop_after=2)
    with pytest.raises(Stopped):
        compare(config("only=[specreason,base_only,draft_only]", f"output={tmp_path}"), quiet(), run_job=jobs)
    assert jobs.names == ["specreason", "base_only"]


# --- with real runs ---


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.compare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.vllm
@pytest.mark.slow
def test_variants_are_run_verified_and_reported_and_not_made_again(tmp_path: Path) -> None:
    given = ["experiment=toy", "only=[specreason,random]", "limit=6", f"output={tmp_path}"]
    done = job(*given)
    assert done.returncode == ExitStatus.finished, done.stdout + done.stderr
    summaries = {name: summarise(tmp_path / name) for name in ("specreason", "random")}
    assert {name: found.num_chains for name, found in summaries.items() if found} == {"specreason": 6, "random": 6}
    assert (tmp_path / "report" / "report.json").is_file()
    assert list(tmp_path.glob("specreason/*/verdicts/*.parquet"))
    again = job(*given)
    assert again.stdout.count("nothing to do: every chain is committed") == 2
    assert {name: summarise(tmp_path / name) for name in summaries} == summaries


def test_speed_is_the_median_of_a_variant_s_runs_over_the_baseline(tmp_path: Path) -> None:
    class Timed:
        def __init__(self, seconds: float):
            self.seconds, self.chains_per_second = seconds, 100 / seconds

    runs = runs_of("only=[specreason,base_direct]", "repeats=3", f"output={tmp_path}")
    seconds = {"specreason": [5.0, 10.0, 20.0], "base_direct": [20.0, 20.0, 20.0]}
    made = [
        Made(run=run, status=0, summary=Timed(seconds[run.variant][run.repeat]))  # type: ignore[arg-type]
        for run in runs
    ]
    console = quiet()
    console.print(speed_table(made))
    line = next(line for line in shown(console).splitlines() if "specreason" in line)
    assert [part.strip() for part in line.strip("│ ").split("│")] == [
        *("specreason", "3", "10.00 (5.00-20.00)", "2.00x")
    ]
