"""`jobs.calibrate`: the constants that it finds are the engine's own, and jobs.report reads its file."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from jobs.calibrate import OWN_NAMES, run_calibration
from jobs.compose import split_words
from specreason_batch import calibrate as module
from specreason_batch.accounting.latency_constants import LatencyConstants, read_calibration
from specreason_batch.calibrate import CalibrateConfig, Measured, Stream, calibrate
from specreason_batch.engine import Engine
from specreason_batch.scripted_engine import ScriptedEngine
from specreason_batch.types import Completion, FinishReason, InvalidInput, Request, Role
from tests.conftest import ROOT

PREFILL, BASE, DRAFT = 1e-4, 2e-2, 3e-3  # seconds a new prompt token, and a generated one of either model
TURN = [901, 902, 903, 904, 905]
NUM_OPENINGS = 6


class Metered:
    """An engine that costs what a model would: prompt tokens that it has not seen before, and generated ones."""

    def __init__(self, seconds_per_token: float, most_tokens: int = 10_000) -> None:
        self.now = 0.0
        self._seconds_per_token = seconds_per_token
        self._most_tokens = most_tokens
        self._seen: set[tuple[int, ...]] = set()
        self.engine = ScriptedEngine(self.answer)

    def answer(self, request: Request) -> Completion:
        whole = tuple(request.whole_prompt())
        cached = next((n for n in range(len(whole), 0, -1) if whole[:n] in self._seen), 0)
        num_tokens = min(request.max_tokens, self._most_tokens)
        self.now += PREFILL * (len(whole) - cached) + self._seconds_per_token * (num_tokens - 1)
        self._seen.update(whole[:n] for n in range(len(whole) + 1))
        return Completion(
            request_id=request.request_id,
            token_ids=tuple(range(300, 300 + num_tokens)),
            finish_reason=FinishReason.length,
            logprobs=dict.fromkeys(request.sampling.logprob_token_ids, -1.0),
            num_cached_tokens=cached,
        )


@pytest.fixture
def metered(monkeypatch: pytest.MonkeyPatch) -> dict[Role, Metered]:
    found = {Role.base: Metered(BASE), Role.draft: Metered(DRAFT)}
    monkeypatch.setattr(module.time, "perf_counter", lambda: sum(each.now for each in found.values()))
    return found


def stream(tokens: int = 64) -> Stream:
    openings = {role: [[n, *range(1000, 1100)] for n in range(NUM_OPENINGS)] for role in Role}
    return Stream(openings=openings, turn=TURN, label_ids=tuple(range(10)), tokens=tokens)


def engines_of(metered: dict[Role, Metered]) -> dict[Role, Engine]:
    return {role: each.engine for role, each in metered.items()}


def test_the_constants_are_what_the_engines_cost(metered: dict[Role, Metered]) -> None:
    found = calibrate(engines_of(metered), stream())
    expected = {
        "time_to_first_token_seconds": PREFILL * 101,
        "base_seconds_per_token": BASE,
        "draft_seconds_per_token": DRAFT,
        "grade_seconds": PREFILL * (32 + len(TURN)),
        "base_prefill_seconds_per_token": PREFILL,
    }
    assert {name: measured.median for name, measured in found.items()} == pytest.approx(expected)
    assert {len(measured.values) for measured in found.values()} == {NUM_OPENINGS - 1}


def test_a_grade_is_asked_for_as_a_run_asks_for_it(metered: dict[Role, Metered]) -> None:
    calibrate(engines_of(metered), stream())
    grades = [asked for asked in metered[Role.base].engine.requests if asked.sampling.logprob_token_ids]
    assert len(grades) == NUM_OPENINGS
    assert all(list(grade.whole_prompt())[-len(TURN) :] == TURN for grade in grades)
    assert {grade.max_tokens for grade in grades} == {1}


def test_a_model_that_writes_too_little_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    short = {Role.base: Metered(BASE, most_tokens=3), Role.draft: Metered(DRAFT)}
    with pytest.raises(InvalidInput, match="base: it wrote 3 tokens after a prompt, too few to time"):
        calibrate(engines_of(short), stream())


def test_the_median_stands_whatever_one_measurement_did() -> None:
    measured = Measured((1.0, 2.0, 3.0, 4.0, 1000.0))
    assert measured.median == 3.0
    assert measured.quartiles == (2.0, 4.0)


REFUSED = [
    ({"repeats": 2}, "repeats: 2 is out of range; allowed: at least 3"),
    ({"tokens": 15}, "tokens: 15 is out of range; allowed: at least 16"),
    ({"output": " "}, "output: ' ' is empty; allowed: a file"),
]


@pytest.mark.parametrize(("choices", "message"), REFUSED)
def test_a_wrong_choice_is_refused_by_name(choices: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        CalibrateConfig(**choices)  # type: ignore[arg-type]
    assert message in str(raised.value)


def test_its_own_words_are_told_from_those_of_a_run() -> None:
    words = ["experiment=toy", "output=here.json", "--help", "base.kv_cache_gib=2", "+repeats=3", "tokens=32"]
    assert split_words(words, OWN_NAMES) == (
        ["output=here.json", "--help", "+repeats=3", "tokens=32"],
        ["experiment=toy", "base.kv_cache_gib=2"],
    )


def quiet_run(words: Sequence[str], **choices: object) -> dict[str, Measured]:
    return run_calibration(CalibrateConfig(**choices), words, Console(quiet=True))  # type: ignore[arg-type]


def test_more_repeats_than_prompts_are_refused_before_models_load(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="repeats: 500 needs 501 prompts; allowed: at most 499"):
        quiet_run(["experiment=toy"], output=str(tmp_path / "c.json"), repeats=500)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_place_of_its_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"output: .* is a folder; allowed: a file"):
        quiet_run(["experiment=toy"], output=str(tmp_path))


@pytest.mark.vllm
@pytest.mark.slow
def test_what_the_toy_pair_costs_is_what_the_report_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    output = tmp_path / "measured" / "toy.json"
    found = quiet_run(["experiment=toy"], output=str(output), repeats=5, tokens=32)
    constants = read_calibration(output)
    names = {name for name in vars(constants) if name != "source"}
    assert names == set(found)
    assert {name: getattr(constants, name) for name in names} == {name: each.median for name, each in found.items()}
    assert all(0 < getattr(constants, name) < math.inf for name in names)
    assert constants.draft_seconds_per_token < constants.base_seconds_per_token  # 2 layers of 64 and 10 of 96
    assert "measured by jobs.calibrate (toy.json) on" in constants.source
    assert isinstance(constants, LatencyConstants)
    written = json.loads(output.read_text())
    assert written["models"]["base"]["identity"]["config.json"]
    assert [path.name for path in output.parent.iterdir()] == ["toy.json"]
