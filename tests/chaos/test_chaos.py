"""Wires break, relays are killed and come back with another time, and everybody talks on. When the weather has cleared, all
servers hold the same state, and every message that one of them accepted is with all of them, once.

`scripts/chaos --seed N --minutes M` runs it for longer, and with other seeds.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.chaos.country import SYNAPSE, Country
from tests.chaos.crowd import Crowd, answered
from tests.interop.neighbour import encrypted, why_not
from tests.people import Person, Refused
from tests.town import Town

SEED = int(os.environ.get("CHAOS_SEED", "1"))
SECONDS = float(os.environ.get("CHAOS_SECONDS", "8"))
# From the last storm until all agree: Synapse tries again when it likes, and a loaded machine is slow.
CALM_SECONDS = float(os.environ.get("CHAOS_CALM", "240"))


@pytest.mark.parametrize(("with_synapse", "version"), [(True, "11"), (False, "12")], ids=["synapse", "relays"])
async def test_all_agree_and_nothing_is_lost(town: Town, tmp_path: Path, with_synapse: bool, version: str) -> None:
    if with_synapse and (reason := why_not()) is not None:
        pytest.skip(reason)
    country = Country(town, SEED)
    folder = tmp_path / SYNAPSE
    folder.mkdir()
    async with opened(country, folder if with_synapse else None):
        crowd = await _gathers(country, version)
        talking = asyncio.create_task(crowd.talks())
        try:
            await country.weather(SECONDS)
        finally:
            crowd.ends()
            await talking
        print(f"seed {SEED}: {len(crowd.said)} messages, {sum(map(len, crowd.told.values()))} to devices")
        lacking = "nothing was looked at"
        deadline = time.monotonic() + CALM_SECONDS
        while lacking and time.monotonic() < deadline:
            # What is said now ties together what the storm tore apart, and makes everybody try everybody again.
            for speaker in crowd.speakers:
                await crowd.says(speaker)
            await asyncio.sleep(0.5)
            lacking = await _what_is_missing(crowd)
        assert not lacking, f"seed {SEED}: {lacking}\n{country.logs()}"


@asynccontextmanager
async def opened(country: Country, synapse_folder: Path | None) -> AsyncIterator[None]:
    try:
        await country.opens(synapse_folder)
        yield
    finally:
        await country.closes()


async def _gathers(country: Country, version: str) -> Crowd:
    """Everybody in one encrypted room that anybody may come into."""
    speakers = [await country.user(f"speaker-{name}", name) for name in country.names]
    guests = [await country.user(f"guest-{name}", name) for name in country.names]
    host = speakers[0]
    others = speakers if version != "12" else speakers[1:]
    powers = {"power_level_content_override": {"users": {one.id: 100 for one in others}}}
    room = await host.creates_room(**encrypted(preset="public_chat", room_version=version, **powers))
    for other in [*speakers[1:], *guests]:
        await answered(lambda other=other: other.joins(room, host.server))
    for speaker in speakers:
        await speaker.syncs()
    return Crowd(SEED, room, speakers, guests)


async def _what_is_missing(crowd: Crowd) -> str:
    """In words; empty where all is well."""
    try:
        states = await crowd.states()
        for speaker, state in zip(crowd.speakers[1:], states[1:], strict=True):
            if differs := {key for key in states[0].keys() | state.keys() if states[0].get(key) != state.get(key)}:
                return f"{speaker.name} and {crowd.speakers[0].name} have another {sorted(differs)[:5]}"
        for speaker in crowd.speakers:
            if wrong := await _missed(crowd, speaker):
                return wrong
    except (Refused, aiohttp.ClientError, OSError, TimeoutError) as error:
        return f"a server does not answer: {error}"
    return ""


async def _missed(crowd: Crowd, listener: Person) -> str:
    heard = await crowd.heard(listener)
    twice = [mark for mark, event_ids in heard.items() if len(event_ids) > 1]
    assert not twice, f"{listener.name} hears {twice[:5]} twice"
    if lost := [mark for mark in crowd.said if mark not in heard]:
        return f"{listener.name} lacks {len(lost)} of {len(crowd.said)} messages, {crowd.said[lost[0]]} for one"
    assert {mark: [event_id] for mark, event_id in crowd.said.items()} == {m: heard[m] for m in crowd.said}
    await listener.syncs()
    told, arrived = crowd.told[listener.id], crowd.devices_heard(listener)
    assert len(arrived) == len(set(arrived)), f"{listener.name}'s device is told something twice"
    if lost := [mark for mark in told if mark not in set(arrived)]:
        return f"{listener.name}'s device lacks {len(lost)} of {len(told)}"
    return ""
