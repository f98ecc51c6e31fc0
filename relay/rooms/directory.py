"""Addresses of rooms (aliases) and the directory of published ones, for our people and for other servers.

An alias is a row here, no event; which of them a room shows is its m.room.canonical_alias, whose aliases are checked
before it is sent. Spec: client-server-api/#room-aliases, #listing-rooms, #mroomcanonical_alias.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from relay.clock import Clock
from relay.db import Database, IntegrityError, Query, Row
from relay.doors import Doors
from relay.errors import ApiError, Forbidden, InvalidParam, MissingToken, NotAllowed, NotFound, RemoteError
from relay.ids import is_alias, is_room_id, is_server_name, server_of
from relay.part import Part
from relay.protocol.versions import VERSIONS
from relay.protocol.visibility import WORLD_READABLE
from relay.remote import Remote
from relay.rooms import format, state, store
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.rooms.send import Sender
from relay.rooms.store import Key
from relay.rooms.viewing import Viewing
from relay.web import Answer, Caller, Request, Route, get_bool, get_object, get_optional_string, get_string

CANONICAL_ALIAS = "m.room.canonical_alias"
MAX_ALIASES_NAMED = 50
MAX_ALIASES_SHOWN = 1000
MAX_SERVERS_NAMED = 50
DEFAULT_PAGE = 100
MAX_PAGE = 500
MAX_PUBLISHED = 10_000
MAX_TERM = 256
# How old the names and counts of the directory may be.
LIST_KEPT_SECONDS = 10.0

_SHOWN: dict[str, tuple[Key, str]] = {
    "name": (("m.room.name", ""), "name"),
    "topic": (("m.room.topic", ""), "topic"),
    "avatar_url": (("m.room.avatar", ""), "url"),
    "canonical_alias": ((CANONICAL_ALIAS, ""), "alias"),
    "join_rule": (("m.room.join_rules", ""), "join_rule"),
    "room_type": (("m.room.create", ""), "type"),
}
_VISIBILITY: Key = ("m.room.history_visibility", "")
_GUESTS: Key = ("m.room.guest_access", "")
_KEYS = (*(key for key, _ in _SHOWN.values()), _VISIBILITY, _GUESTS)


@dataclass(slots=True)
class _List:
    entries: list[dict[str, Any]]
    # How many rooms were published, and the newest of them: a new one is seen at once.
    published: tuple[int, int]
    made: float


class Directory(Part):
    def __init__(
        self, db: Database, rooms: Rooms, viewing: Viewing, sender: Sender, doors: Doors, remote: Remote, clock: Clock
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._viewing = viewing
        self._sender = sender
        self._doors = doors
        self._remote = remote
        self._clock = clock
        self._server_name = rooms.server_name
        # For application services; the server sets both. Whether the caller's service owns an address (raises where it may
        # not make it), and whether one has just made an address that was not known.
        self.owned_by_service: Callable[[Caller, str], bool] | None = None
        self.asks_services: Callable[[str], Awaitable[bool]] | None = None
        # The rooms that services list for a network, or for all of them.
        self.of_networks: Callable[[Query, str | None], list[str]] | None = None
        # Dropped when a room is published or withdrawn (rows of `rooms`), and by its age.
        self._list: _List | None = None

    def routes(self) -> Iterable[Route]:
        v3 = "/_matrix/client/v3"
        return (
            Route("PUT", v3 + "/directory/room/{roomAlias}", self._put_alias),
            Route("GET", v3 + "/directory/room/{roomAlias}", self._get_alias, auth="optional"),
            Route("DELETE", v3 + "/directory/room/{roomAlias}", self._delete_alias),
            Route("GET", v3 + "/rooms/{roomId}/aliases", self._aliases_of_room),
            Route("GET", v3 + "/directory/list/room/{roomId}", self._get_published, auth="none"),
            Route("PUT", v3 + "/directory/list/room/{roomId}", self._put_published),
            Route("GET", v3 + "/publicRooms", self._get_public_rooms, auth="optional"),
            Route("POST", v3 + "/publicRooms", self._post_public_rooms),
        )

    # --- aliases, for other parts

    async def local_alias(self, alias: str) -> tuple[str, list[str]] | None:
        """(room ID, servers in it) of an address of ours, unless moderators have closed the room."""
        room_id = await self._db.read(_room_of_alias, alias)
        if room_id is None and self.asks_services is not None and await self.asks_services(alias):
            room_id = await self._db.read(_room_of_alias, alias)
        if room_id is None or self._rooms.is_closed(room_id):
            return None
        room = await self._rooms.get(room_id)
        servers = sorted(room.servers - {self._server_name}) if room is not None else []
        return room_id, [self._server_name, *servers][:MAX_SERVERS_NAMED]

    async def resolve(self, alias: str) -> tuple[str, list[str]]:
        """The same for an address of any server. Raises NotFound, InvalidParam, RemoteError."""
        if not is_alias(alias):
            raise InvalidParam(f"{alias!r} is not a room alias. It looks like #name:server.")
        if server_of(alias) == self._server_name:
            known = await self.local_alias(alias)
            if known is None:
                raise NotFound(f"There is no room {alias} on this server.")
            return known
        try:
            room_id, servers = await self._remote.directory(server_of(alias), alias)
        except RemoteError as error:
            if error.status == 404:
                raise NotFound(f"There is no room {alias}.") from error
            raise
        if not is_room_id(room_id):
            raise NotFound(f"The server of {alias} answered something that is not a room.")
        return room_id, [s for s in servers if is_server_name(s)][:MAX_SERVERS_NAMED]

    async def room_of(self, room_id_or_alias: str) -> tuple[str, list[str]]:
        """The room that somebody wants to join or knock on, and servers that may help."""
        if room_id_or_alias.startswith("#"):
            return await self.resolve(room_id_or_alias)
        server = server_of(room_id_or_alias)
        if not is_room_id(room_id_or_alias) or (server and not is_server_name(server)):
            raise InvalidParam(f"{room_id_or_alias!r} is neither a room ID nor a room alias.")
        return room_id_or_alias, []

    async def check_canonical(self, room: Room, content: Mapping[str, Any]) -> None:
        """Whether an m.room.canonical_alias may be sent: what is new in it has to lead to this room."""
        named = _aliases_in(content)
        before = set(_aliases_in(await room.content(CANONICAL_ALIAS), strict=False))
        if len(named) > MAX_ALIASES_NAMED:
            raise InvalidParam(f"A room names at most {MAX_ALIASES_NAMED} aliases.")
        for alias in dict.fromkeys(named):
            if alias in before:
                continue
            try:
                leads_to = (await self.resolve(alias))[0]
            except (NotFound, RemoteError):
                leads_to = None
            if leads_to != room.room_id:
                raise ApiError(
                    f"{alias} does not lead to this room. Give the room this address first.",
                    status=400,
                    errcode="M_BAD_ALIAS",
                )

    # --- aliases, the endpoints

    async def _put_alias(self, request: Request) -> Answer:
        alias = self._own_alias(request.params["roomAlias"])
        room_id = get_string(request.json(), "room_id")
        if self.owned_by_service is not None and self.owned_by_service(request.who, alias):
            # A bridge gives its addresses to rooms that none of its own users is in yet.
            room = await self._rooms.get(room_id)
            if room is None or not room.known or not room.local_joined:
                raise NotFound(f"Nobody of this server is in {room_id}. Let somebody join it first.")
        else:
            room = await self._rooms.require_joined(room_id, request.user_id)
        await self._doors.alias(request.user_id, alias, room_id)
        try:
            with self._db.write() as tx:
                tx.run(
                    "INSERT INTO aliases (alias, room_nid, creator) VALUES ($1, $2, $3)",
                    alias,
                    room.nid,
                    request.user_id,
                )
            await tx
        except IntegrityError:
            raise ApiError(f"{alias} is taken. Choose another address.", status=409) from None
        return {}

    async def _get_alias(self, request: Request) -> Answer:
        alias = request.params["roomAlias"]
        if is_alias(alias) and server_of(alias) != self._server_name and request.caller is None:
            raise MissingToken("Sign in first: strangers may ask only for addresses of this server.")
        room_id, servers = await self.resolve(alias)
        return {"room_id": room_id, "servers": servers}

    async def _delete_alias(self, request: Request) -> Answer:
        alias = self._own_alias(request.params["roomAlias"])
        row = await self._db.read(
            lambda query: query.one(
                "SELECT r.room_id, a.creator FROM aliases a JOIN rooms r ON r.nid = a.room_nid WHERE a.alias = $1",
                alias,
            )
        )
        if row is None:
            raise NotFound(f"There is no room {alias} on this server.")
        room = await self._rooms.get(row[0])
        owned = self.owned_by_service is not None and self.owned_by_service(request.who, alias)
        if row[1] != request.user_id and not owned and not await self._may_address(room, request.who):
            raise Forbidden("Only who made this address, a moderator of the room or an admin can remove it.")
        with self._db.write() as tx:
            tx.run("DELETE FROM aliases WHERE alias = $1", alias)
        await tx
        if room is not None:
            await self._forget_canonical(room, alias, request.user_id)
        return {}

    async def _forget_canonical(self, room: Room, alias: str, user_id: str) -> None:
        """The room's own state names the address no longer, if she who removed it may say so."""
        content = await room.content(CANONICAL_ALIAS)
        if room.members.get(user_id) != "join" or alias not in _aliases_in(content, strict=False):
            return
        kept = {key: value for key, value in content.items() if not (key == "alias" and value == alias)}
        others = kept.get("alt_aliases")
        if isinstance(others, list):
            kept["alt_aliases"] = [other for other in others if other != alias]
        try:
            await self._sender.send(room.room_id, sender=user_id, type=CANONICAL_ALIAS, content=kept, state_key="")
        except (ApiError, NotAllowed):
            return

    async def _aliases_of_room(self, request: Request) -> Answer:
        view = await self._viewing.enter(request.params["roomId"], request.user_id)
        if view.ends:
            raise Forbidden("You are not in this room any more.")
        rows = await self._db.read(
            lambda query: query.all(
                "SELECT alias FROM aliases WHERE room_nid = $1 ORDER BY alias LIMIT $2",
                view.room.nid,
                MAX_ALIASES_SHOWN,
            )
        )
        return {"aliases": [row[0] for row in rows]}

    def _own_alias(self, alias: str) -> str:
        if not is_alias(alias):
            raise InvalidParam(f"{alias!r} is not a room alias. It looks like #name:{self._server_name}.")
        if server_of(alias) != self._server_name:
            raise InvalidParam(f"This server gives out addresses that end in :{self._server_name}, no others.")
        return alias

    async def _may_address(self, room: Room | None, who: Caller) -> bool:
        """Whether somebody has a say in how the room is found."""
        if who.admin:
            return True
        if room is None or not room.known or room.members.get(who.user_id) != "join":
            return False
        levels = await room.levels()
        return levels.user(who.user_id) >= levels.to_send(CANONICAL_ALIAS, True)

    # --- the directory

    async def _get_published(self, request: Request) -> Answer:
        room = await self._rooms.get(request.params["roomId"])
        if room is None or not room.known:
            raise NotFound("This room is not known here.")
        return {"visibility": "public" if room.published else "private"}

    async def _put_published(self, request: Request) -> Answer:
        visibility = get_string(request.optional_json(), "visibility", "public")
        if visibility not in ("public", "private"):
            raise InvalidParam("The visibility is public or private.")
        room = await self._rooms.get(request.params["roomId"])
        if room is None or not room.known:
            raise NotFound("This room is not known here.")
        if not await self._may_address(room, request.who):
            raise Forbidden("Only a moderator of the room can publish or withdraw it.")
        if visibility == "public":
            await self._doors.publish_room(request.user_id, room.room_id)
        with self._db.write() as tx:
            tx.run("UPDATE rooms SET published = $2 WHERE nid = $1", room.nid, int(visibility == "public"))
            tx.after(lambda: self._take_published(room, visibility == "public"))
        await tx
        return {}

    def _take_published(self, room: Room, published: bool) -> None:
        room.published = published
        self._list = None

    async def _get_public_rooms(self, request: Request) -> Answer:
        query = request.query
        body = {"limit": request.query_int("limit", DEFAULT_PAGE, low=1, high=MAX_PAGE), "since": query.get("since")}
        if query.get("server") not in (None, self._server_name) and request.caller is None:
            raise MissingToken("Sign in first: strangers may look only at this server's own list.")
        return await self._public_rooms_of(query.get("server"), {k: v for k, v in body.items() if v is not None})

    async def _post_public_rooms(self, request: Request) -> Answer:
        return await self._public_rooms_of(request.query.get("server"), request.optional_json())

    async def _public_rooms_of(self, server: str | None, body: dict[str, Any]) -> dict[str, Any]:
        limit = body.get("limit", DEFAULT_PAGE)
        if type(limit) is not int or limit < 1:
            raise InvalidParam("The limit is a whole number above 0.")
        since = get_optional_string(body, "since")
        wanted = get_object(body, "filter", {})
        network = get_optional_string(body, "third_party_instance_id") or None
        everything = get_bool(body, "include_all_networks", False)
        if network is not None and everything:
            raise InvalidParam(
                "Ask for one network with third_party_instance_id, or for all with include_all_networks."
            )
        if server is None or server == self._server_name:
            return await self.public_rooms(limit, since, wanted, network=network, everything=everything)
        if not is_server_name(server):
            raise InvalidParam(f"{server!r} is not a server name.")
        asked: dict[str, Any] = {"limit": min(limit, MAX_PAGE), "filter": wanted}
        if network is not None or everything:
            asked |= {"include_all_networks": everything} if everything else {"third_party_instance_id": network}
        return await self._remote.public_rooms(server, asked if since is None else {**asked, "since": since})

    async def public_rooms_here(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """What another server asks of our list, by the body of the standard's request."""
        return await self._public_rooms_of(None, dict(body))

    async def public_rooms(
        self,
        limit: int,
        since: str | None,
        filter: Mapping[str, Any],
        *,
        network: str | None = None,
        everything: bool = False,
    ) -> dict[str, Any]:
        """A page of the published rooms of this server, those with most members first. Also what other servers get.

        `network` names the list of a service's network instead, `everything` adds those of all networks.
        """
        listed = await self._published() if network is None else []
        if network is not None or everything:
            listed = _together(listed, await self._db.read(self._of_networks, network))
        entries = [one for one in listed if _wanted(one, filter) and not self._rooms.is_closed(one["room_id"])]
        begin = 0
        if since is not None:
            backwards, place = _page_token(since)
            begin = next((n for n, one in enumerate(entries) if _order(one) >= place), len(entries))
            if backwards:
                begin = max(0, begin - min(limit, MAX_PAGE))
        page = entries[begin : begin + min(limit, MAX_PAGE)]
        answer: dict[str, Any] = {"chunk": page, "total_room_count_estimate": len(entries)}
        if begin + len(page) < len(entries):
            answer["next_batch"] = _token_text("n", entries[begin + len(page)])
        if begin > 0 and page:
            answer["prev_batch"] = _token_text("p", page[0])
        return answer

    def _of_networks(self, query: Query, network: str | None) -> list[dict[str, Any]]:
        rooms = self.of_networks(query, network) if self.of_networks is not None else []
        return _summaries(
            query, [row for room_id in rooms for row in query.all(f"{_LISTED} AND r.room_id = $1", room_id)]
        )

    async def _published(self) -> list[dict[str, Any]]:
        known, now = self._list, self._clock.monotonic()

        def fresh(query: Query) -> _List | None:
            row = query.one("SELECT count(*), max(nid) FROM rooms WHERE published = 1") or (0, 0)
            if known is not None and known.published == row and now - known.made <= LIST_KEPT_SECONDS:
                return None
            return _List(sorted(_summaries(query, _published(query)), key=_order), row, now)

        self._list = await self._db.read(fresh) or known
        return self._list.entries if self._list is not None else []


def _aliases_in(content: Mapping[str, Any], *, strict: bool = True) -> list[str]:
    """The aliases that an m.room.canonical_alias names. Raises InvalidParam."""
    alias, others = content.get("alias"), content.get("alt_aliases", [])
    listed = others if isinstance(others, list) else []
    named = [*([alias] if alias not in (None, "") else []), *listed]
    if not strict:
        return [one for one in named if isinstance(one, str)]
    if not isinstance(others, list) or not all(is_alias(one) for one in named):
        raise InvalidParam("The aliases of a room look like #name:server.")
    return [str(one) for one in named]


# Only rooms that somebody here is in: of others the state may be an old one.
_LISTED = (
    "SELECT r.nid, r.room_id, r.version, r.state_nid, "
    "(SELECT count(*) FROM memberships m WHERE m.room_nid = r.nid AND m.membership = 'join') FROM rooms r "
    "WHERE r.state_nid IS NOT NULL AND EXISTS (SELECT 1 FROM memberships o "
    "WHERE o.room_nid = r.nid AND o.local = 1 AND o.membership = 'join')"
)


def _published(query: Query) -> list[Row]:
    return query.all(f"{_LISTED} AND r.published = 1 ORDER BY r.nid LIMIT $1", MAX_PUBLISHED)


def _together(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each room once, in the list's order."""
    return sorted({entry["room_id"]: entry for entry in (*one, *other)}.values(), key=_order)


def _summaries(query: Query, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What the directory says of each of these rooms. In a reader's thread."""
    found = []
    for nid, room_id, version, state_nid, joined in rows:
        at = state.lookup(query, nid, [state_nid], _KEYS).get(state_nid, {})
        events = store.by_ids(query, at.values(), VERSIONS[version])
        contents = {key: format.content(events[event_id]) for key, event_id in at.items() if event_id in events}
        one: dict[str, Any] = {
            "room_id": room_id,
            "num_joined_members": joined,
            "world_readable": contents.get(_VISIBILITY, {}).get("history_visibility") == WORLD_READABLE,
            "guest_can_join": contents.get(_GUESTS, {}).get("guest_access") == "can_join",
        }
        for name, (key, content_key) in _SHOWN.items():
            value = contents.get(key, {}).get(content_key)
            if isinstance(value, str) and value:
                one[name] = value
        found.append(one)
    return found


def _wanted(one: Mapping[str, Any], filter: Mapping[str, Any]) -> bool:
    """Spec: client-server-api/#post_matrixclientv3publicrooms, `filter`"""
    term, types = filter.get("generic_search_term"), filter.get("room_types")
    if isinstance(types, list) and one.get("room_type") not in types:
        return False
    if not isinstance(term, str) or not term:
        return True
    sought = term[:MAX_TERM].casefold()
    return any(sought in one.get(name, "").casefold() for name in ("name", "topic", "canonical_alias"))


def _order(one: Mapping[str, Any]) -> tuple[int, str]:
    return -int(one["num_joined_members"]), str(one["room_id"])


def _token_text(way: str, one: Mapping[str, Any]) -> str:
    return way + base64.urlsafe_b64encode(orjson.dumps(_order(one))).decode().rstrip("=")


def _page_token(text: str) -> tuple[bool, tuple[int, str]]:
    """Whether it leads backwards, and the place."""
    try:
        count, room_id = orjson.loads(base64.urlsafe_b64decode(text[1:] + "=" * (-len(text[1:]) % 4)))
        if text[:1] in ("n", "p") and type(count) is int and type(room_id) is str:
            return text[0] == "p", (count, room_id)
    except (ValueError, TypeError):
        pass
    raise InvalidParam("This is not a token of this list. Leave `since` out to begin at its start.")


def _room_of_alias(query: Query, alias: str) -> str | None:
    found: str | None = query.value(
        "SELECT r.room_id FROM aliases a JOIN rooms r ON r.nid = a.room_nid WHERE a.alias = $1", alias
    )
    return found
