"""Moderators choose which ban lists of others the relay follows, and how, while it runs; each choice is in the audit log.

The relay comes into a list's room by its own user, so that no moderator has to show herself there, unless somebody of ours
is in it already. Where the room of a list is replaced, the new one is followed beside it. What a list then does stands in
`policy_lists.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import structlog

from relay.db import Database
from relay.errors import ApiError, InvalidParam, NotAllowed, NotFound, RemoteError
from relay.ids import is_server_name, server_of
from relay.moderation.acts import OPERATOR
from relay.moderation.audit_log import AuditLog
from relay.moderation.own_rooms import OwnRooms
from relay.moderation.policy_lists import EFFECTS, IGNORE, MAX_LISTS, PolicyLists
from relay.rooms.members import Members
from relay.rooms.room import CREATE
from relay.rooms.rooms import Rooms

log = structlog.get_logger("lists")

MAX_VIA = 10
REPLACED = "rule:list-replaced"
# Into how many rooms a list may lead the relay by naming them in its place, until the next start: each costs a join.
MAX_SUCCESSORS = 5
# So many lists, and none is followed into another room: moderators can always add one by hand.
MAX_FOLLOWED = MAX_LISTS // 2

# The room that an ID or an alias means, and servers that may help to get in.
Finds = Callable[[str], Awaitable[tuple[str, list[str]]]]


class ListFollowing:
    def __init__(
        self,
        db: Database,
        lists: PolicyLists,
        rooms: Rooms,
        members: Members,
        own_rooms: OwnRooms,
        audit_log: AuditLog,
        finds: Finds,
    ) -> None:
        self._db = db
        self._lists = lists
        self._rooms = rooms
        self._members = members
        self._own_rooms = own_rooms
        self._audit_log = audit_log
        self._finds = finds
        # What is looked at before it is followed; the list that one goes back to; how often that led elsewhere.
        self._tried: set[str] = set()
        self._begun_as: dict[str, str] = {}
        self._tries: Counter[str] = Counter()
        members.also_admitted = lambda room_id: lists.is_followed(room_id) or room_id in self._tried
        lists.on_replaced.append(self._replaced)

    def commands(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {
            "lists.show": self._show,
            "lists.follow": self._follow_command,
            "lists.unfollow": self._unfollow_command,
        }

    async def follow(self, actor: str, list_room: str, effect: str, via: Sequence[str] = ()) -> dict[str, Any]:
        """`list_room` is a room ID or an alias. The list as it stands then. Raises ApiError where its room can't be come into:
        the choice stands, and the list counts once somebody of ours is in it."""
        if effect not in EFFECTS:
            raise InvalidParam(f"The effect is one of: {', '.join(EFFECTS)}.")
        if len(via) > MAX_VIA or not all(is_server_name(server) for server in via):
            raise InvalidParam(f"The key via is a list of at most {MAX_VIA} server names.")
        room_id, servers = await self._found(list_room)
        with self._db.write() as tx:
            self._lists.choose(tx, room_id, effect)
            self._audit_log.record(tx, actor=actor, action=f"list.{effect}", target=room_id, reason_code="by_hand")
        await tx
        if effect != IGNORE:
            await self._come_in(room_id, [*via, *servers])
        await self._lists.look_again(room_id)
        return self._listed(room_id)

    async def unfollow(self, actor: str, list_room: str) -> dict[str, Any]:
        """The list as it stands then: the config's word counts again, if it has one. Raises NotFound."""
        room_id, _ = await self._found(list_room)
        if self._lists.effect_of(room_id) is None:
            raise NotFound("This list is not followed.")
        with self._db.write() as tx:
            self._lists.choose(tx, room_id, None)
            self._audit_log.record(tx, actor=actor, action="list.unfollow", target=room_id, reason_code="by_hand")
        await tx
        await self._lists.look_again(room_id)
        if not self._lists.is_followed(room_id):
            await self._leave(room_id)
        return self._listed(room_id)

    async def _replaced(self, old: str, new: str, sender: str) -> None:
        """The room of a list goes on elsewhere: the new one is followed in the same way. The old one still counts, since rules
        do not always move along, until moderators follow it no longer. Whatever they chose for the new one stands."""
        effect = self._lists.effect_of(old)
        if effect is None or effect == IGNORE or self._lists.effect_of(new) is not None:
            return
        first = self._begun_as.get(old, old)
        if self._tries[first] >= MAX_SUCCESSORS or self._lists.chosen >= MAX_FOLLOWED:
            log.warning("a followed list names too many rooms that replace it, and is not followed into this one")
            return
        self._tries[first] += 1
        mine = await self._own_rooms.speaker()
        was_in = self._rooms.membership(new, mine) == "join"
        self._tried.add(new)
        try:
            await self._come_in(new, [server_of(sender)])
            room = await self._rooms.get(new)
            predecessor = (await room.content(*CREATE)).get("predecessor") if room is not None else None
            if isinstance(predecessor, dict) and predecessor.get("room_id") == old:
                with self._db.write() as tx:
                    self._lists.choose(tx, new, effect)
                    self._audit_log.record(
                        tx,
                        actor=REPLACED,
                        action=f"list.{effect}",
                        target=new,
                        reason_code="replaced",
                        automated=True,
                        detail={"replaces": old},
                    )
                await tx
                self._begun_as[new] = first
        except ApiError as error:
            log.warning("the room that replaces a followed list could not be come into", exc_info=error)
            return
        finally:
            self._tried.discard(new)
        if not self._lists.is_followed(new):
            log.warning("the room that a followed list names in its place does not know of it, and is not followed")
            if not was_in:
                await self._leave(new)
        await self._lists.look_again(new)

    async def _found(self, list_room: str) -> tuple[str, list[str]]:
        try:
            return await self._finds(list_room)
        except RemoteError as error:
            raise ApiError(
                f"The list's address could not be looked up: {error}. Try again later, or give its room ID.", status=502
            ) from error

    async def _come_in(self, room_id: str, via: Sequence[str]) -> None:
        room = await self._rooms.get(room_id)
        if room is not None and room.local_joined:
            return
        try:
            await self._members.join(await self._own_rooms.speaker(), room_id, via=via)
        except (NotAllowed, RemoteError, ApiError) as error:
            why = error.text if isinstance(error, ApiError) else str(error)
            raise ApiError(
                f"The choice is kept, but the relay could not come into the list's room: {why} Name a server that is in it, "
                "or come into it with an account of this relay.",
                status=502,
            ) from error

    async def _leave(self, room_id: str) -> None:
        speaker = await self._own_rooms.speaker()
        if self._rooms.membership(room_id, speaker) == "join":
            # Where it fails it stays in the room and hears what nobody reads.
            with suppress(ApiError, NotAllowed, RemoteError):
                await self._members.leave(speaker, room_id)

    def _listed(self, room_id: str) -> dict[str, Any]:
        found = next((one for one in self._lists.listing() if one["room_id"] == room_id), None)
        return found or {"room_id": room_id, "effect": None}

    # --- the operator's command line

    async def _show(self) -> list[dict[str, Any]]:
        return self._lists.listing()

    async def _follow_command(self, *, room: str, effect: str, via: list[str] | None = None) -> dict[str, Any]:
        return await self.follow(OPERATOR, room, effect, via or ())

    async def _unfollow_command(self, *, room: str) -> dict[str, Any]:
        return await self.unfollow(OPERATOR, room)
