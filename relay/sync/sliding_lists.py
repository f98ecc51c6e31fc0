"""A person's rooms in order of their last event, kept up to date by the bell, and the filtered views that lists ask for.

One `RoomOrder` a person, shared by all her connections. A look at it costs what has changed since the last one, not what
there is. Rooms she left herself are not in it; those she was kicked out of or banned from are. Spec: MSC4186, lists.
"""

from __future__ import annotations

import asyncio
import itertools
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from relay.bell import Bell
from relay.db import Database, Query
from relay.people.account_data import GLOBAL, TOPIC, AccountData
from relay.people.tags import TAGS, tags_in
from relay.rooms.room import CREATE, ENCRYPTION, Room
from relay.rooms.rooms import Membership, Rooms
from relay.rooms.store import HIDDEN, HISTORY, REJECTED, SOFT_FAILED
from relay.sync.sliding_asked import EVERY_ROOM, Filters, ListAsk

MAX_PEOPLE = 2_000
MAX_VIEWS = 12
MAX_KINDS = 50_000
DIRECT = "m.direct"
CHILD = "m.space.child"

Rank = tuple[int, str]  # pos of the last event, room
_versions = itertools.count(1)


@dataclass(slots=True)
class Kind:
    """What filters ask of a room: it never changes, but for encryption, which comes and stays."""

    type: str | None
    encrypted: bool


class View:
    """The rooms that pass one set of filters; `ranks` ascend, so that the top of the list is at the end."""

    __slots__ = ("built", "children", "filters", "places", "ranks", "version")

    def __init__(self, filters: Filters) -> None:
        self.filters = filters
        self.ranks: list[Rank] = []
        self.places: dict[str, int] = {}
        # Another one with every change, and never twice: whoever saw this one has seen the list as it is.
        self.version = self.built = next(_versions)
        self.children: frozenset[str] | None = None

    def put(self, room_id: str, place: int | None) -> None:
        """`place` None takes it out."""
        before = self.places.get(room_id)
        if before == place:
            return
        if before is not None:
            del self.ranks[bisect_left(self.ranks, (before, room_id))]
            del self.places[room_id]
        if place is not None:
            self.places[room_id] = place
            insort(self.ranks, (place, room_id))
        self.version = next(_versions)

    def index(self, room_id: str) -> int | None:
        """Counted from the top."""
        place = self.places.get(room_id)
        return None if place is None else len(self.ranks) - 1 - bisect_left(self.ranks, (place, room_id))

    def holds(self, asked: ListAsk, room_id: str) -> bool:
        """Whether the room lies in the list's window."""
        if asked.ranges is None:
            return room_id in self.places
        index = self.index(room_id)
        return index is not None and any(first <= index <= last for first, last in asked.ranges)

    def window(self, asked: ListAsk) -> list[str]:
        """The rooms in it, top first."""
        if asked.ranges is None:
            return [room_id for _, room_id in reversed(self.ranks)]
        found: dict[str, None] = {}
        for first, last in asked.ranges:
            low, high = max(0, len(self.ranks) - 1 - last), len(self.ranks) - first
            found.update((room_id, None) for _, room_id in reversed(self.ranks[low : max(low, high)]))
        return list(found)

    def is_whole(self, asked: ListAsk) -> bool:
        """Whether the window is the list."""
        return asked.covers(len(self.ranks))


class RoomOrder:
    """One person's. `upto` is what it has seen of the line."""

    __slots__ = ("dm", "lock", "places", "tags", "upto", "views")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.upto = -1
        # All rooms in the server's list, whatever the filters.
        self.places: dict[str, int] = {}
        self.views: OrderedDict[Filters, View] = OrderedDict()
        self.dm: frozenset[str] = frozenset()
        self.tags: dict[str, frozenset[str]] = {}


