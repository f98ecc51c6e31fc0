"""Programs that an operator might run beside her relay: they listen on loopback, take down what they are told, and answer
what a test wants; or hang, or fail, or are not there.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from aiohttp import web

SECRET = "whsec_" + base64.b64encode(b"a secret of the operator's tool.").decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"another secret, which came later").decode()


class Tool:
    """`answers` maps the last segment of a path to (status, body); everything else gets `usual`."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.raw: list[bytes] = []
        self.usual: tuple[int, Any] = (200, {"decision": "allow"})
        self.answers: dict[str, tuple[int, Any]] = {}
        self.hangs = False
        self.url = ""
        self._let_go = asyncio.Event()

    async def __aenter__(self) -> Tool:
        app = web.Application()
        app.router.add_post("/{tail:.*}", self._hears)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._let_go.set()
        await self._runner.cleanup()

    async def _hears(self, request: web.Request) -> web.Response:
        word = request.path.rpartition("/")[2]
        raw = await request.read()
        self.raw.append(raw)
        self.heard.append((word, await request.json(), dict(request.headers)))
        if self.hangs:
            await self._let_go.wait()
        status, body = self.answers.get(word, self.usual)
        return web.json_response(body, status=status)

    def told(self, word: str) -> list[dict[str, Any]]:
        return [body for heard, body, _ in self.heard if heard == word]
