"""Servers that do not come back, or not for long: what they cost, when they are given up, and what they find when they return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from federation import backoff as backoffs
from federation.backoff import Backoff, Trouble
from relay.clock import DAY, HOUR, MINUTE, SECOND
from relay.db import Query
from tests.federation.neighbours import Neighbour, TestClock, two_servers, until

ROOM, OTHER = "!room:one.test", "!other:one.test"
PATIENCE = 30.0


def waits(query: Query) -> dict[str, int]:
    return {table: query.value(f"SELECT count(*) FROM {table}") for table in ("destinations", "departing_edus")}


async def is_tried_again(one: Neighbour, server: str, later: int) -> None:
    """Time passes, and the next attempt fails."""
    before = one.backoff.trouble(server)
    one.clock.forward(later)
    await until(lambda: one.backoff.trouble(server) not in (None, before), "it is tried again", PATIENCE)
    await until(lambda: not _awake(one, server), "in vain", PATIENCE)


def _awake(one: Neighbour, server: str) -> bool:
    lane = one.outbox.positions.lanes.get(server)
    return lane is not None and lane.awake


def test_a_silent_server_is_tried_ever_more_rarely() -> None:
    clock = TestClock()
    backoff = Backoff(clock, least=5 * SECOND, most=HOUR)
    begin = clock.now()
    made: list[int] = []
    for _ in range(1_000):
        backoff.failed("gone.test")
        backoff.failed("gone.test")  # another request that fails at the same time
        made.append(clock.now() - begin)
        clock.forward(backoff.wait_left("gone.test") + 1)
        if clock.now() - begin > 60 * DAY:
            break
    assert 5 <= sum(at < 10 * MINUTE for at in made) <= 8, "soon at first"
    assert sum(at < backoffs.SILENT_AFTER for at in made) <= 7 * 24 + 12, "then by the hour"
    assert sum(at >= backoffs.SILENT_AFTER for at in made) <= 53 + 6, "and after a week by the day"
    backoff.heard("gone.test")
    assert backoff.wait_left("gone.test") == 0, "once it is heard of, at once"


async def test_who_comes_back_after_a_month_hears_the_latest_first(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.ledger.room(ROOM, two.name)
        one.ledger.room(OTHER, two.name)
        one.send_out()
        await one.ledger.says(ROOM, "before")
        await until(lambda: two.texts() == ["before"], "the wire works")
        await two.listening.stop()
        for number in range(3):
            await one.ledger.says(OTHER, f"quiet {number}")
        await until(lambda: one.backoff.wait_left(two.name) > 0, "it is gone")
        with one.db.write() as tx:
            one.departures.durable(tx, [two.name], "m.direct_to_device", {"message_id": "m1"})
            one.departures.durable(tx, [two.name], "m.device_list_update", {"user_id": "@u:one.test", "stream_id": 1})
        await tx
        await is_tried_again(one, two.name, 2 * HOUR)
        for number in range(120):
            await one.ledger.says(ROOM, f"busy {number}")
        await is_tried_again(one, two.name, 40 * DAY)
        await one.stop()
        await one.start()
        one.send_out()
        await until(lambda: two.name in one.outbox.positions.lanes, "it is not forgotten over a restart", PATIENCE)
        await is_tried_again(one, two.name, 2 * DAY)
        assert await one.db.read(waits) == {"destinations": 1, "departing_edus": 1}, "one row, and one person's devices"
        lane = one.outbox.positions.lanes[two.name]
        assert not lane.events and lane.flight is None, "nothing waits in memory"
        assert two.texts() == ["before"]

        await two.stop()
        await two.start()
        one.clock.forward(2 * DAY)
        await until(lambda: len(two.texts()) >= 5, "it is told what it missed", PATIENCE)
        assert two.texts()[1:] == ["busy 119", "quiet 0", "quiet 1", "quiet 2"], (
            "the latest first, and of the busy room only that"
        )
        assert [e["stream_id"] for e in two.edus("m.device_list_update")] == [1] and not two.edus("m.direct_to_device")
        assert len(two.taken) == 2, "in one transaction"
        await until(lambda: not one.outbox.positions.lanes, "then it is a server like others", PATIENCE)
        assert await one.db.read(waits) == {"destinations": 0, "departing_edus": 0}


async def test_who_is_gone_and_shares_no_room_is_given_up(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        room = one.ledger.room(ROOM, two.name)
        one.send_out()
        await two.listening.stop()
        await one.ledger.says(ROOM, "anybody there?")
        with one.db.write() as tx:
            one.departures.durable(tx, [two.name], "m.device_list_update", {"user_id": "@u:one.test", "stream_id": 1})
        await tx
        await until(lambda: one.backoff.wait_left(two.name) > 0, "it is gone", PATIENCE)
        await is_tried_again(one, two.name, 8 * DAY)
        assert two.name in one.outbox.positions.lanes, "as long as somebody shares a room with it"
        room.servers.discard(two.name)
        await is_tried_again(one, two.name, 2 * DAY)
        await until(lambda: not one.outbox.positions.lanes, "it is given up", PATIENCE)
        assert await one.db.read(waits) == {"destinations": 0, "departing_edus": 0}, "with what waited for it"

        # There again, with somebody in the room: it is a server like others.
        room.servers.add(two.name)
        two.clock.ahead = one.clock.ahead
        await two.stop()
        await two.start()
        await two.connections.send(one.name, "POST", "/_matrix/federation/v1/echo", {})
        await one.ledger.says(ROOM, "welcome back")
        await until(lambda: two.texts() == ["welcome back"], "it hears what is said from now on", PATIENCE)


async def test_a_server_that_answers_but_takes_nothing_is_not_pestered(tmp_path: Path) -> None:
    """A proxy without its server, or one whose operator shut us out: other questions of it are answered meanwhile."""
    async with two_servers(tmp_path) as (one, two):
        one.ledger.room(ROOM, two.name)
        asked = 0

        async def refuses(request: Any) -> Any:
            nonlocal asked
            asked += 1
            return await usual(request)

        usual, two._take = two._take, refuses  # type: ignore[method-assign]
        two.refuse_with = (500, {"errcode": "M_UNKNOWN", "error": "the disk is full"})
        await two.stop()
        await two.start()
        one.send_out()
        await one.ledger.says(ROOM, "patience")
        await until(lambda: asked == 1, "it is tried", PATIENCE)
        for number in range(2, 12):
            await until(lambda: not _awake(one, two.name), "it refuses", PATIENCE)
            await one.connections.send(two.name, "POST", "/_matrix/federation/v1/echo", {}, forced=True)
            await two.connections.send(one.name, "POST", "/_matrix/federation/v1/echo", {})
            lane = one.outbox.positions.lanes[two.name]
            assert lane.refused is not None and asked == number - 1, "no other answer makes it come sooner"
            one.clock.forward(lane.refused.retry_at - one.clock.now() + 1)
            await until(lambda wanted=number: asked == wanted, "it is tried again", PATIENCE)
        await until(lambda: not _awake(one, two.name), "it refuses", PATIENCE)
        refused = one.outbox.positions.lanes[two.name].refused
        assert refused is not None and refused.wait == HOUR, "ever more rarely"
        two.refuse_with = None
        one.clock.forward(2 * HOUR)
        await until(lambda: two.texts() == ["patience"], "and in the end it takes it", PATIENCE)
        await until(lambda: not one.outbox.positions.lanes, "and is a server like others", PATIENCE)


async def test_what_a_restart_knows_of_a_failing_server(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.ledger.room(ROOM, two.name)
        now = one.clock.now()
        one.backoff.restore(two.name, Trouble(now - 3 * DAY, now, HOUR, now + HOUR))
        one.send_out()
        await one.ledger.says(ROOM, "waiting")
        lanes = one.outbox.positions.lanes
        await until(lambda: two.name in lanes and lanes[two.name].kept is not None, "it is written down", PATIENCE)
        await one.stop()
        await one.start()
        one.send_out()
        await until(lambda: one.backoff.trouble(two.name) is not None, "it is known again", PATIENCE)
        assert one.backoff.trouble(two.name) == Trouble(now - 3 * DAY, now, HOUR, now + HOUR), (
            "since when, and until when"
        )
