"""`relay server forget NAME`, as far as rooms are concerned: what people of a server wrote loses its content here for good.

The events stay as stubs, whose IDs and signatures are valid, so that the rooms go on; names and pictures of people go, what a
room's rules and settings say stays, whoever set it. Invites from there are turned down without a word to them. People may talk
meanwhile: what was changed behind a room's back is loaded again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

from relay.db import Database, Query
from relay.protocol import event as events
from relay.protocol.versions import VERSIONS
from relay.rooms.append import Appender
from relay.rooms.rooms import Rooms
from relay.rooms.store import COLUMNS, STUB, WIDTH, stored

AT_ONCE = 200
# State that says something of people or in words; the rest is what the room needs to go on alike everywhere.
_WORDS = frozenset({"m.room.member", "m.room.name", "m.room.topic", "m.room.avatar"})


# Which of these events must stay, since they were reported.
Frozen = Callable[[Query, Sequence[str]], Collection[str]]


async def forget(db: Database, rooms: Rooms, appender: Appender, server: str, frozen: Frozen) -> int:
    """How many events and invites."""
    ending = f"%:{server}"
    return await _forget_events(db, rooms, ending, frozen) + await _forget_invites(db, rooms, appender, ending)


async def _forget_events(db: Database, rooms: Rooms, ending: str, frozen: Frozen) -> int:
    changed = last = 0
    while True:
        nids = await db.read(_next_of, ending, last)
        touched: set[int] = set()
        with db.write() as tx:
            tx.call(partial(_make_bare, nids=nids, frozen=frozen, touched=touched))
            tx.after(partial(_load_again, rooms, touched))
        changed += int(await tx)
        if len(nids) < AT_ONCE:
            return changed
        last = nids[-1]


def _next_of(query: Query, ending: str, after: int) -> list[int]:
    rows = query.all(
        "SELECT nid FROM events WHERE nid > $1 AND sender LIKE $2 ORDER BY nid LIMIT $3", after, ending, AT_ONCE
    )
    return [nid for (nid,) in rows]


def _make_bare(query: Query, nids: Sequence[int], frozen: Frozen, touched: set[int]) -> int:
    """Within the write, so that nothing happens to an event between the look and the change. How many were changed."""
    rows = [
        row
        for nid in nids
        if (
            row := query.one(
                f"SELECT {COLUMNS}, r.version FROM events e JOIN rooms r ON r.nid = e.room_nid WHERE e.nid = $1", nid
            )
        )
        is not None
    ]
    kept = frozen(query, [row[1] for row in rows])
    changed = 0
    for row in rows:
        one = stored(row, VERSIONS[row[WIDTH]])
        if one.event.id in kept or (one.event.is_state and one.event.type not in _WORDS):
            continue
        bare = events.redacted(one.event)
        if bare.pdu == one.event.pdu and (one.event.is_state or one.marks & STUB):
            continue
        marks = one.marks if one.event.is_state else one.marks | STUB
        query.run(
            "UPDATE events SET json = $2, marks = $3, redacts = $4 WHERE nid = $1",
            one.nid,
            bare.raw,
            marks,
            one.redacts,
        )
        query.run("DELETE FROM relations WHERE event_nid = $1", one.nid)
        touched.add(one.room_nid)
        changed += 1
    return changed


def _load_again(rooms: Rooms, touched: Collection[int]) -> None:
    for room_id in list(rooms.loaded_ids()):
        room = rooms.loaded(room_id)
        if room is not None and room.nid in touched:
            rooms.drop(room)


async def _forget_invites(db: Database, rooms: Rooms, appender: Appender, ending: str) -> int:
    pending = await db.read(
        lambda query: query.all(
            "SELECT r.room_id, m.user_id FROM memberships m JOIN events e ON e.event_id = m.event_id "
            "JOIN rooms r ON r.nid = m.room_nid WHERE m.local = 1 AND m.membership = 'invite' AND e.sender LIKE $1",
            ending,
        )
    )
    forgotten = 0
    for room_id, user_id in pending:
        room = await rooms.get(room_id)
        if room is None:
            continue
        async with room.lock:
            # She may have answered it meanwhile.
            if room.dropped or rooms.membership(room_id, user_id) != "invite":
                continue
            with db.write() as tx:
                appender.left_afar(tx, room, user_id, None)
                tx.after(partial(rooms.drop, room))
        await tx
        forgotten += 1
    return forgotten
