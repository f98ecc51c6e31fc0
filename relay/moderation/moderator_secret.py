"""A moderator's key: 32 secret bytes, made on her own machine or in her browser, and the two public keys that follow from them.

The one is sealed to (X25519), the other signs the list of moderators' keys (Ed25519). Secret and public keys have a form that
can be copied and written down, with a check sum; a secret is kept in a file or a browser only under a passphrase
(`lock`). Nothing of this is made or kept by a running relay. `pages/static/envelope.js` does the same with WebCrypto.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from relay.errors import BadJson
from relay.protocol.canonical import encode, from_base64, to_base64

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

# cryptography is loaded by the first who needs it: a relay on which nobody was reported does without its 7 MB.

SECRET_BYTES = 32
KEY_BYTES = 32
SUM_BYTES = 4
GROUP_LETTERS = 6
SECRET_MARK, PUBLIC_MARK = "rmk1-", "rmp1-"
LOCK_KDF = "PBKDF2-SHA-512"
LOCK_ITERATIONS = 600_000
# A file from elsewhere may ask for more work than anybody wants to do.
MAX_LOCK_ITERATIONS = 10_000_000

_SEAL, _SIGN = b"relay moderator key v1: seal", b"relay moderator key v1: sign"


class BadKey(Exception):
    """Not a moderator's key. The text says what to do."""


@dataclass(frozen=True, slots=True)
class ModeratorPublic:
    """What the relay knows of a moderator's key."""

    seal_key: bytes
    sign_key: bytes

    @property
    def key_id(self) -> str:
        return hashlib.sha256(b"relay moderator key id" + self.seal_key + self.sign_key).hexdigest()[:32]

    @property
    def text(self) -> str:
        return PUBLIC_MARK + _letters(self.seal_key + self.sign_key)

    @classmethod
    def read(cls, text: str) -> ModeratorPublic:
        raw = _raw(text, PUBLIC_MARK, 2 * KEY_BYTES, "the public half of a moderator's key")
        return cls(raw[:KEY_BYTES], raw[KEY_BYTES:])

    def verifies(self, message: bytes, signature: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.sign_key).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True, slots=True)
class ModeratorSecret:
    raw: bytes = field(repr=False)

    @classmethod
    def make(cls) -> ModeratorSecret:
        return cls(os.urandom(SECRET_BYTES))

    @classmethod
    def read(cls, text: str) -> ModeratorSecret:
        return cls(_raw(text, SECRET_MARK, SECRET_BYTES, "a moderator's key"))

    @property
    def text(self) -> str:
        return SECRET_MARK + _letters(self.raw)

    @property
    def public(self) -> ModeratorPublic:
        return ModeratorPublic(
            self.seal_private.public_key().public_bytes_raw(), self._sign_private.public_key().public_bytes_raw()
        )

    @property
    def seal_private(self) -> X25519PrivateKey:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        return X25519PrivateKey.from_private_bytes(_derived(self.raw, _SEAL))

    @property
    def _sign_private(self) -> Ed25519PrivateKey:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(_derived(self.raw, _SIGN))

    def sign(self, message: bytes) -> bytes:
        return self._sign_private.sign(message)


# --- under a passphrase --------------------------------------------------------------------------------------------


def lock(secret: ModeratorSecret, passphrase: str, *, iterations: int = LOCK_ITERATIONS) -> dict[str, Any]:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    salt, iv, public = os.urandom(16), os.urandom(12), secret.public
    locked = AESGCM(_stretched(passphrase, salt, iterations)).encrypt(iv, secret.raw, public.key_id.encode())
    return {
        "v": 1,
        "key_id": public.key_id,
        "public": public.text,
        "kdf": LOCK_KDF,
        "iterations": iterations,
        "salt": to_base64(salt),
        "iv": to_base64(iv),
        "locked": to_base64(locked),
    }


def unlock(stored: Mapping[str, Any], passphrase: str) -> ModeratorSecret:
    """Raises BadKey."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    iterations = stored.get("iterations")
    known = stored.get("v") == 1 and stored.get("kdf") == LOCK_KDF
    if not known or type(iterations) is not int or not 1 <= iterations <= MAX_LOCK_ITERATIONS:
        raise BadKey(
            "This is not a moderator's key file of this version. Take the file that the desk or `relay desk key` made."
        )
    try:
        salt, iv, locked = (from_base64(stored[name]) for name in ("salt", "iv", "locked"))
        raw = AESGCM(_stretched(passphrase, salt, iterations)).decrypt(iv, locked, str(stored["key_id"]).encode())
    except InvalidTag:
        raise BadKey("The passphrase does not open this key file. Try again.") from None
    except (BadJson, KeyError, ValueError, AttributeError) as bad:
        raise BadKey("This key file is damaged. Take your copy of it, or use the recovery key.") from bad
    secret = ModeratorSecret(raw)
    if len(raw) != SECRET_BYTES or secret.public.key_id != stored["key_id"]:
        raise BadKey("This key file is damaged. Take your copy of it, or use the recovery key.")
    return secret


def _stretched(passphrase: str, salt: bytes, iterations: int) -> bytes:
    return hashlib.pbkdf2_hmac("sha512", passphrase.encode("utf-8", "surrogatepass"), salt, iterations, 32)


# --- letters -------------------------------------------------------------------------------------------------------


def _derived(raw: bytes, info: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, salt=None, info=info).derive(raw)


def _sum(raw: bytes) -> bytes:
    return hashlib.sha256(b"relay check sum" + raw).digest()[:SUM_BYTES]


def _letters(raw: bytes) -> str:
    letters = base64.b32encode(raw + _sum(raw)).decode().rstrip("=").lower()
    return "-".join(letters[at : at + GROUP_LETTERS] for at in range(0, len(letters), GROUP_LETTERS))


def _raw(text: str, mark: str, size: int, what: str) -> bytes:
    bare = "".join(text.split()).lower()
    if not bare.startswith(mark):
        raise BadKey(f"This is not {what}: that begins with {mark}. Copy the whole line.")
    letters = bare.removeprefix(mark).replace("-", "").upper()
    try:
        raw = base64.b32decode(letters + "=" * (-len(letters) % 8))
    except ValueError:
        raw = b""
    if len(raw) != size + SUM_BYTES or _sum(raw[:size]) != raw[size:]:
        raise BadKey(f"There is a slip in {what}: its check sum is wrong. Copy the whole line again.")
    return raw[:size]


def signed_bytes(statement: Mapping[str, Any]) -> bytes:
    """What the signature of a signed statement covers."""
    return encode({key: value for key, value in statement.items() if key != "signature"})
