"""Notices of the operator to one person: a room of their own between the server and her, whose invite she can't turn down.

Only where the seal is open, since a notice is readable. They are sent by the address that Synapse has for it, as tools
expect; its sender is an account that nobody can sign in to. Spec: client-server-api/#server-notices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from relay.accounts.users import UserInUse, Users
from relay.db import Database
from relay.errors import ApiError, Forbidden, NotFound, Refused
from relay.ids import random_string, require_user_id
from relay.part import Part
from relay.people.account_data import AccountData
from relay.people.tags import TAGS
from relay.protocol.seal import Seal
from relay.rooms.create import Creator
from relay.rooms.members import Members
from relay.rooms.rooms import Rooms
from relay.rooms.send import Sender
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, get_object, get_optional_string, get_string

PATH = "/_synapse/admin/v1/send_server_notice"
LOCALPART = "_server"
TAG = "m.server_notice"
TRANSACTION_LENGTH = 24
ROOM = {
    "preset": "private_chat",
    "name": "Server notices",
    "creation_content": {"m.federate": False},
    # Whoever gets a notice does not answer it there.
    "power_level_content_override": {"users_default": -10},
}


class ServerNotices(Part):
    schema = Schema(
        "server_notices",
        tables=(
            Table(
                "server_notice_rooms",
                "in which room the server speaks to a person",
                {
                    "user_id": ("to whom", "the room's life on this server"),
                    "room_id": ("where", "the room's life on this server"),
                },
            ),
        ),
        steps=("CREATE TABLE server_notice_rooms (user_id TEXT PRIMARY KEY, room_id TEXT NOT NULL)",),
    )

    def __init__(
        self,
        db: Database,
        users: Users,
        rooms: Rooms,
        creator: Creator,
        members: Members,
        sender: Sender,
        account_data: AccountData,
        seal: Seal,
    ) -> None:
        self._db = db
        self._users = users
        self._rooms = rooms
        self._creator = creator
        self._members = members
        self._sender = sender
        self._account_data = account_data
        self._seal = seal
        self._speaker = f"@{LOCALPART}:{users.server_name}"
        # Two notices at once must not make two rooms.
        self._one_at_a_time = asyncio.Lock()

    def routes(self) -> Iterable[Route]:
        yield Route("POST", PATH, self._send_route, limit="messages")
        yield Route("PUT", f"{PATH}/{{txnId}}", self._send_route, limit="messages")

    async def _send_route(self, request: Request) -> Answer:
        who = request.who
        if not who.admin:
            raise Forbidden("Only administrators of this server send notices.")
        if not self._seal.open:
            raise Refused(
                "A notice is readable, and this relay stores nothing readable. Write to the person yourself, or see privacy.seal."
            )
        body = request.json()
        user_id, content = require_user_id(get_string(body, "user_id")), get_object(body, "content")
        if not self._users.is_local(user_id) or not await self._users.exists(user_id) or user_id == self._speaker:
            raise NotFound(f"There is no account {user_id} on this server.")
        txn_id = request.params.get("txnId") or random_string(TRANSACTION_LENGTH)
        sent_by, endpoint = (who.user_id, who.device_id, txn_id), f"notice {user_id}"
        async with self._one_at_a_time:
            before = await self._sender.sent_before(sent_by, endpoint)
            if before is not None:
                return {"event_id": before.id}
            room_id = await self._room_of(user_id)
            one = await self._sender.send(
                room_id,
                sender=self._speaker,
                type=get_optional_string(body, "type") or "m.room.message",
                content=content,
                state_key=get_optional_string(body, "state_key"),
                sent_by=sent_by,
                endpoint=endpoint,
            )
            return {"event_id": one.id}

    async def _room_of(self, user_id: str) -> str:
        """The room in which this person hears of the server, with her in it or invited."""
        room_id = await self._known_room(user_id)
        if room_id is None or self._rooms.membership(room_id, self._speaker) != "join":
            await self._make_speaker()
            room_id = await self._creator.create(self._speaker, dict(ROOM), self._members)
            with self._db.write() as tx:
                tx.run(
                    "INSERT INTO server_notice_rooms (user_id, room_id) VALUES ($1, $2) "
                    "ON CONFLICT (user_id) DO UPDATE SET room_id = excluded.room_id",
                    user_id,
                    room_id,
                )
                self._account_data.set(tx, user_id, TAGS, {"tags": {TAG: {}}}, room_id)
            await tx
        if self._rooms.membership(room_id, user_id) not in ("join", "invite"):
            await self._members.invite(self._speaker, room_id, user_id)
        return room_id

    async def _known_room(self, user_id: str) -> str | None:
        room_id: str | None = await self._db.read(
            lambda query: query.value("SELECT room_id FROM server_notice_rooms WHERE user_id = $1", user_id)
        )
        return room_id

    async def _make_speaker(self) -> None:
        with self._db.write() as tx:
            self._users.add(tx, self._speaker, None)
        try:
            await tx
        except UserInUse:
            return

    async def keeps(self, user_id: str, room_id: str) -> None:
        """For `members.before_turning_down`: an invite to one's notices stays. Raises ApiError."""
        if room_id == await self._known_room(user_id):
            raise ApiError(
                "This is the room in which the server tells you what you have to know. Join it first; then you may leave.",
                status=403,
                errcode="M_CANNOT_LEAVE_SERVER_NOTICE_ROOM",
            )
