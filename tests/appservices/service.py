"""A small application service on loopback, for the stories: it takes everything down, and can be slow, broken or gone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

from tests.people import Json, Person, until

APP = "/_matrix/app/v1"


class Service(Person):
    """The service's own user, and everybody else whom it acts for."""

    def __init__(self, http: aiohttp.ClientSession, name: str) -> None:
        super().__init__(http, "", "", f"{name}bot", "")
        self.service = name
        self.token = f"as-token-of-{name}"
        self.hs_token = f"hs-token-of-{name}"
        self.transactions: list[tuple[str, Json]] = []
        self.tries: list[str] = []
        self.asked: list[str] = []
        self.wrong_tokens = 0
        # What it does with a transaction: None takes it, a number is the status of its refusal.
        self.refuses: int | None = None
        self.hangs = asyncio.Event()
        self.hangs.set()
        self.knows: dict[str, Any] = {}
        self.answers: dict[str, Any] = {}
        self.only_legacy = False
        self._port = 0
        self._runner: web.AppRunner | None = None

    async def opens(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{rest:.*}", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]

    async def closes(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            self.hangs.set()
            await runner.cleanup()

    def registration(self, **more: Any) -> Json:
        return {
            "id": self.service,
            "url": f"http://127.0.0.1:{self._port}",
            "as_token": self.token,
            "hs_token": self.hs_token,
            "sender_localpart": self.name,
            "namespaces": {
                "users": [{"exclusive": True, "regex": f"@_{self.service}_.*"}],
                "aliases": [{"exclusive": True, "regex": f"#_{self.service}_.*"}],
            },
            **more,
        }

    def registers_at(self, folder: Path, **more: Any) -> str:
        """Writes the registration file into a relay's folder; the line for the relay's config."""
        path = folder / f"{self.service}.yaml"
        path.write_text(yaml.safe_dump(self.registration(**more)))
        path.chmod(0o600)
        return f"appservices: {{registration_files: [{path.name}]}}\n"

    def settles(self, house: Any) -> None:
        self.url, self.server = house.url, house.name
        self.id = f"@{self.name}:{house.name}"

    def ghost(self, name: str) -> str:
        return f"@_{self.service}_{name}:{self.server}"

    # --- what the relay says to it

    async def _answer(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {self.hs_token}":
            self.wrong_tokens += 1
            return web.json_response({"errcode": "M_FORBIDDEN"}, status=403)
        path = request.path
        if self.only_legacy and path.startswith("/_matrix/app"):
            return web.json_response({"errcode": "M_UNRECOGNIZED"}, status=404)
        path = path.removeprefix(APP)
        if path.startswith("/transactions/"):
            return await self._transaction(path.removeprefix("/transactions/"), await request.json())
        if path == "/ping":
            return web.json_response({}, status=self.refuses or 200)
        self.asked.append(path + (f"?{request.query_string}" if request.query_string else ""))
        if path in self.answers:
            return web.json_response(self.answers[path])
        name = path.rpartition("/")[2]
        if name in self.knows:
            await self.knows[name]()
            return web.json_response({})
        return web.json_response({"errcode": "M_NOT_FOUND"}, status=404)

    async def _transaction(self, txn: str, body: Json) -> web.Response:
        self.tries.append(txn)
        await self.hangs.wait()
        if self.refuses is not None:
            return web.json_response({}, status=self.refuses)
        if txn not in [known for known, _ in self.transactions]:
            self.transactions.append((txn, body))
        return web.json_response({})

    # --- what it has heard

    def told(self, key: str = "events") -> list[Json]:
        return [one for _, body in self.transactions for one in body.get(key, [])]

    def heard(self, event_id: str) -> Json | None:
        return next((one for one in self.told() if one["event_id"] == event_id), None)

    async def hears(self, event_id: str) -> Json | None:
        await until(lambda: self.heard(event_id) is not None, 40)
        return self.heard(event_id)

    async def hears_that(self, key: str, holds: Any) -> bool:
        return await until(lambda: any(holds(one) for one in self.told(key)), 40)

    # --- what it does

    async def makes(self, name: str) -> str:
        """An account of its namespace."""
        body = {"type": "m.login.application_service", "username": f"_{self.service}_{name}", "inhibit_login": True}
        return str((await self.calls("POST", "register", body))["user_id"])

    async def acts(self, user_id: str, method: str, where: str, body: Any = None, **query: Any) -> Json:
        return await self.calls(method, where, body, user_id=user_id, **query)
