"""All rooms: loading and dropping them, who of ours is where, and what other parts may ask.

Memberships of local people are in memory, all of them: /sync, receipts and device lists ask without a query. They are
taken over after the commit (`append.py`), so what stands here is on disk.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from relay.db import Database, Query
from relay.departures import Fresh
from relay.errors import ApiError, Forbidden
from relay.ids import server_of
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.versions import VERSIONS
from relay.rooms import partial, store
from relay.rooms.room import Room, load_room
from relay.rooms.state import States
from relay.rooms.store import COLUMNS, HIDDEN, HISTORY, Stored, stored

MAX_ROOMS_LOADED = 1_000
# Of all rooms in memory together, some 3 KB each; they are counted after every so many rooms.
MAX_EVENTS_LOADED = 40_000
ROOMS_BEFORE_COUNTING = 32
# How long a transaction waits for a join that is under way.
ARRIVAL_SECONDS = 20.0
# How long somebody waits for the members of a large room that was joined a moment ago.
COMPLETION_SECONDS = 60.0
CLOSED = "The moderators of this server have closed this room. Ask them if you think that is a mistake."
STILL_COMING = "This room is large and its members are still being fetched from other servers. Try again in a minute."

OnMembership = Callable[[Room, str, str | None, str, int], None]
# (room, user, membership before): every change of a local one, those that came with a whole state too
OnLocalMembership = Callable[[str, str, "Membership | None"], None]


@dataclass(slots=True)
class Membership:
    """`pos` is when the present member event came, `since_pos` when the membership began (profile changes keep it)."""

    membership: str
    event_id: str
    pos: int
    since_pos: int
    forgotten: bool = False
    room_nid: int = 0


@dataclass(frozen=True, slots=True)
class Withheld:
    """A message that a moderator hid: when (`pos`), when it was sent and by whom."""

    pos: int
    sent_ts: int
    sender: str


class Rooms:
    def __init__(self, db: Database, server_name: str) -> None:
        self.db = db
        self.server_name = server_name
        self.states = States(db)
        self._loaded: OrderedDict[str, Room] = OrderedDict()
        self._loading: dict[str, asyncio.Future[Room | None]] = {}
        self._put_since = 0
        # user -> room -> membership; of local users
        self._memberships: dict[str, dict[str, Membership]] = {}
        self._joined: dict[str, frozenset[str]] = {}
        self.on_membership: list[OnMembership] = []
        self.on_local_membership: list[OnLocalMembership] = []
        # room -> message that a moderator hid from people of ours; who is told of a change.
        self.withheld: dict[str, dict[str, Withheld]] = {}
        self.on_withheld: list[Callable[[Room], None]] = []
        # Events of ours, or to be passed on by us, of rooms with other servers in them; `append.py` notes them.
        self.leaving: Fresh[Stored] = Fresh()
        self._coming: Counter[str] = Counter()
        self._arrived = asyncio.Event()
        # Rooms whose members became known after the join -> when.
        self._completed: dict[str, int] = {}
        self._completion = asyncio.Event()
        # Rooms that moderators, or a list they follow, have closed: nobody comes into them through us, and nobody who is not
        # in them is shown them. Moderation sets it.
        self.is_closed: Callable[[str], bool] = lambda room_id: False
        # Rewrites a local user's member events; the server sets it to `Members.update_profile`.
        self.updates_profile: Callable[[str, Mapping[str, Any]], Awaitable[None]] | None = None

    def require_open(self, room_id: str) -> None:
        if self.is_closed(room_id):
            raise Forbidden(CLOSED)

    # --- joins under way

    @asynccontextmanager
    async def coming(self, room_id: str) -> AsyncIterator[None]:
        """Somebody of ours is about to be in a room of other servers: what they send meanwhile waits for her."""
        self._coming[room_id] += 1
        try:
            yield
        finally:
            self._coming[room_id] -= 1
            if not self._coming[room_id]:
                del self._coming[room_id]
                arrived, self._arrived = self._arrived, asyncio.Event()
                arrived.set()

    async def arrival(self, room_id: str) -> None:
        """Until nobody of ours is on her way into this room, or ARRIVAL_SECONDS."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ARRIVAL_SECONDS):
                while room_id in self._coming:
                    await self._arrived.wait()

    # --- joins whose members come later

    def take_completion(self, room_id: str, pos: int) -> None:
        """After the commit that made a partial room whole."""
        self._completed[room_id] = pos
        self.tell_completion()

    def tell_completion(self) -> None:
        """Whoever waits for a room to be whole looks again."""
        completion, self._completion = self._completion, asyncio.Event()
        completion.set()

    def completed_since(self, room_id: str, pos: int) -> bool:
        """Whether this room's members became known after `pos`."""
        return self._completed.get(room_id, 0) > pos

    async def whole(self, room_id: str, seconds: float = COMPLETION_SECONDS) -> Room | None:
        """The room once all its members are known. Raises ApiError where that takes too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    completion = self._completion
                    room = await self.get(room_id)
                    if room is None or room.partial is None:
                        return room
                    await completion.wait()
        raise ApiError(STILL_COMING, status=503)

    # --- at the start

    async def open(self) -> None:
        rows = await self.db.read(
            lambda query: query.all(
                "SELECT m.user_id, r.room_id, m.membership, m.event_id, m.pos, m.since_pos, m.forgotten, r.nid "
                "FROM memberships m JOIN rooms r ON r.nid = m.room_nid WHERE m.local = 1"
            )
        )
        for user_id, room_id, membership, event_id, pos, since_pos, forgotten, nid in rows:
            self._memberships.setdefault(user_id, {})[room_id] = Membership(
                membership, event_id, pos, since_pos, bool(forgotten), nid
            )
        self._completed.update(await self.db.read(partial.completions))
        hidden = (
            "SELECT r.room_id, w.event_id, w.pos, w.sent_ts, e.sender FROM withheld w JOIN rooms r ON r.nid = w.room_nid "
            "JOIN events e ON e.event_id = w.event_id"
        )
        for room_id, event_id, *rest in await self.db.read(lambda query: query.all(hidden)):
            self.withheld.setdefault(room_id, {})[event_id] = Withheld(*rest)

    # --- people of ours, from memory

    def memberships(self, user_id: str) -> dict[str, Membership]:
        """All of a local user's rooms; the caller does not change it."""
        return self._memberships.get(user_id, {})

    def joined(self, user_id: str) -> frozenset[str]:
        known = self._joined.get(user_id)
        if known is None:
            known = self._joined[user_id] = frozenset(
                r for r, m in self.memberships(user_id).items() if m.membership == "join"
            )
        return known

    def membership(self, room_id: str, user_id: str) -> str | None:
        one = self.memberships(user_id).get(room_id)
        return one.membership if one is not None else None

    def take_membership(self, room_id: str, user_id: str, one: Membership) -> None:
        """After a commit; the log entry is the row of `memberships`."""
        mine = self._memberships.setdefault(user_id, {})
        before = mine.get(room_id)
        mine[room_id] = one
        self._joined.pop(user_id, None)
        for callback in self.on_local_membership:
            callback(room_id, user_id, before)

    def take_forgotten(self, room_id: str, user_id: str) -> None:
        one = self.memberships(user_id).get(room_id)
        if one is not None:
            one.forgotten = True

    def all_memberships(self) -> Iterable[tuple[str, Mapping[str, Membership]]]:
        """Those of everybody here; the caller does not change them."""
        return self._memberships.items()

    # --- rooms

    def loaded(self, room_id: str) -> Room | None:
        return self._loaded.get(room_id)

    def loaded_ids(self) -> Iterable[str]:
        return self._loaded.keys()

    async def get(self, room_id: str) -> Room | None:
        """The room, loaded once however many ask; None where nobody here ever heard of it."""
        while True:
            room = self._loaded.get(room_id)
            if room is not None:
                self._loaded.move_to_end(room_id)
                return room
            waiting = self._loading.get(room_id)
            if waiting is not None:
                await asyncio.wait([waiting])
                continue
            return await self._load(room_id)

    async def get_all(self, room_ids: Iterable[str]) -> None:
        """Brings many rooms into memory with one look at the database."""
        missing = [r for r in room_ids if r not in self._loaded and r not in self._loading][: MAX_ROOMS_LOADED // 2]
        if not missing:
            return
        loop = asyncio.get_running_loop()
        futures: dict[str, asyncio.Future[Room | None]] = {room_id: loop.create_future() for room_id in missing}
        self._loading.update(futures)
        try:
            await self.db.settled()
            for room in await self.db.read(lambda q: [load_room(q, self.db, self.server_name, r) for r in missing]):
                if room is not None:
                    self._put(room)
        finally:
            for room_id, future in futures.items():
                del self._loading[room_id]
                future.set_result(None)

    async def keep_events(self, wanted: Sequence[tuple[Room, Sequence[str]]]) -> None:
        """The same for events of their state, so that the rooms need not ask for them one after the other."""

        def look(query: Query) -> list[tuple[Room, list[Stored]]]:
            return [(room, list(store.by_ids(query, ids, room.version).values())) for room, ids in wanted]

        for room, found in await self.db.read(look):
            for one in found:
                room.keep(events.redacted(one.event) if one.redacted_by else one.event)

    async def _load(self, room_id: str) -> Room | None:
        future: asyncio.Future[Room | None] = asyncio.get_running_loop().create_future()
        self._loading[room_id] = future
        try:
            if await self.db.read(lambda query: query.value("SELECT 1 FROM rooms WHERE room_id = $1", room_id)) is None:
                return None
            # Writes that were queued before are done first, so that memory begins where the disk is.
            await self.db.settled()
            room = await self.db.read(load_room, self.db, self.server_name, room_id)
            if room is not None:
                self._put(room)
            return room
        finally:
            del self._loading[room_id]
            future.set_result(None)

    def _put(self, room: Room) -> None:
        self._loaded[room.room_id] = room
        if len(self._loaded) > MAX_ROOMS_LOADED:
            self._let_go(MAX_ROOMS_LOADED // 10)
        self._put_since += 1
        if self._put_since >= ROOMS_BEFORE_COUNTING:
            self._put_since = 0
            while sum(one.weight for one in self._loaded.values()) > MAX_EVENTS_LOADED and self._let_go(
                max(1, len(self._loaded) // 10)
            ):
                pass

    def _let_go(self, count: int) -> int:
        """Of those that nobody asked for the longest. Returns how many went."""
        gone = 0
        for room_id, old in list(self._loaded.items())[:count]:
            if not old.lock.locked() and not self._just_written(old):
                # Somebody may still hold it, about to take its lock: she has to see that it is no longer the room.
                old.dropped = True
                del self._loaded[room_id]
                gone += 1
        return gone

    def _just_written(self, room: Room) -> bool:
        return bool(room.recent) and (room.recent[-1].pos or 0) > self.db.stable_pos()

    def add(self, room: Room) -> None:
        """A room that is being made."""
        self._put(room)

    def drop(self, room: Room) -> None:
        """Its memory ran ahead of a write that failed, or it was changed behind its back: it will be loaded again."""
        room.dropped = True
        if self._loaded.get(room.room_id) is room:
            del self._loaded[room.room_id]

    async def require_joined(self, room_id: str, user_id: str) -> Room:
        room = await self.get(room_id)
        if room is None or room.members.get(user_id) != "join":
            raise Forbidden("You are not in this room. Join it first.")
        return room

    # --- who knows whom

    async def neighbours(self, user_id: str) -> set[str]:
        """Everybody who shares a joined room with this user, here and elsewhere, without the user."""
        found: set[str] = set()
        for room_id in await self.rooms_of(user_id):
            room = await self.get(room_id)
            if room is not None:
                found.update(u for u, m in room.members.items() if m == "join")
        found.discard(user_id)
        return found

    async def local_neighbours(self, user_id: str) -> set[str]:
        """The local people who share a joined room with this user, and the user, if local."""
        found = {user_id} if server_of(user_id) == self.server_name else set()
        for room_id in await self.rooms_of(user_id):
            room = await self.get(room_id)
            if room is not None:
                found |= room.local_joined
        return found

    async def servers_sharing(self, user_id: str) -> set[str]:
        """The other servers in the rooms of this user."""
        found: set[str] = set()
        for room_id in await self.rooms_of(user_id):
            room = await self.get(room_id)
            if room is not None:
                found |= room.servers
        found.discard(self.server_name)
        return found

    async def shares_with(self, server: str) -> bool:
        """Whether somebody of this server is in a room with people of ours, or may be: not all members are known yet."""
        return await self.db.read(
            lambda query: (
                query.one("SELECT 1 FROM partial_joins WHERE full_pos IS NULL") is not None
                or query.one(
                    "SELECT 1 FROM memberships m WHERE m.local = 0 AND m.membership = 'join' AND m.user_id LIKE $1 AND EXISTS "
                    "(SELECT 1 FROM memberships o WHERE o.room_nid = m.room_nid AND o.local = 1 AND o.membership = 'join')",
                    f"%:{server}",
                )
                is not None
            )
        )

    async def share_a_room(self, a: str, b: str) -> bool:
        return a == b or not (await self.rooms_of(a)).isdisjoint(await self.rooms_of(b))

    async def shared(self, a: str, b: str) -> frozenset[str]:
        """The rooms that both are in."""
        return await self.rooms_of(a) & await self.rooms_of(b)

    async def rooms_of(self, user_id: str) -> frozenset[str]:
        """The joined rooms of a user, here or elsewhere, in which people of ours are."""
        if server_of(user_id) == self.server_name:
            return self.joined(user_id)
        rows = await self.db.read(
            lambda query: query.all(
                "SELECT r.room_id FROM memberships m JOIN rooms r ON r.nid = m.room_nid "
                "WHERE m.user_id = $1 AND m.membership = 'join' AND EXISTS (SELECT 1 FROM memberships o "
                "WHERE o.room_nid = m.room_nid AND o.local = 1 AND o.membership = 'join')",
                user_id,
            )
        )
        return frozenset(row[0] for row in rows)

    async def update_profile(self, user_id: str, changed: Mapping[str, Any]) -> None:
        """The member events of a local user say what the profile says."""
        if self.updates_profile is not None:
            await self.updates_profile(user_id, changed)

    # --- events

    async def event(self, event_id: str) -> Stored | None:
        def find(query: Query) -> Stored | None:
            row = query.one(
                f"SELECT {COLUMNS}, r.version FROM events e JOIN rooms r ON r.nid = e.room_nid WHERE e.event_id = $1",
                event_id,
            )
            return stored(row, VERSIONS[row[store.WIDTH]]) if row is not None else None

        return await self.db.read(find)

    def hidden_in(self, room_id: str, since: int, upto: int) -> list[tuple[str, int]]:
        """The messages that moderators hid in (since, upto], each with when it was sent."""
        found = self.withheld.get(room_id)
        return [(event_id, one.sent_ts) for event_id, one in found.items() if since < one.pos <= upto] if found else []

    def edits_what_is_withheld(self, event: Event) -> bool:
        """What its sender makes of a hidden message is hidden with it (withholding.py)."""
        found = self.withheld.get(event.room_id)
        relation = event.content.get("m.relates_to") if found else None
        if not found or not isinstance(relation, dict) or relation.get("rel_type") != "m.replace":
            return False
        target = relation.get("event_id")
        original = found.get(target) if isinstance(target, str) else None
        return original is not None and original.sender == event.sender and event.state_key is None

    async def sender_of(self, event_id: str) -> str | None:
        return await self.db.read(lambda query: query.value("SELECT sender FROM events WHERE event_id = $1", event_id))

    def new_events(self, query: Query, after_pos: int, upto_pos: int, limit: int) -> list[Stored]:
        """What came into any timeline in (after_pos, upto_pos], in order of arrival. For followers of the log."""
        rows = query.all(
            f"SELECT {COLUMNS}, r.version FROM events e JOIN rooms r ON r.nid = e.room_nid "
            f"WHERE e.pos > $1 AND e.pos <= $2 AND (e.marks & {HIDDEN & ~store.STUB | HISTORY}) = 0 ORDER BY e.pos LIMIT $3",
            after_pos,
            upto_pos,
            limit,
        )
        return [stored(row, VERSIONS[row[store.WIDTH]]) for row in rows]

    def room_events_after(self, query: Query, room_nid: int, after_pos: int, upto_pos: int, limit: int) -> list[Stored]:
        """The newest `limit` events of a room's timeline in (after_pos, upto_pos], oldest first."""
        version = query.value("SELECT version FROM rooms WHERE nid = $1", room_nid)
        return store.latest(query, room_nid, VERSIONS[version], after_pos, upto_pos, limit) if version else []

    def departed(self, query: Query, since: int) -> list[tuple[str, str, int]]:
        """(room, user, pos) of everybody who ceased to be joined after `since`."""
        rows = query.all(
            "SELECT r.room_id, l.user_id, l.pos FROM membership_log l JOIN rooms r ON r.nid = l.room_nid "
            "WHERE l.pos > $1 AND l.before = 'join' AND l.after <> 'join' ORDER BY l.pos",
            since,
        )
        return [(room_id, user_id, pos) for room_id, user_id, pos in rows]

    def aliases(self, query: Query, room_id: str) -> list[str]:
        rows = query.all(
            "SELECT a.alias FROM aliases a JOIN rooms r ON r.nid = a.room_nid WHERE r.room_id = $1", room_id
        )
        return [alias for (alias,) in rows]

    def membership_changes(
        self, query: Query, room_ids: Iterable[str], since: int, upto: int
    ) -> list[tuple[str, str, str | None, str, int]]:
        """(room, user, membership before, after, pos) of everybody in these rooms in (since, upto], in order."""
        found = []
        for room_id in room_ids:
            rows = query.all(
                "SELECT l.user_id, l.before, l.after, l.pos FROM membership_log l JOIN rooms r ON r.nid = l.room_nid "
                "WHERE r.room_id = $1 AND l.pos > $2 AND l.pos <= $3 ORDER BY l.pos",
                room_id,
                since,
                upto,
            )
            found += [(room_id, user_id, before, now, pos) for user_id, before, now, pos in rows]
        return found
