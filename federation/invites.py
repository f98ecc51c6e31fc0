"""Invitations from other servers to people of ours: checked, asked at the door, signed, and kept.

The room itself is not known here, as a rule: what the person is told of it are the few state events that come along, as far
as the seal lets them lie on disk. The inviting server records the invite in the room, with our signature on it. Version 1 of
the endpoint is for room versions 1 and 2 alone, which are not spoken here. Spec: server-server-api/#inviting-to-a-room.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import orjson

from relay.db import Database
from relay.doors import Doors
from relay.errors import ApiError, BadEvent, BadJson, Forbidden, InvalidParam, NotFound
from relay.ids import is_user_id, server_of
from relay.part import Part
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.protocol.seal import Seal
from relay.protocol.signing import SigningKey
from relay.protocol.versions import VERSIONS, RoomVersion
from relay.remote import Remote
from relay.rooms.append import Appender
from relay.rooms.intake import Intake
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.web import Request, Route, get_list, get_object, get_string

# A person's unanswered invites, so that strangers can't fill the disk with them.
MAX_UNANSWERED = 1_000

UserExists = Callable[[str], Awaitable[bool]]


class Invites(Part):
    def __init__(
        self,
        db: Database,
        rooms: Rooms,
        appender: Appender,
        intake: Intake,
        remote: Remote,
        seal: Seal,
        doors: Doors,
        key: SigningKey,
        *,
        local_user_exists: UserExists,
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._appender = appender
        self._intake = intake
        self._remote = remote
        self._seal = seal
        self._doors = doors
        self._key = key
        self._local_user_exists = local_user_exists
        self._server_name = rooms.server_name

    def routes(self) -> Iterable[Route]:
        yield Route(
            "PUT",
            "/_matrix/federation/v2/invite/{roomId}/{eventId}",
            self._invite,
            auth="server",
            limit="federation",
            serves="federation",
        )

    async def _invite(self, request: Request) -> bytes:
        body = request.json()
        name = get_string(body, "room_version")
        version = VERSIONS.get(name)
        if version is None:
            raise ApiError(
                f"This server does not know room version {name[:32]!r}. It knows {', '.join(VERSIONS)}.",
                errcode="M_INCOMPATIBLE_ROOM_VERSION",
                room_version=name[:32],
            )
        event = self._given(request, get_object(body, "event"), version)
        target = event.state_key or ""
        room = await self._rooms.get(event.room_id)
        if room is not None:
            if room.version is not version:
                raise InvalidParam(f"This room has version {room.version.name}, not {name}.")
            if not room.acl.allows(request.origin):
                raise Forbidden("The room's access list (m.room.server_acl) does not admit your server.")
        if self._rooms.membership(event.room_id, target) == "join":
            raise Forbidden(f"{target} is in this room already.")
        invited = sum(1 for one in self._rooms.memberships(target).values() if one.membership == "invite")
        if invited >= MAX_UNANSWERED:
            raise Forbidden(f"{target} has {invited} unanswered invites already.")
        if not await self._local_user_exists(target):
            raise NotFound(f"There is no account {target} on this server.")
        if not all(await self._remote.verified([event])):
            raise InvalidParam("The event's signature could not be verified with a key that your server publishes.")
        told = await self._intake.told(get_list(body, "invite_room_state", []), version, event.room_id)
        await self._doors.invite(event.sender, target, event.room_id)
        signed = events.co_sign(event, self._server_name, self._key)
        if room is None or not room.known or not room.local_joined:
            await self._keep(signed, told)
        # Where people of ours are in the room, the invite comes once more, in a transaction, and takes its place then.
        return orjson.dumps({"event": orjson.Fragment(signed.raw)})

    def _given(self, request: Request, pdu: dict[str, Any], version: RoomVersion) -> Event:
        """The invite, if it is one that the standard lets a server send here: we sign nothing else."""
        try:
            event = events.parse(pdu, version)
        except BadEvent as bad:
            raise BadJson(f"This is not an event of room version {version.name}: {bad.text}.") from bad
        target = event.state_key
        for holds, sentence in (
            (event.room_id == request.params["roomId"], "The event is of another room than the request."),
            (event.id == request.params["eventId"], f"The event's ID is {event.id}, the request names another."),
            (event.type == "m.room.member", "The event is not an m.room.member event."),
            (event.membership == "invite", "The event's membership is not 'invite'."),
            (event.server == request.origin, "The event's sender is not a user of your server."),
            (
                is_user_id(target) and server_of(str(target)) == self._server_name,
                "The invited user is not of this server.",
            ),
            (events.hash_matches(event), "The event's content is not the one that its hash was made of."),
            # Such an invite bears nobody's signature but the identity server's, and needs the room's state to be judged.
            ("third_party_invite" not in event.content, "This server takes no part in invites by third-party ID."),
        ):
            if not holds:
                raise InvalidParam(sentence)
        return event

    # --- keeping it

    async def _keep(self, invite: Event, told: list[dict[str, Any]]) -> None:
        kept = self._intake.kept_form(invite).event
        room = await self._rooms.get(invite.room_id)
        with self._db.write(chain=invite.room_id) as tx:
            if room is None:
                room = Room(self._db, self._server_name, tx.pos(), invite.room_id, invite.version)
                self._appender.new_room(tx, room)
            self._appender.invited_from_afar(tx, room, kept, told)
        await tx

    # --- when it is over before it was answered

    async def ended(self, room_id: str, pdus: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
        """Events of a room that nobody of ours is in: what concerns us is that an invite was taken back, or a knock turned
        down. Event ID -> None, or why it was refused; where the room was never heard of, its events' IDs are unknown."""
        room = await self._rooms.get(room_id)
        if room is None or room.local_joined:
            return {}
        results: dict[str, str | None] = {}
        for event in self._intake.parsed(pdus, room.version, room_id):
            ended = await self._ends(room, event)
            results[event.id] = None if ended else "Nobody on this server is in this room."
        return results

    async def _ends(self, room: Room, event: Event) -> bool:
        target = event.state_key or ""
        mine = self._rooms.memberships(target).get(room.room_id)
        if event.membership not in ("leave", "ban") or mine is None or mine.membership not in ("invite", "knock"):
            return False
        # The room's rules can't be asked without its state. An invite is taken back by the one who sent it: of nobody else
        # we know that he may; and whoever turns down a knock cites it.
        before = await self._rooms.event(mine.event_id)
        if before is None or (mine.membership == "invite" and event.sender != before.event.sender):
            return False
        if before.id not in event.auth_events or not all(await self._remote.verified([event])):
            return False
        kept = self._intake.kept_form(event).event
        with self._db.write(chain=room.room_id) as tx:
            self._appender.left_afar(tx, room, target, kept)
        await tx
        return True
