"""What people read of a room's past: /messages, /context, single events, and who sees what of it."""

from __future__ import annotations

from typing import Any

import orjson

from relay.protocol import event as events
from relay.protocol.auth import auth_keys
from relay.rooms import store
from relay.rooms.room import Room
from relay.rooms.timeline import HistoryToken
from tests.rooms.ground import V3, Ground, ciphertext, said


async def test_history_is_paged_both_ways_each_message_once(ground: Ground) -> None:
    alice = ground.person("alice")
    room = await alice.creates()
    texts = [f"message {n}" for n in range(35)]
    for text in texts:
        await alice.says(room, text)

    assert await alice.reads(room, "b", 10) == texts[::-1], "paging back gives each message once, the newest first"
    assert await alice.reads(room, "f", 7) == texts, "paging forward gives each message once, the oldest first"
    *pages, last = await alice.pages(room, "b", 10)
    assert last == [], "the end of the way is an empty page"
    assert pages[-1][-1]["type"] == "m.room.create", "history ends with the room's creation"
    assert all(len(page) == 10 for page in pages[:-1]), "every page but the last is full"


async def test_paging_back_from_a_sync_token_leaves_out_what_came_later(ground: Ground) -> None:
    alice = ground.person("alice")
    room = await alice.creates()
    await alice.says(room, "before")
    pos = ground.db.stable_pos()
    await alice.says(room, "after")
    token = f"s{ground.db.epoch}_{pos}_0123abcd-0"

    assert await alice.reads(room, "b", **{"from": token}) == ["before"], (
        "back from a /sync token is what came before it"
    )
    assert await alice.reads(room, "f", **{"from": token}) == ["after"], (
        "forward from a /sync token is what came after it"
    )
    assert await alice.reads(room, "b", to=token) == ["after"], "`to` is where paging stops"

    status, answer = await alice.asks("GET", f"{V3}/rooms/{room}/messages", dir="b", **{"from": "s99_3_0123abcd-0"})
    assert (status, answer["errcode"]) == (400, "M_INVALID_PARAM"), "a token of another epoch is refused"
    status, answer = await alice.asks("GET", f"{V3}/rooms/{room}/messages")
    assert (status, answer["errcode"]) == (400, "M_MISSING_PARAM"), "the direction has to be named"


async def test_a_gap_is_filled_when_paging_back_reaches_it(ground: Ground) -> None:
    alice = ground.person("alice")
    room_id = await alice.creates()
    for n in range(100):
        await alice.says(room_id, f"old {n}")
    room = await ground.room(room_id)
    latest = next(iter(room.extremities))
    low = room.depth
    # 500 events were sent elsewhere meanwhile; what comes next cites the last of them.
    missing = _elsewhere(ground, room, latest, low, alice.id, 500)
    room.extremities = {latest: low + 500}
    first = await alice.says(room_id, "new 0")
    with ground.db.write() as tx:
        tx.run("INSERT INTO gaps (room_nid, event_id, depth) VALUES ($1, $2, $3)", room.nid, missing[-1].id, low + 501)
    await tx
    for n in range(1, 100):
        await alice.says(room_id, f"new {n}")

    async def fill(asked: Room, limit: int) -> bool:
        """The latest `limit` that are still missing, as another server would answer."""
        batch = missing[-100:]
        if not batch:
            return False
        with ground.db.write() as tx:
            for event in batch:
                assert asked.state_nid is not None
                ground.appender.history(tx, asked, event, nid=tx.pos(), state_after=asked.state_nid)
            tx.run("DELETE FROM gaps WHERE room_nid = $1", asked.nid)
            del missing[-100:]
            if missing:
                tx.run(
                    "INSERT INTO gaps (room_nid, event_id, depth) VALUES ($1, $2, $3)",
                    asked.nid,
                    missing[-1].id,
                    low + len(missing) + 1,
                )
        await tx
        return True

    pos = ground.db.stable_pos()
    ground.fills = fill
    expected = [f"old {n}" for n in range(100)] + [f"far {n}" for n in range(500)] + [f"new {n}" for n in range(100)]
    assert await alice.reads(room_id, "b", 30) == expected[::-1], "700 messages come back each once, in order"
    assert await alice.reads(room_id, "f", 64) == expected, "and forward too"
    assert await alice.reads(room_id, "b", 50, **{"from": f"a{pos}"}) == expected[::-1], (
        "and from where a /sync stood before"
    )
    assert len(ground.backfills) == 5, "other servers were asked only where a gap was met"
    seen = await alice.gets(f"{V3}/rooms/{room_id}/context/{first}", limit=4)
    assert said(seen["events_before"][0]) == "far 499", "what was filled in lies before what cites it"


