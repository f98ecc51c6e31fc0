"""POST …/sync, simplified sliding sync: only the rooms that the client's lists and subscriptions speak of, latest first.

Two forms on the wire, one engine: the deployed one (org.matrix.simplified_msc3575), which clients speak today, and the
accepted text of MSC4186 at /v4/sync. An answer costs what has changed since the connection's pos and lies in its windows.
The pieces: `sliding_asked` (the request), `_connection` (what was told), `_lists` (which rooms), `_rooms` and `_extensions`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from relay.bell import Bell
from relay.clock import Clock
from relay.db import Database
from relay.part import Part
from relay.rooms.rooms import Membership, Rooms
from relay.rooms.store import Stored
from relay.sync.sliding_asked import ALL_SUBSCRIBED, Asked, ByRoom, Config, accepted, deployed
from relay.sync.sliding_connection import Connection, Connections, Sent, Standing, new_standing, written
from relay.sync.sliding_extensions import Aside, SlidingExtensions
from relay.sync.sliding_lists import RoomOrder, RoomOrders, View
from relay.sync.sliding_rooms import Look, SlidingRooms, Told
from relay.sync.token import Token
from relay.web import Caller, Request, Route

MAX_TIMEOUT_MS = 120_000
# Clients repeat their requests: what they ask for is parsed once.
MAX_BODIES = 256
MAX_BODY_KEPT = 16 * 1024
# Read from the database together where they are not in memory.
ROOMS_AT_ONCE = 50

DEPLOYED = "/_matrix/client/unstable/org.matrix.simplified_msc3575/sync"
ACCEPTED = "/_matrix/client/v4/sync"

Seen = Callable[[str, str], Awaitable[None]]
IgnoredBy = Callable[[str], Awaitable[frozenset[str]]]


@dataclass(slots=True)
class Found:
    """One answer before it is written down."""

    standing: Standing
    rooms: dict[str, dict[str, Any]] = field(default_factory=dict)
    extensions: dict[str, Any] = field(default_factory=dict)
    news: bool = False


class Rules:
    """The lists and subscriptions of a request before one person's rooms."""

    def __init__(self, asked: Asked, order: RoomOrder | None, views: dict[str, View]) -> None:
        self.asked = asked
        self.views = views
        # Rooms that she may hear of at all.
        self._places = order.places if order is not None else {}

    def config(self, room_id: str) -> Config | None:
        """What is asked of this room; None where no rule speaks of it."""
        configs = tuple(one.config for name, one in self.asked.lists.items() if self.views[name].holds(one, room_id))
        subscribed = self.asked.subscriptions.get(room_id)
        if subscribed is not None and room_id in self._places:
            configs = (*configs, subscribed)
        return self.asked.merged(configs) if configs else None

    def rooms(self) -> dict[str, None]:
        """All rooms that a rule speaks of, in the order of the lists."""
        found: dict[str, None] = {}
        for name, one in self.asked.lists.items():
            found.update(dict.fromkeys(self.views[name].window(one)))
        found.update((room_id, None) for room_id in self.asked.subscriptions if room_id in self._places)
        return found

    def lists(self, room_id: str) -> list[str]:
        return [name for name, one in self.asked.lists.items() if self.views[name].holds(one, room_id)]

    def concerns(self, extension: ByRoom, room_id: str, windowed: bool) -> bool:
        """Whether an extension speaks of a room: by its lists (all or those named), or by its rooms."""
        for name in self.asked.lists if extension.lists is None else extension.lists:
            one = self.asked.lists.get(name)
            if one is not None:
                view = self.views[name]
                if view.holds(one, room_id) if windowed else room_id in view.places:
                    return True
        rooms = extension.rooms
        if rooms is None or ALL_SUBSCRIBED in rooms:
            return room_id in self.asked.subscriptions or (rooms is not None and room_id in rooms)
        return room_id in rooms


