"""The database's writes: together in one commit, each on its own feet, in chains, and never half."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay.bell import Bell
from relay.db import ChainBroken, Database, IntegrityError, Query
from relay.errors import StorageFull
from relay.tables import Schema, Table
from relay.upgrade import WrongDatabase

STEP = "CREATE TABLE notes (pos BIGINT PRIMARY KEY, words TEXT NOT NULL UNIQUE)"
NOTES = Schema("notes", (Table("notes", "tests", {}),), (STEP,))
WRITE = "INSERT INTO notes (pos, words) VALUES ($1, $2)"


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    opened = Database(tmp_path / "relay.db", Bell())
    await opened.open([NOTES], "one.example")
    yield opened
    await opened.close()


async def words(db: Database) -> list[str]:
    return [row[0] for row in await db.read(lambda query: query.all("SELECT words FROM notes ORDER BY pos"))]


def note(db: Database, text: str, chain: str | None = None) -> Any:
    with db.write(chain=chain) as tx:
        tx.run(WRITE, tx.pos(), text)
    return tx


async def outcomes(*writes: Any) -> list[Any]:
    return await asyncio.gather(*(_awaited(write) for write in writes), return_exceptions=True)


async def _awaited(write: Any) -> Any:
    return await write


async def test_one_that_fails_takes_nobody_with_it(db: Database) -> None:
    results = await outcomes(note(db, "a"), note(db, "a"), note(db, "b"))
    assert isinstance(results[1], IntegrityError), "the second of the same name is refused"
    assert await words(db) == ["a", "b"], "the others of the same commit stand"


async def test_a_chain_stands_or_falls_in_order(db: Database) -> None:
    results = await outcomes(
        note(db, "1", "room"),
        note(db, "1", "room"),
        note(db, "2", "room"),
        note(db, "3", "other"),
        note(db, "4", "room"),
    )
    assert results[0] is None and results[3] is None, "what came before, and other chains, stand"
    assert isinstance(results[1], IntegrityError), "the one that failed says why"
    assert all(isinstance(results[at], ChainBroken) for at in (2, 4)), "what was built on it fails with it"
    assert await words(db) == ["1", "3"]
    assert await outcomes(note(db, "5", "room")) == [None], "built anew, the chain goes on"


async def test_memory_is_dropped_before_anybody_hears_of_the_failure(db: Database) -> None:
    order: list[str] = []
    with db.write(chain="room") as tx:
        tx.run(WRITE, tx.pos(), "x")
        tx.run(WRITE, tx.pos(), "x")
        tx.failed(lambda: order.append("dropped"))
        tx.after(lambda: order.append("kept"))
        tx.ring(["@anna:one.example"], "room")
    with pytest.raises(IntegrityError):
        await tx
    order.append("heard")
    assert order == ["dropped", "heard"]
    assert not db.bell.changed("@anna:one.example", 0, 0), "and no bell rang"
    assert await words(db) == [], "nothing of it is on disk, though it was alone in its commit"
    last = tx.last_pos
    await db.close()
    await db.open([NOTES], "one.example")
    assert db.stable_pos() == last, "its number is spent all the same"


async def test_what_raises_inside_the_block_is_never_written(db: Database) -> None:
    dropped: list[bool] = []
    with pytest.raises(KeyError), db.write() as tx:
        tx.run(WRITE, tx.pos(), "never")
        tx.failed(lambda: dropped.append(True))
        raise KeyError("in the middle")
    await db.settled()
    assert await words(db) == [] and dropped == [True]
    assert await outcomes(note(db, "later")) == [None], "the next write is not disturbed"


async def test_awaiting_inside_a_write_is_refused(db: Database) -> None:
    dropped: list[bool] = []
    with pytest.raises(RuntimeError, match="awaited inside a write"), db.write() as tx:
        tx.run(WRITE, tx.pos(), "never")
        tx.failed(lambda: dropped.append(True))
        await asyncio.sleep(0)
    assert dropped == [True] and await words(db) == []
    with pytest.raises(RuntimeError, match="inside another"), db.write(), db.write():
        pass
    assert await outcomes(note(db, "later")) == [None]


async def test_a_function_answers_or_undoes_its_write(db: Database) -> None:
    with db.write() as tx:
        tx.run(WRITE, tx.pos(), "a")
        tx.call(lambda query: query.value("SELECT count(*) FROM notes"))
    assert await tx == 1, "it sees the write's own rows"

    def fails(query: Query) -> None:
        raise ValueError("no")

    with db.write() as tx:
        tx.run(WRITE, tx.pos(), "b")
        tx.call(fails)
    with pytest.raises(ValueError, match="no"):
        await tx
    assert await words(db) == ["a"]


async def test_a_callback_that_goes_wrong_keeps_nobodys_answer(db: Database) -> None:
    def wrong() -> None:
        raise ValueError("a cache that does not work")

    with db.write() as first:
        first.run(WRITE, first.pos(), "a")
        first.after(wrong)
    second = note(db, "b")
    assert await asyncio.wait_for(outcomes(first, second), 5) == [None, None], "both are answered: they are on disk"
    assert db.stable_pos() >= second.last_pos


async def test_a_full_disk_fails_all_of_a_commit_and_then_none(db: Database) -> None:
    class Full:
        def __init__(self, connection: sqlite3.Connection) -> None:
            self._connection = connection

        def execute(self, sql: str, *params: Any) -> Any:
            if sql == "COMMIT":
                raise sqlite3.OperationalError("database or disk is full")
            return self._connection.execute(sql, *params)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._connection, name)

    commit = db._commit
    db._commit = lambda connection, query, batch: commit(Full(connection), query, batch)  # type: ignore
    writes = [note(db, "a"), note(db, "b", "room"), note(db, "c", "room")]
    results = await outcomes(*writes)
    assert all(isinstance(result, StorageFull | ChainBroken) for result in results), "nothing of it was saved"
    await db.settled()
    assert await words(db) == [], "reading goes on, and whoever waits for the writer is not told of others' trouble"
    db._commit = commit  # type: ignore[method-assign]
    assert await outcomes(note(db, "d", "room")) == [None], "with room again, it goes on by itself"
    assert await words(db) == ["d"]


async def test_the_line_has_no_holes_for_those_who_follow(db: Database) -> None:
    seen: list[int] = []
    for number in range(50):
        write = note(db, str(number))
        write._after.append(lambda write=write: seen.append(db.stable_pos() - write.last_pos))
    await db.settled()
    assert len(seen) == 50 and min(seen) >= 0, "who hears of a commit finds it below the stable position"
    stable = db.stable_pos()
    count = await db.read(lambda query: query.value("SELECT count(*) FROM notes WHERE pos <= $1", stable))
    assert count == 50, "and all that lies below it is there"


async def test_a_new_start_goes_on_with_the_line(db: Database, tmp_path: Path) -> None:
    await outcomes(note(db, "a"), note(db, "a"))
    used = db._next
    await db.close()
    with pytest.raises(RuntimeError, match="closed"):
        note(db, "too late")
    again = Database(tmp_path / "relay.db", Bell())
    await again.open([NOTES], "one.example")
    assert again.next_pos() >= used, "no number is given twice, also those of writes that failed"
    await again.close()
    with pytest.raises(WrongDatabase, match=r"one\.example"):
        await Database(tmp_path / "relay.db", Bell()).open([NOTES], "other.example")


async def test_what_is_deleted_is_not_in_the_file(db: Database, tmp_path: Path) -> None:
    secret = "a-canary-that-sings-" * 40
    await outcomes(note(db, secret))
    with db.write() as tx:
        tx.run("DELETE FROM notes")
    await tx
    await db.close()  # the last connection puts the log into the file
    assert files_with(tmp_path, secret) == [], "its pages were overwritten"


def files_with(folder: Path, text: str) -> list[str]:
    return [path.name for path in folder.iterdir() if text.encode() in path.read_bytes()]


async def test_an_upgrade_takes_a_copy_and_stands_or_falls_whole(tmp_path: Path) -> None:
    path = tmp_path / "relay.db"
    db = Database(path, Bell())
    await db.open([NOTES], "one.example")
    await outcomes(note(db, "before"))
    await db.close()

    broken = Schema(
        "notes", NOTES.tables, (STEP, "ALTER TABLE notes ADD COLUMN mood TEXT; INSERT INTO nowhere VALUES (1)")
    )
    with pytest.raises(sqlite3.OperationalError):
        await Database(path, Bell()).open([broken], "one.example")
    good = Schema(
        "notes", NOTES.tables, (STEP, "ALTER TABLE notes ADD COLUMN mood TEXT; UPDATE notes SET mood = 'calm'")
    )
    db = Database(path, Bell())
    await db.open([good], "one.example")
    mood = await db.read(lambda query: query.value("SELECT mood FROM notes"))
    assert mood == "calm", "a step that failed left nothing behind that is in the way of the next attempt"
    await db.close()
    copy = sqlite3.connect(path.with_suffix(".before-upgrade"))
    assert copy.execute("SELECT words FROM notes").fetchall() == [("before",)], "the file as it was lies beside it"
    assert [row[1] for row in copy.execute("PRAGMA table_info(notes)")] == ["pos", "words"]
    copy.close()
    with pytest.raises(WrongDatabase, match="newer"):
        await Database(path, Bell()).open([NOTES], "one.example")
