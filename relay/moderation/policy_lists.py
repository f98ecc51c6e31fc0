"""The ban lists of others, from policy rooms that somebody of ours is in: applied, shown to the moderators, or ignored.

A list that is applied closes the doors: invites of those it names, rooms it names, and all traffic with servers it names.
One for review only raises a flag. People of this server are never turned away by somebody else's list: that is for our
own moderators. A server that they allow by name passes whatever lists say. Lists follow their rooms' state.
A list whose room was replaced is told of, so that its successor can be followed too.
Which lists: those of the config, and those that moderators chose while it runs (`list_following.py`), whose word counts more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from relay.clock import DAY, Clock
from relay.config.hooks import PolicyList
from relay.db import Database, Tx
from relay.doors import OpenDoors
from relay.errors import Forbidden, InvalidParam
from relay.ids import is_room_id, server_of
from relay.moderation.policy_rules import TYPES, Bans, Kind
from relay.part import Part
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.rooms.upgrade import TOMBSTONE
from relay.tables import Schema, Table

APPLY, REVIEW, IGNORE = "apply", "review", "ignore"
EFFECTS = (APPLY, REVIEW, IGNORE)
MAX_LISTS = 100

_LIFE = "until moderators choose anew"

# What kind of thing, which one, and the room of the list that names it.
OnMatch = Callable[[Kind, str, str], None]
# A list's room, the room that replaces it, and who said so.
OnReplaced = Callable[[str, str, str], Awaitable[None]]


class PolicyLists(Part):
    schema = Schema(
        "policy_lists",
        tables=(
            Table(
                "policy_lists",
                "what moderators chose to do with a ban list of others",
                {
                    "room_id": ("the list's room", _LIFE),
                    "effect": ("whether it is applied, shown for review, or ignored", _LIFE),
                    "since_day": ("the day of the choice", _LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE policy_lists (room_id TEXT PRIMARY KEY, effect TEXT NOT NULL, since_day BIGINT NOT NULL)
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock, rooms: Rooms, lists: Sequence[PolicyList]) -> None:
        self._db = db
        self._clock = clock
        self._rooms = rooms
        self._configured: dict[str, str] = {one.room_id: one.effect for one in lists}
        # Dropped from by nobody but `choose`, the only write to the table.
        self._chosen: dict[str, str] = {}
        self._effects = dict(self._configured)
        self._first = asyncio.Event()
        self._bans: dict[str, Bans] = {}
        self._seen: dict[str, int | None] = {}
        # list -> (the room that replaces its room, who said so); those that nobody was told of yet.
        self._replaced: dict[str, tuple[str, str]] = {}
        self._untold: set[str] = set()
        self.on_replaced: list[OnReplaced] = []
        # Told of what a list for review names, when it comes to a door.
        self.on_review: list[OnMatch] = []
        # Told when what the lists say has changed.
        self.on_change: list[Callable[[], None]] = []

    async def open(self) -> None:
        """Before anybody is let in."""
        rows = await self._db.read(lambda query: query.all("SELECT room_id, effect FROM policy_lists"))
        self._chosen = dict(rows)
        self._put_together()

    def _put_together(self) -> None:
        self._effects = {**self._configured, **self._chosen}
        if self:
            self._first.set()

    @property
    def chosen(self) -> int:
        """How many were chosen."""
        return len(self._chosen)

    def effect_of(self, room_id: str) -> str | None:
        return self._effects.get(room_id)

    def is_followed(self, room_id: str) -> bool:
        """Whether the relay reads this room as a list: such a room it may join though it is not encrypted."""
        return self._effects.get(room_id, IGNORE) != IGNORE

    def choose(self, tx: Tx, room_id: str, effect: str | None) -> None:
        """None: what the config says of it counts again. Call `look_again` when it is written. Raises InvalidParam."""
        if effect is None:
            tx.run("DELETE FROM policy_lists WHERE room_id = $1", room_id)
        else:
            if room_id not in self._chosen and len(self._chosen) >= MAX_LISTS:
                raise InvalidParam(f"{MAX_LISTS} lists are followed already. Follow one of them no longer first.")
            tx.run(
                "INSERT INTO policy_lists (room_id, effect, since_day) VALUES ($1, $2, $3) "
                "ON CONFLICT (room_id) DO UPDATE SET effect = excluded.effect, since_day = excluded.since_day",
                room_id, effect, self._clock.now() // DAY * DAY,
            )  # fmt: skip

        def take() -> None:
            if effect is None:
                self._chosen.pop(room_id, None)
            else:
                self._chosen[room_id] = effect
            self._put_together()

        tx.after(take)

    async def look_again(self, room_id: str) -> None:
        """After a choice, or after somebody of ours came into the list's room."""
        if self.is_followed(room_id):
            await self._look(room_id)
        self._changed()

    def _changed(self) -> None:
        for told in self.on_change:
            told()

    def __bool__(self) -> bool:
        return any(effect != IGNORE for effect in self._effects.values())

    async def run(self) -> None:
        """Reads a list anew whenever its room's state has changed."""
        await self._first.wait()
        while True:
            since = self._db.stable_pos()
            changed = False
            for room_id, effect in list(self._effects.items()):
                changed |= effect != IGNORE and await self._look(room_id)
            if changed:
                self._changed()
            while self._untold:
                room_id = self._untold.pop()
                for told in self.on_replaced:
                    await told(room_id, *self._replaced[room_id])
            await self._db.bell.wait_line(since)

    async def _look(self, room_id: str) -> bool:
        room = await self._rooms.get(room_id)
        # Where nobody of ours is, nothing new is heard: what was known holds no longer.
        now = room.state_nid if room is not None and room.local_joined else None
        if self._seen.get(room_id, 0) == now:
            return False
        self._seen[room_id] = now
        self._bans[room_id] = await _read(room) if room is not None and now is not None else Bans()
        tombstone = await room.event(TOMBSTONE, "") if room is not None and now is not None else None
        successor = tombstone.content.get("replacement_room") if tombstone is not None else None
        if tombstone is None or not isinstance(successor, str) or not is_room_id(successor) or successor == room_id:
            self._replaced.pop(room_id, None)
            self._untold.discard(room_id)
        elif self._replaced.get(room_id) != (found := (successor, tombstone.sender)):
            self._replaced[room_id] = found
            self._untold.add(room_id)
        return True

    def _named_by(self, effect: str, match: Callable[[Bans], bool]) -> str | None:
        for room_id, its in self._effects.items():
            if its == effect and (bans := self._bans.get(room_id)) is not None and match(bans):
                return room_id
        return None

    def server_rule(self, server_name: str) -> str | None:
        """For `Restrictions.further`."""
        return "block" if self._named_by(APPLY, lambda bans: bans.match_server(server_name)) is not None else None

    def require_user(self, user_id: str) -> None:
        """Raises Forbidden where a list that is applied names this person."""
        if self._named_by(APPLY, lambda bans: bans.match_user(user_id)) is not None:
            raise Forbidden("This server follows a list that bans this person or server.")
        found = self._named_by(REVIEW, lambda bans: bans.match_user(user_id))
        if found is not None:
            self._tell("user", user_id, found)

    def closes(self, room_id: str) -> bool:
        return self._named_by(APPLY, lambda bans: bans.match("room", room_id)) is not None

    def require_room(self, room_id: str) -> None:
        if self.closes(room_id):
            raise Forbidden(
                "This server follows a list that bans this room. Ask its moderators if you think that is a mistake."
            )
        found = self._named_by(REVIEW, lambda bans: bans.match("room", room_id))
        if found is not None:
            self._tell("room", room_id, found)

    def _tell(self, kind: Kind, subject: str, room_id: str) -> None:
        for told in self.on_review:
            told(kind, subject, room_id)

    def listing(self) -> list[dict[str, Any]]:
        """For the moderators: which lists are followed, with what effect, and how much they say."""
        return [
            {
                "room_id": room_id,
                "effect": effect,
                "chosen_by": "moderators" if room_id in self._chosen else "config",
                "rules": self._bans[room_id].count if room_id in self._bans else 0,
                "heard": effect == IGNORE or self._seen.get(room_id) is not None,
                "replaced_by": self._replaced[room_id][0] if room_id in self._replaced else None,
            }
            for room_id, effect in self._effects.items()
        ]


class PolicyListDoors(OpenDoors):
    def __init__(self, lists: PolicyLists, server_name: str) -> None:
        self._lists = lists
        self._server_name = server_name

    async def invite(self, sender: str, target: str, room_id: str) -> None:
        self._lists.require_room(room_id)
        if server_of(sender) != self._server_name:
            self._lists.require_user(sender)

    async def join(self, user_id: str, room_id: str) -> None:
        self._lists.require_room(room_id)

    async def knock(self, user_id: str, room_id: str) -> None:
        self._lists.require_room(room_id)

    async def alias(self, user_id: str, alias: str, room_id: str) -> None:
        self._lists.require_room(room_id)

    async def publish_room(self, user_id: str, room_id: str) -> None:
        self._lists.require_room(room_id)


async def _read(room: Room) -> Bans:
    found = await room.state_events([key for key in list(room.entries) if key[0] in TYPES])
    return Bans((key[0], event.content) for key, event in found.items())
