"""What came into a room since it was joined in part, put on the whole state: each event judged again, each state recorded anew.

The states since are small differences from each other, so that much stays as it was: only the first is written whole. An
event that the whole state does not allow becomes a rejected one, and what builds on it stands without it. One that was
refused only because of what was taken for the state rises: it counts from here on, and `later.py` gives it its place. Runs
under the room's lock; what it finds is written by the caller, at once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from relay.db import Database, Query, Tx
from relay.protocol.auth import auth_keys
from relay.protocol.event import Event
from relay.protocol.judge import judge
from relay.rooms import state, store
from relay.rooms.gap_rows import note_gaps
from relay.rooms.intake import Taken
from relay.rooms.partial import Partial
from relay.rooms.room import CREATE, Room
from relay.rooms.rooms import Rooms
from relay.rooms.state import Known, StateMap
from relay.rooms.store import COLUMNS, HISTORY, IN_PART, REJECTED, SOFT_FAILED, Key, Stored

# Whoever is in a room can have any number of events refused there.
MAX_RISEN = 1_000
# Latest events that are looked at together, and that a room has afterwards: what held any number of others together may turn
# out to be refused.
MAX_ENDS = 50
# Merged states that are kept: each is as large as the room.
MAX_MERGED = 16

_REFUSED = REJECTED | SOFT_FAILED | IN_PART

_SINCE = (
    f"SELECT {COLUMNS} FROM events e WHERE e.room_nid = $1 AND e.pos > $2 AND (e.marks & {HISTORY}) = 0 "
    f"UNION ALL SELECT {COLUMNS} FROM events e WHERE e.nid > $2 AND e.room_nid = $1 AND e.pos IS NULL "
    "AND e.state_nid IS NOT NULL"
)


@dataclass(slots=True)
class Replayed:
    """`current` is the room's state now; `changes` when which state was current."""

    current: Known
    events: list[tuple[str, int, int]] = field(default_factory=list)  # (event ID, state after it, marks)
    rejected: dict[str, bool] = field(default_factory=dict)  # of each event that was judged anew
    changes: list[tuple[int, int]] = field(default_factory=list)  # (pos, state)
    risen: list[Taken] = field(default_factory=list)  # they have no place yet; each after what it builds on
    cited: list[tuple[str, Event]] = field(default_factory=list)  # (one of these, what stands and builds on it)
    ends_gone: list[str] = field(default_factory=list)  # latest events that are rejected now
    ends_come: list[str] = field(default_factory=list)  # what is latest in their place

    def write(self, tx: Tx, room: Room, since: int) -> None:
        tx.many("UPDATE events SET state_nid = $2, marks = $3 WHERE event_id = $1", self.events)
        tx.run("DELETE FROM current_states WHERE room_nid = $1 AND pos >= $2", room.nid, since)
        tx.many(
            "INSERT INTO current_states (room_nid, pos, state_nid) VALUES ($1, $2, $3)",
            [(room.nid, pos, nid) for pos, nid in self.changes],
        )
        tx.run("UPDATE rooms SET state_nid = $2 WHERE nid = $1", room.nid, self.current.nid)
        for event_id, citing in self.cited:
            note_gaps(tx, room, [event_id], citing)
        tx.many(
            "DELETE FROM forward_extremities WHERE room_nid = $1 AND event_id = $2",
            [(room.nid, e) for e in self.ends_gone],
        )
        tx.many(
            "INSERT INTO forward_extremities (room_nid, event_id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
            [(room.nid, e) for e in self.ends_come],
        )


