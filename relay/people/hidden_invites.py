"""Which invites a person's clients are not shown: those she blocks, of people she ignores, and those the gate holds back."""

from __future__ import annotations

from relay.people.contact_gate import ContactGate
from relay.people.invite_blocking import InviteBlocking


class HiddenInvites:
    def __init__(self, blocking: InviteBlocking, gate: ContactGate) -> None:
        self._blocking = blocking
        self._gate = gate

    async def hides(self, user_id: str, room_id: str, invite_id: str) -> bool:
        return await self._gate.hides(user_id, room_id) or await self._blocking.hides(user_id, invite_id)
