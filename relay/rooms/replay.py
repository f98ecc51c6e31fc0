"""What came into a room since it was joined in part, put on the whole state: each event judged again, each state recorded anew.

The states since are small differences from each other, so that much stays as it was: only the first is written whole. An
event that the whole state does not allow becomes a rejected one, and what builds on it stands without it; one that was
refused before stays refused. Runs under the room's lock; what it finds is written by the caller, at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from relay.db import Database, Query, Tx
from relay.protocol.auth import auth_keys
from relay.protocol.event import Event
from relay.protocol.judge import judge
from relay.rooms import state, store
from relay.rooms.partial import Partial
from relay.rooms.room import CREATE, Room
from relay.rooms.rooms import Rooms
from relay.rooms.state import Known, StateMap
from relay.rooms.store import COLUMNS, HISTORY, REJECTED, SOFT_FAILED, Key, Stored

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
    changes: list[tuple[int, int]] = field(default_factory=list)  # (pos, state)

    def write(self, tx: Tx, room_nid: int, since: int) -> None:
        tx.many("UPDATE events SET state_nid = $2, marks = $3 WHERE event_id = $1", self.events)
        tx.run("DELETE FROM current_states WHERE room_nid = $1 AND pos >= $2", room_nid, since)
        tx.many(
            "INSERT INTO current_states (room_nid, pos, state_nid) VALUES ($1, $2, $3)",
            [(room_nid, pos, nid) for pos, nid in self.changes],
        )
        tx.run("UPDATE rooms SET state_nid = $2 WHERE nid = $1", room_nid, self.current.nid)


class Replay:
    def __init__(self, db: Database, rooms: Rooms) -> None:
        self._db = db
        self._rooms = rooms
        self._merged: dict[frozenset[int], Known] = {}

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
                known = await self._place(room, partial, one, first, after, replayed)
                after[one.id] = known
                if one.pos is not None and not replayed.events[-1][2] & (REJECTED | SOFT_FAILED):
                    await self._moves(room, one, known, latest, replayed)
                # Whole states are large: kept are those on which something builds.
                for e in set(prev):
                    cited[e] -= 1
                    if not cited[e] and e in after and e not in room.extremities:
                        del after[e]
            if len(later) == len(waiting):
                break
            waiting = later
        ends = {after[e].nid: after[e] for e in room.extremities if e in after}
        if ends:
            replayed.current = await self._together(room, list(ends.values()))
        if replayed.changes[-1][1] != replayed.current.nid:
            last = max((one.pos or 0 for one in since), default=partial.pos)
            replayed.changes.append((last, replayed.current.nid))
        return replayed

    async def _place(
        self, room: Room, partial: Partial, one: Stored, first: Known, after: dict[str, Known], replayed: Replayed
    ) -> Known:
        """The state after one event; its verdict goes into `replayed`."""
        event = one.event
        prev = [e for e in dict.fromkeys(event.prev_events) if e in after]
        if one.id == partial.event_id:
            before = first
        elif prev and len(prev) == len(set(event.prev_events)):
            before = await self._together(room, list({after[e].nid: after[e] for e in prev}.values()))
        else:
            # What it builds on was not to be had: the state before it was told, whole, by another server.
            replayed.events.append((one.id, one.state_nid or 0, one.marks))
            return await self._rooms.states.known(one.state_nid or 0)
        marks = one.marks
        fallen = {event_id for event_id, _, held in replayed.events if held & REJECTED}
        if not marks & REJECTED and one.id != partial.event_id:
            marks |= await self._db.read(_verdict, room, event, before.entries, fallen)
        known = before
        if event.key is not None and not marks & REJECTED:
            entries = {**before.entries, event.key: (one.id, one.nid)}
            known = await self._written(room, entries, [before])
        replayed.events.append((one.id, known.nid, marks))
        return known

    async def _moves(self, room: Room, one: Stored, known: Known, latest: dict[str, Known], replayed: Replayed) -> None:
        """What was current once this event had come."""
        for e in one.event.prev_events:
            latest.pop(e, None)
        latest[one.id] = known
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
        return known

    async def _written(self, room: Room, entries: StateMap, near: Sequence[Known]) -> Known:
        with self._db.write(chain=room.room_id) as tx:
            known = state.derive(tx, room.nid, entries, near)
        await tx
        self._rooms.states.remember(known)
        return known


def _since(query: Query, room: Room, pos: int) -> list[Stored]:
    """In the order in which they got their places."""
    found = [store.stored(row, room.version) for row in query.all(_SINCE, room.nid, pos)]
    return sorted(found, key=lambda one: one.pos if one.pos is not None else one.nid)


def _verdict(query: Query, room: Room, event: Event, before: StateMap, fallen: set[str]) -> int:
    """The marks that the whole state adds; `fallen` are events that were rejected a moment ago."""
    keys: list[Key] = [CREATE, *auth_keys(event.type, event.sender, event.state_key, event.content, room.version)]
    ids = {key: before[key][0] for key in keys if key in before}
    found = store.by_ids(query, {*ids.values(), *event.auth_events}, room.version)
    cited = [found[e].event for e in event.auth_events if e in found]
    rejected = {e for e, one in found.items() if one.rejected or e in fallen}
    held = {key: found[e].event for key, e in ids.items() if e in found}
    verdict = judge(event, cited, rejected, held, None, held.get(CREATE))
    return 0 if verdict.outcome == "accepted" else REJECTED
