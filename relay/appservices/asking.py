"""What the relay asks of a service: whether it has a user or a room address that nobody here knows, and whether it is there.

A service makes what it is asked for before it answers. Where it does not answer, the name counts as unknown.
Spec: application-service-api/#querying, #pinging, #legacy-routes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

import orjson
import structlog

from relay.accounts.users import Users
from relay.appservices.registration import Registration
from relay.appservices.services import Services
from relay.errors import ApiError, Forbidden, RemoteError
from relay.ids import server_of
from relay.part import Part
from relay.remote import SpeaksToServices
from relay.web import Answer, Request, Route, get_optional_string

log = structlog.get_logger("appservices")

APP = "/_matrix/app/v1"
QUERY_SECONDS = 10.0
PING_SECONDS = 10.0
MAX_ANSWER_BYTES = 1024 * 1024
MAX_PING_BODY = 2_000


class BadStatus(ApiError):
    """What a service answered to a ping, for its own log."""

    def __init__(self, status: int, said: bytes) -> None:
        super().__init__(
            f"The service answered with {status}. Check that its hs_token is the one in its registration.",
            status=502,
            errcode="M_BAD_STATUS",
        )
        self._said = {"status": status, "body": said[:MAX_PING_BODY].decode(errors="replace")}

    def body(self) -> dict[str, Any]:
        return {**super().body(), **self._said}


class Asking(Part):
    def __init__(self, services: Services, speaks: SpeaksToServices, users: Users) -> None:
        self._services = services
        self._speaks = speaks
        self._users = users

    def routes(self) -> Iterable[Route]:
        # The name that services look for where the standard's version is not enough.
        for stage in ("v1/appservice", "unstable/fi.mau.msc2659/appservice"):
            yield Route("POST", f"/_matrix/client/{stage}/{{appserviceId}}/ping", self._ping_route)

    # --- one request

    async def say(
        self,
        one: Registration,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        legacy: str | None = None,
        timeout: float,
    ) -> tuple[int, bytes]:
        """`path` lies under /_matrix/app/v1; `legacy` is where old services have it. Raises RemoteError."""
        status, said = 0, b""
        for where in (APP + path, legacy):
            if where is not None and one.url is not None:
                status, said = await self._speaks.request(
                    method, one.url + where, token=one.hs_token, body=body, timeout=timeout, most_bytes=MAX_ANSWER_BYTES
                )
                if not _unknown_route(status, said):
                    break
        return status, said

    # --- names that are not known here

    async def user_exists(self, user_id: str) -> bool:
        """Whether there is such an account, made by its service just now if need be."""
        if await self._users.exists(user_id):
            return True
        if server_of(user_id) != self._users.server_name:
            return False
        for one in self._services.all:
            if one.users.hold(user_id) and await self._has(one, f"/users/{quote(user_id, safe='')}"):
                if await self._users.exists(user_id):
                    return True
        return False

    async def alias_exists(self, alias: str) -> bool:
        """Whether a service has made this address just now."""
        for one in self._services.all:
            if one.aliases.hold(alias) and await self._has(one, f"/rooms/{quote(alias, safe='')}"):
                return True
        return False

    async def _has(self, one: Registration, path: str) -> bool:
        if one.url is None:
            return False
        try:
            status, _ = await self.say(one, "GET", path, legacy=path, timeout=QUERY_SECONDS)
        except RemoteError:
            log.info("an application service did not answer a question", name=one.id)
            return False
        return status == 200

    # --- is it there?

    async def _ping_route(self, request: Request) -> Answer:
        """Spec: application-service-api/#post_matrixclientv1appserviceappserviceidping"""
        if not request.who.service or request.who.service != request.params["appserviceId"]:
            raise Forbidden("Only an application service can ask this, of itself, with its own as_token.")
        one = self._services.get(request.who.service)
        txn = get_optional_string(request.optional_json(), "transaction_id")
        if one is None or one.url is None:
            raise ApiError(
                "The registration has no url, so this relay can't reach the service.", errcode="M_URL_NOT_SET"
            )
        body: dict[str, Any] = {} if txn is None else {"transaction_id": txn}
        began = time.monotonic()
        try:
            status, said = await self.say(one, "POST", "/ping", orjson.dumps(body), timeout=PING_SECONDS)
        except RemoteError as error:
            if error.status == 504:
                raise ApiError(
                    "The service did not answer in time. Look whether it is busy, and whether the url leads to it.",
                    status=504,
                    errcode="M_CONNECTION_TIMEOUT",
                ) from error
            raise ApiError(
                "The service could not be reached. Check the url in its registration, and that it runs.",
                status=502,
                errcode="M_CONNECTION_FAILED",
            ) from error
        if not 200 <= status < 300:
            raise BadStatus(status, said)
        return {"duration_ms": max(0, int((time.monotonic() - began) * 1000))}


def _unknown_route(status: int, said: bytes) -> bool:
    if status in (405, 501):
        return True
    if status != 404:
        return False
    try:
        body = orjson.loads(said)
    except orjson.JSONDecodeError:
        return True
    return not isinstance(body, dict) or body.get("errcode", "M_UNRECOGNIZED") == "M_UNRECOGNIZED"
