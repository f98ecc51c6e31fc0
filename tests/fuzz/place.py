"""A relay with a room in it, a person who throws bad input at every endpoint, and one who must not notice."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from relay.web import Route
from tests.fuzz.answers import Answer, ask, require_proper, require_proper_page
from tests.people import Person, path
from tests.town import Town

PAGES, API_BESIDE_PAGES = "/_relay/", ("/_relay/safety/", "/_relay/health")
# What ends her session is done by somebody who can sign in again.
ENDS = ("logout", "deactivate", "delete_devices", "account/password", "/devices/", "/refresh")


class Place:
    """A relay with a room, a person who throws and one who must not notice."""

    def __init__(self, town: Town) -> None:
        self.town = town
        self.number = 0
        self._fresh = itertools.count(1)

    async def opens(self) -> Place:
        house = await self.town.relay("one")
        assert house.server is not None
        self.url = house.url
        self.routes: list[Route] = list(house.server.web.routers["client"].routes)
        self.quiet = await self.town.user("quiet@one")
        await self.new_thrower()
        return self

    async def new_thrower(self) -> None:
        self.number += 1
        self.thrower: Person = await self.town.user(f"thrower{self.number}@one")
        self.room = await self.thrower.creates_room(with_=self.quiet)
        self.event = await self.thrower.sends(self.room)
        self.spare_event = await self.thrower.sends(self.room)
        self.banned = f"@banned:{self.thrower.server}"
        self.version = (await self.thrower.reads(self.room, "m.room.create"))["room_version"]
        self.token = (await self.thrower.calls("GET", path("rooms", self.room, "messages"), dir="b", limit=1))["end"]
        self.since = (await self.thrower.syncs())["next_batch"]
        backup = {"algorithm": "m.megolm_backup.v1.curve25519-aes-sha2", "auth_data": {"public_key": "A" * 43}}
        self.backup = (await self.thrower.calls("POST", "room_keys/version", backup))["version"]
        self.media = await self.thrower.uploads(os.urandom(200))
        self.known = (
            self.thrower.id,
            self.quiet.id,
            self.room,
            self.event,
            self.thrower.device,
            self.thrower.server,
            "global",
        )

    def routes_of(self, folder: str) -> list[Route]:
        return [route for route in self.routes if Path(route.function.__code__.co_filename).parent.name == folder]

    def fresh(self) -> int:
        return next(self._fresh)

    async def throws(self, route: Route, path: str, body: bytes | None) -> Answer:
        return await self.throws_at(route.method, path, body)

    async def throws_at(self, method: str, path: str, body: bytes | None) -> Answer:
        bearer = f"Bearer {self.thrower.token}"
        answer = await ask(
            self.town.http, method, self.url + path, body, Authorization=bearer, Content_Type="application/json"
        )
        is_page = path.startswith(PAGES) and not path.startswith(API_BESIDE_PAGES)
        require = require_proper_page if is_page else require_proper
        require(answer, f"{method} {path[:300]} {(body or b'')[:500]!r}")
        if any(word in path for word in ENDS):
            whoami = f"{self.url}/_matrix/client/v3/account/whoami"
            if (await ask(self.town.http, "GET", whoami, Authorization=bearer)).status == 401:
                await self.new_thrower()
        return answer

    async def quiet_noticed_nothing(self) -> None:
        room = await self.thrower.creates_room(with_=self.quiet)
        sent = await self.thrower.sends(room)
        assert await self.quiet.sees(sent), "whoever did nothing is still signed in and hears what is said"
