"""One signed request to another server, and its answer: found, signed, sent, bounded, checked, and every failure a RemoteError.

Not about what is asked (`client.py`, `outbox.py`). Spec: server-server-api/#api-standards, #request-authentication.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
import msgspec
import orjson
from yarl import URL

from federation.backoff import Backoff
from federation.discovery import Discovery, Route
from federation.exchange import Reply
from federation.outward import AnswerTooLarge, Outward, read_at_most
from federation.xmatrix import authorization
from relay.clock import HOUR, SECOND
from relay.doors import Doors
from relay.errors import BadJson, RemoteError
from relay.protocol.canonical import encode
from relay.protocol.signing import SigningKey
from relay.web import require_shallow

A = TypeVar("A", bound=msgspec.Struct)

MAX_ANSWER_BYTES = 16 * 2**20
MAX_ERROR_BYTES = 64 * 1024
MAX_ERROR_TEXT = 300
KEYS_PATH = "/_matrix/key/v2/server"
MAX_KEYS_BYTES = 256 * 1024
MAX_TARGETS = 4
MAX_RETRY_AFTER = HOUR

# Said by what stands before a server that is down, and by no server about one question.
_DOWN = frozenset({502, 503, 504})


def path(prefix: str, *segments: str, query: Sequence[tuple[str, str]] = ()) -> str:
    """A request target: `prefix` as it is, then segments and query percent-encoded."""
    target = "/".join((prefix, *(quote(segment, safe="") for segment in segments)))
    return f"{target}?{urlencode(query, quote_via=quote, safe='')}" if query else target


class Connections:
    """Where `forced`, a server that could not be reached lately is tried all the same: a person waits for the answer."""

    def __init__(
        self,
        server_name: str,
        key: SigningKey,
        discovery: Discovery,
        outward: Outward,
        backoff: Backoff,
        doors: Doors,
        *,
        timeout: float,
    ) -> None:
        self.server_name = server_name
        self.timeout = timeout
        self._key = key
        self._discovery = discovery
        self._outward = outward
        self._backoff = backoff
        self._doors = doors

    def left_alone(self, server: str) -> int:
        """Milliseconds until it is asked again what nobody waits for."""
        return self._backoff.wait_left(server)

    async def get(
        self,
        server: str,
        target: str,
        *,
        forced: bool = False,
        most_bytes: int = MAX_ANSWER_BYTES,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        answer = await self.open(server, "GET", target, forced=forced, timeout=timeout)
        return await self._json(server, answer, most_bytes)

    async def send(
        self,
        server: str,
        method: str,
        target: str,
        content: dict[str, Any] | bytes,
        *,
        forced: bool = False,
        most_bytes: int = MAX_ANSWER_BYTES,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """`content` as bytes is canonical JSON already."""
        body = content if isinstance(content, bytes) else encode(content)
        answer = await self.open(server, method, target, body=body, forced=forced, timeout=timeout)
        return await self._json(server, answer, most_bytes)

    async def server_keys(self, server: str) -> dict[str, Any]:
        """For the keyring. Unsigned, since that needs no proof; and forced, since the keyring has a memory of its own."""
        answer = await self.open(server, "GET", KEYS_PATH, signed=False, forced=True)
        return await self._json(server, answer, MAX_KEYS_BYTES)

    async def notary_keys(self, notary: str, server: str) -> dict[str, Any]:
        """The keys of a server as another one knows them."""
        return await self.send(
            notary,
            "POST",
            "/_matrix/key/v2/query",
            {"server_keys": {server: {}}},
            forced=True,
            most_bytes=MAX_KEYS_BYTES,
        )

    async def open(
        self,
        server: str,
        method: str,
        target: str,
        *,
        body: bytes | None = None,
        forced: bool = False,
        signed: bool = True,
        timeout: float | None = None,
    ) -> Reply:
        """An answer with status 200, its body still to be read by the caller, who releases it. Raises RemoteError."""
        if server == self.server_name:
            raise RemoteError(server, 0, "this server does not ask itself")
        if not forced:
            self._backoff.require(server)
        await self._doors.server(server)
        route = await self._discovery.route(server)
        headers = {"Host": route.host_header}
        if signed:
            headers["Authorization"] = authorization(method, target, self.server_name, server, body, self._key)
        if body is not None:
            headers["Content-Type"] = "application/json"
        answer = await self._reach(server, route, method, target, headers, body, timeout or self.timeout)
        if answer.status == 200:
            self._backoff.succeeded(server)
            return answer
        try:
            raise await self._refusal(server, answer)
        finally:
            answer.release()

    async def fetch(self, url: URL, *, timeout: float) -> Reply:
        """An unsigned request to a plain address that another server named. Raises what aiohttp raises."""
        return await self._outward.request("GET", url, timeout=timeout)

    async def _reach(
        self,
        server: str,
        route: Route,
        method: str,
        target: str,
        headers: dict[str, str],
        body: bytes | None,
        timeout: float,
    ) -> Reply:
        reason = "it has no address"
        cause: BaseException | None = None
        for host, port in route.targets[:MAX_TARGETS]:
            url = URL(f"https://{f'[{host}]' if ':' in host else host}:{port}{target}", encoded=True)
            try:
                return await self._outward.request(
                    method, url, headers=headers, body=body, tls_name=route.tls_name, timeout=timeout
                )
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                reason, cause = _why(error), error
            except TimeoutError as error:
                # It was reached and is slow: that is no reason to leave it alone.
                raise RemoteError(server, 0, "it took too long to answer") from error
            except (aiohttp.ClientError, OSError, ValueError) as error:
                reason, cause = _why(error), error
                break
        self._discovery.forget(server)
        self._backoff.failed(server)
        raise RemoteError(server, 0, reason) from cause

    async def _refusal(self, server: str, answer: Reply) -> RemoteError:
        status = answer.status
        try:
            body = orjson.loads(await read_at_most(answer, MAX_ERROR_BYTES))
        except (AnswerTooLarge, aiohttp.ClientError, OSError, TimeoutError, orjson.JSONDecodeError):
            body = None
        errcode = body.get("errcode") if isinstance(body, dict) else None
        # With an error code it is the server itself that speaks, of one file or one room.
        if status in _DOWN and not isinstance(errcode, str):
            self._backoff.failed(server)
        elif status == 429:
            self._backoff.failed(server, _retry_after(answer))
        else:
            self._backoff.succeeded(server)
        if not isinstance(body, dict):
            return RemoteError(server, status, f"it answered with the status {status}", "M_UNKNOWN")
        text = body.get("error")
        return RemoteError(
            server,
            status,
            text[:MAX_ERROR_TEXT] if isinstance(text, str) else f"it answered with the status {status}",
            errcode if isinstance(errcode, str) and len(errcode) <= MAX_ERROR_TEXT else "M_UNKNOWN",
            body,
        )

    async def fragments(
        self,
        kind: type[A],
        server: str,
        method: str,
        target: str,
        content: bytes | None,
        *,
        forced: bool = False,
        most_bytes: int,
        timeout: float,
    ) -> A:
        """A large answer, of which the parts stay bytes until each is looked at: parsed at once, a room's state would take
        ten times the memory."""
        answer = await self.open(server, method, target, body=content, forced=forced, timeout=timeout)
        body = await self._body(server, answer, most_bytes)
        try:
            return await asyncio.to_thread(msgspec.json.decode, body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RemoteError(server, answer.status, "its answer is not of the form that was asked for") from error

    async def _json(self, server: str, answer: Reply, most_bytes: int) -> dict[str, Any]:
        body = await self._body(server, answer, most_bytes)
        try:
            value = orjson.loads(body)
            require_shallow(value)
        except (orjson.JSONDecodeError, BadJson) as error:
            raise RemoteError(server, answer.status, "its answer is not JSON") from error
        if not isinstance(value, dict):
            raise RemoteError(server, answer.status, "its answer is not a JSON object")
        return value

    async def _body(self, server: str, answer: Reply, most_bytes: int) -> bytes:
        try:
            if answer.content_type != "application/json":
                raise RemoteError(server, answer.status, "its answer is not JSON")
            return await read_at_most(answer, most_bytes)
        except AnswerTooLarge:
            answer.close()
            raise RemoteError(server, answer.status, f"its answer is larger than {most_bytes} bytes") from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise RemoteError(server, 0, "its answer broke off") from error
        finally:
            answer.release()


def _retry_after(answer: Reply) -> int:
    text = answer.headers.get("Retry-After", "")
    return min(MAX_RETRY_AFTER, int(text) * SECOND) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _why(error: BaseException) -> str:
    """For people, without addresses."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError) or isinstance(
        error.__cause__, ssl.SSLCertVerificationError
    ):
        return "its certificate is not valid for its name"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its name has no address that may be connected to"
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
        return "no secure connection could be made"
    if isinstance(error, aiohttp.ClientConnectorError | TimeoutError):
        return "it could not be reached"
    return "the connection broke off"
