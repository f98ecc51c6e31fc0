"""Messages from device to device: none lost, none doubled, none readable. Spec: client-server-api/#send-to-device-messaging."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.errors import ApiError, Forbidden
from tests.keys.key_house import BOB, ELSEWHERE, Friend, KeyHouse, olm


def _edu(sender: str, message_id: str, messages: object, event_type: str = "m.room.encrypted") -> dict[str, object]:
    return {"sender": sender, "type": event_type, "message_id": message_id, "messages": messages}


async def _sends_many(house: KeyHouse, sender: Friend, to: Friend, numbers: range) -> None:
    for number in numbers:
        await house.to_device.deliver(sender.user_id, "m.room.encrypted", {to.user_id: {to.device_id: olm(number)}})


async def test_a_message_stays_until_its_device_has_taken_it(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    await carol.syncs(None)
    assert (await alice.sends({carol.user_id: {carol.device_id: olm(1)}}, "t1")).status == 200, "it is taken"
    start = carol.heard
    heard = await carol.syncs()
    assert heard.messages == [{"sender": alice.user_id, "type": "m.room.encrypted", "content": olm(1)}], "it arrives"
    assert (await carol.syncs(start)).bodies == [1], "the answer was lost: the same token brings it again"
    assert (await carol.syncs()).bodies == [], "the next token says that it arrived"
    await carol.syncs()
    await house.settled()
    assert await house.rows("SELECT * FROM to_device_messages") == [], "and it is gone from the disk"


async def test_a_long_queue_comes_in_portions_and_none_is_lost(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    await carol.syncs(None)
    await _sends_many(house, alice, carol, range(250))
    first = await carol.syncs()
    assert first.bodies == list(range(100)), "a hundred at most, in order of arrival"
    second = await carol.syncs()
    assert second.bodies == list(range(100, 200)), "the rest comes next"
    assert second.token > first.token, "each portion has a token of its own"
    assert (await carol.syncs(first.token)).bodies == list(range(100, 200)), "a lost portion comes again"
    assert (await carol.syncs()).bodies == list(range(200, 250)), "then the rest"
    assert (await carol.syncs()).bodies == [], "and that was all"
    await carol.syncs()
    await house.settled()
    assert await house.rows("SELECT * FROM to_device_messages") == [], "all were taken"
    assert await house.rows("SELECT * FROM to_device_marks") == [], "nothing is remembered of the portions"


async def test_everything_waits_for_the_first_sync_too(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    await _sends_many(house, alice, carol, range(120))
    assert (await carol.syncs(None)).bodies == list(range(100)), "a first /sync brings what waits"
    assert (await carol.syncs(None)).bodies == list(range(100)), "beginning afresh loses nothing"
    assert (await carol.syncs()).bodies == list(range(100, 120)), "and goes on from there"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.integers(1, 130), st.sampled_from(["taken", "lost"])), max_size=12))
async def test_whatever_gets_lost_each_message_arrives_in_order(house: KeyHouse, story: list[int | str]) -> None:
    name = f"u{len(await house.rows('SELECT user_id FROM users'))}"
    alice = await house.friend(name)
    sent, seen = 0, []
    await alice.syncs(None)
    for step in [*story, "taken", "taken", "taken", "taken", *["taken"] * 16]:
        if isinstance(step, int):
            await _sends_many(house, alice, alice, range(sent, sent + step))
            sent += step
            continue
        since = alice.heard
        heard = await alice.syncs()
        if step == "lost":
            alice.heard = since
        else:
            seen += heard.bodies
    assert seen == list(range(sent)), "each message exactly once, in order, whatever answers were lost"


async def test_a_retry_sends_nothing_twice(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    await carol.syncs(None)
    messages = {carol.user_id: {carol.device_id: olm(1)}, BOB: {"PHONE": olm(2)}}
    for _ in range(2):
        assert (await alice.sends(messages, "same")).status == 200, "a retry is answered like the first"
    assert (await carol.syncs()).bodies == [1], "it arrived once"
    assert len(await house.edus("m.direct_to_device")) == 1, "and left once for the other server"
    other = await alice.on_another_device()
    await other.sends(messages, "same")
    assert (await carol.syncs()).bodies == [1], "another device has transaction IDs of its own"


async def test_a_star_means_all_devices_and_unknown_ones_none(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    other = await carol.on_another_device()
    for friend in (carol, other):
        await friend.syncs(None)
    await alice.sends({carol.user_id: {"*": olm(1)}}, "t1")
    await alice.sends({carol.user_id: {"NOSUCH": olm(2)}, "@nobody:one.example": {"*": olm(2)}}, "t2")
    await alice.sends({carol.user_id: {"*": olm(3), other.device_id: olm(4)}}, "t3")
    assert (await carol.syncs()).bodies == [1, 3], "a star reaches each device"
    assert (await other.syncs()).bodies == [1, 4], "but where one is named, what is meant for it"
    for friend in (carol, other):
        await friend.syncs()
    await house.settled()
    assert await house.rows("SELECT * FROM to_device_messages") == [], "nothing is kept for devices that are not there"


async def test_to_other_servers(house: KeyHouse) -> None:
    alice = await house.friend("alice")
    await alice.sends({BOB: {"*": olm(1), "PHONE": olm(2)}, "@eve:three.example": {"X": olm(3)}}, "t")
    edus = await house.edus("m.direct_to_device")
    assert {edu["to"] for edu in edus} == {ELSEWHERE, "three.example"}, "one for each server"
    [to_bob] = [edu for edu in edus if edu["to"] == ELSEWHERE]
    assert to_bob["messages"] == {BOB: {"*": olm(1), "PHONE": olm(2)}}, "with the messages for its users"
    assert (to_bob["sender"], to_bob["type"]) == (alice.user_id, "m.room.encrypted"), "and who sent them"
    assert 0 < len(to_bob["message_id"]) <= 32, "and an ID, so that they can be told apart"
    large = {
        "algorithm": "m.olm.v1.curve25519-aes-sha2",
        "sender_key": "B" * 43,
        "ciphertext": {"QQ": {"type": 0, "body": "Q" * 40_000}},
    }
    await alice.sends({BOB: {f"D{number}": large for number in range(4)}}, "large")
    parts = (await house.edus("m.direct_to_device"))[len(edus) :]
    assert [list(part["messages"][BOB]) for part in parts] == [["D0"], ["D1"], ["D2"], ["D3"]], "in portions"
    assert len({part["message_id"] for part in parts}) == 4, "each with an ID of its own"


async def test_from_other_servers(house: KeyHouse) -> None:
    carol = await house.friend("carol")
    await carol.syncs(None)
    edu = _edu(BOB, "one", {carol.user_id: {carol.device_id: olm(1)}, "@bob:two.example": {"X": olm(1)}})
    await house.receives("m.direct_to_device", edu)
    await house.receives("m.direct_to_device", edu)
    assert [m["sender"] for m in (await carol.syncs()).messages] == [BOB], "a repeated message is dropped"
    with pytest.raises(Forbidden):
        await house.receives("m.direct_to_device", _edu("@eve:three.example", "two", {}))
    for bad in ({"message_id": "x" * 33}, {"message_id": None}, {"type": None}, {"messages": []}):
        with pytest.raises(ApiError):
            await house.receives("m.direct_to_device", {**edu, **bad})
    assert (await carol.syncs()).bodies == [], "nothing else arrived"


async def test_what_is_readable_never_reaches_the_disk(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    await carol.syncs(None)
    to_carol = {carol.user_id: {carol.device_id: {"body": "canary", "session_key": "canary"}}}
    for event_type in ("m.room_key", "m.forwarded_room_key", "m.secret.send", "m.room.message", "m.room.encrypted"):
        reply = await alice.sends(to_carol, f"t{event_type}", event_type)
        assert (reply.status, reply.errcode) == (403, "M_FORBIDDEN"), f"a readable {event_type} is refused"
        await house.receives("m.direct_to_device", _edu(BOB, f"m{event_type}"[:32], to_carol, event_type))
    mixed = {**olm(7), "note": "canary"}
    assert (await alice.sends({carol.user_id: {carol.device_id: mixed}}, "mixed")).status == 200, "a good one goes"
    assert [m["content"] for m in (await carol.syncs()).messages] == [olm(7)], "without what the seal does not list"
    rows = await house.rows("SELECT content FROM to_device_messages")
    assert b"canary" not in b"".join(content for (content,) in rows), "not a word of it was written"
    _, findings = await house.db.read(house.to_device.audit)
    assert not findings, f"the audit finds nothing: {findings}"


async def test_bad_requests_are_refused(house: KeyHouse) -> None:
    alice = await house.friend("alice")
    for bad in (
        {},
        {"messages": []},
        {"messages": {"alice": {}}},
        {"messages": {alice.user_id: []}},
        {"messages": {alice.user_id: {"D": 1}}},
    ):
        reply = await alice.says("PUT", "/sendToDevice/m.room.encrypted/x", bad)
        assert reply.status == 400, f"{bad} is refused: {reply.body}"


async def test_nothing_is_queued_for_a_device_that_has_gone(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    for number in range(3):
        await alice.sends({carol.user_id: {carol.device_id: olm(number)}}, f"t{number}")
    leaving = carol.says("POST", "/logout")
    await asyncio.gather(leaving, *(_sends_many(house, alice, carol, range(9)) for _ in range(3)))
    assert (await alice.sends({carol.user_id: {carol.device_id: olm()}}, "late")).status == 200, (
        "the sender need not know"
    )
    await house.settled()
    assert await house.rows("SELECT * FROM to_device_messages") == [], "whatever came before, meanwhile or after"


async def test_a_closed_door_keeps_out_only_its_own_messages(house: KeyHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, carol, dora = [await house.friend(name) for name in ("alice", "carol", "dora")]

    async def door(sender: str, target: str, event_type: str) -> None:
        if target == dora.user_id:
            raise Forbidden("Dora takes nothing from strangers.")

    monkeypatch.setattr(house.doors, "to_device", door)
    both = {friend.user_id: {friend.device_id: olm()} for friend in (carol, dora)}
    assert (await alice.sends(both, "t1")).status == 200, "the others get theirs"
    assert len((await carol.syncs(None)).messages) == 1, "carol has it"
    assert (await dora.syncs(None)).messages == [], "dora is left alone"
    reply = await alice.sends({dora.user_id: both[dora.user_id]}, "t2")
    assert reply.status == 403, "where nobody takes it, the sender is told"
