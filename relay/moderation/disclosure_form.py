"""What a reporter hands over as proof: `org.relay.disclosure` in the report's body, or the code that the proof tool prints. Pure.

Only form and bounds are judged here. A code is for one person's own clipboard; it goes into a page or a report's body over
TLS, never into a room: with the ciphertext it is the message.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from relay.errors import ApiError, BadJson, InvalidParam, TooLarge
from relay.moderation.megolm import ALGORITHM, MAX_INDEX, PRK_BYTES
from relay.protocol.canonical import encode, from_base64, to_base64, to_urlsafe_base64
from relay.web import require_shallow

KEY = "org.relay.disclosure"
VERSION = 1
MAX_ITEMS = 20
MAX_BYTES = 256 * 1024
MAX_EVENT_ID = 255
CATEGORIES = frozenset({"ncii", "minor", "threat", "harassment", "spam", "fraud", "other"})
CODE_MARK = "relay-proof-1."

_ITEM_KEYS = frozenset({"event_id", "index", "prk", "content"})
_KEYS = frozenset({"v", "alg", "category", "good_faith", "items"})
OPENS_TOO_MUCH = "This proof holds a ratchet, which opens later messages too. It was not read. Make the proof with this relay's own tool."
NOT_A_CODE = f"This is not a proof code: it begins with {CODE_MARK} Copy all of it from the proof tool."


@dataclass(frozen=True, slots=True)
class Item:
    """One message: `prk` opens it. `content` is given where the server no longer has it."""

    event_id: str
    index: int
    prk: bytes = field(repr=False)
    content: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Disclosure:
    category: str
    good_faith: bool
    items: tuple[Item, ...]


def parse_disclosure(value: object) -> Disclosure:
    """Raises an ApiError that says what to do."""
    _require_no_ratchet(value)
    if not isinstance(value, dict):
        raise BadJson(f"{KEY} is not an object.")
    _require_small(value)
    if value.get("v") != VERSION or value.get("alg") != ALGORITHM:
        raise InvalidParam(
            f"This relay takes proofs of version {VERSION} for {ALGORITHM} only. Leave the proof out, or use its own tool."
        )
    unknown = set(value) - _KEYS
    if unknown:
        raise InvalidParam(f"{KEY} has keys that it should not have. Make the proof with this relay's own tool.")
    category, good_faith = value.get("category", "other"), value.get("good_faith", False)
    if not isinstance(category, str) or category not in CATEGORIES:
        raise InvalidParam(f"The category is one of: {', '.join(sorted(CATEGORIES))}.")
    if good_faith is not True:
        raise InvalidParam("Say that you report in good faith: good_faith has to be true.")
    return Disclosure(category, True, _items(value.get("items")))


def parse_code(text: str, *, category: str, good_faith: bool) -> Disclosure:
    """What `proof.html` and `relay report-proof` print. Raises an ApiError that says what to do."""
    bare = "".join(text.split())
    if not bare.startswith(CODE_MARK):
        raise InvalidParam(NOT_A_CODE)
    if len(bare) > MAX_BYTES * 4 // 3:
        raise TooLarge(f"The proof is larger than {MAX_BYTES // 1024} KiB. Choose fewer messages.")
    try:
        value = json.loads(from_base64(bare.removeprefix(CODE_MARK)))
    except (BadJson, ValueError, RecursionError, binascii.Error) as bad:
        raise InvalidParam(f"The proof code is damaged. {NOT_A_CODE}") from bad
    if not isinstance(value, dict):
        raise InvalidParam(f"The proof code is damaged. {NOT_A_CODE}")
    require_shallow(value)  # as everything that comes as JSON
    return parse_disclosure({**value, "category": category, "good_faith": good_faith})


def code_of(items: tuple[Item, ...] | list[Item]) -> str:
    value = {"v": VERSION, "alg": ALGORITHM, "items": [item_json(one) for one in items]}
    return CODE_MARK + to_urlsafe_base64(encode(value))


def item_json(item: Item) -> dict[str, Any]:
    value: dict[str, Any] = {"event_id": item.event_id, "index": item.index, "prk": to_base64(item.prk)}
    return value if item.content is None else {**value, "content": dict(item.content)}


def _items(value: object) -> tuple[Item, ...]:
    if not isinstance(value, list) or not value:
        raise InvalidParam("The proof names no message: items is a list of them.")
    if len(value) > MAX_ITEMS:
        raise InvalidParam(f"The proof has {len(value)} messages; {MAX_ITEMS} are the most. Choose those that matter.")
    items = tuple(_item(one) for one in value)
    if len({one.event_id for one in items}) != len(items):
        raise InvalidParam("The proof names a message twice. Name each once.")
    return items


def _item(value: object) -> Item:
    if not isinstance(value, dict) or set(value) - _ITEM_KEYS:
        raise InvalidParam(
            "A message of the proof has keys that it should not have. Make the proof with this relay's own tool."
        )
    event_id, index, prk, content = (value.get(name) for name in ("event_id", "index", "prk", "content"))
    if not isinstance(event_id, str) or not event_id.startswith("$") or len(event_id) > MAX_EVENT_ID:
        raise InvalidParam("A message of the proof has no event ID.")
    if type(index) is not int or not 0 <= index <= MAX_INDEX:
        raise InvalidParam("A message of the proof has no index.")
    if content is not None and not isinstance(content, dict):
        raise BadJson("The content of a message of the proof is not an object.")
    try:
        raw = from_base64(prk) if isinstance(prk, str) else b""
    except BadJson:
        raw = b""
    if len(raw) != PRK_BYTES:
        raise InvalidParam(f"A message of the proof has no key (prk) of {PRK_BYTES} bytes.")
    return Item(event_id, index, raw, content)


def _require_no_ratchet(value: object) -> None:
    """Such a proof discloses more than one message, so nothing of it is looked at."""
    items = value.get("items") if isinstance(value, dict) else None
    for one in (value, *(items if isinstance(items, list) else ())):
        if isinstance(one, dict) and ("ratchet" in one or "session_key" in one):
            raise InvalidParam(OPENS_TOO_MUCH)


def _require_small(value: Mapping[str, Any]) -> None:
    try:
        size = len(encode(value))
    except ApiError as bad:
        raise BadJson(f"{KEY} has no canonical JSON form.") from bad
    if size > MAX_BYTES:
        raise TooLarge(f"The proof is larger than {MAX_BYTES // 1024} KiB. Choose fewer messages.")
