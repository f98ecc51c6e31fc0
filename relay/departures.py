"""What waits to leave for other servers beside room events: ephemeral data units (EDUs).

Durable ones (to-device messages, device list changes, cross-signing keys) are rows, written in the transaction of the
change itself; `federation/outbox` follows them and deletes each once its server has taken it. Passing ones (typing,
receipts, presence) are handed over in memory: a lost one is replaced by the next. `Fresh` spares whoever keeps up the
reading of what was committed a moment ago.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Generic, TypeVar

import orjson

from relay.db import Query, Row, Tx
from relay.part import Finding, Part
from relay.tables import Schema, Table

# Called with (destinations, edu_type, content, key); a later one with the same key replaces an earlier one that still waits.
TakesPassing = Callable[[Iterable[str], str, dict[str, Any], str], None]

# What a follower that lags finds in memory; the rest it reads.
MAX_FRESH = 500
TO_DEVICE = "m.direct_to_device"
# What waits for one server that can't be reached, at most.
MAX_MESSAGES_WAITING = 1_000
MAX_BYTES_WAITING = 8 * 2**20

_LIFE = "until the other server has taken it, or is gone and shares no room; messages to devices 30 days at most"

T = TypeVar("T")


class Fresh(Generic[T]):
    """What this process committed lately and may leave, for the one who follows the log. Not for what was before it."""

    def __init__(self) -> None:
        self._entries: deque[tuple[int, T]] = deque()
        self._floor = 0

    def note(self, pos: int, what: T) -> None:
        """After its commit, so in the order of the line."""
        if len(self._entries) >= MAX_FRESH:
            self._floor = self._entries.popleft()[0]
        self._entries.append((pos, what))

    def between(self, after: int, upto: int) -> list[T] | None:
        """What came in (after, upto], in order; None where not all of it is here any more. What lies before is let go."""
        if after < self._floor:
            return None
        while self._entries and self._entries[0][0] <= after:
            self._entries.popleft()
        return [what for pos, what in self._entries if pos <= upto]


class Departures(Part):
    schema = Schema(
        "departures",
        tables=(
            Table(
                "departing_edus",
                "encrypted or key material on its way to another server",
                {
                    "pos": (
                        "its place on the number line, the order of sending",
                        _LIFE,
                    ),
                    "destination": ("which server it is for", _LIFE),
                    "type": ("which kind of EDU", _LIFE),
                    "content": ("the EDU's content: ciphertext and public keys", _LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE departing_edus (
                pos BIGINT PRIMARY KEY, destination TEXT NOT NULL, type TEXT NOT NULL, content BYTES NOT NULL);
            CREATE INDEX departing_edus_by_destination ON departing_edus (destination, pos)
            """,
        ),
    )

    def __init__(self, server_name: str, allows: Callable[[str], bool] = lambda server: True) -> None:
        """`allows`: whether the relay has to do with a server at all."""
        self._server_name = server_name
        self.allows = allows
        self._takes_passing: TakesPassing | None = None
        # The destinations of rows of `departing_edus`, noted once these are committed.
        self.fresh: Fresh[str] = Fresh()

    def deliver_passing_to(self, takes: TakesPassing) -> None:
        self._takes_passing = takes

    def durable(self, tx: Tx, destinations: Iterable[str], edu_type: str, content: dict[str, Any]) -> None:
        """Leaves once `tx` is committed, and survives restarts until delivered."""
        raw = orjson.dumps(content)
        for destination in destinations:
            if destination != self._server_name and self.allows(destination):
                pos = tx.pos()
                tx.run(
                    "INSERT INTO departing_edus (pos, destination, type, content) VALUES ($1, $2, $3, $4)",
                    pos,
                    destination,
                    edu_type,
                    raw,
                )
                tx.after(partial(self.fresh.note, pos, destination))

    def waiting(self, query: Query, destination: str, after: int, limit: int) -> list[Row]:
        """(pos, type, content) of what one server has not taken yet, in order."""
        return query.all(
            "SELECT pos, type, content FROM departing_edus WHERE destination = $1 AND pos > $2 ORDER BY pos LIMIT $3",
            destination,
            after,
            limit,
        )

    def destinations(self, query: Query, after: int, upto: int) -> list[str]:
        """The servers for which something came in (after, upto]."""
        rows = query.all("SELECT DISTINCT destination FROM departing_edus WHERE pos > $1 AND pos <= $2", after, upto)
        return [destination for (destination,) in rows]

    def taken(self, tx: Tx, destination: str, upto: int) -> None:
        tx.run("DELETE FROM departing_edus WHERE destination = $1 AND pos <= $2", destination, upto)

    def trim(self, query: Query, destination: str, *, gone: bool) -> int:
        """Bounds what waits for a server that can't be reached: how many rows went. Of device lists each person's latest
        stays, which tells the other server to ask for the whole; of messages to devices the newest, and none once it is
        `gone` for good, as it seems."""
        rows = query.all(
            "SELECT pos, type, content FROM departing_edus WHERE destination = $1 ORDER BY pos DESC", destination
        )
        told: set[tuple[str, Any]] = set()
        messages = size = 0
        over = []
        for pos, edu_type, content in rows:
            if edu_type == TO_DEVICE:
                messages, size = messages + 1, size + len(content)
                if gone or messages > MAX_MESSAGES_WAITING or size > MAX_BYTES_WAITING:
                    over.append(pos)
                continue
            key = (edu_type, orjson.loads(bytes(content)).get("user_id"))
            if key in told:
                over.append(pos)
            told.add(key)
        for pos in over:
            query.run("DELETE FROM departing_edus WHERE pos = $1", pos)
        return len(over)

    def passing(self, destinations: Iterable[str], edu_type: str, content: dict[str, Any], key: str) -> None:
        """Leaves soon or never."""
        if self._takes_passing is not None:
            self._takes_passing((to for to in destinations if to != self._server_name), edu_type, content, key)

    def forget_server(self, query: Query, server: str) -> int:
        return query.run("DELETE FROM departing_edus WHERE destination = $1", server)

    def audit(self, query: Query) -> tuple[dict[str, int], list[Finding]]:
        rows: list[Row] = query.all("SELECT type, count(*) FROM departing_edus GROUP BY type")
        return {f"departing_edus: {edu_type} on its way": number for edu_type, number in rows}, []
