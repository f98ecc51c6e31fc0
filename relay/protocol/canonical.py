"""Canonical JSON and unpadded base64: the bytes that are hashed and signed.

Not about what an event may contain (`event.py`). Spec: appendices/#canonical-json, #unpadded-base64.
"""

from __future__ import annotations

import binascii
import re
from typing import Any

import canonicaljson
import orjson

from relay.errors import BadJson

MAX_INTEGER = 2**53 - 1
# Deeper values can't be serialised by either encoder; nobody but an attacker sends them.
MAX_DEPTH = 500

_SORT = orjson.OPT_SORT_KEYS
_MINUS_AND_UNDERSCORE = str.maketrans("-_", "+/")
# A number with a fraction or an exponent, at a place where a value can stand. May also match inside a string: that
# costs time, never correctness.
_FLOAT = re.compile(rb"[:,\[]-?[0-9]+[.eE]")


def encode(value: Any) -> bytes:
    """Canonical JSON of whatever came out of a JSON parser, floats and huge integers (room versions 3 to 5) included."""
    try:
        raw = orjson.dumps(value, option=_SORT)
        if _FLOAT.search(raw) is None and not isinstance(value, float):
            return raw
    except TypeError:  # an integer beyond 64 bits, a lone surrogate, more than 254 levels
        pass
    return _encode_slowly(value)


def encode_checked(value: Any) -> bytes:
    """The same for a value that passed `check_strict`: no float can be in it, so nobody looks for one."""
    try:
        return orjson.dumps(value, option=_SORT)
    except TypeError:
        return _encode_slowly(value)


def exact(raw: bytes) -> bytes:
    """The same bytes in no more memory than they need: what the encoder makes lies in a buffer of several times its size, which
    does not matter for what goes at once."""
    return bytes(memoryview(raw))


def encode_strict(value: Any) -> bytes:
    """Canonical JSON as room versions 6 and later demand it. Raises BadJson."""
    check_strict(value)
    return encode_checked(value)


def check_strict(value: Any) -> None:
    """Raises BadJson for floats, integers of more than 53 bits, lone surrogates, keys that are no strings, deep nesting."""
    layer = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in layer:
            kind = type(item)
            if kind is str:
                if not item.isascii():
                    _check_text(item)
            elif kind is dict:
                for key in item:
                    if type(key) is not str:
                        raise BadJson("A key of a JSON object has to be a string.")
                    if not key.isascii():
                        _check_text(key)
                below.extend(item.values())
            elif kind is list or kind is tuple:
                below.extend(item)
            elif kind is int:
                if not -MAX_INTEGER <= item <= MAX_INTEGER:
                    raise BadJson("Integers in Matrix lie between -(2^53)+1 and (2^53)-1. Send larger ones as strings.")
            elif kind is float:
                raise BadJson(
                    "Numbers with a fraction or an exponent can't be used in events. Send integers or strings."
                )
            elif item is not None and kind is not bool:
                raise BadJson(f"A value of the type {kind.__name__} is not JSON.")
        if not below:
            return
        layer = below
    raise BadJson(f"The JSON is nested more than {MAX_DEPTH} levels deep.")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as bad:
        raise BadJson("A string holds half of a surrogate pair, which is not a character.") from bad


def _encode_slowly(value: Any) -> bytes:
    try:
        return canonicaljson.encode_canonical_json(value)
    except (ValueError, TypeError, RecursionError) as bad:
        raise BadJson("This value has no canonical JSON form.") from bad


def to_base64(raw: bytes) -> str:
    return binascii.b2a_base64(raw, newline=False).rstrip(b"=").decode("ascii")


def to_urlsafe_base64(raw: bytes) -> str:
    return to_base64(raw).replace("+", "-").replace("/", "_")


def from_base64(text: str) -> bytes:
    """Tolerates padding and the URL-safe letters, which other servers accept too. Raises BadJson."""
    try:
        letters = text.rstrip("=").translate(_MINUS_AND_UNDERSCORE)
        return binascii.a2b_base64(letters + "=" * (-len(letters) % 4), strict_mode=True)
    except (ValueError, AttributeError, TypeError) as bad:
        raise BadJson("This is not unpadded base64.") from bad
