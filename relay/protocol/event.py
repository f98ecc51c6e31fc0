"""An event as servers exchange it: read from outside, loaded from our own database, or built and signed here.

`parse` knows the format of each room version and nothing of rooms: whether an event is allowed is `auth.py`'s
business, whether its signatures hold is asked by whoever has the keys (`required_signers`, `signing_bytes`).
An `Event` is read-only, and so is its `pdu`. Spec: server-server-api/#pdus, #signing-events, rooms/ (event format).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import orjson

from relay.errors import BadEvent, BadJson, TooLarge
from relay.ids import is_room_id, is_user_id, server_of, shared
from relay.protocol.canonical import (
    check_strict,
    encode,
    encode_checked,
    exact,
    from_base64,
    to_base64,
    to_urlsafe_base64,
)
from relay.protocol.redaction import redact, redact_content
from relay.protocol.signing import SigningKey
from relay.protocol.versions import RoomVersion

# Spec: client-server-api/#size-limits
MAX_EVENT_BYTES = 65536
MAX_ID_BYTES = 255
# Spec: rooms/v12/#event-format
MAX_PREV_EVENTS = 20
MAX_AUTH_EVENTS = 10
# Versions 3 to 5 allow integers of any size; this is what a database column holds.
MAX_TIMESTAMP = 2**63 - 1

_NOT_HASHED = frozenset({"hashes", "signatures", "unsigned"})


class Event:
    """One event of a room version known to us. Its ID is right for its content by construction."""

    __slots__ = (
        "_pdu",
        "_raw",
        "auth_events",
        "content",
        "depth",
        "id",
        "is_state",
        "key",
        "membership",
        "origin_server_ts",
        "prev_events",
        "redacts",
        "room_id",
        "sender",
        "server",
        "state_key",
        "type",
        "version",
    )

    id: str
    room_id: str
    type: str
    sender: str
    server: str
    state_key: str | None
    key: tuple[str, str] | None
    is_state: bool
    content: dict[str, Any]
    membership: str | None
    redacts: str | None
    depth: int
    origin_server_ts: int
    prev_events: tuple[str, ...]
    auth_events: tuple[str, ...]
    version: RoomVersion

    def __init__(self, pdu: dict[str, Any], event_id: str, version: RoomVersion, raw: bytes | None = None) -> None:
        """For this module: everybody else calls `parse`, `load` or `build`, which see to it that the parts fit."""
        event_type: str = pdu["type"]
        content: dict[str, Any] = pdu["content"]
        state_key: str | None = pdu.get("state_key")
        self._pdu: dict[str, Any] | None = pdu
        self.id = event_id
        self.version = version
        self._raw = raw
        self.type = event_type
        self.content = content
        self.state_key = state_key
        self.key = None if state_key is None else (event_type, state_key)
        self.is_state = state_key is not None
        self.sender = pdu["sender"]
        self.server = server_of(self.sender)
        room_id: str | None = pdu.get("room_id")
        self.room_id = "!" + event_id[1:] if room_id is None else room_id
        self.depth = pdu["depth"]
        self.origin_server_ts = pdu["origin_server_ts"]
        self.prev_events = tuple(pdu["prev_events"])
        self.auth_events = tuple(pdu["auth_events"])
        self.membership = None
        self.redacts = None
        if event_type == "m.room.member":
            self.membership = _text(content.get("membership"))
        elif event_type == "m.room.redaction":
            self.redacts = _text((content if version.redacts_in_content else pdu).get("redacts"))

    @property
    def pdu(self) -> dict[str, Any]:
        if self._pdu is not None:
            return self._pdu
        made: dict[str, Any] = orjson.loads(self.raw)
        return made

    @property
    def raw(self) -> bytes:
        """The canonical JSON of `pdu`, as it is stored and sent to peers."""
        if self._raw is None:
            self._raw = _encode(self.pdu, self.version)
        return self._raw

    def settle(self) -> Event:
        """For one that stays in memory: a fourth of its size. `pdu` is made anew for the few that ask for it, and what thousands
        of events name alike (rooms, people, the events that allow them) is there once."""
        if self._pdu is None:
            return self
        self._raw, self._pdu = exact(self.raw), None
        self.id, self.room_id, self.sender, self.type = map(shared, (self.id, self.room_id, self.sender, self.type))
        self.prev_events, self.auth_events = tuple(map(shared, self.prev_events)), tuple(map(shared, self.auth_events))
        if self.key is not None:
            self.key = (self.type, self.key[1])
        return self

    def __repr__(self) -> str:
        return f"Event({self.id} {self.type} in {self.room_id} by {self.sender})"


def parse(pdu: object, version: RoomVersion, *, limits: bool = True) -> Event:
    """An event from another server. Raises BadEvent, and nothing else, whatever JSON came.

    `limits=False` leaves the numbers of prev_events and auth_events alone, as the standard wants it for backfill.
    """
    if not isinstance(pdu, dict):
        raise BadEvent("format", "an event is a JSON object")
    pdu = {key: value for key, value in pdu.items() if key != "unsigned"}
    _check_format(pdu, version, limits)
    try:
        if version.strict_json:
            check_strict(pdu)
        raw = _encode(pdu, version)
        event_id = _name(_covered_bytes(pdu, version), version)
    except BadJson as bad:
        raise BadEvent("canonical JSON", bad.text) from bad
    if len(raw) > MAX_EVENT_BYTES:
        raise BadEvent("size", f"the event has {len(raw)} bytes, more than {MAX_EVENT_BYTES}")
    return Event(pdu, event_id, version, raw)


def load(raw: bytes, event_id: str, version: RoomVersion) -> Event:
    """An event from our own database, which holds only what went through `parse` or `build`: no checks."""
    return Event(orjson.loads(raw), event_id, version, raw)


def template(
    version: RoomVersion,
    *,
    room_id: str | None,
    type: str,
    sender: str,
    content: dict[str, Any],
    state_key: str | None = None,
    prev_events: Sequence[str],
    auth_events: Sequence[str],
    depth: int,
    origin_server_ts: int,
    redacts: str | None = None,
) -> dict[str, Any]:
    """An event without hash and signatures, as make_join and its kin hand it out."""
    pdu: dict[str, Any] = {
        "auth_events": list(auth_events),
        "content": content,
        "depth": min(depth, version.max_depth),
        "origin_server_ts": origin_server_ts,
        "prev_events": list(prev_events),
        "sender": sender,
        "type": type,
    }
    if state_key is not None:
        pdu["state_key"] = state_key
    if room_id is not None and not _names_its_room(pdu, version):
        pdu["room_id"] = room_id
    if redacts is not None:
        if version.redacts_in_content:
            pdu["content"] = {**content, "redacts": redacts}
        else:
            pdu["redacts"] = redacts
    return pdu


def build(
    version: RoomVersion,
    *,
    room_id: str | None,
    type: str,
    sender: str,
    content: dict[str, Any],
    state_key: str | None = None,
    prev_events: Sequence[str],
    auth_events: Sequence[str],
    depth: int,
    origin_server_ts: int,
    redacts: str | None = None,
    server_name: str,
    key: SigningKey,
) -> Event:
    """An event of our own. `content` belongs to the event from now on. Raises TooLarge, and BadJson for its content."""
    if len(type.encode("utf-8", "replace")) > MAX_ID_BYTES:
        raise TooLarge(f"The event's type is longer than {MAX_ID_BYTES} bytes. Choose a shorter one.")
    if state_key is not None and len(state_key.encode("utf-8", "replace")) > MAX_ID_BYTES:
        raise TooLarge(f"The event's state key is longer than {MAX_ID_BYTES} bytes. Choose a shorter one.")
    if version.strict_json:
        check_strict(content)
    pdu = template(
        version,
        room_id=room_id,
        type=type,
        sender=sender,
        content=content,
        state_key=state_key,
        prev_events=prev_events,
        auth_events=auth_events,
        depth=depth,
        origin_server_ts=origin_server_ts,
        redacts=redacts,
    )
    pdu["hashes"] = {"sha256": to_base64(hashlib.sha256(_encode(pdu, version)).digest())}
    # The redacted form, made by hand: of the keys that a template can have, it lacks only `redacts`.
    covered = {**pdu, "content": redact_content(type, pdu["content"], version)}
    covered.pop("redacts", None)
    message = _encode(covered, version)
    pdu["signatures"] = {server_name: {key.key_id: key.sign(message)}}
    raw = _encode(pdu, version)
    if len(raw) > MAX_EVENT_BYTES:
        raise TooLarge(
            f"The event has {len(raw)} bytes; the standard allows {MAX_EVENT_BYTES}. Shorten it, or send it as a file."
        )
    return Event(pdu, _name(message, version), version, raw)


def sign(pdu: dict[str, Any], version: RoomVersion, server_name: str, key: SigningKey) -> Event:
    """A peer's template made an event of ours: content hash and signature added. Raises BadEvent for a bad template."""
    bare = _hashed(pdu)
    try:
        complete = {**bare, "hashes": {"sha256": content_hash(bare)}}
        if isinstance(bare.get("content"), dict):
            message = encode(redact(complete, version))
            complete["signatures"] = {server_name: {key.key_id: key.sign(message)}}
    except (BadJson, KeyError) as bad:
        raise BadEvent("canonical JSON", "the template has no canonical form") from bad
    return parse(complete, version)


