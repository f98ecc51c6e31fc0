"""A street with two houses: a relay of ours (`ours`) and a real Synapse (`theirs`), and what stories about both need."""

from __future__ import annotations

from typing import Any

from tests.interop.neighbour import Synapse, encrypted
from tests.people import Person
from tests.town import Town

OURS, THEIRS = "ours", "theirs"
SIDES = (OURS, THEIRS)


class Street:
    def __init__(self, town: Town, synapse: Synapse) -> None:
        self.town = town
        self.synapse = synapse

    async def user(self, name: str, side: str) -> Person:
        if side == OURS:
            return await self.town.user(f"{name}@{OURS}")
        return await self.synapse.user(self.town.http, name)

    async def two(self, first: str = OURS) -> tuple[Person, Person]:
        """Alice on the side that is named first, Bob on the other."""
        second = THEIRS if first == OURS else OURS
        return await self.user("alice", first), await self.user("bob", second)

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
        joined = await guest.notices(lambda: room in guest.rooms)
        assert joined, f"{guest.id} is in the room"
