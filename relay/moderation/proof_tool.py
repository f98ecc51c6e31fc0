"""What `relay report-proof` does, as `pages/static/proof.html` does it in a browser: from a client's key export and the events
as they were sent to a proof code. Pure; everything stays on the person's machine. Spec: client-server-api/#key-exports.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relay.errors import BadJson
from relay.moderation import megolm
from relay.moderation.disclosure_form import MAX_ITEMS, Item, code_of
from relay.moderation.megolm import ALGORITHM, Unproven
from relay.protocol.canonical import from_base64, to_base64

HEADER, FOOTER = "-----BEGIN MEGOLM SESSION DATA-----", "-----END MEGOLM SESSION DATA-----"
MAC_BYTES = 32
LEAST_BYTES = 1 + 16 + 16 + 4 + MAC_BYTES
MAX_ITERATIONS = 10_000_000
RATCHET_AT, RATCHET_BYTES = 5, 128


class NoProof(Exception):
    """It can't be made from what was given. The text says what to do."""


@dataclass(frozen=True, slots=True)
class Made:
    """One message and what opens it. `text` is what the person is about to disclose."""

    event: Mapping[str, Any] = field(repr=False)
    plaintext: bytes = field(repr=False)
    item: Item = field(repr=False)


def read_export(content: str, passphrase: str) -> list[Any]:
    """Raises NoProof."""
    begin, end = content.find(HEADER), content.find(FOOTER)
    if begin < 0 or end < begin:
        raise NoProof("This is not an export of message keys: it has no line BEGIN MEGOLM SESSION DATA.")
    try:
        raw = base64.b64decode("".join(content[begin + len(HEADER) : end].split()) + "==")
    except binascii.Error as bad:
        raise NoProof("This export is damaged. Export the keys again.") from bad
    if len(raw) < LEAST_BYTES or raw[0] != 1:
        raise NoProof("This export is damaged, or of a version that is not known here.")
    salt, iv, iterations = raw[1:17], raw[17:33], int.from_bytes(raw[33:37])
    if not 1 <= iterations <= MAX_ITERATIONS:
        raise NoProof("This export asks for more work than any client does.")
    keys = hashlib.pbkdf2_hmac("sha512", passphrase.encode(), salt, iterations, 64)
    if not hmac.compare_digest(hmac.digest(keys[32:], raw[:-MAC_BYTES], hashlib.sha256), raw[-MAC_BYTES:]):
        raise NoProof("The passphrase does not open this file. It is the one that you chose when exporting.")
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    decryptor = Cipher(algorithms.AES(keys[:32]), modes.CTR(iv)).decryptor()
    try:
        sessions = json.loads(decryptor.update(raw[37:-MAC_BYTES]) + decryptor.finalize())
    except (ValueError, RecursionError) as bad:
        raise NoProof("This export holds no list of keys.") from bad
    if not isinstance(sessions, list):
        raise NoProof("This export holds no list of keys.")
    return sessions


def read_events(text: str) -> list[dict[str, Any]]:
    """Events as they were sent, one after the other, or a list of them. Raises NoProof."""
    decoder, found, rest = json.JSONDecoder(), list[Any](), text.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError) as bad:
            raise NoProof("The event is not JSON. Copy the whole block, from { to }.") from bad
        found += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip(" \t\r\n,;")
    if not found:
        raise NoProof("There is no event. Give it as your client shows it: View source, original event source.")
    if len(found) > MAX_ITEMS:
        raise NoProof(f"These are more than {MAX_ITEMS} messages. Choose those that matter.")
    for one in found:
        content = one.get("content") if isinstance(one, dict) else None
        if isinstance(one, dict) and one.get("ciphertext_gone") is True:
            raise NoProof(
                "The relay no longer has this message's ciphertext. Give the event as your client shows it, and add --whole."
            )
        if (
            not isinstance(content, dict)
            or not isinstance(one.get("event_id"), str)
            or not isinstance(content.get("ciphertext"), str)
        ):
            raise NoProof(
                "This is no encrypted message with event_id and content. In Element take the original event source, not the decrypted one."
            )
    return found


def prove(event: Mapping[str, Any], sessions: Iterable[Any], *, whole: bool = False) -> Made:
    """The one value that opens this event. Raises NoProof."""
    import vodozemac

    content = event["content"]
    if content.get("algorithm") != ALGORITHM:
        raise NoProof("A message is not encrypted with Megolm, so there is nothing to prove with keys.")
    try:
        index = int(vodozemac.MegolmMessage.from_base64(content["ciphertext"]).message_index())
    except Exception as bad:
        raise NoProof("The ciphertext is not a Megolm message. Copy the event whole.") from bad
    prk = megolm.prk_of(_ratchet(content.get("session_id"), index, sessions))
    try:
        message = megolm.parse(content, index)
        keys = megolm.keys_of(prk)
        megolm.require_authentic(message, keys)
        plaintext = megolm.decrypt(message, keys)
    except Unproven as not_so:
        if not_so.plaintext is None:
            raise NoProof("Your keys do not open this message. Copy the event whole.") from not_so
        plaintext = not_so.plaintext
    return Made(event, plaintext, Item(event["event_id"], index, prk, content if whole else None))


def code(made: Sequence[Made]) -> str:
    return code_of([one.item for one in made])


def _ratchet(session_id: object, index: int, sessions: Iterable[Any]) -> bytes:
    """R at this index, from the key that begins earliest."""
    import vodozemac

    best: tuple[int, bytes] | None = None
    for one in sessions:
        if not isinstance(one, dict) or one.get("session_id") != session_id:
            continue
        try:
            raw = from_base64(one.get("session_key", ""))
        except BadJson:
            continue
        if len(raw) >= RATCHET_AT + RATCHET_BYTES and raw[0] == 1:
            begins = int.from_bytes(raw[1:RATCHET_AT])
            best = (begins, raw) if best is None or begins < best[0] else best
    if best is None:
        raise NoProof("The export has no key for a message. Export the keys again on a device that can read it.")
    if best[0] > index:
        raise NoProof("Your key begins after this message: this device could not read it.")
    try:
        session = vodozemac.InboundGroupSession.import_session(vodozemac.ExportedSessionKey(to_base64(best[1])))
        exported = from_base64(session.export_at(index).to_base64())  # type: ignore[union-attr]
    except Exception as bad:
        raise NoProof("The key for a message is damaged. Export the keys again.") from bad
    return exported[RATCHET_AT : RATCHET_AT + RATCHET_BYTES]
