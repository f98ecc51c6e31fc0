"""The one writer and the one reader of media files: what came in is on disk before `write` returns.

A file is written under a passing name, synced, renamed into place, and its folder synced. Nothing else in the program
opens these files, so that encryption at rest can come here without touching a route. Not about rows: which files exist,
and whose they are, is for `routes.py` and `remote_copies.py`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeVar

from relay.errors import NotFound, StorageFull, TooLarge
from relay.ids import is_opaque

T = TypeVar("T")

THREADS = 4
# One hop to a thread for as many bytes; memory a transfer holds is twice that.
WRITE_BLOCK = 1024 * 1024
READ_BLOCK = 512 * 1024
# As many as every system takes in one call.
MAX_CHUNKS = 512
# A file without a row may be one whose row is on its way. Seconds.
ORPHAN_AGE = 3600.0
_DRAFT = ".draft-"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class Written:
    media_id: str
    size: int


class _Draft:
    """A file on its way. Its methods run in threads, one at a time; after `discard` they leave nothing behind."""

    def __init__(self, root: Path, media_id: str) -> None:
        self._lock = threading.Lock()
        self._root = root
        self._folder = _folder(root, media_id)
        self._final = self._folder / media_id
        self._passing = self._folder / f"{_DRAFT}{secrets.token_hex(8)}"
        self._discarded = False
        self._file = -1
        self._size = 0

    def _begin(self) -> None:
        if not self._folder.is_dir():
            self._folder.mkdir(mode=0o700, exist_ok=True)
            _sync_folder(self._root)
        self._file = os.open(self._passing, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def append(self, chunks: list[bytes]) -> None:
        with self._lock:
            if self._discarded:
                return
            if self._file < 0:
                self._begin()
            begin = self._size
            left = [memoryview(chunk) for chunk in chunks]
            while left:
                done = os.writev(self._file, left[:MAX_CHUNKS])
                self._size += done
                while left and done >= len(left[0]):
                    done -= len(left.pop(0))
                if done:
                    left[0] = left[0][done:]
            if hasattr(os, "posix_fadvise"):
                # On Linux this starts the writing to disk now, so that the sync at the end finds little to do.
                os.posix_fadvise(self._file, begin, self._size - begin, os.POSIX_FADV_DONTNEED)

    def finish(self, pending: list[bytes]) -> None:
        self.append(pending)
        with self._lock:
            if self._discarded:
                return
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1
            os.rename(self._passing, self._final)
            _sync_folder(self._folder)

    def discard(self) -> None:
        with self._lock:
            self._discarded = True
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            self._passing.unlink(missing_ok=True)
            self._final.unlink(missing_ok=True)


class Writer:
    """A file that is being written. `finish` or `discard` it; one block may be on its way to the disk while the next comes."""

    def __init__(self, root: Path, threads: ThreadPoolExecutor, most: int, media_id: str) -> None:
        self.media_id = media_id
        self.size = 0
        self._most = most
        self._threads = threads
        self._draft = _Draft(root, media_id)
        self._pending: list[bytes] = []
        self._waiting = 0
        self._writing: Future[None] | None = None

    async def add(self, chunk: bytes) -> None:
        """Raises TooLarge, StorageFull."""
        self.size += len(chunk)
        if self.size > self._most:
            raise TooLarge(f"The file is larger than {self._most} bytes, the most that this server takes.")
        self._pending.append(chunk)
        self._waiting += len(chunk)
        if self._waiting >= WRITE_BLOCK:
            await self._settle()
            self._writing = self._threads.submit(self._draft.append, self._pending)
            self._pending, self._waiting = [], 0

    async def finish(self) -> Written:
        """Returns once the file and its folder are synced. Raises StorageFull."""
        await self._settle()
        self._writing = self._threads.submit(self._draft.finish, self._pending)
        await self._settle()
        return Written(self.media_id, self.size)

    def discard(self) -> None:
        """Leaves no trace. Does not wait, since its request may be cancelled: it takes its turn behind what a thread writes."""
        self._threads.submit(self._draft.discard)

    async def _settle(self) -> None:
        if self._writing is None:
            return
        try:
            await asyncio.wrap_future(self._writing)
        except OSError as error:
            if error.errno in _FULL:
                raise StorageFull from error
            raise


class Reader:
    """An open media file of a known size. Close it, or leave its `with` block."""

    def __init__(self, file: FileIO, size: int, threads: ThreadPoolExecutor) -> None:
        self._file = file
        self.size = size
        self._threads = threads
        self._reading: Future[bytes] | None = None

    async def blocks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """The bytes from `start` up to `stop`. The next block is read while the last is on its way out."""
        stop = self.size if stop is None else min(stop, self.size)
        self._read(start, stop)
        while self._reading is not None:
            block = await asyncio.wrap_future(self._reading)
            if not block:
                raise OSError(errno.EIO, "a media file is shorter than it was")
            start += len(block)
            self._read(start, stop)
            yield block

    def _read(self, start: int, stop: int) -> None:
        self._reading = None
        if start < stop:
            self._reading = self._threads.submit(os.pread, self._file.fileno(), min(READ_BLOCK, stop - start), start)

    def close(self) -> None:
        if self._reading is not None:
            # A thread may still read: the number must not go to another file before it is through.
            self._reading.add_done_callback(lambda _: self._file.close())
        else:
            self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Store:
    """A folder of media files, spread over subfolders by the first two characters of their IDs."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sync_folder(root.parent)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="media")

    def close(self) -> None:
        self._threads.shutdown()

    def writer(self, most: int, media_id: str | None = None) -> Writer:
        return Writer(self._root, self._threads, most, media_id or new_media_id())

    async def write(self, chunks: AsyncIterator[bytes], *, most: int, media_id: str | None = None) -> Written:
        """Raises TooLarge beyond `most` bytes, StorageFull, and whatever `chunks` raises; then no trace is left."""
        writer = self.writer(most, media_id)
        try:
            async for chunk in chunks:
                await writer.add(chunk)
            return await writer.finish()
        except BaseException:
            writer.discard()
            raise

    async def open(self, media_id: str) -> Reader:
        """Raises NotFound."""
        try:
            file, size = await self._in_thread(_open, self._path(media_id))
        except FileNotFoundError:
            raise NotFound("This file is no longer here.") from None
        return Reader(file, size, self._threads)

    async def read(self, media_id: str, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """The bytes from `start` up to `stop`. Raises NotFound."""
        with await self.open(media_id) as reader:
            async for block in reader.blocks(start, stop):
                yield block

    def remove(self, media_id: str) -> None:
        """The same as `delete`, from a thread that may wait for the disk."""
        self._path(media_id).unlink(missing_ok=True)

    async def delete(self, media_id: str) -> None:
        await self._in_thread(lambda: self._path(media_id).unlink(missing_ok=True))

    def every(self) -> Iterator[tuple[str, Path, int]]:
        """(media_id, path, size) of each file, in no order; drafts have an empty ID. For a thread."""
        with os.scandir(self._root) as folders:
            for folder in folders:
                if not folder.is_dir(follow_symlinks=False):
                    continue
                with os.scandir(folder.path) as files:
                    for file in files:
                        with suppress(FileNotFoundError):
                            media_id = "" if file.name.startswith(_DRAFT) else file.name
                            yield media_id, Path(file.path), file.stat().st_size

    def head(self, media_id: str, size: int) -> bytes:
        """The first bytes of a file, for the audit. For a thread."""
        with suppress(FileNotFoundError), self._path(media_id).open("rb") as file:
            return file.read(size)
        return b""

    async def left_behind(self, age: float = ORPHAN_AGE) -> list[str]:
        """The IDs of files older than `age` seconds, for the caller to delete those without a row. Removes old drafts."""
        return await self._in_thread(self._left_behind, time.time() - age)

    def _left_behind(self, before: float) -> list[str]:
        old: list[str] = []
        for media_id, path, _ in self.every():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    if media_id:
                        old.append(media_id)
                    else:
                        path.unlink()
        return old

    def _path(self, media_id: str) -> Path:
        # An ID comes from outside: only the standard's characters may become a path.
        if not is_opaque(media_id) or len(media_id) < 3:
            raise NotFound("There is no such file.")
        return _folder(self._root, media_id) / media_id

    def _in_thread(self, function: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *args)


def new_media_id() -> str:
    """128 random bits, in small letters for the sake of file systems that know no others."""
    return secrets.token_hex(16)


def _folder(root: Path, media_id: str) -> Path:
    return root / media_id[:2].lower()


def _open(path: Path) -> tuple[FileIO, int]:
    file = FileIO(path)
    return file, os.fstat(file.fileno()).st_size


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
