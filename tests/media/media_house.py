"""A relay with nothing but media, for the stories of this folder: real database, real HTTP, a fake far server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aiohttp import ClientSession, web

from relay.bell import Bell
from relay.clock import SystemClock
from relay.config import Media as MediaSettings
from relay.db import Database
from relay.doors import OpenDoors
from relay.errors import RemoteError, UnknownToken
from relay.limits import Limits
from relay.media.remote_copies import RemoteCopies
from relay.media.routes import Media
from relay.protocol.seal import Seal
from relay.remote import RemoteMedia
from relay.web import Caller, Web


class MovableClock(SystemClock):
    def __init__(self) -> None:
        self.ahead = 0

    def now(self) -> int:
        return super().now() + self.ahead


class NamedSessions:
    """The token is the localpart."""

    def known(self, token: str) -> Caller | None:
        return Caller(f"@{token}:one", "D", 1) if token != "stranger" else None

    async def caller(self, token: str) -> Caller:
        raise UnknownToken("This session has ended.")


class FarServer:
    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked = 0
        self.breaks_after: int | None = None

    async def media(self, server: str, media_id: str, most_bytes: int) -> RemoteMedia:
        self.asked += 1
        if media_id not in self.files:
            raise RemoteError(server, 404, "Not found.", "M_NOT_FOUND")
        body = self.files[media_id]

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 60_000):
                if self.breaks_after is not None and start > self.breaks_after:
                    raise RemoteError(server, 0, "the connection broke")
                yield body[start : start + 60_000]

        return RemoteMedia("image/svg+xml", 'attachment; filename="secret.svg"', chunks(), len(body))


class House:
    def __init__(self, folder: Path, *, seal: str = "standard", settings: MediaSettings | None = None) -> None:
        self.folder = folder
        self.clock = MovableClock()
        self.far = FarServer()
        self.db = Database(folder / "relay.db", Bell())
        settings = settings or MediaSettings()
        level: Any = seal
        self.seal = Seal(level)
        far: Any = self.far
        self.copies = RemoteCopies(self.db, self.clock, settings, self.seal, far, folder / "media" / "remote")
        self.media = Media(
            self.db, self.clock, settings, self.seal, OpenDoors(), self.copies, "one", folder / "media" / "local"
        )

    async def __aenter__(self) -> House:
        assert self.media.schema is not None and self.copies.schema is not None
        await self.db.open([self.media.schema, self.copies.schema], "one")
        limits = Limits({}, self.clock, enabled=False)
        listener = Web(self.media.routes(), NamedSessions(), None, limits).listener(frozenset({"client"}))
        self.runner = web.ServerRunner(listener)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        server: Any = site._server
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.http = ClientSession()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.close()
        await self.runner.cleanup()
        await self.db.close()

    async def ask(self, method: str, path: str, who: str = "alice", **more: Any) -> SimpleNamespace:
        headers = {"Authorization": f"Bearer {who}", **more.pop("headers", {})}
        async with self.http.request(method, self.url + path, headers=headers, **more) as answer:
            body = await answer.read()
            json = await answer.json() if answer.content_type == "application/json" else None
            return SimpleNamespace(status=answer.status, headers=answer.headers, body=body, json=json)

    async def uploads(self, body: bytes, who: str = "alice", **more: Any) -> str:
        answer = await self.ask("POST", "/_matrix/media/v3/upload", who, data=body, **more)
        assert answer.status == 200, answer.body
        return str(answer.json["content_uri"]).removeprefix("mxc://one/")

    async def downloads(self, media_id: str, who: str = "alice", server: str = "one", **more: Any) -> SimpleNamespace:
        return await self.ask("GET", f"/_matrix/client/v1/media/download/{server}/{media_id}", who, **more)

    async def copied(self) -> None:
        """Once no copy is under way: its reader has all bytes a moment before it is on disk."""
        while self.copies._copying:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def files(self) -> list[bytes]:
        """What lies in the media folders, drafts included."""
        return [path.read_bytes() for path in (self.folder / "media").rglob("*") if path.is_file()]
