"""A street with two houses: a relay of ours (`ours`) and a real Synapse (`theirs`), and what stories about both need."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from federation.inbound import Inbound
from tests.interop.neighbour import Synapse, encrypted
from tests.people import Json, Person
from tests.town import Town, Within

OURS, THEIRS = "ours", "theirs"
# Who makes the room; the other one comes into it.
both_sides = pytest.mark.parametrize("host", [OURS, THEIRS])


class Street:
    def __init__(self, town: Town, synapse: Synapse) -> None:
        self.town = town
        self.synapse = synapse

    async def relay(self) -> Within:
        return await self.town.relay(OURS)

    async def user(self, name: str, side: str) -> Person:
        if side == OURS:
            return await self.town.user(f"{name}@{OURS}")
        return await self.synapse.user(self.town.http, name)

    async def two(self, first: str = OURS) -> tuple[Person, Person]:
        """Alice on the side that is named first, Bob on the other."""
        return await self.user("alice", first), await self.user("bob", other(first))

    async def room(self, host: Person, *guests: Person, **body: Any) -> str:
        """An encrypted room into which everybody named was invited and came."""
        room = await host.creates_room(**encrypted(**body))
        for guest in guests:
            await self.welcomes(host, guest, room)
        return room

    async def welcomes(self, host: Person, guest: Person, room: str) -> None:
        await host.invites_to(room, guest)
        assert await guest.notices(lambda: room in guest.invites), f"the invitation reaches {guest.id}"
        await guest.joins(room, host.server)
        assert await guest.notices(lambda: room in guest.rooms), f"{guest.id} is in the room"
        assert await host.notices(lambda: host.membership(room, guest) == "join"), f"{host.id} sees her come"


def other(side: str) -> str:
    return THEIRS if side == OURS else OURS


async def they_talk(room: str, *people: Person) -> None:
    """Each says something, and everybody hears it."""
    for speaker in people:
        sent = await speaker.sends(room)
        for listener in people:
            assert await listener.sees(sent), f"{listener.id} hears what {speaker.id} says"


async def hears_at_last(listener: Person, room: str, event_id: str) -> list[str]:
    """Synapse tries a server again only when something makes it, and the words of our people do. Returns their event IDs."""
    said = []
    for _ in range(6):
        said.append(await listener.sends(room))
        if await listener.sees(event_id, within=3):
            return said
    raise AssertionError(f"{listener.id} never hears what was said while her server was away")


async def becomes(watcher: Person, room: str, who: Person, membership: str) -> bool:
    return await watcher.notices(lambda: watcher.membership(room, who) == membership)


async def state_of(person: Person, room: str) -> dict[tuple[str, str], str]:
    """Which event holds for each key, as her server has it."""
    # Typed loosely: this one endpoint answers with a list.
    events: Any = await person.calls("GET", f"rooms/{room}/state")
    return {(event["type"], event["state_key"]): event["event_id"] for event in events}


def olm(mark: str) -> Json:
    """A message to a device, as it looks to everybody without the key."""
    return {
        "algorithm": "m.olm.v1.curve25519-aes-sha2",
        "sender_key": "c2VuZGVyc2VuZGVyc2VuZGVyc2VuZGVyc2VuZGVyc2U",
        "ciphertext": {"cmVjaXBpZW50cmVjaXBpZW50cmVjaXBpZW50cmVjaXA": {"type": 0, "body": mark}},
    }


class Silence:
    """The wire between our relay and Synapse is cut both ways, until `ends`: what comes in meanwhile waits at our door."""

    def __init__(self, street: Street, relay: Within) -> None:
        assert relay.server is not None, "the relay runs"
        self._street = street
        self._cut = (relay.nickname, street.synapse.federation_port)
        self._over = asyncio.Event()
        inbound = next(part for part in relay.server._parts if isinstance(part, Inbound))
        self._receiver, self._receive = inbound._receiver, inbound._receiver.receive
        self._receiver.receive = self._waits  # type: ignore[method-assign]
        street.town._cuts.add(self._cut)

    async def _waits(self, *what: Any, **more: Any) -> Any:
        await self._over.wait()
        return await self._receive(*what, **more)

    def ends(self) -> None:
        self._receiver.receive = self._receive  # type: ignore[method-assign]
        self._street.town._cuts.discard(self._cut)
        self._over.set()
        # The outbox waits before it tries again.
        self._street.town.clock.forward(minutes=5)
