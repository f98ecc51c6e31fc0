"""One sliding sync connection as matrix-rust-sdk keeps it: it repeats its rules, goes on from its pos, remembers what it got."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from tests.people import PATIENCE_SECONDS, Json, Person

DEPLOYED = "/_matrix/client/unstable/org.matrix.simplified_msc3575/sync"
ACCEPTED = "/_matrix/client/v4/sync"

# What the room list of Element X asks of every room.
REQUIRED = [
    ["m.room.name", ""], ["m.room.encryption", ""], ["m.room.member", "$LAZY"], ["m.room.member", "$ME"], ["m.room.topic", ""],
    ["m.room.avatar", ""], ["m.room.canonical_alias", ""], ["m.room.power_levels", ""], ["org.matrix.msc3401.call.member", "*"],
    ["m.room.join_rules", ""], ["m.room.tombstone", ""], ["m.room.create", ""], ["m.room.history_visibility", ""],
    ["m.space.parent", "*"], ["m.space.child", "*"],
]  # fmt: skip


def a_list(first: int = 0, last: int = 19, *, limit: int = 1, required: Any = None, **filters: Any) -> Json:
    made = {
        "ranges": [[first, last]],
        "timeline_limit": limit,
        "required_state": REQUIRED if required is None else required,
    }
    return {**made, "filters": filters} if filters else made


def a_subscription(limit: int = 20, required: Any = None) -> Json:
    return {"timeline_limit": limit, "required_state": REQUIRED if required is None else required}


class Connection:
    def __init__(self, person: Person, conn_id: str, *, path: str = DEPLOYED) -> None:
        self.person = person
        self.conn_id = conn_id
        self.path = path
        self.lists: Json = {}
        self.subscriptions: Json = {}
        self.extensions: Json = {}
        self.to_device_since: str | None = None
        self.forgets()

    def forgets(self) -> None:
        self.pos: str | None = None
        self.rooms: dict[str, Json] = defaultdict(dict)
        self.state: dict[str, dict[tuple[str, str], Json]] = defaultdict(dict)
        self.timeline: dict[str, list[Json]] = defaultdict(list)
        self.counts: dict[str, int] = {}
        self.messages: list[Json] = []
        self.changed: set[str] = set()
        self.typing: dict[str, list[str]] = {}
        self.receipts: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
        self.account_data: dict[tuple[str, str], Json] = {}

    def body(self) -> Json:
        made: Json = {"conn_id": self.conn_id, "lists": self.lists, "room_subscriptions": self.subscriptions}
        if self.extensions:
            made["extensions"] = {name: dict(one) for name, one in self.extensions.items()}
            if self.to_device_since is not None and "to_device" in made["extensions"]:
                made["extensions"]["to_device"]["since"] = self.to_device_since
        return made

    async def asks(self, timeout: int = 0) -> Json:
        """One request from where it stands; nothing is remembered, as if the answer were lost."""
        body = self.body()
        if self.path == ACCEPTED:
            return await self.person.calls(
                "POST", self.path, {**body, "timeout": timeout, **({"pos": self.pos} if self.pos else {})}
            )
        return await self.person.calls("POST", self.path, body, timeout=timeout, pos=self.pos)

    async def syncs(self, timeout: int = 0) -> Json:
        answer = await self.asks(timeout)
        self.remembers(answer)
        return answer

    def remembers(self, answer: Json) -> None:
        self.pos = answer["pos"]
        self.counts = {name: one["count"] for name, one in answer.get("lists", {}).items()}
        for room_id, room in answer.get("rooms", {}).items():
            if room.get("initial"):
                for kept in (self.rooms, self.state, self.timeline):
                    kept.pop(room_id, None)
            self.rooms[room_id].update(room)
            for event in room.get("required_state", []):
                self.state[room_id][event["type"], event["state_key"]] = event
            events = room.get("timeline", room.get("timeline_events", []))
            if room.get("unstable_expanded_timeline") or room.get("expanded_timeline"):
                self.timeline[room_id] = []
            self.timeline[room_id] += events
        beside = answer.get("extensions", {})
        if "to_device" in beside:
            self.to_device_since = beside["to_device"]["next_batch"]
            self.messages += beside["to_device"]["events"]
        self.changed |= set(beside.get("e2ee", {}).get("device_lists", {}).get("changed", []))
        for room_id, event in beside.get("typing", {}).get("rooms", {}).items():
            self.typing[room_id] = event["content"]["user_ids"]
        for room_id, event in beside.get("receipts", {}).get("rooms", {}).items():
            for event_id, kinds in event["content"].items():
                for kind, readers in kinds.items():
                    self.receipts[room_id].update({(reader, kind): event_id for reader in readers})
        notes = beside.get("account_data", {})
        for room_id, events in {"": notes.get("global", []), **notes.get("rooms", {})}.items():
            self.account_data.update({(room_id, event["type"]): event["content"] for event in events})

    def ids(self, room: str) -> list[str]:
        return [event["event_id"] for event in self.timeline[room]]

    def membership(self, room: str, user_id: str) -> str | None:
        event = self.state[room].get(("m.room.member", user_id))
        return event["content"]["membership"] if event is not None else None

    async def notices(self, what: Any, within: float = PATIENCE_SECONDS) -> bool:
        """Syncs until it is so, or for as long as one has patience."""
        deadline = time.monotonic() + within
        while not what():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            await self.syncs(timeout=int(min(left, 2) * 1000))
        return True


def room_list(person: Person, last: int = 19, **more: Any) -> Connection:
    """The first of the three connections that matrix-rust-sdk keeps."""
    connection = Connection(person, "room-list", **more)
    connection.lists = {"all_rooms": a_list(0, last)}
    connection.extensions = {
        "account_data": {"enabled": True},
        "receipts": {"enabled": True, "rooms": ["*"]},
        "typing": {"enabled": True},
    }
    return connection


def encryption(person: Person) -> Connection:
    connection = Connection(person, "encryption")
    connection.extensions = {"to_device": {"enabled": True}, "e2ee": {"enabled": True}}
    return connection


def notifications(person: Person, room: str) -> Connection:
    connection = Connection(person, "notifications")
    connection.lists = {"invites": a_list(0, 16, limit=8, is_invite=True)}
    connection.subscriptions = {room: a_subscription(16)}
    connection.extensions = {"account_data": {"enabled": True}}
    return connection
