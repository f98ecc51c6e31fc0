"""The ground of `ground.py` and the village of `village.py`, each for one test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.rooms.ground import Ground
from tests.rooms.village import Village


@pytest_asyncio.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    async with Ground(tmp_path).opened() as opened:
        yield opened


@pytest_asyncio.fixture
async def village(tmp_path: Path) -> AsyncIterator[Village]:
    async with Village(tmp_path).opened() as opened:
        yield opened
