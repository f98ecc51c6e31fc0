"""The table of cases, and a case as a value."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from relay.db import Query
from relay.moderation import case_rules as rules
from relay.tables import Schema, Table

_KEPT = "until the retention of the case is over, then emptied"
_COUNTED = "for good: the transparency figures count it"

SCHEMA = Schema(
    "cases",
    tables=(
        Table(
            "cases",
            "a report and what became of it",
            {
                "case_id": ("its name, random", _COUNTED),
                "number": ("its running number, for people", _COUNTED),
                "kind": (
                    "event, room, user, notice, forwarded by another server, decided elsewhere, or direct: a measure without a report",
                    _COUNTED,
                ),
                "category": ("what kind of abuse, as a word of a list", _COUNTED),
                "state": ("how far it has come", _COUNTED),
                "disclosure": ("what the checks of its proof found, as a word", _COUNTED),
                "room_id": ("the reported room, or that of the event", _KEPT),
                "event_id": ("the reported event", _KEPT),
                "user_id": ("whom it is about", _KEPT),
                "reporter": ("who reported, to answer her; never told to anybody outside", _KEPT),
                "peer": ("the server that forwarded it", _KEPT),
                "seen": ("events that the reporter was allowed to see when she reported", _KEPT),
                "consent": ("whether the reporter agreed to its being forwarded", _KEPT),
                "words": ("0 none were given, 1 sealed, 2 given but not kept: there was no key", _COUNTED),
                "created_ts": ("when it came", _COUNTED),
                "due_ts": ("by when it has to be decided", _COUNTED),
                "sort_ts": ("its place in the queue", _COUNTED),
                "version": ("counts its changes, so that two moderators don't overwrite each other", _COUNTED),
                "assignee": ("the moderator who looks at it", "until she is done"),
                "lease_until": ("until when it is hers", "until she is done"),
                "touched_ts": ("when a moderator first did something", _COUNTED),
                "duplicate_of": ("the case with which it is decided", _COUNTED),
                "decided_ts": ("when it was decided first", _COUNTED),
                "closed_ts": ("when it was closed", _COUNTED),
                "keep_until": ("until when its evidence stays", _COUNTED),
                "late_told": ("whether it was told that it is late", _COUNTED),
                "emptied": ("whether its retention is over", _COUNTED),
                "is_open": ("whether somebody has to do something, for the queue", _COUNTED),
            },
        ),
    ),
    steps=(
        """
        CREATE TABLE cases (case_id TEXT PRIMARY KEY, number BIGINT NOT NULL UNIQUE, kind TEXT NOT NULL, category TEXT NOT NULL,
            state TEXT NOT NULL, disclosure TEXT NOT NULL, room_id TEXT, event_id TEXT, user_id TEXT, reporter TEXT, peer TEXT,
            seen TEXT NOT NULL, consent SMALLINT NOT NULL, words SMALLINT NOT NULL, created_ts BIGINT NOT NULL, due_ts BIGINT NOT NULL,
            sort_ts BIGINT NOT NULL, version BIGINT NOT NULL, assignee TEXT, lease_until BIGINT, touched_ts BIGINT,
            duplicate_of TEXT, decided_ts BIGINT, closed_ts BIGINT, keep_until BIGINT NOT NULL, late_told SMALLINT NOT NULL,
            emptied SMALLINT NOT NULL, is_open SMALLINT NOT NULL);
        CREATE INDEX cases_queue ON cases (sort_ts, number) WHERE is_open = 1 AND duplicate_of IS NULL;
        CREATE INDEX cases_of_reporter ON cases (reporter, created_ts) WHERE reporter IS NOT NULL;
        CREATE INDEX cases_of_event ON cases (event_id) WHERE event_id IS NOT NULL;
        CREATE INDEX cases_of_user ON cases (user_id) WHERE user_id IS NOT NULL;
        CREATE INDEX cases_joined ON cases (duplicate_of) WHERE duplicate_of IS NOT NULL;
        CREATE INDEX cases_created ON cases (created_ts);
        CREATE INDEX cases_kept ON cases (keep_until) WHERE emptied = 0
        """,
    ),
)

COLUMNS = (
    "case_id, number, kind, category, state, disclosure, room_id, event_id, user_id, reporter, peer, seen, consent, words, "
    "created_ts, due_ts, sort_ts, version, assignee, lease_until, touched_ts, duplicate_of, decided_ts, closed_ts, keep_until, "
    "late_told, emptied, is_open"
)
NO_WORDS, WORDS_SEALED, WORDS_NOT_KEPT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Case:
    case_id: str
    kind: str
    category: str
    created_ts: int
    due_ts: int
    keep_until: int
    number: int = 0
    state: str = rules.NEW
    disclosure: str = "undisclosed"
    room_id: str | None = None
    event_id: str | None = None
    user_id: str | None = None
    reporter: str | None = None
    peer: str | None = None
    seen: tuple[str, ...] = ()
    consent: bool = False
    words: int = NO_WORDS
    sort_ts: int = 0
    version: int = 1
    assignee: str | None = None
    lease_until: int | None = None
    touched_ts: int | None = None
    duplicate_of: str | None = None
    decided_ts: int | None = None
    closed_ts: int | None = None
    late_told: bool = False
    emptied: bool = False

    @property
    def is_open(self) -> bool:
        return self.state in rules.OPEN_STATES

    @property
    def is_about_reporter(self) -> bool:
        """Then nothing is held for it: nobody keeps her own messages from being deleted by reporting herself."""
        return self.reporter is not None and self.reporter == self.user_id

    @property
    def etag(self) -> str:
        return f'"{self.version}"'

    def row(self) -> Sequence[Any]:
        return (
            self.case_id, self.number, self.kind, self.category, self.state, self.disclosure, self.room_id, self.event_id,
            self.user_id, self.reporter, self.peer, orjson.dumps(self.seen).decode(), int(self.consent), self.words,
            self.created_ts, self.due_ts, self.sort_ts, self.version, self.assignee, self.lease_until, self.touched_ts,
            self.duplicate_of, self.decided_ts, self.closed_ts, self.keep_until, int(self.late_told), int(self.emptied),
            int(self.is_open),
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """For moderators: without who reported, whom nobody needs to know to decide."""
        return {
            "id": self.case_id,
            "number": self.number,
            "kind": self.kind,
            "category": self.category,
            "state": self.state,
            "disclosure": self.disclosure,
            "event_id": self.event_id,
            "room_id": self.room_id,
            "user_id": self.user_id,
            "peer": self.peer,
            "created": self.created_ts,
            "due": self.due_ts,
            "version": self.version,
            "assignee": self.assignee,
            "lease_until": self.lease_until,
            "duplicate_of": self.duplicate_of,
            "decided": self.decided_ts,
            "closed": self.closed_ts,
            "may_be_forwarded": self.consent,
            "words": ("none", "sealed", "not kept")[self.words],
        }


def case_of(row: Sequence[Any] | None) -> Case | None:
    if row is None:
        return None
    (
        case_id, number, kind, category, state, disclosure, room_id, event_id, user_id, reporter, peer, seen, consent, words,
        created_ts, due_ts, sort_ts, version, assignee, lease_until, touched_ts, duplicate_of, decided_ts, closed_ts, keep_until,
        late_told, emptied, _,
    ) = row  # fmt: skip
    return Case(
        case_id, kind, category, created_ts, due_ts, keep_until, number, state, disclosure, room_id, event_id, user_id,
        reporter, peer, tuple(orjson.loads(seen)), bool(consent), words, sort_ts, version, assignee, lease_until, touched_ts,
        duplicate_of, decided_ts, closed_ts, bool(late_told), bool(emptied),
    )  # fmt: skip


def by_id(query: Query, case_id: str) -> Case | None:
    return case_of(query.one(f"SELECT {COLUMNS} FROM cases WHERE case_id = $1", case_id))


def new_id() -> str:
    return secrets.token_urlsafe(16)
