"""What every story may ask for: a town of relays, empty at first, gone at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from scripts.certificates import Authority


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    from scripts import certificates

    return certificates.authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
async def town(tmp_path: Path, authority: Authority) -> AsyncIterator[object]:
    # Loaded here, so that a test of one part does not need the whole relay.
    from tests.town import Town

    town = Town(tmp_path, authority)
    try:
        yield town
    finally:
        await town.close()
