"""What local people do in rooms, as endpoints: create, come and go, send, set state, take back.

A request that is sent twice under one transaction ID acts once: while the first runs the second waits for it, later the
event ID is in memory, and after a restart its row is met in the write itself. Free text (reasons) is left out by the seal, unless it is open.
Spec: client-server-api/#sending-events-to-a-room, #room-membership, #redactions, #transaction-identifiers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from relay.errors import ApiError, BadJson, Forbidden, InvalidParam, MissingParam, NotAllowed, NotFound
from relay.ids import is_server_name, require_user_id
from relay.limits import Limits
from relay.part import Part
from relay.rooms.create import Creator
from relay.rooms.directory import CANONICAL_ALIAS, Directory
from relay.rooms.members import SERVERS_OWN, Members
from relay.rooms.rooms import Rooms
from relay.rooms.send import Sender
from relay.rooms.store import Stored
from relay.web import Answer, Caller, Request, Route, get_optional_string, get_string

MAX_VIA = 20
MAX_TRANSACTION_ID = 255
MAX_SENT_REMEMBERED = 4096

CREATE = "m.room.create"
MEMBER = "m.room.member"
POWER_LEVELS = "m.room.power_levels"
REDACTION = "m.room.redaction"

# (user, device, transaction ID, endpoint)
_Key = tuple[str, str, str, str]


class Once:
    """What was sent under a transaction ID, or is being sent. The rows of `sent_transactions` outlive it."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        # Written once and never changed; the oldest go where there are too many.
        self._known: dict[_Key, str | asyncio.Future[None]] = {}

    async def send(
        self, who: Caller, txn_id: str, endpoint: str, make: Callable[..., Awaitable[Stored]], **what: Any
    ) -> str:
        """The event ID. `make` is asked only where nothing was sent under this transaction ID before."""
        if len(txn_id) > MAX_TRANSACTION_ID:
            raise InvalidParam(f"A transaction ID has at most {MAX_TRANSACTION_ID} characters.")
        sent_by = (who.user_id, who.device_id, txn_id)
        key = (*sent_by, endpoint)
        while (known := self._known.get(key)) is not None:
            if isinstance(known, str):
                return known
            # If the first one fails, this one tries for itself.
            await asyncio.wait([known])
        running = self._known[key] = asyncio.get_running_loop().create_future()
        try:
            one = await make(sent_by=sent_by, endpoint=endpoint, **what)
        except (ApiError, NotAllowed):
            # Sent before a restart, and refused only now: she left since, or the seal was tightened.
            before = await self._sender.sent_before(sent_by, endpoint)
            if before is None:
                raise
            one = before
        finally:
            del self._known[key]
            running.set_result(None)
        self._remember(key, one.id)
        return one.id

    def _remember(self, key: _Key, event_id: str) -> None:
        self._known[key] = event_id
        if len(self._known) > MAX_SENT_REMEMBERED:
            oldest = next(iter(self._known))
            if isinstance(self._known[oldest], str):
                del self._known[oldest]