def co_sign(event: Event, server_name: str, key: SigningKey) -> Event:
    """The same event with one signature more: an invite we accept to pass on, a restricted join we vouch for."""
    return with_signature(event, server_name, key.key_id, key.sign(signing_bytes(event)))


def with_signature(event: Event, server_name: str, key_id: str, signature: str) -> Event:
    """The same event with a signature that somebody made, beside those it has."""
    signatures = dict(event.pdu["signatures"])
    signatures[server_name] = {**signatures.get(server_name, {}), key_id: signature}
    return Event({**event.pdu, "signatures": signatures}, event.id, event.version)


def content_hash(pdu: dict[str, Any]) -> str:
    """Spec: server-server-api/#calculating-the-content-hash-for-an-event"""
    return to_base64(hashlib.sha256(encode(_hashed(pdu))).digest())


def hash_matches(event: Event) -> bool:
    """Whether the content is the one the sender hashed. If not, only the redacted form may be used (PDU check 3)."""
    claimed = event.pdu["hashes"].get("sha256")
    try:
        digest = hashlib.sha256(_encode(_hashed(event.pdu), event.version)).digest()
        return isinstance(claimed, str) and from_base64(claimed) == digest
    except BadJson:
        return False


def redacted(event: Event) -> Event:
    """The same event, ID and signatures, with nothing left but what these cover."""
    return Event(redact(event.pdu, event.version), event.id, event.version)


