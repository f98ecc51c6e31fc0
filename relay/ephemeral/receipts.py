"""Who has read how far: receipts, private receipts and read markers, one row for each (room, person, type, thread).

The latest ones are in memory, so that a /sync that wakes up for a message asks no database. Receipts only move forward.
Not the unread counts, which `push/unread.py` derives from here. Spec: client-server-api/#receipts, #fully-read-markers;
server-server-api/#receipts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from relay.clock import Clock
from relay.db import Database, Query, Tx
from relay.departures import Departures
from relay.ephemeral.threads import MAIN, is_in_thread
from relay.errors import BadJson, InvalidParam
from relay.ids import MAX_ID_BYTES, server_of
from relay.part import Part, SyncAsk, SyncShare, TakesEdu
from relay.protocol.event import Event
from relay.rooms import format, store
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.rooms.store import Stored
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, get_optional_string

READ, PRIVATE, FULLY_READ = "m.read", "m.read.private", "m.fully_read"
TYPES = frozenset({READ, PRIVATE, FULLY_READ})
UNTHREADED = ""

# What is in memory of one room, and of how many rooms and people.
MAX_RECENT = 1_000
MAX_ROOMS = 1_000
MAX_PEOPLE = 5_000
# An initial /sync gets the newest of a large room, and one's own.
MAX_OF_A_ROOM = 500
MAX_IN_EDU = 1_000
# How far back the thread of a receipt is looked for, where it is for no event of the room.
LOOKED_BACK = 50
# Of one person in one room; older threads' receipts go.
MAX_THREADS = 200

_LIFE = "until a later one replaces it, or the person leaves the room"
_PUT = (
    "INSERT INTO receipts (room_id, user_id, type, thread, event_id, ts, read_pos, pos) VALUES ($1, $2, $3, $4, $5, $6, $7, $8) "
    "ON CONFLICT (room_id, user_id, type, thread) DO UPDATE SET event_id = excluded.event_id, ts = excluded.ts, "
    "read_pos = excluded.read_pos, pos = excluded.pos"
)
_BOUND = (
    "DELETE FROM receipts WHERE room_id = $1 AND user_id = $2 AND type = $3 AND thread NOT IN ('', 'main') AND pos < "
    "(SELECT min(pos) FROM (SELECT pos FROM receipts WHERE room_id = $1 AND user_id = $2 AND type = $3 "
    f"ORDER BY pos DESC LIMIT {MAX_THREADS}) AS newest)"
)
_COLUMNS = "room_id, user_id, type, thread, event_id, ts, read_pos, pos"

Key = tuple[str, str, str]  # user, type, thread


@dataclass(frozen=True, slots=True)
class Receipt:
    """`thread` is '' for an unthreaded one. `read_pos` is where the event lies that was read; 0 where that is unknown."""

    room_id: str
    user_id: str
    type: str
    thread: str
    event_id: str
    ts: int
    read_pos: int
    pos: int = 0


class _Recent:
    """One room's latest receipts in order of `pos`; all that came after `floor`."""

    __slots__ = ("floor", "last", "rows")

    def __init__(self, floor: int) -> None:
        self.floor = self.last = floor
        self.rows: dict[Key, Receipt] = {}


