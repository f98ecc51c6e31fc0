"""Who has to hear that somebody's public keys changed: clients here through /sync and /keys/changes, other servers by EDU.

Every change of a local list gets a number of the line, which is its `stream_id` too. A device that is deleted leaves a
row behind (`published.device_deleted`); `run` announces it, since whoever deletes it cannot wait for the list of servers.
Spec: client-server-api/#tracking-the-device-list-for-a-user, server-server-api/#device-management.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import orjson
import structlog

from relay.clock import Clock
from relay.db import Database, Query, Tx
from relay.departures import Departures
from relay.errors import ApiError, InvalidParam, MissingParam
from relay.keys.published import Published
from relay.keys.user_signatures import UserSignatures
from relay.part import Part, SyncAsk, SyncShare
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.web import Answer, Request, Route

log = structlog.get_logger("device_lists")

TOPIC = "device_lists"
DEVICE_EDU = "m.device_list_update"
SIGNING_EDU = "m.signing_key_update"
_TOKEN = re.compile(r"s(\d{1,10})_(\d{1,18})_")

MAX_ROOMS_NOTED = 20_000
ANNOUNCED_AT_ONCE = 100
RETRY_SECONDS = 30.0


@dataclass(slots=True, frozen=True)
class Audience:
    """Whom a change of one person's keys concerns."""

    local: set[str]
    servers: set[str]


