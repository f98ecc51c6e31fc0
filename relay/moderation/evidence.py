"""Whose event it is: checks V3 to V5 of a disclosure, over what this relay holds of the event. Pure.

The redacted form of an event, which stays when its ciphertext is gone, holds the hash of its content and its server's
signature over that hash. So the ciphertext can come from the reporter and still be proved to be the one that was sent. A
purge here takes `content` only (rooms/redactions.py); of an event whose other keys are not all here, the hash can't be
recomputed, and a person has to judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from relay.errors import BadEvent
from relay.moderation.megolm import ALGORITHM, Unproven
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.versions import RoomVersion

ENCRYPTED = "m.room.encrypted"


@dataclass(frozen=True, slots=True)
class Held:
    """What lies here of an event. `kept_whole`: nothing but its content was ever taken away."""

    event: Event
    content_gone: bool
    kept_whole: bool
    sent_here: bool


def require_encrypted(held: Held) -> None:
    """V2."""
    if held.event.type != ENCRYPTED or held.event.is_state:
        raise Unproven("V2", "The event is not an encrypted message.")
    if not held.content_gone and held.event.content.get("algorithm") != ALGORITHM:
        raise Unproven("V2", "The event is not encrypted with Megolm.")


def rebuilt(held: Held, supplied: Mapping[str, Any] | None) -> Event | Unproven:
    """V3: the event with its content, or why its hash does not hold. Raises Unproven where there is no content at all."""
    if not held.content_gone:
        content: Mapping[str, Any] = held.event.content
    elif supplied is None:
        reason = (
            "The ciphertext is no longer here. Give the event as your client shows it (View source, original event)."
        )
        raise Unproven("V3", reason, result="undisclosed", flag="content_needed")
    else:
        content = supplied
    try:
        event = events.parse({**held.event.pdu, "content": dict(content)}, held.event.version, limits=False)
    except BadEvent:
        return Unproven("V3", "With this content it is not an event of this room.")
    if not events.hash_matches(event):
        return Unproven("V3", "This is not the content whose hash the sender's server signed.")
    return event


def require_same_event(held: Held, event: Event, event_id: str) -> None:
    """V4: the hash of what the signatures cover is the event's ID."""
    if event.id != event_id or held.event.id != event_id:
        raise Unproven("V4", "The event has another ID.")


def identity(pdu: Mapping[str, Any], version: RoomVersion) -> str:
    """The ID that follows from what the signatures cover, recomputed."""
    try:
        return events.parse(dict(pdu), version, limits=False).id
    except BadEvent as bad:
        raise Unproven("V4", "What is held here is not an event.") from bad


def judge_origin(held: Held, event_id: str, hash_holds: Event | Unproven, signature: bool | None) -> Event:
    """V3 to V5 in order, each with its exception. `signature` is None where no key that signed is kept here. Raises Unproven."""
    if identity(held.event.pdu, held.event.version) != event_id:
        # The row itself is not what it says: V3 can't mean anything.
        if isinstance(hash_holds, Unproven):
            raise hash_holds
        raise Unproven("V4", "The event has another ID.")
    if isinstance(hash_holds, Unproven):
        if signature and held.content_gone and not held.kept_whole:
            reason = "The hash can't be recomputed: parts of the event beside its content are no longer here."
            raise Unproven("V3", reason, result="needs_human", flag="keys_missing")
        raise hash_holds
    require_same_event(held, hash_holds, event_id)
    if signature is None:
        raise Unproven(
            "V5",
            "The key that verified the event when it came is not kept here.",
            result="needs_human",
            flag="key_missing",
        )
    if not signature:
        raise Unproven("V5", "The signature of the sender's server does not hold.")
    return hash_holds
