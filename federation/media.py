"""Files between servers: our own handed out, theirs fetched; both streamed, never whole in memory.

An answer is multipart/mixed with two parts: a JSON object, then the bytes or the place where they are. What is kept of a
file, and under which type it is shown, is `relay/media`'s business. Spec: server-server-api/#content-repository.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterable
from typing import Protocol

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from federation.connections import Connections, path
from federation.exchange import Reply
from relay.errors import NotFound, RemoteError
from relay.media.routes import LocalMedia
from relay.media.sending import disposition
from relay.part import Part
from relay.remote import RemoteMedia
from relay.web import Answer, Request, Route

DOWNLOAD = "/_matrix/federation/v1/media/download"
THUMBNAIL = "/_matrix/federation/v1/media/thumbnail"
LEGACY_DOWNLOAD = "/_matrix/media/v3/download"

CHUNK_BYTES = 64 * 1024
MAX_METADATA_BYTES = 64 * 1024
MAX_HEADER_VALUE = 1024
MAX_REDIRECTS = 3
DOWNLOAD_SECONDS = 300.0
OCTETS = "application/octet-stream"
# What the multipart reader raises for whatever a peer may send.
_BROKEN = (
    aiohttp.ClientError,
    HttpProcessingError,
    OSError,
    TimeoutError,
    ValueError,
    LookupError,
    RuntimeError,
    AssertionError,
)


class OffersMedia(Protocol):
    """`relay/media` offers what was uploaded here."""

    async def local_media(self, media_id: str) -> LocalMedia:
        """Raises NotFound, and what the standard names for a file that is not there yet."""
        ...


class ServesMedia(Part):
    """Only files of this server, only to servers that say who they are."""

    def __init__(self, offers: OffersMedia) -> None:
        self._offers = offers

    def routes(self) -> Iterable[Route]:
        for prefix, function in ((DOWNLOAD, self._download), (THUMBNAIL, self._thumbnail)):
            yield Route(
                "GET", f"{prefix}/{{mediaId}}", function, auth="server", limit="federation", serves="federation"
            )

    async def _download(self, request: Request) -> Answer:
        return await _send(request, await self._offers.local_media(request.params["mediaId"]))

    async def _thumbnail(self, request: Request) -> Answer:
        """The picture itself, which the standard allows; nobody makes a small one of ciphertext."""
        media = await self._offers.local_media(request.params["mediaId"])
        if not media.content_type.startswith("image/"):
            media.reader.close()
            raise NotFound("This file is not a readable picture, so it has no thumbnail. Download the file itself.")
        return await _send(request, media)


async def _send(request: Request, media: LocalMedia) -> web.StreamResponse:
    with media.reader as reader:
        boundary = secrets.token_hex(16)
        before = (
            f"--{boundary}\r\nContent-Type: application/json\r\n\r\n{{}}\r\n"
            f"--{boundary}\r\nContent-Type: {_one_line(media.content_type)}\r\n"
            f"Content-Disposition: {_one_line(disposition(media.content_type, media.file_name))}\r\n\r\n"
        ).encode()
        after = f"\r\n--{boundary}--\r\n".encode()
        answer = web.StreamResponse(headers={"Content-Type": f"multipart/mixed; boundary={boundary}"})
        answer.content_length = len(before) + reader.size + len(after)
        await answer.prepare(request.http)
        if request.http.method != "HEAD":
            await answer.write(before)
            async for block in reader.blocks():
                await answer.write(block)
            await answer.write(after)
        await answer.write_eof()
    return answer


def _one_line(value: str) -> str:
    """A header's value: no control characters, so that it can't begin another header."""
    return "".join(character for character in value if character.isprintable())[:MAX_HEADER_VALUE]


async def fetch(connections: Connections, server: str, media_id: str, most_bytes: int) -> RemoteMedia:
    """A file of another server. The chunks have to be read to their end, or closed. Raises RemoteError, also while reading."""
    try:
        answer = await connections.open(server, "GET", path(DOWNLOAD, media_id), forced=True, timeout=DOWNLOAD_SECONDS)
    except RemoteError as error:
        if error.status != 404 or error.errcode != "M_UNRECOGNIZED":
            raise
        # A server from before authenticated media.
        target = path(LEGACY_DOWNLOAD, server, media_id, query=(("allow_remote", "false"),))
        answer = await connections.open(server, "GET", target, forced=True, signed=False, timeout=DOWNLOAD_SECONDS)
        return _plain(server, answer, most_bytes)
    try:
        return await _second_part(connections, server, answer, most_bytes)
    except _BROKEN as error:
        answer.close()
        raise RemoteError(server, 502, "its answer broke off or is malformed") from error
    except BaseException:
        answer.close()
        raise


async def _second_part(connections: Connections, server: str, answer: Reply, most_bytes: int) -> RemoteMedia:
    if answer.content_type != "multipart/mixed":
        raise RemoteError(server, 502, "its answer is not multipart/mixed")
    if answer.content_length is not None and answer.content_length > most_bytes + MAX_METADATA_BYTES:
        raise _too_large(server, most_bytes)
    reader = aiohttp.MultipartReader(answer.headers, answer.content)
    metadata = await reader.next()
    if not isinstance(metadata, aiohttp.BodyPartReader):
        raise RemoteError(server, 502, "its answer has no first part")
    read = 0
    while chunk := await metadata.read_chunk(CHUNK_BYTES):
        read += len(chunk)
        if read > MAX_METADATA_BYTES:
            raise RemoteError(server, 502, "the first part of its answer is too large")
    part = await reader.next()
    if not isinstance(part, aiohttp.BodyPartReader):
        raise RemoteError(server, 502, "its answer has no second part")
    location = part.headers.get("Location")
    if location is not None:
        answer.close()
        return await _elsewhere(connections, server, location, most_bytes)
    return RemoteMedia(
        part.headers.get("Content-Type", OCTETS)[:MAX_HEADER_VALUE],
        _short(part.headers.get("Content-Disposition")),
        _part_chunks(server, answer, part, most_bytes),
    )


async def _part_chunks(
    server: str, answer: Reply, part: aiohttp.BodyPartReader, most_bytes: int
) -> AsyncIterator[bytes]:
    size = 0
    try:
        while chunk := await part.read_chunk(CHUNK_BYTES):
            size += len(chunk)
            if size > most_bytes:
                raise _too_large(server, most_bytes)
            yield chunk
        if not part.at_eof():
            raise RemoteError(server, 502, "the file broke off")
    except _BROKEN as error:
        raise RemoteError(server, 502, "the file broke off") from error
    finally:
        answer.release()


async def _elsewhere(connections: Connections, server: str, location: str, most_bytes: int) -> RemoteMedia:
    """The bytes lie at another address, which the server vouches for: unsigned, over TLS, no private addresses."""
    try:
        url = URL(location)
        for _ in range(MAX_REDIRECTS + 1):
            answer = await connections.fetch(url, timeout=DOWNLOAD_SECONDS)
            if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                url = url.join(URL(answer.headers["Location"]))
                answer.release()
                continue
            if answer.status != 200:
                answer.release()
                raise RemoteError(server, 502, f"the place it names for the file answered {answer.status}")
            return _plain(server, answer, most_bytes)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise RemoteError(server, 502, "the place it names for the file could not be reached") from error
    raise RemoteError(server, 502, "the place it names for the file is never reached")


def _plain(server: str, answer: Reply, most_bytes: int) -> RemoteMedia:
    if answer.content_length is not None and answer.content_length > most_bytes:
        answer.close()
        raise _too_large(server, most_bytes)
    return RemoteMedia(
        answer.headers.get("Content-Type", OCTETS)[:MAX_HEADER_VALUE],
        _short(answer.headers.get("Content-Disposition")),
        _plain_chunks(server, answer, most_bytes),
        answer.content_length,
    )


async def _plain_chunks(server: str, answer: Reply, most_bytes: int) -> AsyncIterator[bytes]:
    size = 0
    try:
        async for chunk in answer.content.iter_any():
            size += len(chunk)
            if size > most_bytes:
                raise _too_large(server, most_bytes)
            yield chunk
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise RemoteError(server, 502, "the file broke off") from error
    finally:
        answer.release()


def _short(value: str | None) -> str | None:
    return None if value is None else value[:MAX_HEADER_VALUE]


def _too_large(server: str, most_bytes: int) -> RemoteError:
    return RemoteError(server, 502, f"the file is larger than {most_bytes} bytes", "M_TOO_LARGE")