class SlidingSync(Part):
    def __init__(
        self,
        db: Database,
        bell: Bell,
        clock: Clock,
        rooms: Rooms,
        orders: RoomOrders,
        tells: SlidingRooms,
        extensions: SlidingExtensions,
        ignored_by: IgnoredBy,
        require_alive: Callable[[Caller], None],
        seen: Seen,
    ) -> None:
        self._db = db
        self._bell = bell
        self._clock = clock
        self._rooms = rooms
        self._orders = orders
        self._tells = tells
        self._extensions = extensions
        self._ignored_by = ignored_by
        self._require_alive = require_alive
        self._seen = seen
        self._connections = Connections()
        self._bodies: OrderedDict[tuple[str, bytes], Asked] = OrderedDict()
        self._stopping = False

    def routes(self) -> Iterable[Route]:
        return (Route("POST", DEPLOYED, self._deployed), Route("POST", ACCEPTED, self._accepted))

    def stop(self) -> None:
        """Long polls end with what they have."""
        self._stopping = True
        self._bell.wake_all()

    async def _deployed(self, request: Request) -> bytes:
        asked = self._asked(request)
        await self._seen(request.user_id, request.query.get("set_presence", "online"))
        timeout = request.query_int("timeout", 0, high=MAX_TIMEOUT_MS)
        return await self._sync(request.who, asked, request.query.get("pos") or None, timeout, _as_deployed)

    async def _accepted(self, request: Request) -> bytes:
        asked = accepted(request.optional_json(), request.user_id)
        await self._seen(request.user_id, asked.set_presence)
        return await self._sync(request.who, asked, asked.pos, min(asked.timeout, MAX_TIMEOUT_MS), _as_accepted)

    def _asked(self, request: Request) -> Asked:
        key = (request.user_id, request.body)
        known = self._bodies.get(key)
        if known is None:
            known = deployed(request.optional_json(), request.user_id)
            if (known.lists or known.subscriptions) and len(request.body) <= MAX_BODY_KEPT:
                self._bodies[key] = known
                if len(self._bodies) > MAX_BODIES:
                    self._bodies.popitem(last=False)
        else:
            self._bodies.move_to_end(key)
        return known

    # --- the long poll

    async def _sync(self, who: Caller, asked: Asked, pos: str | None, timeout: int, form: Form) -> bytes:
        key = (who.user_id, who.device_id, asked.conn_id)
        connection = self._connections.find(key, pos, asked, self._db.epoch, self._db.stable_pos())
        if connection.turn:
            # An earlier request that still waits has been given up by the client.
            self._bell.wake(who.user_id)
        turn = connection.begin()
        until = self._clock.monotonic() + timeout / 1000
        first = connection.base.token is None
        while True:
            found = await self._look(connection, asked, who)
            if connection.turn != turn:
                return self._superseded(connection, asked)
            left = until - self._clock.monotonic()
            if first or found.news or left <= 0 or self._stopping:
                new_pos = self._connections.answer(connection, found.standing)
                return _rendered(new_pos, asked, found, form)
            upto = found.standing.token
            assert upto is not None
            while not self._bell.changed(who.user_id, upto.pos, upto.typing) and left > 0 and not self._stopping:
                await self._bell.wait(who.user_id, left)
                left = until - self._clock.monotonic()
                self._require_alive(who)
                if connection.turn != turn:
                    return self._superseded(connection, asked)

    def _superseded(self, connection: Connection, asked: Asked) -> bytes:
        """Nothing new, at the pos that it came from: nobody listens any more."""
        base = connection.base
        pos = written(base) if base.token is not None else "0"
        return orjson.dumps(
            {"pos": pos, "lists": {n: {"count": c} for n, c in base.counts.items()}, "rooms": {}, "extensions": {}}
        )

    # --- one look

    async def _look(self, connection: Connection, asked: Asked, who: Caller) -> Found:
        base, user_id = connection.base, who.user_id
        order: RoomOrder | None = None
        views: dict[str, View] = {}
        if asked.lists or asked.subscriptions:
            order, by_filters = await self._orders.of(user_id, {one.filters for one in asked.lists.values()})
            views = {name: by_filters[one.filters] for name, one in asked.lists.items()}
        # From here to the candidates nothing is awaited: they are those of one moment.
        upto = Token(self._db.epoch, order.upto if order is not None else self._db.stable_pos(), self._bell.typing)
        topics = self._bell.topics(user_id, base.token.pos) if base.token is not None else None
        rules = Rules(asked, order, views)
        found = Found(new_standing(upto, asked))
        standing = found.standing
        standing.counts = {name: len(view.ranks) for name, view in views.items()}
        standing.versions = {name: view.version for name, view in views.items()}
        standing.dm = order.dm if order is not None else frozenset()
        wanted = self._candidates(connection, rules, topics, standing) if order is not None else {}
        dm = standing.dm

        ignored = await self._ignored_by(user_id)
        live_since = base.token.pos if base.token is not None else None
        looks = []
        for room_id, (config, mine) in wanted.items():
            sent = connection.sent.get(room_id)
            since = 0 if sent is None else (live_since or 0) if sent.behind is None else sent.behind
            looks.append(
                Look(
                    room_id=room_id, config=config, sent=sent, since=since, live_since=live_since, upto=upto.pos, mine=mine,
                    user_id=user_id, device_id=who.device_id, ignored=ignored, dm=room_id in dm,
                )
            )  # fmt: skip
        fresh: dict[str, Iterable[Stored]] = {}
        back: set[str] = set()
        async for look, told in self._told(looks):
            room_id = look.room_id
            if _is_out(look.mine) and order is not None and room_id not in order.places:
                # She left by herself: told once, then it is as if the connection never knew the room.
                standing.rooms[room_id] = None
            elif told.sent != look.sent:
                standing.rooms[room_id] = told.sent
            if told.room is None:
                continue
            found.rooms[room_id] = told.room
            told.room["lists"] = rules.lists(room_id)
            if look.mine.membership == "join":
                if "initial" in told.room:
                    fresh[room_id] = told.shown
                elif "unstable_expanded_timeline" in told.room or look.sent is None or look.sent.behind is not None:
                    back.add(room_id)

        aside = Aside(
            user_id=user_id,
            device_id=who.device_id,
            since=base.token,
            upto=upto,
            topics=topics,
            concerns=rules.concerns,
            sent=lambda: _joined_rooms(connection.sent, standing.rooms),
            knows=lambda room_id: _knows(connection.sent, standing.rooms, room_id),
            fresh=fresh,
            back=frozenset(back),
            keys=base.keys,
        )
        beside = await self._extensions.gather(asked.extensions, aside)
        standing.keys = beside.keys
        found.extensions = beside.extensions
        found.news = bool(found.rooms) or beside.news or standing.counts != base.counts
        return found

    async def _told(self, looks: Sequence[Look]) -> AsyncIterator[tuple[Look, Told]]:
        for first in range(0, len(looks), ROOMS_AT_ONCE):
            some = looks[first : first + ROOMS_AT_ONCE]
            if len(some) > 1:
                await self._tells.warm(some)
            for look in some:
                yield look, await self._tells.tell(look)

    def _candidates(
        self, connection: Connection, rules: Rules, topics: frozenset[str] | None, standing: Standing
    ) -> dict[str, tuple[Config, Membership]]:
        """The rooms of which there may be something to say; notes in `standing` what happens where nobody looks."""
        base, sent, upto = connection.base, connection.sent, standing.token
        assert upto is not None
        since = base.token.pos if base.token is not None else 0
        mine = self._rooms.memberships(connection.key[0])
        anew = base.token is None or base.asked is None or not rules.asked.same_rules(base.asked)
        if anew or topics is None:
            looked = rules.rooms()
        else:
            looked = dict.fromkeys(room_id for room_id in topics if room_id in mine)
            for room_id in _newcomers(rules, base):
                one = sent.get(room_id)
                if one is None or one.behind is not None:
                    looked[room_id] = None
            looked.update((room_id, None) for room_id in base.dm ^ standing.dm if room_id in sent)
        changed = sent.keys() if topics is None else topics & sent.keys()
        looked.update((room_id, None) for room_id in changed)
        found: dict[str, tuple[Config, Membership]] = {}
        for room_id in looked:
            one = sent.get(room_id)
            membership = mine.get(room_id)
            if membership is None:
                continue
            config = rules.config(room_id)
            if config is None and one is not None and _is_out(membership) and one.membership not in ("leave", "ban"):
                # What she knows of is over: she hears of it wherever the room stood.
                config = Config(1, one.wanted)
            if config is None or membership.pos > upto.pos:
                if one is not None and one.behind is None and room_id in changed:
                    standing.rooms[room_id] = _left_behind(one, since)
                continue
            if one is not None and one.behind is None and topics is not None and room_id not in topics:
                # Nothing happened in it: only another question or another kind of room is worth a look.
                same = config.wanted == one.wanted and config.limit <= one.limit
                if same and one.dm == (room_id in standing.dm):
                    continue
            found[room_id] = (config, membership)
        return found


