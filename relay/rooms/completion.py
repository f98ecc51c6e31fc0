"""The rest of a room that was joined before its members were known: fetched, checked, and put under everything since.

The room's whole state before the join comes from the server that let us in, or from another one in the room. Then every event
since is judged once more, by states that are whole, and the states recorded after them are written anew: what the partial
state let pass and the whole one does not is taken out of sight, what it refused wrongly comes in. It goes on after a restart.
Spec: MSC3902.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import structlog

from relay.clock import Clock
from relay.db import ChainBroken, Database, Query, Tx
from relay.errors import ApiError, Forbidden, RemoteError
from relay.ids import server_of
from relay.part import Part
from relay.remote import Remote
from relay.rooms import partial as partial_joins
from relay.rooms import store
from relay.rooms.append import LOG_MEMBERSHIP, PUT_MEMBERSHIP, Appender
from relay.rooms.intake import Intake, Taken
from relay.rooms.partial import Partial
from relay.rooms.replay import Replay, Replayed
from relay.rooms.room import CREATE, Room
from relay.rooms.rooms import Membership, Rooms
from relay.rooms.state import StateMap
from relay.rooms.whole_state import WholeState

log = structlog.get_logger("completion")

AT_ONCE = 2
MAX_SERVERS_ASKED = 8
WAIT_LEAST_SECONDS = 2.0
WAIT_MOST_SECONDS = 600.0
ROWS_AT_ONCE = 500
MAX_TRIES = 3

# (the room, servers that nobody told us of, since when they were not sent what they should have got)
OnCompleted = Callable[[Room, set[str], int], Awaitable[None]]


@dataclass(slots=True)
class _Members:
    """What is to be corrected in what is known of a room's members."""

    rows: list[tuple[int, str, str, str]] = field(default_factory=list)  # (room, user, membership, event)
    moved: list[tuple[str, str, str]] = field(default_factory=list)  # (user, what we took her for, what she is)
    servers: set[str] = field(default_factory=set)  # of those who are joined


