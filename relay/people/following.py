"""What a person set for a room follows her into the one that replaced it: tags, push rules, and whose direct chat it is.

A follower of the log: it looks at each join of a local person, whoever made the upgrade and wherever, and asks the new room's
create event for its predecessor. Nothing is taken away from the old room. Spec: client-server-api/#room-upgrades.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import orjson

from relay.db import Database, Query
from relay.errors import ApiError
from relay.ids import is_room_id, server_of
from relay.part import Part
from relay.people.account_data import AccountData
from relay.people.tags import TAGS, tags_in
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms

NAME = "following"
DIRECT = "m.direct"
JOINS_AT_ONCE = 500


class CarriesRules(Protocol):
    """`push/rules.py`."""

    async def carry_over(self, user_id: str, old_room: str, new_room: str) -> None: ...


class Following(Part):
    def __init__(self, db: Database, rooms: Rooms, account_data: AccountData, push_rules: CarriesRules) -> None:
        self._db = db
        self._rooms = rooms
        self._account_data = account_data
        self._push_rules = push_rules
        self._server_name = rooms.server_name
        self._somebody_came = asyncio.Event()
        rooms.on_membership.append(self._take)

    def _take(self, room: Room, user_id: str, before: str | None, now: str, pos: int) -> None:
        if now == "join" and before != "join" and server_of(user_id) == self._server_name:
            self._somebody_came.set()

    async def run(self) -> None:
        pos = await self._db.followed(NAME)
        if pos is None:
            pos = self._db.stable_pos()
            await self._db.follow(NAME, pos)
        self._somebody_came.set()
        while True:
            await self._somebody_came.wait()
            self._somebody_came.clear()
            pos = await self._from(pos)

    async def _from(self, pos: int) -> int:
        while True:
            upto = self._db.stable_pos()
            rows = await self._db.read(_joins, pos, upto)
            for _, user_id, room_id in rows:
                if server_of(user_id) == self._server_name:
                    await self._carry(user_id, room_id)
            full = len(rows) == JOINS_AT_ONCE
            pos = rows[-1][0] if full else max(pos, upto)
            if rows:
                await self._db.follow(NAME, pos)
            if not full:
                return pos

    async def _carry(self, user_id: str, new: str) -> None:
        room = await self._rooms.get(new)
        if room is None or not room.known:
            return
        predecessor = (await room.content("m.room.create")).get("predecessor")
        old = predecessor.get("room_id") if isinstance(predecessor, dict) else None
        # Any room may claim any other: it has to be one that she was in herself.
        if not is_room_id(old) or self._rooms.membership(str(old), user_id) not in ("join", "leave"):
            return
        try:
            await self._carry_tags(user_id, str(old), new)
            await self._carry_direct(user_id, str(old), new)
            await self._push_rules.carry_over(user_id, str(old), new)
        except ApiError:
            # Too many tags or rules: then the new room begins without them.
            return

    async def _carry_tags(self, user_id: str, old: str, new: str) -> None:
        tags = tags_in(await self._account_data.get(user_id, TAGS, old))
        if tags and not tags_in(await self._account_data.get(user_id, TAGS, new)):
            with self._db.write() as tx:
                self._account_data.set(tx, user_id, TAGS, {"tags": tags}, new)
            await tx

    async def _carry_direct(self, user_id: str, old: str, new: str) -> None:
        if not _with_new(await self._account_data.get(user_id, DIRECT), old, new):
            return

        def changed(raw: bytes | None) -> bytes:
            # Read once more in the write itself: her client may have changed it meanwhile.
            content = orjson.loads(raw) if raw is not None else {}
            return orjson.dumps(_with_new(content, old, new) or content)

        with self._db.write() as tx:
            self._account_data.change(tx, user_id, DIRECT, changed)
        await tx


def _with_new(content: Any, old: str, new: str) -> dict[str, Any] | None:
    """m.direct with the new room beside the old one; None where there is nothing to add."""
    if not isinstance(content, dict):
        return None
    added = {
        who: [*rooms, new]
        for who, rooms in content.items()
        if isinstance(rooms, list) and old in rooms and new not in rooms
    }
    return {**content, **added} if added else None


def _joins(query: Query, pos: int, upto: int) -> list[tuple[int, str, str]]:
    rows = query.all(
        "SELECT l.pos, l.user_id, r.room_id FROM membership_log l JOIN rooms r ON r.nid = l.room_nid "
        "WHERE l.pos > $1 AND l.pos <= $2 AND l.after = 'join' ORDER BY l.pos LIMIT $3",
        pos,
        upto,
        JOINS_AT_ONCE,
    )
    return [(row[0], row[1], row[2]) for row in rows]
