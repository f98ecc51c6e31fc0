"""HTTP connections as strangers use them, below the routes: what is no HTTP gets a proper refusal, what stands still is ended.

Nothing of what a peer did wrong becomes a line of the log: it could be repeated until the disk is full.
Spec: client-server-api/#standard-error-response.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.web_protocol import RequestHandler

from relay.errors import ApiError, TooLarge

# The path, and each header.
MAX_LINE = 8192
# Between two requests, and for the whole head of one.
IDLE_SECONDS = 75.0
# For a whole body that is read into memory, and between two pieces of one that is not.
BODY_SECONDS = 300.0
PAUSE_SECONDS = 60.0
# How long the rest of a refused body is read away, so that the peer gets to see the refusal.
LINGER_SECONDS = 5.0
# Larger answers are not copied behind their head.
ONE_PIECE_BYTES = 64 * 1024

Answers = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Refusal = Callable[[ApiError], web.Response]


class Listening(web.Server):
    """`refusal` makes the answer for what does not even reach `answer`."""

    def __init__(self, answer: Answers, refusal: Refusal) -> None:
        super().__init__(
            answer,
            access_log=None,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=LINGER_SECONDS,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
        )
        self._refusal = refusal

    def __call__(self) -> RequestHandler:
        return _Connection(self, self._refusal, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    __slots__ = ("_refusal",)

    def __init__(self, server: Listening, refusal: Refusal, **rest: Any) -> None:
        super().__init__(server, **rest)
        self._refusal = refusal

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        if isinstance(exc, LineTooLong):
            error: ApiError = TooLarge(f"The path or a header is longer than {MAX_LINE} bytes.", status=431)
        else:
            error = ApiError("This is not a request by the rules of HTTP.", status=400)
        answer = self._refusal(error)
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **rest: Any) -> None:
        if not isinstance(rest.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **rest)


class OnePiece(web.StreamResponse):
    """An ordinary answer, written with its head at once: half the work of one that could still become anything else.

    `head` is the status line and the headers that are always the same."""

    def __init__(self, head: bytes, body: bytes) -> None:
        super().__init__()
        self._piece = (head, body)
        self._keep_alive = True

    @staticmethod
    def fits(http: web.BaseRequest, body: bytes) -> bool:
        return (
            len(body) <= ONE_PIECE_BYTES and http.version == HttpVersion11 and http.keep_alive and http.method != "HEAD"
        )

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        head, body = self._piece
        rest = f"Content-Length: {len(body)}\r\nDate: {rfc822_formatted_time()}\r\n\r\n"
        # A connection holds its last answer for as long as it rests: the bytes are let go.
        del self._piece
        await request.writer.write_eof(b"".join((head, rest.encode(), body)))
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


def head_of(headers: Mapping[str, str]) -> bytes:
    """What `OnePiece` begins with."""
    lines = ("HTTP/1.1 200 OK", *(f"{name}: {value}" for name, value in headers.items()), "")
    return "\r\n".join(lines).encode()


async def whole(http: web.BaseRequest, most: int) -> bytes:
    """The whole body, if it is not larger than `most` bytes. Raises TooLarge before it reads more."""
    length = http.content_length
    if length is not None and length > most:
        raise _too_large(most)
    if http.content.is_eof():
        # Mostly it came in one piece with the head, and there is nothing to wait for.
        body = http.content.read_nowait()
        if len(body) > most:
            raise _too_large(most)
        return body
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while chunk := await http.content.readany():
                size += len(chunk)
                if size > most:
                    raise _too_large(most)
                chunks.append(chunk)
    except TimeoutError:
        raise _late() from None
    return b"".join(chunks)


async def pieces(http: web.BaseRequest) -> AsyncIterator[bytes]:
    """The body as it arrives."""
    while True:
        try:
            async with asyncio.timeout(PAUSE_SECONDS):
                piece = await http.content.readany()
        except TimeoutError:
            raise _late() from None
        if not piece:
            return
        yield piece


def _too_large(most: int) -> TooLarge:
    return TooLarge(f"The body is larger than {most} bytes.")


def _late() -> ApiError:
    return ApiError("The rest of the request did not come in time. Send it again.", status=408)
