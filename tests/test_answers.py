"""The final answer of a chain: the last box, braces balanced, compared as text."""

import pytest

from specreason_batch.answers import extract_boxed, is_same_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{4}", "4"),
        ("first \\boxed{3}, no, \\boxed{4}.", "4"),
        ("\\boxed{\\frac{1}{2}} and more }", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{4}}", "4"),
        ("\\boxed{}", ""),
        ("\\boxed{4", None),
        ("\\boxed 4", None),
        ("4", None),
        ("", None),
    ],
)
def test_the_last_box_is_the_answer(text: str, expected: str | None) -> None:
    assert extract_boxed(text) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("\\boxed{4}", "4", True),
        ("\\boxed{ $4$. }", "4", True),
        ("\\boxed{\\frac{1}{2}}", "\\frac {1}{2}", True),
        ("\\boxed{4.0}", "4", False),
        ("\\boxed{14}", "4", False),
        ("4", "4", False),
        ("\\boxed{}", "4", False),
        (None, "4", False),
    ],
)
def test_an_answer_is_right_only_where_its_text_is(answer: str | None, gold: str, same: bool) -> None:
    assert is_same_answer(answer, gold) is same
