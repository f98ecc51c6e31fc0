"""The seal: what may be readable on this relay's disk, as one table from event type to content keys with their shapes.

Reading order: the table of room events, that of to-device messages, then `Seal`, which asks them at one of three levels.
Whatever the tables do not list is left out of what the relay builds, refused when a local client sends nothing else, and
kept only in its redacted form when it comes from another server. Media: readable.py. Not here: whether a room is
encrypted (rooms/), encryption at rest. Spec: the design's section on the seal; rooms/fragments (redactions).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from relay.errors import Refused
from relay.protocol import readable, shapes, verifying
from relay.protocol.redaction import redact_content
from relay.protocol.shapes import Misfit, Record, Shape, is_base64, is_identifier, listing, mapping, one_of
from relay.protocol.versions import VERSIONS

if TYPE_CHECKING:
    from relay.protocol.event import Event

Level = Literal["strict", "standard", "open"]
Decision = Literal["keep", "redact", "stub"]

KNOWN_ALGORITHMS = frozenset({"m.megolm.v1.aes-sha2"})
MAX_TYPE_SHOWN = 80

_USER, _ROOM, _EVENT, _SERVER = shapes.USER_ID, shapes.ROOM_ID, shapes.EVENT_ID, shapes.SERVER_NAME
_WORD, _INT, _BOOL, _B64, _LEVEL = shapes.IDENTIFIER, shapes.INTEGER, shapes.BOOLEAN, shapes.BASE64, shapes.LEVEL


@dataclass(frozen=True, slots=True)
class Row:
    """One type: the rule it falls under, its readable content, and its state key's shape (None: it is not state)."""

    rule: str
    content: Record
    state_key: Shape | None


ROUTING = "routing state"
PROFILE = "room profile"
CIPHERTEXT = "ciphertext"
REDACTION = "redaction"
VERIFYING = "verifying keys"
REDACTED = "redacted form"
ALLOWED = "allowed by privacy.allow"
OPEN = "the seal is open"


def _state(state_key: Shape = shapes.EMPTY, rule: str = ROUTING, /, **content: Shape) -> Row:
    return Row(rule, Record.of(content), state_key)


# One emoji: a picture character with its selectors and joiners, a flag, or a keycap.
_PICTURE = (
    "[\u00a9\u00ae\u203c\u2049\u2122\u2139\u2194-\u21aa\u231a-\u23ff\u24c2\u25aa-\u27bf\u2934\u2935\u2b05-\u2b55"
    "\u3030\u303d\u3297\u3299\U0001f004-\U0001f1e5\U0001f200-\U0001faff]\ufe0f?[\U0001f3fb-\U0001f3ff]?"
)
_EMOJI = re.compile(
    f"(?:{_PICTURE}(?:\u200d{_PICTURE}){{0,8}}|[\U0001f1e6-\U0001f1ff]{{2}}|[0-9#*]\ufe0f?\u20e3"
    "|\U0001f3f4[\U000e0061-\U000e007a0-9]{1,8}\U000e007f)\ufe0f?\\Z"
)


def is_emoji(value: Any) -> bool:
    return isinstance(value, str) and _EMOJI.match(value) is not None


def _emoji(value: Any) -> Any:
    if not is_emoji(value):
        raise Misfit("one emoji")
    return value


_SIGNATURES = mapping(_WORD, mapping(_WORD, _B64))
_RULE: dict[str, Shape] = {
    "entity": _WORD,
    "recommendation": _WORD,
    "hashes": mapping(_WORD, _B64),
    "org.matrix.msc4205.hashes": mapping(_WORD, _B64),
}
_FOCUS = Record(
    type=_WORD, focus_selection=_WORD, livekit_service_url=shapes.URL, livekit_alias=_WORD, livekit_region=_WORD
)
_APPLICATION = Record.of({"type": _WORD, "m.call.intent": _WORD, "m.call.id": shapes.IDENTIFIER_OR_EMPTY})
_CALL: dict[str, Shape] = {
    "application": _WORD,
    "call_id": shapes.IDENTIFIER_OR_EMPTY,
    "scope": _WORD,
    "device_id": _WORD,
    "membershipID": _WORD,
    "created_ts": _INT,
    "expires": _INT,
    "expires_ts": _INT,
    "m.call.intent": _WORD,
    "focus_active": _FOCUS,
    "foci_active": listing(_FOCUS),
    "foci_preferred": listing(_FOCUS),
}
_CALL_MEMBER = _state(
    _WORD, ROUTING, **_CALL, leave_reason=_WORD, memberships=listing(Record.of(_CALL)), **{"m.calls": listing(Record())}
)
# MSC4143 as state; as a sticky message it is sent encrypted.
_RTC_MEMBER = _state(
    _WORD,
    slot_id=_WORD,
    sticky_key=_WORD,
    application=_APPLICATION,
    member=Record(id=_WORD, membership=_WORD, claimed_user_id=_USER, claimed_device_id=_WORD),
    transports=Record(published=listing(_FOCUS), can_subscribe=listing(_WORD)),
    rtc_transports=listing(_FOCUS),
    versions=listing(_WORD),
    leave_reason=Record(code=_WORD),
)
_RTC_SLOT = _state(_WORD, status=_WORD, application=_APPLICATION, encryption=Record(type=_WORD))

