"""What a person was notified of lately: computed from the log by her present rules when she asks, and kept nowhere.

A request looks through a bounded stretch of the log, newest first, and says where to go on.
Spec: client-server-api/#get_matrixclientv3notifications.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from relay.db import Database, Query, Row
from relay.errors import InvalidParam
from relay.part import Part
from relay.protocol.pushrules import EventView
from relay.protocol.versions import VERSIONS
from relay.push.badges import Badges
from relay.push.rules import PushRules
from relay.rooms import format, store
from relay.rooms.rooms import Rooms
from relay.rooms.store import Stored
from relay.web import Answer, Request, Route

DEFAULT_LIMIT = 20
MAX_LIMIT = 100
# One look covers this many positions of the log, and a request looks this often.
STRETCH = 20_000
MAX_LOOKS = 5
MAX_EVENTS_A_LOOK = 500


class Notifications(Part):
    def __init__(
        self,
        db: Database,
        rooms: Rooms,
        rules: PushRules,
        badges: Badges,
        ignored_by: Callable[[str], Awaitable[frozenset[str]]],
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._rules = rules
        self._badges = badges
        self._ignored_by = ignored_by

    def routes(self) -> Iterable[Route]:
        yield Route("GET", "/_matrix/client/v3/notifications", self._notifications)

    async def _notifications(self, request: Request) -> Answer:
        limit = min(request.query_int("limit", DEFAULT_LIMIT, low=1), MAX_LIMIT)
        highlights = "highlight" in request.query.get("only", "").split(",")
        before = self._start(request)
        found: list[dict[str, Any]] = []
        for _ in range(MAX_LOOKS):
            if before <= 0 or len(found) >= limit:
                break
            stretch = max(0, before - STRETCH)
            events = await self._db.read(_events_of, request.user_id, stretch, before)
            before = (events[-1].pos or 0) if len(events) == MAX_EVENTS_A_LOOK else stretch
            for one in events:
                told = await self._told(request.user_id, one, highlights)
                if told is not None:
                    found.append(told)
                    if len(found) == limit:
                        before = one.pos or 0
                        break
        answer: dict[str, Any] = {"notifications": found}
        if before > 0:
            answer["next_token"] = str(before)
        return answer

    def _start(self, request: Request) -> int:
        """Positions below this one."""
        text = request.query.get("from")
        newest = self._db.stable_pos() + 1
        if text is None:
            return newest
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise InvalidParam("The parameter from is not a next_token of this endpoint.")
        return min(int(text), newest)

    async def _told(self, user_id: str, one: Stored, highlights: bool) -> dict[str, Any] | None:
        room = await self._rooms.get(one.event.room_id)
        if room is None or one.taken_back or one.event.sender in await self._ignored_by(user_id):
            return None
        levels = await room.levels() if "m.mentions" in one.event.content else None
        view = EventView.of(one.event, member_count=room.joined_count, levels=levels)
        ruleset = self._rules.known(user_id) or await self._rules.ruleset(user_id)
        actions = ruleset.evaluate(view, user_id)
        if not actions.notify or (highlights and not actions.highlight):
            return None
        tweaks = [{"set_tweak": tweak, "value": value} for tweak, value in actions.tweaks.items()]
        return {
            "actions": ["notify", *tweaks],
            "event": format.finished(format.shared_body(one), None, {}),
            "read": await self._badges.has_read(user_id, one),
            "room_id": one.event.room_id,
            "ts": one.event.origin_server_ts,
        }


def _events_of(query: Query, user_id: str, after: int, before: int) -> list[Stored]:
    """The timeline events of others in (after, before) in the rooms that this person is in, newest first."""
    rows: list[Row] = query.all(
        f"SELECT {store.COLUMNS}, r.version FROM memberships m JOIN rooms r ON r.nid = m.room_nid"
        " JOIN events e ON e.room_nid = m.room_nid"
        " WHERE m.user_id = $1 AND m.membership = 'join' AND e.pos > $2 AND e.pos < $3 AND e.pos >= m.since_pos"
        f" AND e.sender <> $1 AND (e.marks & {store.HIDDEN | store.HISTORY}) = 0 ORDER BY e.pos DESC LIMIT $4",
        user_id,
        after,
        before,
        MAX_EVENTS_A_LOOK,
    )
    return [store.stored(row, VERSIONS[row[store.WIDTH]]) for row in rows]
