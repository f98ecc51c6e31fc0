"""New accounts for programs that know the operator's secret: the registration that Synapse has, as tools expect it.

Whoever knows `registration.shared_secret` signs a nonce and the account's data with it (HMAC-SHA1). It is no part of the
standard; without the secret in the config the endpoint does not exist. Not here: what an account is (`register.py`).
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Any

from relay.accounts import passwords
from relay.accounts.register import Register
from relay.clock import MINUTE, Clock
from relay.errors import Forbidden, InvalidParam, Unrecognized
from relay.ids import random_string
from relay.part import Part
from relay.web import Answer, Request, Route, get_bool, get_optional_string, get_string

PATH = "/_synapse/admin/v1/register"
NONCE_LENGTH = 32
NONCE_LIFETIME_MS = MINUTE
MAX_NONCES = 1_000


class SharedSecret(Part):
    def __init__(self, secret: str | None, register: Register, clock: Clock) -> None:
        self._secret = secret
        self._register = register
        self._clock = clock
        # Nonce -> until when it may be used, oldest first; each once.
        self._nonces: dict[str, int] = {}

    def routes(self) -> Iterable[Route]:
        yield Route("GET", PATH, self._nonce_route, auth="none", limit="registration")
        yield Route("POST", PATH, self._register_route, auth="none", limit="registration")

    def _require_secret(self) -> bytes:
        if self._secret is None:
            raise Unrecognized("This server has no shared secret for registration: set registration.shared_secret.")
        return self._secret.encode()

    async def _nonce_route(self, request: Request) -> Answer:
        self._require_secret()
        now = self._clock.now()
        for nonce, until in list(self._nonces.items()):
            if until > now and len(self._nonces) < MAX_NONCES:
                break
            del self._nonces[nonce]
        nonce = random_string(NONCE_LENGTH)
        self._nonces[nonce] = now + NONCE_LIFETIME_MS
        return {"nonce": nonce}

    async def _register_route(self, request: Request) -> Answer:
        secret = self._require_secret()
        body = request.json()
        until = self._nonces.pop(get_string(body, "nonce"), 0)
        if until <= self._clock.now():
            raise InvalidParam("This nonce is not known, used up or too old. GET another one from the same address.")
        username, password = get_string(body, "username"), get_string(body, "password")
        admin = get_bool(body, "admin", False)
        mac = get_string(body, "mac").lower().encode()
        if not hmac.compare_digest(_signature(secret, body, username, password, admin), mac):
            raise Forbidden("The mac is not the HMAC-SHA1 of this request with the shared secret. Compare the secrets.")
        await self._register.require_free(username)
        passwords.require_acceptable(password)
        return await self._register.register(body, admin=admin)


def _signature(secret: bytes, body: dict[str, Any], username: str, password: str, admin: bool) -> bytes:
    parts = [get_string(body, "nonce"), username, password, "admin" if admin else "notadmin"]
    kind = get_optional_string(body, "user_type")
    if kind:
        parts.append(kind)
    return hmac.digest(secret, "\0".join(parts).encode(), "sha1").hex().encode()