class Replay:
    def __init__(self, db: Database, rooms: Rooms) -> None:
        self._db = db
        self._rooms = rooms
        self._merged: OrderedDict[frozenset[int], Known] = OrderedDict()

    async def over(self, room: Room, partial: Partial, members: StateMap) -> Replayed:
        """`members` are the member events of the state before the join. The caller holds the room's lock, and everything that
        was queued is on disk."""
        base_nid = await self._db.read(state.current_at, room.nid, partial.pos)
        base = await self._rooms.states.get(base_nid) if base_nid is not None else {}
        whole: StateMap = {**base, **members}
        with self._db.write(chain=room.room_id) as tx:
            nid, steps = state.record(tx, room.nid, None, 0, whole, ())
        await tx
        first = Known(nid, steps, whole)
        replayed = Replayed(first, changes=[(partial.pos, nid)])
        since = await self._db.read(_since, room, partial.pos)
        cited = Counter(e for one in since for e in set(one.event.prev_events))
        after: dict[str, Known] = {}
        self._merged.clear()
        latest: dict[str, Known] = {}
        standing: dict[str, Stored] = {}
        beneath: dict[str, set[str]] = {}
        built_on: set[str] = set()
        waiting = since
        while waiting:
            later = []
            ids = {one.id for one in waiting}
            for one in waiting:
                prev = one.event.prev_events
                if any(e in ids and e not in after for e in prev):
                    later.append(one)
                    continue
                ids.discard(one.id)
                known, marks = await self._place(room, partial, one, first, after, replayed)
                after[one.id] = known
                seen = _seen_through(prev, beneath)
                if one.pos is not None and not marks & _REFUSED:
                    standing[one.id] = one
                    built_on |= seen
                    await self._moves(room, one, known, latest, seen, replayed)
                else:
                    beneath[one.id] = seen.intersection(latest)
                # Whole states are large: kept are those on which something builds.
                for e in set(prev):
                    cited[e] -= 1
                for e in (*prev, one.id):
                    if cited[e] <= 0 and e not in room.extremities:
                        after.pop(e, None)
                        beneath.pop(e, None)
            if len(later) == len(waiting):
                break
            waiting = later
        ends = {after[e].nid: after[e] for e in room.extremities if e in after}
        if ends:
            replayed.current = await self._together(room, list(ends.values()))
        self._merged.clear()
        if replayed.changes[-1][1] != replayed.current.nid:
            last = max((one.pos or 0 for one in since), default=partial.pos)
            replayed.changes.append((last, replayed.current.nid))
        risen = {taken.event.id for taken in replayed.risen}
        replayed.cited = [(e, one.event) for one in standing.values() for e in one.event.prev_events if e in risen]
        replayed.ends_gone = [e for e in room.extremities if e in beneath]
        if replayed.ends_gone:
            come = _seen_through(replayed.ends_gone, beneath) - built_on
            replayed.ends_come = [e for e in standing if e in come][-MAX_ENDS:]
            if not replayed.ends_come and len(replayed.ends_gone) == len(room.extremities):
                replayed.ends_come = list(latest)[-1:]  # the room goes on from somewhere
        return replayed

    async def _place(
        self, room: Room, partial: Partial, one: Stored, first: Known, after: Mapping[str, Known], replayed: Replayed
    ) -> tuple[Known, int]:
        """The state after one event and its marks, which also go into `replayed`."""
        event = one.event
        prev = [e for e in dict.fromkeys(event.prev_events) if e in after]
        if one.id == partial.event_id:
            before = first
        elif prev and len(prev) == len(set(event.prev_events)):
            before = await self._together(room, list({after[e].nid: after[e] for e in prev}.values()))
        else:
            # What it builds on was not to be had: the state before it was told, whole, by another server.
            replayed.events.append((one.id, one.state_nid or 0, one.marks))
            return await self._rooms.states.known(one.state_nid or 0), one.marks
        marks = one.marks
        if one.pos is None and marks & (SOFT_FAILED | IN_PART) != SOFT_FAILED:
            # It is here because it was refused, and not by a door or a policy server.
            marks &= ~_REFUSED
        if one.id != partial.event_id:
            if await self._db.read(_is_rejected, room, event, before.entries, replayed.rejected):
                marks |= REJECTED
            replayed.rejected[one.id] = bool(marks & REJECTED)
        if one.pos is None and not marks & _REFUSED:
            marks = await self._rises(one, marks, replayed)
        known = before
        if event.key is not None and not marks & REJECTED:
            entries = {**before.entries, event.key: (one.id, one.nid)}
            known = await self._written(room, entries, [before])
        replayed.events.append((one.id, known.nid, marks))
        return known, marks

    async def _rises(self, one: Stored, marks: int, replayed: Replayed) -> int:
        """Its marks; `receive.py` asks once more whether the room as it is now allows it, and all the doors."""
        if len(replayed.risen) >= MAX_RISEN:
            marks |= SOFT_FAILED
        else:
            replayed.risen.append(Taken(one.event, marks, one.redacts))
        if marks != one.marks:
            # The resolution of a state in which it stands asks the disk whether it was rejected.
            with self._db.write() as tx:
                tx.run("UPDATE events SET marks = $2 WHERE event_id = $1", one.id, marks)
            await tx
        return marks

    async def _moves(
        self,
        room: Room,
        one: Stored,
        known: Known,
        latest: dict[str, Known],
        seen: set[str],
        replayed: Replayed,
    ) -> None:
        """What was current once this event had come; `seen` is what it builds on."""
        for e in seen:
            latest.pop(e, None)
        latest[one.id] = known
        if len(latest) > MAX_ENDS:
            del latest[next(iter(latest))]
        ends = {each.nid: each for each in latest.values()}
        current = known if len(ends) == 1 else await self._together(room, list(ends.values()))
        if replayed.changes[-1][1] != current.nid and one.pos is not None:
            replayed.changes.append((one.pos, current.nid))

    async def _together(self, room: Room, ends: Sequence[Known]) -> Known:
        if len(ends) == 1:
            return ends[0]
        nids = frozenset(each.nid for each in ends)
        known = self._merged.get(nids)
        if known is None:
            entries = await self._rooms.states.resolved(room.version, nids)
            known = self._merged[nids] = await self._written(room, entries, ends)
            if len(self._merged) > MAX_MERGED:
                self._merged.popitem(last=False)
        self._merged.move_to_end(nids)
        return known

    async def _written(self, room: Room, entries: StateMap, near: Sequence[Known]) -> Known:
        with self._db.write(chain=room.room_id) as tx:
            known = state.derive(tx, room.nid, entries, near)
        await tx
        self._rooms.states.remember(known)
        return known


