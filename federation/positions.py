"""How far each server has come, on disk: one row for each that lags, and the outbox's own place in the log.

Whoever changes something about a lane says so here; once a second all of it is written together, so that a crash repeats at
most what was in flight. Not about when something is sent (`drivers.py`).
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import structlog

from federation.backoff import Backoff, Trouble
from federation.lane import Lane
from relay.db import FOLLOWED, Database, Query
from relay.departures import Departures
from relay.errors import ApiError
from relay.tables import Schema, Table

log = structlog.get_logger("outbox")

NAME = "outbox"
_LIFE = "until it has taken everything, or was silent for a week and shares no room"

DESTINATIONS = Schema(
    "outbox",
    tables=(
        Table(
            "destinations",
            "a server that has not taken everything yet",
            {
                "server": ("which server", _LIFE),
                "position": ("everything up to here was taken", _LIFE),
                "failing_since": ("since when it can't be reached", _LIFE),
                "failed_at": ("the latest attempt", _LIFE),
                "wait": ("how long the next wait is", _LIFE),
                "retry_at": ("when the next attempt is made", _LIFE),
            },
        ),
    ),
    steps=(
        """
        CREATE TABLE destinations (server TEXT PRIMARY KEY, position BIGINT, failing_since BIGINT, failed_at BIGINT,
            wait BIGINT, retry_at BIGINT)
        """,
    ),
)

_SAVE = (
    "INSERT INTO destinations (server, position, failing_since, failed_at, wait, retry_at) VALUES ($1, $2, $3, $4, $5, $6) "
    "ON CONFLICT (server) DO UPDATE SET position = excluded.position, failing_since = excluded.failing_since, "
    "failed_at = excluded.failed_at, wait = excluded.wait, retry_at = excluded.retry_at"
)


class Positions:
    def __init__(self, db: Database, departures: Departures, backoff: Backoff) -> None:
        self._db = db
        self._departures = departures
        self._backoff = backoff
        self.lanes: dict[str, Lane] = {}
        # How far the log was handed over to the lanes.
        self.pos = 0
        # How far it is being handed over just now; the lanes have everything up to here, or are behind.
        self.handing = 0
        # There is something to write down.
        self.due = asyncio.Event()
        self._kept_pos = 0
        self._dirty: set[str] = set()
        self._taken_edus: dict[str, int] = {}
        # Servers that are down -> whether they count as gone.
        self.to_trim: dict[str, bool] = {}

    def lane(self, server: str) -> Lane:
        lane = self.lanes.get(server)
        if lane is None:
            lane = self.lanes[server] = Lane(server)
        return lane

    def changed(self, server: str) -> None:
        self._dirty.add(server)
        self.due.set()

    def took_edus(self, server: str, upto: int) -> None:
        self._taken_edus[server] = upto
        self.changed(server)

    def handed_over(self, pos: int) -> None:
        self.pos = pos
        self.due.set()

    async def begin(self) -> None:
        """From disk: the lanes of all that lag."""
        self.pos = self.handing = self._kept_pos = await self._db.followed(NAME) or 0
        rows, with_edus = await self._db.read(_read, self._departures)
        for server, position, since, failed_at, wait, retry_at in rows:
            lane = self.lane(server)
            lane.behind = position
            lane.kept = (position, since, failed_at, wait, retry_at)
            if retry_at is not None:
                self._backoff.restore(server, Trouble(since, failed_at, wait, retry_at))
        for server in with_edus:
            self.lane(server).edus_due = True

    def forget_server(self, query: Query, server: str) -> int:
        return query.run("DELETE FROM destinations WHERE server = $1", server)

    async def keep(self) -> None:
        pos, dirty, edus = self.pos, self._dirty, self._taken_edus
        trims = self.to_trim
        if not dirty and not edus and not trims and pos == self._kept_pos:
            return
        self._dirty, self._taken_edus, self.to_trim = set(), {}, {}
        kept: dict[str, tuple[int | None, ...] | None] = {}
        with self._db.write() as tx:
            for server in dirty:
                lane = self.lanes.get(server)
                if lane is None:
                    continue
                trouble = self._backoff.trouble(server) or lane.refused
                row: tuple[int | None, ...] | None = None
                if lane.has_work and (lane.position is not None or trouble is not None):
                    row = (lane.position, None, None, None, None)
                    if trouble is not None:
                        row = (lane.position, trouble.since, trouble.failed_at, trouble.wait, trouble.retry_at)
                # Most servers take everything at once, and of those that are down nothing is new.
                if row == lane.kept:
                    continue
                kept[server] = row
                if row is None:
                    tx.run("DELETE FROM destinations WHERE server = $1", server)
                else:
                    tx.run(_SAVE, server, *row)
            for server, last in edus.items():
                self._departures.taken(tx, server, last)
            for server, gone in trims.items():
                tx.call(partial(self._departures.trim, destination=server, gone=gone))
            tx.run(FOLLOWED, NAME, pos)
        try:
            await tx
        except ApiError as error:
            self._dirty |= dirty
            self._taken_edus = edus | self._taken_edus
            self.due.set()
            log.warning("the outbox could not write down how far it has come", exc=error)
            return
        self._kept_pos = pos
        for server, row in kept.items():
            if (lane := self.lanes.get(server)) is not None:
                lane.kept = row
        for server in dirty:
            lane = self.lanes.get(server)
            # A lane that took EDUs remembers so until their rows are gone; one that took everything while this was written
            # down has a row, which goes next time.
            if lane is None or lane.has_work or lane.awake or lane.kept is not None:
                continue
            if server not in self._taken_edus:
                del self.lanes[server]


def _read(query: Query, departures: Departures) -> tuple[list[Any], list[str]]:
    rows = query.all("SELECT server, position, failing_since, failed_at, wait, retry_at FROM destinations")
    return rows, departures.destinations(query, 0, 2**62)
