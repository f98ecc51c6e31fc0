"""How long a server that failed is left alone, also where the clock is not what it was."""

from __future__ import annotations

import pytest

from federation.backoff import Backoff
from relay.clock import HOUR, MINUTE, SECOND
from relay.errors import RemoteError

FAR = "far.example"


class Hands:
    """A clock whose hands a test moves, both ways."""

    at = 1_000 * HOUR

    def now(self) -> int:
        return self.at

    def monotonic(self) -> float:
        raise AssertionError("nobody measures an interval here")

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nobody sleeps here")


@pytest.fixture
def clock() -> Hands:
    return Hands()


@pytest.fixture
def backoff(clock: Hands) -> Backoff:
    return Backoff(clock, least=MINUTE, most=HOUR)


def test_the_wait_doubles_up_to_the_most_and_ends_with_a_success(clock: Hands, backoff: Backoff) -> None:
    waits = []
    for _ in range(9):
        backoff.failed(FAR)
        waits.append(backoff.wait_left(FAR))
        with pytest.raises(RemoteError, match="could not be reached lately"):
            backoff.require(FAR)
        clock.at += waits[-1]
        backoff.require(FAR)
    for number, wait in enumerate(waits):
        least = min(HOUR, MINUTE << number)
        assert least <= wait <= least * 1.2, f"wait {number} is {wait / SECOND} s"
    backoff.succeeded(FAR)
    assert backoff.wait_left(FAR) == 0 and backoff.failing() == []


def test_a_clock_that_is_set_back_lets_nobody_wait_for_it(clock: Hands, backoff: Backoff) -> None:
    clock.at += 5 * HOUR
    backoff.failed(FAR)
    trouble = backoff.trouble(FAR)
    assert trouble is not None
    clock.at -= 5 * HOUR
    assert backoff.wait_left(FAR) == 0, "when it failed is not known any more, so it may be tried"
    again = Backoff(clock, least=MINUTE, most=HOUR)
    again.restore(FAR, trouble)
    again.require(FAR)
    again.failed(FAR)
    assert MINUTE <= again.wait_left(FAR) <= 2.4 * MINUTE, "and from then on the new time counts"
    now = again.trouble(FAR)
    assert now is not None and now.failed_at == now.since == clock.at