class RoomOrders:
    def __init__(self, db: Database, bell: Bell, rooms: Rooms, account_data: AccountData) -> None:
        self._db = db
        self._bell = bell
        self._rooms = rooms
        self._account_data = account_data
        # (user, room, invite's event ID) -> whether her clients are not to see it; the server sets it.
        self.hides_invite: Callable[[str, str, str], Awaitable[bool]] | None = None
        # Derived from memberships, the rooms' timelines and account data; follows the bell.
        self._orders: OrderedDict[str, RoomOrder] = OrderedDict()
        # Room -> its kind. A room that gets encrypted rings; then it is looked at again.
        self._kinds: OrderedDict[str, Kind] = OrderedDict()

    async def of(self, user_id: str, wanted: Iterable[Filters]) -> tuple[RoomOrder, dict[Filters, View]]:
        """Her order, up to date, and a view for each of these filters. To be read before anything else is awaited."""
        order = self._orders.get(user_id)
        if order is None:
            order = self._orders[user_id] = RoomOrder()
            if len(self._orders) > MAX_PEOPLE:
                self._orders.popitem(last=False)
        else:
            self._orders.move_to_end(user_id)
        async with order.lock:
            await self._advance(user_id, order)
            views: dict[Filters, View] = {}
            for filters in wanted:
                view = order.views.get(filters)
                if view is None:
                    view = order.views[filters] = await self._view(user_id, order, filters)
                views[filters] = view
                order.views.move_to_end(filters)
            while len(order.views) > MAX_VIEWS:
                order.views.popitem(last=False)
        return order, views

    def forget(self, user_id: str) -> None:
        self._orders.pop(user_id, None)

    async def _advance(self, user_id: str, order: RoomOrder) -> None:
        upto = self._db.stable_pos()
        if upto <= order.upto:
            return
        topics = self._bell.topics(user_id, order.upto) if order.upto >= 0 else None
        mine = self._rooms.memberships(user_id)
        if topics is None:
            order.places = await self._places(user_id, mine, upto)
            order.views.clear()
            await self._read_account_data(user_id, order)
        elif topics:
            changed = [room_id for room_id in topics if room_id in mine]
            if changed:
                await self._follow(user_id, order, changed, upto)
            if TOPIC in topics:
                await self._follow_account_data(user_id, order)
                # She may block invites now, or ignore somebody; or not any more.
                invites = [room_id for room_id, one in mine.items() if one.membership == "invite"]
                await self._follow(user_id, order, invites, upto)
        order.upto = upto

    # --- where each room stands

    async def _places(self, user_id: str, mine: dict[str, Membership], upto: int) -> dict[str, int]:
        """In which order these rooms stand, without those that are in no list."""
        found: dict[str, int] = {}
        unknown: list[tuple[str, int]] = []
        gone: list[tuple[str, Membership]] = []
        for room_id, one in mine.items():
            if one.forgotten:
                continue
            if one.membership == "join":
                room = self._rooms.loaded(room_id)
                last = _last_event(room, upto) if room is not None else None
                if last is None:
                    unknown.append((room_id, one.room_nid))
                else:
                    found[room_id] = max(last, one.since_pos)
            elif one.membership in ("invite", "knock"):
                hides = self.hides_invite if one.membership == "invite" else None
                if hides is None or not await hides(user_id, room_id, one.event_id):
                    found[room_id] = one.pos
            else:
                gone.append((room_id, one))
        if unknown or gone:
            last_of, thrown_out = await self._db.read(_look_up, user_id, unknown, gone, upto)
            for room_id, _ in unknown:
                found[room_id] = max(last_of.get(room_id, 0), mine[room_id].since_pos)
            found.update((room_id, mine[room_id].pos) for room_id in thrown_out)
        return found

    async def _follow(self, user_id: str, order: RoomOrder, changed: Sequence[str], upto: int) -> None:
        mine = self._rooms.memberships(user_id)
        places = await self._places(user_id, {room_id: mine[room_id] for room_id in changed}, upto)
        for room_id in changed:
            place = places.get(room_id)
            if place is None:
                order.places.pop(room_id, None)
            else:
                order.places[room_id] = place
        await self._refresh_kinds(user_id, order, changed)
        for filters, view in list(order.views.items()):
            if filters.spaces and not set(filters.spaces).isdisjoint(changed):
                children = await self._children(user_id, filters.spaces)
                if children != view.children:
                    del order.views[filters]
                    continue
            for room_id in changed:
                place = places.get(room_id)
                view.put(room_id, place if place is not None and self._passes(user_id, order, view, room_id) else None)

    # --- views

    async def _view(self, user_id: str, order: RoomOrder, filters: Filters) -> View:
        view = View(filters)
        if filters.spaces is not None:
            view.children = await self._children(user_id, filters.spaces)
        if filters.asks_for_rooms:
            await self._learn_kinds(user_id, [room_id for room_id in order.places if room_id not in self._kinds])
        view.ranks = sorted(
            (place, room_id) for room_id, place in order.places.items() if self._passes(user_id, order, view, room_id)
        )
        view.places = {room_id: place for place, room_id in view.ranks}
        return view

    def _passes(self, user_id: str, order: RoomOrder, view: View, room_id: str) -> bool:
        filters = view.filters
        if filters == EVERY_ROOM:
            return True
        if filters.is_dm is not None and (room_id in order.dm) != filters.is_dm:
            return False
        invites = filters.invites
        if invites is not None and (self._rooms.membership(room_id, user_id) == "invite") != invites:
            return False
        if filters.tags is not None or filters.not_tags:
            tags = order.tags.get(room_id, frozenset())
            if filters.tags is not None and tags.isdisjoint(filters.tags):
                return False
            if filters.not_tags and not tags.isdisjoint(filters.not_tags):
                return False
        if view.children is not None and room_id not in view.children:
            return False
        if filters.asks_for_rooms:
            kind = self._kinds.get(room_id)
            if kind is None:
                return False
            if filters.is_encrypted is not None and kind.encrypted != filters.is_encrypted:
                return False
            if filters.room_types is not None and kind.type not in filters.room_types:
                return False
            if filters.not_room_types and kind.type in filters.not_room_types:
                return False
        return True

    async def _children(self, user_id: str, spaces: Iterable[str]) -> frozenset[str]:
        """The rooms that these spaces name, as far as she is in them; those of their subspaces are not. Spec: MSC4186"""
        found: set[str] = set()
        for space_id in spaces:
            space = await self._rooms.get(space_id) if self._rooms.membership(space_id, user_id) == "join" else None
            if space is not None:
                children = await space.state_events([key for key in space.entries if key[0] == CHILD])
                # A child that was removed stays in the state without the servers through which it is reached.
                found.update(key[1] for key, event in children.items() if event.content.get("via"))
        return frozenset(found)

    # --- kinds of rooms

    async def _refresh_kinds(self, user_id: str, order: RoomOrder, changed: Iterable[str]) -> None:
        if not any(filters.asks_for_rooms for filters in order.views):
            return
        stale = []
        for room_id in changed:
            kind = self._kinds.get(room_id)
            if kind is None or not kind.encrypted:
                stale.append(room_id)
        if stale:
            await self._learn_kinds(user_id, stale)

    async def _learn_kinds(self, user_id: str, room_ids: Sequence[str]) -> None:
        mine = self._rooms.memberships(user_id)
        wanted = [(room_id, mine[room_id].room_nid) for room_id in room_ids if room_id in mine]
        if wanted:
            self._kinds.update(await self._db.read(_kinds, user_id, wanted))
            while len(self._kinds) > MAX_KINDS:
                self._kinds.popitem(last=False)

    # --- what she noted about her rooms

    async def _read_account_data(self, user_id: str, order: RoomOrder) -> None:
        rows = await self._account_data.of_types(user_id, (DIRECT, TAGS))
        order.dm, order.tags = frozenset(), {}
        for room_id, event_type, content in rows:
            if event_type == DIRECT and room_id == GLOBAL:
                order.dm = _rooms_in(content)
            elif event_type == TAGS and room_id != GLOBAL:
                order.tags[room_id] = frozenset(tags_in(content))

    async def _follow_account_data(self, user_id: str, order: RoomOrder) -> None:
        dm, tags = order.dm, order.tags
        await self._read_account_data(user_id, order)
        if (dm, tags) != (order.dm, order.tags):
            for filters in [filters for filters in order.views if filters.asks_for_account_data]:
                del order.views[filters]


