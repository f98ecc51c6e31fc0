"""Taking back: a redaction names an event, and its ciphertext leaves every answer at once, the database after a while.

A redaction passes the authorization rules for everyone; whether it applies is decided when both events are known.
Spec: rooms/v3/#handling-redactions, client-server-api/#redactions. Until `privacy.redacted_grace` is over, the ciphertext
stays, so that a report can still prove what was taken back; what goes then is `content` and nothing else of our own copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

from relay.clock import HOUR, Clock
from relay.db import Database, Query, Tx
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.power import Levels
from relay.protocol.versions import VERSIONS
from relay.rooms import store
from relay.rooms.room import CREATE, POWER_LEVELS, Room
from relay.rooms.store import GONE, RIM_KEPT, STUB, Stored

SWEEP_EVERY_SECONDS = 300.0
MAX_SWEPT = 500
# Servers whose clocks go wrong by more than this are not believed.
MAX_CLOCK_AHEAD = HOUR


def applies(redaction: Event, target: Event, levels: Levels) -> bool:
    if target.room_id != redaction.room_id or target.type == "m.room.create":
        return False
    return levels.may_redact(redaction.sender, target.sender)


async def target_of(db: Database, room: Room, target_id: str | None) -> Stored | None:
    if target_id is None:
        return None
    for one in room.recent:
        if one.id == target_id:
            return one
    found = await db.read(store.by_ids, [target_id], room.version)
    return found.get(target_id)


def record(tx: Tx, room: Room, redaction: Stored, target: Stored | None, levels: Levels) -> None:
    """In the write that appends the redaction. One that `is_held` was appended as a stub."""
    if target is None:
        if redaction.redacts is not None:
            tx.run(
                "INSERT INTO early_redactions (target_id, event_id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
                redaction.redacts,
                redaction.id,
            )
    elif applies(redaction.event, target.event, levels):
        take_back(tx, room, target, redaction.id)


def is_held(redaction: Event, target: Stored | None, levels: Levels) -> bool:
    """Whether nobody is shown it: it takes nothing back, or what it takes back is not known yet."""
    return target is None or not applies(redaction, target.event, levels)


def take_back(tx: Tx, room: Room, target: Stored, redaction_id: str) -> None:
    tx.run("UPDATE events SET redacted_by = $2 WHERE nid = $1 AND redacted_by IS NULL", target.nid, redaction_id)
    target.redacted_by = target.redacted_by or redaction_id
    target.client_json = None
    for one in room.recent:
        if one.id == target.id:
            one.redacted_by, one.client_json = target.redacted_by, None
    room.take_taken_back(target.event)


async def early(db: Database, room: Room, event: Event) -> Stored | None:
    """The redaction that came before its event and takes it back, if there is one. Its sender's power is that of the power
    levels which the redaction itself cites."""

    def find(query: Query) -> Stored | None:
        waiting = query.all("SELECT event_id FROM early_redactions WHERE target_id = $1 ORDER BY event_id", event.id)
        for redaction in store.by_ids(query, [row[0] for row in waiting], room.version).values():
            cited = store.by_ids(query, redaction.event.auth_events, room.version)
            by_key = {one.event.key: one.event for one in cited.values()}
            create_id = room.entries[CREATE][0]
            create = by_key.get(CREATE) or store.by_ids(query, [create_id], room.version)[create_id].event
            if applies(redaction.event, event, Levels.of(create, by_key.get(POWER_LEVELS))):
                return redaction
        return None

    return await db.read(find)


def meet(tx: Tx, room: Room, target: Stored, redaction: Stored | None) -> None:
    """In the write that gives an event its place: what waited for it waits no longer."""
    tx.run("DELETE FROM early_redactions WHERE target_id = $1", target.id)
    if redaction is not None:
        take_back(tx, room, target, redaction.id)
        # From now on it says something: that this event was taken back.
        tx.run("UPDATE events SET marks = marks - $2 WHERE nid = $1 AND (marks & $2) != 0", redaction.nid, STUB)


class Grace:
    """The loop that removes redacted ciphertext when its time is over."""

    def __init__(self, db: Database, clock: Clock, grace_ms: int) -> None:
        self._db = db
        self._clock = clock
        self._grace = grace_ms
        # Which of these events were reported and must stay; asked in a database thread.
        self.frozen: Callable[[Query, Sequence[str]], Collection[str]] | None = None

    def must_stay(self, query: Query, event_ids: Sequence[str]) -> Collection[str]:
        return self.frozen(query, event_ids) if self.frozen is not None else ()

    async def run(self) -> None:
        while True:
            await self.sweep()
            await self._clock.sleep(SWEEP_EVERY_SECONDS)

    async def sweep(self) -> int:
        """How many events lost their content just now."""
        now = self._clock.now()
        before, ahead = now - self._grace, now + MAX_CLOCK_AHEAD

        def due(query: Query, after: int) -> tuple[list[tuple[int, bytes, str]], int | None]:
            rows = query.all(
                f"SELECT {store.COLUMNS}, r.version, d.json FROM events e JOIN rooms r ON r.nid = e.room_nid "
                "JOIN events d ON d.event_id = e.redacted_by "
                f"WHERE e.redacted_by IS NOT NULL AND (e.marks & {GONE}) = 0 AND e.nid > $1 ORDER BY e.nid LIMIT $2",
                after,
                MAX_SWEPT,
            )
            found = []
            for row in rows:
                version = VERSIONS[row[store.WIDTH]]
                redaction = events.load(bytes(row[store.WIDTH + 1]), row[6], version)
                # A time that has not come can't be waited for: whoever wrote it would have her words kept for ever.
                if redaction.origin_server_ts <= before or redaction.origin_server_ts > ahead:
                    found.append((row[0], events.emptied(store.stored(row, version).event).raw, row[1]))
            return found, rows[-1][0] if len(rows) == MAX_SWEPT else None

        swept = 0
        last: int | None = 0
        while last is not None:
            gone, last = await self._db.read(due, last)
            if gone:
                with self._db.write() as tx:
                    tx.call(partial(self._strip, gone))
                swept += int(await tx)
        return swept

    def _strip(self, gone: Sequence[tuple[int, bytes, str]], query: Query) -> int:
        """What was reported stays, also if the report came between the look and this write."""
        kept = self.must_stay(query, [event_id for _, _, event_id in gone])
        rows = [(nid, raw) for nid, raw, event_id in gone if event_id not in kept]
        query.many(f"UPDATE events SET json = $2, marks = marks | {GONE | RIM_KEPT} WHERE nid = $1", rows)
        return len(rows)
