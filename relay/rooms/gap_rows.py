"""Rows of what a room lacks: events that others build on and that have no place here yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from relay.db import Query, Tx
from relay.protocol.event import Event
from relay.rooms.room import Room
from relay.rooms.state import StateMap

MOST_LATEST = 10
END = 2**62  # beyond every depth

# What was missing when the event was looked at may have got its place since.
_NOTE_GAP = (
    "INSERT INTO gaps (room_nid, event_id, depth) SELECT $1, $2, $3 WHERE NOT EXISTS "
    "(SELECT 1 FROM events WHERE event_id = $2 AND state_nid IS NOT NULL) ON CONFLICT (room_nid, event_id) DO NOTHING"
)
_LATEST_GAPS = (
    "SELECT g.event_id FROM gaps g LEFT JOIN events e ON e.event_id = g.event_id "
    "WHERE g.room_nid = $1 AND g.depth >= $2 AND g.depth <= $3 AND e.state_nid IS NULL ORDER BY g.depth DESC LIMIT $4"
)


@dataclass(slots=True)
class Gap:
    """What could be had in place of the events before one: the state before it. `missing` are those of its prev_events that
    we lack."""

    before: StateMap
    missing: Sequence[str]


def note_gaps(tx: Tx, room: Room, missing: Iterable[str], event: Event) -> None:
    """In the write that places an event whose prev_events are not all here."""
    depth = min(event.depth, room.version.max_depth) - 1
    tx.many(_NOTE_GAP, [(room.nid, event_id, depth) for event_id in missing])


def close_gap(tx: Tx, room: Room, event: Event) -> None:
    """In the write that gives an event its place."""
    tx.run("DELETE FROM gaps WHERE room_nid = $1 AND event_id = $2", room.nid, event.id)


def latest_gaps(query: Query, room_nid: int, lowest: int, highest: int) -> list[str]:
    """The events that are missing, the latest first, at most `MOST_LATEST` of those within this range of depths."""
    return [row[0] for row in query.all(_LATEST_GAPS, room_nid, lowest, highest, MOST_LATEST)]
