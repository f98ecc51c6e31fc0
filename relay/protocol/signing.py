"""Ed25519 keys and signed JSON objects. Not about which signature an event needs (`event.required_signers`), nor
about where the keys of other servers come from.

Spec: appendices/#signing-json.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import nacl.bindings
import nacl.exceptions
import nacl.utils

from relay.errors import BadJson
from relay.protocol.canonical import encode, from_base64, to_base64

ALGORITHM = "ed25519"
SEED_BYTES = 32
KEY_BYTES = 32
SIGNATURE_BYTES = 64

_VERSION = re.compile(r"[A-Za-z0-9_]+\Z")


class SigningKey:
    """Our side of a key pair. `key_id` is what stands in `signatures`: `ed25519:xxx`."""

    __slots__ = ("_secret", "key_id", "verify_key", "verify_key_base64")

    def __init__(self, key_id: str, seed: bytes) -> None:
        algorithm, _, version = key_id.partition(":")
        if algorithm != ALGORITHM or not _VERSION.match(version):
            raise BadJson("A signing key is named ed25519:NAME; the name has letters, digits and underscores.")
        if len(seed) != SEED_BYTES:
            raise BadJson(f"The seed of a signing key has {SEED_BYTES} bytes, not {len(seed)}.")
        self.key_id = key_id
        self.verify_key, self._secret = nacl.bindings.crypto_sign_seed_keypair(seed)
        self.verify_key_base64 = to_base64(self.verify_key)

    @classmethod
    def generate(cls, key_id: str) -> SigningKey:
        return cls(key_id if ":" in key_id else f"{ALGORITHM}:{key_id}", nacl.utils.random(SEED_BYTES))

    @classmethod
    def load(cls, text: str) -> SigningKey:
        """From the one line `ed25519 NAME SEED`, which Synapse and signedjson write too."""
        words = text.split()
        if len(words) != 3 or words[0] != ALGORITHM:
            raise BadJson("A signing key file holds one line: ed25519 NAME SEED.")
        return cls(f"{ALGORITHM}:{words[1]}", from_base64(words[2]))

    def dump(self) -> str:
        return f"{ALGORITHM} {self.key_id.partition(':')[2]} {to_base64(self._secret[:SEED_BYTES])}"

    def sign(self, message: bytes) -> str:
        return to_base64(nacl.bindings.crypto_sign(message, self._secret)[:SIGNATURE_BYTES])

    def become(self, other: SigningKey) -> None:
        """Whoever holds this key signs with the other one from now on."""
        self.key_id, self.verify_key, self._secret = other.key_id, other.verify_key, other._secret
        self.verify_key_base64 = other.verify_key_base64

    def __repr__(self) -> str:
        return f"SigningKey({self.key_id})"


@dataclass(frozen=True, slots=True)
class OldKey:
    """The public half of a key of ours that no longer signs; `expired_at` in milliseconds."""

    key_id: str
    verify_key_base64: str
    expired_at: int


def sign_json(obj: dict[str, Any], name: str, key: SigningKey) -> dict[str, Any]:
    """A new object with our signature beside those it has. `unsigned` is left as it is and not signed."""
    old = obj.get("signatures")
    signatures = dict(old) if isinstance(old, dict) else {}
    mine = signatures.get(name)
    signature = key.sign(_signed_bytes(obj))
    signatures[name] = {**(mine if isinstance(mine, dict) else {}), key.key_id: signature}
    return {**obj, "signatures": signatures}


def verify_json(obj: dict[str, Any], name: str, key_id: str, verify_key: bytes) -> bool:
    """Whether `name` signed the object with this key. Never raises for what a peer may send."""
    signature = signature_of(obj, name, key_id)
    if signature is None:
        return False
    try:
        return verify_bytes(_signed_bytes(obj), signature, verify_key)
    except BadJson:
        return False


def signature_of(obj: dict[str, Any], name: str, key_id: str) -> bytes | None:
    """The raw signature, or None where there is none of the right form."""
    signatures = obj.get("signatures")
    mine = signatures.get(name) if isinstance(signatures, dict) else None
    text = mine.get(key_id) if isinstance(mine, dict) else None
    if not isinstance(text, str):
        return None
    try:
        return from_base64(text)
    except BadJson:
        return None


def verify_bytes(message: bytes, signature: bytes, verify_key: bytes) -> bool:
    if len(signature) != SIGNATURE_BYTES or len(verify_key) != KEY_BYTES:
        return False
    try:
        nacl.bindings.crypto_sign_open(signature + message, verify_key)
    except nacl.exceptions.BadSignatureError:
        return False
    return True


def _signed_bytes(obj: dict[str, Any]) -> bytes:
    return encode({key: value for key, value in obj.items() if key != "signatures" and key != "unsigned"})