class WriteRoutes(Part):
    def __init__(
        self, rooms: Rooms, sender: Sender, creator: Creator, members: Members, directory: Directory, limits: Limits
    ) -> None:
        self._rooms = rooms
        self._sender = sender
        self._creator = creator
        self._members = members
        self._directory = directory
        self._limits = limits
        self._once = Once(sender)
        # Takes what a client wants sent later; the server sets it to `DelayedEvents.asked`.
        self.delayed: Callable[[Request, str | None], Awaitable[Answer | None]] | None = None

    def routes(self) -> Iterable[Route]:
        v3 = "/_matrix/client/v3"
        room = v3 + "/rooms/{roomId}"
        return (
            Route("POST", v3 + "/createRoom", self._create, limit="joins"),
            Route("POST", v3 + "/join/{roomIdOrAlias}", self._join, limit="joins"),
            Route("POST", room + "/join", self._join, limit="joins"),
            Route("POST", v3 + "/knock/{roomIdOrAlias}", self._knock, limit="joins"),
            Route("POST", room + "/leave", self._leave, limit="messages"),
            Route("POST", room + "/forget", self._forget, limit="messages"),
            Route("POST", room + "/invite", self._invite, limit="invites"),
            Route("POST", room + "/kick", self._kick, limit="messages"),
            Route("POST", room + "/ban", self._ban, limit="messages"),
            Route("POST", room + "/unban", self._unban, limit="messages"),
            Route("PUT", room + "/send/{eventType}/{txnId}", self._send, limit="messages"),
            Route("PUT", room + "/redact/{eventId}/{txnId}", self._redact, limit="messages"),
            Route("PUT", room + "/state/{eventType}", self._put_state, limit="messages"),
            Route("PUT", room + "/state/{eventType}/{stateKey}", self._put_state, limit="messages"),
        )

    # --- sending

    async def _send(self, request: Request) -> Answer:
        if self.delayed is not None and (later := await self.delayed(request, None)) is not None:
            return later
        params, who, content = request.params, request.who, request.json()
        room_id, event_type = params["roomId"], params["eventType"]
        what: dict[str, Any] = {"room_id": room_id, "sender": who.user_id, "type": event_type, "content": content}
        if event_type == REDACTION:
            # Spec: client-server-api/#put_matrixclientv3roomsroomidsendeventtypetxnid, since v1.18
            what["redacts"] = get_string(content, "redacts")
            what["content"] = {key: value for key, value in content.items() if key != "redacts"}
        what["ts"] = _ts(request)
        endpoint = f"send {room_id} {event_type}"
        return _event_id(await self._once.send(who, params["txnId"], endpoint, self._sender.send, **what))

    async def _redact(self, request: Request) -> Answer:
        params, who = request.params, request.who
        what: dict[str, Any] = {
            "room_id": params["roomId"],
            "sender": who.user_id,
            "type": REDACTION,
            "content": request.optional_json(),
            "redacts": params["eventId"],
        }
        endpoint = f"redact {params['roomId']} {params['eventId']}"
        return _event_id(await self._once.send(who, params["txnId"], endpoint, self._sender.send, **what))

    async def _put_state(self, request: Request) -> Answer:
        room_id, event_type = request.params["roomId"], request.params["eventType"]
        state_key, content = request.params.get("stateKey", ""), request.json()
        if self.delayed is not None and (later := await self.delayed(request, state_key)) is not None:
            return later
        if event_type == CREATE:
            raise BadJson(
                "A room begins with its m.room.create event and can't have another. Make a new room, or upgrade this one."
            )
        if event_type == MEMBER:
            return _event_id(await self._put_member(request.who, room_id, state_key, content, _ts(request)))
        if event_type == POWER_LEVELS and state_key == "":
            await self._require_no_creators(room_id, request.user_id, content)
        if event_type == CANONICAL_ALIAS and state_key == "":
            room = await self._rooms.require_joined(room_id, request.user_id)
            await self._directory.check_canonical(room, content)
        one = await self._sender.send(
            room_id, sender=request.user_id, type=event_type, content=content, state_key=state_key, ts=_ts(request)
        )
        return _event_id(one.id)

    async def _require_no_creators(self, room_id: str, user_id: str, content: dict[str, Any]) -> None:
        """Spec: rooms/v12/#authorization-rules: a creator's power has no level. That is a mistake of the request, not a
        question of power."""
        room = await self._rooms.require_joined(room_id, user_id)
        named, create = content.get("users"), await room.event(CREATE, "")
        if room.version.creators_privileged and create is not None and isinstance(named, dict):
            creators = {create.sender, *(create.content.get("additional_creators") or ())}
            if not creators.isdisjoint(named):
                raise InvalidParam("In this room version creators have no entry in the power levels: leave them out.")

    async def _put_member(self, who: Caller, room_id: str, target: str, content: dict[str, Any], ts: int | None) -> str:
        """A membership set as state: the same duties as by its own endpoint."""
        require_user_id(target)
        user_id = who.user_id
        membership = content.get("membership")
        now = await self._membership_of(room_id, target)
        if membership == "join":
            if target != user_id:
                raise Forbidden("You can't join a room for somebody else. Invite them.")
            if now == "join":  # Her name or avatar in this room.
                content = {key: value for key, value in content.items() if key not in SERVERS_OWN}
                content["membership"] = "join"
                one = await self._sender.send(
                    room_id, sender=user_id, type=MEMBER, content=content, state_key=target, ts=ts
                )
                return one.id
            self._spend("joins", who)
            await self._members.join(user_id, room_id, content=content, ts=ts)
        elif membership == "invite":
            self._spend("invites", who)
            await self._members.invite(user_id, room_id, target, content, ts=ts)
        elif membership == "leave":
            if target == user_id:
                await self._members.leave(user_id, room_id, content, ts=ts)
            elif now == "ban":
                await self._members.unban(user_id, room_id, target, content, ts=ts)
            else:
                await self._members.kick(user_id, room_id, target, content, ts=ts)
        elif membership == "ban":
            await self._members.ban(user_id, room_id, target, content, ts=ts)
        elif membership == "knock" and target == user_id:
            self._spend("joins", who)
            await self._members.knock(user_id, room_id, content=content)
        else:
            raise BadJson("The membership is one of join, invite, leave, ban and, for yourself, knock.")
        return await self._member_event(room_id, target)

    def _spend(self, rate_class: str, who: Caller) -> None:
        if who.limited:
            self._limits.spend(rate_class, who.user_id)

    async def _membership_of(self, room_id: str, user_id: str) -> str | None:
        room = await self._rooms.get(room_id)
        return room.members.get(user_id) if room is not None else None

    async def _member_event(self, room_id: str, target: str) -> str:
        room = await self._rooms.get(room_id)
        event_id = room.state.get((MEMBER, target)) if room is not None else None
        mine = self._rooms.memberships(target).get(room_id)
        if event_id is None and mine is not None:
            event_id = mine.event_id
        if event_id is None:
            raise NotFound("The room does not know this person.")
        return event_id

    # --- coming and going

    async def _create(self, request: Request) -> Answer:
        body = request.optional_json()
        local = body.get("room_alias_name")
        if isinstance(local, str) and self._directory.owned_by_service is not None:
            self._directory.owned_by_service(request.who, f"#{local}:{self._rooms.server_name}")
        return {"room_id": await self._creator.create(request.user_id, body, self._members)}

    async def _join(self, request: Request) -> Answer:
        room_id, via = await self._where(request)
        await self._members.join(request.user_id, room_id, via=via, content=request.optional_json())
        return {"room_id": room_id}

    async def _knock(self, request: Request) -> Answer:
        room_id, via = await self._where(request)
        await self._members.knock(request.user_id, room_id, via=via, content=_reason(request.optional_json()))
        return {"room_id": room_id}

    async def _where(self, request: Request) -> tuple[str, list[str]]:
        """The room that is meant, and servers to ask: those the client names, then those the alias names."""
        params = request.params
        asked = params["roomIdOrAlias"] if "roomIdOrAlias" in params else params["roomId"]
        # `server_name` is what `via` was called before v1.12.
        named = [s for s in (*request.query_list("via"), *request.query_list("server_name")) if is_server_name(s)]
        room_id, servers = await self._directory.room_of(asked)
        return room_id, list(dict.fromkeys([*named[:MAX_VIA], *servers]))[:MAX_VIA]

    async def _leave(self, request: Request) -> Answer:
        await self._members.leave(request.user_id, request.params["roomId"], _reason(request.optional_json()))
        return {}

    async def _forget(self, request: Request) -> Answer:
        await self._members.forget(request.user_id, request.params["roomId"])
        return {}

    async def _invite(self, request: Request) -> Answer:
        body = request.json()
        if "medium" in body or "address" in body:
            raise ApiError(
                "This server asks no identity server, so it can't invite by e-mail or phone number. Use a user ID.",
                status=403,
                errcode="M_THREEPID_DENIED",
            )
        await self._members.invite(request.user_id, request.params["roomId"], _target(body), _reason(body))
        return {}

    async def _kick(self, request: Request) -> Answer:
        body = request.json()
        await self._members.kick(request.user_id, request.params["roomId"], _target(body), _reason(body))
        return {}

    async def _ban(self, request: Request) -> Answer:
        body = request.json()
        await self._members.ban(request.user_id, request.params["roomId"], _target(body), _reason(body))
        return {}

    async def _unban(self, request: Request) -> Answer:
        body = request.json()
        await self._members.unban(request.user_id, request.params["roomId"], _target(body), _reason(body))
        return {}


def _target(body: dict[str, Any]) -> str:
    if "user_id" not in body:
        raise MissingParam("The key user_id is missing: whom is it about?")
    return require_user_id(body["user_id"])


def _ts(request: Request) -> int | None:
    """The time that an application service gives an event. Spec: application-service-api/#timestamp-massaging"""
    if not request.who.service or "ts" not in request.query:
        return None
    return request.query_int("ts", 0)


def _reason(body: dict[str, Any]) -> dict[str, Any]:
    reason = get_optional_string(body, "reason")
    return {} if reason is None else {"reason": reason}


def _event_id(event_id: str) -> bytes:
    # Event IDs are base64 behind a '$': nothing in them needs an escape.
    return b'{"event_id":"' + event_id.encode() + b'"}'