class PartialJoins(Part):
    def __init__(
        self, db: Database, clock: Clock, rooms: Rooms, appender: Appender, intake: Intake, remote: Remote
    ) -> None:
        self._db = db
        self._clock = clock
        self._rooms = rooms
        self._remote = remote
        self._whole = WholeState(db, appender, intake)
        self._replay = Replay(db, rooms)
        self._server_name = rooms.server_name
        self._waiting: dict[str, None] = {}
        self._more = asyncio.Event()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self.on_completed: list[OnCompleted] = []
        # The same for servers that were in the room, as it turns out, and are not any more.
        self.on_gone: list[OnCompleted] = []
        # Gives events their places that rise, in the caller's write; set by the server (`later.py`).
        self.keep_for_later: Callable[[Tx, str, Sequence[Taken]], None] | None = None

    def begin(self, room_id: str) -> None:
        """Somebody of ours joined this room a moment ago."""
        self._waiting[room_id] = None
        self._more.set()

    async def run(self) -> None:
        for room_id in await self._db.read(partial_joins.waiting):
            self._waiting[room_id] = None
        async with asyncio.TaskGroup() as group:
            under_way: dict[str, asyncio.Task[None]] = {}
            while True:
                while self._waiting:
                    room_id = next(iter(self._waiting))
                    del self._waiting[room_id]
                    if room_id not in under_way or under_way[room_id].done():
                        under_way[room_id] = group.create_task(self._complete(room_id))
                self._more.clear()
                await self._more.wait()
                under_way = {each: task for each, task in under_way.items() if not task.done()}

    async def _complete(self, room_id: str) -> None:
        wait = WAIT_LEAST_SECONDS
        while True:
            try:
                async with self._slots:
                    if await self._attempt(room_id):
                        return
            except (ApiError, RemoteError) as error:
                log.warning("a room's members can't be fetched now", room_id=room_id, seconds=int(wait), exc=error)
            except Exception as error:
                log.error("a room could not be completed", room_id=room_id, exc_info=error)
            await self._clock.sleep(wait)
            wait = min(wait * 2, WAIT_MOST_SECONDS)

    async def _attempt(self, room_id: str) -> bool:
        """Whether nothing is left to do. Raises RemoteError of the last server that was asked."""
        room = await self._rooms.get(room_id)
        if room is None or room.partial is None:
            return True
        partial = room.partial
        last = RemoteError(partial.via, 0, "no server of this room is known")
        for server in [s for s in room.largest_servers(MAX_SERVERS_ASKED + 1) if s != self._server_name]:
            try:
                before, members = await self._fetched(server, room, partial)
            except RemoteError as error:
                last = error
                continue
            except Forbidden as shut_out:
                last = RemoteError(server, 0, shut_out.text)
                continue
            await self._note_members(room, partial, before, members)
            for _ in range(MAX_TRIES):
                try:
                    return await self._settle(room_id, partial, before, members)
                except ChainBroken:
                    continue
        if not room.local_joined and last.status in (403, 404):
            # Nobody of ours is there any more, and nobody tells us: what we know is what there is to know.
            await self._give_up(room, partial)
            return True
        raise last

    async def _fetched(self, server: str, room: Room, partial: Partial) -> tuple[StateMap, dict[str, str]]:
        """(the members in the state before the join, the membership of each)."""
        create = await room.event(*CREATE)
        if create is None:
            raise RemoteError(server, 0, "the room's create event is not here")
        log.info("a room's members are being fetched", room_id=room.room_id, server=server)
        state, chain = await self._remote.state(server, room.room_id, partial.event_id)
        glance = await self._whole.glance(server, state, chain)
        taken = await self._whole.take(server, room, state, chain, glance, create)
        # Beside its members, the room is as the server said that let us in.
        members = {key: entry for key, entry in taken.current.items() if key[0] == "m.room.member"}
        return members, taken.members

    async def _note_members(self, room: Room, partial: Partial, before: StateMap, members: dict[str, str]) -> None:
        """Many rows, in writes of their own: whoever came or went since has hers already."""
        rows = [
            (room.nid, user_id, members[user_id], event_id, partial.pos, partial.pos, int(self._is_local(user_id)))
            for (_, user_id), (event_id, _) in before.items()
        ]
        for start in range(0, len(rows), ROWS_AT_ONCE):
            with self._db.write() as tx:
                tx.many(_NOTE_MEMBER, rows[start : start + ROWS_AT_ONCE])
            await tx

    def _is_local(self, user_id: str) -> bool:
        return server_of(user_id) == self._server_name

    async def _settle(self, room_id: str, partial: Partial, before: StateMap, members: dict[str, str]) -> bool:
        """Raises ChainBroken where the room was dropped meanwhile."""
        room = await self._rooms.get(room_id)
        if room is None:
            return True
        async with room.lock:
            if room.dropped:
                raise ChainBroken(room_id)
            if room.partial != partial:
                # She left and came back: that join has a beginning of its own.
                return room.partial is None
            await self._db.settled()
            if room.dropped:
                raise ChainBroken(room_id)
            replayed = await self._replay.over(room, partial, before)
            await self._record(room, partial, replayed, before, members)
        log.info("a room's members are known", room_id=room_id, count=len(before))
        return True

    async def _record(
        self, room: Room, partial: Partial, replayed: Replayed, before: StateMap, members: dict[str, str]
    ) -> None:
        final = replayed.current.entries
        found = await self._db.read(_members_of, room, final, before, members)
        unheard = found.servers - room.servers - {self._server_name}
        were_there = {server_of(user_id) for user_id, membership in members.items() if membership == "join"}
        gone = were_there - found.servers - room.servers - {self._server_name}
        with self._db.write(chain=room.room_id) as tx:
            tx.failed(lambda: self._rooms.drop(room))
            pos = tx.pos()
            replayed.write(tx, room, partial.pos)
            if self.keep_for_later is not None:
                self.keep_for_later(tx, room.room_id, replayed.risen)
            tx.many(PUT_MEMBERSHIP, [(*row, pos, pos, int(self._is_local(row[1]))) for row in found.rows])
            tx.many(LOG_MEMBERSHIP, [(pos, room.nid, *one) for one in found.moved])
            partial_joins.completed(tx, room.nid, pos)
            tx.ring(tuple(room.local_joined), room.room_id)

            def take() -> None:
                for _, user_id, membership, event_id in found.rows:
                    if self._is_local(user_id):
                        one = Membership(membership, event_id, pos, pos, False, room.nid)
                        self._rooms.take_membership(room.room_id, user_id, one)
                for user_id, was, now in found.moved:
                    for told in self._rooms.on_membership:
                        told(room, user_id, was, now, pos)
                # It is loaded again from what is on disk now.
                self._rooms.drop(room)
                self._rooms.take_completion(room.room_id, pos)

            tx.after(take)
        await tx
        whole = await self._rooms.get(room.room_id)
        if whole is not None:
            for servers, hooks in ((unheard, self.on_completed), (gone, self.on_gone)):
                for told in hooks if servers else ():
                    await told(whole, servers, partial.pos)

    async def _give_up(self, room: Room, partial: Partial) -> None:
        async with room.lock:
            if room.dropped or room.partial != partial:
                return
            with self._db.write(chain=room.room_id) as tx:
                partial_joins.forget(tx, room.nid)
                tx.after(lambda: self._rooms.drop(room))
            await tx
        self._rooms.tell_completion()


_NOTE_MEMBER = (
    "INSERT INTO memberships (room_nid, user_id, membership, event_id, pos, since_pos, local) "
    "VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (room_nid, user_id) DO NOTHING"
)


def _members_of(query: Query, room: Room, entries: StateMap, before: StateMap, members: dict[str, str]) -> _Members:
    noted = {
        row[0]: (row[1], row[2])
        for row in query.all("SELECT user_id, membership, event_id FROM memberships WHERE room_nid = $1", room.nid)
    }
    found = _Members()

    def correct(user_id: str, membership: str, event_id: str) -> None:
        found.rows.append((room.nid, user_id, membership, event_id))
        if user_id in noted and noted[user_id][0] != membership:
            found.moved.append((user_id, noted[user_id][0], membership))

    for key, entry in entries.items():
        if key[0] != "m.room.member":
            continue
        user_id, event_id = key[1], entry[0]
        membership = members.get(user_id) if before.get(key) == entry else None
        if membership is None:
            one = store.by_ids(query, [event_id], room.version).get(event_id)
            membership = (one.event.membership if one is not None else None) or "leave"
        if noted.get(user_id) != (membership, event_id):
            correct(user_id, membership, event_id)
        if membership == "join":
            found.servers.add(server_of(user_id))
    for user_id, (membership, _) in noted.items():
        if membership == "join" and ("m.room.member", user_id) not in entries:
            correct(user_id, "leave", "")  # her join does not hold, and she was never there before
    return found
