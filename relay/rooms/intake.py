"""What another server sent, made ours: format, signatures, hash and the seal, before any rule is asked.

PDU checks 1 to 3: server-server-api/#checks-performed-on-receipt-of-a-pdu. An event in clear is kept in its redacted
form: its ID and signatures stay valid, its content is gone (the design's section on the seal).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from relay.errors import BadEvent
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.seal import Seal
from relay.protocol.versions import RoomVersion
from relay.remote import Remote
from relay.rooms.store import STUB

log = structlog.get_logger("intake")


@dataclass(slots=True)
class Taken:
    """An event fit to be judged. `marks` is STUB where nobody here may see it; `redacts` what a redaction takes back, which
    its kept form may no longer say."""

    event: Event
    marks: int = 0
    redacts: str | None = None


class Intake:
    def __init__(self, remote: Remote, seal: Seal) -> None:
        self._remote = remote
        self._seal = seal

    def parsed(self, pdus: Iterable[Any], version: RoomVersion, room_id: str, *, limits: bool = True) -> list[Event]:
        """Those that are events of this room; each once."""
        found: dict[str, Event] = {}
        for pdu in pdus:
            try:
                event = events.parse(pdu, version, limits=limits)
            except BadEvent as bad:
                log.info("dropped what is not an event", rule=bad.rule)
                continue
            if event.room_id == room_id:
                found.setdefault(event.id, event)
        return list(found.values())

    async def verified(self, given: Sequence[Event]) -> list[Taken]:
        """Those with all their signatures, in the form that we keep."""
        if not given:
            return []
        valid = await self._remote.verified(given)
        return [self.kept_form(event) for event, good in zip(given, valid, strict=True) if good]

    def kept_form(self, event: Event) -> Taken:
        """PDU check 3 and the seal."""
        redacts = event.redacts
        if not events.hash_matches(event):
            # A redacted copy is a normal thing to get; what it was before is nobody's to claim.
            event = events.redacted(event)
        decision = self._seal.incoming(event).decision
        if decision == "keep":
            return Taken(event, 0, redacts)
        kept = events.redacted(event)
        return Taken(kept, STUB if decision == "stub" else 0, redacts)

    async def take(
        self, pdus: Iterable[Any], version: RoomVersion, room_id: str, *, limits: bool = True
    ) -> list[Taken]:
        return await self.verified(self.parsed(pdus, version, room_id, limits=limits))


def in_order(given: Iterable[Event]) -> list[Event]:
    """Each event after the auth events it cites, as far as they are among the given ones. Cycles can't be: IDs are hashes."""
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
            waiting += [(by_id[cited], False) for cited in event.auth_events if cited in by_id and cited not in done]
    return ordered
