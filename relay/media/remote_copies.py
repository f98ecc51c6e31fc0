"""Files of other servers: encrypted ones are kept for a while, readable ones only pass through.

A copy is made while its first reader gets it; others who ask meanwhile wait for it. Copies go when nobody asked for them
for `media.remote_retention`, the longest unused first when they take more than `media.remote_cache_bytes`. Small pictures
that clients want as avatars are held in memory, never on disk. Spec: server-server-api/#content-repository.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from aiohttp.multipart import content_disposition_filename, parse_content_disposition

from relay.clock import HOUR, MINUTE, SECOND, Clock
from relay.config import Media as MediaSettings
from relay.db import Database, Query, Row
from relay.errors import NotFound, Refused, StorageFull
from relay.media.files import Reader, Store
from relay.media.waiting import MAX_PICTURE, picture_type
from relay.part import Finding, Part
from relay.protocol.readable import HEAD_BYTES
from relay.protocol.seal import Seal
from relay.remote import Remote
from relay.tables import Schema, Table

# How much is looked at before it is decided what a file is.
LOOK = 64 * 1024
MAX_FETCHES = 16
MAX_FILE_NAME = 255
# So that a slow first reader does not hold up the others.
WAIT_FOR_COPY = 10.0
# "Last asked for" is written this coarsely.
USED_STEP = HOUR
TRIM_INTERVAL = 10 * MINUTE
MAX_TRIMMED = 500
# Trimmed early when new copies made up this part of the room for them.
TRIM_SHARE = 16
MAX_SHOWN_BYTES = 8 * 1024 * 1024
SHOWN_FOR = HOUR


@dataclass(slots=True, frozen=True)
class Label:
    """What its server says of a file; believed, and kept, only where the seal is open."""

    content_type: str | None = None
    file_name: str | None = None


UNLABELLED = Label()


@dataclass(slots=True)
class Kept:
    """A copy that lies here."""

    reader: Reader
    label: Label = UNLABELLED


@dataclass(slots=True)
class Passing:
    """A file on its way from its server, of which the first bytes were looked at."""

    first: bytes
    whole: bool
    readable: bool
    length: int | None
    rest: AsyncIterator[bytes]
    label: Label = UNLABELLED
    # Told the file's SHA-256 in hex once all of it has come; raises ApiError where nobody may have it.
    gate: Callable[[str], Awaitable[None]] | None = None

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The whole file. With a gate its end is kept back until that has let it pass: an encrypted file without its end
        opens for nobody."""
        if self.gate is None:
            async for chunk in self._all():
                yield chunk
            return
        digest, held = hashlib.sha256(), b""
        async for chunk in self._all():
            if held:
                yield held
            digest.update(chunk)
            held = chunk
        await self.gate(digest.hexdigest())
        if held:
            yield held

    async def _all(self) -> AsyncGenerator[bytes, None]:
        if self.first:
            yield self.first
        async for chunk in self.rest:
            yield chunk


class Gate(Protocol):
    """Who has something against files by the hash of their bytes: `moderation/quarantine.py`."""

    @property
    def wants_copies(self) -> bool: ...

    async def copy(self, mxc_uri: str, sha256: str) -> None:
        """Raises ApiError where the file is not to be had."""
        ...


