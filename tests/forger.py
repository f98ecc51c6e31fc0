"""A server that knows the protocol and keeps to none of its rules: it signs with a real relay's key, and lies."""

from __future__ import annotations

from typing import Any

from relay import folder
from relay.config import Listener
from relay.protocol import event as events
from relay.protocol.event import Event
from tests.people import Person
from tests.town import Within


class Forger:
    """A server that knows the protocol and keeps to none of its rules."""

    def __init__(self, house: Within, target: str) -> None:
        assert house.server is not None
        self._server = house.server
        self._name = house.name
        self._target = target
        self._key = folder.load_key(house.folder, folder.prepare(house.folder, None, Listener()).settings)
        self._count = 0

    async def builds(
        self,
        room_id: str,
        sender: str,
        type: str,
        content: dict[str, Any],
        *,
        state_key: str | None = None,
        prev_events: list[str] | None = None,
        depth: int | None = None,
    ) -> Event:
        """An event of that room as an honest server would build it, whoever the sender is."""
        room = await self._server.rooms.get(room_id)
        assert room is not None
        cited = [
            room.state[key] for key in (("m.room.power_levels", ""), ("m.room.member", sender)) if key in room.state
        ]
        return events.build(
            room.version, room_id=room_id, type=type, sender=sender, content=content, state_key=state_key,
            prev_events=list(room.extremities) if prev_events is None else prev_events, auth_events=cited,
            depth=room.depth + 1 if depth is None else depth, origin_server_ts=self._server.clock.now(),
            server_name=self._name, key=self._key,
        )  # fmt: skip

    async def sends(
        self,
        room_id: str,
        sender: Person,
        type: str,
        content: dict[str, Any],
        *,
        state_key: str | None = None,
        spoil: bool = False,
        change: dict[str, Any] | None = None,
        unsigned: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One event: `spoil` its signature, `change` its content after it was signed, or put something into `unsigned`."""
        event = await self.builds(room_id, sender.id, type, content, state_key=state_key)
        pdu = {**event.pdu}
        if change is not None:
            pdu["content"] = change
        if spoil:
            pdu["signatures"] = {self._name: {self._key.key_id: "A" * 86}}
        if unsigned is not None:
            pdu["unsigned"] = unsigned
        return await self.transaction([pdu])

    async def tells(self, edu_type: str, content: dict[str, Any]) -> None:
        await self.transaction([], [{"edu_type": edu_type, "content": content}])

    async def transaction(
        self, pdus: list[Any], edus: list[Any] | None = None, txn: str | None = None
    ) -> dict[str, Any]:
        """The answer. Raises RemoteError where the other side refuses it as a whole."""
        self._count += 1
        body = {"origin": self._name, "origin_server_ts": 1, "pdus": pdus, "edus": edus or []}
        where = f"/_matrix/federation/v1/send/{txn or f'forged{self._count}'}"
        answer: dict[str, Any] = await self.asks("PUT", where, body)
        return answer

    async def asks(self, method: str, where: str, body: dict[str, Any] | None = None) -> Any:
        connections = self._server.outbox._connections
        if body is None:
            return await connections.get(self._target, where, forced=True)
        return await connections.send(self._target, method, where, body, forced=True)
