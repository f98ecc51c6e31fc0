"""The database: one face, SQLite behind it. Reads are functions, writes are lists, and every durable change gets the next `pos`.

`await db.read(fn, …)` runs `fn(query, …)` in a reader's thread. `with db.write() as tx:` collects statements; leaving the
block queues them, `await tx` returns once they are synced to disk. Waiting writers share one transaction and one sync,
a savepoint apiece. Writes of one chain (a room) stand or fall in order. Nothing may be awaited inside the block.

One SQL text serves every engine: `$1` marks; TEXT, BIGINT, SMALLINT and BYTES columns; `ON CONFLICT`, `RETURNING`.
This is the only file that names an engine.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import structlog

from relay.bell import Bell
from relay.errors import StorageFull
from relay.tables import OWN, Schema
from relay.upgrade import claim, upgrade

log = structlog.get_logger("db")

P = ParamSpec("P")
T = TypeVar("T")
Row = tuple[Any, ...]
# Who waits for it, the function, and what it is given.
_Read = tuple[asyncio.Future[Any], Callable[..., Any], Any, Any]

MAX_JOBS_PER_COMMIT = 256
READERS = 2
STATEMENT_CACHE = 1024
# SQLite's own defaults are 2 MiB and 1,000 pages: a hundred messages would fill the log and pay for its clearing.
WRITER_CACHE_KIB = 4 * 1024
LOG_PAGES_BEFORE_CLEARING = 4_000
_MARK = re.compile(r"\$(\d+)")
_PRIMARY = re.compile(r"\bBIGINT PRIMARY KEY\b")
_BYTES = re.compile(r"\bBYTES\b")
_CLUSTERED = re.compile(r"\bCLUSTERED\b")
_REFUSE = re.compile(r"REFUSE (UPDATE|DELETE) ON (\w+)")
# What begins a job, keeps and undoes it: alone in its transaction, and beside others.
_ALONE = (), (), ("ROLLBACK", "BEGIN IMMEDIATE")
_BESIDE = ("SAVEPOINT job",), ("RELEASE job",), ("ROLLBACK TO job", "RELEASE job")


class ChainBroken(Exception):
    """An earlier write of the same chain failed, so this one was built on nothing. Judge again and retry."""


class Query:
    """One connection, inside one transaction, in a database thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def all(self, sql: str, *params: Any) -> list[Row]:
        return self._connection.execute(_translated(sql), params).fetchall()

    def one(self, sql: str, *params: Any) -> Row | None:
        row: Row | None = self._connection.execute(_translated(sql), params).fetchone()
        return row

    def value(self, sql: str, *params: Any) -> Any:
        row = self._connection.execute(_translated(sql), params).fetchone()
        return row[0] if row else None

    def run(self, sql: str, *params: Any) -> int:
        """How many rows it touched."""
        return self._connection.execute(_translated(sql), params).rowcount

    def many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        self._connection.executemany(_translated(sql), rows)


_translations: dict[str, str] = {}


def _translated(sql: str) -> str:
    known = _translations.get(sql)
    if known is None:
        known = _translations[sql] = _MARK.sub(r"?\1", sql)
    return known


def _definition(sql: str) -> str:
    """`CLUSTERED` tables lie in the order of their key, and nowhere twice. `REFUSE UPDATE ON t` (or DELETE) keeps rows."""
    sql = _REFUSE.sub(r"CREATE TRIGGER \2_no_\1 BEFORE \1 ON \2 BEGIN SELECT RAISE(ABORT, 'rows stay'); END", sql)
    return _CLUSTERED.sub("WITHOUT ROWID", _BYTES.sub("BLOB", _PRIMARY.sub("INTEGER PRIMARY KEY", sql)))


@dataclass(slots=True)
class _Many:
    sql: str
    rows: list[Sequence[Any]]


