"""Who may invite a person, as she set it herself: nobody while she blocks invites, and no word from those whom she ignores.

Blocking stands at the door and says so; ignoring says nothing, so that it can't be told from an unanswered invite: such
invites are kept and not shown. Spec: client-server-api/#invite-permission, #ignoring-users.
"""

from __future__ import annotations

from relay.doors import OpenDoors
from relay.errors import Forbidden
from relay.people.account_data import AccountData
from relay.rooms.rooms import Rooms

# The second is what clients wrote before v1.18.
CONFIG_TYPES = ("m.invite_permission_config", "org.matrix.msc4380.invite_permission_config")


class InviteBlocking(OpenDoors):
    def __init__(self, account_data: AccountData, rooms: Rooms) -> None:
        self._account_data = account_data
        self._rooms = rooms

    async def invite(self, sender: str, target: str, room_id: str) -> None:
        if await self.blocks(target):
            raise Forbidden(
                f"{target} takes no invites at present. Ask them in another way to allow them.",
                errcode="M_INVITE_BLOCKED",
            )

    async def blocks(self, user_id: str) -> bool:
        """Whether this local user takes no invites."""
        return any(
            content.get("default_action") == "block"
            for room_id, _, content in await self._account_data.of_types(user_id, CONFIG_TYPES)
            if not room_id and isinstance(content, dict)
        )

    async def hides(self, user_id: str, invite_id: str) -> bool:
        """Whether an invite that is there already is kept from her clients."""
        ignored = await self._account_data.ignored_users(user_id)
        if ignored:
            invite = await self._rooms.event(invite_id)
            if invite is not None and invite.event.sender in ignored:
                return True
        return await self.blocks(user_id)
