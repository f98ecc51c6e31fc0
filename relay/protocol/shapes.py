"""Shapes of JSON values: what may stand under a key, and a copy of nothing but that.

A shape is called with a value and returns the part of it that fits, or raises Misfit. A record copies the keys it lists
and leaves the others out without a word; that is how the seal (seal.py) builds events that cannot carry what nobody
listed. Not a validator of the standard's schemas: only keys that may be readable on disk have a shape at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from relay.ids import is_alias, is_room_id, is_server_name, is_user_id

MAX_IDENTIFIER_BYTES = 255
MAX_NAME = 512
MAX_TOPIC = 16_384
MAX_URL = 2_000
MAX_INTEGER = 2**53 - 1

type_of = type  # `type` is also an event's word, and a parameter's name in seal.py.

Shape = Callable[[Any], Any]

_IDENTIFIER = re.compile(r"[^\s\x00-\x1f\x7f]+\Z")
_EVENT_ID = re.compile(r"\$\S+\Z")
_MXC = re.compile(r"mxc://[^/\s]{1,255}/[A-Za-z0-9_\-]{1,255}\Z")
_URL = re.compile(r"https?://\S+\Z")
_ORDER = re.compile(r"[\x20-\x7E]{1,50}\Z")
_NUMERAL = re.compile(r"\s*-?[0-9]{1,16}\s*\Z")
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_"


class Misfit(Exception):
    """A value under a listed key has another shape. Says where and what was expected, never the value."""

    def __init__(self, expected: str, path: str = "") -> None:
        super().__init__(f"{path} must be {expected}" if path else f"it must be {expected}")
        self.expected = expected
        self.path = path

    def under(self, key: str) -> Misfit:
        return Misfit(self.expected, f"{key}.{self.path}" if self.path else key)


def _checked(fits: Callable[[Any], bool], expected: str) -> Shape:
    def shape(value: Any) -> Any:
        if not fits(value):
            raise Misfit(expected)
        return value

    return shape


def is_identifier(value: Any) -> bool:
    return (
        isinstance(value, str)
        and len(value.encode("utf-8", "surrogatepass")) <= MAX_IDENTIFIER_BYTES
        and _IDENTIFIER.match(value) is not None
    )


def is_base64(value: Any) -> bool:
    """Either alphabet, with or without padding, and not empty."""
    if not isinstance(value, str) or not value or not value.isascii():
        return False
    body = value.rstrip("=")
    return (
        len(value) - len(body) <= 2 and len(body) % 4 != 1 and bool(body) and not body.encode().translate(None, _BASE64)
    )


def is_event_id(value: Any) -> bool:
    """An event ID of any room version."""
    return isinstance(value, str) and len(value) <= MAX_IDENTIFIER_BYTES and _EVENT_ID.match(value) is not None


def _is_level(value: Any) -> bool:
    # Room versions up to 9 know power levels written as strings.
    if isinstance(value, str):
        return _NUMERAL.match(value) is not None
    return type_of(value) is int and abs(value) <= MAX_INTEGER


IDENTIFIER = _checked(is_identifier, "an identifier without spaces")
IDENTIFIER_OR_EMPTY = _checked(lambda v: v == "" or is_identifier(v), "an identifier without spaces")
EMPTY = _checked(lambda v: isinstance(v, str) and v == "", "empty")
USER_ID = _checked(is_user_id, "a user ID")
ROOM_ID = _checked(lambda v: is_room_id(v) and is_identifier(v), "a room ID")
EVENT_ID = _checked(is_event_id, "an event ID")
ALIAS = _checked(is_alias, "a room alias")
ALIAS_OR_NONE = _checked(lambda v: v is None or v == "" or is_alias(v), "a room alias")
SERVER_NAME = _checked(is_server_name, "a server name")
MXC = _checked(
    lambda v: v is None or v == "" or (isinstance(v, str) and _MXC.match(v) is not None), "an mxc:// address"
)
URL = _checked(lambda v: isinstance(v, str) and len(v) <= MAX_URL and _URL.match(v) is not None, "an http(s) address")
BASE64 = _checked(is_base64, "base64")
INTEGER = _checked(lambda v: type_of(v) is int and abs(v) <= MAX_INTEGER, "a whole number")
BOOLEAN = _checked(lambda v: v is True or v is False, "true or false")
LEVEL = _checked(_is_level, "a whole number")
ORDER = _checked(lambda v: isinstance(v, str) and _ORDER.match(v) is not None, "at most 50 ASCII characters")
NAME = _checked(
    lambda v: v is None or (isinstance(v, str) and len(v) <= MAX_NAME), f"a text of at most {MAX_NAME} characters"
)
TOPIC = _checked(lambda v: isinstance(v, str) and len(v) <= MAX_TOPIC, f"a text of at most {MAX_TOPIC} characters")

# Clients pass over a tombstone without a body: each of ours gets this one, whatever its sender wrote.
REPLACED = "This room has been replaced."


def one_of(*words: str) -> Shape:
    return _checked(lambda v: isinstance(v, str) and v in words, "one of " + ", ".join(words))


def listing(item: Shape) -> Shape:
    """A list in which every item fits."""

    def shape(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise Misfit("a list")
        try:
            return [item(each) for each in value]
        except Misfit as misfit:
            raise misfit.under("[]") from None

    return shape


def mapping(key: Shape, item: Shape) -> Shape:
    """An object whose keys are data: both keys and values have a shape."""

    def shape(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Misfit("an object")
        try:
            return {key(k): item(v) for k, v in value.items()}
        except Misfit as misfit:
            raise misfit.under("*") from None

    return shape


class Record:
    """An object with listed keys. Calling it copies those that are there; `fitting` also passes over those that misfit."""

    __slots__ = ("_shapes",)

    def __init__(self, **shapes: Shape) -> None:
        self._shapes = shapes

    @classmethod
    def of(cls, shapes: Mapping[str, Shape]) -> Record:
        """For keys that are not Python names."""
        return cls(**shapes)

    def __call__(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Misfit("an object")
        picked: dict[str, Any] = {}
        for key, shape in self._shapes.items():
            if key in value:
                try:
                    picked[key] = shape(value[key])
                except Misfit as misfit:
                    raise misfit.under(key) from None
        return picked

    def fitting(self, value: Mapping[str, Any]) -> dict[str, Any]:
        picked: dict[str, Any] = {}
        for key, shape in self._shapes.items():
            if key in value:
                try:
                    picked[key] = shape(value[key])
                except Misfit:
                    continue
        return picked


def left_out(whole: Any, picked: Any) -> int:
    """How many keys of `whole` are missing in `picked`, at any depth."""
    if isinstance(whole, dict):
        kept = picked if isinstance(picked, dict) else {}
        return sum(left_out(value, kept[key]) if key in kept else 1 for key, value in whole.items())
    if isinstance(whole, list) and isinstance(picked, list):
        return sum(left_out(value, kept) for value, kept in zip(whole, picked, strict=False))
    return 0
