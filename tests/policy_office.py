"""A policy server for stories: what one does beside being a server, added to relays of ours."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from federation.queries import Queries
from relay.errors import ApiError, Unrecognized
from relay.protocol import event as events
from relay.protocol.event import signing_bytes
from relay.protocol.signing import SigningKey
from relay.protocol.versions import VERSIONS
from relay.web import Request, Route


class Office:
    """What a policy server does beside being a server: signs what it is asked about, unless it is told not to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on every relay that is started can be asked."""
        self.key = SigningKey.generate("policy_server")
        self.old = False
        self.thinks = asyncio.Event()
        self.thinks.set()
        self.refusal: ApiError | None = None
        self.asked: list[str] = []
        self.paths: list[str] = []
        usual = Queries.routes
        monkeypatch.setattr(Queries, "routes", lambda queries: [*usual(queries), *self.routes()])

    @property
    def public_key(self) -> str:
        return self.key.verify_key_base64

    def routes(self) -> Iterable[Route]:
        for path in ("/_matrix/policy/v1/sign", "/_matrix/policy/unstable/org.matrix.msc4284/sign"):
            yield Route("POST", path, self._sign, auth="server", serves="federation")

    async def _sign(self, request: Request) -> dict[str, Any]:
        path = request.http.path
        if self.old and "unstable" not in path:
            raise Unrecognized("This path is not known here.")
        self.paths.append(path)
        event = events.parse(request.json(), VERSIONS["12"])
        self.asked.append(event.id)
        await self.thinks.wait()
        if self.refusal is not None:
            raise self.refusal
        name = request.http.headers["Authorization"].partition('destination="')[2].partition('"')[0]
        return {name: {"ed25519:policy_server": self.key.sign(signing_bytes(event))}}
