"""Stories of a dehydrated device: it takes in keys while its owner is signed out everywhere, and gives them to her next device."""

from __future__ import annotations

import os
from typing import Any

from tests.people import Person, path
from tests.stories.test_keys import b64, ciphered
from tests.town import Town

WHERE = "/_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device"


def asleep(person: Person, one_time: int = 2) -> dict[str, Any]:
    """What a client uploads of a device that it puts to sleep; nobody here checks its signatures."""
    name, key = b64(os.urandom(32)), b64(os.urandom(32))
    signed = {"signatures": {person.id: {f"ed25519:{name}": b64(os.urandom(64))}}}
    return {
        "device_id": name,
        "device_data": {
            "algorithm": "org.matrix.msc3814.v2",
            "device_pickle": b64(os.urandom(300)),
            "nonce": b64(os.urandom(12)),
        },
        "initial_device_display_name": "asleep",
        "device_keys": {
            "user_id": person.id,
            "device_id": name,
            "dehydrated": True,
            "algorithms": ["m.olm.v1.curve25519-aes-sha2"],
            "keys": {f"curve25519:{name}": name, f"ed25519:{name}": key},
            **signed,
        },
        "one_time_keys": {f"signed_curve25519:{n}": {"key": b64(os.urandom(32)), **signed} for n in range(one_time)},
        "fallback_keys": {"signed_curve25519:F": {"key": b64(os.urandom(32)), "fallback": True, **signed}},
    }


async def known_devices(asking: Person, person: Person) -> dict[str, Any]:
    found: dict[str, Any] = await asking.calls("POST", "keys/query", {"device_keys": {person.id: []}})
    theirs: dict[str, Any] = found["device_keys"].get(person.id, {})
    return theirs


async def test_it_takes_in_keys_while_nobody_is_signed_in(town: Town) -> None:
    one = await town.relay("one")
    alice, bob = await town.users("alice@one", "bob@one")
    await alice.creates_room(with_=bob)
    await bob.syncs()
    assert (await alice.is_refused(alice.calls("GET", WHERE))).status == 404, "there is none at first"
    device = asleep(alice)
    assert await alice.calls("PUT", WHERE, device) == {"device_id": device["device_id"]}
    assert await bob.notices(lambda: alice.id in bob.devices_changed), "others hear of a new device"
    await alice.signs_out()
    seen = await known_devices(bob, alice)
    assert seen[device["device_id"]]["dehydrated"] is True, "they see that nobody is awake there"
    claimed = await bob.calls(
        "POST", "keys/claim", {"one_time_keys": {alice.id: {device["device_id"]: "signed_curve25519"}}}
    )
    assert list(claimed["one_time_keys"][alice.id][device["device_id"]]) == ["signed_curve25519:0"]
    sent = [ciphered() for _ in range(105)]
    for content in sent:
        await bob.tells_devices("m.room.encrypted", {alice.id: {device["device_id"]: content}})
    await one.restart()

    again = await alice.on_another_device()
    assert await again.calls("GET", WHERE) == {key: device[key] for key in ("device_id", "device_data")}
    for _ in range(2):  # a device that is lost while it reads takes nothing with it
        got: list[Any] = []
        query: dict[str, str] = {}
        while page := await again.calls("GET", f"{WHERE}/{path(device['device_id'])}/events", **query):
            got += [event["content"] for event in page["events"]]
            if "next_batch" not in page:
                break
            query = {"from": page["next_batch"]}
        assert got == sent, "all keys are there, in order, page by page"
    assert await again.calls("DELETE", WHERE) == {"device_id": device["device_id"]}
    assert device["device_id"] not in await known_devices(bob, alice)
    assert (await again.is_refused(again.calls("GET", WHERE))).status == 404


async def test_there_is_one_at_most(town: Town) -> None:
    one = await town.relay("one")
    alice = await town.user("alice@one")
    first, second = asleep(alice), asleep(alice)
    await alice.calls("PUT", WHERE, first)
    await alice.calls("PUT", WHERE, second)
    await alice.calls("PUT", WHERE, second)
    assert set(await known_devices(alice, alice)) == {second["device_id"]}, "a new one takes the place of the old one"
    refused = await alice.is_refused(alice.calls("GET", f"{WHERE}/{path(first['device_id'])}/events"))
    assert (refused.status, refused.errcode) == (403, "M_FORBIDDEN")
    listed = {one["device_id"] for one in (await alice.calls("GET", "devices"))["devices"]}
    assert listed == {alice.device, second["device_id"]}, "its owner sees it in her list"
    assert (await one.command("audit"))["findings"] == []
    await alice.calls("POST", "logout/all", {})
    await alice.signs_in()
    assert (await alice.is_refused(alice.calls("GET", WHERE))).status == 404, "signing out everywhere ends it"


async def test_it_is_kept_only_encrypted_and_with_keys(town: Town) -> None:
    alice = await town.user("alice@one")
    device = asleep(alice)
    readable = {**device, "device_data": {"algorithm": "x", "device_pickle": "my secret words"}}
    assert (await alice.is_refused(alice.calls("PUT", WHERE, readable))).status == 403
    without = {key: value for key, value in device.items() if key != "device_keys"}
    assert (await alice.is_refused(alice.calls("PUT", WHERE, without))).errcode == "M_MISSING_PARAM"
    mine = {**device, "device_id": alice.device, "device_keys": {**device["device_keys"], "device_id": alice.device}}
    assert (await alice.is_refused(alice.calls("PUT", WHERE, mine))).status == 403, "she is awake on this one"
