"""Uploads and downloads, for people with a session only. What is answered to an upload is on disk, file and row.

The seal decides what may be stored: a readable picture waits in memory until a profile or a room names it (`adopt`).
Thumbnails are the avatars themselves; the old download paths, which needed no session, are frozen.
Spec: client-server-api/#content-repository.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from relay.clock import DAY, HOUR, SECOND, Clock
from relay.config import Media as MediaSettings
from relay.db import Database, Query, Row
from relay.doors import Doors, Inspector
from relay.errors import ApiError, Forbidden, InvalidParam, LimitExceeded, MissingParam, NotFound, Refused, TooLarge
from relay.ids import is_opaque, is_server_name
from relay.media.files import Reader, Store, new_media_id
from relay.media.remote_copies import LOOK, Kept, RemoteCopies
from relay.media.sending import MAX_FILE_NAME, UNKNOWN_TYPE, send, send_stream
from relay.media.waiting import MAX_PICTURE, Waiting, picture_type
from relay.part import Finding, Part
from relay.protocol.readable import HEAD_BYTES, TextWatch
from relay.protocol.seal import Seal
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route
from relay.wire import pieces

# Addresses that were asked for before the upload. Spec: client-server-api/#post_matrixmediav1create
EMPTY_FOR = DAY
MAX_EMPTY = 20
EMPTY = -1
MAX_WAIT_MS = 60 * SECOND
DEFAULT_WAIT_MS = 20 * SECOND
SWEEP_INTERVAL = HOUR
MAX_CONTENT_TYPE = 255

# The column `readable`.
CIPHERTEXT, AVATAR, SEAL_OPEN = 0, 1, 2

_LIFE = "until it is deleted"
_INSERT = "INSERT INTO media (media_id, uploader, created_ts, size, readable, content_type, file_name) VALUES ($1, $2, $3, $4, $5, $6, $7)"
_FILL = "UPDATE media SET size = $4, readable = $5, content_type = $6, file_name = $7, created_ts = $3 WHERE media_id = $1 AND uploader = $2"


@dataclass(frozen=True, slots=True)
class LocalMedia:
    """A file of ours, for other servers. Close `reader`."""

    reader: Reader
    content_type: str
    file_name: str | None


@dataclass(frozen=True, slots=True)
class _Row:
    uploader: str
    created_ts: int
    size: int
    readable: int
    content_type: str | None
    file_name: str | None


class Media(Part):
    schema = Schema(
        "media",
        tables=(
            Table(
                "media",
                "a file uploaded here",
                {
                    "media_id": ("its ID, and its name in our folder", _LIFE),
                    "uploader": ("whose it is: who may fill it, and erase it", _LIFE),
                    "created_ts": ("when it came, to the hour", _LIFE),
                    "size": ("bytes; -1 for an address that waits for its upload", _LIFE),
                    "readable": ("1: an avatar, 2: taken while the seal was open", _LIFE),
                    "content_type": ("of a readable file only: how it is served", _LIFE),
                    "file_name": ("only where the seal was open", _LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE media (media_id TEXT PRIMARY KEY, uploader TEXT NOT NULL, created_ts BIGINT NOT NULL, size BIGINT NOT NULL,
                readable SMALLINT NOT NULL DEFAULT 0, content_type TEXT, file_name TEXT);
            CREATE INDEX media_of_uploader ON media (uploader);
            CREATE INDEX media_not_filled ON media (created_ts) WHERE size < 0
            """,
        ),
    )

    def __init__(
        self,
        db: Database,
        clock: Clock,
        settings: MediaSettings,
        seal: Seal,
        doors: Doors,
        copies: RemoteCopies,
        server_name: str,
        folder: Path,
    ) -> None:
        self._db = db
        self._clock = clock
        self._settings = settings
        self._seal = seal
        self._doors = doors
        self._server_name = server_name
        self._waiting = Waiting(clock)
        self._arrivals: dict[str, asyncio.Event] = {}
        # Looks at what is about to be kept; the server sets it to the moderators' and the operator's rules.
        self.inspector: Inspector | None = None
        self.store = Store(folder)
        self.copies = copies

    def routes(self) -> Iterable[Route]:
        new, old = "/_matrix/client/v1/media", "/_matrix/media"
        yield Route("GET", f"{new}/config", self._config)
        yield Route("GET", f"{new}/download/{{server}}/{{media_id}}", self._download, limit="media")
        yield Route("GET", f"{new}/download/{{server}}/{{media_id}}/{{file_name}}", self._download, limit="media")
        yield Route("GET", f"{new}/thumbnail/{{server}}/{{media_id}}", self._thumbnail, limit="media")
        yield Route("POST", f"{old}/v1/create", self._create, limit="media")
        for version in ("v3", "r0", "v1"):
            yield Route("GET", f"{old}/{version}/config", self._config)
            yield Route("POST", f"{old}/{version}/upload", self._upload, limit="media", body="stream")
            yield Route(
                "PUT", f"{old}/{version}/upload/{{server}}/{{media_id}}", self._fill, limit="media", body="stream"
            )
            for path in (
                "download/{server}/{media_id}",
                "download/{server}/{media_id}/{file_name}",
                "thumbnail/{server}/{media_id}",
            ):
                yield Route("GET", f"{old}/{version}/{path}", self._frozen, auth="none", limit="media", body="stream")

    async def _config(self, request: Request) -> Answer:
        return {"m.upload.size": int(self._settings.max_upload_bytes)}

    async def _frozen(self, request: Request) -> Answer:
        raise NotFound(
            "Files are served only to people with a session here, under /_matrix/client/v1/media. A newer client knows that."
        )

    # --- in

    async def _upload(self, request: Request) -> Answer:
        return {"content_uri": self._address(await self._take_in(request, None))}

    async def _create(self, request: Request) -> Answer:
        """An address for an upload that follows."""
        media_id, user_id, now = new_media_id(), request.user_id, self._clock.now()

        def make(query: Query) -> None:
            empty = int(query.value("SELECT count(*) FROM media WHERE uploader = $1 AND size < 0", user_id) or 0)
            if empty >= MAX_EMPTY:
                raise LimitExceeded(HOUR / SECOND)
            query.run(_INSERT, media_id, user_id, _hour(now), EMPTY, CIPHERTEXT, None, None)

        with self._db.write() as tx:
            tx.call(make)
        await tx
        return {"content_uri": self._address(media_id), "unused_expires_at": _hour(now) + EMPTY_FOR}

    async def _fill(self, request: Request) -> Answer:
        media_id = request.params["media_id"]
        row = await self._row(media_id) if request.params["server"] == self._server_name else None
        if row is None or row.uploader != request.user_id:
            raise Forbidden("You did not create this address, or it has expired. Create a new one.")
        if row.size != EMPTY or self._waiting.get(media_id) is not None:
            raise ApiError(
                "This address has its file already. Create a new one.", status=409, errcode="M_CANNOT_OVERWRITE_MEDIA"
            )
        if media_id in self._arrivals:
            raise ApiError("An upload to this address is under way.", status=409, errcode="M_CANNOT_OVERWRITE_MEDIA")
        arrival = self._arrivals[media_id] = asyncio.Event()
        try:
            await self._take_in(request, media_id)
        finally:
            del self._arrivals[media_id]
            arrival.set()
        return {}

    async def _take_in(self, request: Request, reserved: str | None) -> str:
        most, claimed = int(self._settings.max_upload_bytes), request.http.content_length
        if claimed is not None and claimed > most:
            raise TooLarge(f"The file is larger than {most} bytes, the most that this server takes.")
        await self._doors.upload(request.user_id, claimed or 0)
        chunks = pieces(request.http)
        first: list[bytes] = []
        size, whole = 0, True
        async for chunk in chunks:
            first.append(chunk)
            size += len(chunk)
            if size >= LOOK:
                whole = False
                break
        head = b"".join(first)
        media_id = reserved or new_media_id()
        try:
            self._seal.media(head, head if whole else None)
        except Refused:
            await self._take_picture(request, media_id, head, chunks)
            return media_id
        watch = TextWatch()
        writer = self.store.writer(most, media_id)
        try:
            watch.feed(head)
            await writer.add(head)
            inspector = self.inspector if self.inspector is not None and self.inspector.wants_files else None
            digest = hashlib.sha256(head) if inspector is not None else None
            async for chunk in chunks:
                watch.feed(chunk)
                if digest is not None:
                    digest.update(chunk)
                await writer.add(chunk)
            if claimed is None:
                await self._doors.upload(request.user_id, writer.size)
            if not self._seal.open and watch.is_text():
                raise Refused(
                    "This file is readable (text), and this relay stores only encrypted ones. Send it in an encrypted room."
                )
            if inspector is not None and digest is not None:
                await inspector.file(request.user_id, self._address(media_id), writer.size, digest.hexdigest())
            await writer.finish()
            await self._record(request, media_id, writer.size, reserved is not None)
        except BaseException:
            writer.discard()
            raise
        return media_id

    async def _record(self, request: Request, media_id: str, size: int, reserved: bool) -> None:
        readable, content_type, file_name = CIPHERTEXT, None, None
        if self._seal.open:
            readable = SEAL_OPEN
            content_type = request.http.headers.get("Content-Type", UNKNOWN_TYPE)[:MAX_CONTENT_TYPE]
            file_name = request.query.get("filename", "")[:MAX_FILE_NAME] or None
        await self._write_row(media_id, request.user_id, size, readable, content_type, file_name, reserved)

    async def _write_row(
        self,
        media_id: str,
        uploader: str,
        size: int,
        readable: int,
        content_type: str | None,
        file_name: str | None,
        reserved: bool,
    ) -> None:
        with self._db.write() as tx:
            tx.run(
                _FILL if reserved else _INSERT,
                media_id, uploader, _hour(self._clock.now()), size, readable, content_type, file_name,
            )  # fmt: skip
        await tx

    async def _take_picture(self, request: Request, media_id: str, head: bytes, rest: AsyncIterator[bytes]) -> None:
        """What the seal refused may still become an avatar, if it is a small picture. Raises Refused."""
        content_type = picture_type(head)
        if content_type is None:
            self._seal.media(head, head)
            raise Refused("This relay stores only encrypted files.")
        body = bytearray(head)
        async for chunk in rest:
            body += chunk
            if len(body) > MAX_PICTURE:
                break
        if len(body) > MAX_PICTURE:
            raise Refused(
                f"This picture is not encrypted. An avatar may have up to {MAX_PICTURE // 1024} KiB; "
                "anything else has to be sent in an encrypted room."
            )
        self._waiting.add(media_id, request.user_id, content_type, bytes(body))

    async def adopt(self, mxc_uri: str) -> None:
        """A profile or a room names this as its avatar: if the picture waits in memory, it is kept from now on."""
        server, media_id = split_mxc(mxc_uri)
        picture = self._waiting.get(media_id) if server == self._server_name else None
        if picture is None:
            return
        writer = self.store.writer(MAX_PICTURE, media_id)
        try:
            await writer.add(picture.body)
            await writer.finish()
            reserved = await self._row(media_id) is not None
            await self._write_row(
                media_id, picture.uploader, len(picture.body), AVATAR, picture.content_type, None, reserved
            )
        except BaseException:
            writer.discard()
            raise
        self._waiting.drop(media_id)

    # --- out

    async def _download(self, request: Request) -> Answer:
        server, media_id = await self._asked_for(request)
        name = request.params.get("file_name")
        if server != self._server_name:
            return await self._download_remote(request, server, media_id, name)
        picture = self._waiting.get(media_id)
        if picture is not None and picture.uploader == request.user_id:
            return await send(request, len(picture.body), _blocks_of(picture.body), picture.content_type, name)
        row = await self._ready(request, media_id)
        with await self.store.open(media_id) as reader:
            return await send(request, reader.size, reader.blocks, self._served_type(row), name or row.file_name)

    async def _download_remote(
        self, request: Request, server: str, media_id: str, name: str | None
    ) -> web.StreamResponse:
        async with self.copies.open(server, media_id) as found:
            content_type, name = found.label.content_type or UNKNOWN_TYPE, name or found.label.file_name
            if isinstance(found, Kept):
                return await send(request, found.reader.size, found.reader.blocks, content_type, name)
            if found.readable:
                content_type = picture_type(found.first) or UNKNOWN_TYPE
            if request.http.method == "HEAD":
                return await send_stream(request, found.length, found.chunks(), content_type, name)
            async with aclosing(self.copies.keeping(server, media_id, found)) as chunks:
                return await send_stream(request, found.length, chunks, content_type, name)

    async def _thumbnail(self, request: Request) -> Answer:
        """Only avatars are readable; they are answered as they are."""
        for side in ("width", "height"):
            if side not in request.query:
                raise MissingParam(f"The parameter {side} is missing.")
            request.query_int(side, 1, low=1)
        server, media_id = await self._asked_for(request)
        if server != self._server_name:
            content_type, body = await self.copies.picture(server, media_id)
            return await send(request, len(body), _blocks_of(body), content_type, None)
        picture = self._waiting.get(media_id)
        if picture is not None and picture.uploader == request.user_id:
            return await send(request, len(picture.body), _blocks_of(picture.body), picture.content_type, None)
        row = await self._ready(request, media_id)
        content_type = self._served_type(row)
        if not content_type.startswith("image/"):
            raise NotFound("There is no preview of this file: it is encrypted, or not a picture. Download it whole.")
        with await self.store.open(media_id) as reader:
            return await send(request, reader.size, reader.blocks, content_type, None)

    async def _asked_for(self, request: Request) -> tuple[str, str]:
        server, media_id = request.params["server"], request.params["media_id"]
        if not is_server_name(server) or not is_opaque(media_id):
            raise InvalidParam("This is not the address of a file: it is mxc://server/ID.")
        if server != self._server_name and request.query.get("allow_remote") == "false":
            raise NotFound("This file is on another server.")
        await self._doors.download(request.user_id, server, media_id)
        return server, media_id

    async def _ready(self, request: Request, media_id: str) -> _Row:
        row = await self._row(media_id)
        if row is None:
            raise NotFound("There is no such file.")
        if row.size == EMPTY:
            arrival = self._arrivals.get(media_id)
            if arrival is not None:
                try:
                    await asyncio.wait_for(
                        arrival.wait(), request.query_int("timeout_ms", DEFAULT_WAIT_MS, high=MAX_WAIT_MS) / SECOND
                    )
                except TimeoutError:
                    pass
                row = await self._row(media_id)
            if row is None or row.size == EMPTY:
                raise ApiError(
                    "This file is not uploaded yet. Try again later.", status=504, errcode="M_NOT_YET_UPLOADED"
                )
        return row

    def _served_type(self, row: _Row) -> str:
        if row.content_type is None or (row.readable == SEAL_OPEN and not self._seal.open):
            return UNKNOWN_TYPE
        return row.content_type

    async def local_media(self, media_id: str) -> LocalMedia:
        """A file of ours for another server; close its reader. Raises NotFound, and ApiError 504 where it is not uploaded yet."""
        await self._doors.download(None, self._server_name, media_id)
        row = await self._row(media_id) if is_opaque(media_id) else None
        if row is None:
            raise NotFound("There is no such file.")
        if row.size == EMPTY:
            raise ApiError("This file is not uploaded yet. Try again later.", status=504, errcode="M_NOT_YET_UPLOADED")
        return LocalMedia(await self.store.open(media_id), self._served_type(row), row.file_name)

    async def held(self, server: str, media_id: str) -> Reader | None:
        """The bytes of a file as far as they lie here, for a proof: nobody is asked for it, and nothing notes that it was read."""
        if server != self._server_name:
            return await self.copies.held(server, media_id)
        row = await self._row(media_id) if is_opaque(media_id) else None
        if row is None or row.size == EMPTY:
            return None
        try:
            return await self.store.open(media_id)
        except NotFound:
            return None

    async def _row(self, media_id: str) -> _Row | None:
        row = await self._db.read(_media_row, media_id)
        return _Row(*row) if row is not None else None

    def _address(self, media_id: str) -> str:
        return f"mxc://{self._server_name}/{media_id}"

    # --- cleaning up

    async def run(self) -> None:
        old = await self.store.left_behind()
        known = await self._db.read(_known_of, old) if old else set()
        for media_id in old:
            if media_id not in known:
                await self.store.delete(media_id)
        while True:
            self._waiting.forget_old()
            with self._db.write() as tx:
                tx.run("DELETE FROM media WHERE size < 0 AND created_ts < $1", self._clock.now() - EMPTY_FOR - HOUR)
            await tx
            await self._clock.sleep(SWEEP_INTERVAL / SECOND)

    def reseal(self, query: Query) -> int:
        """What was taken while the seal was open goes."""
        if self._seal.open:
            return 0
        readable = [row[0] for row in query.all("SELECT media_id FROM media WHERE readable = $1", SEAL_OPEN)]
        for media_id in readable:
            self.store.remove(media_id)
        return query.run("DELETE FROM media WHERE readable = $1", SEAL_OPEN)

    def audit(self, query: Query) -> tuple[dict[str, int], list[Finding]]:
        """Each file with its row, each row with its file, and no stored file that is provably readable without a reason."""
        counts: dict[str, int] = {}
        findings: list[Finding] = []
        rules = {
            CIPHERTEXT: "media: not provably readable",
            AVATAR: "media: an avatar",
            SEAL_OPEN: "media: taken while the seal was open",
        }
        rows = {row[0]: row[1:] for row in query.all("SELECT media_id, size, readable FROM media WHERE size >= 0")}
        for media_id, _, size in self.store.every():
            row = rows.pop(media_id, None)
            if row is None:
                findings.append(
                    Finding(
                        "media",
                        media_id or "a draft",
                        "a file without a row: a crash left it; the next start removes it",
                    )
                )
                continue
            counts[rules[row[1]]] = counts.get(rules[row[1]], 0) + 1
            if row[1] == SEAL_OPEN and not self._seal.open:
                findings.append(Finding("media", media_id, "stored while the seal was open"))
            if row[0] != size:
                findings.append(Finding("media", media_id, f"the file has {size} bytes, its row says {row[0]}"))
            if row[1] == CIPHERTEXT and not self._seal.open:
                findings += self._readable(media_id)
        findings += [Finding("media", media_id, "a row without its file") for media_id in rows]
        return counts, findings

    def _readable(self, media_id: str) -> list[Finding]:
        try:
            self._seal.media(self.store.head(media_id, HEAD_BYTES), None)
        except Refused:
            return [Finding("media", media_id, "a readable file")]
        return []


def split_mxc(uri: str) -> tuple[str, str]:
    """(server, media ID); ('', '') where it is not the address of a file."""
    server, _, media_id = uri.removeprefix("mxc://").partition("/")
    return (server, media_id) if uri.startswith("mxc://") and is_opaque(media_id) else ("", "")


def _hour(now: int) -> int:
    return now - now % HOUR


def _blocks_of(body: bytes) -> Callable[[int, int], AsyncIterator[bytes]]:
    async def blocks(start: int, stop: int) -> AsyncIterator[bytes]:
        yield body[start:stop]

    return blocks


def _media_row(query: Query, media_id: str) -> Row | None:
    return query.one(
        "SELECT uploader, created_ts, size, readable, content_type, file_name FROM media WHERE media_id = $1", media_id
    )


def _known_of(query: Query, media_ids: list[str]) -> set[str]:
    return {m for m in media_ids if query.value("SELECT 1 FROM media WHERE media_id = $1", m)}
