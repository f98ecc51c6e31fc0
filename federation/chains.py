"""Whole states of rooms with everything that authorises them, as ready bytes: what send_join and /state answer.

An event's JSON is taken from the database as it lies there and spliced into the answer; it is parsed once, for what it
cites. Not about which state was meant (`answers.py`, `joins.py`). Spec: server-server-api/#definitions (auth chain).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Container, Iterable
from typing import TypeVar

import orjson

from relay.db import Database, Query, Row
from relay.errors import TooLarge
from relay.protocol import event as events
from relay.protocol.versions import RoomVersion

T = TypeVar("T")

# A large room's state is tens of megabytes: this many answers are made at once.
MAX_AT_ONCE = 2
# What a peer of our own kind takes.
MAX_BYTES = 64 * 2**20
MAX_REMEMBERED = 20_000
IDS_AT_ONCE = 64
FEW = 4

_MARKS = ", ".join(f"${number}" for number in range(1, IDS_AT_ONCE + 1))
_ROWS = f"SELECT event_id, json, redacted_by FROM events WHERE event_id IN ({_MARKS})"
_ROW = "SELECT event_id, json, redacted_by FROM events WHERE event_id = $1"


class Gathered:
    """`state` and the auth chains of it (`chain`), as event IDs in a steady order, and the JSON of each event."""

    __slots__ = ("chain", "json", "state")

    def __init__(self, state: list[str], chain: list[str], json: dict[str, bytes]) -> None:
        self.state = state
        self.chain = chain
        self.json = json

    def of_state(self) -> list[orjson.Fragment]:
        return [orjson.Fragment(self.json[event_id]) for event_id in self.state]

    def of_chain(self, besides: Container[str] = ()) -> list[orjson.Fragment]:
        return [orjson.Fragment(self.json[event_id]) for event_id in self.chain if event_id not in besides]


class Chains:
    def __init__(self, db: Database) -> None:
        self._db = db
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)
        # What an event cites never changes, whatever becomes of it: nothing drops an entry but the bound.
        self._cited: dict[str, tuple[str, ...]] = {}

    async def answer(
        self,
        version: RoomVersion,
        state_ids: Iterable[str],
        make: Callable[[Gathered], T],
        *,
        also: Iterable[str] = (),
    ) -> T:
        """What `make` makes of these events and their auth chains, those of `also` included; both in one look at the
        database and in its thread. Raises TooLarge."""
        wanted, more = list(state_ids), list(also)
        async with self._slots:
            return await self._db.read(lambda query: make(self._gather(query, version, wanted, more)))

    def _gather(self, query: Query, version: RoomVersion, state_ids: list[str], also: list[str]) -> Gathered:
        found = _Found(query, version)
        found.fetch([*state_ids, *also])
        json = found.json
        chain: dict[str, None] = {}
        frontier = [*state_ids, *also]
        while frontier:
            reached: list[str] = []
            for event_id in frontier:
                raw = json.get(event_id)
                if raw is None:
                    continue
                for cited in self._cites(event_id, raw):
                    if cited not in chain:
                        chain[cited] = None
                        reached.append(cited)
            found.fetch([event_id for event_id in reached if event_id not in json])
            frontier = reached
        return Gathered(
            [event_id for event_id in state_ids if event_id in json],
            [event_id for event_id in chain if event_id in json],
            json,
        )

    def _cites(self, event_id: str, raw: bytes) -> tuple[str, ...]:
        known = self._cited.get(event_id)
        if known is None:
            if len(self._cited) >= MAX_REMEMBERED:
                self._cited.clear()
            known = self._cited[event_id] = tuple(map(sys.intern, orjson.loads(raw)["auth_events"]))
        return known


class _Found:
    """Rows as they are read. In a reader's thread."""

    def __init__(self, query: Query, version: RoomVersion) -> None:
        self._query = query
        self._version = version
        self._size = 0
        self.json: dict[str, bytes] = {}

    def fetch(self, wanted: list[str]) -> None:
        if len(wanted) <= FEW:
            for event_id in wanted:
                self._keep(self._query.all(_ROW, event_id))
            return
        for start in range(0, len(wanted), IDS_AT_ONCE):
            some = wanted[start : start + IDS_AT_ONCE]
            # One text for any number of IDs, so that the statement is prepared once.
            some += [some[-1]] * (IDS_AT_ONCE - len(some))
            self._keep(self._query.all(_ROWS, *some))

    def _keep(self, rows: Iterable[Row]) -> None:
        for event_id, raw, redacted_by in rows:
            kept = bytes(raw)
            if redacted_by is not None:
                kept = events.redacted(events.load(kept, event_id, self._version)).raw
            self.json[event_id] = kept
            self._size += len(kept)
        if self._size > MAX_BYTES:
            raise TooLarge(f"The state of this room has more than {MAX_BYTES} bytes. Ask another server.")
