"""Sealed envelopes: what only moderators can open, with keys that are not on the server. Pure.

The text lies under AES-256-GCM with a key of its own; that key is wrapped for each moderator's key by HPKE (RFC 9180: base
mode, X25519, HKDF-SHA256, AES-256-GCM), since a browser's WebCrypto can do all of these. Case, version and key are part of
what is authenticated, so that an envelope can't be shown as that of another case, nor a wrap as that of another key.
Deleting the wraps makes the text unreadable for good. `pages/static/envelope.js` opens the same form.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from relay.errors import BadJson
from relay.moderation.moderator_secret import ModeratorPublic, ModeratorSecret
from relay.protocol.canonical import encode, from_base64, to_base64

if TYPE_CHECKING:
    from cryptography.hazmat.primitives import hpke

# cryptography is loaded by the first who needs it: a relay on which nobody was reported does without its 7 MB.

VERSION = 1
DEK_BYTES = 32
IV_BYTES = 12
# `enc` and the wrapped key with its tag.
WRAP_BYTES = 32 + DEK_BYTES + 16
# One key could be lost; nothing is sealed that a single loss would make unreadable.
MIN_KEYS = 2
MAX_KEYS = 64


@cache
def _suite() -> hpke.Suite:
    from cryptography.hazmat.primitives import hpke

    return hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


class TooFewKeys(Exception):
    """Fewer than MIN_KEYS keys to seal to: nothing is sealed, and nothing of the text is kept."""


class NotOpened(Exception):
    """The envelope is not for this key, not of this case, or was changed. The text says which."""


@dataclass(frozen=True, slots=True)
class Recipient:
    key_id: str
    user_id: str
    public: ModeratorPublic


@dataclass(frozen=True, slots=True)
class Envelope:
    case_id: str
    version: int
    iv: bytes
    body: bytes = field(repr=False)
    wraps: Mapping[str, bytes] = field(repr=False)

    @property
    def digest(self) -> bytes:
        """Names the sealed text, whoever may open it: for the audit log, and as what is left when the wraps are gone."""
        return hashlib.sha256(_bound(self.case_id, self.version) + self.iv + self.body).digest()

    def json(self) -> dict[str, Any]:
        return {
            "v": VERSION,
            "case_id": self.case_id,
            "version": self.version,
            "iv": to_base64(self.iv),
            "body": to_base64(self.body),
            "wraps": {key_id: to_base64(wrap) for key_id, wrap in self.wraps.items()},
        }

    @classmethod
    def read(cls, value: Mapping[str, Any]) -> Envelope:
        """Raises NotOpened."""
        try:
            if value["v"] != VERSION or type(value["version"]) is not int or not isinstance(value["case_id"], str):
                raise NotOpened(
                    "This is not an envelope of a version known here. Use the relay's own release of this tool."
                )
            wraps = {str(key_id): from_base64(wrap) for key_id, wrap in list(value["wraps"].items())[:MAX_KEYS]}
            return cls(value["case_id"], value["version"], from_base64(value["iv"]), from_base64(value["body"]), wraps)
        except (BadJson, KeyError, AttributeError, TypeError) as bad:
            raise NotOpened("This is not an envelope, or it is damaged. Fetch it again from the relay.") from bad


def seal(plaintext: bytes, *, case_id: str, version: int, to: Sequence[Recipient], least: int = MIN_KEYS) -> Envelope:
    """Raises TooFewKeys."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if len({one.key_id for one in to}) < least:
        raise TooFewKeys(f"There are fewer than {least} moderators' keys to seal to.")
    dek, iv = os.urandom(DEK_BYTES), os.urandom(IV_BYTES)
    body = AESGCM(dek).encrypt(iv, plaintext, _bound(case_id, version))
    return Envelope(case_id, version, iv, body, {one.key_id: _wrap(dek, case_id, version, one.public) for one in to})


def open_with(secret: ModeratorSecret, envelope: Envelope, *, case_id: str, version: int) -> bytes:
    """The text of that case's envelope of that version. Raises NotOpened."""
    return _open_body(envelope, _dek(secret, envelope, case_id, version))


def rewrap(secret: ModeratorSecret, envelope: Envelope, to: Sequence[Recipient]) -> dict[str, bytes]:
    """On a moderator's machine: wraps for keys that came later. Raises NotOpened."""
    dek = _dek(secret, envelope, envelope.case_id, envelope.version)
    _open_body(envelope, dek)  # a wrap of something else is not passed on
    return {one.key_id: _wrap(dek, envelope.case_id, envelope.version, one.public) for one in to}


def _wrap(dek: bytes, case_id: str, version: int, public: ModeratorPublic) -> bytes:
    """`enc` (32 bytes), then the wrapped key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    info = _bound(case_id, version, public.key_id)
    return bytes(_suite().encrypt(dek, X25519PublicKey.from_public_bytes(public.seal_key), info))


def _dek(secret: ModeratorSecret, envelope: Envelope, case_id: str, version: int) -> bytes:
    from cryptography.exceptions import InvalidTag

    if envelope.case_id != case_id or envelope.version != version:
        raise NotOpened(
            "This envelope is that of another case or version. Fetch the case again, and tell your operator."
        )
    key_id = secret.public.key_id
    wrap = envelope.wraps.get(key_id)
    if wrap is None:
        raise NotOpened(
            "This envelope is not sealed to your key. Another moderator can rewrap it: relay moderator rewrap"
        )
    try:
        return bytes(_suite().decrypt(wrap, secret.seal_private, _bound(case_id, version, key_id)))
    except (InvalidTag, ValueError) as bad:
        raise NotOpened("The wrapped key was changed. Tell your operator, and try another key.") from bad


def _open_body(envelope: Envelope, dek: bytes) -> bytes:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(dek).decrypt(envelope.iv, envelope.body, _bound(envelope.case_id, envelope.version))
    except (InvalidTag, ValueError) as bad:
        raise NotOpened("The sealed text was changed. Tell your operator.") from bad


def _bound(case_id: str, version: int, key_id: str | None = None) -> bytes:
    """What is authenticated beside the text. Canonical JSON, so that no two of them have the same bytes."""
    return encode({"relay.envelope": VERSION, "case_id": case_id, "version": version, "key_id": key_id})
