"""Reading a room's history: /messages, /context and single events.

History is ordered by (depth, pos), so that a gap that is filled later lies where it belongs; /sync goes by `pos`, the order
of arrival. A `HistoryToken` is a place between two events in either order. Where paging back meets a gap, the other servers
are asked once before the page is given. Spec: client-server-api/#get_matrixclientv3roomsroomidmessages and its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import orjson

from relay.db import Database, Query
from relay.errors import Forbidden, InvalidParam, MissingParam, NotFound
from relay.part import Part
from relay.protocol.versions import RoomVersion
from relay.rooms import format, state, store
from relay.rooms.erasure import as_served
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.rooms.store import COLUMNS, HIDDEN, HISTORY, UNCOUNTED, Key, Stored, stored
from relay.rooms.viewing import View, Viewing, judged, recall_transactions
from relay.web import Request, Route

Direction = Literal["b", "f"]

DEFAULT_LIMIT = 10
MAX_LIMIT = 1000
MAX_CONTEXT = 100
# With a filter, or where much is hidden from her, one request looks through this many; the client then asks for more.
MAX_SCANNED = 2000
MAX_FILLS = 3
# How far around a place in the order of arrival the place in the history is looked for, where that is far from its end.
ARRIVAL_WINDOW = 200
NOT_SHOWN = "There is no such event in this room, or you may not see it."
# Beyond every depth, pos and position token.
END = 2**62

_TOKEN = re.compile(r"t(\d{1,19})_(-?\d{1,19})(?:([bf])(\d{1,18}))?\Z")
_ARRIVAL = re.compile(r"(?:a|s(\d{1,10})_)(\d{1,18})(?:_.{0,60})?\Z")


@dataclass(frozen=True, slots=True)
class HistoryToken:
    """A place between two events: after all that lies up to (depth, pos) in the history.

    With `depth` None it is a place in the order of arrival: after all that had arrived up to `pos`. A client that pages on
    from such a place in `direction` does not get what arrived on its other side: `arrived` keeps where that was.
    """

    depth: int | None
    pos: int
    direction: Direction | None = None
    arrived: int | None = None

    def __str__(self) -> str:
        if self.depth is None:
            return f"a{self.pos}"
        bound = f"{self.direction}{self.arrived}" if self.arrived is not None else ""
        return f"t{self.depth}_{self.pos}{bound}"

    @classmethod
    def parse(cls, text: str, epoch: int) -> HistoryToken:
        """One of ours, or a token of /sync. Raises InvalidParam."""
        found = _TOKEN.match(text)
        if found is not None:
            direction: Direction | None = "b" if found[3] == "b" else "f" if found[3] else None
            return cls(int(found[1]), int(found[2]), direction, int(found[4]) if found[4] else None)
        found = _ARRIVAL.match(text)
        if found is None or (found[1] is not None and int(found[1]) != epoch):
            raise InvalidParam("This is not a token of this server. Leave it out to begin at the end of the history.")
        return cls(None, int(found[2]))

    @classmethod
    def before(cls, one: Stored) -> HistoryToken:
        """Right before an event of a /sync timeline."""
        return cls(None, (one.pos or 1) - 1)

    @classmethod
    def at_pos(cls, pos: int) -> HistoryToken:
        return cls(None, pos)

    @classmethod
    def after_in_history(cls, one: Stored) -> HistoryToken:
        return cls(one.depth, one.pos or 0)

    @classmethod
    def before_in_history(cls, one: Stored) -> HistoryToken:
        return cls(one.depth, (one.pos or 0) - 1)


# Whatever came late since, in any number: near the end of the history it is found from there.
_LAST_BEFORE = (
    "SELECT depth, pos FROM (SELECT depth, pos, marks FROM events WHERE room_nid = $1 AND pos IS NOT NULL "
    f"ORDER BY depth DESC, pos DESC LIMIT $3) AS latest WHERE pos <= $2 AND (marks & {HISTORY}) = 0 LIMIT 1"
)
_AFTER_ALL = HistoryToken(END, END)
_BEFORE_ALL = HistoryToken(-1, -1)


def place(query: Query, room_nid: int, token: HistoryToken, direction: Direction) -> HistoryToken:
    """The same place in the history, as seen by one who pages in `direction`."""
    if token.depth is not None:
        return token if token.direction in (None, direction) else replace(token, direction=None, arrived=None)
    if direction == "b":
        row = query.one(_LAST_BEFORE, room_nid, token.pos, MAX_SCANNED) or query.one(
            f"SELECT depth, pos FROM (SELECT depth, pos FROM events WHERE room_nid = $1 AND pos <= $2 AND (marks & {HISTORY}) = 0 "
            "ORDER BY pos DESC LIMIT $3) AS near ORDER BY depth DESC, pos DESC LIMIT 1",
            room_nid,
            token.pos,
            ARRIVAL_WINDOW,
        )
        return HistoryToken(row[0], row[1], "b", token.pos) if row is not None else _BEFORE_ALL
    row = query.one(
        f"SELECT depth, pos FROM (SELECT depth, pos FROM events WHERE room_nid = $1 AND pos > $2 AND (marks & {HISTORY}) = 0 "
        "ORDER BY pos LIMIT $3) AS near ORDER BY depth, pos LIMIT 1",
        room_nid,
        token.pos,
        ARRIVAL_WINDOW,
    )
    return HistoryToken(row[0], row[1] - 1, "f", token.pos) if row is not None else _AFTER_ALL


def where_it_begins(query: Query, room_nid: int, token: HistoryToken, direction: Direction) -> HistoryToken:
    """The place from which a client pages. What was said before the next event that arrived lies behind it, also where we have yet
    to ask others for it: before somebody's coming, say, with which her /sync begins."""
    known = place(query, room_nid, token, direction)
    if token.depth is not None or direction == "f":
        return known
    following = query.one(
        f"SELECT depth, pos FROM events WHERE room_nid = $1 AND pos > $2 AND (marks & {HISTORY | HIDDEN}) = 0 ORDER BY pos LIMIT 1",
        room_nid,
        token.pos,
    )
    if following is None or (known.depth or 0, known.pos) >= following:
        return known
    return HistoryToken(following[0], following[1] - 1, "b", token.pos)


