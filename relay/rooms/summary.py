"""What people and servers outside a room are told of it: its summary, and whether they may have it at all.

Rooms of ours are read from their state, others are asked about at a server that is in them; what it says is picked apart
key by key and never stored. The tree of a space is walked in `spaces.py`.
Spec: client-server-api/#get_matrixclientv1room_summaryroomidoralias, #get_matrixclientv1roomsroomidhierarchy (`rooms`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from relay.db import Database
from relay.errors import ApiError, MissingToken, NotFound, RemoteError
from relay.ids import is_room_id, is_server_name, is_user_id, server_of
from relay.part import Part
from relay.protocol.event import Event
from relay.protocol.versions import RoomVersion
from relay.protocol.visibility import WORLD_READABLE, visibility_of
from relay.remote import Remote
from relay.rooms.directory import Directory
from relay.rooms.room import CREATE, ENCRYPTION, HISTORY_VISIBILITY, JOIN_RULES, Room
from relay.rooms.rooms import Rooms
from relay.rooms.store import Key
from relay.web import Answer, Request, Route

SPACE = "m.space"
CHILD = "m.space.child"
MAX_ALLOWED = 50
MAX_CHILDREN = 1_000
MAX_VIA = 20
MAX_TEXT = 4_096
MAX_SERVERS_ASKED = 3
NOT_TOLD = "There is no such room, or it is not for you to look at. Ask for an invitation."

GUESTS: Key = ("m.room.guest_access", "")
_TEXTS: tuple[tuple[str, Key, str], ...] = (
    ("name", ("m.room.name", ""), "name"),
    ("topic", ("m.room.topic", ""), "topic"),
    ("avatar_url", ("m.room.avatar", ""), "url"),
    ("canonical_alias", ("m.room.canonical_alias", ""), "alias"),
    ("room_type", CREATE, "type"),
    ("encryption", ENCRYPTION, "algorithm"),
)
_KEYS = (*(key for _, key, _ in _TEXTS), HISTORY_VISIBILITY, JOIN_RULES, GUESTS)
_PLAIN_TEXTS = (*(name for name, _, _ in _TEXTS), "join_rule", "room_version")
# What room_summary was called before it was in the standard; clients still ask there where /versions names no v1.15.
_UNSTABLE = "/_matrix/client/unstable/im.nheko.summary"
_UNSTABLE_NAMES = {"encryption": "im.nheko.summary.encryption", "room_version": "im.nheko.summary.room_version"}


@dataclass(slots=True)
class Summary:
    """`told` is the standard's room summary, `children` the stripped `m.space.child` events in the standard's order."""

    told: dict[str, Any]
    children: list[dict[str, Any]] = field(default_factory=list)

    @property
    def room_id(self) -> str:
        return str(self.told["room_id"])

    @property
    def is_space(self) -> bool:
        return self.told.get("room_type") == SPACE

    @property
    def allowed(self) -> Sequence[str]:
        """The rooms whose members may join."""
        listed: Sequence[str] = self.told.get("allowed_room_ids", ())
        return listed

    @property
    def open(self) -> bool:
        """Whether everybody may read it, join it, or knock on it."""
        return bool(self.told.get("world_readable")) or self.told.get("join_rule", "public") in (
            "public",
            "knock",
            "knock_restricted",
        )

    def whole(self) -> dict[str, Any]:
        return {**self.told, "children_state": self.children}


class Conditions(Protocol):
    """`members.py`."""

    async def allowed_by(self, room: Room, user_id: str) -> bool: ...


class Summaries(Part):
    def __init__(self, db: Database, rooms: Rooms, members: Conditions, directory: Directory, remote: Remote) -> None:
        self._db = db
        self._rooms = rooms
        self._members = members
        self._directory = directory
        self._remote = remote
        self._server_name = rooms.server_name

    def routes(self) -> Iterable[Route]:
        for path in (
            "/_matrix/client/v1/room_summary/{roomIdOrAlias}",
            _UNSTABLE + "/summary/{roomIdOrAlias}",
            _UNSTABLE + "/rooms/{roomIdOrAlias}/summary",
        ):
            yield Route("GET", path, self._summary, auth="optional", limit="messages")

    # --- rooms of ours

    async def here(self, room_id: str) -> Room | None:
        """A room that somebody here is in: what we know of it holds."""
        room = await self._rooms.get(room_id)
        # Where the members are still to come, another server knows better.
        return room if room is not None and room.known and room.local_joined and room.partial is None else None

    async def of(self, room: Room) -> Summary:
        found = await room.state_events(_KEYS)
        told: dict[str, Any] = {
            "room_id": room.room_id,
            "num_joined_members": room.joined_count,
            "world_readable": visibility_of(_content(found, HISTORY_VISIBILITY)) == WORLD_READABLE,
            "guest_can_join": _content(found, GUESTS).get("guest_access") == "can_join",
            "room_version": room.version.name,
            "join_rule": _join_rule(_content(found, JOIN_RULES), room.version),
        }
        for name, key, content_key in _TEXTS:
            value = _content(found, key).get(content_key)
            if isinstance(value, str) and value:
                told[name] = value
        if told["join_rule"] in ("restricted", "knock_restricted"):
            told["allowed_room_ids"] = _allowed_rooms(_content(found, JOIN_RULES))
        summary = Summary(told)
        if summary.is_space:
            keys = [key for key in room.state if key[0] == CHILD][:MAX_CHILDREN]
            events = (await room.state_events(keys)).values()
            summary.children = in_order(
                {
                    "type": CHILD,
                    "state_key": event.state_key,
                    "content": event.content,
                    "sender": event.sender,
                    "origin_server_ts": event.origin_server_ts,
                }
                for event in events
                if is_room_id(event.state_key) and via_of(event.content)
            )
        return summary

    async def open_to_user(self, room: Room, summary: Summary, user_id: str) -> bool:
        """Whether somebody of ours may know of a room of ours."""
        membership = room.members.get(user_id)
        if membership in ("join", "invite"):
            return True
        if self._rooms.is_closed(room.room_id):
            return False
        if membership == "ban":
            return bool(summary.told["world_readable"])
        return summary.open or (bool(summary.allowed) and await self._members.allowed_by(room, user_id))

    async def open_to_server(self, room: Room, summary: Summary, server: str) -> bool:
        """Whether somebody of another server could look into a room of ours."""
        if self._rooms.is_closed(room.room_id):
            return False
        if summary.open or server in room.servers:
            return True
        if any(server_of(user_id) == server for user_id, m in room.members.items() if m == "invite"):
            return True
        for other_id in summary.allowed:
            other = await self.here(other_id)
            if other is not None and server in other.servers:
                return True
        return False

    # --- rooms of others

    def open_by_word(self, summary: Summary, user_id: str) -> bool:
        """The same for a room of others, by what its server says of it and what we know of the person."""
        joined = self._rooms.joined(user_id)
        return not self._rooms.is_closed(summary.room_id) and (
            summary.open
            or self._rooms.membership(summary.room_id, user_id) == "invite"
            or any(room_id in joined for room_id in summary.allowed)
        )

    async def ask(
        self, room_id: str, servers: Sequence[str], *, suggested_only: bool
    ) -> tuple[Summary, list[Summary], set[str]] | None:
        """(the room, its children as far as that server knows them, those that are closed to us), from the first of the
        servers that tells."""
        others = [server for server in dict.fromkeys(servers) if server != self._server_name]
        for server in others[:MAX_SERVERS_ASKED]:
            try:
                answer = await self._remote.hierarchy(server, room_id, suggested_only)
            except (RemoteError, ApiError):
                continue
            summary = parsed(answer.get("room"))
            if summary is None or summary.room_id != room_id:
                continue
            given = answer.get("children")
            children = [parsed(one) for one in (given if isinstance(given, list) else [])[:MAX_CHILDREN]]
            closed = answer.get("inaccessible_children")
            shut = {one for one in (closed if isinstance(closed, list) else [])[:MAX_CHILDREN] if isinstance(one, str)}
            return summary, [one for one in children if one is not None], shut
        return None

    # --- the endpoint

    async def _summary(self, request: Request) -> Answer:
        asked = request.params["roomIdOrAlias"]
        user_id = request.user_id if request.caller is not None else None
        if user_id is None and asked.startswith("#") and server_of(asked) != self._server_name:
            raise MissingToken("Sign in first: strangers may look only at rooms of this server.")
        room_id, servers = await self._directory.room_of(asked)
        via = [s for s in (*request.query_list("via"), *servers) if is_server_name(s)][:MAX_VIA]
        told = await self.summary(room_id, via, user_id)
        if request.route.path.startswith(_UNSTABLE):
            told.update({new: told[old] for old, new in _UNSTABLE_NAMES.items() if old in told})
        return told

    async def summary(self, room_id: str, via: Sequence[str], user_id: str | None) -> dict[str, Any]:
        """What this person, or a stranger, is told of a room. Raises NotFound, MissingToken."""
        room = await self.here(room_id)
        if room is not None:
            summary = await self.of(room)
            if user_id is None:
                seen = summary.open and not self._rooms.is_closed(room_id)
            else:
                seen = await self.open_to_user(room, summary, user_id)
            if not seen:
                raise NotFound(NOT_TOLD)
        elif user_id is None:
            raise MissingToken("Sign in first: strangers may look only at rooms of this server.")
        else:
            summary = await self._elsewhere(room_id, via, user_id)
        if user_id is not None:
            membership = room.members.get(user_id) if room is not None else self._rooms.membership(room_id, user_id)
            return {**summary.told, "membership": membership or "leave"}
        return summary.told

    async def _elsewhere(self, room_id: str, via: Sequence[str], user_id: str) -> Summary:
        invited = await self._by_invite(room_id, user_id)
        home = [server_of(room_id)] if server_of(room_id) else []
        inviters = [server_of(invited[1])] if invited is not None else []
        asked = await self.ask(room_id, [*via, *inviters, *home], suggested_only=True)
        if asked is not None and self.open_by_word(asked[0], user_id):
            return asked[0]
        if invited is None:
            raise NotFound(NOT_TOLD)
        return invited[0]

    async def _by_invite(self, room_id: str, user_id: str) -> tuple[Summary, str] | None:
        """What she was told when she was invited, or when she knocked, and by whom."""
        mine = self._rooms.memberships(user_id).get(room_id)
        room = await self._rooms.get(room_id)
        if mine is None or room is None or mine.membership not in ("invite", "knock"):
            return None
        raw = await self._db.read(
            lambda query: query.value(
                "SELECT stripped FROM memberships WHERE room_nid = $1 AND user_id = $2", mine.room_nid, user_id
            )
        )
        stripped = [one for one in (orjson.loads(bytes(raw)) if raw else []) if isinstance(one, dict)]
        contents = {one.get("type"): one.get("content") for one in stripped}
        senders = [str(one.get("sender")) for one in stripped if is_user_id(one.get("sender"))]
        told: dict[str, Any] = {
            "room_id": room_id,
            "num_joined_members": 1 if mine.membership == "invite" else 0,
            "world_readable": False,
            "guest_can_join": False,
            "room_version": room.version.name,
        }
        for name, key, content_key in (*_TEXTS, ("join_rule", JOIN_RULES, "join_rule")):
            content = contents.get(key[0])
            value = content.get(content_key) if isinstance(content, dict) else None
            if isinstance(value, str) and value:
                told[name] = value
        return Summary(told), senders[0] if senders else ""


def parsed(given: object) -> Summary | None:
    """A summary that another server gave: only what the standard names, and only in its shape."""
    if not isinstance(given, dict) or not is_room_id(given.get("room_id")):
        return None
    joined = given.get("num_joined_members")
    told: dict[str, Any] = {
        "room_id": given["room_id"],
        "num_joined_members": joined if type(joined) is int and joined >= 0 else 0,
        "world_readable": given.get("world_readable") is True,
        "guest_can_join": given.get("guest_can_join") is True,
    }
    for name in _PLAIN_TEXTS:
        value = given.get(name)
        if isinstance(value, str) and 0 < len(value) <= MAX_TEXT:
            told[name] = value
    allowed = given.get("allowed_room_ids")
    if isinstance(allowed, list) and allowed:
        told["allowed_room_ids"] = [one for one in allowed[:MAX_ALLOWED] if is_room_id(one)]
    summary = Summary(told)
    children = given.get("children_state")
    if summary.is_space and isinstance(children, list):
        picked = (_child(one) for one in children[:MAX_CHILDREN])
        summary.children = in_order(one for one in picked if one is not None)
    return summary


def in_order(children: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spec: client-server-api/#ordering-of-children-within-a-space"""

    def place(child: dict[str, Any]) -> tuple[bool, str, int, str]:
        order = child["content"].get("order")
        valid = isinstance(order, str) and len(order) <= 50 and all(" " <= letter <= "~" for letter in order)
        return not valid, order if valid else "", child["origin_server_ts"], child["state_key"]

    return sorted(children, key=place)


