"""What one transaction tells a service: everything of the log in (after, upto] that concerns it, always the same.

Events, to-device messages and changed device lists have their places on the one number line, so that a transaction which
is put together again after a crash says what it said before. Key counts are those of the moment. Not here: when it is
sent (`delivery`). Spec: application-service-api/#pushing-events, MSC3202, MSC4203.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from relay.appservices.registration import Registration
from relay.appservices.services import Services
from relay.appservices.whereabouts import Whereabouts
from relay.bell import Bell
from relay.db import Database, Query, Row, Tx
from relay.keys.device_queues import TOPIC as TO_DEVICE
from relay.keys.one_time_keys import OneTimeKeys
from relay.keys.published import Published
from relay.keys.to_device import ToDevice
from relay.rooms import format
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.rooms.store import Stored

MAX_EVENTS = 100
MAX_TO_DEVICE = 100
# Many services take bodies of at most 1 MiB; messages to devices stand in it under two names.
MAX_EVENTS_BYTES = 384 * 1024
MAX_TO_DEVICE_BYTES = 128 * 1024
MAX_LISTS_OF_A_ROOM = 1_000
# Key counts of a service with more devices are told where these get messages.
MAX_DEVICES_COUNTED = 50

Device = tuple[str, str]


@dataclass(slots=True)
class Told:
    """`upto` is how far it reaches, which may be less than what was asked for."""

    upto: int
    events: list[Any] = field(default_factory=list)
    to_device: list[dict[str, Any]] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    counts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    fallbacks: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.events or self.to_device or self.changed or self.left)

    def body(self, ephemeral: list[dict[str, Any]], *, encrypts: bool) -> bytes:
        """Each thing under its standard name and under the one that services know from before."""
        body: dict[str, Any] = {"events": self.events}
        if ephemeral:
            body["ephemeral"] = body["de.sorunome.msc2409.ephemeral"] = ephemeral
        if encrypts:
            if self.to_device:
                body["to_device"] = body["de.sorunome.msc2409.to_device"] = self.to_device
            for name, value in (
                ("device_lists", {"changed": sorted(self.changed), "left": sorted(self.left)}),
                ("device_one_time_keys_count", self.counts),
                ("device_unused_fallback_key_types", self.fallbacks),
            ):
                body[name] = body[f"org.matrix.msc3202.{name}"] = value
        return orjson.dumps(body)


@dataclass(slots=True)
class _Read:
    upto: int
    events: list[Stored]
    aliases: dict[str, list[str]]
    to_device: list[Row]
    lists: list[str]


class Teller:
    """Puts together what one service is told."""

    def __init__(
        self,
        one: Registration,
        services: Services,
        db: Database,
        bell: Bell,
        rooms: Rooms,
        whereabouts: Whereabouts,
        to_device: ToDevice,
        published: Published,
        one_time_keys: OneTimeKeys,
        stripped: Callable[[Room, str], Awaitable[list[Any]]],
    ) -> None:
        self._one = one
        self._services = services
        self._db = db
        self._bell = bell
        self._rooms = rooms
        self._whereabouts = whereabouts
        self._to_device = to_device
        self._published = published
        self._one_time_keys = one_time_keys
        self._stripped = stripped
        # Of its users, where it keeps their keys; the delivery fills it and follows the changes.
        self.devices: set[Device] = set()

    def covers(self, user_id: str) -> bool:
        return self._services.covers(self._one, user_id)

    def owned(self, user_id: str | None) -> bool:
        return user_id is not None and self._services.owned(self._one, user_id)

    def _hers(self) -> set[Device]:
        """The devices of those for whom it may act now."""
        if not self._services.moderating.people:
            return self.devices
        return {device for device in self.devices if not self._services.keeps_off(self._one, device[0])}

    async def tell(self, after: int, upto: int) -> Told:
        await self._services.moderating.look()
        read = await self._db.read(self._read, after, upto, self._rung(after))
        told = Told(read.upto)
        concerned = [one for one in read.events if one.shown and self._concerns(one, read.aliases)]
        told.events = await self._events(concerned) + await self._elsewhere(after, read.upto)
        if self._one.encrypts:
            told.to_device = [
                {
                    "type": event_type,
                    "sender": sender,
                    "to_user_id": user_id,
                    "to_device_id": device_id,
                    "content": orjson.Fragment(content),
                }
                for _, user_id, device_id, sender, event_type, content in read.to_device
            ]
            await self._lists(told, read.lists, concerned)
            if not told.empty:
                await self._count(told)
        return told

    def _rung(self, after: int) -> list[Device]:
        """The devices that may have got messages."""
        found = []
        for user_id, device_id in sorted(self._hers()):
            topics = self._bell.topics(user_id, after)
            if topics is None or TO_DEVICE in topics:
                found.append((user_id, device_id))
        return found

    def _read(self, query: Query, after: int, upto: int, rung: list[Device]) -> _Read:
        events = self._rooms.new_events(query, after, upto, MAX_EVENTS)
        if len(events) == MAX_EVENTS:
            upto = events[-1].pos or upto
        fitting = _fitting([len(one.event.raw) for one in events], MAX_EVENTS_BYTES)
        if fitting < len(events):
            events = events[:fitting]
            upto = events[-1].pos or upto
        waiting: list[Row] = []
        lists: list[str] = []
        if rung:
            waiting = self._to_device.queues.waiting_for(query, rung, after, upto, MAX_TO_DEVICE + 1)
            fitting = min(MAX_TO_DEVICE, _fitting([len(row[5]) for row in waiting], MAX_TO_DEVICE_BYTES))
            if len(waiting) > fitting:
                # What was sent at once goes at once.
                upto = waiting[fitting - 1][0]
                waiting = [row for row in waiting if row[0] <= upto]
                events = [one for one in events if (one.pos or 0) <= upto]
        if self._one.encrypts:
            lists = self._published.changed_between(query, after, upto)
        aliases = {}
        if self._one.aliases:
            for room_id in {one.event.room_id for one in events}:
                aliases[room_id] = self._rooms.aliases(query, room_id)
        return _Read(upto, events, aliases, waiting, lists)

    def _concerns(self, one: Stored, aliases: dict[str, list[str]]) -> bool:
        event = one.event
        if self.owned(event.sender) or (event.type == "m.room.member" and self.owned(event.state_key)):
            return True
        if self._whereabouts.were_in_room(event.room_id, one.pos or 0) or self._one.rooms.hold(event.room_id):
            return True
        return any(self._one.aliases.hold(alias) for alias in aliases.get(event.room_id, ()))

    async def concerns_room(self, room_id: str) -> bool:
        """Whether it hears of what passes in this room now."""
        if self._whereabouts.in_room(room_id) or self._one.rooms.hold(room_id):
            return True
        if not self._one.aliases:
            return False
        aliases = await self._db.read(self._rooms.aliases, room_id)
        return any(self._one.aliases.hold(alias) for alias in aliases)

    async def concerns_person(self, user_id: str) -> bool:
        return self.owned(user_id) or not self._whereabouts.rooms().isdisjoint(await self._rooms.rooms_of(user_id))

    def forget_messages(self, tx: Tx, devices: Iterable[Device], upto: int) -> None:
        """The service has them."""
        self._to_device.queues.taken(tx, devices, upto)

    # --- events

    async def _events(self, concerned: list[Stored]) -> list[Any]:
        sender = self._one.sender(self._rooms.server_name)
        by_room: dict[str, list[Stored]] = {}
        for one in concerned:
            by_room.setdefault(one.event.room_id, []).append(one)
        made: dict[str, Any] = {}
        for room_id, shown in by_room.items():
            version = shown[0].event.version
            dressed = await format.dressed(self._db, version, shown, user_id=sender, device_id=None, room_id=room_id)
            made.update((one.id, fragment) for one, fragment in zip(shown, dressed, strict=True))
            for one in shown:
                if self._invites_ours(one):
                    made[one.id] = await self._invite(one, room_id, one.event.state_key or "")
        return [made[one.id] for one in concerned]

    def _invites_ours(self, one: Stored) -> bool:
        return (
            one.event.type == "m.room.member" and one.event.membership == "invite" and self.owned(one.event.state_key)
        )

    async def _invite(self, one: Stored, room_id: str, user_id: str) -> Any:
        room = await self._rooms.get(room_id)
        known = await self._stripped(room, user_id) if room is not None else []
        return format.finished(format.shared_body(one), room_id, {"invite_room_state": known})

    async def _elsewhere(self, after: int, upto: int) -> list[Any]:
        """Member events of its users in rooms whose history is not ours: invites from other servers, and their end."""
        found = []
        for move in self._whereabouts.moves(after, upto):
            one = await self._rooms.event(move.event_id)
            if one is None or one.pos is not None or one.rejected:
                continue
            if self._invites_ours(one):
                found.append(await self._invite(one, move.room_id, move.user_id))
            else:
                found.append(format.finished(format.shared_body(one), move.room_id, {}))
        return found

    # --- keys

    async def _lists(self, told: Told, changed: Iterable[str], concerned: Iterable[Stored]) -> None:
        """Whose devices its users should ask for again, and with whom they no longer share a room."""
        came, went = set(changed), set[str]()
        for one in concerned:
            event = one.event
            if event.type == "m.room.encryption":
                came |= await self._members(event.room_id)
            elif event.type == "m.room.member" and event.state_key is not None:
                room = await self._rooms.get(event.room_id)
                if room is None or not room.encrypted:
                    continue
                to = came if event.membership == "join" else went if event.membership in ("leave", "ban") else set()
                to.add(event.state_key)
                if self.owned(event.state_key):
                    to |= await self._members(event.room_id)
        for user_id in came | went:
            if await self.concerns_person(user_id):
                if user_id in came:
                    told.changed.add(user_id)
            elif user_id in went:
                told.left.add(user_id)

    async def _members(self, room_id: str) -> set[str]:
        room = await self._rooms.get(room_id)
        joined = [user_id for user_id, m in room.members.items() if m == "join"] if room is not None else []
        return set(joined) if len(joined) <= MAX_LISTS_OF_A_ROOM else set()

    async def _count(self, told: Told) -> None:
        got = {(one["to_user_id"], one["to_device_id"]) for one in told.to_device}
        hers = self._hers()
        devices = hers if len(hers) <= MAX_DEVICES_COUNTED else got & hers
        for user_id, device_id in sorted(devices):
            supply = await self._one_time_keys.supply(user_id, device_id)
            told.counts.setdefault(user_id, {})[device_id] = supply.counts
            told.fallbacks.setdefault(user_id, {})[device_id] = supply.unused_fallbacks


def _fitting(sizes: list[int], most: int) -> int:
    """How many of these, from the first on, are together no larger than `most`; one at least."""
    whole = 0
    for number, size in enumerate(sizes):
        whole += size
        if whole > most and number:
            return number
    return len(sizes)
