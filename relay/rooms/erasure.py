"""Erased people: whoever closed her account and asked for it is read no more by those who come later.

Who was in the room until then reads what she said as before; people and servers that come afterwards get the redacted form. No
redaction is sent. Only of what she said: state says how the room stands. The copies of other servers are theirs.
Spec: client-server-api/#post_matrixclientv3accountdeactivate (`erase`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from relay.db import Query, Tx
from relay.rooms.store import WITHHELD, Stored

# A position behind all others.
_ALWAYS = 2**62


def erase(tx: Tx, user_id: str, asked: bool) -> None:
    """For `Account.on_deactivated`."""
    if asked:
        tx.run("INSERT INTO erased_people (user_id, pos) VALUES ($1, $2) ON CONFLICT DO NOTHING", user_id, tx.pos())


def erased(query: Query, people: Iterable[str]) -> dict[str, int]:
    """Those of these people who are erased, and since when. In a reader's thread."""
    if query.one("SELECT 1 FROM erased_people LIMIT 1") is None:
        return {}
    found = {}
    for user_id in set(people):
        pos = query.value("SELECT pos FROM erased_people WHERE user_id = $1", user_id)
        if pos is not None:
            found[user_id] = int(pos)
    return found


def as_served(query: Query, user_id: str, events: Sequence[Stored], seen: Mapping[str, str]) -> list[Stored]:
    """The same events as this person gets them, who sees those that are `seen`, with her membership at each. In a reader's
    thread."""
    # What was said while she was there is hers.
    doubtful = [one for one in events if seen.get(one.id, "join") != "join" and not one.event.is_state]
    since = erased(query, (one.event.sender for one in doubtful)) if doubtful else {}
    if not since:
        return list(events)
    bare = {
        one.id
        for one in doubtful
        if one.event.sender in since and not _read_before(query, one, user_id, since[one.event.sender])
    }
    return [_bare(one) if one.id in bare else one for one in events]


def _read_before(query: Query, one: Stored, user_id: str, erased_pos: int) -> bool:
    """Whether this person was in the room at some time between an event and the erasure of its sender."""
    last = query.one(
        "SELECT after FROM membership_log WHERE room_nid = $1 AND user_id = $2 AND pos <= $3 ORDER BY pos DESC LIMIT 1",
        one.room_nid,
        user_id,
        erased_pos,
    )
    if last is not None and last[0] == "join":
        return True
    left = query.value(
        "SELECT max(pos) FROM membership_log WHERE room_nid = $1 AND user_id = $2 AND pos <= $3 AND before = 'join'",
        one.room_nid,
        user_id,
        erased_pos,
    )
    return left is not None and (one.pos or _ALWAYS) <= left


def _bare(one: Stored) -> Stored:
    return Stored(
        one.event,
        one.nid,
        one.pos,
        one.room_nid,
        one.state_nid,
        one.marks | WITHHELD,
        one.redacted_by,
        one.replaces,
        one.redacts,
        one.sent_by,
    )
