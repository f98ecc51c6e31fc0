"""What a moderator's measure does inside rooms: taking messages back, taking people out, closing a room for us.

The relay can only send what some account of its own may send. A local person's message is taken back, and a local
person leaves, in her own name; for people elsewhere the acting moderator has to be in the room with the power for it.
Nothing is ever sent in the name of a third person, except to make a moderator a room's administrator (`make_admin`).
"""

from __future__ import annotations

from collections.abc import Callable

from relay.db import Database, Query, Tx
from relay.errors import ApiError, Forbidden, NotAllowed, NotFound, RemoteError
from relay.ids import server_of
from relay.protocol.power import Levels
from relay.rooms.members import Members
from relay.rooms.room import POWER_LEVELS, Room
from relay.rooms.rooms import Rooms
from relay.rooms.send import Sender
from relay.rooms.withholding import Withholding

MEMBER, REDACTION = "m.room.member", "m.room.redaction"
# Of one person, taken back in one go.
MAX_TAKEN_BACK = 20_000
ADMIN_LEVEL = 100

Beside = Callable[[Tx], None]


class RoomActs:
    def __init__(self, db: Database, rooms: Rooms, sender: Sender, members: Members) -> None:
        self._db = db
        self._rooms = rooms
        self._sender = sender
        self._members = members
        withholding = Withholding(rooms)
        self.hide, self.show = withholding.hide, withholding.show

    def is_local(self, user_id: str) -> bool:
        return server_of(user_id) == self._rooms.server_name

    async def known(self, room_id: str) -> Room:
        room = await self._rooms.get(room_id)
        if room is None:
            raise NotFound("Nobody on this server has ever been in this room.")
        return room

    async def is_able(self, user_id: str, room: Room, level: Callable[[Levels], int | float]) -> bool:
        if room.members.get(user_id) != "join" or not self.is_local(user_id):
            return False
        levels = await room.levels()
        return levels.user(user_id) >= level(levels)

    # --- messages

    async def author(self, event_id: str) -> str | None:
        stored = await self._rooms.event(event_id)
        return stored.event.sender if stored is not None else None

    async def redact(self, actor: str, room_id: str, event_id: str, beside: Beside | None = None) -> None:
        """Takes back one event. Raises Forbidden where nobody of ours may."""
        one = await self._rooms.event(event_id)
        if one is None or one.event.room_id != room_id:
            raise NotFound("There is no such event in this room.")
        room = await self.known(room_id)
        author = one.event.sender
        if self.is_local(author) and room.members.get(author) == "join":
            as_user = author
        elif await self.is_able(actor, room, lambda levels: levels.redact):
            as_user = actor
        else:
            raise Forbidden(
                "Nobody here may take back this message: its sender has left or lives elsewhere, and you have no power in "
                "the room. Hide it from the people here (hide), become the room's administrator (make_room_admin), or ask the sender's server."
            )
        await self._sender.send(
            room_id, sender=as_user, type=REDACTION, content={}, redacts=event_id,
            beside=None if beside is None else lambda tx, _: beside(tx),
        )  # fmt: skip

    async def events_of(self, user_id: str, room_id: str | None, limit: int = MAX_TAKEN_BACK) -> list[tuple[str, str]]:
        """(room, event) of the messages of a person that still stand, newest first."""

        def find(query: Query) -> list[tuple[str, str]]:
            rows = query.all(
                "SELECT r.room_id, e.event_id FROM events e JOIN rooms r ON r.nid = e.room_nid WHERE e.sender = $1 "
                "AND e.state_key IS NULL AND e.redacted_by IS NULL AND e.pos IS NOT NULL AND e.type <> 'm.room.redaction' "
                "AND ($2 = '' OR r.room_id = $2) ORDER BY e.pos DESC LIMIT $3",
                user_id,
                room_id or "",
                limit,
            )
            return [(room, event) for room, event in rows]

        return await self._db.read(find)

    # --- people

    async def take_out(
        self, actor: str, room_id: str, user_id: str, membership: str, beside: Callable[[Tx, bool], None]
    ) -> None:
        """`membership` is leave or ban. `beside` is told whether the room itself says so (True), or a local person only
        leaves (False)."""
        room = await self.known(room_id)
        able = await self.is_able(
            actor,
            room,
            lambda levels: max(levels.ban if membership == "ban" else levels.kick, levels.user(user_id) + 1),
        )
        if able:
            if membership == "leave" and room.members.get(user_id) not in ("join", "invite", "knock"):
                raise Forbidden(f"{user_id} is not in this room.")
            await self._sender.send(
                room_id, sender=actor, type=MEMBER, content={"membership": membership}, state_key=user_id,
                beside=lambda tx, _: beside(tx, True),
            )  # fmt: skip
            return
        if not self.is_local(user_id):
            raise Forbidden(
                "You have no power over this person in the room. Become its administrator first (make_room_admin), or block "
                "the person's server."
            )
        with self._db.write() as tx:
            beside(tx, False)
        await tx
        if self._rooms.membership(room_id, user_id) in ("join", "invite", "knock"):
            await self._members.leave(user_id, room_id)

    async def let_in_again(self, actor: str, room_id: str, user_id: str) -> None:
        """Takes a ban back, where the room has one and the moderator may."""
        room = await self.known(room_id)
        if room.members.get(user_id) == "ban":
            await self._members.unban(actor, room_id, user_id)

    async def empty(self, room_id: str) -> tuple[list[str], list[str]]:
        """All people of ours leave. (those who did, those who could not)"""
        gone: list[str] = []
        stuck: list[str] = []
        room = await self._rooms.get(room_id)
        for user_id in sorted(room.members) if room is not None else []:
            if not self.is_local(user_id) or self._rooms.membership(room_id, user_id) not in (
                "join",
                "invite",
                "knock",
            ):
                continue
            try:
                await self._members.leave(user_id, room_id)
                gone.append(user_id)
            except (ApiError, NotAllowed, RemoteError):
                stuck.append(user_id)
        return gone, stuck

    # --- power

    async def make_admin(self, room_id: str, user_id: str, beside: Beside | None = None) -> None:
        """Somebody of ours who has the power gives it to `user_id`, who is invited where she is not in the room."""
        room = await self.known(room_id)
        if not self.is_local(user_id):
            raise Forbidden("Only somebody of this server can be made administrator from here.")
        levels = await room.levels()
        needed = levels.to_send(POWER_LEVELS[0], True)
        able = [u for u in room.local_joined if levels.user(u) >= max(needed, ADMIN_LEVEL)]
        if not able:
            raise ApiError("Nobody on this server has the power in this room to give.", status=400)
        giver = max(sorted(able), key=levels.user)
        if levels.user(user_id) < ADMIN_LEVEL:
            content = dict(await room.content(*POWER_LEVELS))
            users = content.get("users")
            content["users"] = {**(users if isinstance(users, dict) else {}), user_id: ADMIN_LEVEL}
            await self._sender.send(
                room_id, sender=giver, type=POWER_LEVELS[0], content=content, state_key="",
                beside=None if beside is None else lambda tx, _: beside(tx),
            )  # fmt: skip
        if room.members.get(user_id) not in ("join", "invite"):
            await self._members.invite(giver, room_id, user_id)
