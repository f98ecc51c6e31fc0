"""The number on an app's icon: how many notifications and invites wait for a person, over all her rooms.

Counted when a gateway is told, from what `unread` knows; only rooms in which something changed are counted again.
Spec: push-gateway-api/#post_matrixpushv1notify, counts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from relay.db import Database
from relay.ephemeral.receipts import PRIVATE, READ, UNTHREADED, Receipts
from relay.ephemeral.threads import MAIN, relation_of
from relay.push.rules import PushRules
from relay.push.unread import Unread
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.rooms.store import Stored

MAX_PEOPLE = 2_000
# Of somebody in more rooms than this, the others are not counted.
MAX_ROOMS_COUNTED = 1_000


class Badges:
    def __init__(self, db: Database, rooms: Rooms, unread: Unread, receipts: Receipts, rules: PushRules) -> None:
        self._db = db
        self._rooms = rooms
        self._unread = unread
        self._receipts = receipts
        # user -> room -> waiting; `changed` says which rooms have to be counted again.
        self._known: OrderedDict[str, dict[str, int]] = OrderedDict()
        self._stale: dict[str, set[str]] = {}
        # Called with the user where the number may have become smaller without an event to tell of.
        self.on_fall: list[Callable[[str], None]] = []
        # (user, room) -> whether an invite is held back from her; the server sets it.
        self.holds_back: Callable[[str, str], bool] | None = None
        receipts.on_read.append(self._fall)
        rooms.on_membership.append(self._membership_changed)
        rules.on_change.append(self._drop)
        rooms.on_withheld.append(self._withheld)

    def changed(self, user_id: str, room_id: str) -> None:
        if user_id in self._known:
            self._stale.setdefault(user_id, set()).add(room_id)

    def _membership_changed(self, room: Room, user_id: str, before: str | None, now: str, pos: int) -> None:
        if now != "invite":  # of an invite she is told by itself
            self._fall(user_id, room.room_id)

    def _withheld(self, room: Room) -> None:
        for user_id in tuple(room.local_joined):
            self._fall(user_id, room.room_id)

    def _fall(self, user_id: str, room_id: str) -> None:
        self.changed(user_id, room_id)
        for callback in self.on_fall:
            callback(user_id)

    def _drop(self, user_id: str) -> None:
        self._known.pop(user_id, None)
        self._stale.pop(user_id, None)

    async def of(self, user_id: str) -> int:
        joined = self._rooms.joined(user_id)
        known = self._known.get(user_id)
        if known is None:
            known = self._known[user_id] = {}
            if len(self._known) > MAX_PEOPLE:
                self._stale.pop(self._known.popitem(last=False)[0], None)
            stale = set(list(joined)[:MAX_ROOMS_COUNTED])
        else:
            self._known.move_to_end(user_id)
            stale = self._stale.pop(user_id, set())
        for room_id in stale:
            known[room_id] = (
                (await self._unread.counts(user_id, room_id, self._db.stable_pos()))[0] if room_id in joined else 0
            )
        holds_back = self.holds_back
        invites = sum(
            1
            for room_id, one in self._rooms.memberships(user_id).items()
            if one.membership == "invite" and not (holds_back is not None and holds_back(user_id, room_id))
        )
        return sum(known.values()) + invites

    async def has_read(self, user_id: str, one: Stored) -> bool:
        """Whether the person's receipts say that she saw this event."""
        relation = relation_of(one.event)
        thread = relation[1] if relation is not None and relation[0] == "m.thread" else MAIN
        read = (await self._receipts.own(user_id)).get(one.event.room_id, {})
        return any(
            kind in (READ, PRIVATE) and where in (UNTHREADED, thread) and pos >= (one.pos or 0)
            for (kind, where), pos in read.items()
        )
