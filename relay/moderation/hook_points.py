"""Every place at which a rule of the operator's own is asked: what it sees, how long it may take, what counts if it fails.

This is the whole table. No hook ever sees a person's address, a password or a text: messages are ciphertext, and of an
event only its envelope is shown. Plug-ins in Python derive from `Hook` and override what they have an opinion about
(docs/hooks.md has an example); HTTP hooks get the same fields as JSON.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, Literal

from relay.clock import SECOND
from relay.protocol.event import Event

Decision = Literal["allow", "deny", "quarantine", "challenge"]
Failing = Literal["open", "closed"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """deny: refused. challenge: refused for a minute. quarantine: a file is stored and served to nobody until a moderator
    has looked; anywhere else it is the same as deny. `text` is what the person is told; without it the relay has its own."""

    decision: Decision = "allow"
    reason_code: str = ""
    errcode: str = "M_FORBIDDEN"
    text: str = ""


ALLOW = Verdict()


def deny(reason_code: str = "", text: str = "", errcode: str = "M_FORBIDDEN") -> Verdict:
    return Verdict("deny", reason_code, errcode, text)


@dataclass(frozen=True, slots=True)
class Register:
    user_id: str


@dataclass(frozen=True, slots=True)
class Login:
    user_id: str


@dataclass(frozen=True, slots=True)
class Invite:
    """`room_id` is empty where the room is only about to be made."""

    sender: str
    target: str
    room_id: str


@dataclass(frozen=True, slots=True)
class Join:
    user_id: str
    room_id: str
    invited: bool


@dataclass(frozen=True, slots=True)
class Knock:
    user_id: str
    room_id: str


@dataclass(frozen=True, slots=True)
class CreateRoom:
    user_id: str
    room_type: str | None


@dataclass(frozen=True, slots=True)
class Alias:
    user_id: str
    alias: str
    room_id: str


@dataclass(frozen=True, slots=True)
class Publish:
    user_id: str
    room_id: str


@dataclass(slots=True)
class Envelope:
    """Of a message or a state event: everything but what it says. `origin` is the server that handed it to us."""

    event_id: str
    room_id: str
    type: str
    sender: str
    state_key: str | None
    ts: int
    size: int
    encrypted: bool
    origin: str
    _event: Event = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Media:
    """A file that is about to be stored. The hash is of the ciphertext."""

    user_id: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Transaction:
    origin: str


Asked = Register | Login | Invite | Join | Knock | CreateRoom | Alias | Publish | Envelope | Media | Transaction
Answer = Verdict | None
MaybeLater = Answer | Awaitable[Answer]


@dataclass(frozen=True, slots=True)
class Point:
    """`remembered`: whether a deny counts for a minute without asking again."""

    name: str
    sees: tuple[str, ...]
    budget_ms: int
    on_failure: Failing
    remembered: bool = True


POINTS = {
    point.name: point
    for point in (
        Point("register", ("user_id",), 3 * SECOND, "closed"),
        Point("login", ("user_id",), 2 * SECOND, "open"),
        Point("invite", ("sender", "target", "room_id"), 2 * SECOND, "open"),
        Point("federated_invite", ("sender", "target", "room_id"), 2 * SECOND, "closed"),
        Point("join", ("user_id", "room_id", "invited"), 2 * SECOND, "open"),
        Point("knock", ("user_id", "room_id"), 2 * SECOND, "open"),
        Point("create_room", ("user_id", "room_type"), 1 * SECOND, "open"),
        Point("alias", ("user_id", "alias", "room_id"), 1 * SECOND, "open"),
        Point("publish", ("user_id", "room_id"), 1 * SECOND, "open"),
        Point("state_event", ("event_id", "room_id", "type", "sender", "state_key", "ts", "size", "encrypted", "origin"), SECOND, "open", False),
        Point("message", ("event_id", "room_id", "type", "sender", "ts", "size", "encrypted", "origin"), 500, "open", False),
        Point("media", ("user_id", "size", "sha256"), 5 * SECOND, "open"),
        Point("transaction", ("origin",), 200, "open"),
    )
}  # fmt: skip


def as_json(point: Point, asked: Asked) -> dict[str, Any]:
    return {name: getattr(asked, name) for name in point.sees}


class Hook:
    """What a plug-in derives from. Each method may be plain or `async`; None and ALLOW let pass. Plain ones must not block:
    they run where everything else of the relay runs."""

    def check_register(self, asked: Register) -> MaybeLater:
        return None

    def check_login(self, asked: Login) -> MaybeLater:
        return None

    def check_invite(self, asked: Invite) -> MaybeLater:
        return None

    def check_federated_invite(self, asked: Invite) -> MaybeLater:
        return None

    def check_join(self, asked: Join) -> MaybeLater:
        return None

    def check_knock(self, asked: Knock) -> MaybeLater:
        return None

    def check_create_room(self, asked: CreateRoom) -> MaybeLater:
        return None

    def check_alias(self, asked: Alias) -> MaybeLater:
        return None

    def check_publish(self, asked: Publish) -> MaybeLater:
        return None

    def check_state_event(self, asked: Envelope) -> MaybeLater:
        return None

    def check_message(self, asked: Envelope) -> MaybeLater:
        return None

    def check_media(self, asked: Media) -> MaybeLater:
        return None

    def check_transaction(self, asked: Transaction) -> MaybeLater:
        return None
