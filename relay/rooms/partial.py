"""A room whose members are not all known yet: what is remembered of it, in memory and in `partial_joins`.

The server that let us in left the members out of its answer, so that somebody is in the room in a moment; `completion.py`
fetches the rest. Until then nobody is taken for absent because we don't know of her. Spec: `omit_members` of send_join,
MSC3902.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import orjson

from relay.db import Query, Tx


@dataclass(slots=True, frozen=True)
class Partial:
    event_id: str  # the join
    pos: int  # every state that was recorded after this is partial
    via: str
    servers: frozenset[str]


def load(query: Query, room_nid: int) -> Partial | None:
    row = query.one(
        "SELECT event_id, pos, via, servers FROM partial_joins WHERE room_nid = $1 AND full_pos IS NULL", room_nid
    )
    return Partial(row[0], row[1], row[2], frozenset(orjson.loads(row[3]))) if row is not None else None


def begun(query: Query, room_nid: int) -> int:
    """Where a room that was last joined in part began anew: between what is older and what came since there is a gap."""
    return int(query.value("SELECT pos FROM partial_joins WHERE room_nid = $1", room_nid) or 0)


def begin(tx: Tx, room_nid: int, partial: Partial) -> None:
    tx.run(
        "INSERT INTO partial_joins (room_nid, event_id, pos, via, servers) VALUES ($1, $2, $3, $4, $5) "
        "ON CONFLICT (room_nid) DO UPDATE SET event_id = excluded.event_id, pos = excluded.pos, via = excluded.via, "
        "servers = excluded.servers, full_pos = NULL",
        room_nid,
        partial.event_id,
        partial.pos,
        partial.via,
        orjson.dumps(sorted(partial.servers)).decode(),
    )


def forget(tx: Tx, room_nid: int) -> None:
    """The room's state is whole from the beginning."""
    tx.run("DELETE FROM partial_joins WHERE room_nid = $1", room_nid)


def completed(tx: Tx, room_nid: int, pos: int) -> None:
    tx.run("UPDATE partial_joins SET full_pos = $2 WHERE room_nid = $1", room_nid, pos)


def waiting(query: Query) -> list[str]:
    """The rooms whose rest is still to come."""
    rows = query.all(
        "SELECT r.room_id FROM partial_joins p JOIN rooms r ON r.nid = p.room_nid WHERE p.full_pos IS NULL ORDER BY p.pos"
    )
    return [row[0] for row in rows]


def completions(query: Query) -> Iterable[tuple[str, int]]:
    """(room, when its members became known)."""
    return [
        (row[0], row[1])
        for row in query.all(
            "SELECT r.room_id, p.full_pos FROM partial_joins p JOIN rooms r ON r.nid = p.room_nid WHERE p.full_pos IS NOT NULL"
        )
    ]
