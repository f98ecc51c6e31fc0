"""What leaves by itself arrives once, in order, whoever goes away and comes back meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from federation import catch_up, drivers
from federation.backoff import Trouble
from relay import departures
from relay.clock import DAY, HOUR, MINUTE, SECOND
from relay.db import Query
from tests.federation.neighbours import Neighbour, two_servers, until

ROOM = "!room:one.test"


def ids_of(server: Neighbour) -> list[str]:
    return [txn for _, txn, _ in server.taken]


async def test_events_cross_at_once_and_in_order(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.ledger.room(ROOM, two.name)
        one.send_out()
        await one.ledger.says(ROOM, "first")
        await until(lambda: two.texts() == ["first"], "the first message arrives")
        for number in range(120):
            await one.ledger.says(ROOM, str(number))
        await until(lambda: len(two.texts()) == 121, "all messages arrive")
        assert two.texts()[1:] == [str(number) for number in range(120)], "in the order in which they were sent"
        assert all(len(body["pdus"]) <= 50 for _, _, body in two.taken), "no transaction has more events than allowed"
        assert len(set(ids_of(two))) == len(two.taken), "each transaction has its own ID"
        assert {origin for origin, _, _ in two.taken} == {one.name}


async def test_what_was_just_committed_is_not_read_again_and_what_memory_lost_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.ledger.room(ROOM, two.name)
        await one.ledger.says(ROOM, "before the outbox begins")
        one.send_out()
        await until(lambda: len(two.texts()) == 1, "what was there before is read from the log")
        reads = 0
        new_events = one.ledger.new_events

        def counted(*args: Any) -> Any:
            nonlocal reads
            reads += 1
            return new_events(*args)

        monkeypatch.setattr(one.ledger, "new_events", counted)
        for number in range(5):
            await one.ledger.says(ROOM, str(number))
        with one.db.write() as tx:
            one.departures.durable(tx, [two.name], "m.direct_to_device", {"message_id": "m1"})
        await tx
        await until(lambda: len(two.texts()) == 6 and two.edus("m.direct_to_device"), "all of it arrives")
        assert reads == 0, "from memory"
        monkeypatch.setattr(departures, "MAX_FRESH", 3)
        events = [one.ledger.build(ROOM, f"many at once {number}") for number in range(10)]
        await asyncio.gather(*(one.ledger.writes(event) for event in events))
        await until(lambda: len(two.texts()) == 16, "more than memory keeps arrives as well")
        assert two.texts()[6:] == [f"many at once {number}" for number in range(10)], "in order"
        assert reads > 0, "from the log"


async def test_who_gets_an_event(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        room = one.ledger.room(ROOM)
        one.send_out()
        await one.ledger.says(ROOM, "nobody else is here")
        await until(lambda: one.outbox.positions.pos >= one.db.stable_pos(), "the outbox has seen it")
        room.servers.add(two.name)
        await one.ledger.writes(one.ledger.build(ROOM, "of another server, and nobody asked us"), marks=0)
        await two.ledger.writes(two.ledger.build(ROOM, "x"), marks=0)
        await one.ledger.writes(two.ledger.build(ROOM, "from two, to be passed on"), marks=2)
        await one.ledger.says(ROOM, "both are here")
        await until(lambda: "both are here" in two.texts(), "the message arrives")
        assert two.texts() == ["both are here"], "not what is not ours, and nothing back to where it comes from"
        room.servers.discard(two.name)
        kick = {"type": "m.room.member", "state_key": f"@bob:{two.name}", "content": {"membership": "leave"}}
        await one.ledger.says(ROOM, "", **kick)
        await one.ledger.says(ROOM, "among ourselves")
        await until(lambda: two.texts() and two.texts()[-1] == "m.room.member", "who is put out gets to know")
        await asyncio.sleep(0.1)
        assert "among ourselves" not in two.texts(), "and nothing after it"


async def test_a_server_that_goes_away_and_comes_back_with_restarts_in_between(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.ledger.room(ROOM, two.name)
        one.send_out()
        await one.ledger.says(ROOM, "before")
        await until(lambda: two.texts() == ["before"], "the wire works")
        await two.listening.stop()
        for number in range(3):
            await one.ledger.says(ROOM, f"while away {number}")
        await until(lambda: one.backoff.wait_left(two.name) > 0, "the outbox finds out")
        with one.db.write() as tx:
            one.departures.durable(tx, [two.name], "m.direct_to_device", {"message_id": "m1"})
        await tx
        await asyncio.sleep(0.1)

        await one.stop()
        await one.start()
        one.send_out()
        await one.ledger.says(ROOM, "after a restart")
        await until(lambda: one.backoff.wait_left(two.name) > 0, "the wait outlives a restart")

        await one.crash()
        await one.start()
        await one.ledger.says(ROOM, "before the outbox begins")
        one.send_out()
        await asyncio.sleep(0.1)
        assert two.texts() == ["before"], "nothing has arrived so far"

        await two.stop()
        await two.start()
        one.clock.forward(10 * MINUTE)
        await until(lambda: "before the outbox begins" in two.texts(), "the outbox tries again")
        assert two.texts() == [
            "before",
            "while away 0",
            "while away 1",
            "while away 2",
            "after a restart",
            "before the outbox begins",
        ], "nothing is lost, nothing comes twice, and the order is right"
        await until(lambda: two.edus("m.direct_to_device") == [{"message_id": "m1"}], "the to-device message came once")

        def left(query: object) -> tuple[int, int]:
            return (
                query.value("SELECT count(*) FROM destinations"),  # type: ignore[attr-defined]
                query.value("SELECT count(*) FROM departing_edus"),  # type: ignore[attr-defined]
            )

        for _ in range(1_000):
            if await one.db.read(left) == (0, 0):
                break
            await asyncio.sleep(0.02)
        assert await one.db.read(left) == (0, 0), "who has taken everything leaves no trace"
        assert not one.outbox.positions.lanes, "and costs no memory"


async def test_the_answer_is_lost_and_the_same_transaction_comes_again(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.ledger.room(ROOM, two.name)
        one.send_out()
        taken: list[str] = []
        answer = two._take

        async def loses(request):  # type: ignore[no-untyped-def]
            taken.append(request.params["txnId"])
            if len(taken) == 1:
                request.http.transport.abort()
            return await answer(request)

        two._take = loses  # type: ignore[method-assign]
        await two.stop()
        await two.start()
        await one.ledger.says(ROOM, "once")
        await until(lambda: len(taken) >= 1, "the first attempt is made")
        await one.ledger.says(ROOM, "later")
        one.clock.forward(MINUTE)
        await until(lambda: "later" in two.texts(), "the second message follows")
        assert taken[0] == taken[1], "what was not answered is sent again under the same ID"

        await one.crash()
        taken.clear()
        await one.start()
        one.send_out()
        await asyncio.sleep(0.2)
        repeated = set(taken)
        assert repeated <= set(ids_of(two)), "a crash repeats at most what was sent, under the ID it had"


async def test_the_first_attempt_after_a_crash_has_the_id_of_the_last_before_it(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.ledger.room(ROOM, two.name)
        await one.ledger.says(ROOM, "written, not sent")
        one.outbox._keep_seconds = 1_000.0  # as if the process died before it could write anything down
        one.send_out()
        await until(lambda: len(two.taken) == 1, "it is sent")
        await one.crash()
        await one.start()
        one.send_out()
        await until(lambda: len(two.taken) == 2, "it is sent again, since nobody remembers that it was")
        assert len(set(ids_of(two))) == 1, "with the same ID, by which the peer knows it"
        assert two.taken[0][2]["pdus"] == two.taken[1][2]["pdus"], "and the same events"


async def test_after_a_long_absence_a_busy_room_sends_only_its_latest(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        busy, quiet = "!busy:one.test", "!quiet:one.test"
        one.ledger.room(busy, two.name)
        one.ledger.room(quiet, two.name)
        now = one.clock.now()
        one.backoff.restore(two.name, Trouble(now - 2 * HOUR, now, MINUTE, now + MINUTE))
        one.send_out()
        for number in range(130):
            await one.ledger.says(busy, f"busy {number}")
            if number % 50 == 0:
                await one.ledger.says(quiet, f"quiet {number}")
        await until(lambda: one.outbox.positions.pos >= one.db.stable_pos(), "the outbox has seen it all")
        lane = one.outbox.positions.lanes[two.name]
        assert len(lane.events) <= 50, "what waits for a server that is down is not all in memory"
        one.clock.forward(2 * MINUTE)
        await until(lambda: len(two.texts()) >= 4, "what it missed arrives")
        texts = two.texts()
        assert texts[0] == "busy 129", "the latest of all first"
        assert [text for text in texts if text.startswith("quiet")] == ["quiet 0", "quiet 50", "quiet 100"]
        assert len(texts) == 4, "and nothing else of the busy room, whose latest event descends from all the others"
        assert len(set(texts)) == len(texts), "nothing comes twice"
        await one.ledger.says(busy, "and on")
        await until(lambda: two.texts()[-1] == "and on", "then it goes on as usual")


async def test_after_a_long_absence_only_so_much_is_sent_in_all_and_the_latest_of_each_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, rooms, each = 30, 8, 12
    monkeypatch.setattr(catch_up, "MAX_IN_ALL", most)
    async with two_servers(tmp_path) as (one, two):
        names = [f"!room{number}:one.test" for number in range(rooms)]
        for name in names:
            one.ledger.room(name, two.name)
        now = one.clock.now()
        one.backoff.restore(two.name, Trouble(now - 2 * HOUR, now, MINUTE, now + MINUTE))
        one.send_out()
        for number in range(each):
            for name in names:
                await one.ledger.says(name, f"{name} {number}")
        await until(lambda: one.outbox.positions.pos >= one.db.stable_pos(), "the outbox has seen it all")
        one.clock.forward(2 * MINUTE)
        latest = {f"{name} {each - 1}" for name in names}
        await until(lambda: latest <= set(two.texts()), "the latest of each room arrives")
        assert len(two.texts()) == len(set(two.texts())) <= most + rooms, "and what comes beside it is bounded"
        await one.ledger.says(names[0], "and on")
        await until(lambda: two.texts()[-1] == "and on", "then it goes on as usual")


async def test_a_log_that_goes_on_is_not_followed_before_anything_is_sent(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.ledger.room(ROOM, two.name)
        now = one.clock.now()
        one.backoff.restore(two.name, Trouble(now - 2 * HOUR, now, MINUTE, now + MINUTE))
        one.send_out()
        catching_up = one.outbox._drivers._catching_up
        usual, arrived = catching_up.missed, list[int]()

        async def missed(server: str, after: int, upto: int) -> Any:
            arrived.append(len(two.texts()))
            found = await usual(server, after, upto)
            if len(arrived) <= 3:
                for number in range(10):
                    await one.ledger.says(ROOM, f"{len(arrived)} {number}")
                await until(lambda: one.outbox.positions.pos >= one.db.stable_pos(), "somebody talks on")
            return found

        catching_up.missed = missed  # type: ignore[method-assign]
        for number in range(60):
            await one.ledger.says(ROOM, f"0 {number}")
        await until(lambda: one.outbox.positions.pos >= one.db.stable_pos(), "the outbox has seen it all")
        one.clock.forward(2 * MINUTE)
        await until(lambda: bool(two.texts()) and two.texts()[-1] == "3 9", "all of it arrives")
        assert arrived[:2] == [0, 1], "what was found is sent before it looks for more"
        assert two.texts() == ["0 59", *(f"{read} {number}" for read in (1, 2, 3) for number in range(10))]


async def test_those_that_keep_their_answers_do_not_delay_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More silent servers than may be driven at once, and one that listens."""
    monkeypatch.setattr(drivers, "MAX_AWAKE", 3)
    silent = await asyncio.start_server(_says_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with two_servers(tmp_path) as (one, two):
        # Its name comes last in whatever order they are woken.
        one.ledger.room(ROOM, *(f"s{number}.test:{port}" for number in range(12)))
        one.send_out()
        await one.ledger.says(ROOM, "for the silent")
        await until(lambda: one.outbox.positions.pos >= one.db.stable_pos(), "the outbox has seen it")
        one.ledger.room("!other:one.test", two.name)
        await one.ledger.says("!other:one.test", "for the one that listens")
        await until(lambda: two.texts() == ["for the one that listens"], "it does not wait for their time-outs")
        assert len(one.outbox.positions.lanes) == 12 + 1 and not one.backoff._troubles, "of which none is over yet"
        silent.close()


async def _says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def test_a_request_of_theirs_shortens_the_wait(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.ledger.room(ROOM, two.name)
        now = one.clock.now()
        one.backoff.restore(two.name, Trouble(now - HOUR, now - MINUTE, HOUR, now + HOUR))
        one.send_out()
        await one.ledger.says(ROOM, "waiting")
        await asyncio.sleep(0.1)
        assert two.texts() == [], "the server is left alone"
        await two.connections.send(one.name, "POST", "/_matrix/federation/v1/echo", {})
        await until(lambda: two.texts() == ["waiting"], "it has shown that it lives")


async def test_passing_things_leave_soon_or_never(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.send_out()
        await until(lambda: one.outbox._drivers.group is not None, "it begins")
        one.departures.passing([two.name], "m.typing", {"typing": True}, "typing/alice")
        one.departures.passing([two.name], "m.typing", {"typing": False}, "typing/alice")
        await until(lambda: two.edus("m.typing") != [], "typing crosses")
        assert two.edus("m.typing") == [{"typing": False}], "of one key only the latest leaves"
        for _ in range(2):
            one.departures.passing([two.name], "m.typing", {"typing": True}, "typing/alice")
            await until(
                lambda: (
                    one.outbox.positions.lanes.get(two.name) is None
                    or not one.outbox.positions.lanes[two.name].has_work
                ),
                "it left",
            )
        assert len(set(ids_of(two))) == len(two.taken), "the same words at another time are another transaction"
        before = len(two.taken)
        one.backoff.failed(two.name)
        one.departures.passing([two.name], "m.typing", {"typing": True}, "typing/alice")
        one.clock.forward(MINUTE)
        await asyncio.sleep(0.1)
        assert len(two.taken) == before, "what passes does not wait for a server that is down"


async def test_one_bad_event_does_not_stop_the_rest(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.ledger.room(ROOM, two.name)
        two.refuse_event = "poison"
        for text in ("a", "poison", "b", "c"):
            await one.ledger.says(ROOM, text)
        one.send_out()

        def all_but_one() -> bool:
            one.clock.forward(MINUTE)  # each of its attempts has to wait for the next
            return two.texts() == ["a", "b", "c"]

        await until(all_but_one, "everything else arrives")


async def test_a_server_that_answers_errors_is_left_alone_and_loses_nothing(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        one.ledger.room(ROOM, two.name)
        two.refuse_with = (429, {"errcode": "M_LIMIT_EXCEEDED", "error": "slowly"})
        one.send_out()
        await one.ledger.says(ROOM, "patient")
        await until(lambda: one.backoff.wait_left(two.name) > SECOND, "it is left alone")
        two.refuse_with = None
        one.clock.forward(MINUTE)
        await until(lambda: two.texts() == ["patient"], "then it arrives")


async def test_what_was_said_before_a_server_left_reaches_it_afterwards(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        room = one.ledger.room(ROOM, two.name)
        await two.listening.stop()
        for text in ("you are still here", "still"):
            await one.ledger.says(ROOM, text)
        gone_at = one.db.stable_pos()
        kick = {"type": "m.room.member", "state_key": f"@bob:{two.name}", "content": {"membership": "leave"}}
        await one.ledger.says(ROOM, "", **kick)
        await one.ledger.says(ROOM, "gone")
        room.servers.discard(two.name)
        one.ledger.moves.append((ROOM, f"@bob:{two.name}", "join", "leave", gone_at + 1))
        with one.db.write() as tx:
            tx.run("INSERT INTO destinations (server, position) VALUES ($1, $2)", two.name, 0)
            tx.run("INSERT INTO followers (name, pos) VALUES ($1, $2)", "outbox", one.db.stable_pos())
        await tx
        await two.stop()
        await two.start()
        one.send_out()
        await until(lambda: len(two.texts()) == 3, "what was its own arrives")
        assert two.texts() == ["you are still here", "still", "m.room.member"], "up to its leaving, and no further"


async def test_a_newcomer_gets_what_was_old_once_and_the_log_is_not_read_again_for_it(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        room = one.ledger.room(ROOM)
        old = one.ledger.build(ROOM, "old")
        await one.ledger.writes(old)
        for number in range(3):
            await one.ledger.says(ROOM, str(number))
        came_at = one.db.stable_pos()

        async def as_seen(server: str, event_ids: Sequence[str]) -> list[tuple[str, bytes]]:
            return [(event_id, old.raw) for event_id in event_ids]

        one.outbox.as_seen_by = as_seen
        one.send_out()
        await until(lambda: one.outbox.positions.pos >= came_at, "what was said before has been handed over")
        await two.listening.stop()
        room.servers.add(two.name)
        one.outbox.newcomer(two.name, [old.id])
        one.outbox.newcomer(two.name, [old.id])
        await one.ledger.says(ROOM, "new")
        await until(lambda: len(one.outbox.positions.lane(two.name).events) == 2, "both wait")
        position = one.outbox.positions.lane(two.name).position
        assert position is not None and position >= came_at, "what is behind it is not for the newcomer"
        await two.listening.start()
        one.clock.forward(MINUTE)
        await until(lambda: sorted(two.texts()) == ["new", "old"], "both arrive, each once")


async def test_what_waits_for_a_server_that_does_not_come_back_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(departures, "MAX_MESSAGES_WAITING", 3)
    async with two_servers(tmp_path) as (one, two):
        one.ledger.room(ROOM, two.name)
        await two.listening.stop()
        one.send_out()

        async def queues() -> None:
            for number in range(6):
                with one.db.write() as tx:
                    one.departures.durable(tx, [two.name], "m.direct_to_device", {"message_id": f"m{number}"})
                    update = {"user_id": f"@u{number % 2}:one.test", "stream_id": number}
                    one.departures.durable(tx, [two.name], "m.device_list_update", update)
                await tx

        def waits(query: Query) -> list[tuple[str, dict[str, Any]]]:
            rows = query.all("SELECT type, content FROM departing_edus ORDER BY pos")
            return [(edu_type, orjson.loads(bytes(content))) for edu_type, content in rows]

        async def fails_again() -> None:
            before = one.backoff.trouble(two.name)
            failed_at = before.failed_at if before is not None else 0
            one.clock.forward(2 * HOUR)
            await until(
                lambda: (now := one.backoff.trouble(two.name)) is not None and now.failed_at > failed_at, "it is tried"
            )
            await until(lambda: not one.outbox.positions.to_trim, "what waits is looked over")
            await one.db.settled()

        await queues()
        await until(lambda: one.backoff.wait_left(two.name) > 0, "the outbox finds out")
        assert len(await one.db.read(waits)) == 12, "a short absence costs nothing"
        await fails_again()
        rows = await one.db.read(waits)
        messages = [content["message_id"] for edu_type, content in rows if edu_type == "m.direct_to_device"]
        lists = {content["user_id"]: content["stream_id"] for edu_type, content in rows if "list" in edu_type}
        assert messages == ["m3", "m4", "m5"], "the newest messages are kept"
        assert lists == {"@u0:one.test": 4, "@u1:one.test": 5} and len(rows) == 5, "and each person's latest devices"
        one.clock.forward(31 * DAY)
        await fails_again()
        rows = await one.db.read(waits)
        assert [edu_type for edu_type, _ in rows] == ["m.device_list_update"] * 2, "after a month no messages"
        await two.stop()
        await two.start()
        one.clock.forward(2 * HOUR)
        await until(lambda: len(two.edus("m.device_list_update")) == 2, "back again, it learns of the devices")
