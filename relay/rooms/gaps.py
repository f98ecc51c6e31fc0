"""What is missing is fetched: before an event (get_missing_events, then state_ids) and beside it (auth events). All of it
before the room's lock, each with a bound on requests and events.

Spec: server-server-api/#backfilling-and-retrieving-missing-events, #retrieving-event-authorization-information.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Hashable, Sequence
from typing import Any

import structlog

from relay.clock import SECOND
from relay.db import Database, Query
from relay.errors import ApiError, Forbidden, RemoteError
from relay.protocol.event import Event
from relay.remote import Remote
from relay.rooms import store
from relay.rooms.append import OUTLIERS_AT_ONCE, Appender
from relay.rooms.gap_rows import Gap
from relay.rooms.intake import Intake, Taken, in_order, sorted_out
from relay.rooms.room import CREATE, Room
from relay.rooms.rooms import Rooms
from relay.rooms.state import StateMap
from relay.rooms.store import REJECTED
from relay.rooms.whole_state import MAX_STATE_EVENTS, WholeState

log = structlog.get_logger("gaps")

# Places one event in its room, as journey 2 does: who gave it, the room's ID, the event, what is known in place of what is
# before it.
Place = Callable[[str, str, Taken, Gap | None], Awaitable[Any]]

MISSING_ASKED = 20
MAX_ROUNDS = 5
MAX_SERVERS_ASKED = 3
MAX_FETCHED_ONE_BY_ONE = 200
MAX_STATE_ASKS = 3
# An event cites a few, which rest on those that made the room what it is; nearly all of these are here.
MAX_CITED = 2_000
# A gap that nobody could fill is not asked for again so soon.
UNFILLED_SECONDS = 60.0
# Several events behind one gap come from several servers at once: the first fetches for all of them, but one whose server
# keeps its answer holds up the others no longer than this.
PATIENCE_SECONDS = 5.0
# How long what lies before a gap waits for the members of a room that was joined a moment ago.
WHOLE_SECONDS = 20.0
MAX_UNFILLED = 2_000
NOT_GIVEN = (200, 403, 404)  # by a server that answers


class Gaps:
    def __init__(self, db: Database, rooms: Rooms, appender: Appender, intake: Intake, remote: Remote) -> None:
        self._db = db
        self._rooms = rooms
        self._appender = appender
        self._intake = intake
        self._remote = remote
        self._whole = WholeState(db, appender, intake)
        self._server_name = rooms.server_name
        # What could not be filled -> until when it is not asked for. It runs out by itself.
        self._unfilled: OrderedDict[Hashable, float] = OrderedDict()
        # The event that is being fetched -> what came of it: the events built on, and what is known in place of them.
        self._under_way: dict[str, asyncio.Future[tuple[frozenset[str], Gap | None]]] = {}

    async def fill(self, origin: str, room: Room, taken: Taken, place: Place) -> Gap | None:
        """Fetches what the event builds on and cites, unless somebody else is about it. None: it can be placed as usual now.

        Raises RemoteError where nobody gives what is missing.
        """
        event = taken.event
        built_on = frozenset(event.prev_events)
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE_SECONDS
        while True:
            missing = await self.unplaced(room, event.prev_events)
            lacking = missing or await self._unknown(room, event.auth_events)
            if not lacking:
                return None
            others = {self._under_way[e] for e in lacking if e in self._under_way}
            if not others or (left := until - loop.time()) <= 0:
                break
            ended, _ = await asyncio.wait(others, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for built_on_too, gap in (one.result() for one in ended):
                if gap is not None and built_on_too == built_on:
                    await self.cited(origin, room, event)
                    return gap
        outcome: asyncio.Future[tuple[frozenset[str], Gap | None]] = loop.create_future()
        mine = [e for e in lacking if self._under_way.setdefault(e, outcome) is outcome]
        gap = None
        try:
            gap = await self._fetched(origin, room, event, missing, place)
            return gap
        finally:
            for event_id in mine:
                del self._under_way[event_id]
            outcome.set_result((built_on, gap))

    async def _fetched(self, origin: str, room: Room, event: Event, missing: Sequence[str], place: Place) -> Gap | None:
        if not missing:
            await self.cited(origin, room, event)
            return None
        self.require_hope(*((room.nid, e) for e in missing))
        try:
            told = await self._earlier(origin, room, event, missing, place)
            missing = await self.unplaced(room, event.prev_events)
            if not missing:
                await self.cited(origin, room, event)
                return None
            if told:
                # It gave something, and not what its event builds on: what it would say of the state is worth no more.
                raise RemoteError(origin, 0, "it does not give what its event builds on")
            room = await self.whole_room(room)
            before = await self._state_before(origin, room, event)
            # The state's events, and those that authorise them, are most of what the event may cite.
            await self.cited(origin, room, event)
            return Gap(before, missing)
        except (RemoteError, Forbidden) as error:
            # Where a wire broke, it is worth asking as soon as it may hold again.
            self.give_up(*((room.nid, e) for e in missing), seconds=self._remote.left_alone(origin) / SECOND)
            raise error if isinstance(error, RemoteError) else RemoteError(origin, 0, error.text) from error

    async def whole_room(self, room: Room) -> Room:
        """Where a room's members are being fetched already, nobody fetches them a second time. Raises RemoteError."""
        if room.partial is None:
            return room
        try:
            return await self._rooms.whole(room.room_id, WHOLE_SECONDS) or room
        except ApiError as error:
            raise RemoteError(self._server_name, 0, error.text) from error

    def require_hope(self, *what: Hashable) -> None:
        now = asyncio.get_running_loop().time()
        if any(self._unfilled.get(one, 0.0) > now for one in what):
            raise RemoteError(self._server_name, 0, "nobody could give what is missing a moment ago")

    def give_up(self, *what: Hashable, seconds: float = 0.0) -> None:
        """`seconds`: for how long; 0 where there is no telling."""
        until = asyncio.get_running_loop().time() + (seconds or UNFILLED_SECONDS)
        for one in what:
            self._unfilled[one] = until
            self._unfilled.move_to_end(one)
        while len(self._unfilled) > MAX_UNFILLED:
            self._unfilled.popitem(last=False)

    async def unplaced(self, room: Room, event_ids: Collection[str]) -> list[str]:
        """Those that have no place in this room: we lack them, or know them only as outliers. Raises RemoteError for one of
        another room, whose state has no business here."""
        asked = [e for e in dict.fromkeys(event_ids) if room.state_after(e) is None and e not in room.extremities]
        if not asked:
            return []
        await self._db.settled()

        def find(query: Query) -> tuple[list[str], bool]:
            rows = {e: query.one("SELECT state_nid, room_nid FROM events WHERE event_id = $1", e) for e in asked}
            strays = any(row is not None and row[1] != room.nid for row in rows.values())
            return [e for e, row in rows.items() if row is None or row[0] is None], strays

        unplaced, strays = await self._db.read(find)
        if strays:
            raise RemoteError(self._server_name, 0, "the event builds on one of another room")
        return unplaced

    async def _earlier(self, origin: str, room: Room, event: Event, missing: Sequence[str], place: Place) -> bool:
        """get_missing_events, a few times, each further back: what lies between what we have and this event. Whether the
        server answered, and with nothing of use."""
        found: dict[str, Taken] = {}
        latest = [event.id]
        useless = False
        for _ in range(MAX_ROUNDS):
            try:
                pdus = await self._remote.missing_events(
                    origin, room.room_id, list(room.extremities)[:MISSING_ASKED], latest, MISSING_ASKED, 0
                )
                useless = useless or bool(pdus)
                taken = await self._intake.take(pdus[:MISSING_ASKED], room.version, room.room_id)
                fresh = [one for one in taken if one.event.id not in found and one.event.id != event.id]
                found.update((one.event.id, one) for one in fresh if room.acl.allows(one.event.server))
                wanted = {e for one in fresh for e in one.event.prev_events} | set(missing)
                still = set(await self.unplaced(room, wanted - found.keys()))
            except RemoteError as error:
                log.info("missing events are not to be had", room_id=room.room_id, server=error.server)
                useless = useless or error.status == 200
                break
            latest = [one.event.id for one in fresh if not still.isdisjoint(one.event.prev_events)][:MISSING_ASKED]
            if not latest:
                break
        asks = 0
        for earlier in in_order((one.event for one in found.values()), by=lambda one: one.prev_events):
            try:
                if not await self.unplaced(room, [earlier.id]):
                    continue
                lacking = await self.unplaced(room, earlier.prev_events)
                gap = None
                if lacking:
                    # The gap is wider than what was given: here it begins, and what follows is whole. The state's events
                    # and those that authorise them are most of what it cites.
                    if asks >= MAX_STATE_ASKS:
                        continue
                    asks += 1
                    gap = Gap(await self._state_before(origin, room, earlier), lacking)
                await self.cited(origin, room, earlier)
                found[earlier.id].cited = event.server in room.servers
                await place(origin, room.room_id, found[earlier.id], gap)
            except RemoteError:
                log.info("an earlier event could not be placed", event_id=earlier.id, server=origin)
        return useless and not found

    def _askable(self, origin: str, room: Room, event: Event) -> list[str]:
        """Who may know about an event: who gave it, who made it, and whoever has most people in the room."""
        servers = room.servers
        # Strangers to the room are not let have its members asked about what they made up.
        at_home = origin in servers or event.server in servers
        others = room.largest_servers(MAX_SERVERS_ASKED + 1) if at_home else []
        named = dict.fromkeys([origin, event.server, *others])
        return [server for server in named if server != self._server_name][:MAX_SERVERS_ASKED]

    async def cited(self, origin: str, room: Room, event: Event) -> None:
        """The auth events of an event, as outliers, each judged by its own auth events (PDU check 4)."""
        unknown = await self._unknown(room, event.auth_events)
        if not unknown:
            return
        for server in self._askable(origin, room, event):
            try:
                chain = await self._remote.event_auth(server, room.room_id, event.id)
                given = await self._intake.parsed_aside(chain[:MAX_STATE_EVENTS], room.version, room.room_id)
                taken = await self._intake.verified(await self._rested_on(server, unknown, given))
            except (RemoteError, Forbidden):  # one that is shut out is not asked
                continue
            await self.keep_outliers(room, taken)
            unknown = await self._unknown(room, event.auth_events)
            if not unknown:
                return
        raise RemoteError(origin, 0, "it did not give the events that authorise this one")

    async def _rested_on(self, server: str, unknown: Sequence[str], given: Sequence[Event]) -> list[Event]:
        """Of a whole auth chain what the unknown ones rest on and is not here yet. Raises RemoteError for more than any room
        needs: whoever sends events can make up as many as she likes."""
        by_id = {one.id: one for one in given}
        known = await self.numbers(list(by_id))
        needed: dict[str, Event] = {}
        waiting = list(unknown)
        while waiting:
            one = by_id.get(waiting.pop())
            if one is None or one.id in needed or one.id in known:
                continue
            needed[one.id] = one
            if len(needed) > MAX_CITED:
                raise RemoteError(server, 200, f"the event rests on more than {MAX_CITED} that are not known here")
            waiting += one.auth_events
        return list(needed.values())

    async def _unknown(self, room: Room, event_ids: Collection[str]) -> list[str]:
        asked = [e for e in event_ids if room.kept(e) is None]
        if not asked:
            return []
        await self._db.settled()
        known = await self.numbers(asked)
        return [e for e in asked if e not in known]

    async def numbers(self, event_ids: Collection[str]) -> dict[str, int]:
        def find(query: Query) -> dict[str, int]:
            rows = {e: query.one("SELECT nid FROM events WHERE event_id = $1", e) for e in event_ids}
            return {e: row[0] for e, row in rows.items() if row is not None}

        return await self._db.read(find)

    async def keep_outliers(self, room: Room, taken: Sequence[Taken]) -> None:
        """Stores state events that others cite; one whose auth events do not allow it is marked rejected, one whose auth
        events are not all here is not kept: what is not known of it can't be held against those that cite it."""
        known = await self.numbers([one.event.id for one in taken])
        fresh = [one for one in taken if one.event.id not in known and one.event.key is not None]
        given = {one.event.id for one in fresh}
        wanted = {e for one in fresh for e in one.event.auth_events} - given
        create_id = room.entries[CREATE][0] if CREATE in room.entries else "$" + room.room_id[1:]
        have = await self._db.read(store.by_ids, {*wanted, create_id}, room.version)
        create = have[create_id].event if create_id in have else None
        kept = await asyncio.to_thread(sorted_out, fresh, have, create)
        for start in range(0, len(kept), OUTLIERS_AT_ONCE):
            with self._db.write() as tx:
                self._appender.outliers(tx, room, kept[start : start + OUTLIERS_AT_ONCE])
            await tx

    async def _state_before(self, origin: str, room: Room, event: Event) -> StateMap:
        """The state before an event, from the first server that tells it."""
        last: RemoteError | None = None
        for server in self._askable(origin, room, event):
            try:
                return await self.state_from(server, room, event)
            except RemoteError as error:
                last = error
            except Forbidden as shut_out:
                last = RemoteError(server, 0, shut_out.text)
        raise last or RemoteError(origin, 0, "no other server is known that could tell the state")

    async def state_from(self, server: str, room: Room, event: Event) -> StateMap:
        """Spec: server-server-api/#get_matrixfederationv1state_idsroomid"""
        state_ids, chain_ids = await self._remote.state_ids(server, room.room_id, event.id)
        if max(len(state_ids), len(chain_ids)) > MAX_STATE_EVENTS:
            raise RemoteError(server, 502, "the room's state is larger than this server takes")
        wanted = list(dict.fromkeys([*state_ids, *chain_ids]))
        known = await self.numbers(wanted)
        missing = [e for e in wanted if e not in known]
        if len(missing) > MAX_FETCHED_ONE_BY_ONE:
            create = await room.event(*CREATE)
            if create is None:
                raise RemoteError(server, 0, "the room's create event is not here")
            given, chain = await self._remote.state(server, room.room_id, event.id)
            glance = await self._whole.glance(server, given, chain)
            await self._whole.take(server, room, given, chain, glance, create)
        else:
            pdus = []
            for event_id in missing:
                try:
                    pdus.append(await self._remote.event(server, event_id))
                except RemoteError as error:
                    if error.status not in NOT_GIVEN:
                        raise  # A state with holes, only because a wire broke, would judge what follows differently for ever.
                    log.info("an event of the state is not to be had", event_id=event_id, server=server)
            if pdus:
                await self.keep_outliers(room, await self._intake.take(pdus, room.version, room.room_id))

        def entries(query: Query) -> StateMap:
            found: StateMap = {}
            sql = "SELECT type, state_key, nid, marks, room_nid FROM events WHERE event_id = $1"
            for event_id in state_ids:
                row = query.one(sql, event_id)
                if row is not None and row[1] is not None and not row[3] & REJECTED and row[4] == room.nid:
                    found[(row[0], row[1])] = (event_id, row[2])
            return found

        before = await self._db.read(entries)
        if CREATE not in before or before[CREATE] != room.entries.get(CREATE, before[CREATE]):
            raise RemoteError(server, 0, "the state it gave has not the room's create event")
        return before
