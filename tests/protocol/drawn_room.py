"""A room on paper for the tests of the rules: events are drawn into it, nothing checks whether they may be there."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from relay.errors import NotAllowed
from relay.ids import server_of
from relay.protocol import event as events
from relay.protocol.auth import auth_keys, check
from relay.protocol.event import Event
from relay.protocol.signing import SigningKey
from relay.protocol.versions import VERSIONS

ALICE = "@alice:one.example"
BOB = "@bob:two.example"
CAROL = "@carol:three.example"
DAVE = "@dave:one.example"

START = 1_700_000_000_000


@functools.cache
def key_of(server: str) -> SigningKey:
    """A server's key, the same in every test."""
    return SigningKey("ed25519:test", server.encode().ljust(32, b"\0")[:32])


class DrawnRoom:
    """Alice of one.example created the room and is in it. Nothing else is set."""

    def __init__(self, version: str = "12", creator: str = ALICE, **create: Any) -> None:
        self.version = VERSIONS[version]
        self.state: dict[tuple[str, str], Event] = {}
        self.all: list[Event] = []
        self.room_id: str | None = None if self.version.room_id_is_create else "!room:" + server_of(creator)
        content: dict[str, Any] = {"room_version": version, **create}
        if self.version.create_creator:
            content.setdefault("creator", creator)
        self.create = self.add("m.room.create", creator, content, "")
        self.room_id = self.create.room_id
        self.member(creator, "join")

    def draw(
        self,
        type: str,
        sender: str,
        content: dict[str, Any],
        state_key: str | None = None,
        *,
        prev: list[str] | None = None,
        auth: list[Event] | None = None,
        redacts: str | None = None,
        at: int | None = None,
    ) -> Event:
        """An event that follows the last one and cites what it has to, not yet in the room."""
        if auth is None:
            wanted = auth_keys(type, sender, state_key, content, self.version)
            auth = [self.state[key] for key in wanted if key in self.state]
        if prev is None:
            prev = [self.all[-1].id] if self.all else []
        return events.build(
            self.version,
            room_id=self.room_id,
            type=type,
            sender=sender,
            content=content,
            state_key=state_key,
            prev_events=prev,
            auth_events=[cited.id for cited in auth],
            depth=len(self.all) + 1,
            origin_server_ts=START + 1000 * len(self.all) if at is None else at,
            redacts=redacts,
            server_name=server_of(sender),
            key=key_of(server_of(sender)),
        )

    def add(self, type: str, sender: str, content: dict[str, Any], state_key: str | None = None, **how: Any) -> Event:
        return self.take(self.draw(type, sender, content, state_key, **how))

    def take(self, event: Event) -> Event:
        self.all.append(event)
        if event.key is not None:
            self.state[event.key] = event
        return event

    def member(self, user: str, membership: str, by: str | None = None, **content: Any) -> Event:
        return self.add("m.room.member", by or user, {"membership": membership, **content}, user)

    def cited(self, event: Event) -> list[Event]:
        by_id = {known.id: known for known in self.all}
        return [by_id[cited] for cited in event.auth_events]


class Draft(NamedTuple):
    type: str
    sender: str
    content: dict[str, Any]
    state_key: str | None = None


def member(user: str, membership: Any, by: str | None = None, **content: Any) -> Draft:
    return Draft("m.room.member", by or user, {"membership": membership, **content}, user)


def rule(join_rule: Any) -> Draft:
    return Draft("m.room.join_rules", ALICE, {"join_rule": join_rule}, "")


def levels(by: str = ALICE, /, **content: Any) -> Draft:
    return Draft("m.room.power_levels", by, content, "")


def say(sender: str, type: str = "m.room.message") -> Draft:
    return Draft(type, sender, {"body": "hello"})


def state(sender: str, state_key: str = "", type: str = "m.room.topic") -> Draft:
    return Draft(type, sender, {}, state_key)


IN = member(BOB, "join")
CAROL_IN = member(CAROL, "join")
INVITED = member(BOB, "invite", by=ALICE)
BANNED = member(BOB, "ban", by=ALICE)
KNOCKED = member(BOB, "knock")
MODERATOR = levels(users={BOB: 50})


def room_of(version: int, setup: list[Draft], **create: Any) -> DrawnRoom:
    room = DrawnRoom(str(version), **create)
    for draft in setup:
        room.add(*draft)
    return room


def verdict(room: DrawnRoom, event: Event) -> str | None:
    """The rule that refuses the event in the room's state, or None."""
    try:
        check(event, room.state, room.create)
    except NotAllowed as no:
        assert no.reason, "a refusal gives a reason"
        return no.rule
    return None
