"""What the fuzzing stories share: somebody who listens whether anything broke inside the relay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.overheard import Ears, overhearing


@pytest.fixture
def ears(town: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ears]:
    """Needs the town, so that every module of the relay is loaded."""
    with overhearing(monkeypatch) as ears:
        yield ears
