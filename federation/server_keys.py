"""A server's published keys as it signs them: read, judged, merged with what was known, and made for ourselves.

Pure: it is told the time. Not about where they come from (`keyring.py`). Spec: server-server-api/#publishing-keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relay.clock import DAY
from relay.errors import BadJson
from relay.protocol.canonical import from_base64
from relay.protocol.signing import KEY_BYTES, OldKey, SigningKey, sign_json, verify_json

# Spec: rooms/v5/#signing-key-validity-period: whatever a server says, no longer than this.
MAX_VALIDITY = 7 * DAY
OWN_VALIDITY = DAY
MAX_KEYS = 64
MAX_KEY_ID = 255
ALGORITHM = "ed25519:"


@dataclass(frozen=True, slots=True)
class KnownKey:
    """`valid_until` in milliseconds; `expired`: the server itself says that it no longer uses the key since then."""

    raw: bytes
    valid_until: int
    expired: bool = False

    def valid_at(self, when: int, *, strict: bool) -> bool:
        """For an event made at `when`. Room versions before 5 ignore valid_until, but not that a key was put away."""
        return when <= self.valid_until or not (strict or self.expired)


class BadKeys(Exception):
    """The answer is not one that this server could have signed."""


def read(server: str, answer: Mapping[str, Any], now: int) -> dict[str, KnownKey]:
    """The keys of an answer that came from `server`, or was kept. Raises BadKeys."""
    if answer.get("server_name") != server:
        raise BadKeys("it speaks for another server")
    until = answer.get("valid_until_ts")
    if type(until) is not int:
        raise BadKeys("valid_until_ts is not an integer")
    until = min(until, now + MAX_VALIDITY)
    found: dict[str, KnownKey] = {}
    for key_id, entry in _entries(answer.get("old_verify_keys", {})):
        expired_at = entry.get("expired_ts")
        if type(expired_at) is int:
            found[key_id] = KnownKey(_raw(entry), expired_at, expired=True)
    current = {key_id: KnownKey(_raw(entry), until) for key_id, entry in _entries(answer.get("verify_keys"))}
    if not any(verify_json(dict(answer), server, key_id, key.raw) for key_id, key in current.items()):
        raise BadKeys("it is not signed with one of its own keys")
    return found | current


def _entries(value: object) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(value, dict):
        raise BadKeys("its keys are not an object")
    if len(value) > MAX_KEYS:
        raise BadKeys(f"it has more than {MAX_KEYS} keys")
    return [
        (key_id, entry)
        for key_id, entry in value.items()
        if key_id.startswith(ALGORITHM) and len(key_id) <= MAX_KEY_ID and isinstance(entry, dict)
    ]


def _raw(entry: Mapping[str, Any]) -> bytes:
    text = entry.get("key")
    try:
        raw = from_base64(text) if isinstance(text, str) else b""
    except BadJson:
        raw = b""
    if len(raw) != KEY_BYTES:
        raise BadKeys("a key is not an ed25519 key in base64")
    return raw


def own_answer(server_name: str, key: SigningKey, old: Sequence[OldKey], now: int) -> dict[str, Any]:
    """What we publish."""
    return sign_json(
        {
            "server_name": server_name,
            "valid_until_ts": now + OWN_VALIDITY,
            "verify_keys": {key.key_id: {"key": key.verify_key_base64}},
            "old_verify_keys": {
                one.key_id: {"key": one.verify_key_base64, "expired_ts": one.expired_at} for one in old
            },
        },
        server_name,
        key,
    )