# ---- The table. What stands here may be readable; free text (`reason`, a tombstone's `body`, the name that an identity
# server gives to an address) is missing on purpose.
ROOM_EVENTS: dict[str, Row] = {
    "m.room.create": _state(
        creator=_USER,
        room_version=_WORD,
        type=_WORD,
        predecessor=Record(room_id=_ROOM, event_id=_EVENT),
        additional_creators=listing(_USER),
        # `relay.nonce` is our own: in version 12 it keeps two rooms of one millisecond apart.
        **{"m.federate": _BOOL, "relay.nonce": _WORD},
    ),
    "m.room.member": _state(
        _USER,
        membership=one_of("invite", "join", "knock", "leave", "ban"),
        displayname=shapes.NAME,
        avatar_url=shapes.MXC,
        is_direct=_BOOL,
        join_authorised_via_users_server=_USER,
        third_party_invite=Record(signed=Record(mxid=_USER, token=_WORD, signatures=_SIGNATURES)),
    ),
    "m.room.join_rules": _state(
        join_rule=one_of("public", "knock", "invite", "private", "restricted", "knock_restricted"),
        allow=listing(Record(type=_WORD, room_id=_ROOM)),
    ),
    "m.room.power_levels": _state(
        **dict.fromkeys(
            ("ban", "kick", "redact", "invite", "events_default", "state_default", "users_default"), shapes.LEVEL
        ),
        events=mapping(_WORD, _LEVEL),
        notifications=mapping(_WORD, _LEVEL),
        users=mapping(_USER, _LEVEL),
    ),
    "m.room.third_party_invite": _state(
        _WORD,
        key_validity_url=shapes.URL,
        public_key=_B64,
        public_keys=listing(Record(public_key=_B64, key_validity_url=shapes.URL)),
    ),
    "m.room.history_visibility": _state(history_visibility=one_of("invited", "joined", "shared", "world_readable")),
    "m.room.guest_access": _state(guest_access=one_of("can_join", "forbidden")),
    "m.room.encryption": _state(
        algorithm=_WORD,
        rotation_period_ms=_INT,
        rotation_period_msgs=_INT,
        encrypt_state_events=_BOOL,
        **{"io.element.msc4362.encrypt_state_events": _BOOL},
    ),
    "m.room.server_acl": _state(allow=listing(_WORD), deny=listing(_WORD), allow_ip_literals=_BOOL),
    "m.room.tombstone": _state(replacement_room=_ROOM, body=one_of(shapes.REPLACED)),
    "m.room.policy": _state(via=_SERVER, public_keys=mapping(_WORD, _B64)),
    "org.matrix.msc4284.policy": _state(via=_SERVER, public_key=_B64, public_keys=mapping(_WORD, _B64)),
    "m.room.pinned_events": _state(pinned=listing(_EVENT)),
    "m.room.canonical_alias": _state(alias=shapes.ALIAS_OR_NONE, alt_aliases=listing(shapes.ALIAS)),
    "m.space.child": _state(_ROOM, via=listing(_SERVER), order=shapes.ORDER, suggested=_BOOL),
    "m.space.parent": _state(_ROOM, via=listing(_SERVER), canonical=_BOOL),
    **{
        f"{prefix}.{of}": _state(_WORD, ROUTING, **_RULE)
        for prefix in ("m.policy.rule", "m.room.rule", "org.matrix.mjolnir.rule")
        for of in ("user", "room", "server")
    },
    # The short name by which Draupnir's and Mjolnir's commands call a list; without it they can make none.
    "org.matrix.mjolnir.shortcode": _state(shortcode=_WORD),
    "m.call.member": _CALL_MEMBER,
    "org.matrix.msc3401.call.member": _CALL_MEMBER,
    "m.rtc.member": _RTC_MEMBER,
    "org.matrix.msc4143.rtc.member": _RTC_MEMBER,
    "m.rtc.slot": _RTC_SLOT,
    "org.matrix.msc4143.rtc.slot": _RTC_SLOT,
    # Readable at `standard`, not at `strict`.
    "m.room.name": _state(shapes.EMPTY, PROFILE, name=shapes.NAME),
    "m.room.topic": _state(
        shapes.EMPTY,
        PROFILE,
        topic=shapes.TOPIC,
        **{"m.topic": Record.of({"m.text": listing(Record(body=shapes.TOPIC, mimetype=_WORD))})},
    ),
    "m.room.avatar": _state(
        shapes.EMPTY,
        PROFILE,
        url=shapes.MXC,
        info=Record(w=_INT, h=_INT, size=_INT, mimetype=_WORD, thumbnail_url=shapes.MXC),
    ),
    "m.room.redaction": Row(REDACTION, Record(redacts=_EVENT), None),
}
_VERIFYING = {type: Row(VERIFYING, content, None) for type, content in verifying.IN_ROOMS.items()}
# What `privacy.allow` can name.
OPTIONAL_EVENTS: dict[str, Row] = {
    "m.reaction": Row(
        ALLOWED, Record.of({"m.relates_to": Record(rel_type=one_of("m.annotation"), event_id=_EVENT, key=_emoji)}), None
    ),
}
_RELATION = Record.of(
    {"rel_type": _WORD, "event_id": _EVENT, "is_falling_back": _BOOL, "m.in_reply_to": Record(event_id=_EVENT)}
)
ENCRYPTED = "m.room.encrypted"
_ENCRYPTED_WORDS = ("session_id", "device_id", "sender_key")

