"""Log-probabilities to grades: all are kept, and unreadable is null, never zero (docs/design.md, section 5)."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specreason_batch.chat import ChatFormat, ChatOptions
from specreason_batch.judge import DIGITS, Judge, Question, Reading
from specreason_batch.types import Grade, InvalidInput, Role
from tests.support.vocabulary import make_tokenizer

CHAT = ChatFormat(Role.base, make_tokenizer(), ChatOptions())
PROBS = st.lists(st.floats(0.0, 1.0), min_size=10, max_size=10).filter(lambda probs: sum(probs) > 1e-6)


def judge(reading: Reading = Reading.expected, **changes: Any) -> Judge:
    given: dict[str, Any] = {"question": "Right?", "reply_opening": "Grade: ", "reading": reading}
    return Judge(Question(**{**given, **changes}), CHAT)


def logprobs(made: Judge, probs: list[float]) -> dict[int, float]:
    return {id: math.log(prob) for id, prob in zip(made.label_ids, probs, strict=True) if prob > 0.0}


def read(made: Judge, probs: list[float], likeliest: int = 0) -> Grade:
    return made.read(logprobs(made, probs), likeliest)


# --- labels ---


def test_label_ids_are_the_single_tokens_that_follow_the_turn() -> None:
    made = judge()
    assert [CHAT.decode([id]) for id in made.label_ids] == list(DIGITS)
    assert CHAT.decode([*made.turn, made.label_ids[7]]).endswith("<think>\nGrade: 7")
    assert "<|im_end|>\n<|im_start|>user\nRight?<|im_end|>" in CHAT.decode(made.turn)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("0", "10")}, r"judge\.reply_opening: after 'Grade: ' the label '10' is not a single token"),
        ({"labels": ("0", "")}, "the label '' is not a single token"),
        ({"reply_opening": "x", "labels": ("no", "yes")}, "the label 'no' is not a single token"),
        ({"reply_opening": "so: ", "labels": ("no", "yes")}, "the label 'no' is not a single token"),
        ({"labels": ("1", "1")}, r"judge\.labels: \['1', '1'\] do not have token ids of their own"),
    ],
)
def test_labels_that_are_not_one_token_each_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        judge(**changes)


# --- expected ---


@settings(max_examples=100, deadline=None)
@given(probs=PROBS, mass=st.floats(0.5, 1.0))
def test_expected_is_the_mean_of_the_renormalised_digits(probs: list[float], mass: float) -> None:
    scaled = [prob / sum(probs) * mass for prob in probs]
    grade = read(judge(mass_floor=0.4), scaled)
    assert grade.mass == pytest.approx(mass)
    assert grade.probs == pytest.approx(tuple(scaled))
    assert grade.score == pytest.approx(sum(digit * prob for digit, prob in enumerate(scaled)) / mass)
    assert grade.score is not None and -1e-9 <= grade.score <= 9 + 1e-9


@pytest.mark.parametrize(
    ("probs", "score"),
    [
        ([0.0] * 9 + [1.0], 9.0),
        ([1.0] + [0.0] * 9, 0.0),
        ([0.0] * 7 + [0.3, 0.3, 0.0], 7.5),
        ([0.06] * 10, 4.5),
    ],
)
def test_expected_by_hand(probs: list[float], score: float) -> None:
    assert read(judge(), probs).score == pytest.approx(score)


def test_a_digit_that_is_missing_counts_as_zero() -> None:
    made = judge()
    grade = made.read({made.label_ids[8]: math.log(0.6), made.label_ids[6]: math.log(0.2)}, 0)
    assert grade.score == pytest.approx(7.5)
    assert grade.probs[7] == 0.0 and len(grade.probs) == 10


@pytest.mark.parametrize(
    ("mass", "floor", "readable"), [(0.49, 0.5, False), (0.51, 0.5, True), (0.01, 0.0, True), (0.99, 1.0, False)]
)
def test_too_little_mass_is_unreadable_and_kept(mass: float, floor: float, readable: bool) -> None:
    grade = read(judge(mass_floor=floor), [0.0] * 9 + [mass])
    assert grade.score == (pytest.approx(9.0) if readable else None)
    assert grade.mass == pytest.approx(mass)
    assert grade.probs[9] == pytest.approx(mass)


@pytest.mark.parametrize("reading", Reading)
def test_nothing_known_is_unreadable_never_zero(reading: Reading) -> None:
    made = _yes_no(0.0) if reading is Reading.yes_no else judge(reading, mass_floor=0.0)
    assert made.read({}, ord("x")).score is None
    assert made.read({ord("x"): -0.1}, ord("x")).score is None


# --- greedy ---


@pytest.mark.parametrize("digit", range(10))
def test_greedy_is_the_likeliest_token_if_it_is_a_digit(digit: int) -> None:
    made = judge(Reading.greedy)
    assert read(made, [0.05] * 10, made.label_ids[digit]).score == float(digit)


def test_greedy_with_another_token_on_top_is_unreadable_however_sure_the_digits_are() -> None:
    made = judge(Reading.greedy)
    grade = read(made, [0.0] * 9 + [0.49], ord("x"))
    assert grade.score is None
    assert grade.probs[9] == pytest.approx(0.49), "the probabilities are kept all the same"


def test_greedy_needs_no_mass() -> None:
    made = judge(Reading.greedy, mass_floor=0.9)
    assert read(made, [0.1] * 3 + [0.0] * 7, made.label_ids[2]).score == 2.0


# --- yes_no ---


@pytest.mark.parametrize(("no", "yes", "score"), [(0.2, 0.6, 0.75), (0.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.1, 0.2, None)])
def test_yes_no_is_the_renormalised_probability_of_yes(no: float, yes: float, score: float | None) -> None:
    made = _yes_no(0.5)
    grade = read(made, [no, yes])
    assert grade.score == (None if score is None else pytest.approx(score))
    assert grade.probs == pytest.approx((no, yes))


def _yes_no(mass_floor: float) -> Judge:
    return judge(Reading.yes_no, reply_opening="So:", labels=(" no", " yes"), mass_floor=mass_floor)
