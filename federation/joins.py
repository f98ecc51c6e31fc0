"""People of other servers come and go: make_ and send_ of join, leave and knock, with us as the resident server.

make_ hands out a template that the rules would allow now; send_ takes the signed event, judges it like any other, and passes
it on to the room's other servers. A restricted join is vouched for here if one of the room's conditions can be seen to hold.
Spec: server-server-api/#joining-rooms, #restricted-rooms, #leaving-rooms-rejecting-invites, #knocking-upon-a-room.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import orjson

from federation.answers import state_before
from federation.asking import Asking
from federation.chains import Chains, Gathered
from federation.joined import Joined
from relay.db import Database
from relay.errors import ApiError, BadEvent, BadJson, Forbidden, InvalidParam, NotFound
from relay.ids import is_user_id, server_of
from relay.part import Part
from relay.protocol import event as events
from relay.protocol.auth import auth_keys
from relay.protocol.event import Event
from relay.protocol.judge import Verdict
from relay.protocol.signing import SigningKey
from relay.remote import Remote
from relay.rooms.room import CREATE, JOIN_RULES, STRIPPED_KEYS, Room
from relay.rooms.rooms import Rooms
from relay.rooms.send import Sender
from relay.rooms.store import FAN_OUT, SOFT_FAILED, Stored
from relay.web import Request, Route

V1 = "/_matrix/federation/v1"
V2 = "/_matrix/federation/v2"

MAX_ALLOW_CONDITIONS = 50
# /sync names five, of whom the joining person may be one.
HEROES = 6

Kind = Literal["join", "leave", "knock"]


class Vouches(Protocol):
    """What `relay/rooms/members.py` knows about restricted rooms."""

    async def allowed_by(self, room: Room, user_id: str) -> bool: ...
    async def who_may_vouch(self, room: Room, *, only_local: bool = False) -> str | None: ...


class Admits(Protocol):
    """`relay/rooms/receive.py`."""

    async def admit(self, event: Event, *, origin: str, marks: int = 0) -> Verdict: ...


class Joins(Part):
    def __init__(
        self,
        db: Database,
        rooms: Rooms,
        sender: Sender,
        members: Vouches,
        receiver: Admits,
        remote: Remote,
        asking: Asking,
        chains: Chains,
        key: SigningKey,
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._sender = sender
        self._members = members
        self._receiver = receiver
        self._remote = remote
        self._asking = asking
        self._chains = chains
        self._key = key
        self._server_name = rooms.server_name
        # A peer that lost its patience sends the same event again.
        self._under_way: Joined[Stored] = Joined()

    def routes(self) -> Iterable[Route]:
        for method, path, function in (
            ("GET", f"{V1}/make_join/{{roomId}}/{{userId}}", self._make_join),
            ("GET", f"{V1}/make_leave/{{roomId}}/{{userId}}", self._make_leave),
            ("GET", f"{V1}/make_knock/{{roomId}}/{{userId}}", self._make_knock),
            ("PUT", f"{V2}/send_join/{{roomId}}/{{eventId}}", self._send_join),
            ("PUT", f"{V2}/send_leave/{{roomId}}/{{eventId}}", self._send_leave),
            ("PUT", f"{V1}/send_join/{{roomId}}/{{eventId}}", self._send_join_v1),
            ("PUT", f"{V1}/send_leave/{{roomId}}/{{eventId}}", self._send_leave_v1),
            ("PUT", f"{V1}/send_knock/{{roomId}}/{{eventId}}", self._send_knock),
        ):
            yield Route(method, path, function, auth="server", limit="federation", serves="federation")

    # --- templates

    async def _make_join(self, request: Request) -> dict[str, Any]:
        room, user_id = await self._asked(request)
        self._rooms.require_open(room.room_id)
        _require_version(room, request.query_list("ver"))
        content = {"membership": "join"}
        if await self._needs_voucher(room, user_id):
            content["join_authorised_via_users_server"] = await self._voucher(room, user_id)
        return await self._template(room, user_id, content)

    async def _make_leave(self, request: Request) -> dict[str, Any]:
        room, user_id = await self._asked(request)
        return await self._template(room, user_id, {"membership": "leave"})

    async def _make_knock(self, request: Request) -> dict[str, Any]:
        room, user_id = await self._asked(request)
        self._rooms.require_open(room.room_id)
        _require_version(room, request.query_list("ver"))
        return await self._template(room, user_id, {"membership": "knock"})

    async def _asked(self, request: Request) -> tuple[Room, str]:
        user_id = request.params["userId"]
        if not is_user_id(user_id):
            raise InvalidParam("That is not a user ID. It looks like @name:server.")
        if server_of(user_id) != request.origin:
            raise Forbidden("A server can only ask for its own users.")
        return await self._asking.whole(request.origin, request.params["roomId"]), user_id

    async def _template(self, room: Room, user_id: str, content: dict[str, Any]) -> dict[str, Any]:
        """Raises NotAllowed where the rules would refuse the event."""
        keys = [CREATE, *auth_keys("m.room.member", user_id, user_id, content, room.version)]
        state = await room.state_events(keys)
        # Built like one of ours, so that it is judged; what our signature stands on is then taken off again.
        event = self._sender.build(
            room, state, sender=user_id, type="m.room.member", content=content, state_key=user_id
        )
        pdu = {name: value for name, value in event.pdu.items() if name not in ("hashes", "signatures")}
        return {"room_version": room.version.name, "event": pdu}

    # --- restricted rooms

    async def _needs_voucher(self, room: Room, user_id: str) -> bool:
        rule = (await room.content(*JOIN_RULES)).get("join_rule")
        version = room.version
        restricted = (version.restricted and rule == "restricted") or (
            version.knock_restricted and rule == "knock_restricted"
        )
        return restricted and room.members.get(user_id) not in ("join", "invite", "ban")

    async def _voucher(self, room: Room, user_id: str) -> str:
        """A local member who may invite, for somebody who fulfils one of the room's conditions."""
        await self._require_condition(room, user_id)
        voucher = await self._members.who_may_vouch(room, only_local=True)
        if voucher is None:
            raise ApiError(
                "Nobody on this server may invite to this room. Ask another server that is in it.",
                errcode="M_UNABLE_TO_GRANT_JOIN",
            )
        return voucher

    async def _require_condition(self, room: Room, user_id: str) -> None:
        if await self._members.allowed_by(room, user_id):
            return
        if await self._sees_all_conditions(room):
            raise Forbidden("This room is open to members of certain other rooms, and you are in none of them.")
        raise ApiError(
            "This server can't see whether you fulfil one of the room's conditions. Ask another server that is in it.",
            errcode="M_UNABLE_TO_AUTHORISE_JOIN",
        )

    async def _sees_all_conditions(self, room: Room) -> bool:
        allow = (await room.content(*JOIN_RULES)).get("allow")
        for condition in (allow if isinstance(allow, list) else [])[:MAX_ALLOW_CONDITIONS]:
            if not isinstance(condition, dict) or condition.get("type") != "m.room_membership":
                continue
            other = await self._rooms.get(str(condition.get("room_id")))
            if other is None or not other.local_joined or other.partial is not None:
                return False
        return True

    # --- signed events

    async def _send_join(self, request: Request) -> bytes:
        room, event = await self._given(request, "join")
        if event.version.restricted and "join_authorised_via_users_server" in event.content:
            event = await self._vouched(room, event)
        one = await self._record(room, event, request.origin)
        omit = request.query_bool("omit_members")
        answer: dict[str, Any] = {"event": orjson.Fragment(one.event.raw), "members_omitted": omit}
        if omit:
            before = room.servers
            if not any(user != event.sender and server_of(user) == event.server for user in _joined(room)):
                before.discard(event.server)
            answer["servers_in_room"] = sorted(before)
        state_ids = await state_before(
            self._db, self._rooms, room, one, members=None if not omit else await _faces(room)
        )

        def make(found: Gathered) -> bytes:
            told = set(found.state) if omit else set()
            return orjson.dumps({**answer, "state": found.of_state(), "auth_chain": found.of_chain(told)})

        return await self._chains.answer(room.version, state_ids, make, also=(one.id,))

    async def _send_leave(self, request: Request) -> dict[str, Any]:
        room, event = await self._given(request, "leave")
        await self._record(room, event, request.origin)
        return {}

    # The older form of both, which some servers still fall back to: the status once more before the answer.

    async def _send_join_v1(self, request: Request) -> bytes:
        return b"[200," + await self._send_join(request) + b"]"

    async def _send_leave_v1(self, request: Request) -> bytes:
        return b"[200," + orjson.dumps(await self._send_leave(request)) + b"]"

    async def _send_knock(self, request: Request) -> bytes:
        room, event = await self._given(request, "knock")
        await self._record(room, event, request.origin)
        found = await room.state_events(STRIPPED_KEYS)
        # Since 1.16 these are whole events; clients are given their stripped form by the server that asked.
        return orjson.dumps({"knock_room_state": [orjson.Fragment(one.raw) for one in found.values()]})

    async def _given(self, request: Request, kind: Kind) -> tuple[Room, Event]:
        """The event of the request, if it is one that the standard lets a server send here."""
        room = await self._asking.whole(request.origin, request.params["roomId"])
        if kind != "leave":
            self._rooms.require_open(room.room_id)
        try:
            event = events.parse(request.json(), room.version)
        except BadEvent as bad:
            raise BadJson(f"This is not an event of room version {room.version.name}: {bad.text}.") from bad
        for holds, sentence in (
            (event.room_id == room.room_id, "The event is of another room than the request."),
            (event.id == request.params["eventId"], f"The event's ID is {event.id}, the request names another."),
            (event.type == "m.room.member", "The event is not an m.room.member event."),
            (event.membership == kind, f"The event's membership is not {kind!r}."),
            (event.server == request.origin, "The event's sender is not a user of your server."),
            (event.state_key == event.sender, "The event's state_key is not its sender."),
            (events.hash_matches(event), "The event's content is not the one that its hash was made of."),
        ):
            if not holds:
                raise InvalidParam(sentence)
        return room, event

    async def _vouched(self, room: Room, event: Event) -> Event:
        """With our signature, if the user whom it names is ours and the join may be vouched for."""
        authoriser = event.content["join_authorised_via_users_server"]
        if not is_user_id(authoriser) or server_of(authoriser) != self._server_name:
            raise InvalidParam(
                "join_authorised_via_users_server names nobody on this server. Ask for a template first."
            )
        if await self._needs_voucher(room, event.sender):
            await self._require_condition(room, event.sender)
        return events.co_sign(event, self._server_name, self._key)

    async def _record(self, room: Room, event: Event, origin: str) -> Stored:
        return await self._under_way.get(event.id, lambda: self._admitted(room, event, origin))

    async def _admitted(self, room: Room, event: Event, origin: str) -> Stored:
        one = await self._rooms.event(event.id)
        if one is None or (one.state_nid is None and not one.rejected):
            if not all(await self._remote.verified([event])):
                raise InvalidParam("The event's signatures could not be verified with keys that your server publishes.")
            verdict = await self._receiver.admit(event, origin=origin, marks=FAN_OUT)
            if verdict.outcome != "accepted":
                raise Forbidden(f"The room does not allow this: {verdict.reason}.")
            one = await self._rooms.event(event.id)
        elif one.rejected or one.marks & SOFT_FAILED:
            raise Forbidden("The room did not allow this before. Begin anew with a template.")
        if one is None or one.room_nid != room.nid:
            raise NotFound("This event is not known here.")
        return one


async def _faces(room: Room) -> frozenset[str]:
    """Whose member events are given although the others are left out: those whose names stand for a room without one.
    Spec: the parameter `omit_members` of send_join."""
    if await room.text("m.room.name", "name") or await room.text("m.room.canonical_alias", "alias"):
        return frozenset()
    present = heapq.nsmallest(HEROES, (user for user, held in room.members.items() if held in ("join", "invite")))
    # The one who joins is no hero of her own room, so one more is named; where nobody is there, those who were.
    return frozenset(present or heapq.nsmallest(HEROES, room.members))


def _joined(room: Room) -> Iterable[str]:
    return (user_id for user_id, membership in room.members.items() if membership == "join")


def _require_version(room: Room, spoken: list[str]) -> None:
    """Whoever names no version speaks the first one. Spec: the parameter `ver` of make_join."""
    if room.version.name not in spoken:
        raise ApiError(
            f"This room has version {room.version.name}, which your server does not say it knows.",
            errcode="M_INCOMPATIBLE_ROOM_VERSION",
            room_version=room.version.name,
        )
