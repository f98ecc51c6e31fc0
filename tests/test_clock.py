"""How loops rest: woken or timed, and ended at whatever moment they are told to."""

from __future__ import annotations

import asyncio
import time

import pytest

from relay.clock import HOUR, SECOND, SystemClock, rest
from tests.town import Clock

TURNS = 12


@pytest.mark.parametrize("turns", range(TURNS))
async def test_a_loop_that_was_just_woken_ends_when_it_is_told_to(turns: int) -> None:
    """However many turns of the event loop lie between the call that wakes it and the word to end."""
    woken = asyncio.Event()

    async def loop() -> None:
        while True:
            woken.clear()
            await rest(SystemClock(), woken, 3600, since=time.monotonic())

    running = asyncio.ensure_future(loop())
    await asyncio.sleep(0.01)
    woken.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    done, _ = await asyncio.wait({running}, timeout=5)
    try:
        assert done and running.cancelled(), "it ends, and does not take the word for its own tasks'"
    finally:
        running.cancel()


async def test_its_time_comes_without_a_call() -> None:
    async with asyncio.timeout(5):
        await rest(SystemClock(), asyncio.Event(), 0.01, since=time.monotonic())


@pytest.mark.parametrize("turns", range(4))
async def test_time_that_is_moved_while_a_loop_lies_down_counts(turns: int) -> None:
    """However many turns of the event loop lie between its lying down and the move: stories move time when they like."""
    clock = Clock()
    resting = asyncio.ensure_future(rest(clock, asyncio.Event(), HOUR / SECOND, since=clock.monotonic()))
    for _ in range(turns):
        await asyncio.sleep(0)
    clock.forward(hours=2)
    async with asyncio.timeout(5):
        await resting


async def test_time_that_is_moved_while_a_loop_looks_counts() -> None:
    clock = Clock()
    began = clock.monotonic()
    clock.forward(hours=2)
    async with asyncio.timeout(5):
        await rest(clock, asyncio.Event(), HOUR / SECOND, since=began)
