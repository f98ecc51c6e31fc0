"""The rooms' tables, and how a row becomes an event. What may be written is `append.py`'s business.

`nid` is a row's number inside the database. `pos` is an event's place in the order of arrival, for /sync; it is NULL for
events that are in no timeline (outliers: cited by others, known only as parts of a state or an auth chain; rejected
ones). History is paged by (depth, pos). `state_nid` is the room's state after the event.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from relay.db import Query, Row
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.versions import RoomVersion
from relay.tables import Schema, Table

# Marks of an event row.
REJECTED = 1
SOFT_FAILED = 2
STUB = 4  # a foreign event in clear, kept in its redacted form and shown to nobody here
LOCAL = 8  # made by this server, to be sent to the others
FAN_OUT = 16  # of another server, to be passed on by us: we were asked to (send_join and its kin)
HISTORY = 32  # older than what was known when it came: for /messages, never for /sync
GONE = 64  # redacted, and its ciphertext no longer kept
RIM_KEPT = 128  # of a GONE one: nothing but its content was taken away
AFTER_GAP = 256  # what it builds on was not all here when it came: a /sync timeline begins anew with it
WITHHELD = 512  # hidden from people of ours by a moderator: they get the redacted form, other servers the event (withholding.py)
IN_PART = 1024  # of a SOFT_FAILED one: refused by a state without its members, to be asked again once they are known

Key = tuple[str, str]

_ROOM = "the room's life on this server"
_EVENT = "until it is purged with its room"

SCHEMA = Schema(
    "rooms",
    tables=(
        Table(
            "rooms",
            "a room that somebody here is or was in, or is invited to",
            {
                "nid": ("number inside the database", _ROOM),
                "room_id": ("its ID", _ROOM),
                "version": ("which rules hold", _ROOM),
                "state_nid": ("current state; NULL where only an invite is known", _ROOM),
                "published": ("whether it stands in the directory", _ROOM),
            },
        ),
        Table(
            "events",
            "checked one by one",
            {
                "nid": ("number inside the database", _EVENT),
                "event_id": ("its ID", _EVENT),
                "room_nid": ("its room", _EVENT),
                "pos": ("order of arrival, for /sync", _EVENT),
                "depth": ("order in the history, for /messages", _EVENT),
                "type": ("its type, for filters and rules", _EVENT),
                "sender": ("who sent it, for filters and counts", _EVENT),
                "state_key": ("its state key, NULL for messages", _EVENT),
                "state_nid": ("state after it, NULL for outliers", _EVENT),
                "marks": ("rejected, soft-failed, stub, local, history, hidden by a moderator", _EVENT),
                "redacted_by": ("the redaction that took it back", _EVENT),
                "replaces": ("the state event that it replaced", _EVENT),
                "redacts": ("what a redaction takes back, where its kept form does not say so", _EVENT),
                "json": (
                    "the event: ciphertext and routing state",
                    "ciphertext that was redacted: privacy.redacted_grace; " + _EVENT,
                ),
            },
        ),
        Table(
            "forward_extremities",
            "a room's latest events",
            {
                "room_nid": ("its room", "until a later event cites it"),
                "event_id": ("an event that none cites yet", "until a later event cites it"),
            },
        ),
        Table(
            "gaps",
            "events that others cite and we lack",
            {
                "room_nid": ("its room", "until the event comes"),
                "event_id": ("the missing event", "until the event comes"),
                "depth": ("depth of an event that cites it", "until the event comes"),
            },
        ),
        Table(
            "states",
            "a room's state after some event",
            {
                "nid": ("number inside the database", _ROOM),
                "room_nid": ("its room", _ROOM),
                "prev_nid": ("the state it differs from, NULL for a whole one", _ROOM),
                "steps": ("how many states lie between it and a whole one", _ROOM),
                "delta": ("numbers of the state events that are new in it", _ROOM),
            },
        ),
        Table(
            "resolutions",
            "what came out where states came together",
            {
                "of": ("numbers of the states", _ROOM),
                "room_nid": ("the room", _ROOM),
                "state_nid": ("the state that resulted", _ROOM),
            },
        ),
        Table(
            "current_states",
            "which state was current when, for what /sync says changed",
            {
                "room_nid": ("the room", _ROOM),
                "pos": ("from when on", _ROOM),
                "state_nid": ("the state", _ROOM),
            },
        ),
        Table(
            "memberships",
            "who is in which room",
            {
                "room_nid": ("the room", "until the room is forgotten"),
                "user_id": ("the person", "until the room is forgotten"),
                "membership": ("join, invite, knock, leave or ban", "until the room is forgotten"),
                "event_id": ("the member event", "until the room is forgotten"),
                "pos": ("when it became so", "until the room is forgotten"),
                "since_pos": (
                    "when this membership began, whatever profile changes came after",
                    "until the room is forgotten",
                ),
                "local": ("whether the account is ours", "until the room is forgotten"),
                "forgotten": ("whether the person forgot the room", "until the room is forgotten"),
                "stripped": (
                    "what an invited or knocking person may know of the room",
                    "until the invite or knock is answered",
                ),
            },
        ),
        Table(
            "partial_joins",
            "rooms that were joined before their members were known",
            {
                "room_nid": ("the room", _ROOM),
                "event_id": ("the join", _ROOM),
                "pos": ("since when it is known in part", _ROOM),
                "via": ("the server that let us in", _ROOM),
                "servers": ("the servers that are in the room, as that one says", _ROOM),
                "full_pos": ("when the rest was known, NULL until then", _ROOM),
            },
        ),
        Table(
            "membership_log",
            "who came and went, for the device lists of /sync",
            {
                "pos": ("when", _ROOM),
                "room_nid": ("the room", _ROOM),
                "user_id": ("the person", _ROOM),
                "before": ("membership before", _ROOM),
                "after": ("membership after", _ROOM),
            },
        ),
        Table(
            "erased_people",
            "who closed an account and asked not to be read by those who come later",
            {"user_id": ("who", "for good"), "pos": ("since when", "for good")},
        ),
        Table(
            "relations",
            "which event answers which",
            {
                "event_nid": ("the event that relates", _EVENT),
                "room_nid": ("the room", _EVENT),
                "target_id": ("the event it relates to", _EVENT),
                "rel_type": ("how", _EVENT),
            },
        ),
        Table(
            "withheld",
            "messages that a moderator hid from people of ours",
            {
                "event_id": ("the message", "until it is shown again"),
                "room_nid": ("its room", "until it is shown again"),
                "pos": ("when it was hidden, for /sync", "until it is shown again"),
                "sent_ts": ("when it was sent, as its sender said", "until it is shown again"),
            },
        ),
        Table(
            "early_redactions",
            "redactions whose event has not come yet",
            {
                "target_id": ("the event to be redacted", "until it comes"),
                "event_id": ("the redaction", "until its target comes"),
            },
        ),
        Table(
            "sent_transactions",
            "transaction IDs, so that a retry can't send twice",
            {
                "user_id": ("who sent", "24 h"),
                "device_id": ("from which device", "24 h"),
                "txn_id": ("the client's transaction ID", "24 h"),
                "endpoint": ("for which endpoint and room it holds", "24 h"),
                "event_nid": ("the event it made", "24 h"),
                "sent_ts": ("when, to the hour", "24 h"),
            },
        ),
        Table(
            "aliases",
            "a room's address on this server",
            {
                "alias": ("the address", "until it is removed"),
                "room_nid": ("the room", "until it is removed"),
                "creator": ("who may remove it", "until it is removed"),
            },
        ),
    ),
    steps=(
        """
        CREATE TABLE rooms (nid BIGINT PRIMARY KEY, room_id TEXT NOT NULL UNIQUE, version TEXT NOT NULL, state_nid BIGINT,
            published SMALLINT NOT NULL DEFAULT 0);
        CREATE TABLE events (nid BIGINT PRIMARY KEY, event_id TEXT NOT NULL UNIQUE, room_nid BIGINT NOT NULL, pos BIGINT,
            depth BIGINT NOT NULL, type TEXT NOT NULL, sender TEXT NOT NULL, state_key TEXT, state_nid BIGINT,
            marks SMALLINT NOT NULL, redacted_by TEXT, replaces TEXT, redacts TEXT,
            json BYTES NOT NULL);
        CREATE INDEX events_by_pos ON events (pos) WHERE pos IS NOT NULL;
        CREATE INDEX events_of_room ON events (room_nid, pos) WHERE pos IS NOT NULL;
        CREATE INDEX events_by_depth ON events (room_nid, depth, pos) WHERE pos IS NOT NULL;
        CREATE INDEX events_by_key ON events (room_nid, type, state_key) WHERE state_key IS NOT NULL;
        CREATE INDEX events_taken_back ON events (redacted_by) WHERE redacted_by IS NOT NULL;
        CREATE TABLE forward_extremities (room_nid BIGINT NOT NULL, event_id TEXT NOT NULL, PRIMARY KEY (room_nid, event_id))
            CLUSTERED;
        CREATE TABLE gaps (room_nid BIGINT NOT NULL, event_id TEXT NOT NULL, depth BIGINT NOT NULL,
            PRIMARY KEY (room_nid, event_id)) CLUSTERED;
        CREATE TABLE states (nid BIGINT PRIMARY KEY, room_nid BIGINT NOT NULL, prev_nid BIGINT, steps SMALLINT NOT NULL,
            delta BYTES NOT NULL);
        CREATE INDEX states_of_room ON states (room_nid);
        CREATE TABLE current_states (room_nid BIGINT NOT NULL, pos BIGINT NOT NULL, state_nid BIGINT NOT NULL,
            PRIMARY KEY (room_nid, pos)) CLUSTERED;
        CREATE TABLE memberships (room_nid BIGINT NOT NULL, user_id TEXT NOT NULL, membership TEXT NOT NULL,
            event_id TEXT NOT NULL, pos BIGINT NOT NULL, since_pos BIGINT NOT NULL, local SMALLINT NOT NULL,
            forgotten SMALLINT NOT NULL DEFAULT 0, stripped BYTES, PRIMARY KEY (room_nid, user_id)) CLUSTERED;
        CREATE INDEX memberships_of_user ON memberships (user_id, room_nid);
        CREATE INDEX memberships_here ON memberships (local, room_nid) WHERE local = 1;
        CREATE TABLE membership_log (pos BIGINT NOT NULL, room_nid BIGINT NOT NULL, user_id TEXT NOT NULL, before TEXT,
            after TEXT NOT NULL, PRIMARY KEY (pos, user_id)) CLUSTERED;
        CREATE INDEX membership_log_of_room ON membership_log (room_nid, pos);
        CREATE TABLE relations (event_nid BIGINT PRIMARY KEY, room_nid BIGINT NOT NULL, target_id TEXT NOT NULL,
            rel_type TEXT NOT NULL);
        CREATE INDEX relations_of_target ON relations (target_id, room_nid, rel_type, event_nid);
        CREATE INDEX relations_of_room ON relations (room_nid, rel_type);
        CREATE TABLE early_redactions (target_id TEXT NOT NULL, event_id TEXT NOT NULL, PRIMARY KEY (target_id, event_id))
            CLUSTERED;
        CREATE TABLE sent_transactions (event_nid BIGINT PRIMARY KEY, user_id TEXT NOT NULL, device_id TEXT NOT NULL,
            txn_id TEXT NOT NULL, endpoint TEXT NOT NULL, sent_ts BIGINT NOT NULL,
            UNIQUE (user_id, device_id, txn_id, endpoint));
        CREATE TABLE aliases (alias TEXT PRIMARY KEY, room_nid BIGINT NOT NULL, creator TEXT NOT NULL);
        CREATE INDEX aliases_of_room ON aliases (room_nid)
        """,
        """
        CREATE TABLE partial_joins (room_nid BIGINT PRIMARY KEY, event_id TEXT NOT NULL, pos BIGINT NOT NULL,
            via TEXT NOT NULL, servers TEXT NOT NULL, full_pos BIGINT)
        """,
        """
        CREATE TABLE resolutions (of BYTES PRIMARY KEY, room_nid BIGINT NOT NULL, state_nid BIGINT NOT NULL) CLUSTERED
        """,
        """
        CREATE TABLE withheld (event_id TEXT PRIMARY KEY, room_nid BIGINT NOT NULL, pos BIGINT NOT NULL,
            sent_ts BIGINT NOT NULL)
        """,
        """
        CREATE TABLE erased_people (user_id TEXT PRIMARY KEY, pos BIGINT NOT NULL)
        """,
    ),
)


class Stored:
    """An event as it lies in the database. `pos` is None outside the timeline; `sent_by` is (user, device, txn) of our own."""

    __slots__ = (
        "client_json", "depth", "event", "marks", "nid", "pos", "redacted_by", "redacts", "related", "replaces", "room_nid", "sent_by", "state_nid"
    )  # fmt: skip

    def __init__(
        self,
        event: Event,
        nid: int,
        pos: int | None,
        room_nid: int,
        state_nid: int | None,
        marks: int,
        redacted_by: str | None = None,
        replaces: str | None = None,
        redacts: str | None = None,
        sent_by: tuple[str, str, str] | None = None,
    ) -> None:
        self.event = event
        self.nid = nid
        self.pos = pos
        self.depth = min(event.depth, event.version.max_depth)
        self.room_nid = room_nid
        self.state_nid = state_nid
        self.marks = marks
        self.redacted_by = redacted_by
        self.replaces = replaces
        self.redacts = redacts or event.redacts
        self.sent_by = sent_by
        self.related = False  # whether later events relate to it
        self.client_json: Any = None  # format.py keeps its bytes here

    @property
    def id(self) -> str:
        return self.event.id

    @property
    def local(self) -> bool:
        return bool(self.marks & LOCAL)

    @property
    def fan_out(self) -> bool:
        return bool(self.marks & FAN_OUT)

    @property
    def rejected(self) -> bool:
        return bool(self.marks & REJECTED)

    @property
    def shown(self) -> bool:
        """Whether clients may ever see it in a timeline."""
        return not self.marks & (REJECTED | SOFT_FAILED | STUB)

    @property
    def taken_back(self) -> bool:
        """Whether clients get its redacted form: it was redacted, or a moderator hides it."""
        return self.redacted_by is not None or bool(self.marks & WITHHELD)


COLUMNS = "e.nid, e.event_id, e.room_nid, e.pos, e.state_nid, e.marks, e.redacted_by, e.replaces, e.redacts, e.json"
WIDTH = 10
INSERT_EVENT = (
    "INSERT INTO events (nid, event_id, room_nid, pos, depth, type, sender, state_key, state_nid, marks, redacted_by, replaces, redacts, "
    "json) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)"
)
# Shown in timelines: in order of arrival, without those that nobody here may see.
HIDDEN = REJECTED | SOFT_FAILED | STUB
# Not counted, bundled or listed as answers to another; redacted ones neither (`redacted_by`).
UNCOUNTED = HIDDEN | WITHHELD


def stored(row: Row, version: RoomVersion) -> Stored:
    nid, event_id, room_nid, pos, state_nid, marks, redacted_by, replaces, redacts, raw = row[:WIDTH]
    event = events.load(bytes(raw), event_id, version)
    return Stored(event, nid, pos, room_nid, state_nid, marks, redacted_by, replaces, redacts or event.redacts)


def by_ids(query: Query, event_ids: Iterable[str], version: RoomVersion) -> dict[str, Stored]:
    found = {}
    for event_id in event_ids:
        row = query.one(f"SELECT {COLUMNS} FROM events e WHERE event_id = $1", event_id)
        if row is not None:
            found[event_id] = stored(row, version)
    return found


def after(query: Query, room_nid: int, version: RoomVersion, after_pos: int, upto_pos: int, limit: int) -> list[Stored]:
    """What arrived in a room's timeline in (after_pos, upto_pos], oldest first; history that was filled in is left out."""
    rows = query.all(
        f"SELECT {COLUMNS} FROM events e WHERE room_nid = $1 AND pos > $2 AND pos <= $3 AND (marks & {HIDDEN | HISTORY}) = 0 "
        "ORDER BY pos LIMIT $4",
        room_nid,
        after_pos,
        upto_pos,
        limit,
    )
    return [stored(row, version) for row in rows]


