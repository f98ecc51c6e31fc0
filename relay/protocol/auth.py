"""The authorization rules of room versions 3 to 12, in the standard's order. Each refusal names its rule.

The versions number their rules differently; here one number means one rule in all of them:
1 create, 2 the room ID (12), 3 auth_events, 4 m.federate, 5 aliases (3-5), 6 member (`membership.py`), 7 in the room,
8 third-party invite, 9 required level, 10 state keys with '@', 11 power levels, 13 the rest is allowed. (12 was the
redaction rule of versions 1 and 2.) Below the first number they count as version 12 does.
Signatures are not verified here (`event.required_signers`). Spec: rooms/v12/#authorisation-rules and its forerunners.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from relay.errors import NotAllowed
from relay.ids import is_user_id, server_of
from relay.protocol.event import Event
from relay.protocol.membership import INVITE, JOIN, KNOCK, State, check_member, membership_of
from relay.protocol.power import Levels, creators, read_level
from relay.protocol.versions import RoomVersion

CREATE = ("m.room.create", "")
POWER_LEVELS = ("m.room.power_levels", "")
JOIN_RULES = ("m.room.join_rules", "")

_SCALAR_LEVELS = ("users_default", "events_default", "state_default", "ban", "redact", "kick", "invite")


def auth_keys(
    type: str, sender: str, state_key: str | None, content: Mapping[str, Any], version: RoomVersion
) -> list[tuple[str, str]]:
    """The state an event of this kind has to cite. Spec: server-server-api/#auth-events-selection"""
    if type == "m.room.create":
        return []
    keys = [POWER_LEVELS, ("m.room.member", sender)]
    if not version.room_id_is_create:
        keys.insert(0, CREATE)
    if type != "m.room.member":
        return keys
    if state_key is not None and state_key != sender:
        keys.append(("m.room.member", state_key))
    membership = content.get("membership")
    if membership in (JOIN, INVITE, KNOCK):
        keys.append(JOIN_RULES)
    if membership == INVITE:
        third_party = content.get("third_party_invite")
        signed = third_party.get("signed") if isinstance(third_party, dict) else None
        token = signed.get("token") if isinstance(signed, dict) else None
        if isinstance(token, str):
            keys.append(("m.room.third_party_invite", token))
    elif membership == JOIN and version.restricted:
        authoriser = content.get("join_authorised_via_users_server")
        if isinstance(authoriser, str) and ("m.room.member", authoriser) not in keys:
            keys.append(("m.room.member", authoriser))
    return keys


def check_auth_events(
    event: Event, auth_events: Sequence[Event], rejected: Container[str], create: Event | None = None
) -> None:
    """Rules 2 and 3: about the events that this one cites, not about what they say. Raises NotAllowed.

    `create` is needed in version 12, where nobody cites the create event.
    """
    if event.type == "m.room.create":
        return
    if event.version.room_id_is_create:
        _check_room_id(event, create)
        if create is not None and create.id in rejected:
            raise NotAllowed("2", "the room's create event was rejected")
    expected = set(auth_keys(event.type, event.sender, event.state_key, event.content, event.version))
    seen: set[tuple[str, str]] = set()
    for cited in auth_events:
        if cited.key in seen:
            raise NotAllowed("3.1", f"the event cites two events of the same kind: {cited.type}")
        if cited.key is None or cited.key not in expected:
            raise NotAllowed("3.2", f"the event cites a {cited.type} that has no bearing on it")
        if cited.id in rejected:
            raise NotAllowed("3.3", f"the event cites a rejected event: {cited.id}")
        seen.add(cited.key)
    if not event.version.room_id_is_create and CREATE not in seen:
        raise NotAllowed("3.4", "the event does not cite the room's create event")
    for cited in auth_events:
        if cited.room_id != event.room_id:
            raise NotAllowed("3.5", f"the event cites an event of another room: {cited.id}")


def check(event: Event, state: State, create: Event | None = None) -> None:
    """All rules but 3, against one set of state. Raises NotAllowed. `create` may stand beside the state (version 12)."""
    if event.type == "m.room.create":
        _check_create(event)
        return
    if create is None:
        create = state.get(CREATE)
    if event.version.room_id_is_create:
        _check_room_id(event, create)
    if create is None:
        raise NotAllowed("3.4", "the room has no create event")
    if create.content.get("m.federate") is False and event.server != create.server:
        raise NotAllowed("4", "the room is not open to other servers")
    if event.version.aliases_rule and event.type == "m.room.aliases":
        if event.state_key != event.server:
            raise NotAllowed("5", "a server can only list its own aliases")
        return
    levels = Levels(create, state.get(POWER_LEVELS))
    if event.type == "m.room.member":
        check_member(event, state, create, levels)
        return
    if membership_of(state, event.sender) != JOIN:
        raise NotAllowed("7", "the sender is not in the room")
    power = levels.user(event.sender)
    if event.type == "m.room.third_party_invite":
        if power < levels.invite:
            raise NotAllowed("8", "the sender's power level is too low to invite")
        return
    required = levels.to_send(event.type, event.is_state)
    if power < required:
        raise NotAllowed("9", f"sending {event.type} here takes the power level {required}; the sender has {power}")
    if event.state_key is not None and event.state_key.startswith("@") and event.state_key != event.sender:
        raise NotAllowed("10", "the state key is another user's ID")
    if event.type == "m.room.power_levels":
        _check_power_levels(event, state.get(POWER_LEVELS), create, power)


