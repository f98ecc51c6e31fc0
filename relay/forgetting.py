"""`relay server forget NAME`: what came from another server, and waits to go there, is removed, part by part.

To keep it from coming back the operator puts the server on `federation.deny` as well. Not forgotten: what was reported, while its
case lasts, the server's public keys, which prove it, and in the rooms' rules whatever makes them go on. People may talk meanwhile.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from relay.control import CommandFailed
from relay.db import Database, Query
from relay.ids import is_server_name
from relay.part import Part
from relay.rooms import forgetting
from relay.rooms.append import Appender
from relay.rooms.rooms import Rooms


class Forgetting:
    def __init__(
        self,
        server_name: str,
        db: Database,
        rooms: Rooms,
        appender: Appender,
        parts: Sequence[Part],
        frozen: forgetting.Frozen,
    ) -> None:
        """`frozen`: which events must stay, since they were reported."""
        self._server_name = server_name
        self._db = db
        self._rooms = rooms
        self._appender = appender
        self._parts = parts
        self._frozen = frozen

    def commands(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {"server.forget": self.forget}

    async def forget(self, server: str) -> dict[str, Any]:
        """{removed: how many rows of each part}. Raises CommandFailed."""
        server = server.lower()
        if not is_server_name(server) or server.isdigit():
            raise CommandFailed(
                f"{server!r} is not a server name. It looks like example.org, with :port if it has one."
            )
        if server == self._server_name:
            raise CommandFailed("That is this relay itself.")
        rooms = await forgetting.forget(self._db, self._rooms, self._appender, server, self._frozen)

        def forget(query: Query) -> dict[str, int]:
            return {
                type(part).__name__: removed for part in self._parts if (removed := part.forget_server(query, server))
            }

        def forgotten() -> None:
            for part in self._parts:
                part.forgotten(server)

        with self._db.write() as tx:
            tx.call(forget)
            tx.after(forgotten)
        removed = await tx
        return {"removed": {**({"Events and invites": rooms} if rooms else {}), **removed}}
