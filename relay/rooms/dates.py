"""Which event of a room lies closest to a moment: for "jump to date", of our people and of other servers.

Events carry the time that their sender's server claims, in no order and in no column: the first question about a room reads
all of its events once, later ones only those that came since. Where our history has a gap at that place, others are asked.
Spec: client-server-api/#get_matrixclientv1roomsroomidtimestamp_to_event and its like in server-server-api.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson
import structlog

from relay.db import Database, Query
from relay.errors import ApiError, InvalidParam, MissingParam, NotFound, RemoteError
from relay.part import Part
from relay.remote import Remote
from relay.rooms import store
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.rooms.store import HIDDEN, Stored
from relay.rooms.timeline import Direction
from relay.rooms.viewing import View, Viewing
from relay.web import Answer, Request, Route

log = structlog.get_logger("dates")

MAX_ROOMS_KEPT = 8
MAX_EVENTS_KEPT = 500_000
READ_AT_ONCE = 5_000
# How many are looked at for one that she may see.
MAX_LOOKED = 500
LOOKED_AT_ONCE = 25
MAX_FILLS = 5
FILLED_AT_ONCE = 100
MAX_SERVERS_ASKED = 3
END = 2**62

# (time, depth, pos, number): by time, and those of one time in the order of the history.
_Place = tuple[int, int, int, int]
Backfill = Callable[[Room, int], Awaitable[bool]]


@dataclass(slots=True)
class _Dates:
    upto: int = 0
    places: list[_Place] = field(default_factory=list)


class Dates(Part):
    def __init__(self, db: Database, rooms: Rooms, viewing: Viewing, remote: Remote, backfill: Backfill) -> None:
        self._db = db
        self._rooms = rooms
        self._viewing = viewing
        self._remote = remote
        self._backfill = backfill
        self._server_name = rooms.server_name
        # Room's number -> its times. Events never change theirs; those that are gone are met as missing rows.
        self._kept: OrderedDict[int, _Dates] = OrderedDict()

    def routes(self) -> Iterable[Route]:
        for path in ("v1", "unstable/org.matrix.msc3030"):
            yield Route(
                "GET", f"/_matrix/client/{path}/rooms/{{roomId}}/timestamp_to_event", self._find, limit="messages"
            )

    async def _find(self, request: Request) -> Answer:
        ts, direction = asked(request)
        view = await self._viewing.enter(request.params["roomId"], request.user_id)
        one = await self.nearest(view.room, ts, direction, view)
        if view.joined and await self._db.read(_beside_gap, view.room.nid, one, direction):
            one = await self._with_others(view, ts, direction, one)
        if one is None:
            raise NotFound(
                f"There is no event {'before' if direction == 'b' else 'after'} that time which you may see."
            )
        return {"event_id": one.id, "origin_server_ts": one.event.origin_server_ts}

    # --- what we have

    async def nearest(self, room: Room, ts: int, direction: Direction, view: View | None = None) -> Stored | None:
        """The closest event at or after the time, or at or before it; `view` is whose eyes it is for."""
        places = (await self._dates(room)).places
        at = bisect_left(places, (ts, -1, -1, -1)) if direction == "f" else bisect_right(places, (ts, END, END, END))
        way = places[at : at + MAX_LOOKED] if direction == "f" else places[max(0, at - MAX_LOOKED) : at][::-1]
        for start in range(0, len(way), LOOKED_AT_ONCE):
            nids = [place[3] for place in way[start : start + LOOKED_AT_ONCE]]
            found = await self._db.read(_by_nids, nids, room)
            seen = found if view is None else await self._viewing.visible(room, found, view.user_id)
            if view is not None and view.ends:
                seen = [one for one in seen if view.was_there_after(one)]
            if seen:
                return seen[0]
        return None

    async def _dates(self, room: Room) -> _Dates:
        kept = self._kept.get(room.nid) or _Dates()
        upto = self._db.stable_pos()
        while kept.upto < upto:
            known = kept.upto
            fresh, last = await self._db.read(_times, room.nid, known, upto)
            if kept.upto != known:
                continue  # another request has read the same meanwhile
            if len(fresh) > LOOKED_AT_ONCE:
                kept.places = sorted({*kept.places, *fresh})
            else:
                for place in fresh:
                    insort(kept.places, place)
            kept.upto = last
        self._kept[room.nid] = kept
        self._kept.move_to_end(room.nid)
        while len(self._kept) > 1 and (
            len(self._kept) > MAX_ROOMS_KEPT or sum(len(one.places) for one in self._kept.values()) > MAX_EVENTS_KEPT
        ):
            self._kept.popitem(last=False)
        return kept

    # --- what others have

    async def _with_others(self, view: View, ts: int, direction: Direction, ours: Stored | None) -> Stored | None:
        """The closest event once what another server found is here, as far as the gap before it can be filled."""
        room = view.room
        for server in sorted(room.servers - {self._server_name})[:MAX_SERVERS_ASKED]:
            try:
                event_id, their_ts = await self._remote.event_at(server, room.room_id, ts, direction)
            except (RemoteError, ApiError):
                continue
            closer = ours is None or abs(their_ts - ts) < abs(ours.event.origin_server_ts - ts)
            if not closer or not _on_that_side(their_ts, ts, direction):
                return ours
            for _ in range(MAX_FILLS):
                one = await self._rooms.event(event_id)
                if (one is not None and one.pos is not None) or not await self._backfill(room, FILLED_AT_ONCE):
                    break
            return await self.nearest(room, ts, direction, view)
        return ours


def asked(request: Request) -> tuple[int, Direction]:
    """The time and the direction of a question. Raises MissingParam, InvalidParam."""
    if "ts" not in request.query:
        raise MissingParam("The parameter ts is missing: a time in milliseconds.")
    ts = request.query_int("ts", 0)
    direction = request.query.get("dir", "f")
    if direction not in ("f", "b"):
        raise InvalidParam("The parameter dir is f (at or after that time) or b (at or before it).")
    return ts, "b" if direction == "b" else "f"


def _on_that_side(found: int, ts: int, direction: Direction) -> bool:
    return found >= ts if direction == "f" else found <= ts


def _times(query: Query, room_nid: int, after: int, upto: int) -> tuple[list[_Place], int]:
    """The times of what came in (after, upto], or of the first of it, and how far that is."""
    rows = query.all(
        f"SELECT nid, depth, pos, json FROM events WHERE room_nid = $1 AND pos > $2 AND pos <= $3 AND (marks & {HIDDEN}) = 0 "
        "ORDER BY pos LIMIT $4",
        room_nid,
        after,
        upto,
        READ_AT_ONCE,
    )
    found: list[_Place] = []
    for nid, depth, pos, raw in rows:
        ts: Any = orjson.loads(bytes(raw)).get("origin_server_ts")
        if type(ts) is int:
            found.append((ts, depth, pos, nid))
    return found, rows[-1][2] if len(rows) == READ_AT_ONCE else upto


def _by_nids(query: Query, nids: Iterable[int], room: Room) -> list[Stored]:
    found = []
    for nid in nids:
        row = query.one(f"SELECT {store.COLUMNS} FROM events e WHERE nid = $1", nid)
        if row is not None:
            found.append(store.stored(row, room.version))
    return found


def _beside_gap(query: Query, room_nid: int, one: Stored | None, direction: Direction) -> bool:
    """Whether something that we lack may lie closer: where we found nothing, or what we found lies above a gap. A gap below
    what was found going back in time can hide only what is older."""
    gaps = query.all("SELECT depth FROM gaps WHERE room_nid = $1", room_nid)
    if not gaps:
        return False
    if one is None or direction == "f":
        return True
    return any(depth >= one.depth - 1 for (depth,) in gaps)
