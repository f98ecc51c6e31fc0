"""Our own keys for everybody, and other servers' keys for those who can't reach them, signed by us as a notary.

Unsigned requests, so everything is bounded. Spec: server-server-api/#publishing-keys, #querying-keys-through-another-server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from federation.keyring import Keyring
from relay.clock import Clock
from relay.errors import BadJson, InvalidParam, TooLarge
from relay.ids import is_server_name
from relay.part import Part
from relay.protocol.canonical import encode
from relay.protocol.signing import SigningKey, sign_json
from relay.web import Request, Route, get_object

MAX_SERVERS_ASKED = 20
MAX_KEYS_ASKED = 20


class Notary(Part):
    def __init__(
        self,
        server_name: str,
        key: SigningKey,
        keyring: Keyring,
        clock: Clock,
        meets: Callable[[str], None] | None = None,
    ) -> None:
        """`meets`: called with a caller's address for each server of which nothing is known here; may raise."""
        self._server_name = server_name
        self._key = key
        self._keyring = keyring
        self._clock = clock
        self._meets = meets

    def routes(self) -> Iterable[Route]:
        for method, path, function in (
            ("GET", "/_matrix/key/v2/server", self._own),
            ("GET", "/_matrix/key/v2/server/{keyId}", self._own),
            ("GET", "/_matrix/key/v2/query/{serverName}", self._one),
            ("POST", "/_matrix/key/v2/query", self._several),
        ):
            yield Route(method, path, function, auth="none", limit="federation", serves="federation")

    async def _own(self, request: Request) -> bytes:
        # In the form that was signed, so that it can be verified without being read and written again.
        return encode(self._keyring.own_answer())

    async def _one(self, request: Request) -> dict[str, Any]:
        server = request.params["serverName"]
        if not is_server_name(server):
            raise InvalidParam("That is not a server name.")
        until = request.query_int("minimum_valid_until_ts", self._clock.now())
        return {"server_keys": await self._answers(request, {server: (until, ())})}

    async def _several(self, request: Request) -> dict[str, Any]:
        asked = get_object(request.json(), "server_keys")
        if len(asked) > MAX_SERVERS_ASKED:
            raise TooLarge(f"Ask for at most {MAX_SERVERS_ASKED} servers at once.")
        now = self._clock.now()
        wanted: dict[str, tuple[int, Sequence[str]]] = {}
        for server, keys in asked.items():
            if not is_server_name(server) or not isinstance(keys, dict):
                raise BadJson("server_keys is an object of server names and the keys wanted of each.")
            times = [criteria.get("minimum_valid_until_ts") for criteria in keys.values() if isinstance(criteria, dict)]
            until = max((time for time in times if type(time) is int), default=now)
            wanted[server] = until, list(keys)[:MAX_KEYS_ASKED]
        return {"server_keys": await self._answers(request, wanted)}

    async def _answers(self, request: Request, wanted: Mapping[str, tuple[int, Sequence[str]]]) -> list[dict[str, Any]]:
        for server in wanted:
            if self._meets is not None and not await self._keyring.knows(server):
                self._meets(request.address)
        found = await asyncio.gather(*(self._of(server, *asked) for server, asked in wanted.items()))
        return [answer for answers in found for answer in answers]

    async def _of(self, server: str, until: int, key_ids: Sequence[str]) -> list[dict[str, Any]]:
        if server == self._server_name:
            return [self._keyring.own_answer()]
        answers = await self._keyring.answers_of(server, until, key_ids)
        return [sign_json(answer, self._server_name, self._key) for answer in answers]
