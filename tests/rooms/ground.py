"""One relay's rooms on a real database, behind real HTTP, with nobody else in the world. Its people are verbs."""

from __future__ import annotations

import base64
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web as aiohttp_web

from relay.bell import Bell
from relay.clock import SystemClock
from relay.config import Limits as LimitSettings
from relay.db import Database
from relay.doors import OpenDoors
from relay.errors import RemoteError, UnknownToken
from relay.limits import Limits
from relay.people.filters import parse_event_filter
from relay.protocol.seal import Seal
from relay.protocol.signing import SigningKey
from relay.rooms import store
from relay.rooms.afar import Afar
from relay.rooms.append import Appender
from relay.rooms.create import Creator
from relay.rooms.directory import Directory
from relay.rooms.gaps import Gaps
from relay.rooms.history import History
from relay.rooms.intake import Intake
from relay.rooms.members import Members
from relay.rooms.receive import Receiver
from relay.rooms.relations import Relations
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.rooms.routes import RoomsPart
from relay.rooms.send import Sender
from relay.rooms.timeline import Timeline
from relay.rooms.viewing import Viewing
from relay.rooms.write_routes import WriteRoutes
from relay.web import Caller, Web

SERVER = "one.example"
V3 = "/_matrix/client/v3"
V1 = "/_matrix/client/v1"


def ciphertext(text: str) -> dict[str, Any]:
    """What a client sends: to the relay it is noise."""
    return {
        "algorithm": "m.megolm.v1.aes-sha2",
        "ciphertext": base64.b64encode(text.encode()).decode(),
        "session_id": "s1",
    }


def said(event: dict[str, Any]) -> str:
    return base64.b64decode(event["content"]["ciphertext"]).decode()


class LonelyRemote:
    """A world without other servers, except for what a test puts here."""

    def __init__(self) -> None:
        self.aliases: dict[str, tuple[str, list[str]]] = {}

    async def directory(self, server: str, alias: str) -> tuple[str, list[str]]:
        if alias not in self.aliases:
            raise RemoteError(server, 404, "no such alias", "M_NOT_FOUND")
        return self.aliases[alias]

    def left_alone(self, server: str) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        async def nobody(*args: Any) -> Any:
            raise RemoteError("elsewhere", 0, "there is no other server")

        return nobody


class Names:
    async def member_content(self, user_id: str) -> dict[str, Any]:
        return {"displayname": user_id[1:].partition(":")[0].title()}


class Tokens:
    """The token is the name: `alice`, or `alice.PHONE` from another device."""

    def known(self, token: str) -> Caller | None:
        name, _, device = token.partition(".")
        return Caller(f"@{name}:{SERVER}", device or "LAPTOP", 1, admin=name == "admin") if name else None

    async def caller(self, token: str) -> Caller:
        raise UnknownToken("who is this?")