def _newcomers(rules: Rules, base: Standing) -> Iterable[str]:
    """Rooms that may have come into a window though nothing happened in them: others went, or pass the filters no more."""
    found: dict[str, None] = {}
    for name, asked in rules.asked.lists.items():
        view, before = rules.views[name], base.versions.get(name, 0)
        if before == view.version:
            continue
        if before >= view.built and view.is_whole(asked) and asked.covers(base.counts.get(name, 0)):
            continue
        found.update(dict.fromkeys(view.window(asked)))
    return found


def _is_out(membership: Membership) -> bool:
    return membership.membership in ("leave", "ban")


def _left_behind(one: Sent, since: int) -> Sent:
    return Sent(since, one.limit, one.wanted, one.members, one.counts, one.dm, one.membership)


def _joined_rooms(sent: Any, added: dict[str, Sent | None]) -> Iterable[str]:
    rooms = {room_id for room_id, one in sent.items() if one.membership == "join"}
    for room_id, one in added.items():
        if one is not None and one.membership == "join":
            rooms.add(room_id)
        else:
            rooms.discard(room_id)
    return rooms


def _knows(sent: Any, added: dict[str, Sent | None], room_id: str) -> bool:
    one = added[room_id] if room_id in added else sent.get(room_id)
    return one is not None and one.membership == "join"


