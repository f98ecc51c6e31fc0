"""Which server may ask about which room, and how much of an event it gets to see.

A server that is not admitted by the room's access list gets nothing; one with nobody in the room gets nothing of its
history either. What it may not see goes out in its redacted form, since the graph needs the event all the same; what was
taken back, and what the seal kept out of the database, goes out redacted to everybody. State is given whole.
Spec: server-server-api/#server-access-control-lists-acls, client-server-api/#room-history-visibility.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from federation.catch_up import leaves_here
from relay.db import Database, Query
from relay.errors import Forbidden, NotFound
from relay.ids import server_of
from relay.protocol import event as events
from relay.protocol.visibility import INVITED, JOINED, SHARED, visibility_of, visible_to_server
from relay.rooms import state, store
from relay.rooms.erasure import erased
from relay.rooms.room import HISTORY_VISIBILITY, Room
from relay.rooms.rooms import Rooms
from relay.rooms.store import REJECTED, SOFT_FAILED, Key, Stored

# A server's users are asked about in batches, those in the room now first; after so many it counts as absent.
USERS_AT_ONCE = 50
MAX_USERS = 2_000

NOBODY_HERE = "Nobody on this server is in this room. Ask a server that is."

_RESTRICTED = frozenset({INVITED, JOINED})
_SETTINGS = f"SELECT event_id, json FROM events WHERE room_nid = $1 AND type = $2 AND state_key = $3 AND (marks & {REJECTED}) = 0"


class Asking:
    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms

    async def admitted(self, origin: str, room_id: str) -> Room:
        """A room that people of ours are in, for a server that may take part in it. Raises NotFound, Forbidden."""
        room = await self._remembered(origin, room_id)
        if not room.local_joined:
            raise NotFound(NOBODY_HERE)
        return room

    async def _remembered(self, origin: str, room_id: str) -> Room:
        """The same, also where all of ours have left: what we know ends there, but nobody else may have our last words."""
        room = await self._rooms.get(room_id)
        if room is None or not room.known:
            raise NotFound(NOBODY_HERE)
        if not room.acl.allows(origin):
            raise Forbidden("The room's access list (m.room.server_acl) does not admit your server.")
        return room

    async def whole(self, origin: str, room_id: str) -> Room:
        """The same, where all members are known to us."""
        room = await self.admitted(origin, room_id)
        require_whole(room)
        return room

    async def resident(self, origin: str, room_id: str) -> Room:
        """The same, for a server that is in the room."""
        room = await self.admitted(origin, room_id)
        if origin not in room.servers:
            raise Forbidden("Nobody on your server is in this room. Join it first.")
        return room

    async def resident_until(self, origin: str, room_id: str, event_ids: Sequence[Any]) -> Room:
        """A room that people of ours are or were in, for a server that is in it, or was at one of these events. Whoever is put
        out has to be able to judge what came before, or could not believe it, and would think itself in the room for ever;
        and whoever hears that the last of us left, in the same way, would think her there for ever."""
        room = await self._remembered(origin, room_id)
        if origin not in room.servers and not await self.within(origin, room, event_ids):
            raise Forbidden("Nobody on your server is in this room. Join it first.")
        return room

    async def history_until(self, origin: str, room_id: str, event_ids: Sequence[Any]) -> Room:
        """The same, for what was said there: a room that our moderators have shut is read from here no more. Its state is
        told all the same, or others could not believe that our people left."""
        room = await self.resident_until(origin, room_id, event_ids)
        if not room.local_joined and self._rooms.is_closed(room_id):
            raise NotFound(NOBODY_HERE)
        return room

    async def within(self, origin: str, room: Room, event_ids: Sequence[Any]) -> list[Any]:
        """Those of these events from which a server may go back: all of them for one that is in the room, else those at which
        it was."""
        if origin in room.servers:
            return list(event_ids)
        return [e for e in event_ids if await self._was_there(origin, room, e)]

    async def _was_there(self, origin: str, room: Room, event_id: Any) -> bool:
        one = await self._rooms.event(event_id) if isinstance(event_id, str) else None
        if one is None or one.room_nid != room.nid or one.state_nid is None:
            return False
        if one.marks & (REJECTED | SOFT_FAILED):
            # Anybody who knows an old event can make a join that was allowed there.
            return False
        entries = await self._rooms.states.get(one.state_nid)
        held = [e for (type, key), (e, _) in entries.items() if type == "m.room.member" and server_of(key) == origin]
        # The state is the one after the event: who was put out by it was there until then.
        if one.replaces is not None and one.event.type == "m.room.member":
            held.append(one.replaces)
        found = await room.events(held[:MAX_USERS])
        return any(e.membership == "join" and server_of(e.state_key or "") == origin for e in found.values())


def require_whole(room: Room) -> None:
    """Raises NotFound where we have joined a room in part: whoever needs its state has to ask a server that knows it."""
    if room.partial is not None:
        raise NotFound("This server is still fetching the members of this room. Ask another server that is in it.")


def users_of(room: Room, server: str) -> list[str]:
    """A server's users in a room's state, in the order in which they are worth asking about."""
    mine = [user_id for user_id in room.members if server_of(user_id) == server]
    return sorted(mine, key=lambda user_id: room.members[user_id] != "join")[:MAX_USERS]


def raw(one: Stored) -> bytes:
    """An event as servers get it who may see it."""
    return events.redacted(one.event).raw if one.redacted_by else one.event.raw


def shown(query: Query, room: Room, users: Sequence[str], given: Sequence[Stored]) -> list[bytes]:
    """Events of a room as a server with these users gets them. In a reader's thread."""
    seen = _seen(query, room, users, given) - _no_more_read(query, room, users, given)
    return [raw(one) if one.id in seen else events.redacted(one.event).raw for one in given]