_OLM = mapping(_B64, Record(type=_INT, body=_B64))


def _ciphertext(value: Any) -> Any:
    """Megolm's is one text, Olm's one for each receiving device."""
    return _B64(value) if isinstance(value, str) else _OLM(value)


_KEY_REQUEST = Record(algorithm=_WORD, room_id=_ROOM, sender_key=_B64, session_id=_WORD)
_WITHHELD = Record(algorithm=_WORD, room_id=_ROOM, session_id=_WORD, sender_key=_B64, code=_WORD, from_device=_WORD)
TO_DEVICE: dict[str, Record] = {
    ENCRYPTED: Record(
        algorithm=_WORD,
        sender_key=_B64,
        session_id=_WORD,
        device_id=_WORD,
        ciphertext=_ciphertext,
    ),
    "m.room_key_request": Record(
        action=one_of("request", "request_cancellation"),
        requesting_device_id=_WORD,
        request_id=_WORD,
        body=_KEY_REQUEST,
    ),
    "m.secret.request": Record(
        action=one_of("request", "request_cancellation"), requesting_device_id=_WORD, request_id=_WORD, name=_WORD
    ),
    "m.room_key.withheld": _WITHHELD,
    "org.matrix.room_key.withheld": _WITHHELD,
    "m.dummy": Record(),
    **verifying.BETWEEN_DEVICES,
}
# Clients insist on a `reason` here: they get the code once more, never the text.
_REASON_IS_CODE = frozenset({verifying.CANCEL, "m.room_key.withheld", "org.matrix.room_key.withheld"})
_SECRETS = frozenset({"m.room_key", "m.forwarded_room_key", "m.secret.send", "m.room_key_bundle"})

# The first and the last supported version differ most in what a redaction keeps.
_REDACTING_VERSIONS = (VERSIONS["12"], VERSIONS["3"])


@dataclass(frozen=True, slots=True)
class Incoming:
    """`keep`: store it whole. `redact`: store its redacted form. `stub`: the same, and never show it to a client."""

    decision: Decision
    rule: str


def is_ciphertext(content: object) -> bool:
    """The shape that an m.room.encrypted event must have. Spec: client-server-api/#mroomencrypted, Megolm's form."""
    return (
        isinstance(content, dict) and is_identifier(content.get("algorithm")) and is_base64(content.get("ciphertext"))
    )