def _elsewhere(ground: Ground, room: Room, latest: str, low: int, sender: str, count: int) -> list[events.Event]:
    made: list[events.Event] = []
    keys = auth_keys("m.room.encrypted", sender, None, {}, room.version)
    for n in range(count):
        made.append(
            events.build(
                room.version,
                room_id=room.room_id,
                type="m.room.encrypted",
                sender=sender,
                content=ciphertext(f"far {n}"),
                prev_events=[made[-1].id if made else latest],
                auth_events=[room.state[key] for key in keys],
                depth=low + 1 + n,
                origin_server_ts=1,
                server_name="one.example",
                key=ground.key,
            )
        )
    return made


async def test_a_filter_chooses_and_members_come_lazily(ground: Ground) -> None:
    alice, bob = ground.people("alice", "bob")
    room = await alice.creates(preset="public_chat")
    await bob.joins(room)
    for n in range(12):
        await (alice if n % 3 else bob).says(room, f"{n}")
    wanted = orjson.dumps({"senders": [bob.id], "types": ["m.room.encrypted"], "lazy_load_members": True}).decode()
    page = await alice.gets(f"{V3}/rooms/{room}/messages", dir="b", limit=3, filter=wanted)
    assert [said(e) for e in page["chunk"]] == ["9", "6", "3"], "only what the filter wants is there"
    assert [e["state_key"] for e in page["state"]] == [bob.id], "the sender's member event comes along"
    page = await alice.gets(f"{V3}/rooms/{room}/messages", dir="b", limit=3, filter=wanted, **{"from": page["end"]})
    assert [said(e) for e in page["chunk"]] == ["0"], "the next page goes on behind it"
    page = await alice.gets(f"{V3}/rooms/{room}/messages", dir="b", limit=3, filter=wanted, **{"from": page["end"]})
    assert page["chunk"] == [] and "end" not in page, "and there is nothing more"


async def test_whoever_comes_late_sees_what_the_room_lets_her_see(ground: Ground) -> None:
    alice, bob = ground.people("alice", "bob")
    for visibility, expected in {
        "shared": ["one", "two", "three"],
        "world_readable": ["one", "two", "three"],
        "invited": ["two", "three"],
        "joined": ["three"],
    }.items():
        room = await alice.creates(
            preset="private_chat",
            initial_state=[{"type": "m.room.history_visibility", "content": {"history_visibility": visibility}}],
        )
        await alice.says(room, "one")
        await alice.does("POST", f"{V3}/rooms/{room}/invite", {"user_id": bob.id})
        hidden = await alice.says(room, "two")
        await bob.joins(room)
        await alice.says(room, "three")
        assert await bob.reads(room, "b", 2) == expected[::-1], f"with {visibility} history, paging back"
        assert await bob.reads(room, "f", 2) == expected, f"with {visibility} history, paging forward"
        status, _ = await bob.asks("GET", f"{V3}/rooms/{room}/event/{hidden}")
        assert (status == 200) == ("two" in expected), f"with {visibility} history, the single event says the same"


async def test_whoever_left_sees_what_was_until_then_and_no_more(ground: Ground) -> None:
    alice, bob, eve = ground.people("alice", "bob", "eve")
    room = await alice.creates(preset="public_chat", name="before")
    await alice.says(room, "one")
    await bob.joins(room)
    await alice.says(room, "two")
    await bob.leaves(room)
    late = await alice.says(room, "three")
    await alice.sets(room, "m.room.name", {"name": "after"})

    assert await bob.reads(room) == ["two", "one"], "what came after he left is not his"
    assert await bob.reads(room, "f", 2) == ["one", "two"], "nor by paging forward"
    assert (await bob.gets(f"{V3}/rooms/{room}/state/m.room.name"))["name"] == "before", "state is that of his leaving"
    members = (await bob.gets(f"{V3}/rooms/{room}/members", membership="leave"))["chunk"]
    assert [e["state_key"] for e in members] == [bob.id], "and so are the members"
    assert (await bob.asks("GET", f"{V3}/rooms/{room}/event/{late}"))[0] == 404, "a later event is not found"
    assert (await bob.asks("GET", f"{V3}/rooms/{room}/joined_members"))[0] == 403, "who is in it now is not for him"
    await bob.does("POST", f"{V3}/rooms/{room}/forget")
    status, answer = await bob.asks("GET", f"{V3}/rooms/{room}/messages", dir="b")
    assert (status, answer["errcode"]) == (403, "M_FORBIDDEN"), "a forgotten room is closed"
    for path in ("messages?dir=b", "messages", "state", "members", f"context/{late}"):
        status, answer = await eve.asks("GET", f"{V3}/rooms/{room}/{path}")
        assert (status, answer["errcode"]) == (403, "M_FORBIDDEN"), f"a stranger gets nothing of {path}"
    assert (await eve.asks("GET", f"{V3}/rooms/{room}/event/{late}"))[0] == 404, "nor learns whether an event exists"
    await bob.joins(room)
    assert await bob.reads(room) == ["three", "two", "one"], "when he comes back, shared history is his again"