def _check_create(event: Event) -> None:
    version, content = event.version, event.content
    if event.prev_events:
        raise NotAllowed("1.1", "a create event can't follow another event")
    if version.room_id_is_create:
        if "room_id" in event.pdu:
            raise NotAllowed("1.2", "a create event of this room version has no room ID")
    elif server_of(event.room_id) != event.server:
        raise NotAllowed("1.2", "the room ID is of another server than the sender")
    # Whoever reads an event has its room version from here: one that says something else is not of that version. It
    # may say nothing, since redaction takes it away before version 11.
    if "room_version" in content and content["room_version"] != version.name:
        raise NotAllowed("1.3", "the room version is not the one the event is read by")
    if version.create_creator and "creator" not in content:
        raise NotAllowed("1.4", "the create event names no creator")
    if version.creators_privileged and "additional_creators" in content:
        more = content["additional_creators"]
        if not isinstance(more, list) or not all(is_user_id(user) for user in more):
            raise NotAllowed("1.4", "additional_creators is not a list of user IDs")


def _check_room_id(event: Event, create: Event | None) -> None:
    if create is None or event.room_id[1:] != create.id[1:]:
        raise NotAllowed("2", "the room ID is not that of an accepted create event")


def _check_power_levels(event: Event, current: Event | None, create: Event, power: int | float) -> None:
    version, content = event.version, event.content
    if version.integer_levels:
        _check_integers(content)
    users = content.get("users", {})
    if not isinstance(users, dict):
        raise NotAllowed("11.3", "users is not an object")
    for user, level in users.items():
        # As loosely as other servers read it: rooms exist whose levels name users of impossible servers.
        if not user.startswith("@") or ":" not in user:
            raise NotAllowed("11.3", f"users has a key that is not a user ID: {user[:64]!r}")
        if read_level(level, version) is None:
            raise NotAllowed("11.3", f"the level of {user[:64]!r} is not an integer")
    if version.creators_privileged and not creators(create).isdisjoint(users):
        raise NotAllowed("11.4", "users names a creator of the room, whose power has no level")
    if current is None:
        return
    old, new = current.content, content
    for name in _SCALAR_LEVELS:
        before, after = read_level(old.get(name), version), read_level(new.get(name), version)
        if before != after:
            _check_not_above("11.6.1", name, before, power)
            _check_not_above("11.6.2", name, after, power)
    for group in ("events", "notifications") if version.notifications_levels else ("events",):
        for name, before, after in _changes(old, new, group, version):
            _check_not_above("11.7.1", name, before, power)
            _check_not_above("11.8.1", name, after, power)
    for user, before, after in _changes(old, new, "users", version):
        if user != event.sender and before is not None and before >= power:
            raise NotAllowed("11.9.1", f"the power level of {user} is not below the sender's")
        _check_not_above("11.10.1", user, after, power)


def _check_integers(content: Mapping[str, Any]) -> None:
    for name in _SCALAR_LEVELS:
        if name in content and type(content[name]) is not int:
            raise NotAllowed("11.1", f"{name} is not an integer")
    for name in ("events", "notifications"):
        if name in content:
            group = content[name]
            if not isinstance(group, dict) or not all(type(level) is int for level in group.values()):
                raise NotAllowed("11.2", f"{name} is not an object of integers")


def _changes(
    old: Mapping[str, Any], new: Mapping[str, Any], group: str, version: RoomVersion
) -> list[tuple[str, int | None, int | None]]:
    """(name, level before, level after) of each entry that was added, changed or removed."""
    before, after = old.get(group), new.get(group)
    before = before if isinstance(before, dict) else {}
    after = after if isinstance(after, dict) else {}
    found = []
    for name in {**before, **after}:
        was, will = read_level(before.get(name), version), read_level(after.get(name), version)
        if was != will:
            found.append((name, was, will))
    return found


def _check_not_above(rule: str, name: str, level: int | None, power: int | float) -> None:
    if level is not None and level > power:
        raise NotAllowed(rule, f"{name[:64]} is or becomes {level}, which is above the sender's power level {power}")
