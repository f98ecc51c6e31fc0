"""When somebody pages back: what lies before a gap is asked for (backfill), a few events at a time, and gets its place
among what was.

Spec: server-server-api/#backfilling-and-retrieving-missing-events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from relay.db import ChainBroken, Database
from relay.errors import Forbidden, RemoteError
from relay.protocol.power import Levels
from relay.remote import Remote
from relay.rooms import redactions, state, store
from relay.rooms.append import Appender
from relay.rooms.gap_rows import END, close_gap, latest_gaps, note_gaps
from relay.rooms.gaps import MAX_SERVERS_ASKED, MAX_STATE_ASKS, Gaps
from relay.rooms.intake import Intake, Taken, in_order, sorted_out
from relay.rooms.room import CREATE, POWER_LEVELS, Room
from relay.rooms.rooms import Rooms
from relay.rooms.state import StateMap
from relay.rooms.store import HISTORY, REJECTED, STUB

log = structlog.get_logger("history")

MAX_BACKFILL = 100
MAX_TRIES = 3


class History:
    def __init__(
        self, db: Database, rooms: Rooms, appender: Appender, intake: Intake, gaps: Gaps, remote: Remote
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._appender = appender
        self._intake = intake
        self._gaps = gaps
        self._remote = remote
        self._server_name = rooms.server_name
        self._filling: dict[int, asyncio.Future[None]] = {}

    async def backfill(self, room: Room, limit: int, lowest: int = -1, highest: int = END) -> bool:
        """Asks for what lies before the latest gaps in this range of depths. True where something came, or may have come by
        somebody else's asking."""
        filling = self._filling.get(room.nid)
        if filling is not None:
            await asyncio.wait([filling])
            return True
        future = self._filling[room.nid] = asyncio.get_running_loop().create_future()
        try:
            return await self._backfill(room, limit, lowest, highest)
        finally:
            del self._filling[room.nid]
            future.set_result(None)

    async def _backfill(self, room: Room, limit: int, lowest: int, highest: int) -> bool:
        missing = await self._db.read(latest_gaps, room.nid, lowest, highest)
        if not missing:
            return False
        what = (room.nid, frozenset(missing))
        try:
            self._gaps.require_hope(what)
        except RemoteError:
            return False
        try:
            room = await self._gaps.whole_room(room)
        except RemoteError:
            return False
        others = [s for s in room.largest_servers(MAX_SERVERS_ASKED + 1) if s != self._server_name]
        for server in others[:MAX_SERVERS_ASKED]:
            try:
                pdus = await self._remote.backfill(server, room.room_id, missing, min(max(limit, 20), MAX_BACKFILL))
                taken = await self._intake.take(pdus[:MAX_BACKFILL], room.version, room.room_id, limits=False)
                if await self._keep_history(server, room, taken):
                    return True
            except (RemoteError, Forbidden):
                log.info("history is not to be had here", server=server)
        self._gaps.give_up(what)
        return False

    async def _keep_history(self, server: str, room: Room, taken: Sequence[Taken]) -> int:
        """Oldest first, so that the state of each follows from those before it."""
        asks = placed = failed = 0
        by_id = {one.event.id: one for one in taken}
        fresh = set(await self._gaps.unplaced(room, list(by_id)))
        for event in in_order((one.event for one in taken if one.event.id in fresh), by=lambda one: one.prev_events):
            try:
                missing = await self._gaps.unplaced(room, event.prev_events)
                before: StateMap | None = None
                if event.type == "m.room.create" and not event.prev_events:
                    before = {}
                elif missing or not event.prev_events:
                    if asks >= MAX_STATE_ASKS:
                        continue
                    asks += 1
                    before = await self._gaps.state_from(server, room, event)
                await self._gaps.cited(server, room, event)
            except (RemoteError, Forbidden):
                # One that can't be placed keeps no other from its place.
                log.info("an earlier event could not be placed", event_id=event.id, server=server)
                failed += 1
                if failed >= MAX_TRIES:
                    break
                continue
            placed += await self._record_history(room, by_id[event.id], before, missing)
        return placed

    async def _record_history(
        self, room: Room, one: Taken, given: StateMap | None, missing: Sequence[str]
    ) -> bool:  # fmt: skip
        """False where somebody else placed it meanwhile. `given` is the state before it where we can't work it out."""
        for _ in range(MAX_TRIES):
            found = await self._rooms.get(room.room_id)
            if found is None:
                return False
            async with found.lock:
                if found.dropped:
                    continue
                if not await self._gaps.unplaced(found, [one.event.id]):
                    return False
                try:
                    await self._write_history(found, one, given, missing)
                    return True
                except ChainBroken:
                    continue
        return False

    async def _write_history(self, room: Room, one: Taken, given: StateMap | None, missing: Sequence[str]) -> None:
        event = one.event
        cited = await self._db.read(store.by_ids, event.auth_events, room.version)
        create = await room.event(*CREATE)
        judged = sorted_out([one], cited, create)
        good = bool(judged) and not judged[0][1] & REJECTED
        prev = await self._db.read(store.by_ids, event.prev_events, room.version)
        nids = {p.state_nid for p in prev.values() if p.state_nid is not None and p.room_nid == room.nid}
        near = [await self._rooms.states.known(nid) for nid in sorted(nids)]
        before = given if given is not None else await self._rooms.states.resolved(room.version, nids)
        nid = (await self._gaps.numbers([event.id])).get(event.id)
        early = await redactions.early(self._db, room, event)
        target, levels, marks = None, None, one.marks | (0 if good else REJECTED)
        if event.type == "m.room.redaction" and good and create is not None:
            power = next((c.event for c in cited.values() if c.event.key == POWER_LEVELS), None)
            levels = Levels.of(create, power)
            target = await redactions.target_of(self._db, room, one.redacts)
            marks |= STUB if redactions.is_held(event, target, levels) else 0
        with self._db.write(chain=room.room_id) as tx:
            self._appender.begins(tx, room)
            self._appender.first_time(tx, event, nid)
            number = nid if nid is not None else tx.pos()
            after = {**before, event.key: (event.id, number)} if event.key is not None and good else before
            placed = self._appender.history(
                tx, room, event, nid=number, state_after=state.derive(tx, room.nid, after, near).nid,
                marks=marks | HISTORY, redacts=one.redacts,
            )  # fmt: skip
            if levels is not None:
                redactions.record(tx, room, placed, target, levels)
            redactions.meet(tx, room, placed, early)
            close_gap(tx, room, event)
            note_gaps(tx, room, missing, event)
        await tx
