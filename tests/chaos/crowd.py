"""Who talks through the weather: a speaker on each server, whose every accepted word has to arrive, and a guest on each, who
comes and goes, is put out and let back in. A client that gets no answer asks again, as real ones do."""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import aiohttp

from tests.people import Json, Person, Refused, ciphertext, path

MAX_TRIES = 2_000
PAUSE_SECONDS = 0.05


async def answered(doing: Callable[[], Awaitable[Any]]) -> Any:
    """Until her server answers: what it refuses for good raises Refused. For what may be said twice and counts once."""
    for _ in range(MAX_TRIES):
        try:
            return await doing()
        except Refused as refused:
            if refused.status < 500 and refused.status != 429:
                raise
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass
        await asyncio.sleep(PAUSE_SECONDS)
    raise AssertionError("her server gives no answer")


class Crowd:
    def __init__(self, seed: int, room: str, speakers: list[Person], guests: list[Person]) -> None:
        self._seed = seed
        self.room = room
        self.speakers = speakers
        self.guests = guests
        # The mark of each accepted message -> its event; the marks of what was told to the devices of each.
        self.said: dict[str, str] = {}
        self.told: dict[str, list[str]] = {speaker.id: [] for speaker in speakers}
        self._over = asyncio.Event()
        self._numbers = {speaker.id: 0 for speaker in speakers}

    async def talks(self) -> None:
        """Until `ends`."""
        await asyncio.gather(
            *(self._speaks(speaker, random.Random(f"{self._seed} {speaker.name}")) for speaker in self.speakers),
            *(self._wanders(guest, random.Random(f"{self._seed} {guest.name}")) for guest in self.guests),
        )

    def ends(self) -> None:
        self._over.set()

    # --- the speakers

    async def _speaks(self, speaker: Person, chance: random.Random) -> None:
        while not self._over.is_set():
            with suppress(Refused):
                await self._does_something(speaker, chance)
            await asyncio.sleep(chance.uniform(0.0, 0.1))

    async def _does_something(self, speaker: Person, chance: random.Random) -> None:
        what, guest, note = chance.random(), chance.choice(self.guests), f"{speaker.name} {chance.random()}"
        other = chance.choice([one for one in self.speakers if one is not speaker])
        if what < 0.6:
            await self.says(speaker)
        elif what < 0.7:
            await self._tells(speaker, other)
        elif what < 0.76:
            await self._tries(speaker.sets(self.room, "m.room.name", {"name": note}))
        elif what < 0.8:
            await self._tries(speaker.sets(self.room, "m.room.topic", {"topic": note}))
        elif what < 0.84:
            await self._tries(self._empowers(speaker, guest, chance.choice([0, 10, 50])))
        elif what < 0.88:
            await self._tries(speaker.invites_to(self.room, guest))
        elif what < 0.92:
            await self._tries(speaker.kicks(self.room, guest))
        elif what < 0.96:
            await self._tries(speaker.bans(self.room, guest))
        else:
            await self._tries(speaker.unbans(self.room, guest))

    async def says(self, speaker: Person) -> str:
        """Says it until it is taken, under one transaction ID: it must be there once."""
        mark = self._mark(speaker)
        content = {**ciphertext(), "ciphertext": mark}
        event_id = str(await answered(lambda: speaker.sends(self.room, content, txn=mark)))
        self.said[mark] = event_id
        return event_id

    async def _tells(self, speaker: Person, other: Person) -> None:
        mark = self._mark(speaker)
        body: Json = {
            "algorithm": "m.olm.v1.curve25519-aes-sha2",
            "sender_key": "k" * 43,
            "ciphertext": {"k" * 43: {"type": 0, "body": mark}},
        }
        messages = {other.id: {other.device: body}}
        await answered(lambda: speaker.tells_devices("m.room.encrypted", messages, txn=mark))
        self.told[other.id].append(mark)

    def _mark(self, speaker: Person) -> str:
        self._numbers[speaker.id] += 1
        word = f"{speaker.name:<12}{self._numbers[speaker.id]:012}"
        return base64.b64encode(word.encode()).decode().rstrip("=")

    async def _empowers(self, speaker: Person, guest: Person, power: int) -> None:
        levels = await speaker.reads(self.room, "m.room.power_levels")
        levels["users"] = {**levels.get("users", {}), guest.id: power}
        await speaker.sets(self.room, "m.room.power_levels", levels)

    async def _tries(self, doing: Awaitable[Any]) -> None:
        """What counts for nobody whether it was done."""
        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            await doing

    # --- the guests

    async def _wanders(self, guest: Person, chance: random.Random) -> None:
        while not self._over.is_set():
            what, via = chance.random(), chance.choice(self.speakers).server
            with suppress(Refused):
                if what < 0.4:
                    await self._tries(guest.joins(self.room, via))
                elif what < 0.5:
                    await self._tries(guest.leaves(self.room))
                elif what < 0.8:
                    await self._tries(guest.sends(self.room))
                elif what < 0.9:
                    await self._tries(guest.sets(self.room, "m.room.name", {"name": f"{guest.name} {chance.random()}"}))
                else:
                    await self._tries(guest.calls("GET", "sync", timeout=0))
            await asyncio.sleep(chance.uniform(0.05, 0.3))

    # --- afterwards

    async def states(self) -> list[dict[tuple[str, str], str]]:
        """What each speaker's server says the room is."""
        found = []
        for speaker in self.speakers:
            events = await speaker.calls("GET", f"{path('rooms', self.room)}/state")
            found.append({(e["type"], e["state_key"]): e["event_id"] for e in events})  # type: ignore[index]
        return found

    async def heard(self, listener: Person) -> dict[str, list[str]]:
        """Of all the speakers' messages what her server gives her as the room's history: mark -> its events."""
        found: dict[str, list[str]] = {}
        speakers = {speaker.id for speaker in self.speakers}
        for event in await listener.history(self.room, step=100, most=50_000):
            if event["type"] == "m.room.encrypted" and event["sender"] in speakers:
                found.setdefault(str(event["content"].get("ciphertext")), []).append(event["event_id"])
        return found

    def devices_heard(self, listener: Person) -> list[str]:
        return [next(iter(message["content"]["ciphertext"].values()))["body"] for message in listener.to_device]
