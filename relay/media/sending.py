"""How a file goes out over HTTP: its headers, a part of it, or none of it (HEAD).

What can't be proven harmless is sent as something that a browser only saves.
Spec: client-server-api/#content-repository, #serving-inline-content; RFC 9110 section 14 for ranges.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from urllib.parse import quote

import structlog
from aiohttp import web

from relay.errors import ApiError, RemoteError
from relay.web import HEADERS, Request

log = structlog.get_logger("media")

UNKNOWN_TYPE = "application/octet-stream"
MAX_FILE_NAME = 255
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})\Z")
_INLINE = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp", "image/avif"})

_FIXED = {
    **HEADERS,
    "Access-Control-Expose-Headers": "Content-Disposition, Content-Range, Retry-After",
    "Content-Security-Policy": (
        "sandbox; default-src 'none'; script-src 'none'; plugin-types application/pdf; style-src 'unsafe-inline'; object-src 'self';"
    ),
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A file never changes; only the one who fetched it may keep it.
    "Cache-Control": "private, max-age=86400, immutable",
}

Blocks = Callable[[int, int], AsyncIterator[bytes]]


def disposition(content_type: str, file_name: str | None) -> str:
    kind = "inline" if content_type in _INLINE else "attachment"
    if not file_name:
        return kind
    name = "".join(c for c in file_name[:MAX_FILE_NAME] if c.isprintable() and c not in "/\\")
    if name.isascii() and '"' not in name:
        return f'{kind}; filename="{name}"'
    return f"{kind}; filename*=utf-8''{quote(name, safe='')}"


def part_of(header: str | None, size: int) -> tuple[int, int] | None:
    """(start, stop) of the one range that is asked for; None for the whole. Raises ApiError 416 where it lies outside."""
    found = _RANGE.match(header.strip()) if header else None
    if found is None or found[0] == "bytes=-":  # several ranges, or another unit: the whole is a right answer
        return None
    first, last = found[1], found[2]
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    else:
        start, stop = max(0, size - int(last)), size
    if start >= size or start >= stop:
        raise ApiError(
            f"The file has {size} bytes, and the range that was asked for lies outside.",
            status=416,
            errcode="M_INVALID_PARAM",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, stop


def _begin(content_type: str, file_name: str | None, status: int = 200) -> web.StreamResponse:
    headers = {**_FIXED, "Content-Type": content_type, "Content-Disposition": disposition(content_type, file_name)}
    return web.StreamResponse(status=status, headers=headers)


async def send(
    request: Request, size: int, blocks: Blocks, content_type: str, file_name: str | None
) -> web.StreamResponse:
    """A file of known size whose parts can be had."""
    part = part_of(request.http.headers.get("Range"), size)
    start, stop = part or (0, size)
    response = _begin(content_type, file_name, 200 if part is None else 206)
    response.headers["Accept-Ranges"] = "bytes"
    if part is not None:
        response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    response.content_length = stop - start
    await response.prepare(request.http)
    if request.http.method != "HEAD":
        try:
            async for block in blocks(start, stop):
                await response.write(block)
        except (OSError, RemoteError) as error:
            _break_off(request, error)
    return response


async def send_stream(
    request: Request, length: int | None, chunks: AsyncIterator[bytes], content_type: str, file_name: str | None
) -> web.StreamResponse:
    """A file that passes through, whole; its length may be unknown. Raises what `chunks` raises before its first byte."""
    first = await anext(chunks, b"") if request.http.method != "HEAD" else b""
    response = _begin(content_type, file_name)
    if length is not None:
        response.content_length = length
    await response.prepare(request.http)
    if request.http.method != "HEAD":
        try:
            if first:
                await response.write(first)
            async for chunk in chunks:
                await response.write(chunk)
        except (OSError, RemoteError, ApiError) as error:
            _break_off(request, error)
    return response


def _break_off(request: Request, error: Exception) -> None:
    # The headers are out: only a broken connection can still say that this is not the whole file.
    if not isinstance(error, (ConnectionError, ApiError)):
        log.warning("a file broke off on its way out", exc_info=error)
    if request.http.transport is not None:
        request.http.transport.abort()