class RemoteCopies(Part):
    schema = Schema(
        "remote_media",
        tables=(
            Table(
                "remote_media",
                "a copy of another server's encrypted file",
                {
                    "server": ("where it comes from", "media.remote_retention after it was last asked for"),
                    "media_id": ("its ID there", "media.remote_retention after it was last asked for"),
                    "file": ("its name in our folder", "media.remote_retention after it was last asked for"),
                    "size": ("bytes", "media.remote_retention after it was last asked for"),
                    "used_ts": (
                        "when it was last asked for, to the hour",
                        "media.remote_retention after it was last asked for",
                    ),
                    "content_type": (
                        "as its server says, only where the seal was open",
                        "media.remote_retention after it was last asked for",
                    ),
                    "file_name": (
                        "as its server says, only where the seal was open",
                        "media.remote_retention after it was last asked for",
                    ),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE remote_media (server TEXT NOT NULL, media_id TEXT NOT NULL, file TEXT NOT NULL, size BIGINT NOT NULL,
                used_ts BIGINT NOT NULL, PRIMARY KEY (server, media_id));
            CREATE INDEX remote_media_by_use ON remote_media (used_ts)
            """,
            """
            ALTER TABLE remote_media ADD COLUMN content_type TEXT;
            ALTER TABLE remote_media ADD COLUMN file_name TEXT
            """,
        ),
    )

    def __init__(
        self, db: Database, clock: Clock, settings: MediaSettings, seal: Seal, remote: Remote, folder: Path
    ) -> None:
        self.store = Store(folder)
        self._db = db
        self._clock = clock
        # (server, media ID) of files that were reported and must stay; asked in a database thread.
        self.frozen: Callable[[Query], Collection[tuple[str, str]]] | None = None
        self._settings = settings
        self._seal = seal
        self._remote = remote
        self.gate: Gate | None = None
        self._places = asyncio.Semaphore(MAX_FETCHES)
        self._copying: dict[tuple[str, str], asyncio.Event] = {}
        self._shown: OrderedDict[tuple[str, str], tuple[str, bytes, int]] = OrderedDict()
        self._shown_bytes = 0
        self._untrimmed_bytes = 0

    @asynccontextmanager
    async def open(self, server: str, media_id: str) -> AsyncIterator[Kept | Passing]:
        """A kept copy, or the file on its way. Raises RemoteError, NotFound, ApiError."""
        kept = await self._kept(server, media_id)
        if kept is None and (copying := self._copying.get((server, media_id))) is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(copying.wait(), WAIT_FOR_COPY)
            kept = await self._kept(server, media_id)
        if kept is not None:
            with kept.reader:
                yield kept
            return
        async with self._places:
            fetched = await self._remote.media(server, media_id, self._settings.max_upload_bytes)
            try:
                passing = await self._look(fetched.chunks, fetched.length)
                if (gate := self.gate) is not None and gate.wants_copies:
                    passing.gate = lambda sha256: gate.copy(f"mxc://{server}/{media_id}", sha256)
                if self._seal.open:
                    passing.label = Label(fetched.content_type or None, _file_name(fetched.disposition))
                yield passing
            finally:
                if isinstance(fetched.chunks, AsyncGenerator):
                    await fetched.chunks.aclose()

    async def _look(self, chunks: AsyncIterator[bytes], length: int | None) -> Passing:
        first: list[bytes] = []
        size, whole = 0, False
        while size < LOOK:
            try:
                chunk = await anext(chunks)
            except StopAsyncIteration:
                whole = True
                break
            first.append(chunk)
            size += len(chunk)
        head = b"".join(first)
        try:
            self._seal.media(head, head if whole else None)
        except Refused:
            return Passing(head, whole, True, length, chunks)
        # A long text can only be told at its end: what could still become one is not kept.
        return Passing(head, whole, not whole and not self._seal.open and _may_be_text(head), length, chunks)

    async def keeping(self, server: str, media_id: str, passing: Passing) -> AsyncGenerator[bytes, None]:
        """The file's bytes as they come; a copy of an encrypted one remains. Close it, or run it to its end."""
        key = (server, media_id)
        if passing.readable or not self._settings.remote_retention or key in self._copying:
            async for chunk in passing.chunks():
                yield chunk
            return
        copied = self._copying[key] = asyncio.Event()
        writer = self.store.writer(self._settings.max_upload_bytes)
        kept, writable = False, True
        try:
            async for chunk in passing.chunks():
                if writable:
                    try:
                        await writer.add(chunk)
                    except StorageFull:
                        writable = False  # the reader still gets it
                yield chunk
            if writable:
                with suppress(StorageFull):
                    await writer.finish()
                    await self._remember(server, media_id, writer.media_id, writer.size, passing.label)
                    kept = True
        finally:
            if not kept:
                writer.discard()
            del self._copying[key]
            copied.set()

    async def _remember(self, server: str, media_id: str, file: str, size: int, label: Label) -> None:
        with self._db.write() as tx:
            tx.run(
                "INSERT INTO remote_media (server, media_id, file, size, used_ts, content_type, file_name) "
                "VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (server, media_id) DO UPDATE SET file = excluded.file, "
                "size = excluded.size, used_ts = excluded.used_ts, content_type = excluded.content_type, "
                "file_name = excluded.file_name",
                server,
                media_id,
                file,
                size,
                self._hour(),
                label.content_type,
                label.file_name,
            )
        await tx
        self._untrimmed_bytes += size
        if self._untrimmed_bytes > self._settings.remote_cache_bytes // TRIM_SHARE:
            self._untrimmed_bytes = 0
            await self.trim()

    async def held(self, server: str, media_id: str) -> Reader | None:
        """The copy, if there is one."""
        row = await self._db.read(_copy, server, media_id)
        return None if row is None else await self._open(row[0], row[1])

    async def _open(self, file: str, size: int) -> Reader | None:
        try:
            reader = await self.store.open(file)
        except NotFound:
            return None
        if reader.size != size:
            reader.close()
            return None
        return reader

    async def _kept(self, server: str, media_id: str) -> Kept | None:
        row = await self._db.read(_copy, server, media_id)
        if row is None:
            return None
        file, size, used, content_type, file_name = row
        reader = await self._open(file, size)
        if reader is not None and used < self._hour():
            with self._db.write() as tx:
                tx.run(
                    "UPDATE remote_media SET used_ts = $3 WHERE server = $1 AND media_id = $2",
                    server,
                    media_id,
                    self._hour(),
                )
        if reader is None:
            return None
        return Kept(reader, Label(content_type, file_name) if self._seal.open else UNLABELLED)

    def _hour(self) -> int:
        now = self._clock.now()
        return now - now % USED_STEP

    # --- pictures in memory

    async def picture(self, server: str, media_id: str) -> tuple[str, bytes]:
        """A readable picture that fits into memory, with its content type. Raises NotFound where it is none."""
        key = (server, media_id)
        shown = self._shown.get(key)
        if shown is not None and shown[2] > self._clock.now():
            self._shown.move_to_end(key)
            return shown[0], shown[1]
        async with self.open(server, media_id) as found:
            if isinstance(found, Kept) and self._seal.open and found.reader.size <= MAX_PICTURE:
                whole = b"".join([block async for block in found.reader.blocks()])
                if (content_type := picture_type(whole)) is not None:
                    self._show(key, content_type, whole)
                    return content_type, whole
            if isinstance(found, Passing) and (content_type := picture_type(found.first)) is not None:
                body = bytearray()
                async with aclosing(found.chunks()) as chunks:
                    async for chunk in chunks:
                        body += chunk
                        if len(body) > MAX_PICTURE:
                            raise NotFound("This picture is too large for a preview. Download it whole.")
                self._show(key, content_type, bytes(body))
                return content_type, bytes(body)
        raise NotFound("There is no preview of this file: it is encrypted, or not a picture. Download it whole.")

    def _show(self, key: tuple[str, str], content_type: str, body: bytes) -> None:
        old = self._shown.pop(key, None)
        self._shown_bytes += len(body) - (len(old[1]) if old else 0)
        self._shown[key] = (content_type, body, self._clock.now() + SHOWN_FOR)
        while self._shown_bytes > MAX_SHOWN_BYTES:
            self._shown_bytes -= len(self._shown.popitem(last=False)[1][1])

    # --- forgetting

    async def run(self) -> None:
        await self._remove_orphans()
        while True:
            while await self.trim():
                pass
            await self._clock.sleep(TRIM_INTERVAL / SECOND)

    async def trim(self) -> int:
        """Removes copies that are old, or too many. Returns how many, at most MAX_TRIMMED."""
        before = self._clock.now() - self._settings.remote_retention
        rows: list[Row] = await self._db.read(
            lambda query: _to_trim(
                query,
                before,
                int(self._settings.remote_cache_bytes),
                self.frozen(query) if self.frozen is not None else (),
            )
        )
        if rows:
            with self._db.write() as tx:
                tx.many("DELETE FROM remote_media WHERE server = $1 AND media_id = $2 AND file = $3", rows)
            await tx
            for _, _, file in rows:
                await self.store.delete(file)
        return len(rows)

    async def _remove_orphans(self) -> None:
        old = await self.store.left_behind()
        known = (
            await self._db.read(lambda query: {row[0] for row in query.all("SELECT file FROM remote_media")})
            if old
            else set()
        )
        for file in old:
            if file not in known:
                await self.store.delete(file)

    def forget_server(self, query: Query, server: str) -> int:
        frozen = self.frozen(query) if self.frozen is not None else ()
        removed = 0
        for media_id, file in query.all("SELECT media_id, file FROM remote_media WHERE server = $1", server):
            if (server, media_id) not in frozen:
                self.store.remove(file)
                removed += query.run("DELETE FROM remote_media WHERE server = $1 AND media_id = $2", server, media_id)
        return removed

    def forgotten(self, server: str) -> None:
        for key in [key for key in self._shown if key[0] == server]:
            self._shown_bytes -= len(self._shown.pop(key)[1])

    def reseal(self, query: Query) -> int:
        """What was kept while the seal was open goes: those copies, and only those, have a label."""
        if self._seal.open:
            return 0
        for (file,) in query.all("SELECT file FROM remote_media WHERE content_type IS NOT NULL"):
            self.store.remove(file)
        return query.run("DELETE FROM remote_media WHERE content_type IS NOT NULL")

    def audit(self, query: Query) -> tuple[dict[str, int], list[Finding]]:
        known: dict[str, int] = dict(query.all("SELECT file, content_type IS NOT NULL FROM remote_media"))
        count, findings = 0, []
        for file, _, _ in self.store.every():
            if file not in known:
                text = "a copy without a row: a crash left it, and the next start removes it"
                findings.append(Finding("remote_media", file or "a draft", text))
                continue
            count += 1
            if known[file] and not self._seal.open:
                findings.append(Finding("remote_media", file, "kept while the seal was open"))
                continue
            try:
                self._seal.media(self.store.head(file, HEAD_BYTES), None)
            except Refused:
                findings.append(Finding("remote_media", file, "a readable file"))
        return {"remote_media: an encrypted copy": count}, findings


def _file_name(header: str | None) -> str | None:
    """From a Content-Disposition, in either of its forms."""
    _, params = parse_content_disposition(header)
    name = content_disposition_filename(params)
    return name[:MAX_FILE_NAME] if name else None


def _may_be_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _copy(query: Query, server: str, media_id: str) -> Row | None:
    return query.one(
        "SELECT file, size, used_ts, content_type, file_name FROM remote_media WHERE server = $1 AND media_id = $2",
        server,
        media_id,
    )


def _to_trim(query: Query, before: int, most: int, frozen: Collection[tuple[str, str]]) -> list[Row]:
    """What was reported (`frozen`, few) stays."""
    ahead = MAX_TRIMMED + len(frozen)
    found = query.all(
        "SELECT server, media_id, file FROM remote_media WHERE used_ts < $1 ORDER BY used_ts LIMIT $2",
        before - USED_STEP,
        ahead,
    )
    rows: list[Row] = [row for row in found if (row[0], row[1]) not in frozen][:MAX_TRIMMED]
    if rows:
        return rows
    too_much = int(query.value("SELECT sum(size) FROM remote_media") or 0) - most
    if too_much <= 0:
        return []
    for server, media_id, file, size in query.all(
        "SELECT server, media_id, file, size FROM remote_media ORDER BY used_ts LIMIT $1", ahead
    ):
        if (server, media_id) in frozen:
            continue
        rows.append((server, media_id, file))
        too_much -= size
        if too_much <= 0:
            break
    return rows
