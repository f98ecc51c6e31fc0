"""What differs between room versions 3 and 12, as one table: code asks for a property, never for a number.

Versions 1 and 2 (event IDs chosen by their sender, state resolution v1) are not supported. Spec: rooms/.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, eq=False)
class RoomVersion:
    name: str
    # Format
    event_id_urlsafe: bool = True
    strict_json: bool = True
    max_depth: int = 2**53 - 1
    # IDs, types and state keys of 255 bytes at most; before version 11 others counted characters, and such events are about.
    strict_lengths: bool = True
    redacts_in_content: bool = True
    room_id_is_create: bool = True
    # Signatures: the key must have been valid at origin_server_ts.
    strict_keys: bool = True
    # Authorization
    aliases_rule: bool = False
    notifications_levels: bool = True
    knock: bool = True
    restricted: bool = True
    knock_restricted: bool = True
    integer_levels: bool = True
    create_creator: bool = False
    creators_privileged: bool = True
    # State resolution
    state_res: str = "v2.1"
    # Redaction
    redact_keeps_origin: bool = False
    redact_keeps_aliases: bool = False
    redact_keeps_allow: bool = True
    redact_keeps_authoriser: bool = True
    redact_keeps_create: bool = True
    redact_keeps_third_party: bool = True
    redact_keeps_invite_level: bool = True
    redact_keeps_redacts: bool = True

    def __str__(self) -> str:
        return self.name


_V12 = RoomVersion("12")
_V11 = replace(_V12, name="11", room_id_is_create=False, creators_privileged=False, state_res="v2")
_V10 = replace(
    _V11,
    name="10",
    strict_lengths=False,
    redacts_in_content=False,
    create_creator=True,
    redact_keeps_origin=True,
    redact_keeps_create=False,
    redact_keeps_third_party=False,
    redact_keeps_invite_level=False,
    redact_keeps_redacts=False,
)
_V9 = replace(_V10, name="9", knock_restricted=False, integer_levels=False)
_V8 = replace(_V9, name="8", redact_keeps_authoriser=False)
_V7 = replace(_V8, name="7", restricted=False, redact_keeps_allow=False)
_V6 = replace(_V7, name="6", knock=False)
_V5 = replace(
    _V6,
    name="5",
    strict_json=False,
    max_depth=2**63 - 1,
    aliases_rule=True,
    notifications_levels=False,
    redact_keeps_aliases=True,
)
_V4 = replace(_V5, name="4", strict_keys=False)
_V3 = replace(_V4, name="3", event_id_urlsafe=False)

VERSIONS: dict[str, RoomVersion] = {v.name: v for v in (_V3, _V4, _V5, _V6, _V7, _V8, _V9, _V10, _V11, _V12)}
DEFAULT = "12"
