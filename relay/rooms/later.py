"""Events that could not be placed when they came, since what they build on could not be fetched: they wait and are tried again.

Their sender drops them once it has our answer, so the last word of a conversation (a kick, say) would be lost otherwise. They
lie here in the form that the seal lets us keep; each is tried at growing intervals, and when its sender is heard of again.
Everything is bounded, for a stranger can invent what an event builds on. Spec leaves this to the implementation.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import structlog

from relay.clock import DAY, HOUR, MINUTE, SECOND, Clock, rest
from relay.db import Database, Query, Row, Tx
from relay.errors import ApiError, Forbidden, RemoteError
from relay.part import Finding, Part
from relay.protocol import event as events
from relay.protocol.judge import Verdict
from relay.protocol.seal import Seal
from relay.protocol.versions import VERSIONS, RoomVersion
from relay.remote import Remote
from relay.rooms.intake import Taken
from relay.rooms.rooms import Rooms
from relay.rooms.store import STUB
from relay.tables import Schema, Table

log = structlog.get_logger("later")

MAX_PER_SERVER = 50
MAX_IN_ALL = 5_000
MAX_AT_ONCE = 20
# Where its sender could be asked, and did not give it; after a wire broke, once its sender may be asked again.
FIRST_WAIT = MINUTE + 5 * SECOND
LONGEST_WAIT = HOUR
KEPT_FOR = 3 * DAY
# Between two attempts because a server was heard of.
HEARD_EVERY = MINUTE
LONGEST_SLEEP_SECONDS = 600.0

_LIFE = "until it found its place or was refused, three days at most"


class Places(Protocol):
    """`receive.py`."""

    async def place(self, origin: str, room_id: str, taken: Taken, *, again: bool) -> Verdict: ...


class Later(Part):
    schema = Schema(
        "later",
        tables=(
            Table(
                "waiting_events",
                "ciphertext or routing state of other servers that waits for what it builds on",
                {
                    "event_id": ("which event", _LIFE),
                    "room_id": ("its room", _LIFE),
                    "origin": ("the server that sent it, which is asked for what is missing", _LIFE),
                    "json": ("what the seal lets us keep of it", _LIFE),
                    "marks": ("what was found about it when it came", _LIFE),
                    "redacts": ("what it takes back, where its kept form no longer says it", _LIFE),
                    "came_ts": ("when it came", _LIFE),
                    "wait_ms": ("how long the next wait is", _LIFE),
                    "retry_ts": ("when it is tried next", _LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE waiting_events (event_id TEXT PRIMARY KEY, room_id TEXT NOT NULL, origin TEXT NOT NULL,
                json BYTES NOT NULL, marks SMALLINT NOT NULL, redacts TEXT, came_ts BIGINT NOT NULL, wait_ms BIGINT NOT NULL,
                retry_ts BIGINT NOT NULL);
            CREATE INDEX waiting_events_due ON waiting_events (retry_ts)
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock, rooms: Rooms, receiver: Places, seal: Seal, remote: Remote) -> None:
        self._db = db
        self._clock = clock
        self._rooms = rooms
        self._receiver = receiver
        self._seal = seal
        self._remote = remote
        self._waiting: Counter[str] | None = None
        self._heard_at: dict[str, int] = {}
        self._heard: set[str] = set()
        self._news = asyncio.Event()

    # --- what others call

    async def keep(self, origin: str, room_id: str, taken: Taken) -> bool:
        """Whether the event waits here now, on disk, to be tried again."""
        waiting = await self._counted()
        if waiting[origin] >= MAX_PER_SERVER or waiting.total() >= MAX_IN_ALL:
            log.info("too many events wait for what they build on", origin=origin, event_id=taken.event.id)
            return False
        waiting[origin] += 1
        now = self._clock.now()
        alone = self._remote.left_alone(origin)
        wait = min(FIRST_WAIT, alone + SECOND) if alone else FIRST_WAIT
        try:
            with self._db.write() as tx:
                tx.run(_KEEP, *_row(origin, room_id, taken, now, wait, now + wait))
            await tx
        except ApiError:
            self._waiting = None
            raise
        self._news.set()
        return True

    def keep_all(self, tx: Tx, room_id: str, given: Sequence[Taken]) -> None:
        """In the caller's write: they are tried at once, in this order. How many there may be is the caller's business."""
        now = self._clock.now()
        rows = [
            _row(taken.event.server, room_id, taken, now, FIRST_WAIT, now - len(given) + number)
            for number, taken in enumerate(given)
        ]
        tx.many(_KEEP, rows)

        def told() -> None:
            self._waiting = None  # counted anew
            self._news.set()

        tx.after(told)

    def heard_from(self, server: str) -> None:
        """It can be asked again, perhaps."""
        if self._waiting and self._waiting[server] and not self._remote.left_alone(server):
            now = self._clock.now()
            if self._heard_at.get(server, 0) + HEARD_EVERY <= now:
                self._heard_at[server] = now
                self._heard.add(server)
                self._news.set()

    # --- trying again

    async def run(self) -> None:
        while True:
            self._news.clear()
            if await self._try_some() < MAX_AT_ONCE:
                await self._rest()

    async def _try_some(self) -> int:
        """Those that are due; how many they were."""
        await self._counted()
        heard, self._heard = self._heard, set()
        rows = await self._db.read(_due, self._clock.now(), sorted(heard))
        for row in rows:
            await self._try(row)
        return len(rows)

    async def _rest(self) -> None:
        """Until the next is due, or there is news."""
        began, now = self._clock.monotonic(), self._clock.now()
        due = await self._db.read(lambda query: query.value("SELECT min(retry_ts) FROM waiting_events"))
        seconds = LONGEST_SLEEP_SECONDS
        if due is not None:
            seconds = min(seconds, max(1.0, (due - now) / SECOND))
        await rest(self._clock, self._news, seconds, since=began)

    async def _try(self, row: Row) -> None:
        event_id, room_id, origin, raw, marks, redacts, came_ts, wait_ms = row
        room = await self._rooms.get(room_id)
        if room is None or not room.known or not room.local_joined or came_ts + KEPT_FOR < self._clock.now():
            log.info("an event waited in vain for what it builds on", event_id=event_id, origin=origin)
            await self._done(event_id)
            return
        taken = Taken(events.load(bytes(raw), event_id, room.version), marks, redacts)
        try:
            await self._receiver.place(origin, room_id, taken, again=True)
        except (RemoteError, Forbidden):
            # Also where the server has been shut out since: what breaks off here would be begun again with the same event.
            wait = min(LONGEST_WAIT, 2 * wait_ms)
            with self._db.write() as tx:
                tx.run(
                    "UPDATE waiting_events SET wait_ms = $2, retry_ts = $3 WHERE event_id = $1",
                    event_id, wait, self._clock.now() + wait,
                )  # fmt: skip
            await tx
            return
        log.info("an event that had to wait found its place", event_id=event_id, origin=origin)
        await self._done(event_id)

    async def _done(self, event_id: str) -> None:
        with self._db.write() as tx:
            tx.run("DELETE FROM waiting_events WHERE event_id = $1", event_id)
        await tx
        self._waiting = None

    async def _counted(self) -> Counter[str]:
        if self._waiting is None:
            rows = await self._db.read(
                lambda query: query.all("SELECT origin, count(*) FROM waiting_events GROUP BY origin")
            )
            self._waiting = Counter(dict(rows))
            self._heard_at = {server: when for server, when in self._heard_at.items() if server in self._waiting}
        return self._waiting

    # --- relay audit, relay seal

    def forget_server(self, query: Query, server: str) -> int:
        return query.run("DELETE FROM waiting_events WHERE origin = $1", server)

    def forgotten(self, server: str) -> None:
        self._waiting = None  # counted anew

    def audit(self, query: Query) -> tuple[dict[str, int], list[Finding]]:
        counts: Counter[str] = Counter()
        findings = []
        for event_id, version, raw in _all(query):
            event = events.load(bytes(raw), event_id, version)
            rule = self._seal.rule(event.type, event.state_key, event.content)
            if rule is None and self._seal.clear_in(event.room_id, event.type, event.is_state):
                rule = "readable in a room of privacy.clear_rooms"
            if rule is None:
                findings.append(Finding("waiting_events", event_id, "readable content in an event that waits"))
            else:
                counts[f"waiting_events: {rule}"] += 1
        return dict(counts), findings

    def reseal(self, query: Query) -> int:
        changed = 0
        for event_id, version, raw in _all(query):
            event = events.load(bytes(raw), event_id, version)
            if self._seal.clear_in(event.room_id, event.type, event.is_state):
                continue
            if self._seal.rule(event.type, event.state_key, event.content) is None:
                query.run(
                    "UPDATE waiting_events SET json = $2, marks = $3 WHERE event_id = $1",
                    event_id, events.redacted(event).raw, 0 if event.is_state else STUB,
                )  # fmt: skip
                changed += 1
        return changed


_KEEP = (
    "INSERT INTO waiting_events (event_id, room_id, origin, json, marks, redacts, came_ts, wait_ms, retry_ts) "
    "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (event_id) DO NOTHING"
)


def _row(origin: str, room_id: str, taken: Taken, now: int, wait: int, retry_ts: int) -> tuple[object, ...]:
    event = taken.event
    return event.id, room_id, origin, event.raw, taken.marks, taken.redacts, now, wait, retry_ts


def _due(query: Query, now: int, heard: Sequence[str]) -> list[Row]:
    columns = "event_id, room_id, origin, json, marks, redacts, came_ts, wait_ms"
    rows = query.all(
        # None waits longer than that: where it says so, the clock was set back.
        f"SELECT {columns} FROM waiting_events WHERE retry_ts <= $1 OR retry_ts > $2 ORDER BY retry_ts, came_ts LIMIT $3",
        now,
        now + LONGEST_WAIT,
        MAX_AT_ONCE,
    )
    for server in heard:
        rows += query.all(f"SELECT {columns} FROM waiting_events WHERE origin = $1 AND retry_ts > $2", server, now)
    return rows


def _all(query: Query) -> list[tuple[str, RoomVersion, bytes]]:
    """Of rooms that are known, as all are from which something waits."""
    rows = query.all("SELECT w.event_id, r.version, w.json FROM waiting_events w JOIN rooms r ON r.room_id = w.room_id")
    return [(event_id, VERSIONS[version], raw) for event_id, version, raw in rows]
