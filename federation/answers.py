"""What other servers ask about rooms that we share: single events, history, missing events, states and auth chains.

Only for servers in the room (`asking.py`), and bounded. Not about joining (`joins.py`), nor about people, keys and
directories (`queries.py`). Spec: server-server-api/#backfilling-and-retrieving-missing-events, #retrieving-events,
#retrieving-event-authorization-information.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Sequence
from heapq import heappop, heappush
from typing import Any

import orjson

from federation.asking import Asking, require_whole, shown, users_of
from federation.chains import Chains, Gathered
from relay.clock import Clock
from relay.db import Database, Query
from relay.errors import BadJson, MissingParam, NotFound
from relay.ids import MAX_ID_BYTES
from relay.part import Part
from relay.protocol.versions import RoomVersion
from relay.rooms import store
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.rooms.store import HISTORY, Stored
from relay.web import Request, Route, get_list

V1 = "/_matrix/federation/v1"

MAX_BACKFILL = 100
MAX_MISSING = 20
DEFAULT_MISSING = 10
# Event IDs in one question.
MAX_ASKED = 100
# What one walk through a room's graph reads at most.
MAX_WALKED = 1_000


class Answers(Part):
    def __init__(
        self, server_name: str, db: Database, clock: Clock, rooms: Rooms, asking: Asking, chains: Chains
    ) -> None:
        self._server_name = server_name
        self._db = db
        self._clock = clock
        self._rooms = rooms
        self._asking = asking
        self._chains = chains

    def routes(self) -> Iterable[Route]:
        for method, path, function in (
            ("GET", f"{V1}/event/{{eventId}}", self._event),
            ("GET", f"{V1}/backfill/{{roomId}}", self._backfill),
            ("POST", f"{V1}/get_missing_events/{{roomId}}", self._missing),
            ("GET", f"{V1}/state/{{roomId}}", self._state),
            ("GET", f"{V1}/state_ids/{{roomId}}", self._state_ids),
            ("GET", f"{V1}/event_auth/{{roomId}}/{{eventId}}", self._event_auth),
        ):
            yield Route(method, path, function, auth="server", limit="federation", serves="federation")

    # --- events

    async def _event(self, request: Request) -> bytes:
        one = await self._rooms.event(request.params["eventId"])
        if one is None or one.rejected:
            raise NotFound("This event is not known here. Ask a server that is in its room.")
        room = await self._asking.history_until(request.origin, one.event.room_id, [one.id])
        users = users_of(room, request.origin)
        return self._transaction(await self._db.read(lambda query: shown(query, room, users, [one])))

    async def _backfill(self, request: Request) -> bytes:
        room = await self._asking.history_until(request.origin, request.params["roomId"], ())
        start = request.query_list("v")
        if not start:
            raise MissingParam("The parameter v is missing: the event IDs from which to go back.")
        _require_few("v", start)
        limit = request.query_int("limit", MAX_BACKFILL, high=MAX_BACKFILL)
        users = users_of(room, request.origin)

        def read(query: Query) -> list[bytes]:
            return shown(query, room, users, _history(query, room, start, limit))

        return self._transaction(await self._db.read(read))

    async def _missing(self, request: Request) -> bytes:
        body = request.json()
        earliest, latest = get_list(body, "earliest_events"), get_list(body, "latest_events")
        for name, given in (("earliest_events", earliest), ("latest_events", latest)):
            _require_few(name, given)
        room = await self._asking.history_until(request.origin, request.params["roomId"], latest)
        latest = await self._asking.within(request.origin, room, latest)
        limit = min(_number(body, "limit", DEFAULT_MISSING), MAX_MISSING)
        min_depth = _number(body, "min_depth", 0)
        users = users_of(room, request.origin)

        def read(query: Query) -> list[bytes]:
            return shown(query, room, users, _between(query, room, earliest, latest, limit, min_depth))

        return orjson.dumps({"events": [orjson.Fragment(pdu) for pdu in await self._db.read(read)]})

    def _transaction(self, pdus: Iterable[bytes]) -> bytes:
        return orjson.dumps(
            {
                "origin": self._server_name,
                "origin_server_ts": self._clock.now(),
                "pdus": [orjson.Fragment(pdu) for pdu in pdus],
            }
        )

    # --- states

    async def _state(self, request: Request) -> bytes:
        version, state_ids = await self._state_asked(request)

        def make(found: Gathered) -> bytes:
            return orjson.dumps({"pdus": found.of_state(), "auth_chain": found.of_chain()})

        return await self._chains.answer(version, state_ids, make)

    async def _state_ids(self, request: Request) -> bytes:
        version, state_ids = await self._state_asked(request)

        def make(found: Gathered) -> bytes:
            return orjson.dumps({"pdu_ids": found.state, "auth_chain_ids": found.chain})

        return await self._chains.answer(version, state_ids, make)

    async def _event_auth(self, request: Request) -> bytes:
        event_id = request.params["eventId"]
        room = await self._asking.resident_until(request.origin, request.params["roomId"], [event_id])
        one = await self._of_room(room, event_id)

        def make(found: Gathered) -> bytes:
            return orjson.dumps({"auth_chain": found.of_chain()})

        return await self._chains.answer(room.version, (), make, also=(one.id,))

    async def _state_asked(self, request: Request) -> tuple[RoomVersion, list[str]]:
        event_id = request.query.get("event_id")
        if not event_id:
            raise MissingParam("The parameter event_id is missing: the event before which to look at the state.")
        room = await self._asking.resident_until(request.origin, request.params["roomId"], [event_id])
        require_whole(room)
        one = await self._of_room(room, event_id)
        return room.version, await state_before(self._db, self._rooms, room, one)

    async def _of_room(self, room: Room, event_id: str) -> Stored:
        one = await self._rooms.event(event_id)
        if one is None or one.room_nid != room.nid:
            raise NotFound("This room has no such event, as far as this server knows.")
        return one


async def state_before(
    db: Database, rooms: Rooms, room: Room, one: Stored, *, members: Container[str] | None = None
) -> list[str]:
    """The event IDs of a room's state right before one of its events; of its member events only those of `members`, where
    that is given. Raises NotFound where the state is not known."""
    if one.state_nid is None:
        raise NotFound("This server knows the event, but not the room's state at that point. Ask another server.")
    event = one.event
    if room.state_nid == one.state_nid:
        entries = dict(room.entries)
    else:
        entries = dict(await rooms.states.get(one.state_nid))
    before = None
    if event.key is not None and not one.rejected and entries.get(event.key, ("",))[0] == one.id:
        before = one.replaces
        del entries[event.key]
        if before is None and (one.pos is None or one.marks & HISTORY):
            # Whether it replaced something is not on record; what it builds on tells.
            found = await db.read(store.by_ids, event.prev_events, room.version)
            nids = [each.state_nid for each in found.values() if each.state_nid is not None]
            if nids and len(nids) == len(set(event.prev_events)):
                entries = dict(await rooms.states.resolved(room.version, nids))
    told = [
        event_id
        for key, (event_id, _) in entries.items()
        if members is None or key[0] != "m.room.member" or key[1] in members
    ]
    if before is not None and (members is None or event.key is None or event.key[1] in members):
        told.append(before)
    return told


def _history(query: Query, room: Room, start: Sequence[str], limit: int) -> list[Stored]:
    """These events and what lies before them, the deepest first."""
    waiting: list[tuple[int, int, str]] = []
    read: dict[str, Stored] = {}

    def reach(event_ids: Iterable[str]) -> None:
        fresh = [event_id for event_id in dict.fromkeys(event_ids) if event_id not in read]
        for one in _placed(query, room, fresh[: MAX_WALKED - len(read)]):
            read[one.id] = one
            heappush(waiting, (-one.depth, -one.nid, one.id))

    reach(start)
    found: list[Stored] = []
    while waiting and len(found) < limit:
        one = read[heappop(waiting)[2]]
        if not one.rejected:
            found.append(one)
        reach(one.event.prev_events)
    return found


def _between(
    query: Query, room: Room, earliest: Sequence[str], latest: Sequence[str], limit: int, min_depth: int
) -> list[Stored]:
    """What lies between two sides of a gap: breadth first from its later side, and then the oldest first."""
    known = {*earliest, *latest}
    waiting = deque(_placed(query, room, [event_id for event_id in latest if event_id not in earliest]))
    found: list[Stored] = []
    walked = len(waiting)
    while waiting and len(found) < limit and walked < MAX_WALKED:
        one = waiting.popleft()
        fresh = [event_id for event_id in dict.fromkeys(one.event.prev_events) if event_id not in known]
        known.update(fresh)
        for before in _placed(query, room, fresh[: MAX_WALKED - walked]):
            walked += 1
            if before.event.depth < min_depth or len(found) >= limit:
                continue
            if not before.rejected:
                found.append(before)
            waiting.append(before)
    return found[::-1]


def _placed(query: Query, room: Room, event_ids: Iterable[str]) -> list[Stored]:
    """Those that stand in the room's graph here; of others we know no more than that they were cited."""
    found = store.by_ids(query, event_ids, room.version)
    return [one for one in found.values() if one.room_nid == room.nid and one.state_nid is not None]


def _require_few(name: str, given: Sequence[Any]) -> None:
    if len(given) > MAX_ASKED:
        raise BadJson(f"{name} has more than {MAX_ASKED} entries.")
    if not all(isinstance(event_id, str) and len(event_id) <= MAX_ID_BYTES for event_id in given):
        raise BadJson(f"{name} is a list of event IDs.")


def _number(body: dict[str, Any], name: str, default: int) -> int:
    value = body.get(name, default)
    if type(value) is not int or value < 0:
        raise BadJson(f"{name} is not a whole number of 0 or more.")
    return value
