"""The ground of `ground.py`, for one test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.rooms.ground import Ground


@pytest_asyncio.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    async with Ground(tmp_path).opened() as opened:
        yield opened
