"""What is missing is fetched: before an event (get_missing_events, then state_ids), beside it (auth events), and, when
somebody pages back, history (backfill). All of it before the room's lock, each with a bound on requests and events.

Spec: server-server-api/#backfilling-and-retrieving-missing-events, #retrieving-event-authorization-information.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import structlog

from relay.db import Database, Query
from relay.errors import NotAllowed, RemoteError
from relay.protocol.auth import check, check_auth_events
from relay.protocol.event import Event
from relay.protocol.judge import Verdict
from relay.remote import Remote
from relay.rooms import redactions, state, store
from relay.rooms.append import Appender
from relay.rooms.intake import Intake, Taken, in_order
from relay.rooms.room import CREATE, Room
from relay.rooms.rooms import Rooms
from relay.rooms.state import StateMap
from relay.rooms.store import HISTORY, REJECTED, Stored

if TYPE_CHECKING:
    from relay.rooms.receive import Receiver

log = structlog.get_logger("gaps")

MISSING_ASKED = 20
MAX_ROUNDS = 5
MAX_SERVERS_ASKED = 3
MAX_FETCHED_ONE_BY_ONE = 200
MAX_STATE_ASKS = 3
MAX_BACKFILL = 100


class Gaps:
    def __init__(self, db: Database, rooms: Rooms, appender: Appender, intake: Intake, remote: Remote) -> None:
        self._db = db
        self._rooms = rooms
        self._appender = appender
        self._intake = intake
        self._remote = remote
        self._server_name = rooms.server_name

    # --- before an event

    async def fill(self, origin: str, room: Room, taken: Taken, receiver: Receiver) -> Verdict | None:
        """Fetches what the event builds on and cites. None: it can be placed as usual now; else it was placed here.

        Raises RemoteError where nobody gives what is missing.
        """
        event = taken.event
        missing = await self._unplaced(event.prev_events)
        if missing:
            await self._earlier(origin, room, event, receiver)
            missing = await self._unplaced(event.prev_events)
        await self._cited(origin, room, event)
        if not missing:
            return None
        before = await self._state_from(origin, room, event)
        known = [e for e in event.prev_events if e not in missing]
        if known:
            found = await self._db.read(store.by_ids, known, room.version)
            maps = [await self._rooms.states.get(one.state_nid) for one in found.values() if one.state_nid is not None]
            before = await self._rooms.states.merged(room.version, [before, *maps])
        await self._note_gap(room, missing, event.depth - 1)
        return await receiver.place_on_state(origin, room, taken, before)

    async def _unplaced(self, event_ids: Iterable[str]) -> list[str]:
        """Those that we lack, or know only as outliers."""

        def find(query: Query) -> list[str]:
            return [
                e
                for e in event_ids
                if not query.one("SELECT 1 FROM events WHERE event_id = $1 AND state_nid IS NOT NULL", e)
            ]

        return await self._db.read(find)

    async def _earlier(self, origin: str, room: Room, event: Event, receiver: Receiver) -> None:
        """get_missing_events, a few times: what lies between what we have and this event."""
        for _ in range(MAX_ROUNDS):
            earliest = list(room.extremities)[:20]
            pdus = await self._remote.missing_events(origin, room.room_id, earliest, [event.id], MISSING_ASKED, 0)
            fetched = await self._intake.take(pdus, room.version, room.room_id)
            fresh = set(await self._unplaced([one.event.id for one in fetched]))
            placed = 0
            for one in sorted((o for o in fetched if o.event.id in fresh), key=lambda o: o.event.depth):
                if await self._unplaced(one.event.prev_events):
                    continue
                await self._cited(origin, room, one.event)
                await receiver.place(origin, room.room_id, one)
                placed += 1
            if not placed or not await self._unplaced(event.prev_events):
                return

    async def _cited(self, origin: str, room: Room, event: Event) -> None:
        """The auth events of an event, as outliers, each judged by its own auth events (PDU check 4)."""
        known = await self._known(event.auth_events)
        if len(known) == len(set(event.auth_events)):
            return
        chain = await self._remote.event_auth(origin, room.room_id, event.id)
        await self.keep_outliers(room, await self._intake.take(chain, room.version, room.room_id))
        known = await self._known(event.auth_events)
        if len(known) < len(set(event.auth_events)):
            raise RemoteError(origin, 0, "it did not give the events that authorise this one")

    async def _known(self, event_ids: Iterable[str]) -> set[str]:
        def find(query: Query) -> set[str]:
            return {e for e in event_ids if query.one("SELECT 1 FROM events WHERE event_id = $1", e)}

        return await self._db.read(find)

    async def keep_outliers(self, room: Room, taken: Sequence[Taken]) -> None:
        """Stores events that others cite; one whose auth events do not allow it is marked rejected."""
        known = await self._known([one.event.id for one in taken])
        by_id = {one.event.id: one for one in taken if one.event.id not in known}
        wanted = {e for one in by_id.values() for e in one.event.auth_events}
        have: dict[str, Stored] = await self._db.read(store.by_ids, wanted, room.version)
        events = {e: one.event for e, one in have.items()} | {e: one.event for e, one in by_id.items()}
        create_id = room.entries[CREATE][0] if CREATE in room.entries else "$" + room.room_id[1:]
        create = (await room.events([create_id])).get(create_id) or next(
            (e for e in events.values() if e.type == "m.room.create"), None
        )
        rejected = {e for e, one in have.items() if one.rejected}
        with self._db.write(chain=room.room_id) as tx:
            for event in in_order(one.event for one in by_id.values()):
                marks = by_id[event.id].marks
                if not authorised(event, events, rejected, create):
                    rejected.add(event.id)
                    marks |= REJECTED
                self._appender.outlier(tx, room, event, marks=marks)
        await tx

    async def _state_from(self, origin: str, room: Room, event: Event) -> StateMap:
        """The state before an event as its server tells it. Spec: server-server-api/#get_matrixfederationv1state_idsroomid"""
        state_ids, chain_ids = await self._remote.state_ids(origin, room.room_id, event.id)
        wanted = list(dict.fromkeys([*state_ids, *chain_ids]))
        missing = [e for e in wanted if e not in await self._known(wanted)]
        if len(missing) > MAX_FETCHED_ONE_BY_ONE:
            pdus, chain = await self._remote.state(origin, room.room_id, event.id)
            await self.keep_outliers(room, await self._intake.take([*chain, *pdus], room.version, room.room_id))
        else:
            pdus = []
            for event_id in missing:
                try:
                    pdus.append(await self._remote.event(origin, event_id))
                except RemoteError:
                    log.info("an event of the state is not to be had", event_id=event_id, server=origin)
            if pdus:
                await self.keep_outliers(room, await self._intake.take(pdus, room.version, room.room_id))

        def entries(query: Query) -> StateMap:
            found: StateMap = {}
            for event_id in state_ids:
                row = query.one(
                    "SELECT type, state_key, nid, marks, room_nid FROM events WHERE event_id = $1", event_id
                )
                if row is not None and row[1] is not None and not row[3] & REJECTED and row[4] == room.nid:
                    found[(row[0], row[1])] = (event_id, row[2])
            return found

        before = await self._db.read(entries)
        if CREATE not in before:
            raise RemoteError(origin, 0, "the state it gave has no create event")
        return before

    async def _note_gap(self, room: Room, missing: Sequence[str], depth: int) -> None:
        with self._db.write() as tx:
            tx.many(
                "INSERT INTO gaps (room_nid, event_id, depth) VALUES ($1, $2, $3) ON CONFLICT (room_nid, event_id) DO NOTHING",
                [(room.nid, event_id, depth) for event_id in missing],
            )
        await tx

    # --- history

    async def backfill(self, room: Room, limit: int) -> bool:
        """Asks for what lies before the latest gap. True where something came."""
        waiting = await self._db.read(
            lambda query: query.all(
                "SELECT event_id FROM gaps WHERE room_nid = $1 ORDER BY depth DESC LIMIT 10", room.nid
            )
        )
        missing = [row[0] for row in waiting]
        if not missing:
            return False
        for server in sorted(room.servers - {self._server_name})[:MAX_SERVERS_ASKED]:
            try:
                pdus = await self._remote.backfill(server, room.room_id, missing, min(max(limit, 20), MAX_BACKFILL))
                taken = await self._intake.take(pdus[:MAX_BACKFILL], room.version, room.room_id, limits=False)
                if await self._keep_history(server, room, taken):
                    return True
            except RemoteError:
                log.info("history is not to be had here", server=server)
        return False

    async def _keep_history(self, server: str, room: Room, taken: Sequence[Taken]) -> int:
        """Oldest first, so that the state of each follows from those before it."""
        asks = 0
        placed = 0
        fresh = set(await self._unplaced([one.event.id for one in taken]))
        for one in sorted((o for o in taken if o.event.id in fresh), key=lambda o: (o.event.depth, o.event.id)):
            event = one.event
            same: int | None = None
            missing = await self._unplaced(event.prev_events) if event.prev_events else []
            if event.type == "m.room.create" and not event.prev_events:
                before: StateMap = {}
            elif missing or not event.prev_events:
                if asks >= MAX_STATE_ASKS:
                    continue
                asks += 1
                before = await self._state_from(server, room, event)
            else:
                found = await self._db.read(store.by_ids, event.prev_events, room.version)
                nids = [p.state_nid for p in found.values() if p.state_nid is not None]
                before = await self._rooms.states.resolved(room.version, nids)
                same = nids[0] if len(set(nids)) == 1 and event.key is None else None
            await self._cited(server, room, event)
            await self._record_history(room, one, before, missing, same)
            placed += 1
        return placed

    async def _record_history(
        self, room: Room, one: Taken, before: StateMap, missing: Sequence[str], same: int | None
    ) -> None:
        """`same` is the state's number where the event leaves it as it was."""
        event = one.event
        cited = await self._db.read(store.by_ids, event.auth_events, room.version)
        create = await room.event(*CREATE)
        rejected = {e for e, c in cited.items() if c.rejected}
        good = authorised(event, {e: c.event for e, c in cited.items()}, rejected, create)
        nid = await self._db.read(lambda query: query.value("SELECT nid FROM events WHERE event_id = $1", event.id))
        number = nid if nid is not None else self._db.next_pos()
        after = dict(before)
        if event.key is not None and good:
            after[event.key] = (event.id, number)
        early = await redactions.early(self._db, event.id)
        redaction = await self._rooms.event(early[0]) if early else None
        levels = await room.levels()
        with self._db.write() as tx:
            state_after = same if same is not None else state.record(tx, room.nid, None, 0, after, [])[0]
            marks = one.marks | (0 if good else REJECTED) | HISTORY
            placed = self._appender.history(
                tx, room, event, nid=number, state_after=state_after, marks=marks, redacts=one.redacts
            )
            if redaction is not None and redactions.applies(redaction.event, event, levels):
                redactions.take_back(tx, room, placed, redaction.id)
            tx.run("DELETE FROM gaps WHERE room_nid = $1 AND event_id = $2", room.nid, event.id)
            tx.many(
                "INSERT INTO gaps (room_nid, event_id, depth) VALUES ($1, $2, $3) ON CONFLICT (room_nid, event_id) DO NOTHING",
                [(room.nid, m, event.depth - 1) for m in missing],
            )
        await tx


def authorised(event: Event, events: dict[str, Event], rejected: set[str], create: Event | None) -> bool:
    """Whether an event's own auth events are there and allow it: PDU check 4."""
    cited = [events[e] for e in event.auth_events if e in events]
    if len(cited) != len(event.auth_events):
        return False
    try:
        check_auth_events(event, cited, rejected, create if event.type != "m.room.create" else None)
        check(event, {one.key: one for one in cited if one.key is not None}, create)
    except NotAllowed:
        return False
    return True
