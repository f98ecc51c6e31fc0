"""Cross-signing: uploading, signing, and above all who sees which signature."""

from __future__ import annotations

from typing import Any

import pytest

from tests.keys.key_house import BOB, ELSEWHERE, KeyHouse, key_id, signed


async def test_keys_are_shown_to_whom_they_concern(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    room = await house.room_of(alice)
    for user_id in (carol.user_id, BOB):
        await house.moves(room, user_id, "join")
    await carol.syncs(None)
    keys = await alice.sets_up_cross_signing()
    assert (await carol.syncs()).changed == {alice.user_id}, "people in the room hear of new keys"
    mine, others = await alice.queries(alice.user_id), await carol.queries(alice.user_id)
    assert mine["master_keys"][alice.user_id] == keys["master_key"], "the owner sees her master key"
    assert mine["user_signing_keys"] == {alice.user_id: keys["user_signing_key"]}, "and her user-signing key"
    assert others["self_signing_keys"] == {alice.user_id: keys["self_signing_key"]}, "others see the self-signing key"
    assert others["user_signing_keys"] == {}, "nobody else sees the user-signing key"
    [edu] = await house.edus("m.signing_key_update")
    assert edu == {
        "to": ELSEWHERE, "user_id": alice.user_id,
        "master_key": keys["master_key"], "self_signing_key": keys["self_signing_key"],
    }, "other servers get the two public ones"  # fmt: skip
    assert "user_signing_keys" not in await house.device_keys.query_local({alice.user_id: []}), (
        "and no more if they ask"
    )


async def test_new_keys_over_old_ones_need_the_password(house: KeyHouse) -> None:
    alice = await house.friend("alice")
    body = await alice.sets_up_cross_signing()
    path = "/keys/device_signing/upload"
    again = await alice.says("POST", path, body)
    assert (again.status, again.body) == (200, {}), "the same keys again need nothing, and change nothing"
    master, _ = alice.signing_key("master")
    reply = await alice.says("POST", path, {"master_key": master})
    assert reply.status == 401 and reply.body["flows"], "other keys need a proof"
    assert (await alice.queries(alice.user_id))["master_keys"][alice.user_id] == body["master_key"], (
        "nothing changed yet"
    )
    reply = await alice.says("POST", path, {"auth": alice.proof(reply.body["session"])})
    assert reply.status == 200, f"with the password it goes: {reply.body}"
    shown = await alice.queries(alice.user_id)
    assert shown["master_keys"][alice.user_id] == master, "the new key is there"
    assert shown["self_signing_keys"] == {} and shown["user_signing_keys"] == {}, "what the old one signed is gone"


@pytest.mark.parametrize("usage", ["self_signing", "user_signing"])
async def test_the_lesser_keys_must_be_signed_by_the_master_key(house: KeyHouse, usage: str) -> None:
    alice = await house.friend("alice")
    path = "/keys/device_signing/upload"
    lesser, _ = alice.signing_key(usage)
    reply = await alice.says("POST", path, {f"{usage}_key": lesser})
    assert (reply.status, reply.errcode) == (400, "M_MISSING_PARAM"), "without any master key"
    master, secret = alice.signing_key("master")
    reply = await alice.says("POST", path, {"master_key": master, f"{usage}_key": lesser})
    assert (reply.status, reply.errcode) == (400, "M_INVALID_SIGNATURE"), "unsigned"
    _, stranger = alice.signing_key("master")
    forged = signed(lesser, alice.user_id, key_id(master), stranger)
    reply = await alice.says("POST", path, {"master_key": master, f"{usage}_key": forged})
    assert reply.errcode == "M_INVALID_SIGNATURE", "signed by another key"
    good = signed(lesser, alice.user_id, key_id(master), secret)
    reply = await alice.says("POST", path, {"master_key": master, f"{usage}_key": good})
    assert reply.status == 200, f"signed: {reply.body}"


async def test_malformed_signing_keys_are_refused(house: KeyHouse) -> None:
    alice = await house.friend("alice")
    good, _ = alice.signing_key("master")
    for bad, errcode in (
        ({**good, "usage": ["self_signing"]}, "M_INVALID_PARAM"),
        ({**good, "user_id": BOB}, "M_FORBIDDEN"),
        ({**good, "keys": {}}, "M_INVALID_PARAM"),
        ({**good, "keys": {"ed25519:abc": "def"}}, "M_INVALID_PARAM"),
        ({**good, "keys": {"ed25519:abc": "abc"}}, "M_INVALID_PARAM"),
        ("junk", "M_BAD_JSON"),
    ):
        reply = await alice.says("POST", "/keys/device_signing/upload", {"master_key": bad})
        assert reply.errcode == errcode, f"{bad} is refused: {reply.body}"
    assert (await alice.says("POST", "/keys/device_signing/upload", {})).errcode == "M_MISSING_PARAM", "nothing given"


async def test_a_key_must_not_be_named_like_a_device(house: KeyHouse) -> None:
    alice = await house.friend("alice")
    master, _ = alice.signing_key("master")
    public = key_id(master).removeprefix("ed25519:")
    twin = await alice.another_device(device_id=public)
    reply = await twin.says("POST", "/keys/device_signing/upload", {"master_key": master})
    assert (reply.status, reply.errcode) == (403, "M_FORBIDDEN"), "one of her devices has this name"
    body = await alice.sets_up_cross_signing()
    name = key_id(body["master_key"]).removeprefix("ed25519:")
    reply = await alice.tries_to_sign_in(device_id=name)
    assert reply.status == 403, "and no device can take the name of a key"


async def test_signing_an_own_device_shows_it_to_everybody(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    room = await house.room_of(alice)
    for user_id in (carol.user_id, BOB):
        await house.moves(room, user_id, "join")
    await alice.publishes()
    keys = await alice.sets_up_cross_signing()
    await carol.syncs(None)
    own = key_id(keys["self_signing_key"])
    device = signed(alice.keys, alice.user_id, own, alice.own_secret)
    reply = await alice.says("POST", "/keys/signatures/upload", {alice.user_id: {alice.device_id: device}})
    assert reply.body == {"failures": {}}, "a valid signature is taken"
    assert (await carol.syncs()).changed == {alice.user_id}, "others hear of it"
    assert (await carol.queries(alice.user_id))["device_keys"][alice.user_id][alice.device_id] == device, "and see it"
    assert (await house.edus("m.device_list_update"))[-1]["keys"] == device, "other servers too"
    number = len(await house.edus())
    await alice.says("POST", "/keys/signatures/upload", {alice.user_id: {alice.device_id: device}})
    assert len(await house.edus()) == number, "the same again is no change"
    await alice.says("POST", "/keys/upload", {"device_keys": alice.keys})
    assert (await carol.queries(alice.user_id))["device_keys"][alice.user_id][alice.device_id] == device, "it stays"


async def test_signing_an_own_master_key_by_a_device(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    await alice.publishes()
    keys = await alice.sets_up_cross_signing()
    name = key_id(keys["master_key"]).removeprefix("ed25519:")
    master = signed(keys["master_key"], alice.user_id, f"ed25519:{alice.device_id}", alice.device_secret)
    reply = await alice.says("POST", "/keys/signatures/upload", {alice.user_id: {name: master}})
    assert reply.body == {"failures": {}}, "a device may sign its owner's master key"
    assert (await carol.queries(alice.user_id))["master_keys"][alice.user_id] == master, "and others see it"


async def test_nobody_sees_whom_another_has_verified(house: KeyHouse) -> None:
    alice, carol, dora = [await house.friend(name) for name in ("alice", "carol", "dora")]
    room = await house.room_of(alice)
    for friend in (carol, dora):
        await house.moves(room, friend.user_id, "join")
    hers, theirs = await alice.sets_up_cross_signing(), await carol.sets_up_cross_signing()
    other = await alice.on_another_device()
    for friend in (other, carol, dora):
        await friend.syncs(None)
    by = key_id(hers["user_signing_key"])
    name = key_id(theirs["master_key"]).removeprefix("ed25519:")
    vouched = signed(theirs["master_key"], alice.user_id, by, alice.other_secret)
    reply = await alice.says("POST", "/keys/signatures/upload", {carol.user_id: {name: vouched}})
    assert reply.body == {"failures": {}}, f"alice verifies carol: {reply.body}"
    assert (await other.syncs()).changed == {carol.user_id}, "alice's other device hears of it"
    assert (await other.queries(carol.user_id))["master_keys"][carol.user_id] == vouched, "and sees the signature"
    for friend in (carol, dora):
        shown = (await friend.queries(carol.user_id))["master_keys"][carol.user_id]
        assert shown == theirs["master_key"], f"{friend.user_id} does not see it"
        assert (await friend.syncs()).changed == set(), f"{friend.user_id} hears nothing"
    answer = await house.device_keys.user_devices(carol.user_id)
    assert b"signatures" not in bytes(str(answer.get("master_key")), "utf-8"), "nor do other servers"
    assert all("signatures" not in edu["master_key"] for edu in await house.edus("m.signing_key_update")), "ever"


async def test_bad_signatures_fail_one_by_one(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    await alice.publishes()
    hers, theirs = await alice.sets_up_cross_signing(), await carol.sets_up_cross_signing()
    own, by = key_id(hers["self_signing_key"]), key_id(hers["user_signing_key"])
    name = key_id(theirs["master_key"]).removeprefix("ed25519:")

    async def fails(user_id: str, what: str, value: Any) -> str:
        reply = await alice.says("POST", "/keys/signatures/upload", {user_id: {what: value}})
        assert reply.status == 200, "failures are told one by one"
        return str(reply.body["failures"][user_id][what]["errcode"])

    forged = signed(alice.keys, alice.user_id, own, alice.other_secret)
    assert await fails(alice.user_id, alice.device_id, forged) == "M_INVALID_SIGNATURE", "signed by another key"
    changed = signed({**alice.keys, "algorithms": []}, alice.user_id, own, alice.own_secret)
    assert await fails(alice.user_id, alice.device_id, changed) == "M_INVALID_PARAM", "another object than the stored"
    assert await fails(alice.user_id, "NOSUCH", alice.keys) == "M_NOT_FOUND", "an unknown device"
    forged = signed(theirs["master_key"], alice.user_id, by, alice.own_secret)
    assert await fails(carol.user_id, name, forged) == "M_INVALID_SIGNATURE", "another's key, wrongly signed"
    assert await fails(carol.user_id, carol.device_id, theirs["master_key"]) == "M_NOT_FOUND", "devices of others"
    assert (await alice.says("POST", "/keys/signatures/upload", {"x": {}})).errcode == "M_BAD_JSON", "no user"
    assert (await carol.queries(carol.user_id))["master_keys"][carol.user_id] == theirs["master_key"], "untouched"
