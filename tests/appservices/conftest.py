"""Relays with services: `hires` opens a small service, writes its registration into a relay's folder and starts the relay."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.appservices.service import Service
from tests.town import Town

Hires = Callable[..., Awaitable[Service]]


@pytest.fixture
async def hires(town: Town) -> AsyncIterator[Hires]:
    opened: list[Service] = []

    async def hire(
        name: str = "bridge", *, house: str = "one", settings: str = "", apart: bool = False, **more: Any
    ) -> Service:
        service = Service(town.http, name)
        await service.opens()
        opened.append(service)
        folder = town.folder / house
        folder.mkdir(mode=0o700, exist_ok=True)
        settings += service.registers_at(folder, **more)
        service.settles(await (town.relay_apart if apart else town.relay)(house, settings))
        return service

    try:
        yield hire
    finally:
        for service in opened:
            await service.closes()
