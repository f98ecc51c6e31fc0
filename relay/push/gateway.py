"""Waking phones: follows the log, asks each person's rules, and tells the gateways of her devices. Not who has which.

What is to be told is a row until the gateway has taken it, so a crash loses nothing; a gateway that is down is left alone
for longer each time and keeps nobody else waiting. What was read or taken back meanwhile is not told any more. A gateway
learns the event's ID; other fields only where the app did not ask for `event_id_only`, and never ciphertext.
Spec: client-server-api/#push-notifications, push-gateway-api.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import orjson
import structlog

from relay.bell import Bell
from relay.clock import HOUR, SECOND, Clock
from relay.db import FOLLOWED, Database, Query, Row, Tx
from relay.errors import RemoteError
from relay.part import Part
from relay.protocol.pushrules import EventView
from relay.push.badges import Badges
from relay.push.pushers import Pusher, Pushers
from relay.push.rules import PushRules
from relay.remote import Posts
from relay.rooms import format
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.rooms.store import Key, Stored
from relay.tables import Schema, Table

log = structlog.get_logger("push")

FOLLOWER = "push"
MAX_EVENTS_AT_ONCE = 200
# The position is written at least this often, so that a restart looks through little again.
MAX_POS_UNWRITTEN = 1_000

MAX_REQUESTS = 100
MAX_REQUESTS_PER_GATEWAY = 8
MAX_TAKEN_AT_ONCE = 50
TIMEOUT_SECONDS = 20.0
MAX_ANSWER_BYTES = 64 * 1024
BACKOFF_MIN_SECONDS = 1.0
BACKOFF_MAX_SECONDS = HOUR / SECOND
# Of one pusher; the oldest go first. Nothing is lost with them: the app syncs when it is opened.
MAX_WAITING = 100
WAITING_MS = 24 * HOUR
# With these the gateway itself is in trouble; with any other it does not take this notification.
_LATER = frozenset({0, 429, 500, 502, 503, 504})

_LIFE = "until the gateway has taken it, a day at most"

# (pos, user, app_id, pushkey, room, event, tweaks)
_Waiting = tuple[int, str, str, str, str, str, bytes]


class Gateway(Part):
    schema = Schema(
        "push_gateway",
        tables=(
            Table(
                "waiting_pushes",
                "an event's ID on its way to a device",
                {
                    "pos": ("the event's place in the log", _LIFE),
                    "user_id": ("who is to be told", _LIFE),
                    "app_id": ("by which app", _LIFE),
                    "pushkey": ("at which address", _LIFE),
                    "room_id": ("the event's room", _LIFE),
                    "event_id": ("which event", _LIFE),
                    "tweaks": ("sound and highlight, as the person's rules say", _LIFE),
                    "hour": ("since when, to the hour", _LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE waiting_pushes (
                pos BIGINT NOT NULL, user_id TEXT NOT NULL, app_id TEXT NOT NULL, pushkey TEXT NOT NULL,
                room_id TEXT NOT NULL, event_id TEXT NOT NULL, tweaks BYTES NOT NULL, hour BIGINT NOT NULL,
                PRIMARY KEY (user_id, app_id, pushkey, pos));
            CREATE INDEX waiting_pushes_by_hour ON waiting_pushes (hour)
            """,
        ),
    )

    def __init__(
        self,
        db: Database,
        bell: Bell,
        clock: Clock,
        rooms: Rooms,
        rules: PushRules,
        badges: Badges,
        pushers: Pushers,
        posts: Posts,
        ignored_by: Callable[[str], Awaitable[frozenset[str]]],
    ) -> None:
        self._db = db
        self._bell = bell
        self._clock = clock
        self._rooms = rooms
        self._rules = rules
        self._badges = badges
        self._pushers = pushers
        self._posts = posts
        self._ignored_by = ignored_by
        self._requests = asyncio.Semaphore(MAX_REQUESTS)
        # One task for each gateway that has something to hear, by its URL.
        self._lanes: dict[str, asyncio.Event] = {}
        self._group: asyncio.TaskGroup | None = None
        # What each pusher was last told to show; a lost one is only told again.
        self._told: dict[tuple[str, str, str], int] = {}
        self._badge_due: set[tuple[str, str, str]] = set()
        # (room, user) of invites that came; those of a time before this process are read from the memberships.
        self._invited: list[tuple[str, str]] = []
        # (user, room, invite's event ID) -> whether her clients are not to see it; the server sets it.
        self.hides_invite: Callable[[str, str, str], Awaitable[bool]] | None = None
        pushers.on_gone.append(self._forget)
        badges.on_fall.append(self._fell)
        rooms.on_membership.append(self._membership_changed)

    def _membership_changed(self, room: Room, user_id: str, before: str | None, now: str, pos: int) -> None:
        if now == "invite" and self._pushers.of(user_id):
            self._invited.append((room.room_id, user_id))

    def _forget(self, tx: Tx, user_id: str, app_id: str, pushkey: str) -> None:
        tx.run(
            "DELETE FROM waiting_pushes WHERE user_id = $1 AND app_id = $2 AND pushkey = $3", user_id, app_id, pushkey
        )

        def drop() -> None:
            self._told.pop((user_id, app_id, pushkey), None)
            self._badge_due.discard((user_id, app_id, pushkey))

        tx.after(drop)

    # --- following the log

    async def run(self) -> None:
        await self._pushers.load()
        self._lanes.clear()
        pos = await self._db.followed(FOLLOWER)
        if pos is None:
            # What was before this relay could push is no news.
            pos = self._db.stable_pos()
            await self._db.follow(FOLLOWER, pos)
        self._invited += await self._db.read(_invited_since, pos)
        async with asyncio.TaskGroup() as group:
            self._group = group
            await self._drop_old()
            for url in {one.url for user_id in self._pushers.users() for one in self._pushers.of(user_id)}:
                self._wake(url)
            try:
                await self._follow(pos)
            finally:
                self._group = None

    async def _follow(self, pos: int) -> None:
        written = pos
        while True:
            upto = self._db.stable_pos()
            if upto <= pos:
                await self._bell.wait_line(pos)
                continue
            rows: list[_Waiting] = []
            if self._pushers.users():
                events = await self._db.read(self._rooms.new_events, pos, upto, MAX_EVENTS_AT_ONCE)
                if len(events) == MAX_EVENTS_AT_ONCE:
                    upto = events[-1].pos or upto
                rows = await self._rows(events) + await self._invites()
            if rows or upto - written > MAX_POS_UNWRITTEN:
                await self._keep(rows, upto)
                written = upto
            pos = upto

    async def _rows(self, events: list[Stored]) -> list[_Waiting]:
        rows: list[_Waiting] = []
        for one in events:
            room = await self._rooms.get(one.event.room_id)
            if room is None or one.taken_back or not one.shown:
                continue
            concerned = self._concerned(room)
            for user_id in concerned:
                self._badges.changed(user_id, room.room_id)
            if not concerned:
                continue
            view = EventView.of(one.event, member_count=room.joined_count, levels=await _levels(room, one))
            for user_id in concerned:
                rows += await self._for(user_id, one, view, one.pos or 0)
        return rows

    def _concerned(self, room: Room) -> list[str]:
        woken, here = self._pushers.users(), room.local_joined
        fewer, others = (woken, here) if len(woken) < len(here) else (here, woken)
        return sorted(user_id for user_id in fewer if user_id in others)

    async def _invites(self) -> list[_Waiting]:
        rows: list[_Waiting] = []
        invited, self._invited = self._invited, []
        for room_id, user_id in invited:
            mine = self._rooms.memberships(user_id).get(room_id)
            one = await self._rooms.event(mine.event_id) if mine is not None and mine.membership == "invite" else None
            if mine is not None and one is not None:
                if self.hides_invite is not None and await self.hides_invite(user_id, room_id, one.id):
                    continue
                rows += await self._for(user_id, one, EventView.of(one.event, member_count=0), mine.pos)
        return rows

    async def _for(self, user_id: str, one: Stored, view: EventView, pos: int) -> list[_Waiting]:
        if one.event.sender == user_id:
            self._fell(user_id)  # who sends has read what was there
            return []
        if one.event.sender in await self._ignored_by(user_id):
            return []
        ruleset = self._rules.known(user_id) or await self._rules.ruleset(user_id)
        actions = ruleset.evaluate(view, user_id)
        if not actions.notify:
            return []
        tweaks = orjson.dumps(dict(actions.tweaks))
        return [(pos, user_id, it.app_id, it.pushkey, view.room_id, one.id, tweaks) for it in self._pushers.of(user_id)]

    async def _keep(self, rows: list[_Waiting], upto: int) -> None:
        hour = self._clock.now() // HOUR * HOUR
        with self._db.write() as tx:
            if rows:
                tx.many(
                    "INSERT INTO waiting_pushes (pos, user_id, app_id, pushkey, room_id, event_id, tweaks, hour)"
                    " VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (user_id, app_id, pushkey, pos) DO NOTHING",
                    [(*row, hour) for row in rows],
                )
            tx.run(FOLLOWED, FOLLOWER, upto)
        await tx
        for user_id in {row[1] for row in rows}:
            for one in self._pushers.of(user_id):
                self._wake(one.url)

    async def _drop_old(self) -> None:
        with self._db.write() as tx:
            tx.run("DELETE FROM waiting_pushes WHERE hour < $1", self._clock.now() - WAITING_MS)
            # Of a pusher that went while nobody looked.
            tx.run(
                "DELETE FROM waiting_pushes WHERE NOT EXISTS (SELECT 1 FROM pushers p WHERE p.user_id = waiting_pushes.user_id"
                " AND p.app_id = waiting_pushes.app_id AND p.pushkey = waiting_pushes.pushkey)"
            )
        await tx

    # --- one gateway

    def _wake(self, url: str) -> None:
        lane = self._lanes.get(url)
        if lane is not None:
            lane.set()
        elif self._group is not None:
            self._lanes[url] = asyncio.Event()
            self._group.create_task(self._lane(url, self._lanes[url]), name="push gateway")

    async def _lane(self, url: str, news: asyncio.Event) -> None:
        """Until there is nothing more to say to this gateway."""
        wait = BACKOFF_MIN_SECONDS
        while True:
            news.clear()
            rows = await self._db.read(_waiting_at, url)
            due = [
                one for key in self._badge_due for one in self._pushers.of(key[0]) if one.key == key and one.url == url
            ]
            if not rows and not due:
                if news.is_set():
                    continue
                del self._lanes[url]
                return
            well = await self._deliver(rows, due)
            if well:
                wait = BACKOFF_MIN_SECONDS
                continue
            log.info("a push gateway does not answer and is left alone for a while", seconds=int(wait))
            await self._clock.sleep(wait)
            wait = min(2 * wait, BACKOFF_MAX_SECONDS)
            await self._trim(url)

    async def _deliver(self, rows: list[Row], due: list[Pusher]) -> bool:
        """False where the gateway itself is in trouble: what it did not take stays."""
        at_once = asyncio.Semaphore(MAX_REQUESTS_PER_GATEWAY)
        done: list[Row] = []
        down = False

        async def deliver(of_one: list[Row]) -> None:
            nonlocal down
            async with at_once:
                for row in of_one:
                    if down or not await self._push(row):
                        down = True
                        return
                    done.append(row)

        async def correct(one: Pusher) -> None:
            nonlocal down
            async with at_once:
                down = down or not await self._correct_badge(one)

        async with asyncio.TaskGroup() as group:
            # Each device hears of its events in order.
            by_pusher: dict[tuple[Any, ...], list[Row]] = {}
            for row in rows:
                by_pusher.setdefault(row[1:4], []).append(row)
            for of_one in by_pusher.values():
                group.create_task(deliver(of_one))
            for one in due:
                group.create_task(correct(one))
        if done:
            with self._db.write() as tx:
                tx.many(
                    "DELETE FROM waiting_pushes WHERE pos = $1 AND user_id = $2 AND app_id = $3 AND pushkey = $4",
                    [row[:4] for row in done],
                )
            await tx
        return not down

    async def _push(self, row: Row) -> bool:
        _, user_id, app_id, pushkey, room_id, event_id, tweaks = row
        pusher = next(
            (one for one in self._pushers.of(user_id) if (one.app_id, one.pushkey) == (app_id, pushkey)), None
        )
        stored = await self._rooms.event(event_id)
        room = await self._rooms.get(room_id)
        if pusher is None or stored is None or room is None or stored.taken_back:
            return True
        membership = self._rooms.membership(room_id, user_id)
        if stored.event.membership == "invite" and stored.event.state_key == user_id:
            if membership != "invite":
                return True
        elif membership != "join" or await self._badges.has_read(user_id, stored):
            return True
        notification = {"event_id": event_id, "room_id": room_id}
        tweaked = orjson.loads(tweaks)
        badge = await self._badges.of(user_id)
        loud = stored.event.type == "m.room.encrypted" or tweaked.get("highlight") or tweaked.get("sound")
        if not pusher.event_id_only:
            notification |= await _told(self._db, room, stored, user_id)
        taken = await self._send(
            pusher, {**notification, "prio": "high" if loud else "low"}, tweaked, badge if pusher.wants_badge else None
        )
        if taken and pusher.wants_badge:
            self._told[pusher.key] = badge
        return taken

    async def _send(
        self, pusher: Pusher, notification: Mapping[str, Any], tweaks: Mapping[str, Any], badge: int | None
    ) -> bool:
        body: dict[str, Any] = {**notification, "devices": [pusher.device(tweaks)]}
        if badge is not None:
            body["counts"] = {"unread": badge}
        try:
            async with self._requests:
                status, said = await self._posts.post(
                    pusher.url,
                    orjson.dumps({"notification": body}),
                    timeout=TIMEOUT_SECONDS,
                    most_bytes=MAX_ANSWER_BYTES,
                )
        except RemoteError:
            return False
        if status in _LATER:
            return False
        rejected = _rejected(said) if status == 200 else []
        if rejected:
            await self._pushers.rejected(pusher.app_id, rejected)
        return True

    async def _trim(self, url: str) -> None:
        """A gateway that stays away finds the latest of each pusher, not all of a week."""
        with self._db.write() as tx:
            for row in {
                one.key for user_id in self._pushers.users() for one in self._pushers.of(user_id) if one.url == url
            }:
                tx.run(
                    "DELETE FROM waiting_pushes WHERE user_id = $1 AND app_id = $2 AND pushkey = $3 AND pos <= "
                    "(SELECT pos FROM waiting_pushes WHERE user_id = $1 AND app_id = $2 AND pushkey = $3 "
                    "ORDER BY pos DESC LIMIT 1 OFFSET $4)",
                    *row,
                    MAX_WAITING,
                )
        await tx
        await self._drop_old()

    # --- the number on the app's icon

    def _fell(self, user_id: str) -> None:
        """Something was read: whoever shows a number is told the new one, soon."""
        for one in self._pushers.of(user_id):
            if one.wants_badge and self._told.get(one.key) != 0:
                self._badge_due.add(one.key)
                self._wake(one.url)

    async def _correct_badge(self, one: Pusher) -> bool:
        self._badge_due.discard(one.key)
        badge = await self._badges.of(one.user_id)
        if self._told.get(one.key) == badge:
            return True
        if not await self._send(one, {"prio": "low"}, {}, badge):
            self._badge_due.add(one.key)
            return False
        self._told[one.key] = badge
        return True


