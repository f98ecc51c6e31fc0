"""Device keys, one-time keys and who hears of a change. Spec: client-server-api/#key-distribution."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from relay.errors import InvalidParam
from tests.keys.key_house import BOB, ELSEWHERE, KeyHouse, olm


async def test_keys_come_back_as_they_were_uploaded(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    keys = await alice.publishes(dehydrated=True)
    found = await carol.queries(alice.user_id)
    assert found["device_keys"][alice.user_id][alice.device_id] == keys, "unknown fields stay, and nothing is added"
    own = await alice.queries(alice.user_id)
    assert "unsigned" in own["device_keys"][alice.user_id][alice.device_id], (
        "the owner is told the names of her devices"
    )


async def test_a_device_publishes_only_its_own_keys(house: KeyHouse) -> None:
    alice = await house.friend("alice")
    await alice.publishes()
    for wrong in ({"device_id": "OTHER"}, {"user_id": "@mallory:one.example"}):
        reply = await alice.says("POST", "/keys/upload", {"device_keys": {**alice.keys, **wrong}})
        assert reply.errcode == "M_INVALID_PARAM", f"keys that name {wrong} are refused: {reply.body}"
    reply = await alice.says(
        "POST", "/keys/upload", {"device_keys": {"user_id": alice.user_id, "device_id": alice.device_id}}
    )
    assert reply.errcode == "M_BAD_JSON", "keys without keys are refused"


async def test_signatures_of_others_are_not_handed_out(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    await alice.publishes(signatures={"@spy:one.example": {"ed25519:X": "abcd"}})
    shown = (await carol.queries(alice.user_id))["device_keys"][alice.user_id][alice.device_id]
    assert set(shown["signatures"]) == {alice.user_id}, "of the signatures only the owner's own are shown"


async def test_each_one_time_key_is_handed_out_once_in_order_then_the_fallback(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    await alice.publishes()
    counts = (await alice.supplies("b1")).body["one_time_key_counts"]
    assert counts == {"signed_curve25519": 1}, "the answer says how many there are"
    await alice.supplies("a2", fallback="f")
    heard = await alice.syncs(None)
    assert heard.share.one_time_keys_count == {"signed_curve25519": 2}, "each /sync says how many are left"
    assert heard.share.unused_fallback_key_types == ["signed_curve25519"], "and which fallback keys are unused"
    given = [await carol.claims(alice) for _ in range(4)]
    names = ["b1", "a2", "f", "f"]
    assert given == [f"signed_curve25519:{name}" for name in names], "in the order of upload, then the fallback key"
    heard = await alice.syncs()
    assert heard.share.one_time_keys_count == {"signed_curve25519": 0}, "they are used up"
    assert heard.share.unused_fallback_key_types == [], "the fallback key should be replaced"
    await alice.supplies(fallback="g")
    assert (await alice.syncs()).share.unused_fallback_key_types == ["signed_curve25519"], "a new one is unused"


async def test_a_repeated_upload_brings_nothing_back(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    await alice.supplies("x", "y", fallback="f")
    assert await carol.claims(alice) == "signed_curve25519:x", "one key is gone"
    reply = await alice.supplies("x", "y", fallback="f")
    assert reply.body["one_time_key_counts"] == {"signed_curve25519": 1}, "the same upload again adds nothing"
    assert await carol.claims(alice) == "signed_curve25519:y", "the claimed key is not handed out twice"
    other = {"one_time_keys": {"signed_curve25519:z": {"key": "1"}}}
    assert (await alice.says("POST", "/keys/upload", other)).status == 200, "a new name is taken"
    other["one_time_keys"]["signed_curve25519:z"]["key"] = "2"
    reply = await alice.says("POST", "/keys/upload", other)
    assert (reply.status, reply.errcode) == (400, InvalidParam.errcode), "another key under the same name is refused"


async def test_nobody_gets_the_same_key_however_many_ask_at_once(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    await alice.supplies(*(f"k{number:02d}" for number in range(20)))
    wanted = {alice.user_id: {alice.device_id: "signed_curve25519"}}
    federated = [house.one_time_keys.claim_local(wanted) for _ in range(20)]
    answers = await asyncio.gather(*federated, *(carol.claims(alice) for _ in range(5)))
    shown = orjson.loads(orjson.dumps(answers[:20]))
    given = [name for one in shown if one for name in one[alice.user_id][alice.device_id]]
    given += [name for name in answers[20:] if name]
    assert len(given) == len(set(given)) == 20, "twenty keys, each to one of twenty-five"


async def test_bad_uploads_are_refused_whole(house: KeyHouse) -> None:
    alice = await house.friend("alice")
    for bad in (
        {"one_time_keys": []},
        {"one_time_keys": {"noname": "x"}},
        {"one_time_keys": {"a:b": 1}},
        {"fallback_keys": {"a:b": "x", "a:c": "y"}},
        {"device_keys": "x"},
    ):
        reply = await alice.says("POST", "/keys/upload", bad)
        assert (reply.status, reply.errcode) == (400, "M_BAD_JSON"), f"{bad} is refused: {reply.body}"
    for bad in (
        {"device_keys": {alice.user_id: "x"}},
        {"device_keys": {"alice": []}},
        {"device_keys": {alice.user_id: [1]}},
    ):
        assert (await alice.says("POST", "/keys/query", bad)).errcode == "M_BAD_JSON", f"the query {bad} is refused"
    for bad in ({"one_time_keys": {alice.user_id: "x"}}, {"one_time_keys": {alice.user_id: {"D": 1}}}):
        assert (await alice.says("POST", "/keys/claim", bad)).errcode == "M_BAD_JSON", f"the claim {bad} is refused"


async def test_neighbours_and_other_servers_hear_of_new_keys(house: KeyHouse) -> None:
    alice, carol, dora = [await house.friend(name) for name in ("alice", "carol", "dora")]
    room = await house.room_of(alice)
    await house.moves(room, carol.user_id, "join")
    await house.moves(room, BOB, "join")
    for friend in (alice, carol, dora):
        await friend.syncs(None)
    await alice.publishes()
    assert (await carol.syncs()).changed == {alice.user_id}, "who shares a room hears of it"
    assert (await alice.syncs()).changed == {alice.user_id}, "so do one's own devices"
    assert (await dora.syncs()).changed == set(), "a stranger does not"
    assert (await carol.syncs()).changed == set(), "and each change is told once"
    [first] = await house.edus("m.device_list_update")
    assert first["to"] == ELSEWHERE and first["keys"] == alice.keys and first["prev_id"] == [], "the first update"
    assert "device_display_name" not in first, "the name of a device stays here"
    await alice.publishes()
    _, second = await house.edus("m.device_list_update")
    assert second["prev_id"] == [first["stream_id"]] and second["stream_id"] > first["stream_id"], (
        "each names the one before"
    )
    answer = await house.device_keys.user_devices(alice.user_id)
    assert answer["stream_id"] == second["stream_id"], "a whole list carries the number of the latest update"
    reply = await alice.says("POST", "/keys/upload", {"device_keys": alice.keys})
    assert reply.status == 200 and len(await house.edus("m.device_list_update")) == 2, (
        "the same keys again are no change"
    )


async def test_a_deleted_device_is_announced_and_leaves_nothing_behind(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    room = await house.room_of(alice)
    for user_id in (carol.user_id, BOB):
        await house.moves(room, user_id, "join")
    await alice.publishes()
    await alice.supplies("x", fallback="f")
    assert (await carol.sends({alice.user_id: {alice.device_id: olm()}}, "t")).status == 200, "a message waits for it"
    await carol.syncs(None)
    assert (await alice.says("POST", "/logout")).status == 200, "she signs out"
    for _ in range(2_000):
        if len(await house.edus("m.device_list_update")) == 2:
            break
        await asyncio.sleep(0.01)
    last = (await house.edus("m.device_list_update"))[-1]
    assert last["deleted"] is True and last["device_id"] == alice.device_id, "other servers hear that it is gone"
    assert (await carol.syncs()).changed == {alice.user_id}, "so do people here"
    assert (await carol.queries(alice.user_id))["device_keys"] == {alice.user_id: {}}, "its keys are gone"
    assert await carol.claims(alice) is None, "its one-time and fallback keys are gone"
    for table in (
        "published_devices",
        "one_time_keys",
        "one_time_key_values",
        "fallback_keys",
        "to_device_messages",
        "unannounced_devices",
    ):
        assert await house.rows(f"SELECT * FROM {table}") == [], f"nothing of it stays in {table}"


async def test_who_comes_and_goes_stands_in_the_lists(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    first = await house.room_of(alice)
    second = await house.room_of(alice)
    await alice.syncs(None)
    await carol.syncs(None)
    await house.moves(first, carol.user_id, "join")
    assert (await alice.syncs()).changed == {carol.user_id}, "who joins newly shares an encrypted room"
    heard = await carol.syncs()
    assert (heard.changed, heard.left) == ({alice.user_id, carol.user_id}, set()), (
        "and the one who joined learns who is there"
    )
    await house.moves(second, carol.user_id, "join")
    await alice.syncs()
    await house.moves(first, carol.user_id, "leave")
    heard = await alice.syncs()
    assert (heard.changed, heard.left) == (set(), set()), "they still share the other room"
    await house.moves(second, carol.user_id, "leave")
    heard = await alice.syncs()
    assert (heard.changed, heard.left) == (set(), {carol.user_id}), "now they share none"
    assert (await carol.syncs()).left == {alice.user_id}, "for both of them"
    before = alice.heard
    await house.moves(first, carol.user_id, "join")
    await house.moves(first, carol.user_id, "leave")
    await house.moves(first, carol.user_id, "join")
    heard = await alice.syncs()
    assert (heard.changed, heard.left) == ({carol.user_id}, set()), "only where it ends counts"
    path = f"/keys/changes?from=s{house.db.epoch}_{before}_00000000-0&to=s{house.db.epoch}_{heard.token}_00000000-0"
    reply = await alice.says("GET", path)
    assert reply.body == {"changed": [carol.user_id], "left": []}, "/keys/changes says the same"
    assert (await alice.says("GET", "/keys/changes?from=x&to=y")).errcode == "M_INVALID_PARAM", "a bad token is refused"


async def test_rooms_without_encryption_count_too(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    space = await house.room_of(alice, creation_content={"type": "m.space"})
    await alice.syncs(None)
    await house.moves(space, carol.user_id, "join")
    assert (await alice.syncs()).changed == {carol.user_id}, "a room may turn encryption on at any time"
    await carol.publishes()
    assert (await alice.syncs()).changed == {carol.user_id}, "and changed keys are told wherever a room is shared"
    await house.moves(space, carol.user_id, "leave")
    assert (await alice.syncs()).left == {carol.user_id}, "whoever shares no room any more is told as well"


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_happened_before_a_restart_is_told_too(house: KeyHouse, restarted: bool) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    room = await house.room_of(alice)
    await alice.syncs(None)
    await house.moves(room, carol.user_id, "join")
    if restarted:
        house.lists._moves.clear()
        house.lists._floor = None
        house.bell.begin(house.db.stable_pos())
        house.bell._ears.clear()
    assert (await alice.syncs()).changed == {carol.user_id}, "memory is only a short cut"
