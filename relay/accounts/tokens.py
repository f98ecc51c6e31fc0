"""Registration tokens: what a person needs to make an account where `registration.mode` is `token`.

The operator makes, lists and revokes them; a use is counted in the write that makes the account.
Spec: client-server-api/#token-authenticated-registration.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from relay.clock import Clock
from relay.config import Registration
from relay.db import Database, Query
from relay.errors import ApiError, Forbidden, InvalidParam, NotFound, Unauthorized
from relay.ids import is_opaque, random_string
from relay.part import Part
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, get_string

GENERATED_LENGTH = 24
MAX_LENGTH = 64
INVALID = "This registration token is not valid, or used up. Ask whoever gave it to you for another one."


class RegistrationTokens(Part):
    schema = Schema(
        "registration_tokens",
        tables=(
            Table(
                "registration_tokens",
                "a token for new accounts, made by the operator",
                {
                    "token": ("the token itself, which the operator hands out again", "until it is revoked"),
                    "uses": ("how many accounts it allows; none: any number", "until it is revoked"),
                    "used": ("how many accounts were made with it, never which", "until it is revoked"),
                    "expires_ts": ("when it ends", "until it is revoked"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE registration_tokens (
                token TEXT PRIMARY KEY, uses BIGINT, used BIGINT NOT NULL, expires_ts BIGINT)
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock, registration: Registration) -> None:
        self._db = db
        self._clock = clock
        self._mode = registration.mode
        self._naming = secrets.token_bytes(32)

    def routes(self) -> Iterable[Route]:
        yield Route(
            "GET",
            "/_matrix/client/v1/register/m.login.registration_token/validity",
            self._validity_route,
            auth="none",
            limit="registration",
        )

    def commands(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {"token.create": self.create, "token.list": self.all, "token.revoke": self.revoke}

    def name_of(self, token: str) -> str:
        """What moderators may call it, who may not use it themselves: another name after each start."""
        return hashlib.blake2b(token.encode(), key=self._naming, digest_size=4).hexdigest()

    async def valid(self, token: str) -> bool:
        return await self._db.read(_valid, token, self._clock.now())

    def spend(self, query: Query, token: str) -> None:
        """Counts one use, in the write that makes the account. Raises Unauthorized."""
        if not _valid(query, token, self._clock.now()):
            raise Unauthorized(INVALID)
        query.run("UPDATE registration_tokens SET used = used + 1 WHERE token = $1", token)

    async def create(
        self, *, token: str | None = None, uses: int | None = None, expires_ms: int | None = None
    ) -> dict[str, Any]:
        """`expires_ms` is how long from now it lives."""
        if token is None:
            token = random_string(GENERATED_LENGTH)
        if not is_opaque(token) or len(token) > MAX_LENGTH:
            raise InvalidParam(f"A token has 1 to {MAX_LENGTH} letters, digits, _ or -. Choose another one, or none.")
        if uses is not None and uses < 1:
            raise InvalidParam("A token is good for at least one use. Leave the number out for any number.")
        if expires_ms is not None and expires_ms < 1:
            raise InvalidParam("A token lives at least for a moment. Leave the time out for one that never expires.")
        expires_ts = None if expires_ms is None else self._clock.now() + expires_ms

        def insert(query: Query) -> None:
            added = query.run(
                "INSERT INTO registration_tokens (token, uses, used, expires_ts) VALUES ($1, $2, 0, $3) ON CONFLICT (token) DO NOTHING",
                token,
                uses,
                expires_ts,
            )
            if not added:
                raise ApiError("There is such a token already. Revoke it first, or choose another one.")

        with self._db.write() as tx:
            tx.call(insert)
        await tx
        return {"token": token, "name": self.name_of(token), "uses": uses, "used": 0, "expires_ms": expires_ts}

    async def all(self) -> list[dict[str, Any]]:
        """`expires_ms` is the moment at which it expires, `name` what a flag calls it."""
        rows = await self._db.read(_all)
        return [
            {"token": token, "name": self.name_of(token), "uses": uses, "used": used, "expires_ms": expires_ts}
            for token, uses, used, expires_ts in rows
        ]

    async def revoke(self, *, token: str) -> dict[str, Any]:
        with self._db.write() as tx:
            tx.call(lambda query: query.run("DELETE FROM registration_tokens WHERE token = $1", token))
        if not await tx:
            raise NotFound("There is no such token. `relay token list` shows those there are.")
        return {"token": token}

    async def _validity_route(self, request: Request) -> Answer:
        if self._mode == "closed":
            raise Forbidden("New accounts are made by the operator of this server. Ask them for one.")
        return {"valid": await self.valid(get_string(request.query, "token"))}


def _valid(query: Query, token: str, now: int) -> bool:
    row = query.one("SELECT uses, used, expires_ts FROM registration_tokens WHERE token = $1", token)
    return row is not None and (row[0] is None or row[1] < row[0]) and (row[2] is None or now < row[2])


def _all(query: Query) -> list[tuple[Any, ...]]:
    return query.all("SELECT token, uses, used, expires_ts FROM registration_tokens ORDER BY token")