_BACK = (
    f"SELECT {COLUMNS} FROM events e WHERE room_nid = $1 AND pos IS NOT NULL AND (depth, pos) <= ($2, $3) AND (depth, pos) > ($4, $5) "
    f"AND (pos <= $6 OR (marks & {HISTORY}) != 0) AND (pos <= $7 OR ((marks & {HISTORY}) != 0 AND depth <= $8)) "
    f"AND (marks & {HIDDEN}) = 0 ORDER BY depth DESC, pos DESC LIMIT $9"
)
_FORTH = (
    f"SELECT {COLUMNS} FROM events e WHERE room_nid = $1 AND pos IS NOT NULL AND (depth, pos) > ($2, $3) AND (depth, pos) <= ($4, $5) "
    f"AND ($6 < 0 OR (pos > $6 AND (marks & {HISTORY}) = 0)) AND (pos <= $7 OR ((marks & {HISTORY}) != 0 AND depth <= $8)) "
    f"AND (marks & {HIDDEN}) = 0 ORDER BY depth, pos LIMIT $9"
)


def stretch(
    query: Query, view: View, start: HistoryToken, direction: Direction, limit: int, stop: HistoryToken | None = None
) -> list[Stored]:
    """The next `limit` events from a place in the history, in the order of paging; what she may see is not yet asked."""
    end = stop or (_BEFORE_ALL if direction == "b" else _AFTER_ALL)
    bound = start.arrived if start.arrived is not None else END if direction == "b" else -1
    left_pos, left_depth = (view.left_pos or 0, view.left_depth) if view.ends else (END, END)
    rows = query.all(
        _BACK if direction == "b" else _FORTH,
        view.room.nid, start.depth, start.pos, end.depth, end.pos, bound, left_pos, left_depth, limit,
    )  # fmt: skip
    return [stored(row, view.room.version) for row in rows]