# --- on the wire

Form = Callable[[dict[str, Any]], dict[str, Any]]


def _rendered(pos: str, asked: Asked, found: Found, form: Form) -> bytes:
    answer: dict[str, Any] = {"pos": pos}
    if asked.txn_id is not None:
        answer["txn_id"] = asked.txn_id
    answer["lists"] = {name: {"count": count} for name, count in found.standing.counts.items()}
    answer["rooms"] = {room_id: form(room) for room_id, room in found.rooms.items()}
    answer["extensions"] = found.extensions
    return orjson.dumps(answer)


def _as_deployed(room: dict[str, Any]) -> dict[str, Any]:
    for name in ("gone", "membership", "lists"):
        room.pop(name, None)
    return room


_RENAMED = {
    "unstable_expanded_timeline": "expanded_timeline",
    "invite_state": "stripped_state",
    "timeline": "timeline_events",
}


def _as_accepted(room: dict[str, Any]) -> dict[str, Any]:
    """Spec: MSC4186, changelog."""
    gone = room.pop("gone", ())
    if gone:
        stubs = [{"type": event_type, "state_key": state_key} for event_type, state_key in gone]
        room["required_state"] = [*room.get("required_state", ()), *stubs]
    if not room["lists"]:
        del room["lists"]
    if "invite_state" in room:
        # Of a room that she has not been in, nothing but the stripped state.
        room = {key: room[key] for key in ("bump_stamp", "membership", "lists", "invite_state") if key in room}
    return {_RENAMED.get(name, name): value for name, value in room.items()}
