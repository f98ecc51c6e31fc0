"""Which events go to which servers, live and after a long absence.

After an absence a room with many waiting events sends only its latest: it descends from all the others, so the peer sees
what is missing and asks for it. Spec: server-server-api/#transactions leaves catching up to the implementation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Protocol

from federation.joined import Joined
from federation.lane import Waiting
from relay.db import Database, Query
from relay.ids import server_of
from relay.protocol.event import Event

MAX_PER_ROOM = 50
MAX_IN_ALL = 2_000
CHUNK = 500
# Positions of the log that are read together, and how many such stretches stay in memory.
WINDOW = 1_000
MAX_WINDOWS = 4


class Logged(Protocol):
    @property
    def event(self) -> Event: ...
    @property
    def pos(self) -> int | None: ...
    @property
    def local(self) -> bool: ...
    @property
    def fan_out(self) -> bool: ...


class KnownRoom(Protocol):
    @property
    def servers(self) -> Set[str]: ...
    @property
    def members(self) -> Mapping[str, str]: ...


class Recent(Protocol):
    def between(self, after: int, upto: int) -> Sequence[Logged] | None: ...


class EventLog(Protocol):
    """What `rooms` offers to followers. `leaving` has what may leave here, of this process's own commits."""

    @property
    def leaving(self) -> Recent: ...
    def new_events(self, query: Query, after_pos: int, upto_pos: int, limit: int) -> Iterable[Logged]: ...
    def membership_changes(
        self, query: Query, room_ids: Iterable[str], since: int, upto: int
    ) -> Iterable[tuple[str, str, str | None, str, int]]: ...
    def loaded(self, room_id: str) -> KnownRoom | None: ...
    async def get(self, room_id: str) -> KnownRoom | None: ...
    async def shares_with(self, server: str) -> bool: ...


def leaves_here(one: Logged) -> bool:
    """Whether it is ours to send: made here, or another server asked us to pass it on (send_join and its kin)."""
    return one.local or one.fan_out


def destinations(event: Event, servers: Set[str], server_name: str) -> set[str]:
    """Who gets an event: the servers in the room, and the one whose user it puts out. An invite reaches its target by a
    request of its own."""
    going = set(servers)
    if (out := _put_out(event)) is not None:
        going.add(out)
    going.discard(server_name)
    going.discard(event.server)
    return going


class CatchUp:
    """Several servers that come back at once read the log once: a window of it stays while somebody reads."""

    def __init__(self, server_name: str, db: Database, log: EventLog) -> None:
        self._server_name = server_name
        self._db = db
        self._log = log
        self._readers = 0
        self._windows: OrderedDict[int, tuple[Logged, ...]] = OrderedDict()
        self._joined: Joined[tuple[Logged, ...]] = Joined()

    async def missed(self, server: str, after: int, upto: int) -> list[Waiting]:
        """What this server has to be sent of the log in (after, upto]: each room's in order, the room in which something
        happened last before the others."""
        rooms: dict[str, list[Waiting]] = {}
        counts: dict[str, int] = {}
        spans: dict[str, tuple[int, int]] = {}
        kept = 0
        at = after
        self._readers += 1
        try:
            while at < upto:
                events, at = await self._read(at, upto)
                for one in events:
                    event, pos = one.event, one.pos
                    if pos is None:
                        continue
                    span = spans.get(event.room_id)
                    if span is None:
                        span = await in_room(self._db, self._log, server, event.room_id, after, upto)
                        spans[event.room_id] = span
                    if not concerns(event, server, there=span[0] <= pos <= span[1]):
                        continue
                    waiting = rooms.setdefault(event.room_id, [])
                    counts[event.room_id] = counts.get(event.room_id, 0) + 1
                    if counts[event.room_id] > MAX_PER_ROOM or kept >= MAX_IN_ALL:
                        kept -= len(waiting)
                        waiting.clear()
                        counts[event.room_id] = MAX_PER_ROOM
                    waiting.append(Waiting(pos, event.id, event.raw))
                    kept += 1
        finally:
            self._readers -= 1
            if not self._readers:
                self._windows.clear()
        latest_first = sorted(rooms.values(), key=lambda waiting: -waiting[-1].pos)
        return [one for waiting in latest_first for one in waiting]

    async def _read(self, at: int, upto: int) -> tuple[Sequence[Logged], int]:
        """(events after `at` that leave here, how far they reach)."""
        begin = at // WINDOW * WINDOW
        if begin + WINDOW > upto:
            return await self._db.read(_ours, self._log, at, upto)
        found = self._windows.get(begin)
        if found is None:
            found = await self._joined.get(str(begin), lambda: self._fill(begin))
        return [one for one in found if one.pos is not None and one.pos > at], begin + WINDOW

    async def _fill(self, begin: int) -> tuple[Logged, ...]:
        found: list[Logged] = []
        at = begin
        while at < begin + WINDOW:
            events, at = await self._db.read(_ours, self._log, at, begin + WINDOW)
            found += events
        while len(self._windows) >= MAX_WINDOWS:
            self._windows.popitem(last=False)
        self._windows[begin] = window = tuple(found)
        return window


def concerns(event: Event, server: str, *, there: bool) -> bool:
    """Whether one server gets an event: as `destinations` says, where it is known whether it was `there`."""
    return event.server != server and (there or _put_out(event) == server)


def _put_out(event: Event) -> str | None:
    """The server whose user it puts out."""
    return server_of(event.state_key) if event.membership in ("leave", "ban") and event.state_key else None


def _ours(query: Query, log: EventLog, after: int, upto: int) -> tuple[list[Logged], int]:
    """(events that leave here, how far this chunk reached)."""
    found = list(log.new_events(query, after, upto, CHUNK))
    reached = upto if len(found) < CHUNK else (found[-1].pos or upto)
    return [one for one in found if leaves_here(one)], reached


async def in_room(db: Database, log: EventLog, server: str, room_id: str, after: int, upto: int) -> tuple[int, int]:
    """From which and up to which position of (after, upto] the server was in the room, when it last was: what was said
    before its first user came, or after its last one left, is not for it."""
    room = log.loaded(room_id) or await log.get(room_id)
    until = upto if room is not None and server in room.servers else after
    changes = [
        change
        for change in await db.read(lambda query: list(log.membership_changes(query, (room_id,), after, upto)))
        if server_of(change[1]) == server and (change[2] == "join") != (change[3] == "join")
    ]
    if not changes:
        return after, until
    members = room.members if room is not None else {}
    here = sum(1 for user_id, membership in members.items() if membership == "join" and server_of(user_id) == server)
    for _, _, _, now, pos in reversed(changes):
        if now == "join":
            here -= 1
            if here == 0:
                return pos, until
        else:
            if until == after:
                until = pos
            here += 1
    return after, until
