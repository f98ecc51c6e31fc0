"""A relay with rooms, receipts, typing, presence and unread counts, and nothing around them: for the stories of these parts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from relay.bell import Bell
from relay.clock import SystemClock
from relay.db import Database
from relay.departures import Departures
from relay.doors import OpenDoors
from relay.ephemeral.presence import Presence
from relay.ephemeral.receipts import Receipts
from relay.ephemeral.typing_notices import TypingNotices
from relay.limits import Limits
from relay.part import SyncAsk, SyncShare
from relay.protocol.seal import Seal
from relay.protocol.signing import SigningKey
from relay.push.rules import PushRules
from relay.push.unread import Unread
from relay.rooms import store
from relay.rooms.append import Appender
from relay.rooms.create import Creator
from relay.rooms.rooms import Rooms
from relay.rooms.send import Sender
from relay.rooms.store import LOCAL, Stored
from relay.web import Caller, Request, Route, Router

SECRET = {
    "algorithm": "m.megolm.v1.aes-sha2",
    "ciphertext": "AwgAEnACgAkLmt6qF84IKA",
    "session_id": "s",
    "device_id": "D",
}


class MovableClock(SystemClock):
    def __init__(self) -> None:
        self.ahead = 0

    def now(self) -> int:
        return super().now() + self.ahead

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead / 1000


class NoProfiles:
    async def member_content(self, user_id: str) -> dict[str, Any]:
        return {}


class House:
    """Names without a server are people of `one`, this relay; `two` is elsewhere."""

    def __init__(self, folder: Path, *, presence: bool = False, seal: str = "standard") -> None:
        level: Any = seal
        self.clock = MovableClock()
        self.bell = Bell()
        self.db = Database(folder / "relay.db", self.bell)
        self.rooms = Rooms(self.db, "one")
        self.appender = Appender(self.rooms)
        key, doors, self.seal = SigningKey.generate("a"), OpenDoors(), Seal(level)
        self.sender = Sender(self.db, self.rooms, self.appender, self.seal, doors, self.clock, key)
        self.creator = Creator(
            self.db, self.rooms, self.appender, self.sender, self.seal, doors, NoProfiles(), key, "12"
        )
        self.departures = Departures("one")
        self.left: list[tuple[str, str, dict[str, Any]]] = []
        self.departures.deliver_passing_to(
            lambda servers, kind, content, key: self.left.extend((to, kind, content) for to in servers)
        )
        self.receipts = Receipts(self.db, self.clock, self.rooms, self.departures, "one")
        self.typing = TypingNotices(self.bell, self.clock, self.rooms, self.departures, "one")
        self.presence = Presence(presence, self.bell, self.clock, self.rooms, self.departures, "one")
        self.rules = PushRules(self.db)
        self.unread = Unread(self.db, self.rooms, self.rules, self.receipts)
        self.parts = [self.receipts, self.typing, self.presence, self.rules, self.unread]
        self.router = Router(route for part in self.parts for route in part.routes())
        self.limits = Limits({}, self.clock, enabled=False)

    async def __aenter__(self) -> House:
        schemas = [part.schema for part in self.parts if part.schema is not None]
        await self.db.open([store.SCHEMA, *schemas], "one")
        await self.rooms.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.db.close()

    async def ask(self, who: str, method: str, path: str, body: Any = None) -> Any:
        """Calls a route as the web does. Raises what it raises."""
        import orjson
        from yarl import URL

        url = URL("http://one/_matrix/client/v3" + path, encoded=True)
        route: Route
        route, params = self.router.find(method, url.raw_path)
        http: Any = SimpleNamespace(rel_url=url, method=method, headers={})
        request = Request(http, route, params)
        request.body = b"" if body is None else orjson.dumps(body)
        request.caller = Caller(f"@{who}:one", "D", 1)
        return await route.function(request)

    async def room(self, *members: str) -> str:
        """A room of alice with these members."""
        nobody: Any = None
        body = {"preset": "public_chat", "room_version": "11"}
        room_id = await self.creator.create("@alice:one", body, nobody)
        for user in members:
            await self.member(room_id, user, "join")
        return room_id

    async def member(self, room_id: str, who: str, membership: str) -> Stored:
        user_id = user(who)
        room = await self.rooms.get(room_id)
        assert room is not None
        async with room.lock:
            content = {"membership": membership}
            event = await self.sender.judged(
                room, sender=user_id, type="m.room.member", content=content, state_key=user_id
            )
            with self.db.write(chain=room_id) as tx:
                one = self.appender.append(tx, room, event, marks=LOCAL)
        await tx
        return one

    async def says(self, who: str, room_id: str, **more: Any) -> Stored:
        content = {**SECRET, **more}
        if who.endswith(":two"):
            room = await self.rooms.get(room_id)
            assert room is not None
            async with room.lock:
                event = await self.sender.judged(room, sender=user(who), type="m.room.encrypted", content=content)
                with self.db.write(chain=room_id) as tx:
                    one = self.appender.append(tx, room, event)
            await tx
            return one
        return await self.sender.send(room_id, sender=user(who), type="m.room.encrypted", content=content)

    async def reads(
        self, who: str, room_id: str, event_id: str, kind: str = "m.read", thread: str | None = None
    ) -> None:
        body = {} if thread is None else {"thread_id": thread}
        await self.ask(who, "POST", f"/rooms/{quoted(room_id)}/receipt/{kind}/{quoted(event_id)}", body)

    async def sync(
        self, who: str, since: int | None = None, since_typing: int = 0, *, forgetful: bool = False
    ) -> SyncShare:
        """What the parts add to a /sync; `forgetful` as if the bell remembered nothing."""
        user_id = user(who)
        topics = self.bell.topics(user_id, since) if since is not None and not forgetful else None
        mine = self.rooms.memberships(user_id)
        newly = frozenset(r for r, m in mine.items() if m.membership == "join" and m.since_pos > (since or 0))
        ask = SyncAsk(
            user_id, "D", since, self.db.stable_pos(), since_typing, topics, self.rooms.joined(user_id), newly
        )
        share = SyncShare()
        for part in self.parts:
            await part.changes(ask, share)
        return share

    def now(self) -> int:
        return self.db.stable_pos()


def user(who: str) -> str:
    return f"@{who}" if ":" in who else f"@{who}:one"


def quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")
