"""Who is typing: in memory only, with a number line of its own, so that it never touches the database or `pos`.

A notice ends when its sender says so, sends nothing more in time, or leaves. Spec: client-server-api/#typing-notifications,
server-server-api/#typing-notifications.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from relay.bell import Bell
from relay.clock import MINUTE, SECOND, Clock
from relay.departures import Departures
from relay.errors import BadJson, Forbidden, InvalidParam, MissingParam
from relay.ids import server_of
from relay.part import Part, SyncAsk, SyncShare, TakesEdu
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.web import Answer, Request, Route

MAX_TIMEOUT = 30 * SECOND
DEFAULT_TIMEOUT = 20 * SECOND
# Another server repeats its notice while somebody goes on typing.
REMOTE_TIMEOUT = 30 * SECOND
# Shown at once in one room, and rooms remembered: the quiet ones for clients that still show somebody.
MAX_TYPING = 50
MAX_ROOMS = 2_000
QUIET_FOR = 10 * MINUTE
TICK = 1.0


class _Typing:
    __slots__ = ("number", "quiet_since", "until")

    def __init__(self) -> None:
        self.until: dict[str, float] = {}  # user -> monotonic seconds
        self.number = 0
        self.quiet_since = 0.0


class TypingNotices(Part):
    def __init__(self, bell: Bell, clock: Clock, rooms: Rooms, departures: Departures, server_name: str) -> None:
        self._bell = bell
        self._clock = clock
        self._rooms = rooms
        self._departures = departures
        self._server_name = server_name
        self._typing: OrderedDict[str, _Typing] = OrderedDict()
        self._begun = asyncio.Event()
        # Called with the room where somebody began or stopped.
        self.on_change: list[Callable[[str], None]] = []
        rooms.on_membership.append(self._membership_changed)

    def routes(self) -> Iterable[Route]:
        yield Route("PUT", "/_matrix/client/v3/rooms/{room_id}/typing/{user_id}", self._put)

    def edus(self) -> Mapping[str, TakesEdu]:
        return {"m.typing": self._take_edu}

    async def _put(self, request: Request) -> Answer:
        if request.params["user_id"] != request.user_id:
            raise Forbidden("You can only say of yourself that you are typing.")
        body = request.json()
        typing, timeout = body.get("typing"), body.get("timeout", DEFAULT_TIMEOUT)
        if typing is None:
            raise MissingParam("The key typing is missing.")
        if not isinstance(typing, bool):
            raise BadJson("The key typing is not true or false.")
        if type(timeout) is not int or timeout < 0:
            raise InvalidParam("timeout is a number of milliseconds.")
        room = await self._rooms.require_joined(request.params["room_id"], request.user_id)
        self._set(room, request.user_id, min(timeout, MAX_TIMEOUT) if typing else 0)
        return {}

    async def _take_edu(self, origin: str, content: dict[str, Any]) -> None:
        room_id, user_id, typing = content.get("room_id"), content.get("user_id"), content.get("typing")
        if not isinstance(room_id, str) or not isinstance(user_id, str) or not isinstance(typing, bool):
            raise BadJson("An m.typing has a room_id, a user_id and typing.")
        room = await self._rooms.get(room_id)
        if room is None or server_of(user_id) != origin or not room.may_be_joined(user_id):
            return
        self._set(room, user_id, REMOTE_TIMEOUT if typing else 0)

    def _set(self, room: Room, user_id: str, timeout: int) -> None:
        """`timeout` 0 ends it."""
        known = self._typing.get(room.room_id)
        was = known is not None and user_id in known.until
        if timeout:
            if known is None:
                known = self._typing[room.room_id] = _Typing()
                self._bound()
            if not was and len(known.until) >= MAX_TYPING:
                return
            known.until[user_id] = self._clock.monotonic() + timeout / SECOND
            self._begun.set()
        elif known is not None and was:
            del known.until[user_id]
        local = server_of(user_id) == self._server_name
        if local and (timeout or was):
            # Repeated too: the other servers' notices end by themselves.
            content = {"room_id": room.room_id, "user_id": user_id, "typing": bool(timeout)}
            self._departures.passing(room.servers, "m.typing", content, f"typing {room.room_id} {user_id}")
        if known is not None and was != bool(timeout):
            self._ring(room, known)

    def _ring(self, room: Room, known: _Typing) -> None:
        known.number = self._bell.ring_typing(tuple(room.local_joined))
        known.quiet_since = 0.0 if known.until else self._clock.monotonic()
        self._typing.move_to_end(room.room_id)
        for told in self.on_change:
            told(room.room_id)

    def _bound(self) -> None:
        while len(self._typing) > MAX_ROOMS:
            self._typing.popitem(last=False)

    def _membership_changed(self, room: Room, user_id: str, before: str | None, now: str, pos: int) -> None:
        known = self._typing.get(room.room_id)
        if now != "join" and known is not None and known.until.pop(user_id, None) is not None:
            self._ring(room, known)

    async def changes(self, ask: SyncAsk, share: SyncShare) -> None:
        for room_id, known in self._typing.items():
            if room_id not in ask.rooms:
                continue
            fresh = ask.since is None or room_id in ask.newly_joined
            if known.until if fresh else known.number > ask.since_typing:
                share.room(room_id).ephemeral.append({"type": "m.typing", "content": {"user_ids": list(known.until)}})

    def changed(self, since: int) -> list[str]:
        """The rooms where somebody began or stopped after this number of the typing line."""
        found = []
        for room_id, known in reversed(self._typing.items()):
            # In the order of their numbers, but for those that have none yet.
            if 0 < known.number <= since:
                break
            if known.number:
                found.append(room_id)
        return found

    def in_room(self, room_id: str) -> list[str]:
        known = self._typing.get(room_id)
        return list(known.until) if known is not None else []

    async def run(self) -> None:
        while True:
            if not self._typing:
                self._begun.clear()
                await self._begun.wait()
            await self._clock.sleep(TICK)
            await self.expire()

    async def expire(self) -> None:
        now = self._clock.monotonic()
        for room_id, known in list(self._typing.items()):
            over = [user_id for user_id, until in known.until.items() if until <= now]
            for user_id in over:
                del known.until[user_id]
            if over and (room := await self._rooms.get(room_id)) is not None:
                self._ring(room, known)
            elif not known.until and now - known.quiet_since > QUIET_FOR / SECOND:
                del self._typing[room_id]