class Tx:
    """A write: statements in order, at most one function whose answer `await tx` returns, and who is to be woken after it."""

    __slots__ = (
        "_db", "_statements", "_rings", "_after", "_chain", "_generation", "_future", "_ticked", "last_pos", "_failed",
    )  # fmt: skip

    def __init__(self, db: Database, chain: str | None) -> None:
        self._db = db
        self._statements: list[Any] = []
        self._rings: list[tuple[Iterable[str], str, int]] = []
        self._after: list[Callable[[], None]] = []
        self._failed: list[Callable[[], None]] = []
        self._chain = chain
        self._generation = db.generation(chain) if chain is not None else 0
        self._future: asyncio.Future[Any] | None = None
        self._ticked = False
        self.last_pos = 0

    def pos(self) -> int:
        """The next number of the line."""
        self.last_pos = self._db.next_pos()
        return self.last_pos

    def run(self, sql: str, *params: Any) -> None:
        self._statements.append((sql, params))

    def many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        self._statements.append(_Many(sql, list(rows)))

    def call(self, function: Callable[[Query], Any]) -> None:
        """Runs in the database thread between the other statements; what it returns is what `await tx` returns.

        An exception rolls this write back, and reaches the one who awaits it.
        """
        self._statements.append(function)

    def ring(self, users: Iterable[str], topic: str) -> None:
        """After the commit: something under `topic` changed for these local users, at the write's latest pos."""
        self._rings.append((users, topic, self.last_pos or self.pos()))

    def after(self, callback: Callable[[], None]) -> None:
        """Runs in the event loop after the commit and before the bell: where caches take the change."""
        self._after.append(callback)

    def failed(self, callback: Callable[[], None]) -> None:
        """Runs in the event loop where the write did not come about: where memory that ran ahead is dropped."""
        self._failed.append(callback)

    def __enter__(self) -> Tx:
        self._db.opened(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.closed(self, enqueue=kind is None)

    def __await__(self) -> Generator[Any, None, Any]:
        if self._future is None:
            raise RuntimeError("a write is awaited after its block, not inside it")
        # A client that hangs up must not cancel what others share a transaction with.
        return asyncio.shield(self._future).__await__()


@dataclass(slots=True)
class _Outcome:
    tx: Tx
    result: Any = None
    error: BaseException | None = None


@dataclass
class Database:
    """`path` is the SQLite file. All methods are called from the event loop's thread, unless they say otherwise."""

    path: Path
    bell: Bell
    readers: int = READERS
    _queue: SimpleQueue[Tx | None] = field(default_factory=SimpleQueue)
    _generations: dict[str, int] = field(default_factory=dict)
    _open_tx: Tx | None = None

    def __post_init__(self) -> None:
        self._next = 1
        self._stable = 0
        self.epoch = 1
        self._writer: threading.Thread | None = None
        self._readers: list[threading.Thread] = []
        self._reads: SimpleQueue[_Read | None] = SimpleQueue()
        self._connections: list[sqlite3.Connection] = []
        self._schemas: list[Schema] = []
        self._broken: dict[str, int] = {}  # the writer thread's own

    # --- opening and closing

    async def open(self, schemas: Sequence[Schema], server_name: str) -> None:
        """Makes or upgrades the file, then starts the threads. Raises upgrade.WrongDatabase."""
        self._loop = asyncio.get_running_loop()
        self._schemas = list(schemas)
        await asyncio.to_thread(self._prepare, server_name)
        self._readers = [
            threading.Thread(target=self._read_loop, name=f"reader {number}", daemon=True)
            for number in range(self.readers)
        ]
        for reader in self._readers:
            reader.start()
        self._writer = threading.Thread(target=self._write_loop, name="writer", daemon=True)
        self._writer.start()

    async def close(self) -> None:
        writer, self._writer = self._writer, None  # from here on nothing more is queued
        if writer is not None:
            self._queue.put(None)
            await asyncio.to_thread(writer.join)
        readers, self._readers = self._readers, []
        for _ in readers:
            self._reads.put(None)
        for reader in readers:
            await asyncio.to_thread(reader.join)
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, cached_statements=STATEMENT_CACHE
        )
        connection.execute("PRAGMA busy_timeout = 10000")
        connection.execute("PRAGMA synchronous = FULL")
        # What is deleted is gone: freed pages are overwritten with zeros.
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA temp_store = MEMORY")
        self._connections.append(connection)
        return connection

    def _prepare(self, server_name: str) -> None:
        fresh = not self.path.exists()
        if fresh:
            self.path.touch(mode=0o600)
        connection = self._connect()
        connection.execute("PRAGMA journal_mode = WAL")
        for statement in OWN.steps[0].split(";"):
            connection.execute(statement)
        claim(connection, server_name)
        upgrade(connection, self._schemas, self.path, fresh=fresh, define=_definition)
        settings = dict(connection.execute("SELECT name, value FROM settings").fetchall())
        self.epoch = int(settings["epoch"])
        self._stable = int(settings["pos"])
        self._next = self._stable + 1
        self.bell.begin(self._stable)
        connection.close()
        self._connections.remove(connection)

    # --- reading

    async def read(self, function: Callable[Concatenate[Query, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(query, …)` in a reader's thread, on one consistent snapshot of what is committed."""
        if not self._readers:
            raise RuntimeError("the database is not open")
        future = self._loop.create_future()
        self._reads.put((future, function, args, kwargs))
        result: T = await future
        return result

    def _read_loop(self) -> None:
        connection: sqlite3.Connection | None = None
        while (asked := self._reads.get()) is not None:
            future, function, args, kwargs = asked
            result, error = None, None
            try:
                if connection is None:
                    connection = self._connect()
                    connection.execute("PRAGMA query_only = ON")
                connection.execute("BEGIN")
                try:
                    result = function(Query(connection), *args, **kwargs)
                finally:
                    connection.execute("COMMIT")
            except Exception as failed:
                error = failed
            self._loop.call_soon_threadsafe(_tell, future, result, error)
            # Nothing of it is held until the next one comes.
            del asked, future, function, args, kwargs, result, error

    # --- writing

    def write(self, chain: str | None = None) -> Tx:
        """A new write, used as `with db.write() as tx:`. Writes of one `chain` depend on each other, in order."""
        return Tx(self, chain)

    def next_pos(self) -> int:
        pos = self._next
        self._next += 1
        return pos

    def stable_pos(self) -> int:
        """Every change up to here is committed, and nothing before it will still appear."""
        return self._stable

    def generation(self, chain: str) -> int:
        return self._generations.get(chain, 0)

    def opened(self, tx: Tx) -> None:
        if self._open_tx is not None:
            raise RuntimeError("a write was opened inside another one")
        self._open_tx = tx
        self._loop.call_soon(self._tick, tx)

    def _tick(self, tx: Tx) -> None:
        if self._open_tx is tx:
            tx._ticked = True

    def closed(self, tx: Tx, *, enqueue: bool) -> None:
        self._open_tx = None
        wrong = "something was awaited inside a write" if tx._ticked else None
        if enqueue and self._writer is None:
            wrong = "the database is closed"
        if wrong or not enqueue:
            _call_all(tx._failed)
            if wrong:
                raise RuntimeError(wrong)
            return
        tx._future = self._loop.create_future()
        # Whoever built the write may have been cancelled; an error nobody awaits is not a second error.
        tx._future.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._queue.put(tx)

    def _write_loop(self) -> None:
        connection = self._connect()
        connection.execute(f"PRAGMA cache_size = -{WRITER_CACHE_KIB}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES_BEFORE_CLEARING}")
        query = Query(connection)
        while True:
            first = self._queue.get()
            if first is None:
                return
            batch: list[Tx] = [first]
            stop = False
            while len(batch) < MAX_JOBS_PER_COMMIT:
                try:
                    more = self._queue.get_nowait()
                except Empty:
                    break
                if more is None:
                    stop = True
                    break
                batch.append(more)
            outcomes = self._commit(connection, query, batch)
            self._loop.call_soon_threadsafe(self._committed, outcomes)
            if stop:
                return

    def _commit(self, connection: sqlite3.Connection, query: Query, batch: list[Tx]) -> list[_Outcome]:
        outcomes = [_Outcome(tx) for tx in batch]
        try:
            connection.execute("BEGIN IMMEDIATE")
            last_pos = 0
            for outcome in outcomes:
                self._execute(connection, query, outcome, alone=len(outcomes) == 1)
                last_pos = max(last_pos, outcome.tx.last_pos)
            if last_pos:
                connection.execute("UPDATE settings SET value = ? WHERE name = 'pos'", (str(last_pos),))
            connection.execute("COMMIT")
        except Exception as error:  # the whole batch failed: nothing of it is on disk
            if connection.in_transaction:
                # A disk that fails may fail here too; the next BEGIN says so to those who come then.
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            for outcome in outcomes:
                outcome.result = None
                outcome.error = outcome.error or _translate_error(error)
                self._break(outcome.tx)
        return outcomes

    def _execute(self, connection: sqlite3.Connection, query: Query, outcome: _Outcome, *, alone: bool) -> None:
        begin, keep, undo = _ALONE if alone else _BESIDE
        tx = outcome.tx
        if tx._chain is not None and self._broken.get(tx._chain, -1) >= tx._generation:
            outcome.error = ChainBroken(tx._chain)
            return
        for step in begin:
            connection.execute(step)
        try:
            for statement in tx._statements:
                if type(statement) is tuple:
                    connection.execute(_translated(statement[0]), statement[1])
                elif type(statement) is _Many:
                    connection.executemany(_translated(statement.sql), statement.rows)
                else:
                    outcome.result = statement(query)
            for step in keep:
                connection.execute(step)
        except Exception as error:
            self._break(tx)
            outcome.error = _translate_error(error)
            if not connection.in_transaction:  # a full disk can end the whole transaction
                raise
            for step in undo:
                connection.execute(step)

    def _break(self, tx: Tx) -> None:
        if tx._chain is not None:
            self._broken[tx._chain] = max(self._broken.get(tx._chain, -1), tx._generation)

    def _committed(self, outcomes: list[_Outcome]) -> None:
        """Back in the event loop: caches take the change, then the bell rings, then the answers go out."""
        for outcome in outcomes:
            tx = outcome.tx
            if tx.last_pos > self._stable:
                self._stable = tx.last_pos
            if outcome.error is None:
                _call_all(tx._after)
            else:
                if tx._chain is not None and tx._generation == self.generation(tx._chain):
                    self._generations[tx._chain] = tx._generation + 1
                _call_all(tx._failed)
        for outcome in outcomes:
            if outcome.error is None:
                for users, topic, pos in outcome.tx._rings:
                    self.bell.ring(users, topic, pos)
        self.bell.moved(self._stable)
        for outcome in outcomes:
            if outcome.tx._future is not None:
                _tell(outcome.tx._future, outcome.result, outcome.error)

    async def settled(self) -> None:
        """Until everything that was queued so far is on disk, or has failed."""
        with self.write() as tx:
            tx.call(lambda query: None)
        with suppress(StorageFull, sqlite3.Error):  # those it shared a transaction with failed: that is settled too
            await tx

    async def damage(self) -> str | None:
        """What a quick look over the file finds; None where it is sound."""
        answer = str(await self.read(lambda query: query.value("PRAGMA quick_check(1)")))
        return None if answer == "ok" else answer

    # --- the database's own notes

    async def note(self, name: str) -> str | None:
        """A value of `settings`."""
        return await self.read(lambda query: query.value("SELECT value FROM settings WHERE name = $1", name))

    async def take_note(self, name: str, value: str) -> None:
        with self.write() as tx:
            tx.run(
                "INSERT INTO settings (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                name,
                value,
            )
        await tx

    # --- followers of the log

    async def followed(self, name: str) -> int | None:
        """How far the follower `name` has come; None where it has not begun."""
        return await self.read(lambda query: query.value("SELECT pos FROM followers WHERE name = $1", name))

    async def follow(self, name: str, pos: int) -> None:
        with self.write() as tx:
            tx.run(FOLLOWED, name, pos)
        await tx


FOLLOWED = "INSERT INTO followers (name, pos) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET pos = excluded.pos"


def _tell(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return  # whoever asked was cancelled
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _call_all(callbacks: Iterable[Callable[[], None]]) -> None:
    """One that goes wrong must not keep the answers of everybody in this commit."""
    for callback in callbacks:
        try:
            callback()
        except Exception as error:
            log.error("what follows a commit went wrong", exc_info=error)


def _translate_error(error: BaseException) -> BaseException:
    text = str(error)
    if isinstance(error, sqlite3.OperationalError) and ("disk is full" in text or "disk I/O error" in text):
        return StorageFull()
    return error


IntegrityError = sqlite3.IntegrityError
