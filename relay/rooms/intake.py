"""What another server sent, made ours: format, signatures, hash and the seal, before any rule is asked.

PDU checks 1 to 3: server-server-api/#checks-performed-on-receipt-of-a-pdu. An event in clear is kept in its redacted
form: its ID and signatures stay valid, its content is gone (the design's section on the seal). Also what somebody is told
of a room that she is not in: the stripped state of an invite or a knock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import structlog

from relay.errors import BadEvent, BadJson, InvalidParam, NotAllowed
from relay.ids import is_user_id
from relay.protocol import event as events
from relay.protocol.auth import check, check_auth_events
from relay.protocol.event import Event
from relay.protocol.seal import Seal
from relay.protocol.versions import RoomVersion
from relay.remote import Remote
from relay.rooms.room import CREATE
from relay.rooms.store import REJECTED, STUB, Stored
from relay.web import require_shallow

log = structlog.get_logger("intake")

# What may be told of a room: the standard names ten types, and there are the inviter's and a few members' names.
MAX_TOLD = 50
MAX_TOLD_BYTES = 64 * 1024
# For the keys of servers that may be gone.
VERIFY_SECONDS = 10.0
# More than these are hashed in a thread of their own, so that everybody else goes on.
FEW = 100


@dataclass(slots=True)
class Taken:
    """An event fit to be judged. `marks` is STUB where nobody here may see it; `redacts` what a redaction takes back, which
    its kept form may no longer say; `objection` what the room's policy server has against it, once it was looked at;
    `cited` whether somebody who is in the room is known to have built on it."""

    event: Event
    marks: int = 0
    redacts: str | None = None
    looked_at: bool = False
    objection: str | None = None
    cited: bool = False


class Intake:
    def __init__(self, remote: Remote, seal: Seal) -> None:
        self._remote = remote
        self._seal = seal

    def parsed(self, pdus: Iterable[Any], version: RoomVersion, room_id: str, *, limits: bool = True) -> list[Event]:
        """Those that are events of this room; each once."""
        found: dict[str, Event] = {}
        for given in pdus:
            try:
                pdu = _loaded(given) if isinstance(given, (bytes, memoryview)) else given
                event = events.parse(pdu, version, limits=limits)
            except BadEvent as bad:
                log.info("dropped what is not an event", rule=bad.rule)
                continue
            if event.room_id == room_id:
                found.setdefault(event.id, event)
        return list(found.values())

    async def parsed_aside(
        self, pdus: Sequence[Any], version: RoomVersion, room_id: str, *, limits: bool = True
    ) -> list[Event]:
        """The same; many of them in a thread."""
        if len(pdus) <= FEW:
            return self.parsed(pdus, version, room_id, limits=limits)
        return await asyncio.to_thread(self.parsed, pdus, version, room_id, limits=limits)

    async def verified(self, given: Sequence[Event]) -> list[Taken]:
        """Those with all their signatures, in the form that we keep."""
        if not given:
            return []
        valid = await self._remote.verified(given)
        good = [event for event, holds in zip(given, valid, strict=True) if holds]
        if len(good) <= FEW:
            return [self.kept_form(event) for event in good]
        return await asyncio.to_thread(lambda: [self.kept_form(event) for event in good])

    def kept_form(self, event: Event) -> Taken:
        """PDU check 3 and the seal."""
        if not events.hash_matches(event):
            # A redacted copy is a normal thing to get; what it was before is nobody's to claim.
            event = events.redacted(event)
        redacts = event.redacts
        decision = self._seal.incoming(event).decision
        if decision == "keep" or self._seal.clear_in(event.room_id, event.type, event.is_state):
            return Taken(event, 0, redacts)
        kept = events.redacted(event)
        return Taken(kept, STUB if decision == "stub" else 0, redacts)

    async def take(
        self, pdus: Sequence[Any], version: RoomVersion, room_id: str, *, limits: bool = True
    ) -> list[Taken]:
        return await self.verified(await self.parsed_aside(pdus, version, room_id, limits=limits))

    # --- what is told of a room

    async def told(self, given: Sequence[Any], version: RoomVersion, room_id: str) -> list[dict[str, Any]]:
        """The stripped state for the person's clients, as far as the seal lets it lie on disk. Raises InvalidParam.
        Spec: the checks on `invite_room_state` and `knock_room_state`, due from version 12 on."""
        if len(given) > MAX_TOLD:
            raise InvalidParam(f"More than {MAX_TOLD} entries of the room's state were sent along.")
        if version.room_id_is_create:
            stripped = await self._from_events(given, version, room_id)
        else:
            # Before, both whole events and their stripped form are in use.
            stripped = [_stripped(one) for one in given if _is_stripped(one)]
        # What is empty, or was emptied by the seal just now, tells nothing.
        told = [
            one
            for one in stripped
            if one["content"] and self._seal.rule(one["type"], one["state_key"], one["content"]) is not None
        ]
        if len(orjson.dumps(told)) > MAX_TOLD_BYTES:
            raise InvalidParam(f"More than {MAX_TOLD_BYTES} bytes of the room's state were sent along.")
        return told

    async def _from_events(self, given: Sequence[Any], version: RoomVersion, room_id: str) -> list[dict[str, Any]]:
        parsed = []
        for pdu in given:
            try:
                one = events.parse(pdu, version)
            except BadEvent as bad:
                raise InvalidParam(
                    f"The room's state sent along has an entry that is not an event: {bad.text}."
                ) from bad
            if one.room_id != room_id or one.key is None:
                raise InvalidParam("The room's state sent along has an entry that is not of this room's state.")
            parsed.append(one)
        if all(one.key != CREATE for one in parsed):
            raise InvalidParam("The room's state sent along lacks the m.room.create event.")
        # The create event is the one by its ID. What can't be verified of the others is left out instead of refused:
        # their servers may be gone, and the invite is no less good for it.
        try:
            async with asyncio.timeout(VERIFY_SECONDS):
                taken = await self.verified([one for one in parsed if one.key != CREATE])
        except TimeoutError:
            taken = []
        create = [one for one in parsed if one.key == CREATE]
        return [
            *({**_stripped(one.pdu), "event_id": one.id, "origin_server_ts": one.origin_server_ts} for one in create),
            *(_stripped(each.event.pdu) for each in taken),
        ]


def _loaded(raw: bytes | memoryview) -> Any:
    try:
        pdu = orjson.loads(raw)
        require_shallow(pdu)
    except (orjson.JSONDecodeError, BadJson) as error:
        raise BadEvent("format", "it is not JSON") from error
    return pdu


def _is_stripped(one: Any) -> bool:
    return (
        type(one) is dict
        and isinstance(one.get("type"), str)
        and isinstance(one.get("state_key"), str)
        and isinstance(one.get("content"), dict)
        and is_user_id(one.get("sender"))
    )


def _stripped(one: dict[str, Any]) -> dict[str, Any]:
    """Spec: client-server-api/#stripped-state"""
    return {name: one[name] for name in ("type", "state_key", "content", "sender")}


