"""Who is online: off unless the configuration asks for it, in memory only, with status texts only where the seal is open.

Where it is off, what clients say of it is accepted and forgotten, and everybody is offline. Changes ride the line of the
typing notices, so that they never touch the database. Spec: client-server-api/#presence, server-server-api/#presence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from relay.bell import Bell
from relay.clock import MINUTE, Clock
from relay.departures import Departures
from relay.errors import BadJson, Forbidden, InvalidParam
from relay.ids import require_user_id, server_of
from relay.part import Part, SyncAsk, SyncShare, TakesEdu
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.web import Answer, Request, Route, get_optional_string, get_string

STATES = frozenset({"online", "unavailable", "offline"})
# Without a word from any of a person's clients.
OFFLINE_AFTER = 3 * MINUTE
# After the last time a client said "online" of its own accord.
IDLE_AFTER = 5 * MINUTE
CURRENTLY_ACTIVE = MINUTE
# Another server repeats itself; what it no longer says is over.
REMOTE_OFFLINE_AFTER = 30 * MINUTE
TICK_SECONDS = 20.0
MAX_PEOPLE = 10_000
MAX_IN_EDU = 100
MAX_TEXT = 500


class _State:
    __slots__ = ("active", "number", "presence", "seen", "text")

    def __init__(self) -> None:
        self.presence = "offline"
        self.active = 0  # when last active, ms
        self.seen = 0  # when last heard of, ms
        self.number = 0
        self.text: str | None = None


class Presence(Part):
    def __init__(
        self,
        enabled: bool,
        bell: Bell,
        clock: Clock,
        rooms: Rooms,
        departures: Departures,
        server_name: str,
        *,
        texts: bool = False,
    ) -> None:
        self._enabled = enabled
        self._bell = bell
        self._clock = clock
        self._rooms = rooms
        self._departures = departures
        self._server_name = server_name
        self._texts = texts
        self._people: dict[str, _State] = {}
        # Called with the person whose presence changed.
        self.on_change: list[Callable[[str], None]] = []
        rooms.on_membership.append(self._membership_changed)

    def forgotten(self, server: str) -> None:
        for user_id in [user_id for user_id in self._people if server_of(user_id) == server]:
            del self._people[user_id]

    def routes(self) -> Iterable[Route]:
        path = "/_matrix/client/v3/presence/{user_id}/status"
        yield Route("GET", path, self._get)
        yield Route("PUT", path, self._put)

    def edus(self) -> Mapping[str, TakesEdu]:
        return {"m.presence": self._take_edu}

    async def _get(self, request: Request) -> Answer:
        user_id = require_user_id(request.params["user_id"])
        if not self._enabled:
            return {"presence": "offline"}
        if user_id != request.user_id and not await self._rooms.share_a_room(request.user_id, user_id):
            raise Forbidden("You share no room with this person.")
        return self._content(self._people.get(user_id) or _State())

    async def _put(self, request: Request) -> Answer:
        if request.params["user_id"] != request.user_id:
            raise Forbidden("You can only set your own presence.")
        body = request.json()
        presence, text = get_string(body, "presence"), get_optional_string(body, "status_msg")
        if presence not in STATES:
            raise InvalidParam("presence is online, unavailable or offline.")
        if text is not None and len(text) > MAX_TEXT:
            raise InvalidParam(f"A status text has at most {MAX_TEXT} characters. Write a shorter one.")
        await self.seen(request.user_id, presence)
        await self._say(request.user_id, text)
        return {}

    async def _say(self, user_id: str, text: str | None) -> None:
        if not self._enabled or not self._texts:
            return
        state = self._state(user_id)
        if state.text != text:
            state.text = text
            await self._tell(user_id, state)

    def _membership_changed(self, room: Room, user_id: str, before: str | None, now: str, pos: int) -> None:
        """Who comes into a room is told to those who are there: they may never have heard of her."""
        state = self._people.get(user_id)
        if state is not None and state.presence != "offline" and now == "join" and before != "join":
            state.number = self._bell.ring_typing(room.local_joined)

    async def seen(self, user_id: str, presence: str = "online") -> None:
        """A client of a local person is here: /sync says so with its `set_presence`."""
        if not self._enabled or presence not in STATES:
            return
        state = self._state(user_id)
        now = self._clock.now()
        state.seen = now
        if presence == "online":
            state.active = now
        if state.presence != presence:
            state.presence = presence
            await self._tell(user_id, state)

    def _state(self, user_id: str) -> _State:
        state = self._people.pop(user_id, None) or _State()
        self._people[user_id] = state
        while len(self._people) > MAX_PEOPLE:
            del self._people[next(iter(self._people))]
        return state

    async def _tell(self, user_id: str, state: _State) -> None:
        state.number = self._bell.ring_typing(await self._rooms.local_neighbours(user_id))
        for told in self.on_change:
            told(user_id)
        if server_of(user_id) == self._server_name:
            content = {"push": [{"user_id": user_id, **self._content(state)}]}
            content["push"][0].setdefault("last_active_ago", 0)
            servers = await self._rooms.servers_sharing(user_id)
            self._departures.passing(servers, "m.presence", content, f"presence {user_id}")

    def of(self, user_id: str) -> dict[str, Any]:
        return self._content(self._people.get(user_id) or _State())

    def _content(self, state: _State) -> dict[str, Any]:
        content: dict[str, Any] = {"presence": state.presence}
        if state.active:
            ago = max(0, self._clock.now() - state.active)
            content["last_active_ago"] = ago
            content["currently_active"] = state.presence == "online" and ago < CURRENTLY_ACTIVE
        if state.text is not None:
            content["status_msg"] = state.text
        return content

    async def _take_edu(self, origin: str, content: dict[str, Any]) -> None:
        if not self._enabled:
            return
        push = content.get("push")
        if not isinstance(push, list) or len(push) > MAX_IN_EDU:
            raise BadJson(f"An m.presence has a list push of at most {MAX_IN_EDU} entries.")
        for said in push:
            if not isinstance(said, dict):
                continue
            user_id, presence, ago = said.get("user_id"), said.get("presence"), said.get("last_active_ago", 0)
            if not isinstance(user_id, str) or server_of(user_id) != origin or presence not in STATES:
                continue
            if user_id not in self._people and not await self._rooms.local_neighbours(user_id):
                continue
            state = self._state(user_id)
            now = self._clock.now()
            state.seen = now
            state.active = now - ago if type(ago) is int and 0 <= ago < now else now
            text = said.get("status_msg") if self._texts else None
            text = text[:MAX_TEXT] if isinstance(text, str) else None
            if (state.presence, state.text) != (presence, text):
                state.presence, state.text = presence, text
                await self._tell(user_id, state)

    async def changes(self, ask: SyncAsk, share: SyncShare) -> None:
        if not self._people:
            return
        initial = ask.since is None
        changed = [
            (user_id, state)
            for user_id, state in self._people.items()
            if (state.presence != "offline" if initial or ask.newly_joined else state.number > ask.since_typing)
            or state.number > ask.since_typing
        ]
        if not changed:
            return
        near = await self._rooms.neighbours(ask.user_id) | {ask.user_id}
        for user_id, state in changed:
            if user_id in near:
                share.presence.append({"type": "m.presence", "sender": user_id, "content": self._content(state)})

    async def run(self) -> None:
        while self._enabled:
            await self._clock.sleep(TICK_SECONDS)
            await self.expire()

    async def expire(self) -> None:
        now = self._clock.now()
        for user_id, state in list(self._people.items()):
            local = server_of(user_id) == self._server_name
            if state.presence != "offline" and now - state.seen > (OFFLINE_AFTER if local else REMOTE_OFFLINE_AFTER):
                state.presence = "offline"
            elif state.presence == "online" and local and now - state.active > IDLE_AFTER:
                state.presence = "unavailable"
            else:
                if state.presence == "offline" and now - state.seen > REMOTE_OFFLINE_AFTER:
                    del self._people[user_id]
                continue
            await self._tell(user_id, state)
