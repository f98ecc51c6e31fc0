"""Filters: what a client wants to get from /sync, /messages and /context. Stored by number, or given inline.

A filter is parsed once into frozen structs whose `allows` is cheap, above all where it lets everything pass
(`is_everything`). What "rooms" or "limit" mean for an answer is for whoever builds it. Spec: client-server-api/#filtering.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from hashlib import sha256
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import orjson
from msgspec import Meta

from relay.db import Database, Query, Tx
from relay.errors import BadJson, InvalidParam, NotFound, TooLarge
from relay.ids import is_room_id, is_user_id
from relay.part import Part
from relay.people.account_data import require_self
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, parse_object

MAX_FILTER_BYTES = 64 * 1024
MAX_FILTERS_PER_USER = 1_000
MAX_REMEMBERED = 2_000
MAX_SHOWN = 100

T = TypeVar("T")
Names = Annotated[tuple[str, ...], Meta(max_length=1000)] | None
Limit = Annotated[int, Meta(ge=0)] | None


def _require_ids(senders: Iterable[str], rooms: Iterable[str]) -> None:
    for sender in senders:
        if not is_user_id(sender):
            raise ValueError(f"{sender[:MAX_SHOWN]!r} is not a user ID")
    for room in rooms:
        if not is_room_id(room):
            raise ValueError(f"{room[:MAX_SHOWN]!r} is not a room ID")


class EventFilter(msgspec.Struct, frozen=True, dict=True):
    """Both EventFilter and RoomEventFilter of the standard. An empty list lets nothing pass, a missing one everything."""

    limit: Limit = None
    types: Names = None
    not_types: Names = None
    senders: Names = None
    not_senders: Names = None
    rooms: Names = None
    not_rooms: Names = None
    contains_url: bool | None = None
    lazy_load_members: bool = False
    include_redundant_members: bool = False
    unread_thread_notifications: bool = False
    related_by_senders: Names = None
    related_by_rel_types: Names = None

    def __post_init__(self) -> None:
        _require_ids((*(self.senders or ()), *(self.not_senders or ())), (*(self.rooms or ()), *(self.not_rooms or ())))

    @cached_property
    def is_everything(self) -> bool:
        """Whether `allows` says yes to whatever comes."""
        return (
            self.types is None
            and self.senders is None
            and self.rooms is None
            and self.contains_url is None
            and not (self.not_types or self.not_senders or self.not_rooms)
        )

    @cached_property
    def is_nothing(self) -> bool:
        """Whether `allows` says no to whatever comes."""
        return any(names is not None and not names for names in (self.types, self.senders, self.rooms)) or "*" in (
            self.not_types or ()
        )

    @cached_property
    def _types(self) -> _Types | None:
        return None if self.types is None else _Types(self.types)

    @cached_property
    def _not_types(self) -> _Types:
        return _Types(self.not_types or ())

    def allows(self, type: str, sender: str, room_id: str | None = None, has_url: bool = False) -> bool:
        if self.is_everything:
            return True
        if (self._types is not None and not self._types.match(type)) or self._not_types.match(type):
            return False
        if (self.senders is not None and sender not in self.senders) or (
            self.not_senders is not None and sender in self.not_senders
        ):
            return False
        if self.contains_url is not None and has_url != self.contains_url:
            return False
        return room_id is None or self.allows_room(room_id)

    def allows_room(self, room_id: str) -> bool:
        if self.not_rooms is not None and room_id in self.not_rooms:
            return False
        return self.rooms is None or room_id in self.rooms


class RoomFilter(msgspec.Struct, frozen=True):
    rooms: Names = None
    not_rooms: Names = None
    include_leave: bool = False
    timeline: EventFilter = EventFilter()
    state: EventFilter = EventFilter()
    ephemeral: EventFilter = EventFilter()
    account_data: EventFilter = EventFilter()

    def __post_init__(self) -> None:
        _require_ids((), (*(self.rooms or ()), *(self.not_rooms or ())))

    def allows_room(self, room_id: str) -> bool:
        if self.not_rooms is not None and room_id in self.not_rooms:
            return False
        return self.rooms is None or room_id in self.rooms


class Filter(msgspec.Struct, frozen=True):
    event_fields: Names = None
    event_format: Literal["client", "federation"] = "client"
    presence: EventFilter = EventFilter()
    account_data: EventFilter = EventFilter()
    room: RoomFilter = RoomFilter()


EVERYTHING = Filter()
EVERY_EVENT = EventFilter()


def parse(definition: dict[str, Any]) -> Filter:
    """Raises BadJson, which names the field."""
    return _convert(definition, Filter)


def parse_event_filter(text: str | None) -> EventFilter:
    """The `filter` parameter of /messages and /context: inline JSON. Raises NotJson, BadJson."""
    if not text:
        return EVERY_EVENT
    if len(text) > MAX_FILTER_BYTES:
        raise TooLarge(f"A filter has at most {MAX_FILTER_BYTES // 1024} KiB.")
    return _convert(parse_object(text.encode()), EventFilter)


def _convert(definition: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(without_nulls(definition), kind)
    except (msgspec.ValidationError, ValueError) as bad:
        raise BadJson(f"This is not a filter: {bad}.") from None


def without_nulls(value: Any) -> Any:
    """Some clients write null for what they leave out. The depth is bounded by `parse_object`."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return value