def latest(
    query: Query, room_nid: int, version: RoomVersion, after_pos: int, upto_pos: int, limit: int
) -> list[Stored]:
    """The same, but the newest `limit` of them, oldest first."""
    rows = query.all(
        f"SELECT {COLUMNS} FROM events e WHERE room_nid = $1 AND pos > $2 AND pos <= $3 AND (marks & {HIDDEN | HISTORY}) = 0 "
        "ORDER BY pos DESC LIMIT $4",
        room_nid,
        after_pos,
        upto_pos,
        limit,
    )
    return [stored(row, version) for row in reversed(rows)]


def auth_chain(
    query: Query, event_ids: Iterable[str], version: RoomVersion, known: dict[str, Stored]
) -> dict[str, Stored]:
    """These events and everything they cite as auth events, as far as we have it; `known` is filled on the way."""
    found: dict[str, Stored] = {}
    waiting = list(event_ids)
    while waiting:
        event_id = waiting.pop()
        if event_id in found:
            continue
        one = known.get(event_id)
        if one is None:
            row = query.one(f"SELECT {COLUMNS} FROM events e WHERE event_id = $1", event_id)
            if row is None:
                continue
            one = known[event_id] = stored(row, version)
        found[event_id] = one
        waiting.extend(one.event.auth_events)
    return found


def pack(nids: Sequence[int]) -> bytes:
    return array("q", nids).tobytes()


def unpack(delta: bytes) -> array[int]:
    numbers: array[int] = array("q")
    numbers.frombytes(delta)
    return numbers
