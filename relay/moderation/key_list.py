"""The signed list of moderators' keys: each version is signed by a key of the version before. Pure.

The first one is signed by its own recovery key. A new key counts a day after it was signed, so that others can see it and
object; a key that is left out gets nothing new from that moment on. Whoever opens envelopes keeps the last version she saw
and takes only what follows from it (`follow`): a relay that was broken into can't slip in a key of its own.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from relay.clock import DAY
from relay.errors import BadJson
from relay.ids import is_user_id
from relay.moderation.moderator_secret import KEY_BYTES, ModeratorPublic, ModeratorSecret, signed_bytes
from relay.protocol.canonical import from_base64, to_base64

WAIT_MS = DAY
MIN_KEYS = 2
MAX_LISTED = 64

Kind = Literal["moderator", "recovery"]


class BadList(Exception):
    """A version of the list that does not follow from the one before. The text says why."""


@dataclass(frozen=True, slots=True)
class Listed:
    user_id: str
    kind: Kind
    public: ModeratorPublic
    active_ts: int

    @property
    def key_id(self) -> str:
        return self.public.key_id

    def json(self) -> dict[str, Any]:
        return {
            "key_id": self.key_id,
            "user_id": self.user_id,
            "kind": self.kind,
            "seal_key": to_base64(self.public.seal_key),
            "sign_key": to_base64(self.public.sign_key),
            "active_ts": self.active_ts,
        }


@dataclass(frozen=True, slots=True)
class KeyList:
    server: str
    seq: int
    made_ts: int
    keys: tuple[Listed, ...]
    statement: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return to_base64(hashlib.sha256(signed_bytes(self.statement)).digest())

    def find(self, key_id: str) -> Listed | None:
        return next((one for one in self.keys if one.key_id == key_id), None)

    def active(self, now: int) -> list[Listed]:
        return [one for one in self.keys if one.active_ts <= now]


def first(
    server: str, keys: Sequence[tuple[str, Kind, ModeratorPublic]], recovery: ModeratorSecret, now: int
) -> KeyList:
    """The first version. Its keys count at once, since nobody is there yet who could object."""
    listed = [Listed(user_id, kind, public, now) for user_id, kind, public in keys]
    return _signed(server, 0, "", now, listed, recovery)


def added(
    before: KeyList, user_id: str, kind: Kind, public: ModeratorPublic, signer: ModeratorSecret, now: int
) -> KeyList:
    listed = [*before.keys, Listed(user_id, kind, public, now + WAIT_MS)]
    return _signed(before.server, before.seq + 1, before.digest, now, listed, signer)


def removed(before: KeyList, key_ids: Sequence[str], signer: ModeratorSecret, now: int) -> KeyList:
    listed = [one for one in before.keys if one.key_id not in key_ids]
    return _signed(before.server, before.seq + 1, before.digest, now, listed, signer)


def _signed(server: str, seq: int, prev: str, now: int, keys: Sequence[Listed], signer: ModeratorSecret) -> KeyList:
    statement: dict[str, Any] = {
        "v": 1,
        "server": server,
        "seq": seq,
        "prev": prev,
        "made_ts": now,
        "keys": [one.json() for one in keys],
        "signed_by": signer.public.key_id,
    }
    statement["signature"] = to_base64(signer.sign(signed_bytes(statement)))
    return KeyList(server, seq, now, tuple(keys), statement)


def read(value: object) -> KeyList:
    """The shape only; whether it may stand is for `follow`. Raises BadList."""
    if not isinstance(value, Mapping) or value.get("v") != 1:
        raise BadList("This is not a list of moderators' keys of a version known here.")
    server, seq, made_ts, keys = (value.get(name) for name in ("server", "seq", "made_ts", "keys"))
    if not isinstance(server, str) or type(seq) is not int or type(made_ts) is not int or not isinstance(keys, list):
        raise BadList("The list of keys lacks its server, number, time or keys.")
    if not MIN_KEYS <= len(keys) <= MAX_LISTED:
        raise BadList(
            f"The list has {len(keys)} keys; it needs {MIN_KEYS} to {MAX_LISTED}. Add another key before you remove one."
        )
    known = {"v", "server", "seq", "prev", "made_ts", "keys", "signed_by", "signature"}
    if set(value) != known or any(not isinstance(value[name], str) for name in ("prev", "signed_by", "signature")):
        raise BadList("The list of keys has keys that it should not have, or lacks some.")
    try:
        listed = tuple(_listed(one) for one in keys)
    except (BadJson, KeyError, TypeError, AttributeError) as bad:
        raise BadList("A key in the list is not one.") from bad
    if len({one.key_id for one in listed}) != len(listed):
        raise BadList("A key stands twice in the list.")
    return KeyList(server, seq, made_ts, listed, dict(value))


def _listed(one: Mapping[str, Any]) -> Listed:
    public = ModeratorPublic(from_base64(one["seal_key"]), from_base64(one["sign_key"]))
    found = Listed(one["user_id"], one["kind"], public, one["active_ts"])
    right = is_user_id(found.user_id) and found.kind in ("moderator", "recovery") and type(found.active_ts) is int
    sizes = len(public.seal_key) == len(public.sign_key) == KEY_BYTES
    if not right or not sizes or found.json() != dict(one):
        raise BadJson("This is not a listed key.")
    return found


def follow(before: KeyList | None, after: KeyList) -> None:
    """Whether `after` is the next version. Raises BadList."""
    signed_by = after.statement["signed_by"]
    if before is None:
        signer = after.find(signed_by)
        if after.seq != 0 or after.statement["prev"] != "" or signer is None or signer.kind != "recovery":
            raise BadList("The first list is not signed by its own recovery key.")
        if any(one.active_ts != after.made_ts for one in after.keys):
            raise BadList("The keys of the first list count from its making on.")
    else:
        if after.server != before.server or after.seq != before.seq + 1 or after.statement["prev"] != before.digest:
            raise BadList("The list was changed meanwhile, or is not that of this relay. Read it again, and sign anew.")
        if after.made_ts < before.made_ts:
            raise BadList(
                "The new list says that it is older than the present one. Set the clock of this machine right."
            )
        signer = before.find(signed_by)
        if signer is None or signer.active_ts > after.made_ts:
            raise BadList(
                "The list is signed by no key that counts now. Sign with a moderator's key or the recovery key."
            )
        for one in after.keys:
            was = before.find(one.key_id)
            if was is not None and was != one:
                raise BadList("A listed key was changed. Keys are added and removed, never changed.")
            if was is None and one.active_ts < after.made_ts + WAIT_MS:
                raise BadList("A new key counts a day after it was signed, not earlier.")
        if not any(one.kind == "recovery" for one in after.keys):
            raise BadList("A recovery key has to remain. Add the new one first.")
    try:
        signature = from_base64(after.statement["signature"])
    except BadJson:
        signature = b""
    if not signer.public.verifies(signed_bytes(after.statement), signature):
        raise BadList("The signature of the list does not hold.")


def follow_chain(pinned: KeyList | None, chain: Sequence[object]) -> KeyList:
    """The last version of a chain that begins at the first one, or at the one that was pinned. Raises BadList."""
    versions = [read(one) for one in chain]
    if not versions:
        raise BadList("The relay gave no list of keys.")
    if pinned is not None:
        at = next((number for number, one in enumerate(versions) if one.digest == pinned.digest), None)
        if at is None:
            raise BadList(
                "The relay's list of keys does not follow from the one you saw last. Don't go on: ask your operator in person."
            )
        versions = versions[at:]
    else:
        follow(None, versions[0])
    for one, after in itertools.pairwise(versions):
        follow(one, after)
    return versions[-1]
