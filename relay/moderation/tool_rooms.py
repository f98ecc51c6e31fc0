"""Rooms for a moderation bot that can't decrypt, such as Draupnir's management room: the one kind of readable room.

The operator makes one with a command and lists it in `privacy.clear_rooms`; nobody else can make a room without
encryption. It never leaves this server. `relay check` warns where a listed room has members elsewhere: what stands in it
speaks of people.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from relay.accounts.users import Users
from relay.errors import NotFound
from relay.rooms.rooms import Rooms


class Makes(Protocol):
    """`rooms/create.py`, without the seal and the doors."""

    async def create(self, user_id: str, body: dict[str, Any], invites: Any) -> str: ...


class ToolRooms:
    def __init__(self, users: Users, rooms: Rooms, makes: Makes, clear_rooms: Collection[str]) -> None:
        self._users = users
        self._rooms = rooms
        self._makes = makes
        self._clear_rooms = frozenset(clear_rooms)

    async def make_command(self, *, user: str) -> dict[str, Any]:
        found = await self._users.get(self._users.full_id(user))
        if found.deactivated:
            raise NotFound(f"The account {found.user_id} is closed for good.")
        body = {"preset": "private_chat", "creation_content": {"m.federate": False}}
        return {"room_id": await self._makes.create(found.user_id, body, None), "creator": found.user_id}

    async def check(self) -> list[dict[str, str]]:
        """For `relay check`."""
        found = []
        for room_id in sorted(self._clear_rooms):
            room = await self._rooms.get(room_id)
            if room is None or not room.known:
                what = f"privacy.clear_rooms lists {room_id}, which nobody here has ever been in."
                found.append({"severity": "warning", "what": what, "todo": "Take it out, or correct it."})
            elif room.shared:
                what = f"The readable room {room_id} has members on other servers, who read what is said about people."
                todo = "Use a room of `relay hooks management-room`, which never leaves this server."
                found.append({"severity": "warning", "what": what, "todo": todo})
        return found
