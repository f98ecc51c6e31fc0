"""What a policy room says: rules about people, rooms and servers, read from its state. Pure.

The names of MSC2313 and the older ones of Mjolnir mean the same. Only bans count (a takedown is one that asks for more);
reasons are free text and are not looked at. A rule may name its entity by a hash only (MSC4205), so that a list is no
directory. Spec: client-server-api/#moderation-policy-lists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Literal

from relay.protocol.canonical import to_base64
from relay.protocol.globs import Glob, compile_glob

Kind = Literal["user", "room", "server"]

# Of one list; what lies beyond is not looked at.
MAX_RULES = 20_000
KINDS: tuple[Kind, ...] = ("user", "room", "server")
TYPES: dict[str, Kind] = {
    f"{prefix}.{kind}": kind for prefix in ("m.policy.rule", "m.room.rule", "org.matrix.mjolnir.rule") for kind in KINDS
}
HASHES = ("hashes", "org.matrix.msc4205.hashes")
BANS = frozenset({"m.ban", "org.matrix.mjolnir.ban", "m.takedown", "org.matrix.msc4204.takedown"})


class Bans:
    """The bans of one list."""

    __slots__ = ("_exact", "_hashed", "_wild", "count")

    def __init__(self, rules: Iterable[tuple[str, dict[str, Any]]] = ()) -> None:
        """`rules` are (event type, content) of the room's state."""
        self._exact: dict[Kind, set[str]] = {kind: set() for kind in KINDS}
        self._wild: dict[Kind, list[Glob]] = {kind: [] for kind in KINDS}
        self._hashed: dict[Kind, set[str]] = {kind: set() for kind in KINDS}
        self.count = 0
        for event_type, content in rules:
            kind, entity, hashed = TYPES.get(event_type), content.get("entity"), _hash_in(content)
            if kind is None or content.get("recommendation") not in BANS:
                continue
            if not isinstance(entity, str) and hashed is None:
                continue
            if self.count >= MAX_RULES:
                break
            self.count += 1
            if not isinstance(entity, str):
                self._hashed[kind].add(str(hashed))
                continue
            glob = compile_glob(entity, ignore_case=kind == "server")
            if glob.literal is not None:
                self._exact[kind].add(glob.literal)
            else:
                self._wild[kind].append(glob)

    def match(self, kind: Kind, entity: str) -> bool:
        if entity in self._exact[kind]:
            return True
        if self._hashed[kind] and _hash(entity) in self._hashed[kind]:
            return True
        return any(glob.matches(entity) for glob in self._wild[kind])

    def match_server(self, server_name: str) -> bool:
        """A rule without a port speaks of the host at every port."""
        whole = server_name.lower()
        return self.match("server", whole) or self.match("server", _host(whole))

    def match_user(self, user_id: str) -> bool:
        return self.match("user", user_id) or self.match_server(user_id.partition(":")[2])


def _host(server_name: str) -> str:
    host, colon, port = server_name.rpartition(":")
    return host if colon and port.isdigit() else server_name


def _hash(entity: str) -> str:
    return to_base64(hashlib.sha256(entity.encode()).digest())


def _hash_in(content: dict[str, Any]) -> str | None:
    for name in HASHES:
        hashes = content.get(name)
        if isinstance(hashes, dict) and isinstance(hashes.get("sha256"), str):
            return str(hashes["sha256"]).rstrip("=")
    return None
