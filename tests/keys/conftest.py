"""The house of `key_house.py`, opened for one test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.keys.key_house import KeyHouse


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[KeyHouse]:
    async with KeyHouse(tmp_path).opened() as opened:
        yield opened
