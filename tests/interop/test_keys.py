"""Our relay and a real Synapse: device lists, cross-signing keys, one-time keys and messages to devices, both ways."""

from __future__ import annotations

from tests.interop.street import Street, both_sides, olm
from tests.interop.wallet import Wallet
from tests.people import Json, Person, path, until


@both_sides
async def test_keys_are_asked_for_and_claimed(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    wallet = Wallet(bob)
    await wallet.uploads_device(one_time_keys=2, fallback=True)
    await wallet.uploads_cross_signing()
    await street.room(alice, bob)
    answer = await _asks(alice, bob)
    found = answer["device_keys"][bob.id][bob.device]
    assert found["keys"] == wallet.device_keys["keys"], "her device's keys are as she uploaded them"
    assert found["signatures"][bob.id] == wallet.device_keys["signatures"][bob.id]
    assert answer["master_keys"][bob.id]["keys"] == wallet.master["keys"]
    assert answer["self_signing_keys"][bob.id]["keys"] == wallet.self_signing["keys"]
    claimed = []
    for _ in range(3):
        one = await alice.calls("POST", "keys/claim", {"one_time_keys": {bob.id: {bob.device: "signed_curve25519"}}})
        claimed += one["one_time_keys"][bob.id][bob.device].items()
    assert len({key_id for key_id, _ in claimed}) == 3, "each one-time key is handed out once, then the fallback key"
    assert dict(claimed).keys() == wallet.uploaded_ids(), "and they are hers"
    assert claimed[2][1]["fallback"] is True


@both_sides
async def test_device_lists_follow_what_happens(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    await Wallet(bob).uploads_device()
    await alice.syncs()
    room = await street.room(alice, bob)
    assert await alice.notices(lambda: bob.id in alice.devices_changed), "whoever shares a room is to be looked at"
    assert await _has_device(alice, bob)
    alice.devices_changed.clear()
    tablet = await bob.on_another_device(initial_device_display_name="Secret name")
    await Wallet(tablet).uploads_device()
    assert await alice.notices(lambda: bob.id in alice.devices_changed), "a new device is announced"
    assert await until(lambda: _has_device(alice, tablet)), "and found"
    assert "Secret name" not in str(await _asks(alice, bob)), "its name is told to nobody elsewhere"
    alice.devices_changed.clear()
    await Wallet(bob).uploads_cross_signing()
    assert await alice.notices(lambda: bob.id in alice.devices_changed), "new cross-signing keys are announced"
    assert await until(lambda: _has_master_key(alice, bob)), "and found"
    alice.devices_changed.clear()
    await tablet.signs_out()
    assert await alice.notices(lambda: bob.id in alice.devices_changed), "a device that is gone is announced"
    assert await until(lambda: _has_no_device(alice, tablet)), "and is not found any more"
    alice.devices_left.clear()
    await bob.leaves(room)
    assert await alice.notices(lambda: bob.id in alice.devices_left), "who shares no room any more need not be followed"


async def _asks(asker: Person, other: Person) -> Json:
    """Once more where it fails: Synapse 1.163 stumbles over a list that it has fetched by itself while somebody asks for it."""
    answer: Json = {}

    async def answers() -> bool:
        answer.update(await asker.calls("POST", "keys/query", {"device_keys": {other.id: []}}))
        return not answer["failures"]

    assert await until(answers), f"the other server answers: {answer['failures']}"
    return answer


async def _has_device(asker: Person, other: Person) -> bool:
    return other.device in (await _asks(asker, other))["device_keys"].get(other.id, {})


async def _has_no_device(asker: Person, other: Person) -> bool:
    return not await _has_device(asker, other)


async def _has_master_key(asker: Person, other: Person) -> bool:
    return other.id in (await _asks(asker, other))["master_keys"]


@both_sides
async def test_messages_to_devices_cross_in_order(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    for sender, receiver in ((alice, bob), (bob, alice)):
        for number in range(5):
            await sender.tells_devices("m.room.encrypted", {receiver.id: {receiver.device: olm(f"bm8{number}")}})
        assert await receiver.notices(lambda receiver=receiver: len(receiver.to_device) >= 5), "they all arrive"
        marks = [next(iter(event["content"]["ciphertext"].values()))["body"] for event in receiver.to_device]
        assert marks == [f"bm8{number}" for number in range(5)], "in order, each once"
        assert {event["sender"] for event in receiver.to_device} == {sender.id}
    tablet = await bob.on_another_device()
    request = {"action": "request_cancellation", "request_id": "1", "requesting_device_id": alice.device}
    await alice.tells_devices("m.room_key_request", {bob.id: {"*": request}})
    for device in (bob, tablet):
        arrived = await device.notices(
            lambda device=device: "m.room_key_request" in {e["type"] for e in device.to_device}
        )
        assert arrived, "`*` reaches every device"


@both_sides
async def test_profiles_are_asked_for_and_followed(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    room = await street.room(alice, bob)
    await alice.calls("PUT", path("profile", alice.id, "displayname"), {"displayname": "Alice A."})
    assert await bob.notices(lambda: bob.name_of(room, alice) == "Alice A."), "a new name crosses into the room"
    assert (await bob.calls("GET", path("profile", alice.id)))["displayname"] == "Alice A.", "and is found on asking"
    nobody = path("profile", f"@nobody-here:{alice.server}")
    assert (await bob.is_refused(bob.calls("GET", nobody))).status in (403, 404)
