"""Devices and their keys, on one relay and across two: published, claimed once, and everybody told what changed."""

from __future__ import annotations

import base64
import os
from typing import Any

from nacl.signing import SigningKey

from relay.protocol.canonical import encode
from tests.people import Person
from tests.town import Town


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode().rstrip("=")


def signed(obj: dict[str, Any], user_id: str, key_id: str, key: SigningKey) -> dict[str, Any]:
    return {**obj, "signatures": {user_id: {key_id: b64(key.sign(encode(obj)).signature)}}}


async def publishes_keys(person: Person, one_time: int = 0) -> SigningKey:
    key = SigningKey.generate()
    key_id = f"ed25519:{person.device}"
    device = {
        "user_id": person.id,
        "device_id": person.device,
        "algorithms": ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"],
        "keys": {key_id: b64(bytes(key.verify_key)), f"curve25519:{person.device}": b64(os.urandom(32))},
    }
    fallback = {"signed_curve25519:fb": signed({"key": b64(os.urandom(32)), "fallback": True}, person.id, key_id, key)}
    keys = {
        f"signed_curve25519:k{n}": signed({"key": b64(os.urandom(32))}, person.id, key_id, key) for n in range(one_time)
    }
    answer = await person.calls(
        "POST",
        "keys/upload",
        {"device_keys": signed(device, person.id, key_id, key), "one_time_keys": keys, "fallback_keys": fallback},
    )
    assert answer["one_time_key_counts"].get("signed_curve25519", 0) == one_time, "the relay counts what it took"
    return key


def ciphered() -> dict[str, Any]:
    return {
        "algorithm": "m.olm.v1.curve25519-aes-sha2",
        "sender_key": b64(os.urandom(32)),
        "ciphertext": {b64(os.urandom(32)): {"type": 0, "body": b64(os.urandom(80))}},
    }


async def claims(person: Person, other: Person) -> str | None:
    wanted = {other.id: {other.device: "signed_curve25519"}}
    answer = await person.calls("POST", "keys/claim", {"one_time_keys": wanted})
    given = answer["one_time_keys"].get(other.id, {}).get(other.device, {})
    return next(iter(given), None)


