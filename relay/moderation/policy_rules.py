"""What a policy room says: rules about people, rooms and servers, read from its state. Pure.

The names of MSC2313 and the older ones of Mjolnir mean the same. Only bans count (a takedown is one that asks for more);
reasons are free text and are not looked at. Spec: client-server-api/#moderation-policy-lists.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from relay.protocol.globs import Glob, compile_glob

Kind = Literal["user", "room", "server"]

# Of one list; what lies beyond is not looked at.
MAX_RULES = 20_000
KINDS: tuple[Kind, ...] = ("user", "room", "server")
TYPES: dict[str, Kind] = {
    f"{prefix}.{kind}": kind for prefix in ("m.policy.rule", "m.room.rule", "org.matrix.mjolnir.rule") for kind in KINDS
}
BANS = frozenset({"m.ban", "org.matrix.mjolnir.ban", "m.takedown", "org.matrix.msc4204.takedown"})


class Bans:
    """The bans of one list."""

    __slots__ = ("_exact", "_wild", "count")

    def __init__(self, rules: Iterable[tuple[str, dict[str, Any]]] = ()) -> None:
        """`rules` are (event type, content) of the room's state."""
        self._exact: dict[Kind, set[str]] = {kind: set() for kind in KINDS}
        self._wild: dict[Kind, list[Glob]] = {kind: [] for kind in KINDS}
        self.count = 0
        for event_type, content in rules:
            kind, entity = TYPES.get(event_type), content.get("entity")
            if kind is None or not isinstance(entity, str) or content.get("recommendation") not in BANS:
                continue
            if self.count >= MAX_RULES:
                break
            self.count += 1
            glob = compile_glob(entity, ignore_case=kind == "server")
            if glob.literal is not None:
                self._exact[kind].add(glob.literal)
            else:
                self._wild[kind].append(glob)

    def match(self, kind: Kind, entity: str) -> bool:
        if entity in self._exact[kind]:
            return True
        return any(glob.matches(entity) for glob in self._wild[kind])

    def match_server(self, server_name: str) -> bool:
        """A rule without a port speaks of the host at every port."""
        whole = server_name.lower()
        return self.match("server", whole) or self.match("server", _host(whole))

    def match_user(self, user_id: str) -> bool:
        return self.match("user", user_id) or self.match_server(user_id.partition(":")[2])


@dataclass(frozen=True, slots=True)
class Subscription:
    room_id: str
    effect: str


def _host(server_name: str) -> str:
    host, colon, port = server_name.rpartition(":")
    return host if colon and port.isdigit() else server_name
