"""Journey 2: an event of another server finds its place in a room, or is refused with a reason.

intake (format, signatures, hash, seal) > gaps if something is missing, all of it before the room's lock > the state before
it > judge > append. The numbers are those of server-server-api/#checks-performed-on-receipt-of-a-pdu.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from relay.db import ChainBroken, Database, Query, Tx
from relay.doors import Doors
from relay.errors import ApiError, RemoteError, StorageFull
from relay.protocol.auth import auth_keys
from relay.protocol.event import Event
from relay.protocol.judge import Verdict, judge
from relay.protocol.power import Levels
from relay.rooms import redactions, state, store
from relay.rooms.append import Appender
from relay.rooms.gap_rows import Gap, close_gap, note_gaps
from relay.rooms.gaps import Gaps
from relay.rooms.intake import Intake, Taken
from relay.rooms.room import CREATE, POWER_LEVELS, Room
from relay.rooms.rooms import Rooms
from relay.rooms.state import Known, StateMap
from relay.rooms.store import AFTER_GAP, IN_PART, LOCAL, REJECTED, SOFT_FAILED, STUB, Key, Stored

log = structlog.get_logger("receive")

MAX_TRIES = 3
# Loose ends that a room may have; what would add one more is soft-failed until somebody ties them together.
MAX_EXTREMITIES = 50
# How far back through refused events the ones that they build on are looked for.
MAX_REFUSED_WALKED = 100

_ACCEPTED = Verdict("accepted")
_LOOSE_ENDS = Verdict("soft_failed", "bound", "the room has too many latest events that nothing brings together")

_PLACED = f"(pos IS NOT NULL OR (marks & {REJECTED | SOFT_FAILED}) != 0)"


@dataclass(slots=True)
class _Facts:
    """What the database says of an event that is about to be placed."""

    nid: int | None  # its number where it is an outlier
    placed: bool
    cited: bool  # something that stands in the room builds on it already
    awaited: bool  # a redaction came before it


@dataclass(slots=True)
class _Place:
    """Where an event stands: the state before it, known states that are near, and what it leaves no longer the latest."""

    before: StateMap
    near: list[Known]
    supersedes: Collection[str]
    straight: bool = False  # on top of everything: the state before it is the room's current one
    same_state: bool = False  # beside others, but all of them with the room's current state
    partial: bool = False  # members may be missing in the state before it


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
        # Keeps an event that has to wait for what it builds on, where it can; set by the server (`later.py`).
        self.keep_for_later: Callable[[str, str, Taken], Awaitable[bool]] | None = None
        # Hears of a server that came to a room, by a join that does not build on these latest events: it lacks them. Set by
        # the server.
        self.on_newcomer: Callable[[str, Sequence[str]], None] = lambda server, lacking: None
        # Asks the room's policy server; set by the server.
        self.look_at: Callable[[Room, Sequence[Taken]], Awaitable[None]] | None = None

    async def receive(self, origin: str, room_id: str, pdus: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
        """The events of one transaction for one room, in order: event ID -> None, or why it was refused.

        Raises nothing for what a peer did wrong; what is not even an event has no ID to speak of.
        """
        room = await self._rooms.get(room_id)
        if room is None or not room.known or not room.local_joined:
            await self._rooms.arrival(room_id)
            room = await self._rooms.get(room_id)
        if room is None or not room.known or not room.local_joined:
            return {}
        parsed = self._intake.parsed(pdus, room.version, room_id)
        known = await self._have(_perhaps_known(room, parsed))
        results: dict[str, str | None] = {event.id: None for event in parsed if event.id in known}
        fresh = [event for event in parsed if event.id not in known]
        allowed = []
        for event in fresh:
            if room.acl.allows(event.server) and room.acl.allows(origin):
                allowed.append(event)
            else:
                results[event.id] = "The room's access list does not admit this server."
        taken = await self._intake.verified(allowed)
        if self.look_at is not None:
            await self.look_at(room, taken)
        good = {one.event.id for one in taken}
        results.update({event.id: "The signatures do not hold." for event in allowed if event.id not in good})
        # Each is judged on what those before it made of the room; the disk is waited for once, by all of them together.
        waiting: list[tuple[Taken, Verdict, Tx | None]] = []
        for one in taken:
            try:
                waiting.append((one, *await self._queued(origin, room_id, one)))
            except RemoteError as error:
                results[one.event.id] = await self._has_to_wait(origin, room_id, one, error)
        for one, verdict, write in waiting:
            try:
                if write is not None:
                    await write
                results[one.event.id] = _told(verdict)
            except ChainBroken:
                try:
                    results[one.event.id] = _told(await self.place(origin, room_id, one, again=True))
                except RemoteError as error:
                    results[one.event.id] = await self._has_to_wait(origin, room_id, one, error)
            except StorageFull:
                raise
            except Exception as error:
                # One event's trouble is not that of those behind it.
                log.error("an event could not be recorded", event_id=one.event.id, exc_info=error)
                results[one.event.id] = "Something went wrong inside the server."
        return results

    async def _has_to_wait(self, origin: str, room_id: str, taken: Taken, error: RemoteError) -> str | None:
        log.info("an event has to wait for what it builds on", event_id=taken.event.id, server=error.server)
        room = self._rooms.loaded(room_id)
        at_home = room is not None and (origin in room.servers or taken.event.server in room.servers)
        if at_home and self.keep_for_later is not None and await self.keep_for_later(origin, room_id, taken):
            return None
        return "What this event builds on could not be fetched."

    async def admit(self, event: Event, *, origin: str, marks: int = 0) -> Verdict:
        """An event with good signatures that another server hands to us as a resident: a join, leave or knock."""
        taken = self._intake.kept_form(event)
        taken.marks |= marks
        return await self.place(origin, event.room_id, taken)

    async def place(
        self, origin: str, room_id: str, taken: Taken, gap: Gap | None = None, *, again: bool = False
    ) -> Verdict:
        """Judges and records one event, with whatever has to be fetched first; `gap` is what was fetched already. Raises
        RemoteError where fetching fails."""
        for _ in range(MAX_TRIES):
            verdict, write = await self._queued(origin, room_id, taken, gap, again=again)
            try:
                if write is not None:
                    await write
                return verdict
            except ChainBroken:
                again = True
        raise RemoteError(origin, 0, "the room is being repaired")

    async def _queued(
        self, origin: str, room_id: str, taken: Taken, gap: Gap | None = None, *, again: bool = False
    ) -> tuple[Verdict, Tx | None]:
        """The same, up to the write, which the caller awaits. `again`: memory alone is not to be trusted with it."""
        for _ in range(MAX_TRIES):
            room = await self._rooms.get(room_id)
            if room is None or not room.known:
                raise RemoteError(origin, 0, "the room is not known here")
            if self.look_at is not None and not taken.looked_at:
                await self.look_at(room, [taken])
            if gap is None and not self._continues(room, taken.event):
                gap = await self._gaps.fill(origin, room, taken, self.place)
            async with room.lock:
                if room.dropped:
                    continue
                try:
                    verdict, write = await self._judge_and_record(origin, room, taken, gap, again=again)
                    if write is not None and (gap is not None or taken.event.redacts is not None):
                        # The next ones look into the database for what this one says about events that are not here.
                        await write
                    return verdict, write
                except ChainBroken:
                    again = True
        raise RemoteError(origin, 0, "the room is being repaired")

    def _continues(self, room: Room, event: Event) -> bool:
        """Whether it builds on events that came lately, so that nothing can be missing."""
        return bool(event.prev_events) and all(
            room.state_after(e) is not None or e in room.extremities for e in event.prev_events
        ) and all(
            room.kept(e) is not None or any(e == entry[0] for entry in self._auth_entries(room, event))
            for e in event.auth_events
        )  # fmt: skip

    def _auth_entries(self, room: Room, event: Event) -> list[tuple[str, int]]:
        keys = [CREATE, *auth_keys(event.type, event.sender, event.state_key, event.content, room.version)]
        return [room.entries[key] for key in keys if key in room.entries]

    async def _have(self, event_ids: Sequence[str]) -> set[str]:
        """Which of these are already placed: in the timeline, or refused one; outliers do not count."""
        if not event_ids:
            return set()

        def find(query: Query) -> set[str]:
            return {
                e for e in event_ids if query.one(f"SELECT 1 FROM events WHERE event_id = $1 AND {_PLACED}", e)
            }  # fmt: skip

        return await self._db.read(find)

    # --- under the room's lock

    async def _judge_and_record(
        self, origin: str, room: Room, taken: Taken, gap: Gap | None, *, again: bool
    ) -> tuple[Verdict, Tx | None]:
        """Raises ChainBroken where the room was dropped meanwhile."""
        event = taken.event
        if room.state_after(event.id) is not None:
            # It came by another way a moment ago; what is answered is on disk.
            await self._db.settled()
            if room.dropped:
                raise ChainBroken(room.room_id)
            return _ACCEPTED, None
        at = self._at_hand(room, event) if gap is None else None
        facts = None
        if again or at is None or not at.straight or event.is_state:
            if at is None:
                await self._db.settled()  # what is looked up below is on disk
            facts = await self._db.read(_facts, room.nid, event.id)
            if facts.placed:
                return _ACCEPTED, None
        if at is None:
            at = await self._looked_up(room, event, gap)
        keys = [CREATE, *auth_keys(event.type, event.sender, event.state_key, event.content, room.version)]
        auth_events, rejected = await self._auth_events(room, event)
        state_before = await self._events_of(room, at.before, keys)
        current = None if at.straight or at.same_state else await room.state_events(keys)
        if room.partial is not None:
            # Of members that are still to come the event itself says what they are; it is judged again once they are here.
            # Spec: MSC3902
            claimed = {e.key: e for e in auth_events if e.type == "m.room.member" and e.key and e.id not in rejected}
            if at.partial:
                state_before = claimed | state_before
            current = None if current is None else claimed | current
        create = (current or state_before).get(CREATE) or state_before.get(CREATE)
        verdict = judge(event, auth_events, rejected, state_before, current, create)
        if verdict.outcome == "accepted" and taken.objection is not None:
            verdict = Verdict("soft_failed", "policy", taken.objection)
        if verdict.outcome == "accepted":
            try:
                await self._doors.receive(origin, event)
            except ApiError as no:
                verdict = Verdict("soft_failed", "door", no.text)
        latest = facts is None or not facts.cited
        if verdict.outcome == "accepted" and latest and len(room.extremities) >= MAX_EXTREMITIES:
            if not any(e in room.extremities for e in at.supersedes):
                verdict = _LOOSE_ENDS
        if verdict.outcome != "accepted":
            if facts is None:
                # It builds on the latest events also when it comes again; a write that fails would cost the room's memory.
                await self._db.settled()
                facts = await self._db.read(_facts, room.nid, event.id)
                if facts.placed:
                    return _ACCEPTED, None
            log.info("refused an event", event_id=event.id, outcome=verdict.outcome, rule=verdict.rule)
            cited = facts.cited or taken.cited or facts.nid is not None
            if verdict.outcome == "rejected" and not cited and event.server not in room.servers:
                # Nobody who is in the room can have built on it: it costs an outsider's server no space here.
                return verdict, None
            return verdict, self._set_aside(room, taken, verdict, at, facts, gap)
        marks, target, levels = taken.marks | (AFTER_GAP if gap is not None and gap.missing else 0), None, None
        if event.type == "m.room.redaction" and create is not None:
            # The power that counts is that of the moment at which it was sent.
            target = await redactions.target_of(self._db, room, taken.redacts)
            levels = Levels.of(create, state_before.get(POWER_LEVELS))
            if redactions.is_held(event, target, levels) and not marks & LOCAL:
                marks |= STUB
        early = await redactions.early(self._db, room, event) if facts is not None and facts.awaited else None
        # What the room becomes is worked out before the write, which is built without an await.
        becomes: StateMap = room.entries
        changed: dict[Key, Event] = {}
        beside: set[int] = set()
        if not at.straight and not at.same_state and latest:
            becomes, changed, beside = await self._becomes(room, event, at, facts)
        lacking: list[str] = []
        if not at.straight and event.membership == "join" and event.server not in room.servers:
            lacking = [e for e in room.extremities if e not in at.supersedes]
        nid = facts.nid if facts is not None else None
        with self._db.write(chain=room.room_id) as tx:
            self._appender.begins(tx, room)
            self._appender.first_time(tx, event, nid)
            if lacking:
                tx.after(lambda: self.on_newcomer(event.server, lacking))
            if at.straight:
                one = self._appender.append(tx, room, event, marks=marks, nid=nid, redacts=taken.redacts)
            else:
                number = nid if nid is not None else tx.pos()
                replaces = at.before.get(event.key, (None,))[0] if event.key is not None else None
                one = self._appender.append_forked(
                    tx, room, event, nid=number, state_after=self._state_after(tx, room, event, at, number),
                    current=_numbered(becomes, event, number), changed=changed, replaces=replaces,
                    supersedes=at.supersedes, latest=latest, redacts=taken.redacts, marks=marks,
                )  # fmt: skip
                if beside and one.state_nid is not None and room.state_nid is not None:
                    result = Known(room.state_nid, room.steps, _numbered(becomes, event, number))
                    self._rooms.states.record_resolution(tx, room.nid, {one.state_nid, *beside}, result)
            if levels is not None:
                redactions.record(tx, room, one, target, levels)
            if facts is not None:
                redactions.meet(tx, room, one, early)
                close_gap(tx, room, event)
            if gap is not None:
                note_gaps(tx, room, gap.missing, event)
        return verdict, tx

    def _at_hand(self, room: Room, event: Event) -> _Place | None:
        """Where it stands, if memory knows; most events build on the latest ones, or on what was latest a moment ago."""
        if not event.prev_events:
            return None
        if room.state_nid is None:
            return None
        if set(event.prev_events) == set(room.extremities):
            return _Place(
                room.entries, [self._current(room)], event.prev_events, straight=True, partial=room.partial is not None
            )
        if event.is_state:
            return None
        if all(room.state_after(e) == room.state_nid for e in (*event.prev_events, *room.extremities)):
            return _Place(
                room.entries,
                [self._current(room)],
                event.prev_events,
                same_state=True,
                partial=room.partial is not None,
            )
        return None

    def _current(self, room: Room) -> Known:
        return Known(room.state_nid or 0, room.steps, room.entries)

    async def _looked_up(self, room: Room, event: Event, gap: Gap | None) -> _Place:
        """The state before an event that stands beside others. An event that follows nothing has none before it."""
        prev, supersedes = await self._db.read(_builds_on, room, event)
        near = [await self._rooms.states.known(nid) for nid in sorted({one.state_nid or 0 for one in prev})]
        if gap is not None:
            before = gap.before
        elif len(prev) < len(set(event.prev_events)):
            raise RemoteError(event.server, 0, "what the event builds on is not here")
        elif near:
            before = await self._rooms.states.resolved(room.version, [known.nid for known in near])
        else:
            before = {}
        since = room.partial.pos if room.partial is not None else None
        partial = since is not None and gap is None and any(known.nid > since for known in near)
        return _Place(before, [*near, self._current(room)], supersedes, partial=partial)

    async def _auth_events(self, room: Room, event: Event) -> tuple[list[Event], set[str]]:
        """Those that it cites, and which of them were rejected."""
        kept = {e: found for e in event.auth_events if (found := room.kept(e)) is not None}
        if len(kept) == len(set(event.auth_events)):
            return [kept[e] for e in event.auth_events], set()
        cited = await self._db.read(store.by_ids, [e for e in event.auth_events if e not in kept], room.version)
        found_events = kept | {e: one.event for e, one in cited.items()}
        if any(e not in found_events for e in event.auth_events):
            raise RemoteError(event.server, 0, "what authorises the event is not here")
        return [found_events[e] for e in event.auth_events], {e for e, one in cited.items() if one.rejected}

    async def _events_of(
        self, room: Room, entries: Mapping[Key, tuple[str, int]], keys: Sequence[Key]
    ) -> dict[Key, Event]:
        wanted = {key: entries[key][0] for key in keys if key in entries}
        found = await room.events(wanted.values())
        return {key: found[event_id] for key, event_id in wanted.items() if event_id in found}

    def _state_after(self, tx: Tx, room: Room, event: Event, at: _Place, number: int) -> int:
        """Written as a small difference from a state nearby."""
        after = at.before
        if event.key is not None:
            after = {**after, event.key: (event.id, number)}
        known = state.derive(tx, room.nid, after, at.near)
        if known.entries is after and after is not room.entries:
            self._rooms.states.remember(known)
        return known.nid

    def _set_aside(
        self, room: Room, taken: Taken, verdict: Verdict, at: _Place, facts: _Facts | None, gap: Gap | None
    ) -> Tx:
        """Spec: server-server-api/#rejection, #soft-failure. The state after a rejected event is the one before it."""
        event = taken.event
        mark = REJECTED if verdict.outcome == "rejected" else SOFT_FAILED
        if room.partial is not None and verdict.rule.startswith("6/"):
            mark |= IN_PART
        nid = facts.nid if facts is not None else None
        with self._db.write(chain=room.room_id) as tx:
            self._appender.begins(tx, room)
            self._appender.first_time(tx, event, nid)
            number = nid if nid is not None else tx.pos()
            if mark == REJECTED:
                state_after = state.derive(tx, room.nid, at.before, at.near).nid
            else:
                state_after = self._state_after(tx, room, event, at, number)
            self._appender.set_aside(
                tx, room, event, nid=number, state_after=state_after, marks=taken.marks | mark, redacts=taken.redacts
            )
            close_gap(tx, room, event)
            if gap is not None and mark & SOFT_FAILED:
                # Where it was made it counts, and what lies before it may be reached by no other way.
                note_gaps(tx, room, gap.missing, event)
        return tx

    async def _becomes(
        self, room: Room, event: Event, at: _Place, facts: _Facts | None
    ) -> tuple[StateMap, dict[Key, Event], set[int]]:
        """The room's state with this event among its latest ones, the events in it that were not current before, and the
        states of the other latest ones."""
        others = [e for e in room.extremities if e not in at.supersedes]
        found = await self._db.read(store.by_ids, others, room.version)
        nids = {one.state_nid for one in found.values() if one.state_nid is not None}
        if event.key is None and len(at.near) == 2 and at.near[0].entries is at.before:
            becomes = await self._rooms.states.resolved(room.version, {*nids, at.near[0].nid})
        else:
            after = at.before
            if event.key is not None:
                number = facts.nid if facts is not None and facts.nid is not None else _NOT_YET
                after = {**after, event.key: (event.id, number)}
            maps = [after, *[await self._rooms.states.get(nid) for nid in sorted(nids)]]
            becomes = await self._rooms.states.merged(room.version, maps, [event])
        changed_ids = {key: e for key, (e, _) in becomes.items() if room.entries.get(key, ("",))[0] != e}
        events = await room.events([e for e in changed_ids.values() if e != event.id])
        events[event.id] = event
        return becomes, {key: events[e] for key, e in changed_ids.items()}, nids