class Seal:
    """The table at one level. `allow` is the config's `privacy.allow`; a type without a row raises ValueError."""

    def __init__(self, level: Level, allow: Iterable[str] = (), clear_rooms: Iterable[str] = ()) -> None:
        if level not in ("strict", "standard", "open"):
            raise ValueError(f"privacy.seal is {level!r}; it is one of strict, standard and open.")
        allowed = list(allow)
        for unknown in (type for type in allowed if type not in OPTIONAL_EVENTS):
            raise ValueError(
                f"privacy.allow names {unknown!r}, for which the seal has no shape; it can name {', '.join(OPTIONAL_EVENTS)}."
            )
        self.level: Level = level
        self.open = level == "open"
        # Rooms of `privacy.clear_rooms`: their messages may be readable.
        self.clear_rooms = frozenset(clear_rooms)
        rows = {type: row for type, row in ROOM_EVENTS.items() if level != "strict" or row.rule != PROFILE}
        self._rows = rows | {type: OPTIONAL_EVENTS[type] for type in allowed}

    def _row(self, type: str, content: object) -> Row | None:
        row = self._rows.get(type)
        return row if row is not None or not verifying.is_about(type, content) else _VERIFYING[type]

    def clear_in(self, room_id: str, type: str, is_state: bool) -> bool:
        """Whether `privacy.clear_rooms` lets it stand there as it is: messages, and the settings of Draupnir's protections."""
        return room_id in self.clear_rooms and (not is_state or type == "org.matrix.mjolnir.setting")

    def leaves_out(self, type: str) -> bool:
        """Whether createRoom drops this part of the request instead of refusing: the room profile at `strict`."""
        row = ROOM_EVENTS.get(type)
        return row is not None and row.rule == PROFILE and type not in self._rows and not self.open

    # ---- What local clients send

    def outgoing(self, type: str, state_key: str | None, content: dict[str, Any]) -> dict[str, Any]:
        """The content as the relay may build it (at `open` the one given). Raises Refused."""
        if self.open:
            return content
        if type == ENCRYPTED:
            return self._encrypted(state_key, content)
        row = self._row(type, content)
        if row is None or (state_key is None) != (row.state_key is None):
            raise Refused(self._why(type, state_key))
        if type == "m.room.tombstone":
            content = {**content, "body": shapes.REPLACED}
        elif row.rule == VERIFYING:
            content = verifying.in_fixed_words(type, content)
        try:
            if row.state_key is not None:
                _fit(row.state_key, state_key, "its state key")
            picked = row.content(content)
        except Misfit as misfit:
            raise _misfit(type, misfit) from None
        if type == "m.room.encryption" and not self.encryption(picked):
            known = ", ".join(KNOWN_ALGORITHMS)
            raise Refused(f"The encryption of a room can only be set to a known algorithm: {known}.")
        if type == "m.reaction" and len(picked.get("m.relates_to", ())) < 3:
            raise Refused("A reaction here is one emoji and the message it belongs to, and nothing else.")
        return picked

    def _encrypted(self, state_key: str | None, content: dict[str, Any]) -> dict[str, Any]:
        if not is_ciphertext(content):
            raise Refused(
                "This m.room.encrypted event does not look like ciphertext (an algorithm and a base64 ciphertext), so it "
                "was not sent. Please update the client that sent it."
            )
        picked = {"algorithm": content["algorithm"], "ciphertext": content["ciphertext"]}
        try:
            if state_key is not None:  # MSC4362: "type:state_key" of what is inside.
                _fit(_WORD, state_key, "its state key")
            for key in _ENCRYPTED_WORDS:
                if key in content:
                    picked[key] = _fit(_WORD, content[key], key)
            if "m.relates_to" in content:
                picked["m.relates_to"] = _fit(_RELATION, content["m.relates_to"], "m.relates_to")
        except Misfit as misfit:
            raise _misfit(ENCRYPTED, misfit) from None
        return picked

    def _why(self, type: str, state_key: str | None) -> str:
        shown = type[:MAX_TYPE_SHOWN]
        if self.leaves_out(type) and state_key is not None:
            return f"On this relay a room's name, topic and picture must not be readable, so {shown} was not saved. Leave it out."
        if type in ROOM_EVENTS:
            must, not_as = ("state", "a message") if ROOM_EVENTS[type].state_key is not None else ("a message", "state")
            return f"{shown} can only be sent as {must} on this relay, not as {not_as}."
        if type in OPTIONAL_EVENTS:
            return f"This relay does not carry readable {shown} events; its operator can allow them (privacy.allow)."
        if state_key is not None:
            return (
                f"This relay keeps only the state that it needs to route messages, so the readable {shown} was not saved. "
                "Send it encrypted, or leave it out."
            )
        return (
            f"This relay carries only encrypted messages, so the readable {shown} was not sent. Turn on encryption in the "
            "room and send it from a client that encrypts."
        )

    def encryption(self, content: object) -> bool:
        """Whether this is the content of an m.room.encryption event that turns encryption on."""
        algorithm = content.get("algorithm") if isinstance(content, dict) else None
        return isinstance(algorithm, str) and algorithm in KNOWN_ALGORITHMS

    def to_device(self, type: str, content: dict[str, Any]) -> dict[str, Any]:
        """The content as it may wait on disk. Raises Refused; what a peer sent is then dropped."""
        if self.open:
            return content
        record = TO_DEVICE.get(type)
        shown = type[:MAX_TYPE_SHOWN]
        if type in _SECRETS:
            raise Refused(f"{shown} would show a key or a secret to this server. It has to be sent encrypted.")
        if record is None:
            raise Refused(f"This relay carries to-device messages of the type {shown} only inside m.room.encrypted.")
        try:
            picked = record(content)
        except Misfit as misfit:
            raise _misfit(type, misfit) from None
        if type == ENCRYPTED and not ("algorithm" in picked and "ciphertext" in picked):
            raise Refused("An encrypted to-device message has an algorithm and a ciphertext. Please update the client.")
        if "reason" in content and "code" in picked and type in _REASON_IS_CODE:
            picked["reason"] = picked["code"]
        return picked

    def media(self, first_bytes: bytes, whole_if_small: bytes | None = None) -> None:
        """Refuses what is provably readable. A large body is followed with `readable.TextWatch` instead."""
        if self.open:
            return
        found = readable.known_format(first_bytes)
        if found is None and whole_if_small is not None and readable.is_text(whole_if_small):
            found = "text"
        if found is not None:
            raise Refused(
                f"This file is readable ({found}), and this relay stores only encrypted ones. Send it in an encrypted room, "
                "from a client that encrypts attachments."
            )

    # ---- What comes from other servers, and what lies on disk

    def incoming(self, event: Event) -> Incoming:
        """What becomes of an event that was already judged. Its auth and its place in the graph do not change."""
        type, content = event.type, event.content
        if self.open:
            return Incoming("keep", OPEN)
        if type == ENCRYPTED and (is_ciphertext(content) or not content):
            return Incoming("keep", CIPHERTEXT if content else REDACTED)
        row = self._row(type, content)
        if row is not None and row.state_key is not None and event.is_state:
            return Incoming("keep", row.rule)
        if row is not None and row.state_key is None and not event.is_state and self._exactly(row, content):
            return Incoming("keep", row.rule)
        if type == "m.room.redaction":
            return Incoming("redact", REDACTION)
        if event.is_state:
            return Incoming("redact" if content else "keep", REDACTED)
        return Incoming("stub", REDACTED)

    def rule(self, type: str, state_key: str | None, content: object) -> str | None:
        """The rule under which such an event may lie on disk. None is a finding of `relay audit`."""
        if not isinstance(content, dict):
            return None
        row = self._row(type, content)
        if not content:
            return REDACTED if row is None else row.rule
        if type == ENCRYPTED and is_ciphertext(content):
            return CIPHERTEXT
        if (
            row is not None
            and (row.state_key is None) == (state_key is None)
            and (row.state_key is not None or self._exactly(row, content))
        ):
            return row.rule
        if any(redact_content(type, content, version) == content for version in _REDACTING_VERSIONS):
            return REDACTED
        return OPEN if self.open else None

    def unlisted(self, type: str, content: dict[str, Any]) -> int:
        """How many keys stand in a kept event beside the listed ones; `relay audit` counts them."""
        if type == ENCRYPTED:
            picked: dict[str, Any] = Record.of(
                {
                    "algorithm": _WORD,
                    "ciphertext": _B64,
                    "m.relates_to": _RELATION,
                    **dict.fromkeys(_ENCRYPTED_WORDS, _WORD),
                }
            ).fitting(content)
        else:
            row = self._row(type, content)
            picked = row.content.fitting(content) if row is not None else {}
        return shapes.left_out(content, picked)

    @staticmethod
    def _exactly(row: Row, content: dict[str, Any]) -> bool:
        try:
            return row.content(content) == content
        except Misfit:
            return False


def _fit(shape: Shape, value: Any, path: str) -> Any:
    try:
        return shape(value)
    except Misfit as misfit:
        raise misfit.under(path) from None


def _misfit(type: str, misfit: Misfit) -> Refused:
    return Refused(
        f"{type[:MAX_TYPE_SHOWN]}: {misfit}. Correct it and send it again.", status=400, errcode="M_BAD_JSON"
    )
