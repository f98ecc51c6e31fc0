"""How clients see an event: its bytes are made once and shared; what is personal is added for each.

Spec: client-server-api/#room-event-format, #aggregations-of-child-events, unsigned data of #get_matrixclientv3sync.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from relay.db import Database, Query
from relay.ids import server_of
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.versions import RoomVersion
from relay.rooms import store
from relay.rooms.erasure import erased
from relay.rooms.store import Stored

REDACTION = "m.room.redaction"
# No account of a person begins with an underscore.
SERVER_ITSELF = "_server"


def body(event: Event, room_id: str | None, redacts: str | None = None) -> bytes:
    """The event without `unsigned` and without its closing brace."""
    redacts = redacts or event.redacts
    form: dict[str, Any] = {
        "type": event.type,
        "content": event.content,
        "event_id": event.id,
        "sender": event.sender,
        "origin_server_ts": event.origin_server_ts,
    }
    if event.state_key is not None:
        form["state_key"] = event.state_key
    if redacts is not None:
        # Old clients look at the top level, new ones at the content. Spec: rooms/v11/#moving-the-redacts-property
        form["redacts"] = redacts
        form["content"] = {**event.content, "redacts": redacts}
    if room_id is not None:
        form["room_id"] = room_id
    return orjson.dumps(form)[:-1]


def content(one: Stored) -> dict[str, Any]:
    """Its content as clients may have it: what was taken back is gone. The caller does not change it."""
    return events.redacted(one.event).content if one.taken_back else one.event.content


def shared_body(one: Stored) -> bytes:
    """The same without a room ID, kept with the event."""
    if one.client_json is None:
        one.client_json = body(events.redacted(one.event) if one.taken_back else one.event, None, one.redacts)
    made: bytes = one.client_json
    return made


def federation_body(event: Event) -> bytes:
    """The event as servers send it to each other, with its ID, which most room versions leave out; without its closing brace."""
    return orjson.dumps(
        {**{key: value for key, value in event.pdu.items() if key != "unsigned"}, "event_id": event.id}
    )[:-1]


def hiding(event_id: str, sent_ts: int, user_id: str) -> dict[str, Any]:
    """What tells a client of ours that a message is hidden: the redaction of it that nobody has sent. It stands in no room and
    goes to no other server; its sender is this server itself."""
    return {
        "type": REDACTION,
        "event_id": hiding_id(event_id),
        "sender": f"@{SERVER_ITSELF}:{server_of(user_id)}",
        "origin_server_ts": sent_ts,
        "content": {"redacts": event_id},
        "redacts": event_id,
    }


def hiding_id(event_id: str) -> str:
    made = hashlib.sha256(f"relay.hides {event_id}".encode()).digest()
    return "$" + base64.urlsafe_b64encode(made).decode().rstrip("=")


def withheld_because(event: Event, user_id: str) -> dict[str, Any]:
    because = hiding(event.id, event.origin_server_ts, user_id)
    return {"redacted_by": because["event_id"], "redacted_because": because}


def finished(made: bytes, room_id: str | None, unsigned: Mapping[str, Any]) -> orjson.Fragment:
    room = b',"room_id":' + orjson.dumps(room_id) if room_id is not None else b""
    extra = b',"unsigned":' + orjson.dumps(unsigned) if unsigned else b""
    return orjson.Fragment(made + room + extra + b"}")


def stripped(event: Event) -> dict[str, Any]:
    """Spec: client-server-api/#stripped-state"""
    shown: dict[str, Any] = {
        "type": event.type,
        "state_key": event.state_key,
        "content": event.content,
        "sender": event.sender,
    }
    if event.type == "m.room.create":
        # Since v1.16: clients work out from it who made the room, and by which event.
        shown |= {"event_id": event.id, "origin_server_ts": event.origin_server_ts}
    return shown


def plain(one: Stored) -> bool:
    """Whether nothing has to be looked up to show it."""
    return not one.related and not one.taken_back and one.replaces is None


async def dressed(
    db: Database,
    version: RoomVersion,
    shown: Sequence[Stored],
    *,
    user_id: str,
    device_id: str | None,
    room_id: str | None,
    memberships: Mapping[str, str] | None = None,
    may_relate: bool = True,
    federated: bool = False,
) -> list[orjson.Fragment]:
    """Events for one viewer. `room_id` is added where the endpoint wants it; `memberships` is the viewer's at each event.

    `may_relate` False spares the look for relations where the caller knows `related` of each. `federated`: in the form that
    servers send each other, for clients whose filter asks for it.
    """
    needy = [one for one in shown if may_relate or not plain(one)]
    extras: dict[str, dict[str, Any]] = {}
    if needy:
        extras = await db.read(_extras, needy, version, user_id, may_relate)
    result = []
    for one in shown:
        unsigned = extras.get(one.id, {})
        if memberships is not None and one.id in memberships:
            unsigned["membership"] = memberships[one.id]
        if one.sent_by is not None and device_id is not None and one.sent_by[:2] == (user_id, device_id):
            unsigned["transaction_id"] = one.sent_by[2]
        if federated:
            made = federation_body(events.redacted(one.event) if one.taken_back else one.event)
            result.append(finished(made, None, unsigned))
        else:
            result.append(finished(shared_body(one), room_id, unsigned))
    return result


