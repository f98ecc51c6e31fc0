"""A room of a thousand servers, three hundred of them dead: what these cost, and what they get when they come back."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from federation import catch_up, drivers
from relay.clock import HOUR
from relay.db import Query
from relay.serving import allow_many_files
from tests.federation.neighbours import Authority, Listening, Names, Neighbour, until

ROOM, OTHER = "!room:one.test", "!other:one.test"
LIVING, DEAD = 700, 300
PATIENCE = 60.0


class Street:
    """What is heard behind one door, by name; and what the one who knocks at all doors has open at once."""

    def __init__(self, one: Neighbour) -> None:
        self.heard: dict[str, list[str]] = {}
        self.asked: Counter[tuple[str, str]] = Counter()
        self.at_once = self.most_at_once = self.most_driven = 0
        for method in ("get", "send"):
            setattr(one.connections, method, self._counted(getattr(one.connections, method)))

    def _counted(self, ask: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def counts(server: str, *args: Any, **more: Any) -> Any:
            self.asked[server, args[0]] += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self.most_driven = max(self.most_driven, _driven())
            try:
                return await ask(server, *args, **more)
            finally:
                self.at_once -= 1

        return counts

    async def takes(self, request: web.BaseRequest) -> web.Response:
        if request.path == drivers.LIVES:
            return web.json_response({"server": {}})
        body = orjson.loads(await request.read())
        texts = [pdu["content"]["ciphertext"] for pdu in body["pdus"]]
        self.heard.setdefault(request.host, []).extend(texts)
        return web.json_response({"pdus": {}})

    def forget(self) -> None:
        self.asked.clear()
        self.most_at_once = self.most_driven = 0

    def made(self, what: str, servers: list[str]) -> int:
        return sum(self.asked[server, what] for server in servers)


def _driven() -> int:
    return sum(getattr(task.get_coro(), "__name__", "") == "_drive" for task in asyncio.all_tasks())


@contextlib.asynccontextmanager
async def a_town_of_a_thousand(
    folder: Path,
) -> AsyncIterator[tuple[Neighbour, Street, list[str], list[str], Listening]]:
    allow_many_files()
    authority = Authority(folder)
    one = Neighbour("one.test", authority, Names(), folder)
    await one.start()
    street = Street(one)
    many = Listening(web.Server(street.takes), authority.issue("*.living.test"))
    gone = Listening(web.Server(street.takes), authority.issue("*.dead.test"))
    await many.start()
    try:
        living = [f"d{number}.living.test:{many.port}" for number in range(LIVING)]
        dead = [f"d{number}.dead.test:{gone.port}" for number in range(DEAD)]
        one.ledger.room(ROOM, *living, *dead)
        yield one, street, living, dead, gone
    finally:
        await many.stop()
        await gone.stop()
        await one.stop()


def rows(query: Query) -> list[Any]:
    return query.all("SELECT * FROM destinations ORDER BY server")


async def test_three_hundred_dead_among_a_thousand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_town_of_a_thousand(tmp_path) as (one, street, living, dead, gone):
        # Whatever the machine is busy with, no second attempt falls into the first part.
        one.backoff._least = one.backoff._most = HOUR
        lanes = one.outbox.positions.lanes
        one.send_out()
        said = [f"message {number}" for number in range(4)]
        await one.ledger.says(ROOM, said[0])
        await until(lambda: all(street.heard.get(name) == said[:1] for name in living), "the living have it", PATIENCE)
        await until(lambda: len(one.backoff._troubles) == DEAD, "and the dead are found out", PATIENCE)
        assert street.made("PUT", living) == LIVING and street.made("PUT", dead) == DEAD, "one request each"
        assert street.most_at_once <= drivers.MAX_AWAKE + drivers.MAX_SLOW, "so many connections at once"
        assert street.most_driven <= 2 * drivers.MAX_AWAKE + drivers.MAX_SLOW, (
            "so many tasks, some of which are at their end"
        )
        await until(lambda: set(lanes) == set(dead), "only the dead are remembered", PATIENCE)
        before = await one.db.read(rows)
        assert [row[0] for row in before] == sorted(dead), "each by one row"

        street.forget()
        for text in said[1:]:
            await one.ledger.says(ROOM, text)
        one.departures.passing([*living, *dead], "m.typing", {"typing": True}, "typing/alice")
        await until(lambda: all(street.heard[name] == said for name in living), "life goes on, in order", PATIENCE)
        await until(lambda: set(lanes) == set(dead), "who has everything is forgotten again", PATIENCE)
        assert street.made("PUT", living) <= 4 * LIVING and not street.made("PUT", dead), "nobody asks the dead"
        assert all(len(lanes[name].events) == len(said) and not lanes[name].passing for name in dead)
        assert len(one.outbox._drivers.timers) <= DEAD, "one timer each"
        assert await one.db.read(rows) == before, "of the dead nothing new is written down"

        # They stay away: an attempt is one small question, and nothing is read for it.
        one.ledger.room(OTHER, *dead)
        reads = 0
        new_events = one.ledger.new_events

        def counted(*args: Any) -> Any:
            nonlocal reads
            reads += 1
            return new_events(*args)

        monkeypatch.setattr(one.ledger, "new_events", counted)
        for _ in range(2):
            street.forget()
            one.clock.forward(3 * HOUR)
            await until(
                lambda: street.made(drivers.LIVES, dead) + street.made("PUT", dead) == DEAD, "each is tried", PATIENCE
            )
            await until(lambda: all(one.backoff.wait_left(name) for name in dead), "and found gone", PATIENCE)
            assert street.most_at_once <= drivers.MAX_RETRYING, "few of them at once"
            await until(lambda: _driven() == 0, "then there is peace", PATIENCE)
        assert street.made(drivers.LIVES, dead) == DEAD and reads == 0
        assert not any(lanes[name].events or lanes[name].flight for name in dead), "in memory nothing waits for them"

        # Back again, all at once: the newest first, and the log is read once for all of them.
        for number in range(60):
            await one.ledger.says(OTHER, f"other {number}")
        await one.ledger.says(ROOM, "the latest")
        await until(lambda: one.outbox.positions.pos >= one.db.stable_pos(), "it is handed over", PATIENCE)
        monkeypatch.setattr(catch_up, "WINDOW", 16)
        await until(
            lambda: all(street.heard[name][-1] == "the latest" for name in living), "the living have it", PATIENCE
        )
        street.forget()
        reads = 0
        await gone.start()
        one.clock.forward(3 * HOUR)
        missed = [*said, "the latest", "other 59"]
        await until(
            lambda: all(street.heard.get(name) == missed for name in dead), "they have what they missed", PATIENCE
        )
        assert street.made(drivers.LIVES, dead) == DEAD and street.made("PUT", dead) == DEAD, "in one transaction each"
        assert street.most_at_once <= drivers.MAX_AWAKE + drivers.MAX_SLOW
        assert reads <= DEAD + 100, "what was already complete of the log was read for all of them together"
        await until(lambda: not lanes and not one.backoff._troubles, "and leave no trace in memory", PATIENCE)
        assert await one.db.read(rows) == [], "nor on disk"
