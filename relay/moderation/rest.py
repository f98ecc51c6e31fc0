"""How a loop rests: until somebody wakes it, or its time has come."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from relay.clock import Clock


async def rest(clock: Clock, woken: asyncio.Event, seconds: float) -> None:
    """`woken` is cleared by the loop before it looks for work, so that no call is lost."""
    tasks = [asyncio.ensure_future(woken.wait()), asyncio.ensure_future(clock.sleep(seconds))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
