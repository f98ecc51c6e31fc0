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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from relay.bell import Bell
from relay.errors import StorageFull
from relay.tables import OWN, Schema
from relay.upgrade import WrongDatabase, upgrade

P = ParamSpec("P")
T = TypeVar("T")
Row = tuple[Any, ...]

MAX_JOBS_PER_COMMIT = 256
READERS = 3
STATEMENT_CACHE = 1024
_MARK = re.compile(r"\$(\d+)")
_PRIMARY = re.compile(r"\bBIGINT PRIMARY KEY\b")
_BYTES = re.compile(r"\bBYTES\b")


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
    return _BYTES.sub("BLOB", _PRIMARY.sub("INTEGER PRIMARY KEY", sql))


@dataclass(slots=True)
class _Many:
    sql: str
    rows: list[Sequence[Any]]


class Tx:
    """A write: statements in order, at most one function whose answer `await tx` returns, and who is to be woken after it."""

    __slots__ = (
        "_db",
        "_statements",
        "_rings",
        "_after",
        "_chain",
        "_generation",
        "_future",
        "_ticked",
        "last_pos",
        "_failed",
    )

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
    _queue: SimpleQueue[Tx | None] = field(default_factory=SimpleQueue)
    _generations: dict[str, int] = field(default_factory=dict)
    _open_tx: Tx | None = None

    def __post_init__(self) -> None:
        self._next = 1
        self._stable = 0
        self.epoch = 1
        self._writer: threading.Thread | None = None
        self._local = threading.local()
        self._readers: ThreadPoolExecutor | None = None
        self._connections: list[sqlite3.Connection] = []
        self._schemas: list[Schema] = []
        self._broken: dict[str, int] = {}  # the writer thread's own
        self._unfinished = 0

    # --- opening and closing

    async def open(self, schemas: Sequence[Schema], server_name: str) -> None:
        """Makes or upgrades the file, then starts the threads. Raises WrongDatabase."""
        self._loop = asyncio.get_running_loop()
        self._schemas = list(schemas)
        await asyncio.to_thread(self._prepare, server_name)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._writer = threading.Thread(target=self._write_loop, name="writer", daemon=True)
        self._writer.start()

    async def close(self) -> None:
        if self._writer is not None:
            self._queue.put(None)
            await asyncio.to_thread(self._writer.join)
            self._writer = None
        if self._readers is not None:
            await asyncio.to_thread(self._readers.shutdown)
            self._readers = None
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
        known = connection.execute("SELECT value FROM settings WHERE name = 'server_name'").fetchone()
        if known is None:
            connection.execute(
                "INSERT INTO settings VALUES ('server_name', ?), ('epoch', '1'), ('pos', '0')", (server_name,)
            )
        elif known[0] != server_name:
            raise WrongDatabase(
                f"This database belongs to the server name {known[0]!r}, the configuration says {server_name!r}. A server name can't "
                "be changed later: put the old name back into the configuration, or start a new data folder with --data."
            )
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
        if self._readers is None:
            raise RuntimeError("the database is not open")
        return await self._loop.run_in_executor(self._readers, self._reading, function, args, kwargs)

    def _reading(self, function: Callable[..., T], args: Any, kwargs: Any) -> T:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
            connection.execute("PRAGMA query_only = ON")
        connection.execute("BEGIN")
        try:
            return function(Query(connection), *args, **kwargs)
        finally:
            connection.execute("COMMIT")

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
        if tx._ticked:
            for callback in tx._failed:
                callback()
            raise RuntimeError("something was awaited inside a write")
        if not enqueue:
            for callback in tx._failed:
                callback()
            return
        tx._future = self._loop.create_future()
        # Whoever built the write may have been cancelled; an error nobody awaits is not a second error.
        tx._future.add_done_callback(_retrieve)
        self._unfinished += 1
        self._queue.put(tx)

    def _write_loop(self) -> None:
        connection = self._connect()
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
                self._execute(connection, query, outcome)
                last_pos = max(last_pos, outcome.tx.last_pos)
            if last_pos:
                connection.execute("UPDATE settings SET value = ? WHERE name = 'pos'", (str(last_pos),))
            connection.execute("COMMIT")
        except Exception as error:  # the whole batch failed: nothing of it is on disk
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for outcome in outcomes:
                outcome.result = None
                outcome.error = outcome.error or _translate_error(error)
                self._break(outcome.tx)
        return outcomes

    def _execute(self, connection: sqlite3.Connection, query: Query, outcome: _Outcome) -> None:
        tx = outcome.tx
        if tx._chain is not None and self._broken.get(tx._chain, -1) >= tx._generation:
            outcome.error = ChainBroken(tx._chain)
            return
        connection.execute("SAVEPOINT job")
        try:
            for statement in tx._statements:
                if type(statement) is tuple:
                    connection.execute(_translated(statement[0]), statement[1])
                elif type(statement) is _Many:
                    connection.executemany(_translated(statement.sql), statement.rows)
                else:
                    outcome.result = statement(query)
            connection.execute("RELEASE job")
        except Exception as error:
            self._break(tx)
            outcome.error = _translate_error(error)
            if not connection.in_transaction:  # a full disk can end the whole transaction
                raise
            connection.execute("ROLLBACK TO job")
            connection.execute("RELEASE job")

    def _break(self, tx: Tx) -> None:
        if tx._chain is not None:
            self._broken[tx._chain] = max(self._broken.get(tx._chain, -1), tx._generation)

    def _committed(self, outcomes: list[_Outcome]) -> None:
        """Back in the event loop: caches take the change, then the bell rings, then the answers go out."""
        for outcome in outcomes:
            tx = outcome.tx
            self._unfinished -= 1
            if tx.last_pos > self._stable:
                self._stable = tx.last_pos
            if outcome.error is None:
                for callback in tx._after:
                    callback()
            else:
                if tx._chain is not None and tx._generation == self.generation(tx._chain):
                    self._generations[tx._chain] = tx._generation + 1
                for callback in tx._failed:
                    callback()
        for outcome in outcomes:
            if outcome.error is None:
                for users, topic, pos in outcome.tx._rings:
                    self.bell.ring(users, topic, pos)
        self.bell.moved(self._stable)
        for outcome in outcomes:
            future = outcome.tx._future
            if future is None or future.done():
                continue
            if outcome.error is None:
                future.set_result(outcome.result)
            else:
                future.set_exception(outcome.error)

    async def settled(self) -> None:
        """Until everything that was queued so far is on disk, or has failed."""
        with self.write() as tx:
            tx.call(lambda query: None)
        await tx

    async def damage(self) -> str | None:
        """What a quick look over the file finds; None where it is sound."""
        answer = str(await self.read(lambda query: query.value("PRAGMA quick_check(1)")))
        return None if answer == "ok" else answer

    # --- the database's own notes

    async def note(self, name: str) -> str | None:
        """A value of `settings`."""
        found: str | None = await self.read(
            lambda query: query.value("SELECT value FROM settings WHERE name = $1", name)
        )
        return found

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


def _retrieve(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def _translate_error(error: BaseException) -> BaseException:
    text = str(error)
    if isinstance(error, sqlite3.OperationalError) and ("disk is full" in text or "disk I/O error" in text):
        return StorageFull()
    return error


IntegrityError = sqlite3.IntegrityError
