"""Who may see an event, by the room's history visibility and memberships as they were at that event.

The caller supplies what held at the event; nothing is looked up here. Whether somebody is ignored, whether an event is a
stub of the seal, and whether a server may ask at all (ACL, being in the room) are other questions.
Spec: client-server-api/#room-history-visibility, server-server-api/#backfilling-and-retrieving-missing-events.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

JOIN = "join"
INVITE = "invite"
KNOCK = "knock"

WORLD_READABLE = "world_readable"
SHARED = "shared"
INVITED = "invited"
JOINED = "joined"
VISIBILITIES = frozenset({WORLD_READABLE, SHARED, INVITED, JOINED})

_WAS_CONCERNED = frozenset({JOIN, INVITE, KNOCK})


def visibility_of(content: object) -> str:
    """The setting in an m.room.history_visibility event's content, None where the room has no such event."""
    value: Any = content.get("history_visibility") if isinstance(content, dict) else None
    return value if isinstance(value, str) and value in VISIBILITIES else SHARED


def _allows(visibility: str, membership: str | None, joined_later: bool) -> bool:
    if visibility == WORLD_READABLE:  # Rule 1.
        return True
    if membership == JOIN:  # Rule 2.
        return True
    if visibility == INVITED:  # Rule 4.
        return membership == INVITE
    if visibility == JOINED:
        return False
    return joined_later  # Rule 3. A setting that is not understood counts as `shared`.


def may_see(
    visibility: str,
    membership_before: str | None,
    membership_after: str | None = None,
    *,
    visibility_after: str | None = None,
    is_own_membership: bool = False,
    joined_later: bool = False,
) -> bool:
    """Whether a user may see one event.

    `visibility` and `membership_before` are those of the state before the event. For an m.room.history_visibility event
    `visibility_after` is what it sets; for the user's own m.room.member event `is_own_membership` is true and
    `membership_after` is what it sets. `joined_later`: the user joined the room at any point after the event.
    """
    if _allows(visibility, membership_before, joined_later):
        return True
    if visibility_after is not None and _allows(visibility_after, membership_before, joined_later):
        return True
    if not is_own_membership:
        return False
    if _allows(visibility, membership_after, joined_later):
        return True
    # An invite that was sent, a knock, and the end of either concern nobody more than this user: a client that never
    # saw them would show the invite for ever. The standard's sync sections take it for granted.
    return membership_after in _WAS_CONCERNED or membership_before in _WAS_CONCERNED


def visible_to_server(
    visibility: str, memberships: Iterable[str | None], *, visibility_after: str | None = None
) -> bool:
    """Whether a server that is in the room may get an event whole; if not, it gets the redacted form.

    `memberships` are those of the server's users at the event. An event that changes the visibility or a membership is
    asked about with both sides of the change, as in `may_see`. `shared` history is open to every server in the room:
    its users joined, or will have joined, after the event.
    """
    settings = (visibility,) if visibility_after is None else (visibility, visibility_after)
    if any(setting not in (INVITED, JOINED) for setting in settings):
        return True
    wanted = (JOIN, INVITE) if INVITED in settings else (JOIN,)
    return any(membership in wanted for membership in memberships)
