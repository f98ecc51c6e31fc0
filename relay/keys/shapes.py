"""What device keys and cross-signing keys have to look like, and which signatures on them may be shown.

Not about whether a signature is valid (`cross_signing`). Spec: client-server-api/#device-keys, #key-and-signature-security.
"""

from __future__ import annotations

from typing import Any

import orjson

from relay.errors import BadJson, Forbidden, InvalidParam, TooLarge
from relay.protocol.canonical import from_base64
from relay.protocol.signing import KEY_BYTES

Json = dict[str, Any]

MAX_KEYS_BYTES = 16 * 1024
MAX_NAME = 255
USAGES = ("master", "self_signing", "user_signing")


def device_keys(value: object, user_id: str, device_id: str) -> bytes:
    """The device's keys as they will be handed out. Raises BadJson, Forbidden, TooLarge.

    Unknown keys stay, `unsigned` goes, and of the signatures only the owner's own: nobody may see those that other
    people made with their user-signing keys.
    """
    if not isinstance(value, dict):
        raise BadJson("The key device_keys is not an object.")
    if value.get("user_id") != user_id or value.get("device_id") != device_id:
        raise InvalidParam("The device_keys name another user or device. A device can only publish its own keys.")
    if not isinstance(value.get("keys"), dict) or not isinstance(value.get("algorithms"), list):
        raise BadJson("The device_keys have no keys or no algorithms.")
    return packed(value, user_id)


def signing_key(value: object, user_id: str, usage: str) -> bytes:
    """A cross-signing key as it will be handed out. Raises BadJson, Forbidden, InvalidParam, TooLarge."""
    if not isinstance(value, dict):
        raise BadJson(f"The {usage} key is not an object.")
    if value.get("user_id") != user_id:
        raise Forbidden(f"The {usage} key names another user. Only your own can be published.")
    usages = value.get("usage")
    if not isinstance(usages, list) or usage not in usages:
        raise InvalidParam(f"The usage of the {usage} key does not list {usage}.")
    public_part(value)
    return packed(value, user_id)


def public_part(value: Json) -> tuple[str, bytes]:
    """(`ed25519:…`, the key's 32 bytes) of a cross-signing key, which has exactly one. Raises InvalidParam."""
    keys = value.get("keys")
    if isinstance(keys, dict) and len(keys) == 1:
        [(key_id, text)] = keys.items()
        if isinstance(text, str) and key_id == f"ed25519:{text}":
            try:
                raw = from_base64(text)
            except BadJson:
                raw = b""
            if len(raw) == KEY_BYTES:
                return key_id, raw
    raise InvalidParam("A cross-signing key has exactly one public key: ed25519:KEY with the same KEY as its value.")


def packed(value: Json, owner: str) -> bytes:
    """The bytes that are stored and spliced into answers."""
    kept = {key: part for key, part in value.items() if key != "unsigned"}
    signatures = kept.pop("signatures", None)
    own = signatures.get(owner) if isinstance(signatures, dict) else None
    if isinstance(own, dict) and own:
        kept["signatures"] = {owner: own}
    try:
        raw = orjson.dumps(kept, option=orjson.OPT_SORT_KEYS)
    except TypeError as bad:
        raise BadJson("These keys have no JSON form.") from bad
    if len(raw) > MAX_KEYS_BYTES:
        raise TooLarge(f"The keys of a device are larger than {MAX_KEYS_BYTES} bytes.")
    return raw


def unsigned_form(value: Json) -> Json:
    """What is signed: two uploads of one key differ at most in the rest."""
    return {key: part for key, part in value.items() if key not in ("signatures", "unsigned")}


def own_signatures(value: Json, owner: str) -> dict[str, str]:
    signatures = value.get("signatures")
    own = signatures.get(owner) if isinstance(signatures, dict) else None
    return {k: v for k, v in own.items() if isinstance(v, str)} if isinstance(own, dict) else {}


def with_signatures(value: Json, owner: str, more: dict[str, str]) -> Json:
    """The same key with further signatures of one person."""
    old = value.get("signatures")
    signatures = dict(old) if isinstance(old, dict) else {}
    mine = signatures.get(owner)
    signatures[owner] = {**(mine if isinstance(mine, dict) else {}), **more}
    return {**value, "signatures": signatures}


def is_name(value: object) -> bool:
    """A device ID, key ID, message ID and the like: a string that is neither empty nor long."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME
