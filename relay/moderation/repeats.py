"""Check V11: was this ciphertext sent before, by somebody else, or opened before with another key?

Any member can send somebody's ciphertext again, so a copy never makes a proof false: the earliest event that was accepted
here counts as the message, later ones are named as copies. Two different messages under one index of one session, both signed
by the session, or two keys that open one ciphertext, are the sender's doing, and for a person to judge.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from relay.db import Database, Query
from relay.moderation import megolm
from relay.moderation.evidence import ENCRYPTED
from relay.moderation.megolm import Message, Unproven
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.rooms import store
from relay.rooms.store import COLUMNS, GONE, REJECTED, SOFT_FAILED, Stored, stored

BATCH = 500
# How far back one looks, in encrypted events of the room. A session lives for a week or a hundred messages as a rule.
MAX_SEARCHED = 20_000


@dataclass(frozen=True, slots=True)
class Repeat:
    kind: Literal["copy", "same_index"]
    event_id: str
    sender: str


@dataclass(frozen=True, slots=True)
class Searched:
    """The earliest other event with this session and index, and whether all earlier events were looked at."""

    repeat: Repeat | None
    complete: bool


async def earlier(db: Database, this: Stored, event: Event, message: Message) -> Searched:
    """Among the events of the room that were accepted here before this one, newest first. In small steps: a long search must
    not keep a reader's thread from everybody else."""
    found: Repeat | None = None
    before, searched = this.pos, 0
    while before is not None and searched < MAX_SEARCHED:
        repeat, before = await db.read(_step, this.room_nid, before, event, message)
        found = repeat or found
        searched += BATCH
    return Searched(found, before is None)


def _step(query: Query, room_nid: int, before: int, event: Event, message: Message) -> tuple[Repeat | None, int | None]:
    """The earliest repeat among BATCH events before `before`, and where to go on; None at the room's beginning."""
    rows = query.all(
        f"SELECT {COLUMNS} FROM events e WHERE e.room_nid = $1 AND e.pos < $2 AND e.pos IS NOT NULL AND e.type = $3 "
        f"AND (e.marks & {REJECTED | SOFT_FAILED}) = 0 ORDER BY e.pos DESC LIMIT $4",
        room_nid,
        before,
        ENCRYPTED,
        BATCH,
    )
    session, found = message.session_id.encode(), None
    for row in rows:
        if row[5] & GONE or session in bytes(row[store.WIDTH - 1]):
            other = stored(row, event.version)
            kind = _relation(other, event, message)
            if kind is not None:
                found = Repeat(kind, other.id, other.event.sender)
    return found, rows[-1][3] if len(rows) == BATCH else None


def _relation(other: Stored, event: Event, message: Message) -> Literal["copy", "same_index"] | None:
    if other.marks & GONE:
        # Its content is gone; whether it was this one, its hash tells.
        whole = Event({**other.event.pdu, "content": event.content}, other.id, event.version)
        return "copy" if events.hash_matches(whole) else None
    content = other.event.content
    if content.get("session_id") != message.session_id:
        return None
    try:
        theirs = megolm.parse(content, message.index)
    except Unproven:
        return None
    if theirs.forms[-1] == message.forms[-1]:
        return "copy"
    return "same_index" if megolm.signed_by_session(theirs) else None


def require_one_message(repeat: Repeat | None) -> None:
    if repeat is not None and repeat.kind == "same_index":
        reason = "The sender's session signed another message under the same index before."
        raise Unproven("V11", reason, result="needs_human", flag="equivocation")


def require_one_opening(known: bytes | None, opening: bytes) -> None:
    if known is not None and known != opening:
        reason = "This ciphertext was opened before with another key: the sender made it readable in two ways."
        raise Unproven("V11", reason, result="needs_human", flag="two_openings")


def message_name(message: Message) -> bytes:
    """The same for a ciphertext however it was written."""
    return hashlib.sha256(b"relay.disclosure.message" + message.session_id.encode() + message.forms[-1]).digest()


def opening_of(prk: bytes) -> bytes:
    """Tells openings apart, and nothing else: the key has 256 random bits."""
    return hashlib.sha256(b"relay.disclosure.opening" + prk).digest()