class DeviceLists(Part):
    def __init__(
        self, db: Database, clock: Clock, published: Published, rooms: Rooms, departures: Departures, server_name: str
    ) -> None:
        self._db = db
        self._clock = clock
        self._published = published
        self._rooms = rooms
        self._departures = departures
        self._server_name = server_name
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._deleted = asyncio.Event()
        # Room -> pos of its latest join or leave; `_floor` is what may have been before that. Entries of `memberships`.
        self._moves: dict[str, int] = {}
        self._floor: int | None = None
        rooms.on_membership.append(self._take_move)

    def routes(self) -> Iterable[Route]:
        yield Route("GET", "/_matrix/client/v3/keys/changes", self._changes_route, limit="keys")

    # --- announcing changes of local lists

    def lock(self, user_id: str) -> asyncio.Lock:
        """Held from reading a list until its change is committed, so that each update names the one before it."""
        lock = self._locks.get(user_id)
        if lock is None:
            lock = self._locks[user_id] = asyncio.Lock()
        return lock

    async def audience(self, user_id: str) -> Audience:
        return Audience(
            await self._rooms.local_neighbours(user_id) | {user_id}, await self._rooms.servers_sharing(user_id)
        )

    def announce_device(
        self, tx: Tx, audience: Audience, user_id: str, device_id: str, keys: bytes | None, previous: int
    ) -> int:
        """One device has other keys, or (None) is gone. Returns the update's number, for the next one to name."""
        stream = tx.pos()
        content: dict[str, Any] = {
            "user_id": user_id,
            "device_id": device_id,
            "stream_id": stream,
            "prev_id": [previous] if previous else [],
        }
        # The device's display name stays here: it is for its owner only.
        if keys is None:
            content["deleted"] = True
        else:
            content["keys"] = orjson.Fragment(keys)
        self._departures.durable(tx, audience.servers, DEVICE_EDU, content)
        self._published.moved(tx, user_id, stream, stream)
        tx.ring(audience.local, TOPIC)
        return stream

    def announce_signing_keys(
        self, tx: Tx, audience: Audience, user_id: str, master: bytes | None, self_signing: bytes | None, stream: int
    ) -> None:
        """The keys that others may see changed. They are no part of the numbered updates."""
        content: dict[str, Any] = {"user_id": user_id}
        if master is not None:
            content["master_key"] = orjson.Fragment(master)
        if self_signing is not None:
            content["self_signing_key"] = orjson.Fragment(self_signing)
        pos = tx.pos()
        if len(content) > 1:
            self._departures.durable(tx, audience.servers, SIGNING_EDU, content)
        self._published.moved(tx, user_id, pos, stream)
        tx.ring(audience.local, TOPIC)

    def device_deleted(self, tx: Tx, user_id: str, device_id: str) -> None:
        self._published.device_deleted(tx, user_id, device_id)
        tx.after(self._deleted.set)

    async def run(self) -> None:
        self._deleted.set()  # what a crash left behind
        while True:
            await self._deleted.wait()
            self._deleted.clear()
            try:
                while await self._announce_deleted():
                    pass
            except ApiError as full:
                log.warning("deleted devices could not be announced yet", exc_info=full)
                self._deleted.set()
                await self._clock.sleep(RETRY_SECONDS)

    async def _announce_deleted(self) -> bool:
        rows = await self._published.unannounced(ANNOUNCED_AT_ONCE)
        for pos, user_id, device_id in rows:
            audience = await self.audience(user_id)
            async with self.lock(user_id):
                known = await self._published.of(user_id)
                with self._db.write() as tx:
                    # The same ID may have signed in again meanwhile.
                    self.announce_device(tx, audience, user_id, device_id, known.devices.get(device_id), known.stream)
                    self._published.announced(tx, pos)
                await tx
        return bool(rows)

    async def came_to_light(self, room: Room, servers: set[str], since: int) -> None:
        """Servers in a room of which we learn only now: that somebody's keys changed since then is news to them, as long as
        they share a room with her."""
        changed = await self._db.read(
            lambda query: self._published.changed_between(query, since, self._db.stable_pos())
        )
        for user_id in room.local_joined.intersection(changed):
            sharing = servers & await self._rooms.servers_sharing(user_id)
            async with self.lock(user_id):
                known = await self._published.of(user_id)
                for device_id, keys in list(known.devices.items())[:1]:
                    # It names nothing before it, so that they ask for the whole list.
                    content = {"user_id": user_id, "device_id": device_id, "stream_id": known.stream, "prev_id": []}
                    with self._db.write() as tx:
                        self._departures.durable(tx, sharing, DEVICE_EDU, {**content, "keys": orjson.Fragment(keys)})
                    await tx

    # --- what clients hear

    def _take_move(self, room: Room, user_id: str, before: str | None, now: str, pos: int) -> None:
        if (before == "join") == (now == "join"):
            return
        if len(self._moves) >= MAX_ROOMS_NOTED and room.room_id not in self._moves:
            self._floor = max(self._moves.values())
            self._moves.clear()
        self._moves[room.room_id] = pos

    def _moved_since(self, room_ids: Iterable[str], since: int) -> list[str]:
        if self._floor is None:
            # This process has seen nothing of what was before its first /sync.
            self._floor = self._db.stable_pos()
        if since < self._floor:
            return list(room_ids)
        moves = self._moves
        return [room_id for room_id in room_ids if moves.get(room_id, 0) > since]

    async def changes(self, ask: SyncAsk, share: SyncShare) -> None:
        """Only in incremental answers: who syncs for the first time tracks nobody yet."""
        if ask.since is None:
            return
        joined = self._rooms.joined(ask.user_id)
        concerned = joined if ask.topics is None else joined & ask.topics
        moved = self._moved_since(concerned, ask.since)
        news = ask.concerns(TOPIC)
        # Where the members came after the join, the room is as good as new.
        newly = ask.newly_joined | {r for r in concerned if self._rooms.completed_since(r, ask.since)}
        if not (moved or news or newly or ask.left_rooms):
            return
        changed, left = await self._between(
            ask.user_id, ask.since, ask.upto, moved, newly & joined, ask.left_rooms - joined, news=news
        )
        share.device_lists_changed |= changed
        share.device_lists_left |= left

    async def _changes_route(self, request: Request) -> Answer:
        since, upto = self._token(request, "from"), self._token(request, "to")
        # `to` is a hint: whatever changed since then is better told now than too late.
        upto = max(upto, self._db.stable_pos())
        memberships = self._rooms.memberships(request.user_id)
        joined = self._rooms.joined(request.user_id)
        began = {
            room_id
            for room_id, one in memberships.items()
            if one.since_pos > since or self._rooms.completed_since(room_id, since)
        }
        changed, left = await self._between(
            request.user_id, since, upto, self._moved_since(joined, since), joined & began, began - joined, news=True
        )
        return {"changed": sorted(changed), "left": sorted(left)}

    def _token(self, request: Request, name: str) -> int:
        """The pos of a /sync token (see sync/token.py); 0, from the beginning, for one of another epoch."""
        text = request.query.get(name)
        if text is None:
            raise MissingParam(f"The parameter {name} is missing. Give the next_batch of an earlier /sync.")
        found = _TOKEN.match(text)
        if found is None:
            raise InvalidParam(f"The parameter {name} is not a token of /sync.")
        return int(found[2]) if int(found[1]) == self._db.epoch else 0

    async def _between(
        self,
        user_id: str,
        since: int,
        upto: int,
        moved: Iterable[str],
        newly_joined: Iterable[str],
        left_rooms: Iterable[str],
        *,
        news: bool,
    ) -> tuple[set[str], set[str]]:
        """(whose keys to ask for again, who no longer shares a room) of what happened in (since, upto].

        Rooms without encryption count as well, as they do elsewhere: a room may turn encryption on at any time, and clients
        that were told of nobody until then would have to ask for everybody at once.
        """
        left_rooms = list(left_rooms)
        rows, log_rows = await self._db.read(self._read_changes, user_id, since, upto, [*moved, *left_rooms], news=news)
        with_changes = set(rows)
        came: set[str] = set()
        went: set[str] = set()
        was_in: set[str] = set()
        for room_id, who, before, now, _ in log_rows:
            if (before == "join") == (now == "join"):
                continue
            if who == user_id and before == "join":
                was_in.add(room_id)
            (came if now == "join" else went).add(who)
        for room_id in newly_joined:
            came |= await self._members(room_id)
        for room_id in left_rooms:
            if room_id in was_in:
                went |= await self._members(room_id)
        # Who comes into a room is told of herself as well: her other devices may not know yet who is in it.
        went.discard(user_id)
        if not (with_changes or came or went):
            return set(), set()
        sharing = await self._sharing(user_id, with_changes | came | went)
        # Who left and came back may have changed keys meanwhile without our hearing of it.
        return (with_changes | came) & sharing, went - sharing

    def _read_changes(
        self, query: Query, user_id: str, since: int, upto: int, room_ids: list[str], *, news: bool
    ) -> tuple[list[str], list[tuple[str, str, str | None, str, int]]]:
        changed = []
        if news:
            changed = self._published.changed_between(query, since, upto) + UserSignatures.made_between(
                query, user_id, since, upto
            )
        return changed, self._rooms.membership_changes(query, room_ids, since, upto) if room_ids else []

    async def _members(self, room_id: str) -> set[str]:
        room = await self._rooms.get(room_id)
        if room is None:
            return set()
        return {user_id for user_id, membership in room.members.items() if membership == "join"}

    async def _sharing(self, user_id: str, candidates: set[str]) -> set[str]:
        """Who of the candidates shares a room with the user. Oneself always does."""
        sharing = candidates & {user_id}
        for room_id in self._rooms.joined(user_id):
            if len(sharing) == len(candidates):
                break
            room = await self._rooms.get(room_id)
            if room is not None:
                sharing |= {who for who in candidates if room.members.get(who) == "join"}
        return sharing
