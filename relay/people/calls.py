"""Where clients find what calls need: a TURN server's password, and the MatrixRTC transports. The relay carries no calls.

A TURN server is told a random name, not who calls. Spec: client-server-api/#voice-over-ip (TURN), MSC4143 and MSC4195
(transports), coturn's REST API for time-limited passwords.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterable

from relay.clock import SECOND, Clock
from relay.config import Calls as CallSettings
from relay.config import Turn
from relay.ids import random_string
from relay.part import Part
from relay.web import Answer, Request, Route

NAME_LENGTH = 16


class Calls(Part):
    def __init__(self, turn: Turn, calls: CallSettings, clock: Clock) -> None:
        self._turn = turn
        self._clock = clock
        self._transports = transports(calls.livekit_service_urls)

    def routes(self) -> Iterable[Route]:
        yield Route("GET", "/_matrix/client/v3/voip/turnServer", self._turn_route, limit="messages")
        for path in ("v1/rtc/transports", "unstable/org.matrix.msc4143/rtc/transports"):
            yield Route("GET", f"/_matrix/client/{path}", self._transports_route)

    async def _turn_route(self, request: Request) -> Answer:
        secret = self._turn.shared_secret
        if not self._turn.uris or not secret:
            return {}
        seconds = self._turn.ttl // SECOND
        username = f"{self._clock.now() // SECOND + seconds}:{random_string(NAME_LENGTH)}"
        # SHA-1 is what TURN servers check; as an HMAC it is sound.
        proof = hmac.digest(secret.encode(), username.encode(), "sha1")
        return {
            "username": username,
            "password": base64.b64encode(proof).decode(),
            "uris": list(self._turn.uris),
            "ttl": seconds,
        }

    async def _transports_route(self, request: Request) -> Answer:
        return {"rtc_transports": self._transports}


def transports(livekit_service_urls: Iterable[str]) -> list[dict[str, str]]:
    return [{"type": "livekit", "livekit_service_url": url} for url in livekit_service_urls]
