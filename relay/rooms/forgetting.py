"""`relay server forget NAME`, as far as rooms are concerned: what people of a server wrote loses its content here for good.

The events stay as stubs, whose IDs and signatures are valid, so that the rooms go on; names and pictures of people go, what a
room's rules and settings say stays, whoever set it. Invites from there are turned down without a word to them. Runs while no
relay does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from relay.db import Database, Query, Row
from relay.protocol import event as events
from relay.protocol.versions import VERSIONS
from relay.rooms.append import LOG_MEMBERSHIP
from relay.rooms.store import COLUMNS, STUB, WIDTH, stored

AT_ONCE = 1000
# State that says something of people or in words; the rest is what the room needs to go on alike everywhere.
_WORDS = frozenset({"m.room.member", "m.room.name", "m.room.topic", "m.room.avatar"})


# Which of these events must stay, since they were reported.
Frozen = Callable[[Query, Sequence[str]], Collection[str]]


async def forget(db: Database, server: str, frozen: Frozen) -> int:
    """How many events and invites."""
    return await _forget_events(db, f"%:{server}", frozen) + await _forget_invites(db, f"%:{server}")


async def _forget_events(db: Database, ending: str, frozen: Frozen) -> int:
    changed, last = 0, 0

    def found(query: Query) -> tuple[list[Row], Collection[str]]:
        rows = query.all(
            f"SELECT {COLUMNS}, r.version FROM events e JOIN rooms r ON r.nid = e.room_nid "
            "WHERE e.nid > $1 AND e.sender LIKE $2 ORDER BY e.nid LIMIT $3",
            last,
            ending,
            AT_ONCE,
        )
        return rows, frozen(query, [row[1] for row in rows])

    while True:
        rows, kept = await db.read(found)
        with db.write() as tx:
            for row in rows:
                last = row[0]
                one = stored(row, VERSIONS[row[WIDTH]])
                if one.event.id in kept or (one.event.is_state and one.event.type not in _WORDS):
                    continue
                bare = events.redacted(one.event)
                if bare.pdu == one.event.pdu and (one.event.is_state or one.marks & STUB):
                    continue
                marks = one.marks if one.event.is_state else one.marks | STUB
                tx.run(
                    "UPDATE events SET json = $2, marks = $3, redacts = $4 WHERE nid = $1",
                    one.nid,
                    bare.raw,
                    marks,
                    one.redacts,
                )
                tx.run("DELETE FROM relations WHERE event_nid = $1", one.nid)
                changed += 1
        await tx
        if len(rows) < AT_ONCE:
            return changed


async def _forget_invites(db: Database, ending: str) -> int:
    rows = await db.read(
        lambda query: query.all(
            "SELECT m.room_nid, m.user_id FROM memberships m JOIN events e ON e.event_id = m.event_id "
            "WHERE m.local = 1 AND m.membership = 'invite' AND e.sender LIKE $1",
            ending,
        )
    )
    with db.write() as tx:
        for room_nid, user_id in rows:
            pos = tx.pos()
            tx.run(
                "UPDATE memberships SET membership = 'leave', stripped = NULL, pos = $3, since_pos = $3 "
                "WHERE room_nid = $1 AND user_id = $2",
                room_nid,
                user_id,
                pos,
            )
            tx.run(LOG_MEMBERSHIP, pos, room_nid, user_id, "invite", "leave")
    await tx
    return len(rows)