# Stands for the number of an event that gets it in the write.
_NOT_YET = 0


def _numbered(entries: StateMap, event: Event, number: int) -> StateMap:
    if event.key is None or entries.get(event.key) != (event.id, _NOT_YET):
        return entries
    return {**entries, event.key: (event.id, number)}


def _facts(query: Query, room_nid: int, event_id: str) -> _Facts:
    row = query.one(f"SELECT nid, {_PLACED} FROM events WHERE event_id = $1", event_id)
    cited = query.one("SELECT 1 FROM gaps WHERE room_nid = $1 AND event_id = $2", room_nid, event_id)
    awaited = query.one("SELECT 1 FROM early_redactions WHERE target_id = $1", event_id)
    return _Facts(
        row[0] if row is not None else None, row is not None and bool(row[1]), cited is not None, awaited is not None
    )


def _builds_on(query: Query, room: Room, event: Event) -> tuple[list[Stored], set[str]]:
    """Those of its prev_events that stand in this room, and all that it leaves no longer the latest: where it builds on
    refused events, also what these build on."""

    def standing(event_ids: Collection[str]) -> list[Stored]:
        found = store.by_ids(query, event_ids, room.version).values()
        return [one for one in found if one.room_nid == room.nid and one.state_nid is not None]

    prev = standing(event.prev_events)
    supersedes, waiting, walked = set(event.prev_events), list(prev), 0
    while waiting and walked < MAX_REFUSED_WALKED:
        one = waiting.pop()
        if one.marks & (REJECTED | SOFT_FAILED):
            walked += 1
            further = set(one.event.prev_events) - supersedes
            supersedes |= further
            waiting += standing(further)
    return prev, supersedes


def _perhaps_known(room: Room, given: Sequence[Event]) -> list[str]:
    """Those that have to be looked for. What builds on the room's latest events is not among what it has accepted; whether
    it was refused is looked up if it is refused again."""
    ahead = set(room.extremities)
    found = []
    for event in given:
        if event.prev_events and ahead.issuperset(event.prev_events):
            ahead.add(event.id)
        else:
            found.append(event.id)
    return found


def _told(verdict: Verdict) -> str | None:
    return verdict.reason or None if verdict.outcome == "rejected" else None
