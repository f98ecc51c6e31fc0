"""Opens one Megolm message with the one value that opens it and no other: checks V6 to V10 of a disclosure. Pure.

The value is PRK_i = HMAC-SHA256(key 0^32, R_i), what HKDF extracts from the ratchet at index i. It fixes AES key, MAC key
and IV together, and can't be wound forward. What decrypted for the person must verify here, so the message is parsed by the
clients' own library, and MAC and signature are tried over the bytes as they came and over the form which that library
makes of them. Not here: whose event it is (disclosure.py). Spec: olm-megolm/megolm.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from relay.errors import BadJson
from relay.protocol.canonical import from_base64

ALGORITHM = "m.megolm.v1.aes-sha2"
PRK_BYTES = 32
# An event has 64 KiB, and base64 takes a third of it; whoever says more lies.
MAX_CIPHERTEXT = 65_536
MAC_BYTES = 8
SIGNATURE_BYTES = 64
RIM = MAC_BYTES + SIGNATURE_BYTES
BLOCK_BYTES = 16
MAX_INDEX = 2**32 - 1

Result = Literal["verified", "verified_remote", "invalid", "needs_human", "undisclosed"]

_SESSION_ID = re.compile(r"[A-Za-z0-9+/]{43}\Z")


class Unproven(Exception):
    """A check did not pass. `result` is invalid, needs_human or undisclosed; `reason` one of the fixed sentences in this code."""

    def __init__(
        self,
        step: str,
        reason: str,
        *,
        result: Result = "invalid",
        flag: str | None = None,
        plaintext: bytes | None = None,
    ) -> None:
        super().__init__(f"{step}: {reason}")
        self.step = step
        self.reason = reason
        self.result: Result = result
        self.flag = flag
        self.plaintext = plaintext


@dataclass(frozen=True, slots=True)
class Keys:
    aes: bytes = field(repr=False)
    mac: bytes = field(repr=False)
    iv: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Message:
    """A Megolm message as clients parse it. `forms` are its bytes as they came, and as the clients' library writes them."""

    session_id: str
    index: int
    ciphertext: bytes
    forms: tuple[bytes, ...]
    parsed: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class Opened:
    """What the message says. `plaintext` is what counts; `inner` is how one reader understands it."""

    index: int
    plaintext: bytes = field(repr=False)
    inner: dict[str, Any] = field(repr=False)


def prk_of(ratchet: bytes) -> bytes:
    """HKDF-Extract with an empty salt. From R_i, which the person's client has; there is no way back to it."""
    return hmac.digest(b"\0" * 32, ratchet, hashlib.sha256)


def keys_of(prk: bytes) -> Keys:
    """HKDF-Expand. Spec: olm-megolm/megolm, "MEGOLM_KEYS"."""
    blocks, last = b"", b""
    for number in range(1, 4):
        last = hmac.digest(prk, last + b"MEGOLM_KEYS" + bytes([number]), hashlib.sha256)
        blocks += last
    return Keys(blocks[:32], blocks[32:64], blocks[64:80])


def open_message(content: Mapping[str, Any], prk: bytes, index: int, room_id: str) -> Opened:
    """V6 to V10, in order. Raises Unproven."""
    message = parse(content, index)
    keys = keys_of(prk)
    require_authentic(message, keys)
    plaintext = decrypt(message, keys)
    return Opened(message.index, plaintext, read_inner(plaintext, room_id))


def parse(content: Mapping[str, Any], index: int) -> Message:
    """V6."""
    import vodozemac

    if content.get("algorithm") != ALGORITHM:
        raise Unproven("V6", "The event is not encrypted with Megolm.")
    session_id, text = content.get("session_id"), content.get("ciphertext")
    if not isinstance(session_id, str) or not _SESSION_ID.match(session_id):
        raise Unproven("V6", "The event has no session ID of 43 characters.")
    if not isinstance(text, str) or len(text) > MAX_CIPHERTEXT:
        raise Unproven("V6", "The event has no ciphertext.")
    try:
        parsed = vodozemac.MegolmMessage.from_base64(text)
        made = bytes(parsed.to_bytes())
        found = int(parsed.message_index())
    except Exception as bad:  # the library's own exception types are not all importable
        raise Unproven("V6", "The ciphertext is not a Megolm message.") from bad
    if found != index:
        raise Unproven("V6", "The message stands at another index than the one disclosed.")
    forms = [made]
    try:
        came = from_base64(text)
    except BadJson:
        came = made
    if came != made and len(came) > RIM:
        forms.insert(0, came)
    return Message(session_id, found, _ciphertext_of(made), tuple(forms), parsed)


