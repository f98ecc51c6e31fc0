"""The first half of a handshake for an event of ours in a room elsewhere: another server's template is looked at and signed,
and what it gives back is held against what it got. Pure.

Spec: server-server-api/#joining-rooms, #leaving-rooms-rejecting-invites, #knocking-rooms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from relay.errors import BadEvent, RemoteError
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.signing import SigningKey
from relay.remote import Template


def require_asked(
    server: str, template: Template, room_id: str, user_id: str, membership: Literal["join", "leave", "knock"]
) -> None:
    """Raises RemoteError where it is of another event than the one that was asked for."""
    pdu = template.pdu
    content = pdu.get("content")
    if (
        pdu.get("type") != "m.room.member"
        or pdu.get("room_id") != room_id
        or pdu.get("sender") != user_id
        or pdu.get("state_key") != user_id
        or not isinstance(content, dict)
        or content.get("membership") != membership
    ):
        raise RemoteError(server, 502, "its template is not the event that was asked for")


def signed(server: str, template: Template, content: Mapping[str, Any], server_name: str, key: SigningKey) -> Event:
    """The event that a template stands for, with this content, from `server_name`, which is ours. Raises RemoteError."""
    pdu, version = {**template.pdu, "content": content}, template.version
    named: dict[str, Any] = {
        k: pdu[k]
        for k in ("type", "room_id", "sender", "state_key", "content", "depth", "prev_events", "auth_events")
        if k in pdu
    }
    named["origin_server_ts"] = pdu.get("origin_server_ts", 0)
    if version.redact_keeps_origin:
        named["origin"] = server_name
    try:
        return events.sign(named, version, server_name, key)
    except BadEvent as bad:
        raise RemoteError(server, 502, f"its template is not an event: {bad.text}") from bad


def same_event(server: str, pdu: Mapping[str, Any], event: Event) -> Event:
    """What it gave back, with its own signature perhaps. Raises RemoteError where that is another event."""
    try:
        returned = events.parse(pdu, event.version)
    except BadEvent as bad:
        raise RemoteError(server, 502, f"it gave back something that is not an event: {bad.text}") from bad
    if returned.id != event.id:
        raise RemoteError(server, 502, "it gave back another event than it got")
    return returned
