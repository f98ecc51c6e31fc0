"""Two people verify each other's keys: what their apps tell each other, as messages to devices or as events of a room they share.

Apps send these events readable also into encrypted rooms (Element does). They name devices, keys and methods; the two texts
in them that people may read come from fixed words. Not here: who may send them. Spec:
client-server-api/#key-verification-framework.
"""

from __future__ import annotations

import hashlib
from typing import Any

from relay.ids import is_user_id
from relay.protocol import shapes
from relay.protocol.shapes import Misfit, Record, Shape, listing, mapping, one_of

_WORD, _B64 = shapes.IDENTIFIER, shapes.BASE64

REQUEST = "m.key.verification.request"
CANCEL = "m.key.verification.cancel"
MESSAGE = "m.room.message"

# What each type holds, wherever it is sent; what it belongs to is said in another way in a room and between devices.
_HOLDS: dict[str, dict[str, Shape]] = {
    "m.key.verification.ready": {"from_device": _WORD, "methods": listing(_WORD)},
    "m.key.verification.start": {
        "from_device": _WORD,
        "method": _WORD,
        "next_method": _WORD,
        "secret": _B64,
        "key_agreement_protocols": listing(_WORD),
        "hashes": listing(_WORD),
        "message_authentication_codes": listing(_WORD),
        "short_authentication_string": listing(_WORD),
    },
    "m.key.verification.accept": {
        "method": _WORD,
        "key_agreement_protocol": _WORD,
        "hash": _WORD,
        "message_authentication_code": _WORD,
        "short_authentication_string": listing(_WORD),
        "commitment": _B64,
    },
    "m.key.verification.key": {"key": _B64},
    "m.key.verification.mac": {"mac": mapping(_WORD, _B64), "keys": _B64},
    CANCEL: {"code": _WORD},
    "m.key.verification.done": {},
}
_ASKS: dict[str, Shape] = {"from_device": _WORD, "methods": listing(_WORD), "timestamp": shapes.INTEGER}

BETWEEN_DEVICES: dict[str, Record] = {
    type: Record.of({"transaction_id": _WORD, **holds}) for type, holds in {REQUEST: _ASKS, **_HOLDS}.items()
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
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _body(value: Any) -> Any:
    if isinstance(value, str):
        who, _, rest = value.partition(" ")
        if value == ASKED or (is_user_id(who) and _hash(rest) in _KNOWN_BODIES):
            return value
    raise Misfit("a known text")


def _reason(value: Any) -> Any:
    if shapes.is_identifier(value) or (isinstance(value, str) and _hash(value) in _KNOWN_REASONS):
        return value
    raise Misfit("a known reason")


_RELATION = Record.of({"rel_type": one_of("m.reference"), "event_id": shapes.EVENT_ID})
IN_ROOMS: dict[str, Record] = {
    MESSAGE: Record.of({**_ASKS, "msgtype": one_of(REQUEST), "body": _body, "to": shapes.USER_ID}),
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
