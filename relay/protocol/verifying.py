"""Two people verify each other's keys: what their apps tell each other, as messages to devices or as events of a room they share.

Apps send these events readable also into encrypted rooms (Element does). They name devices, keys and methods; the two texts
in them that people may read come from fixed words. Not here: who may send them. Spec:
client-server-api/#key-verification-framework.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sized
from typing import Any

from relay.ids import is_event_id, is_typed_user_id
from relay.protocol import shapes
from relay.protocol.shapes import Misfit, Record, Shape, listing, mapping, one_of

# Of methods, of ways to compute something, of keys that are vouched for at once.
MAX_NAMED = 20
# Hashes, keys and signatures are shorter.
MAX_BASE64 = 128

# Narrower than elsewhere in the seal, since a room's people see these events: no words of other scripts, no addresses, no
# lists as long as a letter. Spec: appendices/#common-namespaced-identifier-grammar, #opaque-identifiers.
_NAME_FORM = re.compile(r"[a-z0-9][a-z0-9._\-]{0,63}\Z")
_DEVICE_FORM = re.compile(r"[A-Za-z0-9._~+/=\-]{1,64}\Z")
_KEY_FORM = re.compile(r"[a-z0-9_]{1,20}:[A-Za-z0-9._~+/=\-]{1,64}\Z")


def _formed(form: re.Pattern[str], expected: str) -> Shape:
    def shape(value: Any) -> Any:
        if not isinstance(value, str) or not form.match(value):
            raise Misfit(expected)
        return value

    return shape


def _few(shape: Shape) -> Shape:
    def few(value: Any) -> Any:
        if isinstance(value, Sized) and len(value) > MAX_NAMED:
            raise Misfit(f"at most {MAX_NAMED}")
        return shape(value)

    return few


def _b64(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_BASE64:
        raise Misfit(f"at most {MAX_BASE64} characters of base64")
    return shapes.BASE64(value)


_NAME = _formed(_NAME_FORM, "a name of small letters, digits, dots, dashes and underscores")
_NAMES = _few(listing(_NAME))
_DEVICE = _formed(_DEVICE_FORM, "a device ID of at most 64 letters, digits and -._~+/=")
_KEY = _formed(_KEY_FORM, "the ID of a key")

REQUEST = "m.key.verification.request"
CANCEL = "m.key.verification.cancel"
MESSAGE = "m.room.message"

# What each type holds, wherever it is sent; what it belongs to is said in another way in a room and between devices.
_HOLDS: dict[str, dict[str, Shape]] = {
    "m.key.verification.ready": {"from_device": _DEVICE, "methods": _NAMES},
    "m.key.verification.start": {
        "from_device": _DEVICE,
        "method": _NAME,
        "next_method": _NAME,
        "secret": _b64,
        "key_agreement_protocols": _NAMES,
        "hashes": _NAMES,
        "message_authentication_codes": _NAMES,
        "short_authentication_string": _NAMES,
    },
    "m.key.verification.accept": {
        "method": _NAME,
        "key_agreement_protocol": _NAME,
        "hash": _NAME,
        "message_authentication_code": _NAME,
        "short_authentication_string": _NAMES,
        "commitment": _b64,
    },
    "m.key.verification.key": {"key": _b64},
    "m.key.verification.mac": {"mac": _few(mapping(_KEY, _b64)), "keys": _b64},
    CANCEL: {"code": _NAME},
    "m.key.verification.done": {},
}
_ASKS: dict[str, Shape] = {"from_device": _DEVICE, "methods": _NAMES, "timestamp": shapes.INTEGER}

# A device may have whatever ID its app or its owner gave it, and nobody else reads along here.
_BETWEEN: dict[str, Shape] = {
    "from_device": shapes.IDENTIFIER,
    "mac": _few(mapping(shapes.IDENTIFIER, _b64)),
}
BETWEEN_DEVICES: dict[str, Record] = {
    type: Record.of(
        {"transaction_id": shapes.IDENTIFIER, **{key: _BETWEEN.get(key, shape) for key, shape in holds.items()}}
    )
    for type, holds in {REQUEST: _ASKS, **_HOLDS}.items()
}

# For apps that can't verify; apps insist on a text.
ASKED = "This is a request to verify keys. Your app does not show it: compare them in another way."
# What matrix-rust-sdk writes, by the beginnings of the SHA-256 of it; nothing else is kept of other servers' people.
_KNOWN_BODIES = frozenset({"25aee8feac04853e"})
_KNOWN_REASONS = frozenset(
    {
        "4312ff4f2759cec1",
        "d0a8e085a241f919",
        "3a52684614910469",
        "4062a9079c97004d",
        "ec68de5ca5d7b566",
        "3716547fc9644fba",
        "707df4777fc525f3",
        "1f41d98a607f2168",
        "618f8268a9ab6871",
        "ece94b797c39670f",
        "aa44755dd0a34b6c",
        "bcbdc84f8607cc29",
    }
)


def _hash(text: str) -> str:
    # Older apps set two spaces after a full stop.
    return hashlib.sha256(text.replace("  ", " ").encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _body(value: Any) -> Any:
    if isinstance(value, str):
        who, _, rest = value.partition(" ")
        if value == ASKED or (is_typed_user_id(who) and _hash(rest) in _KNOWN_BODIES):
            return value
    raise Misfit("a known text")


def _reason(value: Any) -> Any:
    if isinstance(value, str) and (_NAME_FORM.match(value) or _hash(value) in _KNOWN_REASONS):
        return value
    raise Misfit("a known reason")


def _user(value: Any) -> Any:
    # The historical grammar lets in any text after the '@'.
    if not is_typed_user_id(value):
        raise Misfit("a user ID")
    return value


def _event(value: Any) -> Any:
    if not is_event_id(value):
        raise Misfit("an event ID")
    return value


_RELATION = Record.of({"rel_type": one_of("m.reference"), "event_id": _event})
IN_ROOMS: dict[str, Record] = {
    MESSAGE: Record.of({**_ASKS, "msgtype": one_of(REQUEST), "body": _body, "to": _user}),
    **{type: Record.of({"m.relates_to": _RELATION, **holds}) for type, holds in _HOLDS.items()},
}
IN_ROOMS[CANCEL] = Record.of({"m.relates_to": _RELATION, **_HOLDS[CANCEL], "reason": _reason})


def is_about(type: str, content: object) -> bool:
    """Not each m.room.message is a request to verify."""
    return type in IN_ROOMS and (type != MESSAGE or (isinstance(content, dict) and content.get("msgtype") == REQUEST))


def in_fixed_words(type: str, content: dict[str, Any]) -> dict[str, Any]:
    """With our texts in place of those that an app of ours wrote."""
    if type == MESSAGE:
        return {**content, "body": ASKED}
    if type == CANCEL and "reason" in content:
        return {**content, "reason": content.get("code")}
    return content