def _last_event(room: Room, upto: int) -> int | None:
    for one in reversed(room.recent):
        if one.pos is not None and one.pos <= upto:
            return one.pos
    return None


def _look_up(
    query: Query, user_id: str, joined: Sequence[tuple[str, int]], gone: Sequence[tuple[str, Membership]], upto: int
) -> tuple[dict[str, int], list[str]]:
    """The last event of each room she is in; and which of the others she was thrown out of after having been in them."""
    last: dict[str, int] = {}
    for room_id, nid in joined:
        pos = query.value(
            f"SELECT pos FROM events WHERE room_nid = $1 AND pos IS NOT NULL AND pos <= $2 AND (marks & {HIDDEN | HISTORY}) = 0 "
            "ORDER BY pos DESC LIMIT 1",
            nid,
            upto,
        )
        last[room_id] = int(pos or 0)
    out = []
    for room_id, one in gone:
        sender = query.value("SELECT sender FROM events WHERE event_id = $1", one.event_id)
        if sender is None or sender == user_id:
            continue
        was_in = query.value(
            "SELECT 1 FROM membership_log WHERE room_nid = $1 AND user_id = $2 AND before = 'join' LIMIT 1",
            one.room_nid,
            user_id,
        )
        if was_in:
            out.append(room_id)
    return last, out


def _kinds(query: Query, user_id: str, wanted: Sequence[tuple[str, int]]) -> dict[str, Kind]:
    """From the state where we have it, else from what an invite tells."""
    found: dict[str, Kind] = {}
    of_key = f"SELECT json FROM events WHERE room_nid = $1 AND type = $2 AND state_key = $3 AND (marks & {REJECTED | SOFT_FAILED}) = 0 LIMIT 1"
    for room_id, nid in wanted:
        raw = query.value(of_key, nid, *CREATE)
        if raw is not None:
            content = orjson.loads(bytes(raw)).get("content")
            encrypted = query.value(of_key, nid, *ENCRYPTION) is not None
            found[room_id] = Kind(_type_in(content), encrypted)
            continue
        stripped = query.value("SELECT stripped FROM memberships WHERE room_nid = $1 AND user_id = $2", nid, user_id)
        kind = found[room_id] = Kind(None, False)
        for event in orjson.loads(bytes(stripped)) if stripped else ():
            if isinstance(event, dict) and event.get("type") == CREATE[0]:
                kind.type = _type_in(event.get("content"))
            elif isinstance(event, dict) and event.get("type") == ENCRYPTION[0]:
                kind.encrypted = True
    return found


def _type_in(content: Any) -> str | None:
    room_type = content.get("type") if isinstance(content, dict) else None
    return room_type if isinstance(room_type, str) else None


def _rooms_in(direct: Any) -> frozenset[str]:
    """Of m.direct, which any client may have written in any shape."""
    if not isinstance(direct, dict):
        return frozenset()
    return frozenset(r for rooms in direct.values() if isinstance(rooms, list) for r in rooms if isinstance(r, str))
