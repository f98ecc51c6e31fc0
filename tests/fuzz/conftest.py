"""What the fuzzing stories share: somebody who listens whether anything broke inside the relay."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.fuzz.overheard import Ears, overhearing
from tests.fuzz.place import Place
from tests.fuzz.scene import Scene
from tests.town import Town


@pytest.fixture
def ears(town: Town, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ears]:
    """Needs the town, so that every module of the relay is loaded."""
    with overhearing(monkeypatch) as ears:
        yield ears


@pytest.fixture
async def scene(town: Town, ears: Ears) -> AsyncIterator[Scene]:
    scene = await Scene(town, ears).opens()
    yield scene
    await scene.stranger.leaves_town()


@pytest.fixture
async def place(town: Town) -> Place:
    return await Place(town).opens()
