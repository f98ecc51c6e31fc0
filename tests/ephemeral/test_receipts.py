"""Stories of receipts: who sees how far somebody has read, here and on other servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay.ephemeral import receipts
from relay.errors import ApiError, Forbidden, InvalidParam
from relay.part import SyncShare
from tests.ephemeral.rooms_house import House, quoted


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with House(tmp_path) as house:
        yield house


def seen(share: SyncShare, room_id: str, kind: str = "m.read") -> dict[str, dict[str, Any]]:
    """event -> person -> receipt, over all threads."""
    found: dict[str, dict[str, Any]] = {}
    for event in share.rooms[room_id].ephemeral if room_id in share.rooms else []:
        if event["type"] == "m.receipt":
            for event_id, kinds in event["content"].items():
                found.setdefault(event_id, {}).update(kinds.get(kind, {}))
    return {event_id: people for event_id, people in found.items() if people}


async def test_others_see_how_far_somebody_has_read(house: House) -> None:
    room = await house.room("bob", "eve:two")
    sent = await house.says("alice", room)
    before = house.now()
    await house.reads("bob", room, sent.id)
    for share in (
        await house.sync("alice", before),
        await house.sync("alice", before, forgetful=True),
        await house.sync("alice"),
    ):
        assert list(seen(share, room)[sent.id]) == ["@bob:one"]
    assert not (await house.sync("alice", house.now())).rooms, "once is enough"
    (to, kind, content) = house.left[-1]
    assert (to, kind) == ("two", "m.receipt")
    assert content[room]["m.read"]["@bob:one"]["event_ids"] == [sent.id]


async def test_a_restart_forgets_no_receipt(tmp_path: Path) -> None:
    async with House(tmp_path) as house:
        room = await house.room("bob")
        sent = await house.says("alice", room)
        before = house.now()
        await house.reads("bob", room, sent.id)
    async with House(tmp_path) as house:
        assert list(seen(await house.sync("alice", before, forgetful=True), room)[sent.id]) == ["@bob:one"]


async def test_a_private_receipt_stays_private(house: House) -> None:
    room = await house.room("bob", "eve:two")
    sent = await house.says("alice", room)
    before, left = house.now(), len(house.left)
    await house.reads("bob", room, sent.id, "m.read.private")
    for since in (before, None):
        assert not seen(await house.sync("alice", since), room, "m.read.private"), "not even alice hears of it"
        assert seen(await house.sync("bob", since), room, "m.read.private"), "bob's other devices do"
    assert len(house.left) == left, "it never leaves this server"


async def test_the_read_marker_is_ones_own(house: House) -> None:
    room = await house.room("bob")
    sent = await house.says("alice", room)
    before = house.now()
    body = {"m.fully_read": sent.id, "m.read": sent.id}
    await house.ask("bob", "POST", f"/rooms/{quoted(room)}/read_markers", body)
    share = await house.sync("bob", before)
    assert share.rooms[room].account_data == [{"type": "m.fully_read", "content": {"event_id": sent.id}}]
    assert seen(share, room) == seen(await house.sync("alice", before), room) != {}
    assert not (await house.sync("alice", before)).rooms[room].account_data
    assert await house.receipts.provide_fully_read("@bob:one", room) == {"event_id": sent.id}


async def test_receipts_only_move_forward(house: House) -> None:
    room = await house.room("bob")
    first, second = await house.says("alice", room), await house.says("alice", room)
    await house.reads("bob", room, second.id)
    before = house.now()
    await house.reads("bob", room, first.id)
    assert house.now() == before, "nothing was written"
    assert list(seen(await house.sync("alice"), room)) == [second.id]


async def test_threads_have_receipts_of_their_own(house: House) -> None:
    room = await house.room("bob")
    root = await house.says("alice", room)
    reply = await house.says("alice", room, **{"m.relates_to": {"rel_type": "m.thread", "event_id": root.id}})
    edit = await house.says("alice", room, **{"m.relates_to": {"rel_type": "m.replace", "event_id": reply.id}})
    await house.reads("bob", room, root.id, thread="main")
    await house.reads("bob", room, edit.id, thread=root.id)
    found = seen(await house.sync("alice"), room)
    assert found[root.id]["@bob:one"]["thread_id"] == "main"
    assert found[edit.id]["@bob:one"]["thread_id"] == root.id
    await house.reads("bob", room, edit.id)
    found = seen(await house.sync("alice"), room)
    assert root.id in found and edit.id in found, "one does not replace the other"
    for event, thread in ((reply, "main"), (root, reply.id), (reply, "")):
        with pytest.raises(InvalidParam):
            await house.reads("bob", room, event.id, thread=thread)
    with pytest.raises(InvalidParam):
        await house.reads("bob", room, root.id, "m.fully_read", thread="main")


async def test_what_is_refused(house: House) -> None:
    room = await house.room("bob")
    sent = await house.says("alice", room)
    with pytest.raises(Forbidden):
        await house.reads("carol", room, sent.id)
    with pytest.raises(InvalidParam):
        await house.reads("bob", room, sent.id, "m.seen")
    with pytest.raises(InvalidParam):
        await house.reads("bob", room, "$" + "x" * 43)
    elsewhere = await house.says("alice", await house.room())
    with pytest.raises(InvalidParam):
        await house.reads("bob", room, elsewhere.id)


async def test_receipts_from_another_server(house: House) -> None:
    room = await house.room("bob", "eve:two")
    sent = await house.says("alice", room)
    before = house.now()
    take = house.receipts.edus()["m.receipt"]
    good = {"event_ids": [sent.id], "data": {"ts": 1, "thread_id": "main"}}
    people = {"@eve:two": good, "@bob:one": good, "@mallory:two": good, "@eve:three": good}
    await take("two", {room: {"m.read": people, "m.read.private": {"@eve:two": good}}, "!nowhere": {"m.read": people}})
    found = seen(await house.sync("alice", before), room)
    assert found == {sent.id: {"@eve:two": {"ts": 1, "thread_id": "main"}}}, "two speaks for its members only"
    before = house.now()
    await take("two", {room: {"m.read": {"@eve:two": good}}})
    assert house.now() == before, "a repetition is not written"
    for bad in (
        7,
        {},
        {"event_ids": []},
        {"event_ids": [7]},
        {"event_ids": ["$x" * 200]},
        {"event_ids": ["$x"], "data": 1},
    ):
        await take("two", {room: {"m.read": {"@eve:two": bad}}})
    assert house.now() == before, "and nonsense neither"
    with pytest.raises(ApiError):
        room_state = await house.rooms.get(room)
        assert room_state is not None
        room_state.members.update({f"@u{n}:two": "join" for n in range(1_100)})
        await take("two", {room: {"m.read": {f"@u{n}:two": good for n in range(1_100)}}})


async def test_who_leaves_leaves_no_receipt(house: House) -> None:
    room = await house.room("bob")
    sent = await house.says("alice", room)
    await house.reads("bob", room, sent.id)
    await house.member(room, "bob", "leave")
    await house.says("alice", room)
    assert await house.db.read(lambda query: query.value("SELECT count(*) FROM receipts")) == 0
    assert not seen(await house.sync("alice"), room)


async def test_threads_of_one_person_are_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "_BOUND", receipts._BOUND.replace("200", "3"))
    room = await house.room("bob")
    await house.reads("bob", room, (await house.says("alice", room)).id)
    for _ in range(6):
        root = await house.says("alice", room)
        await house.reads("bob", room, root.id, thread=root.id)
    assert await house.db.read(lambda query: query.value("SELECT count(*) FROM receipts")) == 4