class Person:
    def __init__(self, ground: Ground, name: str) -> None:
        self.ground = ground
        self.name = name
        self.id = f"@{name.partition('.')[0]}:{SERVER}"

    async def asks(self, method: str, path: str, body: Any = None, **query: Any) -> tuple[int, Any]:
        async with self.ground.http.request(
            method,
            self.ground.url + path.replace("#", "%23"),
            json=body,
            params={key: str(value) for key, value in query.items()},
            headers={"Authorization": f"Bearer {self.name}"} if self.name else {},
        ) as answer:
            return answer.status, await answer.json()

    async def gets(self, path: str, **query: Any) -> Any:
        status, answer = await self.asks("GET", path, **query)
        assert status == 200, f"{self.name} gets {path}, but the answer was {status} {answer}"
        return answer

    async def does(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        status, answer = await self.asks(method, path, body, **query)
        assert status == 200, f"{self.name} may {method} {path}, but the answer was {status} {answer}"
        return answer

    async def creates(self, **body: Any) -> str:
        return str((await self.does("POST", V3 + "/createRoom", body))["room_id"])

    async def joins(self, room_id: str) -> None:
        await self.does("POST", f"{V3}/rooms/{room_id}/join", {})

    async def leaves(self, room_id: str) -> None:
        await self.does("POST", f"{V3}/rooms/{room_id}/leave", {})

    async def says(self, room_id: str, text: str, **relation: Any) -> str:
        content = ciphertext(text)
        if relation:
            content["m.relates_to"] = relation
        path = f"{V3}/rooms/{room_id}/send/m.room.encrypted/{next(self.ground.numbers)}"
        return str((await self.does("PUT", path, content))["event_id"])

    async def sets(self, room_id: str, event_type: str, content: dict[str, Any], key: str = "") -> str:
        return str((await self.does("PUT", f"{V3}/rooms/{room_id}/state/{event_type}/{key}", content))["event_id"])

    async def pages(
        self, room_id: str, direction: str = "b", limit: int = 10, **query: Any
    ) -> list[list[dict[str, Any]]]:
        """The whole history, page by page."""
        pages = []
        for _ in range(100):
            answer = await self.gets(f"{V3}/rooms/{room_id}/messages", dir=direction, limit=limit, **query)
            pages.append(answer["chunk"])
            if "end" not in answer:
                return pages
            query["from"] = answer["end"]
        raise AssertionError("paging never comes to an end")

    async def reads(self, room_id: str, direction: str = "b", limit: int = 10, **query: Any) -> list[str]:
        """What was said, in the order of paging."""
        pages = await self.pages(room_id, direction, limit, **query)
        return [
            said(event) for page in pages for event in page if event["type"] == "m.room.encrypted" and event["content"]
        ]


class Ground:
    def __init__(self, folder: Path, seal: str = "standard", limits: LimitSettings | None = None) -> None:
        self.numbers = itertools.count(1)
        self.clock = SystemClock()
        self.bell = Bell()
        self.db = Database(folder / "relay.db", self.bell)
        self.rooms = Rooms(self.db, SERVER)
        self.key = SigningKey("ed25519:test", b"1" * 32)
        self.seal = Seal(seal)  # type: ignore[arg-type]
        self.remote: Any = LonelyRemote()
        self.doors = OpenDoors()
        self.appender = Appender(self.rooms)
        self.sender = Sender(self.db, self.rooms, self.appender, self.seal, self.doors, self.clock, self.key)
        intake = Intake(self.remote, self.seal)
        self.afar = Afar(self.db, self.rooms, self.appender, intake, self.remote, self.key)
        self.gaps = Gaps(self.db, self.rooms, self.appender, intake, self.remote)
        self.receiver = Receiver(self.db, self.rooms, self.appender, intake, self.gaps, self.doors)
        self.history = History(self.db, self.rooms, self.appender, intake, self.gaps, self.remote)
        self.members = Members(
            self.db,
            self.rooms,
            self.appender,
            self.sender,
            self.seal,
            self.doors,
            Names(),
            self.afar,
            self.receiver,
            local_user_exists=_everybody,
        )
        self.creator = Creator(
            self.db, self.rooms, self.appender, self.sender, self.seal, self.doors, Names(), self.key, "12"
        )
        self.viewing = Viewing(self.db, self.rooms)
        self.part = RoomsPart(self.db, self.rooms, self.viewing, self.seal, self.clock)
        self.timeline = Timeline(self.db, self.rooms, self.viewing, parse_event_filter, self._backfill)
        self.relations = Relations(self.db, self.viewing)
        self.directory = Directory(self.db, self.rooms, self.viewing, self.sender, self.doors, self.remote, self.clock)
        self.limits = Limits(
            _rates(limits or LimitSettings(enabled=False)),
            self.clock,
            enabled=(limits or LimitSettings(enabled=False)).enabled,
        )
        self.writing = WriteRoutes(self.rooms, self.sender, self.creator, self.members, self.directory, self.limits)
        self.backfills: list[str] = []
        self.fills: Any = None

    async def _backfill(self, room: Room, limit: int, lowest: int = -1, highest: int = 0) -> bool:
        self.backfills.append(room.room_id)
        return bool(self.fills is not None and await self.fills(room, limit))

    def person(self, name: str) -> Person:
        return Person(self, name)

    def people(self, *names: str) -> Sequence[Person]:
        return [self.person(name) for name in names]

    async def room(self, room_id: str) -> Room:
        room = await self.rooms.get(room_id)
        assert room is not None, "the room is known"
        return room

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Ground]:
        await self.db.open([store.SCHEMA], SERVER)
        await self.rooms.open()
        routes = [
            r
            for part in (self.part, self.timeline, self.relations, self.directory, self.writing)
            for r in part.routes()
        ]
        web = Web(routes, Tokens(), None, self.limits)
        runner = aiohttp_web.ServerRunner(web.listener(frozenset({"client"})))
        await runner.setup()
        site = aiohttp_web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with aiohttp.ClientSession() as self.http:
                yield self
        finally:
            await runner.cleanup()
            await self.db.close()


async def _everybody(user_id: str) -> bool:
    return True


def _rates(settings: LimitSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__struct_fields__ if name != "enabled"}
