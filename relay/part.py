"""A `Part` is a vertical slice: one class that owns its tables and shows up to five faces, all empty by default.

`schema` (its tables), `routes()` (its endpoints), `edus()` (what it takes from other servers), `changes()` (its share of
/sync) and `run()` (its loop, in the server's one TaskGroup). Parts get what they need as constructor arguments.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from relay.db import Query
from relay.tables import Schema
from relay.web import Route

# An EDU from `origin`, already authenticated. Whatever it raises is logged and loses only this EDU.
TakesEdu = Callable[[str, dict[str, Any]], Awaitable[None]]


@dataclass(slots=True)
class SyncAsk:
    """What a /sync wants to know: everything for `user_id` and `device_id` after `since`, up to `upto`.

    `topics` is what the bell remembers: where it is not None, only these rooms and streams changed. `since` None is an
    initial sync. `rooms` are the joined rooms that the answer may speak of; `newly_joined` those that are new since.
    """

    user_id: str
    device_id: str
    since: int | None
    upto: int
    since_typing: int
    topics: frozenset[str] | None
    rooms: frozenset[str]
    newly_joined: frozenset[str]
    left_rooms: frozenset[str] = frozenset()

    def concerns(self, topic: str) -> bool:
        return self.topics is None or topic in self.topics

    def rooms_concerned(self) -> Iterable[str]:
        """The joined rooms in which something may have changed."""
        return self.rooms if self.topics is None else (self.rooms & self.topics) | self.newly_joined


@dataclass(slots=True)
class RoomShare:
    account_data: list[Any] = field(default_factory=list)
    ephemeral: list[Any] = field(default_factory=list)
    unread: dict[str, int] | None = None
    unread_threads: dict[str, dict[str, int]] | None = None


@dataclass(slots=True)
class SyncShare:
    """The answer as the parts fill it. Events are dicts, or `orjson.Fragment`s of ready bytes."""

    account_data: list[Any] = field(default_factory=list)
    presence: list[Any] = field(default_factory=list)
    to_device: list[Any] = field(default_factory=list)
    device_lists_changed: set[str] = field(default_factory=set)
    device_lists_left: set[str] = field(default_factory=set)
    one_time_keys_count: dict[str, int] | None = None
    unused_fallback_key_types: list[str] | None = None
    rooms: dict[str, RoomShare] = field(default_factory=dict)

    def room(self, room_id: str) -> RoomShare:
        share = self.rooms.get(room_id)
        if share is None:
            share = self.rooms[room_id] = RoomShare()
        return share


@dataclass(slots=True)
class Finding:
    """A row that no rule lets exist. Never holds the content itself."""

    table: str
    row: str
    text: str


class Part:
    schema: Schema | None = None

    def routes(self) -> Iterable[Route]:
        return ()

    def edus(self) -> Mapping[str, TakesEdu]:
        return {}

    async def changes(self, ask: SyncAsk, share: SyncShare) -> None:
        """Adds this part's share. Reads nothing where `ask.concerns(…)` says that nothing changed."""

    async def run(self) -> None:
        """The part's loop; returns at once where it has none. It is cancelled when the server stops."""

    def reseal(self, query: Query) -> int:
        """Brings rows that the present seal does not allow to a form that it does, or removes them; returns how many."""
        return 0

    def forget_server(self, query: Query, server: str) -> int:
        """Removes what came from another server and its people; returns how many rows."""
        return 0

    def forgotten(self, server: str) -> None:
        """After that is committed: what memory still has of it goes, too."""

    def audit(self, query: Query) -> tuple[dict[str, int], list[Finding]]:
        """Counts its rows by the rule under which each may exist, and names those without one (design, section 3)."""
        counts: dict[str, int] = {}
        if self.schema is not None:
            for table in self.schema.tables:
                number = int(query.value(f"SELECT count(*) FROM {table.name}") or 0)
                counts[f"{table.name}: {table.rule}"] = number
        return counts, []