def _seen_through(event_ids: Iterable[str], beneath: Mapping[str, set[str]]) -> set[str]:
    """The events that these build on in the end: where one does not stand in the room, those `beneath` it."""
    found: set[str] = set()
    for e in event_ids:
        found |= beneath.get(e, {e})
    return found


def _since(query: Query, room: Room, pos: int) -> list[Stored]:
    """In the order in which they got their places."""
    found = [store.stored(row, room.version) for row in query.all(_SINCE, room.nid, pos)]
    return sorted(found, key=lambda one: one.pos if one.pos is not None else one.nid)


def _is_rejected(query: Query, room: Room, event: Event, before: StateMap, rejected: Mapping[str, bool]) -> bool:
    """By the whole state; `rejected` says of events that were judged a moment ago what came of it."""
    keys: list[Key] = [CREATE, *auth_keys(event.type, event.sender, event.state_key, event.content, room.version)]
    ids = {key: before[key][0] for key in keys if key in before}
    found = store.by_ids(query, {*ids.values(), *event.auth_events}, room.version)
    cited = [found[e].event for e in event.auth_events if e in found]
    refused = {e for e, one in found.items() if rejected.get(e, one.rejected)}
    held = {key: found[e].event for key, e in ids.items() if e in found}
    return judge(event, cited, refused, held, None, held.get(CREATE)).outcome == "rejected"
