"""Rooms full of people: member events built and signed as their servers would, and put into a relay's room in one go.

Joining one by one would take minutes; what the other relays get to see is the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from relay.protocol import event as events
from relay.protocol.auth import auth_keys
from relay.protocol.event import Event
from relay.protocol.signing import SigningKey
from relay.rooms.append import Appender
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms

AT_ONCE = 500


def memberships(room: Room, held: Iterable[Event], key: SigningKey, users: Sequence[str], ts: int) -> list[Event]:
    """A join event of each, all of them right after the room's latest events."""
    state = {event.key: event for event in held}
    made = []
    for number, user_id in enumerate(users):
        content = {"membership": "join", "displayname": f"guest {number}"}
        keys = auth_keys("m.room.member", user_id, user_id, content, room.version)
        made.append(
            events.build(
                room.version,
                room_id=room.room_id,
                type="m.room.member",
                sender=user_id,
                content=content,
                state_key=user_id,
                prev_events=list(room.extremities),
                auth_events=[state[k].id for k in keys if k in state],
                depth=room.depth + 1,
                origin_server_ts=ts + number,
                server_name=user_id.partition(":")[2],
                key=key,
            )
        )
    return made


async def fill(rooms: Rooms, key: SigningKey, room_id: str, users: Sequence[str], ts: int) -> None:
    """All these people, of the relay itself, are in the room: as if it had begun with them."""
    room = await rooms.get(room_id)
    assert room is not None, "the room is known"
    held = (await room.state_events([k for k in room.entries if k[0] != "m.room.member"])).values()
    appender = Appender(rooms)
    for start in range(0, len(users), AT_ONCE):
        some = users[start : start + AT_ONCE]
        made = await asyncio.to_thread(memberships, room, held, key, some, ts)
        async with room.lock:
            with rooms.db.write() as tx:
                nids = [appender.outlier(tx, room, event) for event in made]
            await tx
            current = {**room.entries, **{e.key: (e.id, nid) for e, nid in zip(made, nids, strict=True) if e.key}}
            with rooms.db.write(chain=room_id) as tx:
                changed = {e.key: e for e in made if e.key is not None}
                appender.replace_state(tx, room, current, changed)
            await tx
