"""One HTTP exchange over a connection of aiohttp's pool: the request written as it is, the answer read by aiohttp's parser.

aiohttp's own client session puts each request together from everything it could be (cookies, forms, redirects, proxies,
uploads), which costs more than all the rest of a transaction. Pool, addresses, TLS, HTTP and time are aiohttp's here too.
Not about whom to ask (`outward.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.helpers import BaseTimerContext, TimeoutHandle, parse_mimetype
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawResponseMessage
from yarl import URL

MAX_HEADER_BYTES = 16 * 1024
MAX_HEADERS = 128
READ_BUFFER_BYTES = 64 * 1024
# Larger bodies are not copied behind their head.
ONE_PIECE_BYTES = 64 * 1024
MAX_PLACES = 2_000

# What may be done twice: where a kept connection turns out to be closed, it is tried once more on another.
_IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})


class Reply:
    """Its body is still to be read, by one who releases it."""

    __slots__ = ("_connection", "_timer", "content", "headers", "status")

    def __init__(
        self,
        message: RawResponseMessage,
        content: aiohttp.StreamReader,
        connection: Connection,
        timer: asyncio.TimerHandle | None,
    ) -> None:
        self.status = message.code
        self.headers: Mapping[str, str] = message.headers
        self.content = content
        self._connection = connection
        self._timer = timer

    @property
    def content_type(self) -> str:
        """Without its parameters."""
        kind = parse_mimetype(self.headers.get("Content-Type", ""))
        return f"{kind.type}/{kind.subtype}"

    @property
    def content_length(self) -> int | None:
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() else None

    async def read(self) -> bytes:
        """The whole body, however large."""
        return await self.content.read()

    def release(self) -> None:
        """The connection is kept, if everything was read."""
        self._over()
        self._connection.release()

    def close(self) -> None:
        self._over()
        self._connection.close()

    def _over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Exchanges:
    """Over the connections of `pool`, which it closes."""

    def __init__(self, pool: aiohttp.TCPConnector, *, connect_seconds: float) -> None:
        self._pool = pool
        self._timeouts = aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds)
        self._loop = asyncio.get_running_loop()
        # What the pool tells connections apart by; in the order of their making.
        self._places: dict[tuple[str, str | None, int | None, str | None], aiohttp.ClientRequest] = {}

    async def request(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        body: bytes | None,
        tls_name: str | None,
        timeout: float,
    ) -> Reply:
        """Raises aiohttp.ClientError, OSError and TimeoutError. `timeout` bounds everything up to the body's last byte."""
        written = _written(method, url, headers, body)
        place = self._place(url, tls_name)
        deadline = TimeoutHandle(self._loop, timeout)
        handle, timer = deadline.start(), deadline.timer()
        try:
            with timer:
                try:
                    return await self._exchange(place, written, method, timer, handle)
                except aiohttp.ClientConnectorError:
                    raise
                except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
                    if method not in _IDEMPOTENT:
                        raise
                    return await self._exchange(place, written, method, timer, handle)
        except BaseException:
            if handle is not None:
                handle.cancel()
            raise

    async def close(self) -> None:
        await self._pool.close()

    async def _exchange(
        self,
        place: aiohttp.ClientRequest,
        written: tuple[bytes, ...],
        method: str,
        timer: BaseTimerContext,
        handle: asyncio.TimerHandle | None,
    ) -> Reply:
        try:
            connection = await self._pool.connect(place, [], self._timeouts)
        except TimeoutError as error:
            raise aiohttp.ConnectionTimeoutError("no connection in time") from error
        try:
            protocol, transport = connection.protocol, connection.transport
            if protocol is None or transport is None or transport.is_closing():
                raise aiohttp.ServerDisconnectedError
            protocol.set_response_params(
                timer=timer,
                skip_payload=method == "HEAD",
                auto_decompress=False,
                read_bufsize=READ_BUFFER_BYTES,
                max_line_size=MAX_HEADER_BYTES,
                max_field_size=MAX_HEADER_BYTES,
                max_headers=MAX_HEADERS,
                read_until_eof=True,
            )
            for piece in written:
                transport.write(piece)
            message, content = await _first_of(protocol)
            return Reply(message, content, connection, handle)
        except BaseException:
            connection.close()
            raise

    def _place(self, url: URL, tls_name: str | None) -> aiohttp.ClientRequest:
        key = (url.scheme, url.host, url.port, tls_name)
        place = self._places.get(key)
        if place is None:
            if len(self._places) >= MAX_PLACES:
                del self._places[next(iter(self._places))]
            place = self._places[key] = aiohttp.ClientRequest(
                "GET", url.origin(), loop=self._loop, session=_NO_SESSION, server_hostname=tls_name
            )
        return place


# The pool looks at a request's place and never at its session.
_NO_SESSION: Any = None


async def _first_of(protocol: ResponseHandler) -> tuple[RawResponseMessage, aiohttp.StreamReader]:
    """The answer itself, behind what may come before it. Spec: RFC 9110, section 15.2"""
    while True:
        try:
            message, content = await protocol.read()
        except HttpProcessingError as error:
            raise aiohttp.ClientConnectionError("what it answered is not HTTP") from error
        if not 100 <= message.code <= 199 or message.code == 101:
            return message, content


def _written(method: str, url: URL, headers: Mapping[str, str], body: bytes | None) -> tuple[bytes, ...]:
    """Raises ValueError where something would begin a line of its own."""
    lines = [f"{method} {url.raw_path_qs} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if "Host" not in headers:
        lines.append(f"Host: {url.host_port_subcomponent}")
    if url.raw_user is not None and "Authorization" not in headers:
        lines.append(f"Authorization: {aiohttp.encode_basic_auth(url.user or '', url.password or '')}")
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    head = "\r\n".join((*lines, "", "")).encode()
    if head.count(b"\n") != len(lines) + 1 or head.count(b"\r") != len(lines) + 1 or b"\0" in head:
        raise ValueError("a header must not hold a line's end")
    if body is None:
        return (head,)
    return (head + body,) if len(body) <= ONE_PIECE_BYTES else (head, body)
