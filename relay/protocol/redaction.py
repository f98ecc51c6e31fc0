"""What is left of an event when it is redacted: exactly the part that its ID and its signatures cover.

Not about who may redact (`power.py`, and the rooms that apply a redaction). Spec: rooms/v12/#redactions and its
forerunners.
"""

from __future__ import annotations

from typing import Any

from relay.protocol.versions import RoomVersion

_TOP_KEYS = frozenset(
    {
        "event_id",
        "type",
        "room_id",
        "sender",
        "state_key",
        "content",
        "hashes",
        "signatures",
        "depth",
        "prev_events",
        "auth_events",
        "origin_server_ts",
    }
)
_OLD_TOP_KEYS = _TOP_KEYS | {"prev_state", "origin", "membership"}

_LEVELS = (
    "users",
    "users_default",
    "events",
    "events_default",
    "state_default",
    "ban",
    "kick",
    "redact",
)


def redact(pdu: dict[str, Any], version: RoomVersion) -> dict[str, Any]:
    """A new event; its parts are shared with the old one. `unsigned` goes."""
    keep = _OLD_TOP_KEYS if version.redact_keeps_origin else _TOP_KEYS
    kept = {key: value for key, value in pdu.items() if key in keep}
    kept["content"] = redact_content(pdu["type"], pdu["content"], version)
    return kept


def redact_content(event_type: str, content: dict[str, Any], version: RoomVersion) -> dict[str, Any]:
    if event_type == "m.room.member":
        return _redact_member(content, version)
    if event_type == "m.room.create":
        if version.redact_keeps_create:
            return content
        return _only(content, ("creator",))
    if event_type == "m.room.power_levels":
        return _only(content, (*_LEVELS, "invite") if version.redact_keeps_invite_level else _LEVELS)
    if event_type == "m.room.join_rules":
        return _only(content, ("join_rule", "allow") if version.redact_keeps_allow else ("join_rule",))
    if event_type == "m.room.history_visibility":
        return _only(content, ("history_visibility",))
    if event_type == "m.room.redaction" and version.redact_keeps_redacts:
        return _only(content, ("redacts",))
    if event_type == "m.room.aliases" and version.redact_keeps_aliases:
        return _only(content, ("aliases",))
    return {}


def _redact_member(content: dict[str, Any], version: RoomVersion) -> dict[str, Any]:
    names = ("membership", "join_authorised_via_users_server") if version.redact_keeps_authoriser else ("membership",)
    kept = _only(content, names)
    third_party = content.get("third_party_invite")
    if version.redact_keeps_third_party and isinstance(third_party, dict):
        kept["third_party_invite"] = _only(third_party, ("signed",))
    return kept


def _only(content: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: content[name] for name in names if name in content}
