"""What other servers send by themselves, in transactions: it is taken once, in order, and one bad thing spoils no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

from federation.inbound import MAX_AT_ONCE
from relay.errors import Forbidden, StorageFull
from relay.protocol.event import Event
from relay.rooms.room import Room
from tests.federation.residence import ALICE, SECRET, Residence
from tests.people import until


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[Residence]:
    async with Residence(tmp_path).open() as opened:
        yield opened


async def shown(house: Residence, room: Room) -> list[str]:
    return [one.id for one in room.recent if one.event.type == "m.room.encrypted"]


async def test_a_message_from_afar_stands_in_the_room(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await two.lives_in(room, "carol")
    said = await two.writes(room, "carol")
    answer = await two.transmits(said)
    assert answer.status == 200, answer.json
    assert answer.json == {"pdus": {said.id: {}}}, "the answer names the event and no error"
    assert await shown(house, room) == [said.id], "people here get it"


async def test_the_same_transaction_gets_the_same_answer_and_happens_once(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await two.lives_in(room, "carol")
    said = await two.writes(room, "carol")
    edu = {"edu_type": "m.direct_to_device", "content": {"message_id": "1"}}
    twice = await asyncio.gather(*(two.transmits(said, edus=[edu], txn="same") for _ in range(2)))
    again = await two.transmits(said, edus=[edu], txn="same")
    assert [one.json for one in twice] == [again.json, again.json], "a retry gets the answer of the first attempt"
    assert len(house.edus) == 1, "what was sent along was taken once"
    other = await two.transmits(said, txn="another")
    assert other.json == {"pdus": {said.id: {}}}, "an event that is known already is no error"
    assert await shown(house, room) == [said.id], "and it stands in the room once"


async def test_another_servers_transaction_of_the_same_name_is_its_own(house: Residence) -> None:
    room = await house.room(preset="public_chat")
    two, three = house.peer("two.example"), house.peer("three.example")
    await two.lives_in(room, "carol")
    await three.lives_in(room, "dave")
    first = await two.writes(room, "carol")
    await two.transmits(first, txn="1")
    second = await three.writes(room, "dave")
    await three.transmits(second, txn="1")
    assert await shown(house, room) == [first.id, second.id], "both are taken"


async def test_an_event_that_comes_by_two_ways_at_once_has_one_place(house: Residence) -> None:
    room = await house.room(preset="public_chat")
    two, three = house.peer("two.example"), house.peer("three.example")
    carol = await two.lives_in(room, "carol")
    await three.lives_in(room, "dave")
    said = await two.writes(room, "carol")
    renamed = await two.writes(
        room,
        "carol",
        type="m.room.member",
        content={"membership": "join", "displayname": "C"},
        state_key=carol,
        after=[said],
    )
    for event in (said, renamed):
        answers = await asyncio.gather(two.transmits(event), three.transmits(event))
        assert [one.json for one in answers] == [{"pdus": {event.id: {}}}] * 2, "both ways are fine"
        assert [one.id for one in room.recent].count(event.id) == 1, "it stands there once"
    assert await house.rooms.get(room.room_id) is room, "and nothing had to be repaired"


async def test_events_of_several_rooms_arrive_in_order(house: Residence) -> None:
    rooms, two = [await house.room(preset="public_chat") for _ in range(3)], house.peer("two.example")
    sent: dict[str, list[Event]] = {}
    for room in rooms:
        await two.lives_in(room, "carol")
        first = await two.writes(room, "carol")
        second = await two.writes(room, "carol", after=[first])
        sent[room.room_id] = [first, second, await two.writes(room, "carol", after=[second])]
    mixed = [sent[room.room_id][turn] for turn in range(3) for room in rooms]
    answer = await two.transmits(*mixed)
    assert answer.json["pdus"] == {event.id: {} for event in mixed}, "all of them are good"
    for room in rooms:
        assert await shown(house, room) == [e.id for e in sent[room.room_id]], "each room has its own in order"


async def test_a_bad_event_does_not_spoil_the_good_ones(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await two.lives_in(room, "carol")
    forged = await two.writes(room, "carol", content={**SECRET, "session_id": "Zm9yZ2Vk"})
    forged.pdu["signatures"][two.name]["ed25519:far"] = "A" * 86
    stranger = await two.writes(room, "nobody")
    good = await two.writes(room, "carol")
    answer = await two.transmits(
        forged, stranger, good, pdus=[forged.pdu, stranger.pdu, good.pdu, {"room_id": room.room_id}, {}, 7]
    )
    assert answer.status == 200, answer.json
    assert set(answer.json["pdus"]) == {forged.id, stranger.id, good.id}, "what is no event has no entry"
    assert answer.json["pdus"][good.id] == {}, "the good event is taken"
    assert "signature" in answer.json["pdus"][forged.id]["error"], "the forged one is refused with the reason"
    assert answer.json["pdus"][stranger.id]["error"], "somebody outside the room can't speak in it"


async def test_a_transaction_has_bounds(house: Residence) -> None:
    two = house.peer("two.example")
    answer = await two.transmits(pdus=[{}] * 51)
    assert (answer.status, answer.errcode) == (400, "M_BAD_JSON"), "more than 50 events are refused"
    answer = await two.transmits(edus=[{}] * 101)
    assert (answer.status, answer.errcode) == (400, "M_BAD_JSON"), "more than 100 EDUs are refused"
    answer = await two.transmits(pdus={})
    assert (answer.status, answer.errcode) == (400, "M_BAD_JSON"), "pdus are a list"
    assert (await two.transmits(pdus=[{}] * 50, edus=[{}] * 100)).json == {"pdus": {}}, "as many as that are fine"


async def test_only_a_few_transactions_of_one_server_are_taken_at_once(house: Residence) -> None:
    room, two, three = await house.room(preset="public_chat"), house.peer("two.example"), house.peer("three.example")
    await two.lives_in(room, "carol")
    await three.lives_in(room, "dave")
    said = [await two.writes(room, "carol") for _ in range(MAX_AT_ONCE + 1)]
    receiver, begun, goes_on = house.receiver, 0, asyncio.Event()
    receive = receiver.receive

    async def slowly(*what: Any, **more: Any) -> Any:
        nonlocal begun
        begun += 1
        await goes_on.wait()
        return await receive(*what, **more)

    receiver.receive = slowly  # type: ignore[method-assign]
    at_work = [asyncio.create_task(two.transmits(one)) for one in said[:MAX_AT_ONCE]]
    assert await until(lambda: begun == MAX_AT_ONCE)
    refused = await two.transmits(said[-1])
    assert (refused.status, refused.errcode) == (429, "M_LIMIT_EXCEEDED"), "it waits for its own"
    others = asyncio.create_task(three.transmits(await three.writes(room, "dave")))
    assert await until(lambda: begun == MAX_AT_ONCE + 1), "and holds up nobody else"
    goes_on.set()
    assert [one.status for one in await asyncio.gather(*at_work, others)] == [200] * (MAX_AT_ONCE + 1)
    assert (await two.transmits(said[-1])).status == 200, "then it is taken"


async def test_nobody_speaks_for_another_server(house: Residence) -> None:
    two = house.peer("two.example")
    answer = await two.transmits(origin="three.example")
    assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN"), "the body names another origin than the signature"


async def test_events_of_rooms_without_us_are_refused(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await two.lives_in(room, "carol")
    said = await two.writes(room, "carol")
    await house.members.leave(ALICE, room.room_id)
    answer = await two.transmits(said, pdus=[said.pdu, {**said.pdu, "room_id": "!unheard"}])
    assert answer.json["pdus"].keys() == {said.id}, "of a room that was never heard of not even event IDs are known"
    assert "Nobody" in answer.json["pdus"][said.id]["error"], "nobody here is in the room any more"


async def test_a_server_that_the_room_denies_is_not_heard(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    carol = await two.lives_in(room, "carol")
    await house.sets(room, "m.room.server_acl", {"allow": ["*"], "deny": ["two.example"]})
    said = await two.writes(room, "carol")
    typing = {"edu_type": "m.typing", "content": {"room_id": room.room_id, "user_id": carol, "typing": True}}
    receipt = {"edu_type": "m.receipt", "content": {room.room_id: {"m.read": {carol: {"event_ids": [said.id]}}}}}
    message = {"edu_type": "m.direct_to_device", "content": {"message_id": "2"}}
    answer = await two.transmits(said, edus=[typing, receipt, message])
    assert answer.json["pdus"][said.id]["error"], "its event is refused"
    assert [kind for kind, _, _ in house.edus] == ["m.direct_to_device"], "its typing and its receipts are dropped"


async def test_receipts_of_open_rooms_pass_and_those_of_denied_ones_do_not(house: Residence) -> None:
    opened, closed = await house.room(preset="public_chat"), await house.room(preset="public_chat")
    two = house.peer("two.example")
    await two.lives_in(opened, "carol")
    await house.sets(closed, "m.room.server_acl", {"allow": ["one.example"]})
    read: dict[str, Any] = {"m.read": {}}
    content = {opened.room_id: read, closed.room_id: read, "!unheard": read, "not a room": read}
    await two.transmits(edus=[{"edu_type": "m.receipt", "content": content}])
    assert house.edus == [("m.receipt", two.name, {opened.room_id: read})], "only what the rooms' lists admit is left"


async def test_edus_keep_their_order_and_unknown_ones_are_ignored(house: Residence) -> None:
    two = house.peer("two.example")
    given = [{"edu_type": "m.direct_to_device", "content": {"message_id": str(n)}} for n in range(20)]
    await two.transmits(edus=[*given, {"edu_type": "m.unheard", "content": {}}, {"edu_type": "m.typing"}, "nonsense"])
    assert [content["message_id"] for _, _, content in house.edus] == [str(n) for n in range(20)], "one after the other"


async def test_an_edu_that_goes_wrong_loses_only_itself(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    await two.lives_in(room, "carol")
    edu = {"edu_type": "m.direct_to_device", "content": {}}
    for error in (ValueError("a mistake of ours"), Forbidden("Not for you.")):
        house.breaks = error
        said = await two.writes(room, "carol")
        answer = await two.transmits(said, edus=[edu])
        assert answer.json == {"pdus": {said.id: {}}}, "the event that came along is taken all the same"


async def test_what_the_full_disk_did_not_take_is_sent_again(house: Residence) -> None:
    two = house.peer("two.example")
    edu = {"edu_type": "m.direct_to_device", "content": {"message_id": "3"}}
    house.breaks = StorageFull()
    answer = await two.transmits(edus=[edu], txn="full")
    assert answer.status == 507, "the sender is not told that it was taken"
    house.breaks = None
    answer = await two.transmits(edus=[edu], txn="full")
    assert answer.status == 200, "the retry is not answered from memory"
    assert len(house.edus) == 1, "and what was not taken before is taken now"


async def test_trouble_in_one_room_is_an_entry_in_the_answer(house: Residence, monkeypatch: Any) -> None:
    good, bad = await house.room(preset="public_chat"), await house.room(preset="public_chat")
    two = house.peer("two.example")
    await two.lives_in(good, "carol")
    await two.lives_in(bad, "carol")
    fine, hurt = await two.writes(good, "carol"), await two.writes(bad, "carol")
    receive = house.receiver.receive

    async def breaks(origin: str, room_id: str, pdus: Any) -> Any:
        if room_id == bad.room_id:
            raise RuntimeError("a mistake of ours")
        return await receive(origin, room_id, pdus)

    monkeypatch.setattr(house.receiver, "receive", breaks)
    answer = await two.transmits(fine, hurt)
    assert answer.json["pdus"][fine.id] == {}, "the other room is not held up"
    assert answer.json["pdus"][hurt.id]["error"], "and the sender hears of the failure"


async def test_an_invite_that_is_taken_back_is_gone(house: Residence) -> None:
    away = house.peer("two.example").room()
    invite = away.member(ALICE, "invite")
    assert (await away.invites(invite)).status == 200, "Alice is invited to a room elsewhere"
    assert house.rooms.membership(away.room_id, ALICE) == "invite", "and her clients know it"
    three = house.peer("three.example")
    await three.transmits(away.member(ALICE, "leave", three.user("mallory"), cites=[invite]))
    assert house.rooms.membership(away.room_id, ALICE) == "invite", "another server can't take it back"
    unrelated = away.member(ALICE, "leave")
    await away.peer.transmits(unrelated)
    assert house.rooms.membership(away.room_id, ALICE) == "invite", "nor can an event that does not speak of it"
    back = away.member(ALICE, "leave", cites=[invite])
    answer = await away.peer.transmits(back)
    assert answer.json == {"pdus": {back.id: {}}}, "the server that sent the invite can"
    assert house.rooms.membership(away.room_id, ALICE) == "leave", "and Alice's clients forget it"
