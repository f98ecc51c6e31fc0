"""The one place that puts an event into a room: rows, memory and bell together, within one write.

What is appended was judged before; nothing is judged here. The room's memory takes the event at once, so that the next
one can build on it; if the write fails, the room is dropped and loaded again. The caller holds `room.lock` or runs
without an await from judging to here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import orjson

from relay.db import ChainBroken, Query, Tx
from relay.ids import server_of
from relay.protocol.event import Event
from relay.rooms import partial as partial_joins
from relay.rooms import state, store
from relay.rooms.partial import Partial
from relay.rooms.room import SERVER_ACL, Room
from relay.rooms.rooms import Membership, Rooms
from relay.rooms.state import StateMap
from relay.rooms.store import FAN_OUT, HISTORY, LOCAL, REJECTED, SOFT_FAILED, WITHHELD, Stored

# Outliers in one write, so that nobody else's waits long for it.
OUTLIERS_AT_ONCE = 500

LOG_MEMBERSHIP = "INSERT INTO membership_log (pos, room_nid, user_id, before, after) VALUES ($1, $2, $3, $4, $5)"
PUT_MEMBERSHIP = (
    "INSERT INTO memberships (room_nid, user_id, membership, event_id, pos, since_pos, local) VALUES ($1, $2, $3, $4, $5, $6, $7) "
    "ON CONFLICT (room_nid, user_id) DO UPDATE SET membership = excluded.membership, event_id = excluded.event_id, "
    "pos = excluded.pos, since_pos = CASE WHEN memberships.membership = excluded.membership THEN memberships.since_pos "
    "ELSE excluded.since_pos END, forgotten = CASE WHEN memberships.event_id = excluded.event_id THEN memberships.forgotten "
    "ELSE 0 END, stripped = NULL"
)


class Appender:
    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._server_name = rooms.server_name
        # How many events have come into rooms since the start; for the figures.
        self.sent = self.received = 0

    def new_room(self, tx: Tx, room: Room) -> None:
        """The row of a room that was not known before."""
        tx.run(
            "INSERT INTO rooms (nid, room_id, version) VALUES ($1, $2, $3)", room.nid, room.room_id, room.version.name
        )
        self._rooms.add(room)
        tx.failed(lambda: self._rooms.drop(room))

    def begins(self, tx: Tx, room: Room) -> None:
        """Before anything is put into a room that was loaded some awaits ago. Raises ChainBroken where it was dropped since:
        what was judged by it was judged by something that never came to the disk."""
        if room.dropped:
            raise ChainBroken(room.room_id)
        tx.failed(lambda: self._rooms.drop(room))

    def first_time(self, tx: Tx, event: Event, nid: int | None) -> None:
        """The write fails, to be judged again, where the event got a row or a place since it was looked for; `nid` is the
        number that it had then. States speak of events by number, so there may never be two."""
        event_id = event.id

        def look(query: Query) -> None:
            row = query.one("SELECT nid, pos FROM events WHERE event_id = $1", event_id)
            if (row[0] if row is not None else None) != nid or (row is not None and row[1] is not None):
                raise ChainBroken(event_id)

        tx.call(look)

    def append(
        self,
        tx: Tx,
        room: Room,
        event: Event,
        *,
        marks: int = 0,
        sent_by: tuple[str, str, str] | None = None,
        nid: int | None = None,
        redacts: str | None = None,
    ) -> Stored:
        """An accepted event that builds on the current state: one of ours, or a foreign one without a fork.

        `nid` is its number where it was an outlier before.
        """
        self.begins(tx, room)
        pos = tx.pos()
        nid = pos if nid is None else nid
        replaces = None
        if event.key is not None:
            before = room.entries.get(event.key)
            replaces = before[0] if before is not None else None
            self._note_membership(tx, room, event, pos)
            room.take_state(event, nid)
            self._record_state(tx, room, room.state_nid, [nid], pos)
            room.keep(event)
        return self._into_timeline(
            tx, room, Stored(event, nid, pos, room.nid, room.state_nid, marks, None, replaces, redacts, sent_by)
        )

    def append_forked(
        self,
        tx: Tx,
        room: Room,
        event: Event,
        *,
        nid: int,
        state_after: int,
        current: StateMap,
        changed: Mapping[store.Key, Event],
        replaces: str | None,
        supersedes: Collection[str],
        latest: bool = True,
        redacts: str | None = None,
        marks: int = 0,
    ) -> Stored:
        """An accepted event beside others: the current state is the outcome of a resolution, `current`; `changed` are the
        events in it that were not current before. `nid` is a number the caller took for it, `state_after` its own state;
        `supersedes` are those of the room's latest events that it builds on; not `latest` is what others build on already."""
        self.begins(tx, room)
        pos = tx.pos()
        self.replace_state(tx, room, current, changed)
        return self._into_timeline(
            tx,
            room,
            Stored(event, nid, pos, room.nid, state_after, marks, None, replaces, redacts),
            supersedes,
            latest=latest,
        )

    def replace_state(self, tx: Tx, room: Room, current: StateMap, changed: Mapping[store.Key, Event]) -> None:
        """The current state becomes `current`."""
        if current is room.entries or current == room.entries:
            return
        self.begins(tx, room)
        gone = [key for key in room.entries if key not in current]
        pos = tx.last_pos or tx.pos()
        for key, event in changed.items():
            if key[0] == "m.room.member":
                self._note_membership(tx, room, event, pos)
        members = dict(room.members)
        for key in gone:
            if key[0] == "m.room.member":
                self._lost_membership(tx, room, key[1], pos)
                members.pop(key[1], None)
        for key, event in changed.items():
            room.keep(event)
            if key[0] == "m.room.member":
                members[key[1]] = event.membership or "leave"
        acl = changed.get(SERVER_ACL)
        keep_acl = room.acl if acl is None and SERVER_ACL in current else None
        differing = [nid for key, (event_id, nid) in current.items() if room.entries.get(key, ("",))[0] != event_id]
        base = None if gone else room.state_nid
        room.take_whole_state(current, members, acl)
        if keep_acl is not None:
            room.acl = keep_acl
        self._record_state(tx, room, base, differing, pos)

    def _record_state(self, tx: Tx, room: Room, base: int | None, changed: Sequence[int], pos: int) -> None:
        room.state_nid, room.steps = state.record(tx, room.nid, base, room.steps, room.entries, changed)
        room.state_pos = pos
        tx.run("UPDATE rooms SET state_nid = $2 WHERE nid = $1", room.nid, room.state_nid)
        tx.run(
            "INSERT INTO current_states (room_nid, pos, state_nid) VALUES ($1, $2, $3) "
            "ON CONFLICT (room_nid, pos) DO UPDATE SET state_nid = excluded.state_nid",
            room.nid, pos, room.state_nid,
        )  # fmt: skip

    def outlier(self, tx: Tx, room: Room, event: Event, *, marks: int = 0) -> int:
        """An event that others cite: stored without a place in the timeline. Twice is once, and then the number that is
        returned is not its number."""
        nid = tx.pos()
        tx.run(store.INSERT_EVENT + " ON CONFLICT (event_id) DO NOTHING", *_outlier_row(nid, room.nid, event, marks))
        return nid

    def outliers(self, tx: Tx, room: Room, given: Sequence[tuple[Event, int]]) -> None:
        """Many of them, each with its marks."""
        rows = [_outlier_row(tx.pos(), room.nid, event, marks) for event, marks in given]
        tx.many(store.INSERT_EVENT + " ON CONFLICT (event_id) DO NOTHING", rows)

    def history(
        self,
        tx: Tx,
        room: Room,
        event: Event,
        *,
        nid: int,
        state_after: int,
        marks: int = 0,
        redacts: str | None = None,
    ) -> Stored:
        """An event from before what we knew: paged by its depth, never part of /sync."""
        self.begins(tx, room)
        one = Stored(event, nid, tx.pos(), room.nid, state_after, marks | HISTORY, redacts=redacts)
        self._insert(tx, room, one)
        return one

    def set_aside(
        self,
        tx: Tx,
        room: Room,
        event: Event,
        *,
        nid: int,
        state_after: int | None,
        marks: int,
        redacts: str | None = None,
    ) -> Stored:
        """A rejected or soft-failed event: later ones may cite it, nobody is shown it.

        Spec: server-server-api/#rejection, #soft-failure. A soft-failed one keeps its state for resolution.
        """
        self.begins(tx, room)
        one = Stored(event, nid, None, room.nid, state_after, marks, redacts=redacts)
        self._insert(tx, room, one)
        return one

    # --- the pieces

    def _into_timeline(
        self, tx: Tx, room: Room, one: Stored, supersedes: Collection[str] | None = None, *, latest: bool = True
    ) -> Stored:
        event = one.event
        if one.marks & LOCAL:
            self.sent += 1
        else:
            self.received += 1
        self._insert(tx, room, one)
        older = event.prev_events if supersedes is None else supersedes
        cited = [event_id for event_id in older if room.extremities.pop(event_id, None) is not None]
        if cited:
            tx.many(
                "DELETE FROM forward_extremities WHERE room_nid = $1 AND event_id = $2", [(room.nid, c) for c in cited]
            )
        if latest:
            room.extremities[event.id] = one.depth
            tx.run("INSERT INTO forward_extremities (room_nid, event_id) VALUES ($1, $2)", room.nid, event.id)
        if one.shown:
            room.take_event(one)
        if one.marks & (LOCAL | FAN_OUT):
            shared = room.shared
            tx.after(lambda: self._leaves(room, one, shared))
        tx.ring(tuple(room.local_joined), room.room_id)
        return one

    def _leaves(self, room: Room, one: Stored, shared: bool) -> None:
        """After the commit; others may have come since it was queued. Whoever a member event puts out is no longer in the
        room, and has to hear of it."""
        if one.pos is not None and (shared or room.shared or one.event.membership is not None):
            self._rooms.leaving.note(one.pos, one)

    def _insert(self, tx: Tx, room: Room, one: Stored) -> None:
        event = one.event
        if self._rooms.withheld and one.shown and self._rooms.edits_what_is_withheld(event):
            one.marks |= WITHHELD
        tx.run(
            # An outlier that now gets its place keeps its nid: states speak of it.
            store.INSERT_EVENT + " ON CONFLICT (event_id) DO UPDATE SET pos = excluded.pos, state_nid = excluded.state_nid, "
            "marks = excluded.marks, replaces = excluded.replaces",
            one.nid, event.id, room.nid, one.pos, one.depth, event.type, event.sender, event.state_key, one.state_nid,
            one.marks, one.redacted_by, one.replaces, one.redacts if one.redacts != event.redacts else None, event.raw,
        )  # fmt: skip
        if one.state_nid is not None and not one.marks & (REJECTED | SOFT_FAILED):
            room.take_place(event.id, one.state_nid)
        relation = event.content.get("m.relates_to")
        if isinstance(relation, dict) and one.shown:
            target, rel_type = relation.get("event_id"), relation.get("rel_type")
            if isinstance(target, str) and isinstance(rel_type, str) and len(target) <= 255 and len(rel_type) <= 255:
                tx.run(
                    "INSERT INTO relations (event_nid, room_nid, target_id, rel_type) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
                    one.nid, room.nid, target, rel_type,
                )  # fmt: skip
                for other in room.recent:
                    if other.id == target:
                        other.related = True

    def _note_membership(self, tx: Tx, room: Room, event: Event, pos: int) -> None:
        if event.type != "m.room.member" or event.state_key is None:
            return
        user_id, now = event.state_key, event.membership or "leave"
        before = room.members.get(user_id)
        local = server_of(user_id) == self._server_name
        tx.run(PUT_MEMBERSHIP, room.nid, user_id, now, event.id, pos, pos, int(local))
        if before != now:
            tx.run(LOG_MEMBERSHIP + " ON CONFLICT DO NOTHING", pos, room.nid, user_id, before, now)
        if local:
            self._local_membership(tx, room, user_id, now, event.id, pos)
        if before != now:
            tx.after(lambda: self._tell(room, user_id, before, now, pos))

    def _local_membership(self, tx: Tx, room: Room, user_id: str, now: str, event_id: str, pos: int) -> None:
        def take() -> None:
            old = self._rooms.memberships(user_id).get(room.room_id)
            since = old.since_pos if old is not None and old.membership == now else pos
            self._rooms.take_membership(room.room_id, user_id, Membership(now, event_id, pos, since, False, room.nid))

        tx.after(take)
        # Whoever comes is not yet, whoever goes is no longer among those who hear the room.
        tx.ring((user_id,), room.room_id)

    def _lost_membership(self, tx: Tx, room: Room, user_id: str, pos: int) -> None:
        """Resolution took a member event out of the state altogether: the person was never there."""
        before = room.members.get(user_id)
        if before in (None, "leave"):
            return
        tx.run(
            "UPDATE memberships SET membership = 'leave', pos = $3, since_pos = $3 WHERE room_nid = $1 AND user_id = $2",
            room.nid,
            user_id,
            pos,
        )
        tx.run(LOG_MEMBERSHIP + " ON CONFLICT DO NOTHING", pos, room.nid, user_id, before, "leave")
        if server_of(user_id) == self._server_name:
            self._local_membership(tx, room, user_id, "leave", "", pos)
        tx.after(lambda: self._tell(room, user_id, before, "leave", pos))

    def _tell(self, room: Room, user_id: str, before: str | None, now: str, pos: int) -> None:
        for callback in self._rooms.on_membership:
            callback(room, user_id, before, now, pos)

    def invited_from_afar(self, tx: Tx, room: Room, event: Event, stripped: Sequence[object]) -> None:
        """A local person is invited to (or knocks on) a room whose state is not ours to know."""
        pos = tx.pos()
        user_id = event.state_key or ""
        before = self._rooms.membership(room.room_id, user_id)
        self.outlier(tx, room, event)
        tx.run(PUT_MEMBERSHIP, room.nid, user_id, event.membership, event.id, pos, pos, 1)
        tx.run(
            "UPDATE memberships SET stripped = $3 WHERE room_nid = $1 AND user_id = $2",
            room.nid,
            user_id,
            orjson.dumps(list(stripped)),
        )
        self._local_membership(tx, room, user_id, event.membership or "invite", event.id, pos)
        tx.after(lambda: self._tell(room, user_id, before, event.membership or "invite", pos))

    def left_afar(self, tx: Tx, room: Room, user_id: str, event: Event | None) -> None:
        """A local person turned down an invite, or took back a knock, of a room whose state is not ours to know."""
        before = self._rooms.membership(room.room_id, user_id)
        pos = tx.pos()
        if event is not None:
            self.outlier(tx, room, event)
        event_id = event.id if event is not None else ""
        tx.run(PUT_MEMBERSHIP, room.nid, user_id, "leave", event_id, pos, pos, 1)
        self._local_membership(tx, room, user_id, "leave", event_id, pos)
        tx.after(lambda: self._tell(room, user_id, before, "leave", pos))

    def begin_with(
        self,
        tx: Tx,
        room: Room,
        entries: StateMap,
        members: Mapping[str, str],
        acl: Event | None,
        partial: tuple[str, str, frozenset[str]] | None = None,
    ) -> None:
        """The state that a room has when somebody of ours comes to it: nobody is told of each member. `partial` is (the join,
        who let us in, the servers in the room) where the members are still to come."""
        self.begins(tx, room)
        pos = tx.pos()
        known = {entry[0] for entry in room.entries.values()}
        left = [(room.nid, user_id, pos) for user_id in room.members if user_id not in members]
        room.begin_anew(pos)
        room.take_whole_state(entries, members, acl)
        if partial is not None:
            room.partial = Partial(partial[0], pos, partial[1], partial[2])
            partial_joins.begin(tx, room.nid, room.partial)
        else:
            room.partial = None
            partial_joins.forget(tx, room.nid)
        tx.run("DELETE FROM forward_extremities WHERE room_nid = $1", room.nid)
        self._record_state(tx, room, None, [], pos)
        tx.many(
            "UPDATE memberships SET membership = 'leave', pos = $3, since_pos = $3 WHERE room_nid = $1 AND user_id = $2",
            left,
        )
        # Whose member event is the one of the last time has nothing to hear.
        rows = []
        for user_id, membership in members.items():
            event_id = entries["m.room.member", user_id][0]
            if event_id not in known:
                local = server_of(user_id) == self._server_name
                rows.append((room.nid, user_id, membership, event_id, pos, pos, int(local)))
                if local:
                    self._local_membership(tx, room, user_id, membership, event_id, pos)
        tx.many(PUT_MEMBERSHIP, rows)


def _outlier_row(nid: int, room_nid: int, event: Event, marks: int) -> tuple[object, ...]:
    return (
        nid, event.id, room_nid, None, min(event.depth, event.version.max_depth), event.type, event.sender,
        event.state_key, None, marks, None, None, None, event.raw,
    )  # fmt: skip