async def test_keys_cross_and_each_one_time_key_is_given_once(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@one")
    await alice.creates_room(with_=[bob, carol])
    await publishes_keys(bob, one_time=2)
    for person in (alice, carol):
        answer = await person.calls("POST", "keys/query", {"device_keys": {bob.id: []}})
        assert bob.device in answer["device_keys"][bob.id], f"{person.name} is told of the device, wherever it lives"
    await bob.syncs()
    given = {await claims(alice, bob), await claims(carol, bob)}
    assert len(given) == 2 and None not in given, "each one-time key is given once"
    answer = await bob.syncs()
    assert answer["device_one_time_keys_count"].get("signed_curve25519", 0) == 0, "the owner is told that none is left"
    assert await claims(alice, bob) == "signed_curve25519:fb", "then the fallback key serves"
    assert await claims(carol, bob) == "signed_curve25519:fb", "again and again"
    answer = await bob.syncs()
    assert answer["device_unused_fallback_key_types"] == [], "and its owner is told that it was used"


async def test_whoever_shares_a_room_is_told_of_a_changed_device(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@two")
    room = await alice.creates_room(with_=bob)
    await bob.syncs()
    bob.devices_changed.clear()
    await carol.syncs()
    await publishes_keys(alice)
    assert await bob.notices(lambda: alice.id in bob.devices_changed), "a new device is told to the other server"
    answer = await bob.calls("POST", "keys/query", {"device_keys": {alice.id: []}})
    assert alice.device in answer["device_keys"][alice.id]
    await carol.syncs()
    assert alice.id not in carol.devices_changed, "who shares no room is told nothing"
    phone = await alice.on_another_device()
    await publishes_keys(phone)
    bob.devices_changed.clear()
    assert await bob.notices(lambda: alice.id in bob.devices_changed)
    await phone.signs_out()
    bob.devices_changed.clear()
    assert await bob.notices(lambda: alice.id in bob.devices_changed), "a device that is signed out, too"
    answer = await bob.calls("POST", "keys/query", {"device_keys": {alice.id: []}})
    assert phone.device not in answer["device_keys"][alice.id], "and it is gone from the list"
    await bob.leaves(room)
    await bob.syncs()
    assert alice.id in bob.devices_left, "with nobody's room shared any more he need not follow her devices"


async def test_a_message_to_a_device_arrives_once_here_and_there(town: Town) -> None:
    alice, bob, anna = await town.users("alice@one", "bob@two", "anna@one")
    await alice.creates_room(with_=[bob, anna])
    for other in (bob, anna):
        tablet = await other.on_another_device()
        content = ciphered()
        for _ in range(2):
            await alice.tells_devices("m.room.encrypted", {other.id: {other.device: content}}, txn=f"once-{other.name}")
        assert await other.notices(lambda other=other: bool(other.to_device)), "the device gets it"
        await other.syncs()
        assert len(other.to_device) == 1, "a retry under the same transaction ID sends nothing twice"
        got = other.to_device[0]
        assert got["sender"] == alice.id and got["content"] == content
        await tablet.syncs()
        assert not tablet.to_device, "a device that was not meant gets nothing"
        await alice.tells_devices("m.room.encrypted", {other.id: {"*": ciphered()}})
        assert await tablet.notices(lambda tablet=tablet: bool(tablet.to_device)), "'*' means all of them"
        assert await other.notices(lambda other=other: len(other.to_device) == 2)


async def test_what_was_not_confirmed_comes_again(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    await bob.syncs()
    await alice.tells_devices("m.room.encrypted", {bob.id: {bob.device: ciphered()}})
    stood = bob.since
    for _ in range(2):
        answer = await bob.calls("GET", "sync", since=stood)
        assert len(answer["to_device"]["events"]) == 1, (
            "as long as she asks with the old token it may have been lost on the way"
        )
    later = await bob.calls("GET", "sync", since=answer["next_batch"])
    assert not later.get("to_device", {}).get("events"), "asking with the new one confirms it"


async def test_cross_signing_is_seen_on_the_other_side(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    await alice.creates_room(with_=bob)
    await publishes_keys(alice)
    await bob.syncs()
    bob.devices_changed.clear()
    master, self_signing, user_signing = (SigningKey.generate() for _ in range(3))

    def public(key: SigningKey, usage: str) -> dict[str, Any]:
        name = b64(bytes(key.verify_key))
        return {"user_id": alice.id, "usage": [usage], "keys": {f"ed25519:{name}": name}}

    master_id = f"ed25519:{b64(bytes(master.verify_key))}"
    body = {
        "master_key": public(master, "master"),
        "self_signing_key": signed(public(self_signing, "self_signing"), alice.id, master_id, master),
        "user_signing_key": signed(public(user_signing, "user_signing"), alice.id, master_id, master),
    }
    try:
        await alice.calls("POST", "keys/device_signing/upload", body)
    except Exception:
        auth = {
            "type": "m.login.password",
            "identifier": {"type": "m.id.user", "user": alice.name},
            "password": alice.password,
        }
        refused = await alice.is_refused(alice.calls("POST", "keys/device_signing/upload", body))
        assert refused.status == 401 and refused.body["flows"], "the relay asks for the password"
        await alice.calls(
            "POST", "keys/device_signing/upload", {**body, "auth": {**auth, "session": refused.body["session"]}}
        )
    assert await bob.notices(lambda: alice.id in bob.devices_changed), "new signing keys are told to the other server"
    answer = await bob.calls("POST", "keys/query", {"device_keys": {alice.id: []}})
    assert answer["master_keys"][alice.id]["keys"] == body["master_key"]["keys"]
    assert answer["self_signing_keys"][alice.id]["keys"] == body["self_signing_key"]["keys"]
    assert alice.id not in answer.get("user_signing_keys", {}), "the user-signing key is hers alone"
    mine = await alice.calls("POST", "keys/query", {"device_keys": {alice.id: []}})
    assert mine["user_signing_keys"][alice.id]["keys"] == body["user_signing_key"]["keys"]


async def test_a_key_backup_is_kept_and_given_back(town: Town) -> None:
    alice = await town.user("alice@one")
    auth_data = {"public_key": b64(os.urandom(32)), "signatures": {}}
    version = (
        await alice.calls(
            "POST", "room_keys/version", {"algorithm": "m.megolm_backup.v1.curve25519-aes-sha2", "auth_data": auth_data}
        )
    )["version"]
    session = {
        "first_message_index": 0, "forwarded_count": 0, "is_verified": True,
        "session_data": {"ephemeral": b64(os.urandom(32)), "ciphertext": b64(os.urandom(100)), "mac": b64(os.urandom(8))},
    }  # fmt: skip
    room, session_id = "!room:one", b64(os.urandom(32)).replace("/", "A").replace("+", "B")
    await alice.calls("PUT", "room_keys/keys", {"rooms": {room: {"sessions": {session_id: session}}}}, version=version)
    phone = await alice.on_another_device()
    latest = await phone.calls("GET", "room_keys/version")
    assert latest["version"] == version and latest["count"] == 1
    got = await phone.calls("GET", "room_keys/keys", version=version)
    assert got["rooms"][room]["sessions"][session_id]["session_data"] == session["session_data"], (
        "another device gets the keys back"
    )
