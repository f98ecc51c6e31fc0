"""How much goes into one transaction: services take bodies of a bounded size, and nothing may be left out for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relay.appservices.transaction import _fitting


@given(st.lists(st.integers(0, 70_000), max_size=120), st.integers(1, 400_000))
def test_as_many_as_fit_and_one_at_least(sizes: list[int], most: int) -> None:
    left, parts = list(sizes), []
    while left:
        number = _fitting(left, most)
        assert 1 <= number <= len(left), "each transaction takes something, so an end is reached"
        part, left = left[:number], left[number:]
        assert sum(part) <= most or len(part) == 1
        assert not left or sum(part) + left[0] > most, "no transaction is smaller than it need be"
        parts += part
    assert parts == sizes, "nothing is left out"
