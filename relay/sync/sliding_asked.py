"""What a sliding sync request asks for, parsed once: lists, room subscriptions, extensions. Two forms on the wire.

`deployed` reads what clients speak today (org.matrix.simplified_msc3575), `accepted` the text of MSC4186. Inside there is
one form. Not here: which state events that means in a room (`sliding_state`). Raises BadJson, InvalidParam.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from relay.errors import BadJson, InvalidParam
from relay.people.filters import without_nulls
from relay.sync.sliding_state import Rule, Wanted

MAX_LISTS = 100
MAX_SUBSCRIPTIONS = 1_000
MAX_SUBSCRIPTIONS_ACCEPTED = 100
MAX_RANGES = 20
MAX_TIMELINE = 1_000
MAX_REQUIRED = 200
MAX_NAME = 255
ALL_SUBSCRIBED = "*"
ANY = "*"
LAZY = "$LAZY"
ME = "$ME"

Name = Annotated[str, Meta(max_length=MAX_NAME)]
Names = Annotated[tuple[Name, ...], Meta(max_length=1000)]
Index = Annotated[int, Meta(ge=0, le=2**53)]
Range = tuple[Index, Index]
T = TypeVar("T")


class Filters(msgspec.Struct, frozen=True):
    """Each that is given must hold. `is_invited` is how the accepted text calls `is_invite`."""

    is_dm: bool | None = None
    is_encrypted: bool | None = None
    is_invite: bool | None = None
    is_invited: bool | None = None
    spaces: Names | None = None
    room_types: Annotated[tuple[Name | None, ...], Meta(max_length=100)] | None = None
    not_room_types: Annotated[tuple[Name | None, ...], Meta(max_length=100)] | None = None
    tags: Names | None = None
    not_tags: Names | None = None

    @property
    def invites(self) -> bool | None:
        return self.is_invite if self.is_invited is None else self.is_invited

    @property
    def asks_for_rooms(self) -> bool:
        """Whether it looks at what kind of room it is."""
        return not (self.is_encrypted is None and self.room_types is None and not self.not_room_types)

    @property
    def asks_for_account_data(self) -> bool:
        return not (self.is_dm is None and self.tags is None and not self.not_tags)


EVERY_ROOM = Filters()


@dataclass(frozen=True, slots=True)
class Config:
    """What is wanted of a room."""

    limit: int
    wanted: Wanted

    def joined_with(self, other: Config) -> Config:
        """Spec: MSC4186, combining room configs: the superset."""
        return Config(max(self.limit, other.limit), self.wanted.joined_with(other.wanted))


@dataclass(frozen=True, slots=True)
class ListAsk:
    """`ranges` None is every room that passes the filters."""

    ranges: tuple[Range, ...] | None
    config: Config
    filters: Filters

    def covers(self, count: int) -> bool:
        """Whether the window is the whole of a list of this many rooms."""
        return self.ranges is None or any(first == 0 and last >= count - 1 for first, last in self.ranges)


class ByRoom(msgspec.Struct, frozen=True):
    """An extension that speaks of rooms. `lists` and `rooms` None: of all of them. Spec: MSC3959, MSC3960, MSC3961"""

    enabled: bool = False
    lists: Names | None = None
    rooms: Names | None = None


class ToDeviceAsk(msgspec.Struct, frozen=True):
    enabled: bool = False
    limit: Index | None = None
    since: Name | None = None


class Enabled(msgspec.Struct, frozen=True):
    enabled: bool = False


class Extensions(msgspec.Struct, frozen=True):
    to_device: ToDeviceAsk = ToDeviceAsk()
    e2ee: Enabled = Enabled()
    account_data: ByRoom = ByRoom()
    receipts: ByRoom = ByRoom()
    typing: ByRoom = ByRoom()
    thread_subscriptions: Enabled = msgspec.field(
        name="io.element.msc4308.thread_subscriptions", default_factory=Enabled
    )


@dataclass(slots=True)
class Asked:
    """The body of a request, the same for as long as a client repeats it."""

    conn_id: str
    lists: dict[str, ListAsk]
    subscriptions: dict[str, Config]
    extensions: Extensions
    txn_id: str | None = None
    # Only the accepted form has these in the body.
    pos: str | None = None
    timeout: int = 0
    set_presence: str = "online"
    _merged: dict[tuple[Config, ...], Config] = field(default_factory=dict)

    def merged(self, configs: tuple[Config, ...]) -> Config:
        """What is asked of a room that matches several rules; one object for equal ones."""
        if len(configs) == 1:
            return configs[0]
        known = self._merged.get(configs)
        if known is None:
            known = self._merged[configs] = reduce(Config.joined_with, configs)
        return known

    def same_rules(self, other: Asked) -> bool:
        return self is other or (self.lists == other.lists and self.subscriptions == other.subscriptions)


# --- the deployed form


class _DeployedList(msgspec.Struct):
    timeline_limit: Index
    required_state: list[tuple[Name, Name]] = []
    ranges: list[Range] | None = None
    filters: Filters = EVERY_ROOM


class _DeployedSubscription(msgspec.Struct):
    timeline_limit: Index
    required_state: list[tuple[Name, Name]] = []


class _Deployed(msgspec.Struct):
    conn_id: Name = ""
    txn_id: Name | None = None
    lists: dict[Name, _DeployedList] = {}
    room_subscriptions: dict[Name, _DeployedSubscription] = {}
    extensions: Extensions = Extensions()


def deployed(body: Mapping[str, Any], user_id: str) -> Asked:
    read = _convert(body, _Deployed)
    _bound(read.lists, read.room_subscriptions, MAX_SUBSCRIPTIONS)
    known: dict[tuple[object, ...], Config] = {}

    def config(one: _DeployedList | _DeployedSubscription) -> Config:
        key = (one.timeline_limit, *one.required_state)
        if key not in known:
            known[key] = _config(one.timeline_limit, _wanted_pairs(one.required_state, user_id))
        return known[key]

    lists = {}
    for name, one in read.lists.items():
        lists[name] = ListAsk(_ranges(one.ranges), config(one), one.filters)
    subscriptions = {room_id: config(each) for room_id, each in read.room_subscriptions.items()}
    return Asked(read.conn_id, lists, subscriptions, read.extensions, read.txn_id)


def _wanted_pairs(pairs: list[tuple[str, str]], user_id: str) -> Wanted:
    if len(pairs) > MAX_REQUIRED:
        raise InvalidParam(f"required_state has at most {MAX_REQUIRED} entries.")
    include: list[tuple[str | None, str | None]] = []
    lazy = False
    for event_type, state_key in pairs:
        if state_key == LAZY:
            # Of anything but members it means nothing.
            lazy = lazy or event_type == "m.room.member"
            continue
        own = user_id if state_key == ME else state_key
        include.append((None if event_type == ANY else event_type, None if own == ANY else own))
    return Wanted.of(Rule.of(include), lazy)


# --- the accepted form


class _Element(msgspec.Struct):
    type: Name | None = None
    state_key: Name | None = None


class _RequiredState(msgspec.Struct):
    include: list[_Element] = []
    exclude: list[_Element] = []
    lazy_members: bool = False


class _AcceptedList(msgspec.Struct):
    timeline_limit: Index
    required_state: _RequiredState
    range: Range | None = None
    filters: Filters = EVERY_ROOM


class _AcceptedSubscription(msgspec.Struct):
    timeline_limit: Index
    required_state: _RequiredState


class _Accepted(msgspec.Struct):
    conn_id: Name = ""
    pos: Name | None = None
    timeout: Index = 0
    set_presence: Name = "online"
    lists: dict[Name, _AcceptedList] = {}
    room_subscriptions: dict[Name, _AcceptedSubscription] = {}
    extensions: Extensions = Extensions()


def accepted(body: Mapping[str, Any], user_id: str) -> Asked:
    read = _convert(body, _Accepted)
    _bound(read.lists, read.room_subscriptions, MAX_SUBSCRIPTIONS_ACCEPTED)
    if read.set_presence not in ("online", "offline", "unavailable"):
        raise InvalidParam("set_presence is online, offline or unavailable.")
    lists = {}
    for name, one in read.lists.items():
        ranges = None if one.range is None else _ranges([one.range])
        lists[name] = ListAsk(ranges, _config(one.timeline_limit, _wanted_elements(one.required_state)), one.filters)
    subscriptions = {
        room_id: _config(each.timeline_limit, _wanted_elements(each.required_state))
        for room_id, each in read.room_subscriptions.items()
    }
    return Asked(
        read.conn_id, lists, subscriptions, read.extensions,
        pos=read.pos, timeout=read.timeout, set_presence=read.set_presence,
    )  # fmt: skip


def _wanted_elements(asked: _RequiredState) -> Wanted:
    if len(asked.include) + len(asked.exclude) > MAX_REQUIRED:
        raise InvalidParam(f"required_state has at most {MAX_REQUIRED} entries.")
    include, exclude = (_keys(elements) for elements in (asked.include, asked.exclude))
    return Wanted.of(Rule.of(include, exclude), asked.lazy_members)


def _keys(elements: Iterable[_Element]) -> list[tuple[str | None, str | None]]:
    return [(one.type, one.state_key) for one in elements]


# --- both


def _config(limit: int, wanted: Wanted) -> Config:
    return Config(min(limit, MAX_TIMELINE), wanted)


def _ranges(asked: list[Range] | None) -> tuple[Range, ...] | None:
    if asked is None:
        return None
    if len(asked) > MAX_RANGES:
        raise InvalidParam(f"A list has at most {MAX_RANGES} ranges.")
    for first, last in asked:
        if last < first:
            raise InvalidParam("A range is [first, last], both included, counted from 0.")
    return tuple(asked)


def _bound(lists: Mapping[str, object], subscriptions: Mapping[str, object], most: int) -> None:
    if len(lists) > MAX_LISTS:
        raise InvalidParam(f"A request has at most {MAX_LISTS} lists.")
    if len(subscriptions) > most:
        raise InvalidParam(f"A request has at most {most} room subscriptions.")


def _convert(body: Mapping[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(without_nulls(body), kind)
    except msgspec.ValidationError as bad:
        raise BadJson(f"This is not a sliding sync request: {bad}.") from None
