"""A relay of which only the front door stands: accounts and people on a real database, spoken to over real HTTP.

Rooms are a list of who is where (`FewRooms`): what matters here is only who shares one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web as http

from relay.accounts.account import Account
from relay.accounts.devices import Devices
from relay.accounts.login import Login
from relay.accounts.passwords import Passwords
from relay.accounts.reauth import Reauth
from relay.accounts.register import Register
from relay.accounts.sessions import Sessions
from relay.accounts.shared_secret import SharedSecret
from relay.accounts.tokens import RegistrationTokens
from relay.accounts.users import Users
from relay.bell import Bell
from relay.clock import HOUR, MINUTE
from relay.config import Rate, Registration
from relay.db import Database, Query
from relay.doors import OpenDoors
from relay.errors import Forbidden
from relay.limits import Limits
from relay.people.account_data import AccountData
from relay.people.filters import Filters
from relay.people.profile import Profiles
from relay.people.tags import Tags
from relay.people.user_search import UserSearch
from relay.rooms.store import SCHEMA as ROOMS_SCHEMA
from relay.web import Web

SERVER = "one.example"
PASSWORD = "correct horse battery"
CLIENT = "/_matrix/client/v3"


class HandClock:
    """Stands still until somebody moves it."""

    def __init__(self) -> None:
        self._now = 1_700_000_000_000

    def now(self) -> int:
        return self._now

    def monotonic(self) -> float:
        return self._now / 1000

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)

    def forward(self, *, minutes: float = 0, hours: float = 0) -> None:
        self._now += int(minutes * MINUTE + hours * HOUR)


@dataclass
class OneRoom:
    members: dict[str, str]
    state: dict[tuple[str, str], str] = field(default_factory=dict)
    version: Any = None


@dataclass
class FewRooms:
    rooms: dict[str, OneRoom] = field(default_factory=dict)

    def joined(self, user_id: str) -> frozenset[str]:
        return frozenset(room_id for room_id, room in self.rooms.items() if room.members.get(user_id) == "join")

    async def get(self, room_id: str) -> OneRoom | None:
        return self.rooms.get(room_id)

    async def share_a_room(self, a: str, b: str) -> bool:
        return a == b or not self.joined(a).isdisjoint(self.joined(b))

    async def servers_sharing(self, user_id: str) -> set[str]:
        members = {member for room_id in self.joined(user_id) for member in self.rooms[room_id].members}
        return {member.partition(":")[2] for member in members} - {SERVER}

    def meet(self, room_id: str, *user_ids: str) -> OneRoom:
        room = self.rooms[room_id] = OneRoom(dict.fromkeys(user_ids, "join"))
        return room


class SlowDoors(OpenDoors):
    """Refuses what it is told to."""

    def __init__(self) -> None:
        self.closed: set[str] = set()

    async def register(self, user_id: str) -> None:
        if "register" in self.closed:
            raise Forbidden("Not today.")

    async def profile(self, user_id: str, field_name: str, value: Any) -> None:
        if "profile" in self.closed:
            raise Forbidden("Not this name.")


class House:
    def __init__(
        self,
        folder: Path,
        mode: str = "open_to_everyone",
        *,
        limited: bool = False,
        open_profiles: bool = False,
        shared_secret: str | None = None,
    ) -> None:
        self.clock = HandClock()
        self.bell = Bell()
        self.doors = SlowDoors()
        self.rooms: Any = FewRooms()
        self.path = folder / "relay.db"
        self.db = db = Database(self.path, self.bell)
        rates = {"login": Rate(per_second=0.2, burst=10), "registration": Rate(per_second=0.1, burst=5)}
        limits = Limits(rates, self.clock, enabled=limited)
        registration = Registration(mode=mode)  # type: ignore[arg-type]
        self.passwords = Passwords(2)
        self.users = Users(db, SERVER, self.passwords, self.clock)
        self.sessions = Sessions(db, self.bell, self.clock, HOUR)
        self.tokens = RegistrationTokens(db, self.clock, registration)
        self.reauth = Reauth(self.users, self.tokens, limits, self.clock)
        self.devices = Devices(db, self.sessions, self.reauth)
        self.login = Login(db, self.users, self.devices, self.doors, limits, "https://matrix.one.example")
        self.register = Register(
            db, self.users, self.devices, self.reauth, self.tokens, self.doors, registration, limits
        )
        self.shared_secret = SharedSecret(shared_secret, self.register, self.clock)
        self.account = Account(db, self.users, self.sessions, self.devices, self.reauth)
        self.profiles = Profiles(db, self.users, self.rooms, self.doors, None, open_to_everyone=open_profiles)
        self.account_data = AccountData(db)
        self.tags = Tags(db, self.account_data)
        self.filters = Filters(db)
        self.user_search = UserSearch(db, self.users, self.rooms, self.profiles)
        self.account.on_deactivated += [self.profiles.forget, self.account_data.forget, self.filters.forget]
        self.parts = [
            self.users, self.sessions, self.tokens, self.devices, self.login, self.register, self.shared_secret, self.account,
            self.profiles, self.account_data, self.tags, self.filters, self.user_search,
        ]  # fmt: skip
        self.web = Web([route for part in self.parts for route in part.routes()], self.sessions, None, limits)
        self.commands = {**self.account.commands(), **self.tokens.commands()}
        self.address = ""

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[House]:
        await self.db.open([part.schema for part in self.parts if part.schema] + [ROOMS_SCHEMA], SERVER)
        runner = http.ServerRunner(self.web.listener(frozenset({"client"})))
        await runner.setup()
        site = http.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        leaving = asyncio.create_task(self.account.run())
        try:
            async with aiohttp.ClientSession(self.address) as self.wire:
                yield self
        finally:
            leaving.cancel()
            await runner.cleanup()
            await self.db.close()
            self.passwords.close()

    def visitor(self) -> Person:
        return Person(self)

    async def person(self, name: str, **more: Any) -> Person:
        """Somebody with an account, who has just signed in."""
        await self.commands["user.add"](localpart=name, password=PASSWORD)
        return await Person(self, f"@{name}:{SERVER}").signs_in(**more)

    async def rows(self, sql: str) -> list[tuple[Any, ...]]:
        def read(query: Query) -> list[tuple[Any, ...]]:
            return query.all(sql)

        return await self.db.read(read)


@dataclass
class Reply:
    status: int
    body: Any
    headers: Any

    @property
    def errcode(self) -> str | None:
        return self.body.get("errcode")


class Person:
    def __init__(self, house: House, user_id: str = "") -> None:
        self.house = house
        self.user_id = user_id
        self.token: str | None = None
        self.refresh_token: str | None = None
        self.device_id = ""

    async def says(self, method: str, path: str, body: Any = None, token: str | None = None) -> Reply:
        token = token or self.token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        path = path if path.startswith(("/_matrix", "/_synapse")) else CLIENT + path
        sends = {"data": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
        async with self.house.wire.request(method, path, headers=headers, **sends) as answer:
            return Reply(answer.status, await answer.json(), answer.headers)

    async def signs_in(self, password: str = PASSWORD, **more: Any) -> Person:
        reply = await self.tries_to_sign_in(password, **more)
        assert reply.status == 200, f"{self.user_id} can sign in: {reply.body}"
        self.takes(reply)
        return self

    async def tries_to_sign_in(self, password: str = PASSWORD, **more: Any) -> Reply:
        body = {
            "type": "m.login.password",
            "identifier": {"type": "m.id.user", "user": self.user_id},
            "password": password,
            **more,
        }
        return await self.says("POST", "/login", body)

    def takes(self, reply: Reply) -> None:
        self.token = reply.body["access_token"]
        self.refresh_token = reply.body.get("refresh_token")
        self.device_id = reply.body.get("device_id", self.device_id)
        self.user_id = reply.body.get("user_id", self.user_id)

    async def another_device(self, **more: Any) -> Person:
        return await Person(self.house, self.user_id).signs_in(**more)

    async def is_signed_in(self) -> bool:
        reply = await self.says("GET", "/account/whoami")
        assert reply.status in (200, 401), f"whoami answers: {reply.body}"
        return reply.status == 200

    def proof(self, session: str | None = None, password: str = PASSWORD) -> dict[str, Any]:
        proof: dict[str, Any] = {
            "type": "m.login.password",
            "identifier": {"type": "m.id.user", "user": self.user_id},
            "password": password,
        }
        return proof if session is None else {**proof, "session": session}

    async def confirms(
        self, method: str, path: str, body: dict[str, Any] | None = None, password: str = PASSWORD
    ) -> Reply:
        """Does what needs the password once more, in the two steps of the standard."""
        asked = await self.says(method, path, body or {})
        assert asked.status == 401 and "flows" in asked.body, f"{path} asks for the password first: {asked.body}"
        return await self.says(method, path, {**(body or {}), "auth": self.proof(asked.body["session"], password)})
