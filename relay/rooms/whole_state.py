"""A room's whole state as another server gives it, taken in with bounded memory: by the hundred, the oldest first.

Each event is parsed, its signatures checked (in threads), judged by its own auth events, and stored as an outlier before the
next hundred is looked at; of what was done only IDs are kept. What lies on disk already is not checked again, so an attempt
that breaks off is not lost. Spec: server-server-api/#joining-rooms (the checks on the response to send_join).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson
import structlog

from relay.db import Database, Query
from relay.errors import RemoteError
from relay.protocol.event import Event
from relay.remote import RawPdu
from relay.rooms import store
from relay.rooms.append import Appender
from relay.rooms.intake import Intake, sorted_out
from relay.rooms.room import CREATE, ENCRYPTION, Room
from relay.rooms.state import StateMap
from relay.rooms.store import REJECTED, Key

log = structlog.get_logger("whole_state")

MAX_STATE_EVENTS = 100_000
AT_ONCE = 400
# Events come in the order of their depths; one that lies about its depth may be met again so many times.
MAX_PASSES = 4
TOLD_EVERY = 5_000
NUMBERS_AT_ONCE = 5_000

_DEEPEST = 2**63


@dataclass(slots=True)
class Taken:
    """`current` is the state, `members` the membership of each member event in it."""

    current: StateMap
    members: dict[str, str]


@dataclass(slots=True)
class _Progress:
    settled: dict[str, bool] = field(default_factory=dict)  # event ID -> whether its auth events allow it
    current: dict[Key, str] = field(default_factory=dict)
    members: dict[str, str] = field(default_factory=dict)
    done: int = 0


@dataclass(slots=True)
class Glance:
    """What can be told of a state before anything of it is checked."""

    order: list[int]
    encrypted: bool
    room_type: object
    create: RawPdu | None


class WholeState:
    def __init__(self, db: Database, appender: Appender, intake: Intake) -> None:
        self._db = db
        self._appender = appender
        self._intake = intake

    async def glance(self, server: str, state: Sequence[RawPdu], chain: Sequence[RawPdu]) -> Glance:
        """Raises RemoteError for more than this server takes."""
        if max(len(state), len(chain)) > MAX_STATE_EVENTS:
            raise RemoteError(server, 502, "the room's state is larger than this server takes")
        return await asyncio.to_thread(_glance, state, chain)

    async def take(
        self, server: str, room: Room, state: Sequence[RawPdu], chain: Sequence[RawPdu], glance: Glance, create: Event
    ) -> Taken:
        """Stores what is good of it. Raises RemoteError where it has not the room's create event."""
        progress = _Progress()
        waiting = glance.order
        for _ in range(MAX_PASSES):
            later: list[int] = []
            for start in range(0, len(waiting), AT_ONCE):
                batch = [
                    (index >= len(chain), chain[index] if index < len(chain) else state[index - len(chain)], index)
                    for index in waiting[start : start + AT_ONCE]
                ]
                later += await self._take_some(room, batch, create, progress)
                told = progress.done // TOLD_EVERY
                progress.done += len(batch)
                if progress.done // TOLD_EVERY > told:
                    log.info(
                        "a large room's state is coming in", room_id=room.room_id, server=server,
                        count=progress.done, left=max(0, len(glance.order) - progress.done),
                    )  # fmt: skip
            if not later or len(later) == len(waiting):
                break
            waiting = later
        if progress.current.get(CREATE) != create.id:
            raise RemoteError(server, 502, "the state it gave has not the room's create event")
        return await self._numbered(progress)

    async def _take_some(
        self, room: Room, batch: Sequence[tuple[bool, RawPdu, int]], create: Event, progress: _Progress
    ) -> list[int]:
        """Those that have to be looked at again: what authorises them has not come yet."""
        of_state = {index for is_state, _, index in batch if is_state}
        pdus = [(index, raw) for _, raw, index in batch]
        parsed = await asyncio.to_thread(self._parsed, room, pdus)
        by_id = {event.id: event for event in parsed.values()}
        settled = progress.settled
        unknown = [event_id for event_id in by_id if event_id not in settled]
        settled.update(await self._db.read(_on_disk, unknown, room.nid))
        fresh = await self._intake.verified(
            [by_id[e] for e in unknown if e not in settled and by_id[e].key is not None]
        )
        wanted = {e for one in fresh for e in one.event.auth_events if e not in by_id or e in settled}
        have = await self._db.read(store.by_ids, wanted, room.version)
        have = {e: one for e, one in have.items() if one.room_nid == room.nid}
        kept = await asyncio.to_thread(sorted_out, fresh, have, create)
        if kept:
            with self._db.write() as tx:
                self._appender.outliers(tx, room, kept)
            await tx
        settled.update((event.id, not marks & REJECTED) for event, marks in kept)
        signed = {one.event.id for one in fresh}
        later = []
        for index, event in parsed.items():
            good = settled.get(event.id)
            if good is None:
                if event.id in signed:
                    later.append(index)
            elif good and index in of_state and event.key is not None:
                progress.current[event.key] = event.id
                if event.type == "m.room.member":
                    progress.members[event.key[1]] = event.membership or "leave"
        return later

    def _parsed(self, room: Room, pdus: Sequence[tuple[int, RawPdu]]) -> dict[int, Event]:
        found = {}
        for index, raw in pdus:
            events = self._intake.parsed([raw], room.version, room.room_id)
            if events:
                found[index] = events[0]
        return found

    async def _numbered(self, progress: _Progress) -> Taken:
        keys = list(progress.current)
        current: StateMap = {}
        for start in range(0, len(keys), NUMBERS_AT_ONCE):
            some = keys[start : start + NUMBERS_AT_ONCE]
            numbers = await self._db.read(_numbers, [progress.current[key] for key in some])
            current.update((key, (progress.current[key], numbers[progress.current[key]])) for key in some)
        return Taken(current, progress.members)


def _glance(state: Sequence[RawPdu], chain: Sequence[RawPdu]) -> Glance:
    depths: list[int] = []
    encrypted, create, room_type = False, None, None
    for index, raw in enumerate((*chain, *state)):
        try:
            pdu = orjson.loads(raw)
        except orjson.JSONDecodeError:
            pdu = None
        depth = pdu.get("depth") if isinstance(pdu, dict) else None
        depths.append(depth if type(depth) is int else _DEEPEST)
        if index < len(chain) or not isinstance(pdu, dict) or pdu.get("state_key") != "":
            continue
        content = pdu.get("content")
        if pdu.get("type") == ENCRYPTION[0]:
            encrypted = encrypted or (isinstance(content, dict) and bool(content.get("algorithm")))
        elif pdu.get("type") == CREATE[0] and create is None:
            create, room_type = raw, content.get("type") if isinstance(content, dict) else None
    return Glance(sorted(range(len(depths)), key=depths.__getitem__), encrypted, room_type, create)


def _on_disk(query: Query, event_ids: Sequence[str], room_nid: int) -> dict[str, bool]:
    found = {}
    for event_id in event_ids:
        row = query.one("SELECT marks, room_nid FROM events WHERE event_id = $1", event_id)
        if row is not None and row[1] == room_nid:
            found[event_id] = not row[0] & REJECTED
    return found


def _numbers(query: Query, event_ids: Sequence[str]) -> dict[str, int]:
    return {e: query.value("SELECT nid FROM events WHERE event_id = $1", e) for e in event_ids}