def via_of(content: Mapping[str, Any]) -> list[str]:
    """The servers of a child; without any, it is no child any more."""
    via = content.get("via")
    return [one for one in via if is_server_name(one)][:MAX_VIA] if isinstance(via, list) else []


def _child(given: object) -> dict[str, Any] | None:
    if (
        not isinstance(given, dict)
        or given.get("type") != CHILD
        or not is_room_id(given.get("state_key"))
        or not isinstance(given.get("content"), dict)
        or not is_user_id(given.get("sender"))
        or type(given.get("origin_server_ts")) is not int
        or not via_of(given["content"])
    ):
        return None
    content = given["content"]
    kept: dict[str, Any] = {"via": via_of(content)}
    if isinstance(content.get("order"), str) and len(content["order"]) <= MAX_TEXT:
        kept["order"] = content["order"]
    if isinstance(content.get("suggested"), bool):
        kept["suggested"] = content["suggested"]
    return {
        "type": CHILD,
        "state_key": given["state_key"],
        "content": kept,
        "sender": given["sender"],
        "origin_server_ts": given["origin_server_ts"],
    }


def _content(found: Mapping[Key, Event], key: Key) -> Mapping[str, Any]:
    event = found.get(key)
    return event.content if event is not None else {}


def _join_rule(content: Mapping[str, Any], version: RoomVersion) -> str:
    """As the room's version understands it: what it does not know lets nobody in."""
    rule = content.get("join_rule")
    known = {
        "public": True,
        "invite": True,
        "private": True,
        "knock": version.knock,
        "restricted": version.restricted,
        "knock_restricted": version.knock_restricted,
    }
    return rule if isinstance(rule, str) and known.get(rule) else "invite"


def _allowed_rooms(content: Mapping[str, Any]) -> list[str]:
    allow = content.get("allow")
    return [
        one["room_id"]
        for one in (allow if isinstance(allow, list) else [])[:MAX_ALLOWED]
        if isinstance(one, dict) and one.get("type") == "m.room_membership" and is_room_id(one.get("room_id"))
    ]
