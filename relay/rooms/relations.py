"""What answers what: the events that relate to one, and a room's threads.

Only relations in clear can be followed: those inside a ciphertext are the clients' own. What an event says of its children
in `unsigned` is made in `format.py`. Spec: client-server-api/#relationships-api, #querying-threads-in-a-room.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from relay.db import Database, Query
from relay.errors import InvalidParam, NotFound
from relay.part import Part
from relay.rooms import format, store
from relay.rooms.erasure import as_served
from relay.rooms.store import COLUMNS, HIDDEN, UNCOUNTED, Stored, stored
from relay.rooms.timeline import Direction, HistoryToken, place
from relay.rooms.viewing import View, Viewing, judged, recall_transactions
from relay.web import Answer, Request, Route

DEFAULT_LIMIT = 50
MAX_LIMIT = 500
# Spec: client-server-api/#relationships-api: how deep servers should look.
MAX_HOPS = 3
MAX_RECURSED = 5000
# Where much is hidden from her, one request looks through this many.
MAX_SCANNED = 2000

_THREAD_TOKEN = re.compile(r"r(\d{1,19})_(\d{1,19})\Z")

_CHILDREN = (
    f"SELECT {COLUMNS} FROM relations r JOIN events e ON e.nid = r.event_nid WHERE r.target_id = $1 AND r.room_nid = $2 "
    "AND e.pos IS NOT NULL AND (e.depth, e.pos) <= ($3, $4) AND (e.depth, e.pos) > ($5, $6) "
    f"AND e.redacted_by IS NULL AND (e.marks & {UNCOUNTED}) = 0 "
    "AND (CAST($7 AS TEXT) IS NULL OR r.rel_type = $7) AND (CAST($8 AS TEXT) IS NULL OR e.type = $8) "
)
# An event relates to one other at most, so that there is one way to each.
_DESCENDANTS = (
    "WITH RECURSIVE family (nid, event_id, room_nid, rel_type, hop) AS ("
    "SELECT e.nid, e.event_id, r.room_nid, r.rel_type, 1 FROM relations r JOIN events e ON e.nid = r.event_nid WHERE r.target_id = $1 "
    "UNION ALL SELECT e.nid, e.event_id, r.room_nid, r.rel_type, family.hop + 1 FROM family "
    "JOIN relations r ON r.target_id = family.event_id JOIN events e ON e.nid = r.event_nid WHERE family.hop < $10) "
    f"SELECT {COLUMNS} FROM (SELECT nid, room_nid, rel_type FROM family LIMIT {MAX_RECURSED}) r JOIN events e ON e.nid = r.nid "
    "WHERE r.room_nid = $2 AND e.pos IS NOT NULL AND (e.depth, e.pos) <= ($3, $4) AND (e.depth, e.pos) > ($5, $6) "
    f"AND e.redacted_by IS NULL AND (e.marks & {UNCOUNTED}) = 0 "
    "AND (CAST($7 AS TEXT) IS NULL OR r.rel_type = $7) AND (CAST($8 AS TEXT) IS NULL OR e.type = $8) "
)
_NEWEST_FIRST = "ORDER BY e.depth DESC, e.pos DESC LIMIT $9"
_OLDEST_FIRST = "ORDER BY e.depth, e.pos LIMIT $9"

# The roots of threads, the one that was answered last first.
_ROOTS = (
    "SELECT t.nid, t.latest FROM (SELECT root.nid AS nid, max(e.depth) AS latest FROM relations r "
    "JOIN events e ON e.nid = r.event_nid JOIN events root ON root.event_id = r.target_id "
    "WHERE r.room_nid = $1 AND r.rel_type = 'm.thread' AND root.room_nid = $1 AND e.pos IS NOT NULL AND root.pos IS NOT NULL "
    f"AND e.redacted_by IS NULL AND (e.marks & {UNCOUNTED}) = 0 AND (root.marks & {HIDDEN}) = 0 "
    "AND (CAST($2 AS TEXT) IS NULL OR root.sender = $2 OR EXISTS (SELECT 1 FROM relations mine JOIN events m ON m.nid = mine.event_nid "
    "WHERE mine.target_id = root.event_id AND mine.room_nid = $1 AND mine.rel_type = 'm.thread' AND m.sender = $2 AND m.redacted_by IS NULL "
    f"AND (m.marks & {UNCOUNTED}) = 0)) "
    "GROUP BY root.nid) t WHERE (t.latest, t.nid) < ($3, $4) ORDER BY t.latest DESC, t.nid DESC LIMIT $5"
)


class Relations(Part):
    def __init__(self, db: Database, viewing: Viewing) -> None:
        self._db = db
        self._viewing = viewing

    def routes(self) -> Iterable[Route]:
        room = "/_matrix/client/v1/rooms/{roomId}"
        return (
            Route("GET", room + "/relations/{eventId}", self._related),
            Route("GET", room + "/relations/{eventId}/{relType}", self._related),
            Route("GET", room + "/relations/{eventId}/{relType}/{eventType}", self._related),
            Route("GET", room + "/threads", self._threads),
        )

    async def _related(self, request: Request) -> Answer:
        ways = request.query.get("dir", "b")
        if ways not in ("b", "f"):
            raise InvalidParam("The parameter dir is b (newest first) or f (oldest first).")
        direction: Direction = "b" if ways == "b" else "f"
        limit = request.query_int("limit", DEFAULT_LIMIT, low=1, high=MAX_LIMIT)
        hops = MAX_HOPS if request.query_bool("recurse") else 1
        start, stop = (self._token(request.query.get(name)) for name in ("from", "to"))
        view = await self._viewing.enter(request.params["roomId"], request.user_id)
        kind = (request.params.get("relType"), request.params.get("eventType"))
        shown, seen, end = await self._db.read(
            _related, view, request.params["eventId"], kind, start, stop, direction, limit, hops
        )
        answer: dict[str, Any] = {"chunk": await self._dressed(request, view, shown, seen)}
        if end is not None:
            answer["next_batch"] = str(end)
        if start is not None:
            answer["prev_batch"] = request.query["from"]
        if hops > 1:
            answer["recursion_depth"] = MAX_HOPS
        return answer

    async def _threads(self, request: Request) -> Answer:
        include = request.query.get("include", "all")
        if include not in ("all", "participated"):
            raise InvalidParam("The parameter include is all or participated.")
        limit = request.query_int("limit", DEFAULT_LIMIT, low=1, high=MAX_LIMIT)
        after = _thread_token(request.query.get("from"))
        view = await self._viewing.enter(request.params["roomId"], request.user_id)
        mine = request.user_id if include == "participated" else None
        shown, seen, end = await self._db.read(_threads, view, mine, after, limit)
        answer: dict[str, Any] = {"chunk": await self._dressed(request, view, shown, seen)}
        if end is not None:
            answer["next_batch"] = f"r{end[0]}_{end[1]}"
        return answer

    def _token(self, text: str | None) -> HistoryToken | None:
        return HistoryToken.parse(text, self._db.epoch) if text else None

    async def _dressed(self, request: Request, view: View, shown: Sequence[Stored], seen: dict[str, str]) -> list[Any]:
        return list(
            await format.dressed(
                self._db,
                view.room.version,
                shown,
                user_id=request.user_id,
                device_id=request.who.device_id,
                room_id=view.room.room_id,
                memberships=seen,
            )
        )


def _seen(query: Query, view: View, found: Sequence[Stored]) -> dict[str, str]:
    recall_transactions(query, found, view.user_id)
    return dict.fromkeys((one.id for one in found), "join") if view.sees_all(found) else judged(query, view, found)


def _related(
    query: Query,
    view: View,
    target_id: str,
    kind: tuple[str | None, str | None],
    start: HistoryToken | None,
    stop: HistoryToken | None,
    direction: Direction,
    limit: int,
    hops: int,
) -> tuple[list[Stored], dict[str, str], HistoryToken | None]:
    """A page of what relates to an event, and where the next begins. Raises NotFound where she may not see that event."""
    room = view.room
    target = store.by_ids(query, [target_id], room.version).get(target_id)
    if (
        target is None
        or target.room_nid != room.nid
        or not target.shown
        or target_id not in _seen(query, view, [target])
    ):
        raise NotFound("There is no such event in this room, or you may not see it.")
    low, high = HistoryToken(-1, -1), HistoryToken(2**62, 2**62)
    if start is not None:
        start = place(query, room.nid, start, direction)
    if stop is not None:
        stop = place(query, room.nid, stop, direction)
    if direction == "b":
        low, high = stop or low, start or high
    else:
        low, high = start or low, stop or high
    sql = (_CHILDREN if hops == 1 else _DESCENDANTS) + (_NEWEST_FIRST if direction == "b" else _OLDEST_FIRST)
    shown: list[Stored] = []
    memberships: dict[str, str] = {}
    scanned = 0
    while True:
        deep = (hops,) if hops > 1 else ()
        rows = query.all(sql, target_id, room.nid, high.depth, high.pos, low.depth, low.pos, *kind, limit + 1, *deep)
        found = [stored(row, room.version) for row in rows]
        more = len(found) > limit
        found = found[:limit]
        seen = _seen(query, view, found)
        for one in as_served(query, view.user_id, found, seen):
            if one.id in seen and len(shown) < limit:
                shown.append(one)
                memberships[one.id] = seen[one.id]
                last = one
            elif one.id in seen:
                more = True
                break
            else:
                last = one
        scanned += len(found)
        if not found:
            return shown, memberships, None
        end = HistoryToken.before_in_history(last) if direction == "b" else HistoryToken.after_in_history(last)
        if not more or len(shown) >= limit or scanned >= MAX_SCANNED:
            return shown, memberships, end if more else None
        low, high = (low, end) if direction == "b" else (end, high)


def _threads(
    query: Query, view: View, participant: str | None, after: tuple[int, int], limit: int
) -> tuple[list[Stored], dict[str, str], tuple[int, int] | None]:
    rows = query.all(_ROOTS, view.room.nid, participant, *after, limit + 1)
    end = (rows[limit - 1][1], rows[limit - 1][0]) if len(rows) > limit else None
    found = []
    for nid, _ in rows[:limit]:
        row = query.one(f"SELECT {COLUMNS} FROM events e WHERE nid = $1", nid)
        if row is not None:
            found.append(stored(row, view.room.version))
    seen = _seen(query, view, found)
    return [one for one in as_served(query, view.user_id, found, seen) if one.id in seen], seen, end


def _thread_token(text: str | None) -> tuple[int, int]:
    if not text:
        return 2**62, 2**62
    found = _THREAD_TOKEN.match(text)
    if found is None:
        raise InvalidParam("This is not a token of this endpoint. Leave `from` out to begin with the latest thread.")
    return int(found[1]), int(found[2])
