"""The rows of delayed events: what waits to be sent, and for a while what became of it. Not when, and not who may.

Spec: MSC4140.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from relay.db import Query, Row
from relay.tables import Schema, Table

WAITING, SENT, CANCELLED = 0, 1, 2

_LIFE = "until it is sent or cancelled, and a day more"

SCHEMA = Schema(
    "delayed_events",
    tables=(
        Table(
            "delayed_events",
            "ciphertext or routing state that a client wants sent later",
            {
                "delay_id": ("its name, which is also the key to it", _LIFE),
                "user_id": ("who sends it", _LIFE),
                "device_id": ("from which device", _LIFE),
                "txn": ("the client's transaction ID and endpoint, so that a retry schedules nothing twice", _LIFE),
                "room_id": ("to which room", _LIFE),
                "type": ("the event's type", _LIFE),
                "state_key": ("its state key, NULL for messages", _LIFE),
                "redacts": ("what it takes back, NULL for all but redactions", _LIFE),
                "content": ("what the seal let pass", _LIFE),
                "replaces": ("the state event that it would replace, to notice that somebody else did", _LIFE),
                "delay_ms": ("how long it waits", _LIFE),
                "since_ts": ("since when: its scheduling or latest restart", _LIFE),
                "outcome": ("0 waiting, 1 sent, 2 cancelled", _LIFE),
                "ended_ts": ("when it was sent or cancelled", _LIFE),
                "event_id": ("the event it became", _LIFE),
                "error": ("why it could not be sent", _LIFE),
            },
        ),
    ),
    steps=(
        """
        CREATE TABLE delayed_events (
            delay_id TEXT PRIMARY KEY, user_id TEXT NOT NULL, device_id TEXT NOT NULL, txn TEXT, room_id TEXT NOT NULL,
            type TEXT NOT NULL, state_key TEXT, redacts TEXT, content BYTES NOT NULL, replaces TEXT, delay_ms BIGINT NOT NULL,
            since_ts BIGINT NOT NULL, outcome SMALLINT NOT NULL DEFAULT 0, ended_ts BIGINT, event_id TEXT, error BYTES);
        CREATE UNIQUE INDEX delayed_events_once ON delayed_events (user_id, device_id, txn) WHERE txn IS NOT NULL;
        CREATE INDEX delayed_events_due ON delayed_events ((since_ts + delay_ms)) WHERE outcome = 0;
        CREATE INDEX delayed_events_of_user ON delayed_events (user_id, outcome)
        """,
    ),
)


@dataclass(slots=True, frozen=True)
class Delayed:
    delay_id: str
    user_id: str
    device_id: str
    room_id: str
    type: str
    state_key: str | None
    redacts: str | None
    content: dict[str, Any]
    replaces: str | None
    delay_ms: int
    since_ts: int
    outcome: int = WAITING
    ended_ts: int | None = None
    event_id: str | None = None
    error: dict[str, Any] | None = None

    @property
    def due_ts(self) -> int:
        return self.since_ts + self.delay_ms

    def shown(self) -> dict[str, Any]:
        """For its owner; under the names of the present text, and those that clients in use read."""
        content = self.content if self.redacts is None else {**self.content, "redacts": self.redacts}
        shown: dict[str, Any] = {
            "delay_id": self.delay_id,
            "room_id": self.room_id,
            "type": self.type,
            "delay_ms": self.delay_ms,
            "delay": self.delay_ms,
            "scheduled_at": self.since_ts,
            "running_since": self.since_ts,
            "content": content,
        }
        if self.state_key is not None:
            shown["state_key"] = self.state_key
        ended = {"finalised_ts": self.ended_ts, "event_id": self.event_id, "error": self.error}
        return {**shown, **{name: value for name, value in ended.items() if value is not None}}


_COLUMNS = (
    "delay_id, user_id, device_id, room_id, type, state_key, redacts, content, replaces, delay_ms, since_ts, outcome,"
    " ended_ts, event_id, error"
)
_AS_JSON = (7, 14)


def _delayed(row: Row) -> Delayed:
    values = list(row)
    for number in _AS_JSON:
        values[number] = orjson.loads(values[number]) if values[number] is not None else None
    return Delayed(*values)


def find(query: Query, delay_id: str) -> Delayed | None:
    row = query.one(f"SELECT {_COLUMNS} FROM delayed_events WHERE delay_id = $1", delay_id)
    return _delayed(row) if row is not None else None


def waiting_of(query: Query, user_id: str) -> list[Delayed]:
    """In the order in which they will be sent."""
    rows = query.all(
        f"SELECT {_COLUMNS} FROM delayed_events WHERE user_id = $1 AND outcome = 0 ORDER BY since_ts + delay_ms, delay_id",
        user_id,
    )
    return [_delayed(row) for row in rows]


def due(query: Query, now: int, most: int) -> tuple[list[Delayed], int | None]:
    """What is due by now, in order, and when the next one is."""
    rows = query.all(
        f"SELECT {_COLUMNS} FROM delayed_events WHERE outcome = 0 AND since_ts + delay_ms <= $1"
        " ORDER BY since_ts + delay_ms, delay_id LIMIT $2",
        now,
        most,
    )
    following = query.value(
        "SELECT since_ts + delay_ms FROM delayed_events WHERE outcome = 0 AND since_ts + delay_ms > $1"
        " ORDER BY since_ts + delay_ms LIMIT 1",
        now,
    )
    return [_delayed(row) for row in rows], following


def everything(query: Query) -> list[Delayed]:
    return [_delayed(row) for row in query.all(f"SELECT {_COLUMNS} FROM delayed_events")]


def insert(query: Query, one: Delayed, txn: str | None, most: int) -> str | int:
    """The name of the row: an earlier one's where this is a retry. With `most` waiting already, when the next one goes."""
    if txn is not None:
        known = query.value(
            "SELECT delay_id FROM delayed_events WHERE user_id = $1 AND device_id = $2 AND txn = $3",
            one.user_id,
            one.device_id,
            txn,
        )
        if known is not None:
            return str(known)
    number, first = query.all(
        "SELECT count(*), min(since_ts + delay_ms) FROM delayed_events WHERE user_id = $1 AND outcome = 0", one.user_id
    )[0]
    if number >= most:
        return int(first)
    query.run(
        "INSERT INTO delayed_events (delay_id, user_id, device_id, txn, room_id, type, state_key, redacts, content, replaces,"
        " delay_ms, since_ts) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
        one.delay_id,
        one.user_id,
        one.device_id,
        txn,
        one.room_id,
        one.type,
        one.state_key,
        one.redacts,
        orjson.dumps(one.content),
        one.replaces,
        one.delay_ms,
        one.since_ts,
    )
    return one.delay_id
