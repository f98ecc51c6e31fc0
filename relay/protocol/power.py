"""Power levels: who may do what, read from a room's m.room.create and m.room.power_levels events.

Not about changes of power levels (rule 11 in `auth.py`). Levels in room versions below 10 may be strings or floats.
Spec: client-server-api/#mroompower_levels, rooms/fragments (stringy and floaty power levels), rooms/v12/#authorisation-rules.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from relay.ids import server_of

if TYPE_CHECKING:
    from relay.protocol.event import Event
    from relay.protocol.versions import RoomVersion

# Creators of version 12 stand above every integer.
INFINITE = math.inf
CREATOR_LEVEL = 100

DEFAULT_STATE = 50
DEFAULT_EVENTS = 0
DEFAULT_USERS = 0
DEFAULT_INVITE = 0
DEFAULT_MODERATION = 50
DEFAULT_NOTIFICATION = 50

# What Python's int() reads, less than that: base 10, ASCII digits, one sign, white space around.
_STRINGY = re.compile(r"\s*[+-]?[0-9]{1,4000}\s*\Z")


def read_level(value: object, version: RoomVersion) -> int | None:
    """A level as the room version allows it to be written, or None if it isn't one."""
    if type(value) is int:
        return value
    if version.integer_levels:
        return None
    if isinstance(value, str) and _STRINGY.match(value):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return int(value)
    return None


def creators(create: Event) -> frozenset[str]:
    """Spec: rooms/v12/#authorisation-rules (room creators). Before version 12 it is one user."""
    if create.version.create_creator:
        creator = create.content.get("creator")
        return frozenset((creator,)) if isinstance(creator, str) else frozenset()
    if not create.version.creators_privileged:
        return frozenset((create.sender,))
    more = create.content.get("additional_creators")
    named = more if isinstance(more, list) else []
    return frozenset((create.sender, *(user for user in named if isinstance(user, str))))


class Levels:
    """The levels that hold at one point of a room."""

    __slots__ = ("_content", "_creators", "_users", "_version", "has_event")

    def __init__(self, create: Event, power_levels: Event | None) -> None:
        self._version = create.version
        self._creators = creators(create)
        self.has_event = power_levels is not None
        self._content: dict[str, Any] = {} if power_levels is None else power_levels.content
        self._users = _object(self._content, "users")

    @classmethod
    def of(cls, create: Event, power_levels: Event | None) -> Levels:
        return cls(create, power_levels)

    def user(self, user_id: str) -> int | float:
        if user_id in self._creators:
            if self._version.creators_privileged:
                return INFINITE
            if not self.has_event:
                return CREATOR_LEVEL
        level = read_level(self._users.get(user_id), self._version)
        return self.users_default if level is None else level

    def to_send(self, event_type: str, is_state: bool) -> int:
        """Spec: server-server-api/#definitions, the required power level."""
        level = read_level(_object(self._content, "events").get(event_type), self._version)
        if level is not None:
            return level
        return self.state_default if is_state else self.events_default

    def to_notify(self, whom: str) -> int:
        """What `notifications` asks for, for example for `room` (the "@room" of push rules)."""
        level = read_level(_object(self._content, "notifications").get(whom), self._version)
        return DEFAULT_NOTIFICATION if level is None else level

    def may_redact(self, redactor: str, author: str) -> bool:
        """Spec: rooms/v12/#handling-redactions. Asked when both the redaction and its target are known."""
        return self.user(redactor) >= self.redact or server_of(redactor) == server_of(author)

    @property
    def ban(self) -> int:
        return self._named("ban", DEFAULT_MODERATION)

    @property
    def kick(self) -> int:
        return self._named("kick", DEFAULT_MODERATION)

    @property
    def redact(self) -> int:
        return self._named("redact", DEFAULT_MODERATION)

    @property
    def invite(self) -> int:
        return self._named("invite", DEFAULT_INVITE)

    @property
    def state_default(self) -> int:
        return self._named("state_default", DEFAULT_STATE)

    @property
    def events_default(self) -> int:
        return self._named("events_default", DEFAULT_EVENTS)

    @property
    def users_default(self) -> int:
        return self._named("users_default", DEFAULT_USERS)

    def _named(self, name: str, default: int) -> int:
        level = read_level(self._content.get(name), self._version)
        return default if level is None else level


def _object(content: dict[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name)
    return value if isinstance(value, dict) else {}
