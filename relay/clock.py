"""The time, asked for in one place, so that a test can move it. Milliseconds since the epoch, unless a name says otherwise."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

SECOND = 1_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR


class Clock(Protocol):
    def now(self) -> int:
        """Wall clock in milliseconds since the epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds, for intervals and limits."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def now(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def rest(clock: Clock, woken: asyncio.Event, seconds: float, *, since: float) -> None:
    """How a loop rests: until somebody wakes it, or `seconds` after it began its look (`since`, as `monotonic` says it), and
    so no later where the look took long. The loop clears `woken` before it looks for work, so that no call is lost."""
    left = since + seconds - clock.monotonic()
    both = [asyncio.ensure_future(woken.wait()), asyncio.ensure_future(clock.sleep(left))]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        # Not awaited: a cancellation that came just then would be taken for theirs, and the loop would never end.
        for one in both:
            one.cancel()
