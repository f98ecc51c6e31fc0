"""`relay seal`: what lies on disk in clear, from a time when the seal was looser, is brought to its redacted form.

IDs and signatures stay valid, so the room goes on; a message that was readable becomes a stub that nobody is shown.
The routing state keeps what the table of the seal lists. Runs while no relay does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from relay.db import Query
from relay.errors import ApiError
from relay.protocol import event as events
from relay.protocol.seal import Seal
from relay.protocol.versions import VERSIONS
from relay.rooms.store import COLUMNS, STUB, WIDTH, stored

AT_ONCE = 1000


def reseal(query: Query, seal: Seal, is_own: Callable[[Query, str, str, object], bool] | None = None) -> int:
    """How many rows were changed."""
    changed, last = 0, 0
    while True:
        rows = query.all(
            f"SELECT {COLUMNS}, r.version FROM events e JOIN rooms r ON r.nid = e.room_nid WHERE e.nid > $1 "
            "ORDER BY e.nid LIMIT $2",
            last,
            AT_ONCE,
        )
        for row in rows:
            last = row[0]
            one = stored(row, VERSIONS[row[WIDTH]])
            if is_own is not None and is_own(query, one.event.sender, one.event.type, one.event.content):
                continue
            if seal.clear_in(one.event.room_id, one.event.type, one.event.is_state):
                continue
            if seal.rule(one.event.type, one.event.state_key, one.event.content) is None:
                marks = one.marks if one.event.is_state else one.marks | STUB
                query.run(
                    "UPDATE events SET json = $2, marks = $3, redacts = $4 WHERE nid = $1",
                    one.nid,
                    events.redacted(one.event).raw,
                    marks,
                    one.redacts,
                )
                changed += 1
        if len(rows) < AT_ONCE:
            return changed + _reseal_stripped(query, seal)


def _reseal_stripped(query: Query, seal: Seal) -> int:
    changed = 0
    for room_nid, user_id, raw in query.all(
        "SELECT room_nid, user_id, stripped FROM memberships WHERE stripped IS NOT NULL"
    ):
        told = orjson.loads(bytes(raw))
        kept = listed(seal, told)
        if kept != told:
            query.run(
                "UPDATE memberships SET stripped = $3 WHERE room_nid = $1 AND user_id = $2",
                room_nid,
                user_id,
                orjson.dumps(kept),
            )
            changed += 1
    return changed


def listed(seal: Seal, told: list[Any]) -> list[dict[str, Any]]:
    """Of a room's stripped state what the seal lists; the rest is dropped."""
    kept = []
    for one in told:
        if (
            not isinstance(one, dict)
            or not isinstance(one.get("content"), dict)
            or not isinstance(one.get("type"), str)
        ):
            continue
        try:
            kept.append({**one, "content": seal.outgoing(one["type"], str(one.get("state_key", "")), one["content"])})
        except ApiError:
            continue
    return kept