async def _levels(room: Room, one: Stored) -> Any:
    return await room.levels() if "m.mentions" in one.event.content else None


async def _told(db: Database, room: Room, stored: Stored, user_id: str) -> dict[str, Any]:
    """What a gateway learns where the app wants more than the ID: as the standard lists it, without ciphertext."""
    event = stored.event
    told: dict[str, Any] = {"type": event.type, "sender": event.sender}
    wanted: dict[Key, tuple[str, str]] = {
        ("m.room.member", event.sender): ("sender_display_name", "displayname"),
        ("m.room.name", ""): ("room_name", "name"),
        ("m.room.canonical_alias", ""): ("room_alias", "alias"),
    }
    contents = await _contents(db, room, wanted, user_id)
    named = {name: contents[key].get(part) for key, (name, part) in wanted.items() if key in contents}
    told.update({key: value for key, value in named.items() if isinstance(value, str)})
    if event.type == "m.room.member":
        told["user_is_target"] = event.state_key == user_id
    if event.type != "m.room.encrypted":
        told["content"] = format.content(stored)
    return told


async def _contents(db: Database, room: Room, keys: Iterable[Key], user_id: str) -> dict[Key, Mapping[str, Any]]:
    """Some of a room's state: as we have it, else as her invite tells it."""
    if room.known:
        return {key: event.content for key, event in (await room.state_events(keys)).items()}
    raw = await db.read(
        lambda query: query.value(
            "SELECT stripped FROM memberships WHERE room_nid = $1 AND user_id = $2", room.nid, user_id
        )
    )
    told = [one for one in (orjson.loads(bytes(raw)) if raw else ()) if isinstance(one, dict)]
    return {
        key: one["content"]
        for key in keys
        for one in told
        if (one.get("type"), one.get("state_key")) == key and isinstance(one.get("content"), dict)
    }


def _rejected(said: bytes) -> list[str]:
    try:
        body = orjson.loads(said)
    except orjson.JSONDecodeError:
        return []
    rejected = body.get("rejected") if isinstance(body, dict) else None
    return [key for key in rejected if isinstance(key, str)] if isinstance(rejected, list) else []


def _waiting_at(query: Query, url: str) -> list[Row]:
    return query.all(
        "SELECT w.pos, w.user_id, w.app_id, w.pushkey, w.room_id, w.event_id, w.tweaks FROM pushers p"
        " JOIN waiting_pushes w ON w.user_id = p.user_id AND w.app_id = p.app_id AND w.pushkey = p.pushkey"
        " WHERE p.url = $1 ORDER BY w.pos LIMIT $2",
        url,
        MAX_TAKEN_AT_ONCE,
    )


def _invited_since(query: Query, pos: int) -> list[tuple[str, str]]:
    rows = query.all(
        "SELECT r.room_id, m.user_id FROM memberships m JOIN rooms r ON r.nid = m.room_nid"
        " WHERE m.local = 1 AND m.membership = 'invite' AND m.pos > $1 ORDER BY m.pos",
        pos,
    )
    return [(room_id, user_id) for room_id, user_id in rows]