async def test_context_shows_what_lies_around(ground: Ground) -> None:
    alice = ground.person("alice")
    room = await alice.creates()
    ids = [await alice.says(room, f"{n}") for n in range(20)]
    seen = await alice.gets(f"{V3}/rooms/{room}/context/{ids[10]}", limit=5)
    assert said(seen["event"]) == "10", "the event itself"
    assert [said(e) for e in seen["events_before"]] == ["9", "8"], "what came before, the nearest first"
    assert [said(e) for e in seen["events_after"]] == ["11", "12", "13"], "what came after"
    assert {e["type"] for e in seen["state"]} >= {"m.room.create", "m.room.member"}, "the state there"
    before = await alice.gets(f"{V3}/rooms/{room}/messages", dir="b", limit=2, **{"from": seen["start"]})
    after = await alice.gets(f"{V3}/rooms/{room}/messages", dir="f", limit=2, **{"from": seen["end"]})
    assert [said(e) for e in before["chunk"]] == ["7", "6"], "`start` leads on back"
    assert [said(e) for e in after["chunk"]] == ["14", "15"], "`end` leads on forward"
    alone = await alice.gets(f"{V3}/rooms/{room}/context/{ids[10]}", limit=0)
    assert (alone["events_before"], alone["events_after"]) == ([], []), "a limit of 0 is the event alone"


async def test_an_event_says_what_is_personal_to_its_reader(ground: Ground) -> None:
    alice, phone, bob = ground.people("alice", "alice.PHONE", "bob")
    room = await alice.creates(preset="public_chat")
    await bob.joins(room)
    sent = (await alice.does("PUT", f"{V3}/rooms/{room}/send/m.room.encrypted/my-txn", ciphertext("hello")))["event_id"]
    path = f"{V3}/rooms/{room}/event/{sent}"
    assert (await alice.gets(path))["unsigned"]["transaction_id"] == "my-txn", "the sending device knows its own"
    for other in (phone, bob):
        unsigned = (await other.gets(path))["unsigned"]
        assert "transaction_id" not in unsigned, "nobody else learns the transaction ID"
        assert unsigned["membership"] == "join", "each learns her own membership at the event"
    assert (await bob.gets(path))["room_id"] == room, "the event names its room"


async def test_a_stub_is_not_shown_and_a_redacted_event_is_empty(ground: Ground) -> None:
    alice = ground.person("alice")
    room_id = await alice.creates()
    clear, secret = await alice.says(room_id, "clear"), await alice.says(room_id, "secret")
    with ground.db.write() as tx:
        tx.run("UPDATE events SET marks = marks | $2 WHERE event_id = $1", clear, store.STUB)
    await tx
    status, answer = await alice.asks("GET", f"{V3}/rooms/{room_id}/event/{clear}")
    assert (status, answer["errcode"]) == (404, "M_NOT_FOUND"), "a stub is not found"
    assert await alice.reads(room_id) == ["secret"], "nor is it in the history"
    redaction = (await alice.does("PUT", f"{V3}/rooms/{room_id}/redact/{secret}/r1", {"reason": "slipped out"}))[
        "event_id"
    ]
    event = await alice.gets(f"{V3}/rooms/{room_id}/event/{secret}")
    assert event["content"] == {}, "what was taken back is gone at once"
    assert event["unsigned"]["redacted_because"]["event_id"] == redaction, "and the answer says by what"
    assert "slipped" not in str(await alice.pages(room_id)), "the reason is left out"


def test_tokens_read_what_they_write() -> None:
    for token in (
        HistoryToken(7, 9),
        HistoryToken(7, -1),
        HistoryToken(7, 9, "b", 12),
        HistoryToken(7, 9, "f", 0),
        HistoryToken.at_pos(4),
    ):
        assert HistoryToken.parse(str(token), 1) == token, "a token survives its text"
    for text in ("", "x", "t", "t1", "a", "s1_", "t1_2c3", "a1 ", "t1_2\n", "s2_5_0"):
        try:
            HistoryToken.parse(text, 1)
        except Exception as refused:
            assert getattr(refused, "errcode", None) == "M_INVALID_PARAM", "a bad token is the client's mistake"
        else:
            raise AssertionError(f"{text!r} is no token")


async def test_queries_use_their_indexes(ground: Ground) -> None:
    from relay.rooms import timeline

    def plan(query: Any) -> str:
        values = (1, 1, 1, 0, 0, 1, 1, 1, 10)
        return str(query.all("EXPLAIN QUERY PLAN " + timeline._BACK, *values)) + str(
            query.all("EXPLAIN QUERY PLAN " + timeline._FORTH, *values)
        )

    told = await ground.db.read(plan)
    assert told.count("events_by_depth") == 2, f"history is read along its index: {told}"
    assert "TEMP B-TREE" not in told, f"and nothing is sorted: {told}"