def emptied(event: Event) -> Event:
    """Our own copy of a redacted event: its content is gone, and all that its hash covers beside it stays, so that whoever
    has the content can prove that it was this one."""
    pdu = {**event.pdu, "content": redact_content(event.type, event.content, event.version)}
    return Event(pdu, event.id, event.version)


def signing_bytes(event: Event) -> bytes:
    """What every signature of the event signs, and what its ID is the hash of."""
    return _covered_bytes(event.pdu, event.version)


def required_signers(event: Event) -> set[str]:
    """The servers whose signature the event must bear.

    Spec: server-server-api/#validating-hashes-and-signatures-on-received-events. An invite that redeems a third-party
    invite may be sent by another server than its sender's: `auth.check` verifies the signature inside it instead.
    """
    content = event.content
    if event.type != "m.room.member":
        return {event.server}
    if event.membership == "invite" and "third_party_invite" in content:
        return set()
    signers = {event.server}
    if event.version.restricted and event.membership == "join":
        authoriser = content.get("join_authorised_via_users_server")
        if isinstance(authoriser, str):
            signers.add(server_of(authoriser))
    return signers


def _names_its_room(pdu: dict[str, Any], version: RoomVersion) -> bool:
    """Spec: rooms/v12/#event-format: such a create event has no room ID, for that is the hash of the event."""
    return version.room_id_is_create and pdu["type"] == "m.room.create" and pdu.get("state_key") == ""


