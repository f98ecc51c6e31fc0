"""Rooms whose history forks and merges at random, for the tests of state resolution. Everything follows from the seed.

Every event is allowed by the rules in the state before it, which is the resolution of the states after its prev_events.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from relay.errors import NotAllowed
from relay.ids import server_of
from relay.protocol import auth
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.resolve import StateKey, resolve
from relay.protocol.versions import VERSIONS
from tests.protocol.drawn_room import START, key_of

USERS = [
    f"@{name}:{server}.example"
    for name, server in zip("abcdef", ("one", "two", "one", "three", "two", "four"), strict=True)
]
FOUNDER = USERS[0]
LEVELS = (0, 25, 50, 75, 100)
# Candidates that the rules refuse are drawn again, so often at most.
MAX_TRIES = 40

State = dict[StateKey, str]


@dataclass
class Merge:
    """States that met, in a room where they disagree."""

    states: list[State]


@dataclass
class ForkedRoom:
    version: str
    seed: int
    events: dict[str, Event] = field(default_factory=dict)
    after: dict[str, State] = field(default_factory=dict)
    merges: list[Merge] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.source = random.Random(self.seed)
        self.room_version = VERSIONS[self.version]
        self.room_id: str | None = None if self.room_version.room_id_is_create else "!room:" + server_of(FOUNDER)
        content: dict[str, Any] = {"room_version": self.version}
        if self.room_version.create_creator:
            content["creator"] = FOUNDER
        if self.version == "12" and self.source.random() < 0.3:
            content["additional_creators"] = [USERS[1]]
        self.create = self._build("m.room.create", FOUNDER, content, "", [], {})
        self.room_id = self.create.room_id
        self._take(self.create, {})
        self._must("m.room.member", FOUNDER, {"membership": "join"}, FOUNDER)
        users = {USERS[2]: 50} if self.version == "12" else {FOUNDER: 100, USERS[2]: 50}
        self._must("m.room.power_levels", FOUNDER, {"users": users}, "")
        self._must("m.room.join_rules", FOUNDER, {"join_rule": "public"}, "")
        for user in USERS[1:4]:
            self._must("m.room.member", user, {"membership": "join"}, user)

    @property
    def room(self) -> str:
        return self.create.room_id

    def _build(
        self, type: str, sender: str, content: dict[str, Any], state_key: str | None, prev: list[str], state: State
    ) -> Event:
        wanted = auth.auth_keys(type, sender, state_key, content, self.room_version)
        # Clocks disagree, and often enough two events have the same time.
        moment = START + 1000 * len(self.events) + 1000 * self.source.randint(-4, 4)
        return events.build(
            self.room_version,
            room_id=self.room_id,
            type=type,
            sender=sender,
            content=content,
            state_key=state_key,
            prev_events=prev,
            auth_events=[state[key] for key in wanted if key in state],
            depth=1 + max((self.events[p].depth for p in prev), default=0),
            origin_server_ts=moment,
            server_name=server_of(sender),
            key=key_of(server_of(sender)),
        )

    def _take(self, event: Event, before: State) -> None:
        self.events[event.id] = event
        self.after[event.id] = {**before, event.key: event.id} if event.key is not None else before

    def _must(self, type: str, sender: str, content: dict[str, Any], state_key: str) -> None:
        last = next(reversed(self.events))
        self._take(self._build(type, sender, content, state_key, [last], self.after[last]), self.after[last])

    def _candidate(self) -> tuple[str, str, dict[str, Any], str | None]:
        pick = self.source.choice
        sender, target = pick(USERS), pick(USERS)
        kind = pick(("join", "join", "leave", "kick", "ban", "invite", "levels", "levels", "rules", "topic", "name"))
        if kind in ("join", "leave"):
            return "m.room.member", sender, {"membership": kind}, sender
        if kind in ("kick", "ban", "invite"):
            return "m.room.member", sender, {"membership": {"kick": "leave"}.get(kind, kind)}, target
        if kind == "levels":
            users = {user: pick(LEVELS) for user in self.source.sample(USERS, 3)}
            if self.version != "12" and self.source.random() < 0.7:
                users[FOUNDER] = 100
            return (
                "m.room.power_levels",
                sender,
                {"users": users, "ban": pick((0, 50)), "state_default": pick((0, 50))},
                "",
            )
        if kind == "rules":
            return "m.room.join_rules", sender, {"join_rule": pick(("public", "invite", "knock"))}, ""
        return f"m.room.{kind}", sender, {kind: f"{self.source.random()}"}, ""

    def grow(self) -> None:
        """One more event, after one to three earlier ones of which none follows another in a straight line."""
        recent = list(self.events)[4:][-12:]
        prev = self.source.sample(recent, min(len(recent), self.source.choice((1, 1, 2, 2, 3))))
        states = [self.after[p] for p in prev]
        if any(state != states[0] for state in states):
            self.merges.append(Merge(states))
        before = resolve(self.room_version, states, self.events)
        known = {key: self.events[event_id] for key, event_id in before.items()}
        for _ in range(MAX_TRIES):
            type, sender, content, state_key = self._candidate()
            event = self._build(type, sender, content, state_key, prev, before)
            try:
                auth.check(event, known, self.create)
            except NotAllowed:
                continue
            self._take(event, before)
            return

    def with_events(self, count: int) -> ForkedRoom:
        for _ in range(count):
            self.grow()
        # At the end everything meets: that is the hardest one.
        for size in (2, 3, 5):
            ends = self.source.sample(list(self.after), size)
            self.merges.append(Merge([self.after[end] for end in ends]))
        return self
