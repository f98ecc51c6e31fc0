"""The measures a moderator or a rule can take, as words and shapes: pure, no database.

What can't be undone (`reversible` False) needs two persons. A machine may take only what `by_machine` allows, for a day.
Taking back one message needs no second person: any room moderator may do it by the standard, and a report keeps a copy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from relay.clock import DAY
from relay.errors import Forbidden, InvalidParam, MissingParam
from relay.ids import is_event_id, is_opaque, is_room_id, is_server_name, is_user_id

# Who acts on the command line.
OPERATOR = "operator"

TargetKind = Literal["user", "event", "media", "room", "server"]

MACHINE_MAX_MS = DAY
SHADOW_MAX_MS = DAY
STRIKE_MS = 180 * DAY
HASH = "sha256:"
_HASH = re.compile(r"sha256:[0-9a-f]{64}\Z")
_REASON = re.compile(r"[a-z0-9][a-z0-9_.\-]{0,63}\Z")
_SERVER_PATTERN = re.compile(r"[a-z0-9.\-:*?\[\]]{1,230}\Z")
_MXC = re.compile(r"mxc://([^/]+)/([^/]+)\Z")


@dataclass(frozen=True, slots=True)
class Measure:
    target: TargetKind
    reversible: bool = True
    by_machine: bool = False
    in_a_room: bool = False


MEASURES = {
    "warn": Measure("user", by_machine=True),
    "redact": Measure("event", in_a_room=True),
    "hide": Measure("event", by_machine=True),
    "redact_all": Measure("user", reversible=False),
    "kick": Measure("user", in_a_room=True),
    "ban": Measure("user", in_a_room=True),
    "suspend": Measure("user", by_machine=True),
    "lock": Measure("user", by_machine=True),
    "deactivate": Measure("user", reversible=False),
    "shadow": Measure("user", by_machine=True),
    "quarantine": Measure("media", by_machine=True),
    "block_room": Measure("room", by_machine=True),
    "shut_room": Measure("room", reversible=False),
    "block_server": Measure("server", by_machine=True),
    "allow_server": Measure("server"),
}


# Why the person concerned is not told: her account only sends advertising in bulk, or a law forbids to tell her.
BULK, FORBIDDEN = "bulk", "law"
UNTOLD = ("", BULK, FORBIDDEN)


@dataclass(frozen=True, slots=True)
class Reasons:
    """What whoever is concerned reads of a measure that belongs to no report. `ground` and `facts` as in statements.py."""

    ground: str
    facts: str = field(repr=False)
    untold: str = ""


@dataclass(frozen=True, slots=True)
class Act:
    """One measure against one target. `actor` is a moderator's user ID, `integration:NAME`, `rule:NAME` or `operator`."""

    measure: str
    target: str
    actor: str
    reason_code: str
    room_id: str | None = None
    case_id: str | None = None
    automated: bool = False
    lasts_ms: int | None = None
    erase: bool = False
    undo: bool = False
    # Where no decision of a case carries it.
    reasons: Reasons | None = None
    # Whose message or file it is; `Actions` looks it up.
    author: str | None = None

    @property
    def is_machine(self) -> bool:
        return self.automated or self.actor.startswith(("integration:", "rule:"))

    @property
    def word(self) -> str:
        return f"undo.{self.measure}" if self.undo else self.measure


def checked(act: Act) -> Act:
    """The act as it will be taken, its time cut to what is allowed. Raises InvalidParam, MissingParam, Forbidden."""
    kind = MEASURES.get(act.measure)
    if kind is None:
        raise InvalidParam(f"There is no measure of this name. There are: {', '.join(MEASURES)}.")
    if not _is_target(kind.target, act.target):
        raise InvalidParam(_TARGETS[kind.target])
    if kind.in_a_room and not is_room_id(act.room_id):
        raise MissingParam("Name the room: this measure holds in one room.")
    if not _REASON.match(act.reason_code):
        raise InvalidParam(
            "The reason code is a short word of a-z, digits, '.', '_' and '-'; words of people do not belong there."
        )
    if act.undo and not (kind.reversible and act.measure not in ("redact", "kick")):
        raise InvalidParam("This measure can't be taken back.")
    lasts = act.lasts_ms
    if lasts is not None and lasts <= 0:
        raise InvalidParam("A measure lasts longer than no time at all.")
    if act.is_machine and not act.undo:
        if not kind.by_machine:
            raise Forbidden("A machine may only take steps that can be taken back. Let a moderator decide this.")
        lasts = min(lasts or MACHINE_MAX_MS, MACHINE_MAX_MS)
    if act.measure == "shadow":
        lasts = min(lasts or SHADOW_MAX_MS, SHADOW_MAX_MS)
    if act.measure == "warn":
        lasts = lasts or STRIKE_MS
    target = act.target.lower() if kind.target == "server" else act.target
    return replace(act, target=target, automated=act.is_machine, lasts_ms=lasts)


_TARGETS: dict[TargetKind, str] = {
    "user": "The target is a user ID such as @name:example.org.",
    "event": "The target is an event ID, which begins with '$'.",
    "media": "The target is the address of a file (mxc://server/ID), or sha256: and 64 hex digits.",
    "room": "The target is a room ID, which begins with '!'.",
    "server": "The target is a server name, or a pattern such as *.example.org.",
}


def _is_target(kind: TargetKind, target: str) -> bool:
    if kind == "user":
        return is_user_id(target)
    if kind == "event":
        return is_event_id(target)
    if kind == "room":
        return is_room_id(target)
    if kind == "server":
        # A pattern of nothing but wildcards would cut the relay off from everybody.
        return bool(_SERVER_PATTERN.match(target.lower())) and bool(re.search(r"[a-z0-9]", target.lower()))
    if _HASH.match(target):
        return True
    found = _MXC.match(target)
    return found is not None and is_server_name(found[1]) and is_opaque(found[2])


@dataclass(frozen=True, slots=True)
class Outcome:
    """`waits` names a waiting act where nothing was done yet; `until_ts` is when it runs by itself, or when what was done
    ends by itself."""

    measure: str
    target: str
    waits: str | None = None
    until_ts: int | None = None

    def as_json(self) -> dict[str, Any]:
        answer: dict[str, Any] = {"measure": self.measure, "target": self.target}
        if self.waits is not None:
            answer["waits"] = self.waits
        if self.until_ts is not None:
            answer["until"] = self.until_ts
        return answer