class Receipts(Part):
    schema = Schema(
        "receipts",
        tables=(
            Table(
                "receipts",
                "how far a person has read",
                {
                    "room_id": ("the room", _LIFE),
                    "user_id": ("who has read", _LIFE),
                    "type": ("public, private or the read marker", _LIFE),
                    "thread": ("in which thread", _LIFE),
                    "event_id": ("up to which event", _LIFE),
                    "ts": ("when, as clients show it", _LIFE),
                    "read_pos": ("where that event lies, for unread counts", _LIFE),
                    "pos": ("when it changed, for /sync", _LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE receipts (room_id TEXT NOT NULL, user_id TEXT NOT NULL, type TEXT NOT NULL, thread TEXT NOT NULL,
                event_id TEXT NOT NULL, ts BIGINT NOT NULL, read_pos BIGINT NOT NULL, pos BIGINT NOT NULL,
                PRIMARY KEY (room_id, user_id, type, thread)) CLUSTERED;
            CREATE INDEX receipts_by_pos ON receipts (room_id, pos);
            CREATE INDEX receipts_of_user ON receipts (user_id)
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock, rooms: Rooms, departures: Departures, server_name: str) -> None:
        self._db = db
        self._clock = clock
        self._rooms = rooms
        self._departures = departures
        self._server_name = server_name
        # Written through: each commit of a receipt updates both, in `_take`.
        self._recent: OrderedDict[str, _Recent] = OrderedDict()
        self._floor = -1
        self._own: OrderedDict[str, dict[str, dict[tuple[str, str], int]]] = OrderedDict()
        self._loading: dict[str, list[Receipt]] = {}
        # Called after the commit with (user, room): what was derived from how far a local person has read is out of date.
        self.on_read: list[Callable[[str, str], None]] = []
        # Called after the commit with what came, our people's and others'.
        self.on_receipts: list[Callable[[list[Receipt]], None]] = []
        rooms.on_membership.append(self._membership_changed)

    def routes(self) -> Iterable[Route]:
        rooms = "/_matrix/client/v3/rooms/{room_id}"
        yield Route("POST", rooms + "/receipt/{type}/{event_id}", self._post)
        yield Route("POST", rooms + "/read_markers", self._post_markers)

    def edus(self) -> Mapping[str, TakesEdu]:
        return {"m.receipt": self._take_edu}

    # --- from our people

    async def _post(self, request: Request) -> Answer:
        kind, event_id = request.params["type"], request.params["event_id"]
        if kind not in TYPES:
            raise InvalidParam(f"{kind!r} is not a kind of receipt. Known are m.read, m.read.private and m.fully_read.")
        thread = request.optional_json().get("thread_id")
        if thread is not None:
            if not isinstance(thread, str) or not thread or len(thread.encode("utf-8", "surrogatepass")) > MAX_ID_BYTES:
                raise InvalidParam("thread_id is 'main' or the event ID of a thread's root.")
            if kind == FULLY_READ:
                raise InvalidParam("m.fully_read has no thread_id: leave it out.")
        room = await self._rooms.require_joined(request.params["room_id"], request.user_id)
        await self._read_up_to(room, request.user_id, [(kind, thread or UNTHREADED, event_id)])
        return {}

    async def _post_markers(self, request: Request) -> Answer:
        body = request.optional_json()
        wanted = [
            (kind, UNTHREADED, event_id) for kind in sorted(TYPES) if (event_id := get_optional_string(body, kind))
        ]
        room = await self._rooms.require_joined(request.params["room_id"], request.user_id)
        await self._read_up_to(room, request.user_id, wanted)
        return {}

    async def _read_up_to(self, room: Room, user_id: str, wanted: list[tuple[str, str, str]]) -> None:
        known = (await self.own(user_id)).get(room.room_id, {})
        now = self._clock.now()
        found: list[Receipt] = []
        for kind, thread, event_id in wanted:
            one = await self._event(room, event_id) or await self._before_hiding(room, event_id, thread)
            if one is None or one.room_nid != room.nid:
                raise InvalidParam("There is no such event in this room.")
            if thread and not await is_in_thread(one.event, thread, lambda other: self._other(room, other)):
                raise InvalidParam("The event is not in the thread that thread_id names.")
            read_pos = one.pos or 0
            if (kind, thread) not in known or known[(kind, thread)] < read_pos:
                found.append(Receipt(room.room_id, user_id, kind, thread, one.id, now, read_pos))
        if found:
            with self._db.write() as tx:
                self._put(tx, room, found)
                tx.after(lambda: self._send_out(room, found))
            await tx

    async def _event(self, room: Room, event_id: str) -> Stored | None:
        for one in reversed(room.recent):
            if one.id == event_id:
                return one
        return await self._rooms.event(event_id)

    async def _before_hiding(self, room: Room, sign: str, thread: str) -> Stored | None:
        """What takes a hidden message off a screen (format.hiding) stands in no room, and yet is the last that a client shows: who
        has read up to there has read what came before it."""
        hidden = self._rooms.withheld.get(room.room_id, {})
        pos = next((was.pos for event_id, was in hidden.items() if format.hiding_id(event_id) == sign), None)
        if pos is None:
            return None
        latest = await self._db.read(store.latest, room.nid, room.version, 0, pos, LOOKED_BACK)
        for one in reversed(latest):
            if not thread or await is_in_thread(one.event, thread, lambda other: self._other(room, other)):
                return one
        return None

    async def _other(self, room: Room, event_id: str) -> Event | None:
        one = await self._event(room, event_id)
        return one.event if one is not None else None

    def _put(self, tx: Tx, room: Room, receipts: list[Receipt]) -> None:
        if self._floor < 0:
            self._floor = self._db.stable_pos()
        pos = tx.pos()
        written = [Receipt(r.room_id, r.user_id, r.type, r.thread, r.event_id, r.ts, r.read_pos, pos) for r in receipts]
        tx.many(_PUT, [(r.room_id, r.user_id, r.type, r.thread, r.event_id, r.ts, r.read_pos, pos) for r in written])
        for r in written:
            if r.thread not in (UNTHREADED, MAIN):
                tx.run(_BOUND, r.room_id, r.user_id, r.type)
        tx.after(lambda: self._take(written))
        if any(r.type == READ for r in written):
            tx.ring(tuple(room.local_joined), room.room_id)
        else:
            tx.ring({r.user_id for r in written}, room.room_id)

    def _take(self, receipts: list[Receipt]) -> None:
        for told in self.on_receipts:
            told(receipts)
        for receipt in receipts:
            recent = self._recent.get(receipt.room_id)
            if recent is None:
                recent = self._recent[receipt.room_id] = _Recent(self._floor)
                if len(self._recent) > MAX_ROOMS:
                    self._floor = max(self._floor, self._recent.popitem(last=False)[1].last)
            key = (receipt.user_id, receipt.type, receipt.thread)
            recent.rows.pop(key, None)
            recent.rows[key] = receipt
            recent.last = receipt.pos
            if len(recent.rows) > MAX_RECENT:
                recent.floor = recent.rows.pop(next(iter(recent.rows))).pos
            if server_of(receipt.user_id) == self._server_name:
                if receipt.user_id in self._loading:
                    self._loading[receipt.user_id].append(receipt)
                if (own := self._own.get(receipt.user_id)) is not None:
                    _advance(own, receipt)
                for callback in self.on_read:
                    callback(receipt.user_id, receipt.room_id)

    def _send_out(self, room: Room, receipts: list[Receipt]) -> None:
        for r in receipts:
            if r.type != READ:
                continue  # the others are nobody else's business
            data = {"ts": r.ts, "thread_id": r.thread} if r.thread else {"ts": r.ts}
            content = {r.room_id: {READ: {r.user_id: {"event_ids": [r.event_id], "data": data}}}}
            self._departures.passing(room.servers, "m.receipt", content, f"receipt {r.room_id} {r.user_id} {r.thread}")

    # --- from other servers

    async def _take_edu(self, origin: str, content: dict[str, Any]) -> None:
        left = MAX_IN_EDU
        for room_id, kinds in content.items():
            people = kinds.get(READ) if isinstance(kinds, dict) else None
            if not isinstance(people, dict):
                continue
            room = await self._rooms.get(room_id)
            if room is None or not room.local_joined:
                continue
            found = []
            for user_id, said in people.items():
                if server_of(user_id) != origin or not room.may_be_joined(user_id):
                    continue
                left -= 1
                if left < 0:
                    raise BadJson(f"An m.receipt carries more than {MAX_IN_EDU} receipts.")
                receipt = _foreign(room_id, user_id, said, self._clock.now())
                if receipt is not None and not self._is_known(receipt):
                    found.append(receipt)
            if found:
                with self._db.write() as tx:
                    self._put(tx, room, found)
                await tx

    def _is_known(self, receipt: Receipt) -> bool:
        recent = self._recent.get(receipt.room_id)
        known = recent.rows.get((receipt.user_id, receipt.type, receipt.thread)) if recent is not None else None
        return known is not None and known.event_id == receipt.event_id

    def _membership_changed(self, room: Room, user_id: str, before: str | None, now: str, pos: int) -> None:
        if before != "join" or now == "join":
            return
        room_id = room.room_id
        with self._db.write() as tx:
            tx.run("DELETE FROM receipts WHERE room_id = $1 AND user_id = $2", room_id, user_id)
        recent = self._recent.get(room_id)
        if recent is not None:
            for key in [key for key in recent.rows if key[0] == user_id]:
                del recent.rows[key]
        self._own.get(user_id, {}).pop(room_id, None)

    def forget_server(self, query: Query, server: str) -> int:
        return query.run("DELETE FROM receipts WHERE user_id LIKE $1", f"%:{server}")

    def forgotten(self, server: str) -> None:
        for recent in self._recent.values():
            for key in [key for key in recent.rows if server_of(key[0]) == server]:
                del recent.rows[key]

    # --- what others ask

    @staticmethod
    def since(query: Query, pos: int, limit: int) -> list[Receipt]:
        """The latest of all rooms after `pos`, in order, read markers left out: for whoever begins to follow."""
        rows = query.all(
            f"SELECT {_COLUMNS} FROM receipts WHERE pos > $1 AND type <> $2 ORDER BY pos DESC LIMIT $3",
            pos,
            FULLY_READ,
            limit,
        )
        return [Receipt(*row) for row in reversed(rows)]

    def own_known(self, user_id: str) -> Mapping[str, Mapping[tuple[str, str], int]] | None:
        """The same as `own`, where it is in memory."""
        return self._own.get(user_id)

    async def own(self, user_id: str) -> Mapping[str, Mapping[tuple[str, str], int]]:
        """How far a local person has read: room -> (type, thread) -> position of the event."""
        known = self._own.get(user_id)
        if known is not None:
            self._own.move_to_end(user_id)
            return known
        meanwhile = self._loading.setdefault(user_id, [])
        try:
            receipts = await self._db.read(_of_user, user_id)
        finally:
            self._loading.pop(user_id, None)
        if user_id in self._own:
            return self._own[user_id]
        found: dict[str, dict[tuple[str, str], int]] = {}
        for receipt in (*receipts, *meanwhile):
            _advance(found, receipt)
        self._own[user_id] = found
        if len(self._own) > MAX_PEOPLE:
            self._own.popitem(last=False)
        return found

    async def fully_read(self, user_id: str, room_id: str) -> str | None:
        """The event ID of the read marker, which clients may also ask for as account data."""
        found: str | None = await self._db.read(
            lambda query: query.value(
                "SELECT event_id FROM receipts WHERE room_id = $1 AND user_id = $2 AND type = $3",
                room_id,
                user_id,
                FULLY_READ,
            )
        )
        return found

    async def provide_fully_read(self, user_id: str, room_id: str) -> dict[str, Any] | None:
        """`m.fully_read` as account data of a room."""
        event_id = await self.fully_read(user_id, room_id)
        return {"event_id": event_id} if event_id is not None else None

    # --- /sync

    async def changes(self, ask: SyncAsk, share: SyncShare) -> None:
        if self._floor < 0:
            self._floor = self._db.stable_pos()
        cold: list[tuple[str, int]] = []
        for room_id in ask.rooms if ask.since is None else ask.rooms_concerned():
            if ask.since is None or room_id in ask.newly_joined:
                cold.append((room_id, 0))
                continue
            recent = self._recent.get(room_id)
            if ask.since < (recent.floor if recent is not None else self._floor):
                cold.append((room_id, ask.since))
            elif recent is not None and recent.last > ask.since:
                found = []
                for receipt in reversed(recent.rows.values()):
                    if receipt.pos <= ask.since:
                        break
                    if receipt.pos <= ask.upto and (receipt.type == READ or receipt.user_id == ask.user_id):
                        found.append(receipt)
                _give(share, room_id, found)
        if cold:
            for room_id, found in (await self._db.read(_of_rooms, cold, ask.user_id, ask.upto)).items():
                _give(share, room_id, found)


def _advance(own: dict[str, dict[tuple[str, str], int]], receipt: Receipt) -> None:
    room = own.setdefault(receipt.room_id, {})
    key = (receipt.type, receipt.thread)
    room[key] = max(room.get(key, 0), receipt.read_pos)


def _foreign(room_id: str, user_id: str, said: Any, now: int) -> Receipt | None:
    """A receipt out of an EDU; None where it is malformed."""
    if not isinstance(said, dict):
        return None
    event_ids, data = said.get("event_ids"), said.get("data", {})
    if not isinstance(event_ids, list) or not event_ids or not isinstance(data, dict):
        return None
    event_id, ts, thread = event_ids[-1], data.get("ts", now), data.get("thread_id", UNTHREADED)
    if not all(isinstance(text, str) and len(text) <= MAX_ID_BYTES for text in (event_id, thread)):
        return None
    if type(ts) is not int or not 0 <= ts < 2**53:
        ts = now
    return Receipt(room_id, user_id, READ, thread, event_id, ts, 0)


def _give(share: SyncShare, room_id: str, receipts: list[Receipt]) -> None:
    threads: dict[str, dict[str, Any]] = {}
    for r in receipts:
        if r.type == FULLY_READ:
            share.room(room_id).account_data.append({"type": FULLY_READ, "content": {"event_id": r.event_id}})
            continue
        data = {"ts": r.ts, "thread_id": r.thread} if r.thread else {"ts": r.ts}
        threads.setdefault(r.thread, {}).setdefault(r.event_id, {}).setdefault(r.type, {})[r.user_id] = data
    # One for each thread: a person may have read the same event in two of them.
    for content in threads.values():
        share.room(room_id).ephemeral.append({"type": "m.receipt", "content": content})


def _of_user(query: Query, user_id: str) -> list[Receipt]:
    return [Receipt(*row) for row in query.all(f"SELECT {_COLUMNS} FROM receipts WHERE user_id = $1", user_id)]


def _of_rooms(query: Query, rooms: list[tuple[str, int]], user_id: str, upto: int) -> dict[str, list[Receipt]]:
    found: dict[str, list[Receipt]] = {}
    for room_id, since in rooms:
        rows = query.all(
            f"SELECT {_COLUMNS} FROM receipts WHERE room_id = $1 AND pos > $2 AND pos <= $3 AND (type = $4 OR user_id = $5) "
            "ORDER BY pos DESC LIMIT $6",
            room_id, since, upto, READ, user_id, MAX_OF_A_ROOM,
        )  # fmt: skip
        if len(rows) == MAX_OF_A_ROOM:
            rows += query.all(
                f"SELECT {_COLUMNS} FROM receipts WHERE room_id = $1 AND user_id = $2 AND pos > $3 AND pos < $4",
                room_id, user_id, since, rows[-1][7],
            )  # fmt: skip
        if rows:
            found[room_id] = [Receipt(*row) for row in rows]
    return found
