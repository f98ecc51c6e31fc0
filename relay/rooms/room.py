"""One room in memory: its current state, latest events and members. It runs ahead of the disk by what is being written.

`append.py` alone changes it, while it queues the write; if that write fails the room is dropped and loaded again.
Readers for clients look at `db.stable_pos()` and take nothing that lies behind it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping

from relay.db import Database, Query
from relay.ids import server_of
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.globs import ServerAcl
from relay.protocol.power import Levels
from relay.protocol.versions import VERSIONS, RoomVersion
from relay.rooms import partial, state, store
from relay.rooms.partial import Partial
from relay.rooms.state import StateMap
from relay.rooms.store import Key, Stored

RECENT_EVENTS = 64
MAX_EVENTS_KEPT = 200
MAX_PLACES_KEPT = 256
MEMBERS_AT_LEAST = 3

CREATE: Key = ("m.room.create", "")
POWER_LEVELS: Key = ("m.room.power_levels", "")
JOIN_RULES: Key = ("m.room.join_rules", "")
ENCRYPTION: Key = ("m.room.encryption", "")
HISTORY_VISIBILITY: Key = ("m.room.history_visibility", "")
SERVER_ACL: Key = ("m.room.server_acl", "")
# What invited and knocking people are told of a room. Spec: client-server-api/#stripped-state
STRIPPED_KEYS: tuple[Key, ...] = (
    CREATE,
    ("m.room.name", ""),
    ("m.room.avatar", ""),
    ("m.room.topic", ""),
    JOIN_RULES,
    ("m.room.canonical_alias", ""),
    ENCRYPTION,
    HISTORY_VISIBILITY,
)


class _CurrentIds(Mapping[Key, str]):
    """The current state as event IDs; a view, not a copy."""

    def __init__(self, entries: StateMap) -> None:
        self._entries = entries

    def __getitem__(self, key: Key) -> str:
        return self._entries[key][0]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Room:
    def __init__(
        self, db: Database, server_name: str, nid: int, room_id: str, version: RoomVersion, published: bool = False
    ) -> None:
        self._db = db
        self._server_name = server_name
        self.nid = nid
        self.room_id = room_id
        self.version = version
        self.published = published
        self.lock = asyncio.Lock()
        # Whose event the policy server is asked about; never waited for with `lock` in hand.
        self.asking = asyncio.Lock()
        self.entries: StateMap = {}
        self.state: Mapping[Key, str] = _CurrentIds(self.entries)
        self.state_nid: int | None = None
        self.steps = 0
        self.state_pos = 0  # when the current state became current
        self.extremities: dict[str, int] = {}  # event ID -> depth
        self.members: dict[str, str] = {}
        self.local_joined: set[str] = set()
        self._servers: Counter[str] = Counter()
        self.recent: deque[Stored] = deque(maxlen=RECENT_EVENTS)
        self.recent_floor = 0
        self.acl = ServerAcl.of(None)
        self._kept: OrderedDict[str, Event] = OrderedDict()
        self._states_after: OrderedDict[str, int] = OrderedDict()
        self._levels: Levels | None = None
        self.dropped = False
        # Set where the members are not all known yet.
        self.partial: Partial | None = None

    # --- what others ask

    @property
    def servers(self) -> set[str]:
        """The servers of all joined users; while not all of these are known, also those that we were told of."""
        known = set(self._servers)
        return known if self.partial is None else known | self.partial.servers

    @property
    def shared(self) -> bool:
        """Whether users of other servers are joined."""
        return self.partial is not None or len(self._servers) > (self._server_name in self._servers)

    def largest_servers(self, count: int) -> list[str]:
        """Those with most joined users, ours among them."""
        if self.partial is not None:
            # Whoever let us in knows the room; how large the others are is not known yet.
            named = dict.fromkeys([self.partial.via, *self._servers, *sorted(self.partial.servers)])
            return list(named)[:count]
        return [server for server, _ in self._servers.most_common(count)]

    @property
    def encrypted(self) -> bool:
        return ENCRYPTION in self.entries

    @property
    def known(self) -> bool:
        """Whether we have the room's state: False where there is only an invite."""
        return self.state_nid is not None

    @property
    def joined_count(self) -> int:
        """While the members are not all known, nobody takes the room for a conversation of two."""
        return self._servers.total() if self.partial is None else max(self._servers.total(), MEMBERS_AT_LEAST)

    def may_be_joined(self, user_id: str) -> bool:
        """Whether somebody is joined, or, while the members are not all known, may well be."""
        known = self.members.get(user_id)
        if known is None and self.partial is not None:
            return server_of(user_id) in self.servers
        return known == "join"

    @property
    def depth(self) -> int:
        return max(self.extremities.values(), default=0)

    def membership(self, user_id: str) -> str | None:
        return self.members.get(user_id)

    async def event(self, event_type: str, state_key: str = "") -> Event | None:
        """An event of the current state."""
        entry = self.entries.get((event_type, state_key))
        if entry is None:
            return None
        return (await self.events([entry[0]])).get(entry[0])

    async def state_events(self, keys: Iterable[Key]) -> dict[Key, Event]:
        """Several events of the current state; keys that are not in it are left out."""
        wanted = {key: self.entries[key][0] for key in keys if key in self.entries}
        found = await self.events(wanted.values())
        return {key: found[event_id] for key, event_id in wanted.items() if event_id in found}

    def state_after(self, event_id: str) -> int | None:
        """The number of the state after an event that came lately, on disk or not; None where that has to be looked up."""
        return self._states_after.get(event_id)

    def kept(self, event_id: str) -> Event | None:
        return self._kept.get(event_id)

    async def events(self, event_ids: Iterable[str]) -> dict[str, Event]:
        """Events of this room by ID, from memory or the database."""
        found: dict[str, Event] = {}
        missing: list[str] = []
        for event_id in event_ids:
            event = self._kept.get(event_id)
            if event is None:
                missing.append(event_id)
            else:
                found[event_id] = event
        if missing:
            for event_id, one in (await self._db.read(store.by_ids, missing, self.version)).items():
                found[event_id] = events.redacted(one.event) if one.redacted_by else one.event
                if len(missing) <= MAX_EVENTS_KEPT // 2:
                    self.keep(found[event_id])
        return found

    async def levels(self) -> Levels:
        if self._levels is None:
            found = await self.state_events([CREATE, POWER_LEVELS])
            self._levels = Levels.of(found[CREATE], found.get(POWER_LEVELS))
        return self._levels

    async def content(self, event_type: str, state_key: str = "") -> dict[str, object]:
        event = await self.event(event_type, state_key)
        return event.content if event is not None else {}

    async def text(self, event_type: str, content_key: str) -> str | None:
        """A string out of a state event's content, where it is one."""
        value = (await self.content(event_type)).get(content_key)
        return value if isinstance(value, str) else None

    def newer_than(self, pos: int) -> list[Stored]:
        """Of the latest events those behind `pos`, oldest first: mostly one or two of many."""
        found = []
        for one in reversed(self.recent):
            if (one.pos or 0) <= pos:
                break
            found.append(one)
        found.reverse()
        return found

    @property
    def weight(self) -> int:
        """How many events it holds in memory."""
        return len(self.recent) + len(self._kept)

    # --- for append.py

    def keep(self, event: Event) -> None:
        event.settle()
        self._kept[event.id] = event
        self._kept.move_to_end(event.id)
        while len(self._kept) > MAX_EVENTS_KEPT:
            self._kept.popitem(last=False)

    def take_state(self, event: Event, nid: int) -> None:
        """One event becomes part of the current state."""
        key = event.key
        assert key is not None
        self.entries[key] = (event.id, nid)
        self._levels = None
        if key[0] == "m.room.member":
            self._take_membership(key[1], event.membership or "leave")
        elif key == SERVER_ACL:
            self.acl = ServerAcl.of(event.content)

    def _take_membership(self, user_id: str, membership: str) -> None:
        before = self.members.get(user_id)
        self.members[user_id] = membership
        server = server_of(user_id)
        if membership == "join" and before != "join":
            self._servers[server] += 1
            if server == self._server_name:
                self.local_joined.add(user_id)
        elif membership != "join" and before == "join":
            self._servers[server] -= 1
            if self._servers[server] <= 0:
                del self._servers[server]
            self.local_joined.discard(user_id)

    def take_whole_state(self, entries: StateMap, members: Mapping[str, str], acl: Event | None) -> None:
        """The current state is another one than before: a join, or the outcome of a resolution."""
        self.entries.clear()
        self.entries.update(entries)
        self._levels = None
        self.acl = ServerAcl.of(acl.content if acl is not None else None)
        for user_id in [u for u in self.members if u not in members]:
            self._take_membership(user_id, "leave")
            del self.members[user_id]
        for user_id, membership in members.items():
            self._take_membership(user_id, membership)

    def take_place(self, event_id: str, state_nid: int) -> None:
        """An event stands in the room's graph, shown or not."""
        self._states_after[event_id] = state_nid
        self._states_after.move_to_end(event_id)
        while len(self._states_after) > MAX_PLACES_KEPT:
            self._states_after.popitem(last=False)

    def begin_anew(self, pos: int) -> None:
        """Nobody of ours was here for a while: what came before `pos` is on disk only, and there is a gap after it."""
        self.recent.clear()
        self.recent_floor = pos
        self._states_after.clear()
        self.extremities.clear()

    def take_taken_back(self, target: Event) -> None:
        """An event was redacted: what memory holds of it is its redacted form."""
        entry = self.entries.get(target.key) if target.key is not None else None
        if target.id in self._kept:
            self.keep(events.redacted(target))
        if entry is not None and entry[0] == target.id:
            self._levels = None
            if target.key == SERVER_ACL:
                self.acl = ServerAcl.of(events.redacted(target).content)

    def take_event(self, one: Stored) -> None:
        """One more event in the timeline."""
        if len(self.recent) == self.recent.maxlen and self.recent[0].pos is not None:
            self.recent_floor = self.recent[0].pos
        one.event.settle()
        self.recent.append(one)

    # --- loading

    def fill(self, query: Query) -> None:
        """Everything from the database, in a reader's thread."""
        row = query.one("SELECT state_nid FROM rooms WHERE nid = $1", self.nid)
        self.state_nid = row[0] if row else None
        if self.state_nid is None:
            return
        self.partial = partial.load(query, self.nid)
        _, self.steps, entries = state.load(query, self.state_nid)
        self.state_pos = int(query.value("SELECT max(pos) FROM current_states WHERE room_nid = $1", self.nid) or 0)
        acl = self._state_event(query, entries, SERVER_ACL)
        self.take_whole_state(entries, self._members_of(query, entries), acl)
        for event_id, depth, state_nid in query.all(
            "SELECT f.event_id, e.depth, e.state_nid FROM forward_extremities f JOIN events e ON e.event_id = f.event_id WHERE f.room_nid = $1",
            self.nid,
        ):
            self.extremities[event_id] = depth
            if state_nid is not None:
                self.take_place(event_id, state_nid)
        # Everything that was ever queued is committed or failed by now: loading waits for the writer.
        upto = 2**62
        begun = partial.begun(query, self.nid)
        newest = store.latest(query, self.nid, self.version, begun, upto, RECENT_EVENTS)
        for one in newest:
            one.event.settle()
            one.related = query.one("SELECT 1 FROM relations WHERE target_id = $1 LIMIT 1", one.id) is not None
        self.recent.extend(newest)
        if len(newest) == RECENT_EVENTS and newest[0].pos is not None:
            self.recent_floor = newest[0].pos - 1
        else:
            self.recent_floor = begun

    def _state_event(self, query: Query, entries: StateMap, key: Key) -> Event | None:
        if key not in entries:
            return None
        one = store.by_ids(query, [entries[key][0]], self.version)[entries[key][0]]
        return events.redacted(one.event) if one.redacted_by else one.event

    def _members_of(self, query: Query, entries: StateMap) -> dict[str, str]:
        """The memberships that the state says: the rows may be ahead of it, where somebody was invited after we all left."""
        rows = {
            user_id: (membership, event_id)
            for user_id, membership, event_id in query.all(
                "SELECT user_id, membership, event_id FROM memberships WHERE room_nid = $1", self.nid
            )
        }
        members: dict[str, str] = {}
        for key, (event_id, _) in entries.items():
            if key[0] == "m.room.member":
                membership, of = rows.get(key[1], ("leave", ""))
                if of != event_id:
                    event = self._state_event(query, entries, key)
                    membership = (event.membership if event is not None else None) or "leave"
                members[key[1]] = membership
        return members


def load_room(query: Query, db: Database, server_name: str, room_id: str) -> Room | None:
    row = query.one("SELECT nid, version, published FROM rooms WHERE room_id = $1", room_id)
    if row is None:
        return None
    room = Room(db, server_name, row[0], room_id, VERSIONS[row[1]], bool(row[2]))
    room.fill(query)
    return room