def _hashed(pdu: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in pdu.items() if name not in _NOT_HASHED}


def _encode(pdu: dict[str, Any], version: RoomVersion) -> bytes:
    return encode_checked(pdu) if version.strict_json else encode(pdu)


def _covered_bytes(pdu: dict[str, Any], version: RoomVersion) -> bytes:
    covered = redact(pdu, version)
    covered.pop("signatures", None)
    return _encode(covered, version)


def _name(covered: bytes, version: RoomVersion) -> str:
    digest = hashlib.sha256(covered).digest()
    return "$" + (to_urlsafe_base64(digest) if version.event_id_urlsafe else to_base64(digest))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _check_format(pdu: dict[str, Any], version: RoomVersion, limits: bool) -> None:
    _short_text(pdu, "type", version)
    if not is_user_id(_short_text(pdu, "sender", version)):
        raise BadEvent("sender", "the sender is not a user ID")
    # That a create event of version 12 has no room ID is an authorization rule (1.2), so one with it is read here.
    nameless = "room_id" not in pdu and _names_its_room(pdu, version)
    if not nameless and not is_room_id(_short_text(pdu, "room_id", version)):
        raise BadEvent("room_id", "the room ID does not begin with '!'")
    if "state_key" in pdu:
        _short_text(pdu, "state_key", version)
    if not isinstance(pdu.get("content"), dict):
        raise BadEvent("content", "the content is not an object")
    _check_integer(pdu, "depth", 0, version.max_depth)
    _check_integer(pdu, "origin_server_ts", -MAX_TIMESTAMP, MAX_TIMESTAMP)
    _check_ids(pdu, "prev_events", MAX_PREV_EVENTS if limits else None)
    _check_ids(pdu, "auth_events", MAX_AUTH_EVENTS if limits else None)
    hashes = pdu.get("hashes")
    if not isinstance(hashes, dict) or not isinstance(hashes.get("sha256"), str):
        raise BadEvent("hashes", "the event has no sha256 hash")
    signatures = pdu.get("signatures")
    if not isinstance(signatures, dict) or not all(isinstance(of_one, dict) for of_one in signatures.values()):
        raise BadEvent("signatures", "the signatures are not an object of objects")


def _short_text(pdu: dict[str, Any], name: str, version: RoomVersion) -> str:
    value = pdu.get(name)
    if not isinstance(value, str):
        raise BadEvent(name, f"{name} is not a string")
    length = len(value.encode("utf-8", "surrogatepass")) if version.strict_lengths else len(value)
    if length > MAX_ID_BYTES:
        raise BadEvent(name, f"{name} is longer than {MAX_ID_BYTES} bytes")
    return value


def _check_integer(pdu: dict[str, Any], name: str, lowest: int, highest: int) -> None:
    value = pdu.get(name)
    if type(value) is not int or not lowest <= value <= highest:
        raise BadEvent(name, f"{name} is not an integer from {lowest} to {highest}")


def _check_ids(pdu: dict[str, Any], name: str, most: int | None) -> None:
    value = pdu.get(name)
    if not isinstance(value, list):
        raise BadEvent(name, f"{name} is not a list")
    if most is not None and len(value) > most:
        raise BadEvent(name, f"{name} has {len(value)} entries, more than {most}")
    for item in value:
        if not isinstance(item, str) or not item.startswith("$") or len(item) > MAX_ID_BYTES:
            raise BadEvent(name, f"{name} has an entry that is not an event ID")
