"""Journey 2: an event of another server finds its place in a room, or is refused with a reason.

intake (format, signatures, hash, seal) > gaps if something is missing, all of it before the room's lock > the state before
it > judge > append. The numbers are those of server-server-api/#checks-performed-on-receipt-of-a-pdu.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from relay.db import ChainBroken, Database, Query, Tx
from relay.doors import Doors
from relay.errors import ApiError, RemoteError
from relay.protocol.auth import auth_keys
from relay.protocol.event import Event
from relay.protocol.judge import Verdict, judge
from relay.rooms import redactions, state, store
from relay.rooms.append import Appender
from relay.rooms.gaps import Gaps
from relay.rooms.intake import Intake, Taken
from relay.rooms.room import CREATE, Room
from relay.rooms.rooms import Rooms
from relay.rooms.state import StateMap
from relay.rooms.store import REJECTED, SOFT_FAILED, Key, Stored

log = structlog.get_logger("receive")

MAX_TRIES = 3
MAX_LATELY = 1_000


class Receiver:
    def __init__(
        self, db: Database, rooms: Rooms, appender: Appender, intake: Intake, gaps: Gaps, doors: Doors
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._appender = appender
        self._intake = intake
        self._gaps = gaps
        self._doors = doors
        # What was just placed, with its write as long as that is under way; dropped where the write fails, and by size.
        self._lately: OrderedDict[str, tuple[Verdict, Tx | None]] = OrderedDict()

    async def receive(self, origin: str, room_id: str, pdus: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
        """The events of one transaction for one room, in order: event ID -> None, or why it was refused.

        Raises nothing for what a peer did wrong; what is not even an event has no ID to speak of.
        """
        room = await self._rooms.get(room_id)
        if room is None or not room.known or not room.local_joined:
            return {}
        parsed = self._intake.parsed(pdus, room.version, room_id)
        known = await self._have(room, [event.id for event in parsed])
        results: dict[str, str | None] = {event.id: None for event in parsed if event.id in known}
        fresh = [event for event in parsed if event.id not in known]
        if not room.acl.allows(origin):
            # It asks about who hands the events over: others may still pass on what a denied server sent earlier.
            return results | {event.id: "The room's access list does not admit this server." for event in fresh}
        taken = await self._intake.verified(fresh)
        good = {one.event.id for one in taken}
        results.update({event.id: "The signatures do not hold." for event in fresh if event.id not in good})
        for one in taken:
            try:
                verdict = await self.place(origin, room_id, one)
                results[one.event.id] = verdict.reason or None if verdict.outcome == "rejected" else None
            except RemoteError as error:
                log.info("an event has to wait for what it builds on", event_id=one.event.id, server=error.server)
                results[one.event.id] = "What this event builds on could not be fetched."
        return results

    async def admit(self, event: Event, *, origin: str, marks: int = 0) -> Verdict:
        """An event with good signatures that another server hands to us as a resident: a join, leave or knock."""
        taken = self._intake.kept_form(event)
        taken.marks |= marks
        return await self.place(origin, event.room_id, taken)

    async def place(self, origin: str, room_id: str, taken: Taken) -> Verdict:
        """Judges and records one event, with whatever has to be fetched first. Raises RemoteError where that fails."""
        room = await self._rooms.get(room_id)
        assert room is not None
        if not self._continues(room, taken.event):
            filled = await self._gaps.fill(origin, room, taken, self)
            if filled is not None:
                return filled
        for _ in range(MAX_TRIES):
            room = await self._rooms.get(room_id)
            assert room is not None
            async with room.lock:
                if room.dropped:
                    continue
                verdict, write = await self._once(origin, room, taken, None)
            try:
                if write is not None:
                    await write
                return verdict
            except ChainBroken:
                continue
        raise RemoteError(origin, 0, "the room is being repaired")

    async def place_on_state(self, origin: str, room: Room, taken: Taken, before: StateMap) -> Verdict:
        """The same where the state before the event came from its server, since we lack what lies before it."""
        async with room.lock:
            verdict, write = await self._once(origin, room, taken, before)
        if write is not None:
            await write
        return verdict

    async def _once(self, origin: str, room: Room, taken: Taken, given: StateMap | None) -> tuple[Verdict, Tx | None]:
        """Under the room's lock. One event may come by several ways at the same time; it gets one place."""
        event_id = taken.event.id
        known = self._lately.get(event_id)
        if known is not None:
            return known
        verdict, write = await self._judge_and_record(origin, room, taken, given)
        if write is not None:
            self._lately[event_id] = (verdict, write)
            write.after(lambda: self._lately.update({event_id: (verdict, None)}))
            write.failed(lambda: self._not_placed(event_id))
            while len(self._lately) > MAX_LATELY:
                self._lately.popitem(last=False)
        return verdict, write

    def _not_placed(self, event_id: str) -> None:
        self._lately.pop(event_id, None)

    def _continues(self, room: Room, event: Event) -> bool:
        """Whether it builds on the room's latest events alone, so that nothing can be missing."""
        return set(event.prev_events) == set(room.extremities) and all(
            room.kept(e) is not None or any(e == entry[0] for entry in self._auth_entries(room, event))
            for e in event.auth_events
        )

    def _auth_entries(self, room: Room, event: Event) -> list[tuple[str, int]]:
        keys = [CREATE, *auth_keys(event.type, event.sender, event.state_key, event.content, room.version)]
        return [room.entries[key] for key in keys if key in room.entries]

    async def _have(self, room: Room, event_ids: Sequence[str]) -> set[str]:
        """Which of these are already placed, or refused. Outliers do not count, unless they stand in the room's current
        state: those lie before what we have, and to judge them by a later state would refuse what is right."""
        current = {event_id for event_id, _ in room.entries.values()}

        def find(query: Query) -> set[str]:
            return {
                event_id
                for event_id in event_ids
                if event_id in current
                or query.one(
                    "SELECT 1 FROM events WHERE event_id = $1 AND (pos IS NOT NULL OR state_nid IS NOT NULL "
                    f"OR (marks & {REJECTED | SOFT_FAILED}) != 0)",
                    event_id,
                )
            }

        return await self._db.read(find)

    async def _judge_and_record(
        self, origin: str, room: Room, taken: Taken, given: StateMap | None
    ) -> tuple[Verdict, Tx | None]:
        """Under the room's lock. `given` is the state before the event where we can't work it out."""
        event = taken.event
        straight = given is None and set(event.prev_events) == set(room.extremities)
        if not straight:
            await self._db.settled()  # what is compared below is on disk
        if given is not None:
            before = given
        elif straight:
            before = room.entries
        else:
            before = await self._state_before(room, event)
        cited = (
            await self._db.read(store.by_ids, event.auth_events, room.version)
            if not self._all_kept(room, event)
            else {}
        )
        auth_events = [
            room.kept(e) or cited[e].event for e in event.auth_events if room.kept(e) is not None or e in cited
        ]
        rejected = {e for e, one in cited.items() if one.rejected}
        keys = [CREATE, *auth_keys(event.type, event.sender, event.state_key, event.content, room.version)]
        state_before = await self._events_of(room, before, keys)
        current = state_before if straight else await room.state_events(keys)
        verdict = judge(
            event, auth_events, rejected, state_before, current, current.get(CREATE) or state_before.get(CREATE)
        )
        if verdict.outcome == "accepted":
            try:
                await self._doors.receive(origin, event)
            except ApiError as no:
                verdict = Verdict("soft_failed", "door", no.text)
        if verdict.outcome != "accepted":
            log.info("refused an event", event_id=event.id, outcome=verdict.outcome, rule=verdict.rule)
        target = await redactions.target_of(self._db, room, taken.redacts) if event.type == "m.room.redaction" else None
        early = await redactions.early(self._db, event.id) if not straight else []
        levels = await room.levels()
        nid = await self._nid(event.id) if not straight or event.is_state else None
        if verdict.outcome == "accepted" and straight:
            with self._db.write(chain=room.room_id) as tx:
                one = self._appender.append(tx, room, event, marks=taken.marks, nid=nid, redacts=taken.redacts)
                if event.type == "m.room.redaction":
                    redactions.record(tx, room, one, target, levels)
            return verdict, tx
        return verdict, await self._record_beside(room, taken, verdict, before, nid, target, early)

    def _all_kept(self, room: Room, event: Event) -> bool:
        return all(room.kept(e) is not None for e in event.auth_events)

    async def _events_of(
        self, room: Room, entries: Mapping[Key, tuple[str, int]], keys: Sequence[Key]
    ) -> dict[Key, Event]:
        wanted = {key: entries[key][0] for key in keys if key in entries}
        found = await room.events(wanted.values())
        return {key: found[event_id] for key, event_id in wanted.items() if event_id in found}

    async def _nid(self, event_id: str) -> int | None:
        """The number it has where it is an outlier already."""
        nid: int | None = await self._db.read(
            lambda query: query.value("SELECT nid FROM events WHERE event_id = $1", event_id)
        )
        return nid

    async def _state_before(self, room: Room, event: Event) -> StateMap:
        found = await self._db.read(store.by_ids, event.prev_events, room.version)
        nids = [one.state_nid for one in found.values() if one.state_nid is not None]
        if not nids:
            return {}  # before the first event there is nothing
        return await self._rooms.states.resolved(room.version, nids)

    async def _record_beside(
        self,
        room: Room,
        taken: Taken,
        verdict: Verdict,
        before: StateMap,
        nid: int | None,
        target: Stored | None,
        early: Sequence[str],
    ) -> Tx:
        """An event that is refused, or stands beside others: its own state, and the current one after a resolution."""
        event = taken.event
        after: StateMap = dict(before)
        number = nid if nid is not None else self._db.next_pos()
        if event.key is not None and verdict.outcome != "rejected":
            after[event.key] = (event.id, number)
        levels = await room.levels()
        redaction = await self._rooms.event(early[0]) if early else None
        if verdict.outcome == "accepted":
            others = [e for e in room.extremities if e not in event.prev_events]
            current = await self._current(room, event, after, others)
            changed_ids = {key: e for key, (e, _) in current.items() if room.entries.get(key, ("",))[0] != e}
            events = await room.events([e for e in changed_ids.values() if e != event.id])
            events[event.id] = event
            changed = {key: events[e] for key, e in changed_ids.items() if e in events}
        with self._db.write(chain=room.room_id) as tx:
            # A whole state of its own: forks are rare, and its neighbours may be far away.
            state_after, _ = state.record(tx, room.nid, None, 0, after, [])
            if verdict.outcome == "rejected":
                self._appender.set_aside(
                    tx, room, event, nid=number, state_after=state_after, marks=taken.marks | REJECTED
                )
            elif verdict.outcome == "soft_failed":
                self._appender.set_aside(
                    tx, room, event, nid=number, state_after=state_after, marks=taken.marks | SOFT_FAILED
                )
            else:
                replaces = before.get(event.key, (None,))[0] if event.key is not None else None
                one = self._appender.append_forked(
                    tx, room, event, nid=number, state_after=state_after, current=current, changed=changed, replaces=replaces,
                    redacts=taken.redacts, marks=taken.marks,
                )  # fmt: skip
                if event.type == "m.room.redaction":
                    redactions.record(tx, room, one, target, levels)
                if redaction is not None and redactions.applies(redaction.event, event, levels):
                    redactions.take_back(tx, room, one, redaction.id)
                tx.run("DELETE FROM early_redactions WHERE target_id = $1", event.id)
            tx.run("DELETE FROM gaps WHERE room_nid = $1 AND event_id = $2", room.nid, event.id)
        self._rooms.states.remember(state_after, after)
        return tx

    async def _current(self, room: Room, event: Event, after: StateMap, others: Sequence[str]) -> StateMap:
        """The state that results from this event's and that of the room's other latest events."""
        found = await self._db.read(store.by_ids, others, room.version)
        maps = [await self._rooms.states.get(one.state_nid) for one in found.values() if one.state_nid is not None]
        return await self._rooms.states.merged(room.version, [after, *maps], [event])