def _extras(
    query: Query, needy: Sequence[Stored], version: RoomVersion, user_id: str, may_relate: bool
) -> dict[str, dict[str, Any]]:
    """What `unsigned` says of each event, beside what is personal."""
    cited = {one.replaces for one in needy if one.replaces} | {one.redacted_by for one in needy if one.redacted_by}
    found = store.by_ids(query, cited, version)
    extras: dict[str, dict[str, Any]] = {}
    for one in needy:
        unsigned: dict[str, Any] = {}
        before = found.get(one.replaces or "")
        if before is not None:
            unsigned["replaces_state"] = before.id
            unsigned["prev_content"] = (events.redacted(before.event) if before.redacted_by else before.event).content
            unsigned["prev_sender"] = before.event.sender
        redaction = found.get(one.redacted_by or "")
        if redaction is not None:
            unsigned["redacted_by"] = redaction.id
            unsigned["redacted_because"] = finished(body(redaction.event, None), None, {})
        elif one.marks & store.WITHHELD:
            unsigned |= withheld_because(one.event, user_id)
        elif one.related or may_relate:
            relations = bundles(query, one, version, user_id)
            if relations:
                unsigned["m.relations"] = relations
        extras[one.id] = unsigned
    return extras


_CHILDREN = (
    f"SELECT {store.COLUMNS} FROM relations r JOIN events e ON e.nid = r.event_nid WHERE r.target_id = $1 AND r.rel_type = $2 "
    # Somebody in another room may name this event too.
    f"AND r.room_nid = $3 AND e.redacted_by IS NULL AND (e.marks & {store.UNCOUNTED}) = 0 AND e.pos <= $4 "
)
# A position behind all others.
_ALWAYS = 2**62
MAX_REFERENCES = 50
MAX_EDITS_COMPARED = 100


def bundles(
    query: Query, one: Stored, version: RoomVersion, user_id: str, *, in_thread: bool = False
) -> dict[str, Any]:
    """What later events say of this one, by relation type. Spec: client-server-api/#aggregations-of-child-events

    Threads do not nest: of an event that is shown as a thread's latest, no thread is told.
    """
    room = one.room_nid
    kinds = {
        row[0]
        for row in query.all(
            "SELECT DISTINCT rel_type FROM relations WHERE target_id = $1 AND room_nid = $2 LIMIT 20", one.id, room
        )
    }
    found: dict[str, Any] = {}
    if not kinds:
        return found
    until = _until(query, room, user_id)
    if "m.replace" in kinds and one.event.state_key is None:
        # Spec: client-server-api/#validity-of-replacement-events: same sender, same type, not itself a replacement.
        rows = query.all(
            _CHILDREN + "AND e.sender = $5 AND e.type = $6 AND e.state_key IS NULL ORDER BY e.depth DESC, e.pos DESC "
            f"LIMIT {MAX_EDITS_COMPARED}",
            one.id,
            "m.replace",
            room,
            until,
            one.event.sender,
            one.event.type,
        )
        edits = [store.stored(row, version) for row in rows]
        if edits:
            edit = max(edits, key=lambda e: (e.event.origin_server_ts, e.id))
            found["m.replace"] = finished(body(edit.event, edit.event.room_id), None, {})
    if "m.thread" in kinds and not in_thread:
        rows = query.all(_CHILDREN + "ORDER BY e.depth DESC, e.pos DESC LIMIT 1", one.id, "m.thread", room, until)
        if rows:
            latest = store.stored(rows[0], version)
            count = "SELECT count(*) FROM relations r JOIN events e ON e.nid = r.event_nid WHERE r.target_id = $1 AND r.rel_type = 'm.thread' "
            count += (
                f"AND r.room_nid = $2 AND e.redacted_by IS NULL AND (e.marks & {store.UNCOUNTED}) = 0 AND e.pos <= $3"
            )
            taking_part = one.event.sender == user_id or bool(
                query.value(count + " AND e.sender = $4", one.id, room, until, user_id)
            )
            # Whoever may read an erased person finds it in the thread itself.
            bare = bool(erased(query, (latest.event.sender,)))
            of_latest = {} if bare else bundles(query, latest, version, user_id, in_thread=True)
            shown = events.redacted(latest.event) if bare else latest.event
            found["m.thread"] = {
                "latest_event": finished(
                    body(shown, shown.room_id), None, {"m.relations": of_latest} if of_latest else {}
                ),
                "count": query.value(count, one.id, room, until),
                "current_user_participated": taking_part,
            }
    if "m.reference" in kinds:
        rows = query.all(
            _CHILDREN + f"ORDER BY e.depth, e.pos LIMIT {MAX_REFERENCES}", one.id, "m.reference", room, until
        )
        if rows:
            found["m.reference"] = {"chunk": [{"event_id": row[1]} for row in rows]}
    return found


def _until(query: Query, room_nid: int, user_id: str) -> int:
    """Up to where answers are told: whoever left hears of none that came since, also where she may read what they answer."""
    if (
        query.value("SELECT membership FROM memberships WHERE room_nid = $1 AND user_id = $2", room_nid, user_id)
        == "join"
    ):
        return _ALWAYS
    left = query.value(
        "SELECT max(pos) FROM membership_log WHERE room_nid = $1 AND user_id = $2 AND before = 'join'",
        room_nid,
        user_id,
    )
    return _ALWAYS if left is None else int(left)
