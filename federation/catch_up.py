"""Which events go to which servers, live and after a long absence.

After an absence a room with many waiting events sends only its latest: it descends from all the others, so the peer sees
what is missing and asks for it. Spec: server-server-api/#transactions leaves catching up to the implementation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Protocol

from federation.lane import Waiting
from relay.db import Database, Query
from relay.ids import server_of
from relay.protocol.event import Event

MAX_PER_ROOM = 50
MAX_IN_ALL = 2_000
CHUNK = 500


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


def leaves_here(one: Logged) -> bool:
    """Whether it is ours to send: made here, or another server asked us to pass it on (send_join and its kin)."""
    return one.local or one.fan_out


def destinations(event: Event, servers: Set[str], server_name: str) -> set[str]:
    """Who gets an event: the servers in the room, and the one whose user it puts out. An invite reaches its target by a
    request of its own."""
    going = set(servers)
    if event.membership in ("leave", "ban") and event.state_key:
        going.add(server_of(event.state_key))
    going.discard(server_name)
    going.discard(event.server)
    return going


async def missed(db: Database, log: EventLog, server: str, server_name: str, after: int, upto: int) -> list[Waiting]:
    """What this server has to be sent of the log in (after, upto]: each room's in order, the room in which something happened
    last before the others."""
    rooms: dict[str, list[Waiting]] = {}
    counts: dict[str, int] = {}
    spans: dict[str, tuple[int, int]] = {}
    kept = 0
    at = after
    while at < upto:
        chunk = await db.read(_ours, log, at, upto)
        for one in chunk[0]:
            event, pos = one.event, one.pos
            if pos is None:
                continue
            if event.room_id not in spans:
                spans[event.room_id] = await in_room(db, log, server, event.room_id, after, upto)
            since, until = spans[event.room_id]
            there: Set[str] = {server} if since <= pos <= until else frozenset()
            if server not in destinations(event, there, server_name):
                continue
            waiting = rooms.setdefault(event.room_id, [])
            counts[event.room_id] = counts.get(event.room_id, 0) + 1
            if counts[event.room_id] > MAX_PER_ROOM or kept >= MAX_IN_ALL:
                kept -= len(waiting)
                waiting.clear()
                counts[event.room_id] = MAX_PER_ROOM
            waiting.append(Waiting(pos, event.id, event.raw))
            kept += 1
        at = chunk[1]
    latest_first = sorted(rooms.values(), key=lambda waiting: -waiting[-1].pos)
    return [one for waiting in latest_first for one in waiting]


def _ours(query: Query, log: EventLog, after: int, upto: int) -> tuple[list[Logged], int]:
    """(events that leave here, how far this chunk reached)."""
    found = list(log.new_events(query, after, upto, CHUNK))
    reached = upto if len(found) < CHUNK else (found[-1].pos or upto)
    return [one for one in found if leaves_here(one)], reached


async def in_room(db: Database, log: EventLog, server: str, room_id: str, after: int, upto: int) -> tuple[int, int]:
    """From which and up to which position of (after, upto] the server was in the room, when it last was: what was said
    before its first user came, or after its last one left, is not for it."""
    room = log.loaded(room_id) or await log.get(room_id)
    members = room.members if room is not None else {}
    here = sum(1 for user_id, membership in members.items() if membership == "join" and server_of(user_id) == server)
    until = upto if here or (room is not None and server in room.servers) else after
    changes = await db.read(lambda query: list(log.membership_changes(query, (room_id,), after, upto)))
    for _, user_id, before, now, pos in reversed(changes):
        if server_of(user_id) != server or (before == "join") == (now == "join"):
            continue
        if now == "join":
            here -= 1
            if here == 0:
                return pos, until
        else:
            if until == after:
                until = pos
            here += 1
    return after, until