class _Types:
    """Event types, some with `*` for any characters."""

    __slots__ = ("_exact", "_parts")

    def __init__(self, patterns: Iterable[str]) -> None:
        self._exact = frozenset(pattern for pattern in patterns if "*" not in pattern)
        self._parts = [pattern.split("*") for pattern in patterns if "*" in pattern]

    def match(self, event_type: str) -> bool:
        return event_type in self._exact or any(_match(parts, event_type) for parts in self._parts)


def _match(parts: list[str], text: str) -> bool:
    """In linear time for each part, whatever a client writes."""
    first, last = parts[0], parts[-1]
    if not text.startswith(first) or not text.endswith(last) or len(text) < len(first) + len(last):
        return False
    at, end = len(first), len(text) - len(last)
    for part in parts[1:-1]:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


class Filters(Part):
    schema = Schema(
        "filters",
        tables=(
            Table(
                "filters",
                "what a client wants to see",
                {
                    "user_id": ("whose filter", "until the account is closed, or the user has made a thousand others"),
                    "filter_id": ("its number", "until the account is closed, or the user has made a thousand others"),
                    "digest": (
                        "SHA-256 of the definition, so that the same one is stored once",
                        "as long as the filter",
                    ),
                    "definition": ("the filter", "as long as the filter"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE filters (
                user_id TEXT NOT NULL, filter_id BIGINT NOT NULL, digest BYTES NOT NULL, definition BYTES NOT NULL,
                PRIMARY KEY (user_id, filter_id));
            CREATE UNIQUE INDEX filters_by_digest ON filters (user_id, digest)
            """,
        ),
    )

    def __init__(self, db: Database) -> None:
        self._db = db
        # By (user, number) or ('', inline text). A stored filter never changes; `forget` empties it.
        self._parsed: OrderedDict[tuple[str, str], Filter] = OrderedDict()

    def routes(self) -> Iterable[Route]:
        yield Route("POST", "/_matrix/client/v3/user/{user_id}/filter", self._post_route)
        yield Route("GET", "/_matrix/client/v3/user/{user_id}/filter/{filter_id}", self._get_route)

    async def get(self, user_id: str, filter_id_or_json: str | None) -> Filter:
        """What the `filter` parameter of /sync means. Raises InvalidParam, NotJson, BadJson, TooLarge."""
        if not filter_id_or_json:
            return EVERYTHING
        inline = filter_id_or_json.startswith("{")
        key = ("", filter_id_or_json) if inline else (user_id, filter_id_or_json)
        known = self._parsed.get(key)
        if known is not None:
            self._parsed.move_to_end(key)
            return known
        if not inline:
            raw = await self._db.read(_definition, user_id, filter_id_or_json)
            if raw is None:
                raise InvalidParam("There is no filter with this ID. Make it again, or give the filter itself.")
        elif len(filter_id_or_json) <= MAX_FILTER_BYTES:
            raw = filter_id_or_json.encode()
        else:
            raise TooLarge(f"A filter has at most {MAX_FILTER_BYTES // 1024} KiB.")
        parsed = self._parsed[key] = parse(parse_object(raw))
        if len(self._parsed) > MAX_REMEMBERED:
            self._parsed.popitem(last=False)
        return parsed

    def forget(self, tx: Tx, user_id: str, erase: bool) -> None:
        """For `account.on_deactivated`."""
        tx.run("DELETE FROM filters WHERE user_id = $1", user_id)
        tx.after(self._parsed.clear)

    async def _post_route(self, request: Request) -> Answer:
        require_self(request)
        definition = request.json()
        parse(definition)
        raw = orjson.dumps(definition, option=orjson.OPT_SORT_KEYS)
        if len(raw) > MAX_FILTER_BYTES:
            raise TooLarge(f"A filter has at most {MAX_FILTER_BYTES // 1024} KiB.")
        user_id, digest = request.user_id, sha256(raw).digest()

        def store(query: Query) -> int:
            known = query.value("SELECT filter_id FROM filters WHERE user_id = $1 AND digest = $2", user_id, digest)
            if known is not None:
                return int(known)
            newest = query.value("SELECT max(filter_id) FROM filters WHERE user_id = $1", user_id)
            filter_id = 0 if newest is None else int(newest) + 1
            query.run(
                "DELETE FROM filters WHERE user_id = $1 AND filter_id <= $2", user_id, filter_id - MAX_FILTERS_PER_USER
            )
            query.run(
                "INSERT INTO filters (user_id, filter_id, digest, definition) VALUES ($1, $2, $3, $4)",
                user_id,
                filter_id,
                digest,
                raw,
            )
            return filter_id

        with self._db.write() as tx:
            tx.call(store)
        return {"filter_id": str(await tx)}

    async def _get_route(self, request: Request) -> Answer:
        require_self(request)
        raw = await self._db.read(_definition, request.user_id, request.params["filter_id"])
        if raw is None:
            raise NotFound("You have no filter with this ID.")
        return raw


def _definition(query: Query, user_id: str, filter_id: str) -> bytes | None:
    if not (filter_id.isascii() and filter_id.isdigit() and len(filter_id) <= 15):
        return None
    raw = query.value("SELECT definition FROM filters WHERE user_id = $1 AND filter_id = $2", user_id, int(filter_id))
    return bytes(raw) if raw is not None else None