async def as_seen_by(db: Database, rooms: Rooms, server: str, event_ids: Sequence[str]) -> list[tuple[str, bytes]]:
    """Those of a room's events that are ours to send, each with what a server gets of it that has come there since."""
    found = [one for event_id in event_ids if (one := await rooms.event(event_id)) is not None and leaves_here(one)]
    room = await rooms.get(found[0].event.room_id) if found else None
    if room is None or server not in room.servers:
        return []
    given = await db.read(shown, room, users_of(room, server), found)
    return [(one.id, each) for one, each in zip(found, given, strict=True)]


def _no_more_read(query: Query, room: Room, users: Sequence[str], given: Sequence[Stored]) -> set[str]:
    """What erased people said, where none of these users was in the room then, or when they were erased."""
    said = [one for one in given if not one.event.is_state]
    since = erased(query, (one.event.sender for one in said))
    said = [one for one in said if one.event.sender in since]
    if not said:
        return set()
    then = {user_id: state.current_at(query, room.nid, pos) or 0 for user_id, pos in since.items()}
    open_nids = _states_with(query, room, users, {*then.values(), *(one.state_nid or 0 for one in said)})
    return {one.id for one in said if open_nids.isdisjoint((then[one.event.sender], one.state_nid or 0))}


def _states_with(query: Query, room: Room, users: Sequence[str], nids: set[int]) -> set[int]:
    """Those of these states by which one of the users is in the room."""
    found: set[int] = set()
    for start in range(0, len(users), USERS_AT_ONCE):
        keys: list[Key] = [("m.room.member", user_id) for user_id in users[start : start + USERS_AT_ONCE]]
        states = state.lookup(query, room.nid, nids - found, keys)
        members = store.by_ids(query, {event_id for at in states.values() for event_id in at.values()}, room.version)
        joined = {event_id for event_id, one in members.items() if one.event.membership == "join"}
        found |= {nid for nid, at in states.items() if not joined.isdisjoint(at.values())}
    return found


def _seen(query: Query, room: Room, users: Sequence[str], given: Sequence[Stored]) -> set[str]:
    settings = {
        event_id: visibility_of(orjson.loads(bytes(json)).get("content"))
        for event_id, json in query.all(_SETTINGS, room.nid, *HISTORY_VISIBILITY)
    }
    if _RESTRICTED.isdisjoint(settings.values()):
        return {one.id for one in given}
    # What has no state of its own is known as a part of some state, and that is given whole.
    seen = {one.id for one in given if one.state_nid is None and one.event.is_state}
    placed = [one for one in given if one.state_nid is not None]
    nids = {one.state_nid for one in placed if one.state_nid is not None}
    held = state.lookup(query, room.nid, nids, (HISTORY_VISIBILITY,))
    closed: list[tuple[Stored, str, str | None]] = []
    for one in placed:
        now = settings.get(held.get(one.state_nid or 0, {}).get(HISTORY_VISIBILITY, ""), SHARED)
        before, after = now, None
        if one.event.key == HISTORY_VISIBILITY:
            before, after = settings.get(one.replaces or "", SHARED), visibility_of(one.event.content)
        if visible_to_server(before, (), visibility_after=after):
            seen.add(one.id)
        else:
            closed.append((one, before, after))
    for start in range(0, len(users), USERS_AT_ONCE):
        if not closed:
            break
        closed = _still_closed(query, room, users[start : start + USERS_AT_ONCE], closed, seen)
    return seen


def _still_closed(
    query: Query,
    room: Room,
    users: Sequence[str],
    closed: Sequence[tuple[Stored, str, str | None]],
    seen: set[str],
) -> list[tuple[Stored, str, str | None]]:
    """Those that none of these users was there for; the others become `seen`."""
    keys: list[Key] = [("m.room.member", user_id) for user_id in users]
    states = state.lookup(query, room.nid, {one.state_nid or 0 for one, _, _ in closed}, keys)
    cited = {event_id for at in states.values() for event_id in at.values()}
    cited.update(one.replaces for one, _, _ in closed if one.replaces and one.event.key in keys)
    found = store.by_ids(query, cited, room.version)
    membership = {event_id: one.event.membership for event_id, one in found.items()}
    left = []
    for one, before, after in closed:
        held = [membership.get(event_id) for event_id in states.get(one.state_nid or 0, {}).values()]
        if one.event.key in keys:
            held += [one.event.membership, membership.get(one.replaces or "")]
        if visible_to_server(before, held, visibility_after=after):
            seen.add(one.id)
        else:
            left.append((one, before, after))
    return left
