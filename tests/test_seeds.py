"""Seeds and coins: functions of their parts alone, the same in every process."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from specreason_batch.seeds import stable_coin, stable_seed


@given(parts=st.lists(st.integers() | st.text(), max_size=4))
def test_a_seed_fits_63_bits(parts: list[int | str]) -> None:
    """vLLM keeps seeds as int64 and takes a negative one for none."""
    assert 0 <= stable_seed(*parts) < 1 << 63


def test_a_seed_tells_its_parts_apart() -> None:
    parts = [(0, "p", 1), (0, "p", 11), (0, "p1", 1), (0, "p", 0), (1, "p", 1), ("0p", 1), (0, "p", 1, 0), (0, "P", 1)]
    assert len({stable_seed(*part) for part in parts}) == len(parts)


def test_a_seed_is_pinned_and_does_not_depend_on_the_process() -> None:
    """Pinned: another value means that no run can be continued by this version."""
    code = "from specreason_batch.seeds import stable_seed; print(stable_seed(0, 'p', 1))"
    outputs = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)}
    assert outputs == {f"{stable_seed(0, 'p', 1)}\n"} == {"3014719543898781732\n"}


def test_a_coin_knows_only_its_parts() -> None:
    tosses = [stable_coin(0.5, "chain", index) for index in range(64)]
    assert tosses == [stable_coin(0.5, "chain", index) for index in range(64)]
    assert tosses != [stable_coin(0.5, "other", index) for index in range(64)]


def test_a_coin_of_a_higher_rate_keeps_what_a_lower_one_kept() -> None:
    """So that two rates differ only where they must."""
    for index in range(200):
        assert stable_coin(0.7, index) or not stable_coin(0.3, index)