class EventFilter(Protocol):
    """A RoomEventFilter of the standard, as `people` reads it."""

    @property
    def limit(self) -> int | None: ...
    @property
    def lazy_load_members(self) -> bool: ...
    @property
    def is_everything(self) -> bool: ...
    @property
    def related_by_senders(self) -> Sequence[str] | None: ...
    @property
    def related_by_rel_types(self) -> Sequence[str] | None: ...
    def allows(self, event_type: str, sender: str, room_id: str, has_url: bool, /) -> bool: ...


# From the text of the parameter; without one, everything passes.
ReadsFilter = Callable[[str | None], EventFilter]


class Backfill(Protocol):
    """Asks the other servers for what is missing in a range of depths: whether anything came."""

    def __call__(self, room: Room, limit: int, lowest: int = ..., highest: int = ...) -> Awaitable[bool]: ...


@dataclass(slots=True)
class Page:
    shown: list[Stored]
    memberships: dict[str, str]
    # Where the next page begins; None where there is no more.
    end: HistoryToken | None
    # The range of depths that was looked through.
    depths: tuple[int, int] | None


class Timeline(Part):
    def __init__(
        self, db: Database, rooms: Rooms, viewing: Viewing, read_filter: ReadsFilter, backfill: Backfill | None = None
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._viewing = viewing
        self._read_filter = read_filter
        self._backfill = backfill

    def routes(self) -> Iterable[Route]:
        room = "/_matrix/client/v3/rooms/{roomId}"
        return (
            Route("GET", room + "/messages", self._messages),
            Route("GET", room + "/context/{eventId}", self._context),
            Route("GET", room + "/event/{eventId}", self._event),
        )

    # --- /messages

    async def _messages(self, request: Request) -> dict[str, Any]:
        query = request.query
        view = await self._viewing.enter(request.params["roomId"], request.user_id)
        direction = query.get("dir")
        if direction is None:
            raise MissingParam("The parameter dir is missing: b (back in time) or f (forward).")
        if direction not in ("b", "f"):
            raise InvalidParam("The parameter dir is b (back in time) or f (forward).")
        wanted = self._read_filter(query.get("filter"))
        limit = request.query_int("limit", wanted.limit or DEFAULT_LIMIT, low=1, high=MAX_LIMIT)
        ways: Direction = "b" if direction == "b" else "f"
        start = self._token(query.get("from")) or self._first(view, ways)
        page = await self._page(view, start, self._token(query.get("to")), ways, limit, wanted)
        answer: dict[str, Any] = {
            "start": query.get("from") or str(start),
            "chunk": await self._dressed(request, view.room, page.shown, page.memberships),
        }
        if page.end is not None:
            answer["end"] = str(page.end)
        if wanted.lazy_load_members and page.shown:
            senders = {one.event.sender for one in page.shown}
            keys = [("m.room.member", sender) for sender in sorted(senders)]
            answer["state"] = await self._state_at(
                view.room, max(page.shown, key=_order), lambda key: key in keys, keys
            )
        return answer

    def _first(self, view: View, direction: Direction) -> HistoryToken:
        if direction == "f":
            return HistoryToken(0, -1)
        return HistoryToken.at_pos(view.left_pos if view.ends and view.left_pos is not None else self._db.stable_pos())

    def _token(self, text: str | None) -> HistoryToken | None:
        return HistoryToken.parse(text, self._db.epoch) if text else None

    async def _page(
        self,
        view: View,
        start: HistoryToken,
        stop: HistoryToken | None,
        direction: Direction,
        limit: int,
        wanted: EventFilter,
    ) -> Page:
        for _ in range(MAX_FILLS):
            page = await self._db.read(_page, view, start, stop, direction, limit, wanted)
            if direction == "f" or self._backfill is None or not view.joined or page.depths is None:
                break
            if not await self._db.read(_meets_gap, view.room.nid, *page.depths):
                break
            if not await self._backfill(view.room, max(limit, DEFAULT_LIMIT), *page.depths):
                break
        else:
            page = await self._db.read(_page, view, start, stop, direction, limit, wanted)
        return page

    # --- /context and /event

    async def _context(self, request: Request) -> dict[str, Any]:
        wanted = self._read_filter(request.query.get("filter"))
        limit = request.query_int("limit", DEFAULT_LIMIT, high=MAX_CONTEXT)
        view = await self._viewing.enter(request.params["roomId"], request.user_id)
        one, membership = await self._visible_event(view, request.params["eventId"])
        if one.pos is None:
            raise NotFound("This event is not part of the room's timeline.")
        here = HistoryToken.before_in_history(one)
        before = await self._db.read(_page, view, here, None, "b", limit // 2, wanted)
        here = HistoryToken.after_in_history(one)
        after = await self._db.read(_page, view, here, None, "f", limit - limit // 2, wanted)
        around = [*reversed(before.shown), one, *after.shown]
        memberships = {**before.memberships, one.id: membership, **after.memberships}
        dressed = await self._dressed(request, view.room, around, memberships)
        middle = len(before.shown)
        only = {("m.room.member", each.event.sender) for each in around} if wanted.lazy_load_members else None
        first, last = (before.shown or [one])[-1], (after.shown or [one])[-1]
        return {
            "start": str(before.end or HistoryToken.before_in_history(first)),
            "end": str(after.end or HistoryToken.after_in_history(last)),
            "events_before": dressed[:middle][::-1],
            "event": dressed[middle],
            "events_after": dressed[middle + 1 :],
            "state": await self._state_at(
                view.room, around[-1], lambda key: only is None or key[0] != "m.room.member" or key in only
            ),
        }

    async def _event(self, request: Request) -> dict[str, Any] | bytes:
        try:
            view = await self._viewing.enter(request.params["roomId"], request.user_id)
        except Forbidden:
            # Spec: client-server-api/#get_matrixclientv3roomsroomideventeventid knows no other answer to strangers.
            raise NotFound(NOT_SHOWN) from None
        one, membership = await self._visible_event(view, request.params["eventId"])
        return orjson.dumps((await self._dressed(request, view.room, [one], {one.id: membership}))[0])

    async def _visible_event(self, view: View, event_id: str) -> tuple[Stored, str]:
        """Raises NotFound alike for what is not there and for what she may not see."""
        one = await self._rooms.event(event_id)
        if one is not None and one.room_nid == view.room.nid and one.shown:
            if one.pos is None:
                # Known only as a part of the state: whoever may read the state may read it.
                current = (
                    (await self._viewing.state_for(view)).get(one.event.key) if one.event.key is not None else None
                )
                if current is not None and current[0] == one.id:
                    return one, "join" if view.joined else "leave"
            elif view.sees_all([one]):
                await self._viewing.note_senders([one], view.user_id)
                return one, "join"
            else:
                seen, [served] = await self._db.read(_as_seen, view, [one])
                if one.id in seen:
                    return served, seen[one.id]
        raise NotFound(NOT_SHOWN)

    # --- how it is shown

    async def _dressed(
        self, request: Request, room: Room, shown: Sequence[Stored], memberships: dict[str, str]
    ) -> list[orjson.Fragment]:
        return await format.dressed(
            self._db,
            room.version,
            shown,
            user_id=request.user_id,
            device_id=request.who.device_id,
            room_id=room.room_id,
            memberships=memberships,
        )

    async def _state_at(
        self, room: Room, one: Stored, wanted: Callable[[Key], bool], keys: Sequence[Key] | None = None
    ) -> list[orjson.Fragment]:
        """The state after an event, or a part of it. `keys` spares loading the whole of it."""
        if one.state_nid is None:
            return []
        if keys is not None:
            found = await self._db.read(_some_state, room.nid, room.version, one.state_nid, keys)
        else:
            entries = await self._rooms.states.get(one.state_nid)
            ids = [event_id for key, (event_id, _) in entries.items() if wanted(key)]
            found = await self._db.read(store.by_ids, ids, room.version)
        return [format.finished(format.shared_body(each), room.room_id, {}) for each in found.values()]


def _order(one: Stored) -> tuple[int, int]:
    return one.depth, one.pos or 0


def _some_state(
    query: Query, room_nid: int, version: RoomVersion, state_nid: int, keys: Sequence[Key]
) -> dict[str, Stored]:
    at = state.lookup(query, room_nid, [state_nid], keys).get(state_nid, {})
    return store.by_ids(query, at.values(), version)


def _meets_gap(query: Query, room_nid: int, lowest: int, highest: int) -> bool:
    """Whether an event in this range of depths cites one that we lack."""
    row = query.one(
        "SELECT 1 FROM gaps g LEFT JOIN events e ON e.event_id = g.event_id WHERE g.room_nid = $1 AND g.depth >= $2 AND g.depth <= $3 "
        "AND e.state_nid IS NULL LIMIT 1",
        room_nid, lowest, highest,
    )  # fmt: skip
    return row is not None


def _seen(query: Query, view: View, events: Sequence[Stored]) -> dict[str, str]:
    """Those she may see, with her membership at each; her own transaction IDs are recalled on the way."""
    recall_transactions(query, events, view.user_id)
    if view.sees_all(events):
        return dict.fromkeys((one.id for one in events), "join")
    return judged(query, view, events)


def _as_seen(query: Query, view: View, events: Sequence[Stored]) -> tuple[dict[str, str], list[Stored]]:
    """The same, and all of them as she gets those that she may see."""
    seen = _seen(query, view, events)
    return seen, as_served(query, view.user_id, events, seen)


def _page(
    query: Query,
    view: View,
    start: HistoryToken,
    stop: HistoryToken | None,
    direction: Direction,
    limit: int,
    wanted: EventFilter,
) -> Page:
    """One page in the order of paging, by as few looks as it takes. In a reader's thread."""
    room_nid, room_id = view.room.nid, view.room.room_id
    begin = here = where_it_begins(query, room_nid, start, direction)
    if limit == 0:
        return Page([], {}, begin, None)
    end = place(query, room_nid, stop, "b") if stop is not None else None
    page = Page([], {}, None, None)
    scanned = 0
    related = wanted.related_by_senders is not None or wanted.related_by_rel_types is not None
    while True:
        ask = limit - len(page.shown) + 1 if wanted.is_everything and not related else MAX_LIMIT + 1
        found = stretch(query, view, here, direction, ask, end)
        more = len(found) == ask
        fitting = [
            one for one in found if _fits(wanted, one, room_id) and (not related or _answered(query, one, wanted))
        ]
        seen, fitting = _as_seen(query, view, fitting)
        shown = [one for one in fitting if one.id in seen][: limit - len(page.shown)]
        page.shown += shown
        page.memberships.update((one.id, seen[one.id]) for one in shown)
        scanned += len(found)
        full = len(page.shown) >= limit
        if full and found and shown:
            # Whether anything is left behind the last one shown.
            more = more or found[-1].id != shown[-1].id
        last = shown[-1] if full and shown else found[-1] if found else None
        if last is not None:
            pos = (last.pos or 0) - 1 if direction == "b" else last.pos or 0
            here = HistoryToken(last.depth, pos, begin.direction, begin.arrived)
        if not more or full or scanned >= MAX_SCANNED:
            break
    # A page with something on it may always be followed by another: forwards, more may come; an empty one ends the way.
    if more or page.shown:
        page.end = here
    if begin is not _BEFORE_ALL:
        lowest = here.depth if more and here.depth is not None else -1
        page.depths = (lowest, min(begin.depth or 0, END))
    return page


def _fits(wanted: EventFilter, one: Stored, room_id: str) -> bool:
    return wanted.allows(one.event.type, one.event.sender, room_id, "url" in one.event.content)


def _answered(query: Query, one: Stored, wanted: EventFilter) -> bool:
    """Whether events relate to it as the filter asks. Spec: client-server-api/#filtering, `related_by_rel_types`"""
    rows = query.all(
        f"SELECT DISTINCT r.rel_type, e.sender FROM relations r JOIN events e ON e.nid = r.event_nid WHERE r.target_id = $1 "
        f"AND r.room_nid = $2 AND e.redacted_by IS NULL AND (e.marks & {UNCOUNTED}) = 0",
        one.id,
        one.room_nid,
    )
    kinds, senders = wanted.related_by_rel_types, wanted.related_by_senders
    return any((kinds is None or kind in kinds) and (senders is None or sender in senders) for kind, sender in rows)