def require_authentic(message: Message, keys: Keys) -> None:
    """V7 and V8 over each form; one has to pass both. A signature that fails does not stop the MAC from being looked at."""
    signed = [_signature_holds(message, form) for form in message.forms]
    authentic = [_mac_holds(keys, form) for form in message.forms]
    if any(signature and mac for signature, mac in zip(signed, authentic, strict=True)):
        return
    if any(authentic):
        # Libraries differ in which signatures they take: the victim may well have read it.
        text = _try_decrypt(message, keys)
        reason = "The key opens the message, but its signature does not hold."
        raise Unproven("V7", reason, result="needs_human", flag="signature_bad", plaintext=text)
    if not any(signed):
        raise Unproven("V7", "The message is not signed by its session.")
    raise Unproven("V8", "The disclosed key is not the key of this message.")


def signed_by_session(message: Message) -> bool:
    """Whether whoever made the session made this, whatever it says."""
    return any(_signature_holds(message, form) for form in message.forms)


def decrypt(message: Message, keys: Keys) -> bytes:
    """V9."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    if not message.ciphertext or len(message.ciphertext) % BLOCK_BYTES:
        raise Unproven("V9", "The ciphertext is no whole number of blocks.")
    decryptor = Cipher(algorithms.AES(keys.aes), modes.CBC(keys.iv)).decryptor()
    padded = decryptor.update(message.ciphertext) + decryptor.finalize()
    length = padded[-1]
    if not 1 <= length <= BLOCK_BYTES or padded[-length:] != bytes([length]) * length:
        raise Unproven("V9", "The plaintext is not padded as it should be.")
    return padded[:-length]


class _Doubled(ValueError):
    pass


def read_inner(plaintext: bytes, room_id: str) -> dict[str, Any]:
    """V10. The MAC held, so this was written by whoever had the session: what can't be read is for a person to look at."""

    def wrong(reason: str, flag: str) -> Unproven:
        return Unproven("V10", reason, result="needs_human", flag=flag, plaintext=plaintext)

    try:
        inner = json.loads(
            plaintext.decode("utf-8", "replace"), object_pairs_hook=_once, parse_constant=_refuse_constant
        )
    except _Doubled as doubled:
        raise wrong(
            "A key stands twice in the message: readers may show different texts.", "duplicate_keys"
        ) from doubled
    except (ValueError, RecursionError) as bad:  # huge integers are a ValueError too
        raise wrong("The message is not JSON that can be read here.", "unreadable") from bad
    if not isinstance(inner, dict):
        raise wrong("The message is not a JSON object.", "unreadable")
    if not isinstance(inner.get("type"), str) or not isinstance(inner.get("content"), dict):
        raise wrong("The message has no type or no content.", "unreadable")
    if not isinstance(inner.get("room_id"), str):
        raise wrong("The message does not say for which room it was written.", "unreadable")
    if inner["room_id"] != room_id:
        raise wrong("The message was written for another room.", "room_mismatch")
    return inner


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Doubled
    return found


def _refuse_constant(_: str) -> Any:
    raise ValueError("not JSON")


def _ciphertext_of(made: bytes) -> bytes:
    """From the library's own encoding: version, index, ciphertext, MAC, signature."""
    payload, at = made[:-RIM], 1
    if payload[:2] != b"\x03\x08":
        raise Unproven("V6", "The ciphertext is not a Megolm message.")
    _, at = _varint(payload, 2)
    if payload[at : at + 1] != b"\x12":
        raise Unproven("V6", "The ciphertext is not a Megolm message.")
    length, at = _varint(payload, at + 1)
    if at + length != len(payload):
        raise Unproven("V6", "The ciphertext is not a Megolm message.")
    return payload[at:]


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            break
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise Unproven("V6", "The ciphertext is not a Megolm message.")


def _mac_holds(keys: Keys, form: bytes) -> bool:
    """V8, in constant time."""
    expected = hmac.digest(keys.mac, form[:-RIM], hashlib.sha256)[:MAC_BYTES]
    return hmac.compare_digest(expected, form[-RIM:-SIGNATURE_BYTES])


def _signature_holds(message: Message, form: bytes) -> bool:
    """V7. With the clients' library: others accept other sets of signatures."""
    import vodozemac

    try:
        key = vodozemac.Ed25519PublicKey.from_base64(message.session_id)
        key.verify_signature(form[:-SIGNATURE_BYTES], message.parsed.signature())
    except Exception:
        return False
    return True


def _try_decrypt(message: Message, keys: Keys) -> bytes | None:
    try:
        return decrypt(message, keys)
    except Unproven:
        return None
