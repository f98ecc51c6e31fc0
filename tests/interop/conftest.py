"""One real Synapse for all stories here, and for each story a relay of ours beside it. Skipped where there is no Synapse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scripts.certificates import Authority
from tests.interop.neighbour import Synapse, why_not
from tests.interop.street import Street
from tests.town import Town


@pytest.fixture(scope="session")
def synapse(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Synapse]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    synapse = Synapse(tmp_path_factory.mktemp("synapse"), authority)
    try:
        synapse.start()
        yield synapse
    finally:
        synapse.stop()


@pytest.fixture
def street(town: Town, synapse: Synapse) -> Street:
    return Street(town, synapse)