def in_order(
    given: Iterable[Event], *, by: Callable[[Event], Sequence[str]] = lambda event: event.auth_events
) -> list[Event]:
    """Each event after those that it cites (as auth events, unless said otherwise), as far as they are among the given ones.
    Cycles can't be: IDs are hashes."""
    by_id = {event.id: event for event in given}
    ordered: list[Event] = []
    done: set[str] = set()
    for first in by_id.values():
        waiting = [(first, False)]
        while waiting:
            event, ready = waiting.pop()
            if event.id in done:
                continue
            if ready:
                done.add(event.id)
                ordered.append(event)
                continue
            waiting.append((event, True))
            waiting += [(by_id[cited], False) for cited in by(event) if cited in by_id and cited not in done]
    return ordered


def sorted_out(
    given: Sequence[Taken], have: Mapping[str, Stored], create: Event | None = None
) -> list[tuple[Event, int]]:
    """PDU check 4 of many events that rest on each other, and on those we `have`: each with its marks, REJECTED where its own
    auth events do not allow it. One whose auth events are not all there is left out: of it nothing is known.

    Pure, and long for a large room: for a thread of its own."""
    marks = {one.event.id: one.marks for one in given}
    events = {e: one.event for e, one in have.items()} | {one.event.id: one.event for one in given}
    if create is None:
        create = next((event for event in events.values() if event.key == CREATE), None)
    rejected = {e for e, one in have.items() if one.rejected}
    settled = set(have)
    judged: list[tuple[Event, int]] = []
    for event in in_order(one.event for one in given):
        if event.id in have or any(e not in settled for e in event.auth_events):
            continue
        cited = [events[e] for e in event.auth_events]
        mark = marks[event.id]
        try:
            check_auth_events(event, cited, rejected, create if event.type != "m.room.create" else None)
            check(event, {one.key: one for one in cited if one.key is not None}, create)
        except NotAllowed:
            rejected.add(event.id)
            mark |= REJECTED
        settled.add(event.id)
        judged.append((event, mark))
    return judged
