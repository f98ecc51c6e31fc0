"""A Megolm session in a test's hand: what an honest client sends, what its key opens, and every odd thing that could be sent."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import vodozemac
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from relay.moderation import megolm
from relay.moderation.disclosure_form import Disclosure, Item
from relay.moderation.megolm import Keys

Json = dict[str, Any]
RIM = 72


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode().rstrip("=")


class Session:
    """An honest sender's session. `ratchet` and `prk` are what every device in the room can compute from its key."""

    def __init__(self) -> None:
        self.outbound = vodozemac.GroupSession()
        self.inbound = vodozemac.InboundGroupSession(self.outbound.session_key)
        self.id: str = self.outbound.session_id

    def ratchet(self, index: int) -> bytes:
        exported = base64.b64decode(self.inbound.export_at(index).to_base64() + "==")
        return exported[5:133]

    def prk(self, index: int) -> bytes:
        return megolm.prk_of(self.ratchet(index))

    def keys(self, index: int) -> Keys:
        return megolm.keys_of(self.prk(index))

    def encrypts(self, plaintext: bytes) -> Json:
        return self.content(self.outbound.encrypt(plaintext).to_base64())

    def says(self, room: str, text: str, **more: Any) -> Json:
        """The content of an event with a text message for this room."""
        return self.encrypts(inner(room, text, **more))

    def content(self, ciphertext: str) -> Json:
        return {
            "algorithm": megolm.ALGORITHM, "ciphertext": ciphertext, "session_id": self.id,
            "device_id": "DEVICE", "sender_key": b64(bytes(32)),
        }  # fmt: skip


class Forged(Session):
    """A session of which the test holds the signing key too: it can build what no honest client builds."""

    def __init__(self, ratchet: bytes = bytes(range(128))) -> None:
        from nacl.signing import SigningKey

        self._signer = SigningKey.generate()
        self.id = b64(bytes(self._signer.verify_key))
        self._ratchet = ratchet

    def ratchet(self, index: int) -> bytes:
        return self._ratchet

    def builds(
        self,
        plaintext: bytes,
        *,
        index: int = 0,
        payload: Any = None,
        sign: bool = True,
        canonical: bool = True,
        pad: bool = True,
    ) -> Json:
        """`payload(index, ciphertext)` writes the protobuf in its own way; MAC and signature are over the canonical form, as
        the clients' library checks them, or (`canonical` False) over the bytes as they are sent."""
        keys = self.keys(index)
        fill = 16 - len(plaintext) % 16
        padded = plaintext + bytes([fill]) * fill if pad else plaintext
        encryptor = Cipher(algorithms.AES(keys.aes), modes.CBC(keys.iv)).encryptor()
        ciphertext = encryptor.update(padded) + encryptor.finalize()
        plain_form = b"\x03\x08" + varint(index) + b"\x12" + varint(len(ciphertext)) + ciphertext
        sent_form = plain_form if payload is None else payload(index, ciphertext)
        covered = plain_form if canonical else sent_form
        mac = hmac.digest(keys.mac, covered, hashlib.sha256)[:8]
        signature = self._signer.sign(covered + mac).signature if sign else bytes(64)
        return self.content(b64(sent_form + mac + signature))


def inner(room: str, text: str, **more: Any) -> bytes:
    return json.dumps(
        {"type": "m.room.message", "content": {"msgtype": "m.text", "body": text}, "room_id": room, **more}
    ).encode()


def varint(value: int) -> bytes:
    made = b""
    while value > 127:
        made += bytes([value & 127 | 128])
        value >>= 7
    return made + bytes([value])


def disclosure(*items: Item) -> Disclosure:
    return Disclosure("harassment", True, items)
