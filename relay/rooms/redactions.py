"""Taking back: a redaction names an event, and its ciphertext leaves every answer at once, the database after a while.

A redaction passes the authorization rules for everyone; whether it applies is decided when both events are known.
Spec: rooms/v3/#handling-redactions, client-server-api/#redactions. Until `privacy.redacted_grace` is over, the ciphertext
stays, so that a report can still prove what was taken back.
"""

from __future__ import annotations

from relay.clock import Clock
from relay.db import Database, Query, Tx
from relay.ids import server_of
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.power import Levels
from relay.protocol.versions import VERSIONS
from relay.rooms import store
from relay.rooms.room import Room
from relay.rooms.store import GONE, STUB, Stored

SWEEP_EVERY_SECONDS = 300.0
MAX_SWEPT = 500


def applies(redaction: Event, target: Event, levels: Levels) -> bool:
    if target.room_id != redaction.room_id or target.type == "m.room.create":
        return False
    return server_of(redaction.sender) == server_of(target.sender) or levels.user(redaction.sender) >= levels.redact


async def target_of(db: Database, room: Room, target_id: str | None) -> Stored | None:
    if target_id is None:
        return None
    for one in room.recent:
        if one.id == target_id:
            return one
    found = await db.read(store.by_ids, [target_id], room.version)
    return found.get(target_id)


def record(tx: Tx, room: Room, redaction: Stored, target: Stored | None, levels: Levels) -> None:
    """In the write that appends the redaction."""
    if target is None:
        if redaction.redacts is not None:
            tx.run(
                "INSERT INTO early_redactions (target_id, event_id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
                redaction.redacts,
                redaction.id,
            )
    elif applies(redaction.event, target.event, levels):
        take_back(tx, room, target, redaction.id)
    else:
        # It takes nothing back, so nobody is shown that it did.
        tx.run("UPDATE events SET marks = marks | $2 WHERE nid = $1", redaction.nid, STUB)


def take_back(tx: Tx, room: Room, target: Stored, redaction_id: str) -> None:
    tx.run("UPDATE events SET redacted_by = $2 WHERE nid = $1 AND redacted_by IS NULL", target.nid, redaction_id)
    target.redacted_by = target.redacted_by or redaction_id
    target.client_json = None
    for one in room.recent:
        if one.id == target.id:
            one.redacted_by, one.client_json = target.redacted_by, None
    if room.kept(target.id) is not None:
        room.keep(events.redacted(target.event))


async def early(db: Database, event_id: str) -> list[str]:
    """Redactions that came before their event."""
    rows = await db.read(
        lambda query: query.all("SELECT event_id FROM early_redactions WHERE target_id = $1", event_id)
    )
    return [row[0] for row in rows]


class Grace:
    """The loop that removes redacted ciphertext when its time is over."""

    def __init__(self, db: Database, clock: Clock, grace_ms: int) -> None:
        self._db = db
        self._clock = clock
        self._grace = grace_ms

    async def run(self) -> None:
        while True:
            while await self.sweep() == MAX_SWEPT:
                pass
            await self._clock.sleep(SWEEP_EVERY_SECONDS)

    async def sweep(self) -> int:
        """How many events lost their content just now."""
        before = self._clock.now() - self._grace

        def due(query: Query) -> list[tuple[int, bytes]]:
            rows = query.all(
                f"SELECT {store.COLUMNS}, r.version, d.json FROM events e JOIN rooms r ON r.nid = e.room_nid "
                "JOIN events d ON d.event_id = e.redacted_by "
                f"WHERE e.redacted_by IS NOT NULL AND (e.marks & {GONE}) = 0 ORDER BY e.nid LIMIT $1",
                MAX_SWEPT,
            )
            found = []
            for row in rows:
                version = VERSIONS[row[store.WIDTH]]
                redaction = events.load(bytes(row[store.WIDTH + 1]), row[6], version)
                if redaction.origin_server_ts <= before:
                    found.append((row[0], events.redacted(store.stored(row, version).event).raw))
            return found

        gone = await self._db.read(due)
        if gone:
            with self._db.write() as tx:
                tx.many(f"UPDATE events SET json = $2, marks = marks | {GONE} WHERE nid = $1", gone)
            await tx
        return len(gone)
