"""Stories of what services hear: everything of their rooms and nothing else, once, in order, whatever breaks in between."""

from __future__ import annotations

from tests.appservices.conftest import Hires
from tests.appservices.test_acting import CIPHERTEXT
from tests.people import path, until
from tests.town import Apart, Town


async def test_a_service_hears_its_rooms_and_no_others(town: Town, hires: Hires) -> None:
    bridge = await hires(receive_ephemeral=True, settings="presence: {enabled: true}\n")
    alice, bob, stranger = await town.users("alice@one", "bob@one", "stranger@one")
    ghost = await bridge.makes("tom")
    private = await alice.creates_room(with_=bob)
    unheard = await alice.sends(private)
    room = await alice.creates_room(with_=bob)
    before = await alice.sends(room)
    await alice.invites_to(room, ghost)
    assert await bridge.hears_that("events", lambda e: e["type"] == "m.room.member" and e["state_key"] == ghost)
    invite = next(e for e in bridge.told() if e.get("state_key") == ghost)
    assert invite["room_id"] == room and invite["content"]["membership"] == "invite"
    assert any(e["type"] == "m.room.encryption" for e in invite["unsigned"]["invite_room_state"]), (
        "it sees what it may join"
    )
    await bridge.acts(ghost, "POST", path("join", room), {})
    heard = await alice.sends(room)
    event = await bridge.hears(heard)
    assert event is not None and event["room_id"] == room and event["sender"] == alice.id
    assert bridge.heard(before) is None, "what was before its user came is not for it"

    await bob.has_read(room, heard)
    await bob.has_read(private, unheard)
    await bob.is_typing(private)
    await bob.is_typing(room)
    assert await bridge.hears_that(
        "ephemeral", lambda e: e["type"] == "m.typing" and bob.id in e["content"]["user_ids"]
    )
    assert await bridge.hears_that("ephemeral", lambda e: e["type"] == "m.receipt" and heard in e["content"])
    for person in (stranger, bob):
        await person.calls("PUT", path("presence", person.id, "status"), {"presence": "unavailable"})
    assert await bridge.hears_that(
        "ephemeral", lambda e: e["type"] == "m.presence" and e["content"]["presence"] == "unavailable"
    )
    passing = bridge.told("ephemeral")
    assert {e["room_id"] for e in passing if "room_id" in e} == {room}, "other rooms are not its business"
    assert stranger.id not in {e.get("sender") for e in passing}, "nor are people whom its users do not meet"
    assert bridge.told("ephemeral") == bridge.told("de.sorunome.msc2409.ephemeral")

    # The service is away while its user leaves: what was said before reaches it, what is said after does not.
    await bridge.closes()
    last = await alice.sends(room)
    await alice.calls("POST", path("rooms", room, "kick"), {"user_id": ghost})
    after = await alice.sends(room)
    await bridge.opens()
    town.clock.forward(minutes=11)
    assert await bridge.hears(last) is not None, "it lacks nothing of its time"
    marker = (await bridge.calls("POST", "createRoom", {}))["room_id"]
    assert await bridge.hears_that("events", lambda e: e["room_id"] == marker)
    assert bridge.heard(after) is None and bridge.heard(unheard) is None
    assert not bridge.wrong_tokens, "the relay shows it the token of its registration"


async def test_nothing_is_lost_and_nothing_comes_twice_over_a_kill(town: Town, hires: Hires) -> None:
    bridge = await hires(apart=True, **{"receive_ephemeral": True, "org.matrix.msc3202": True})
    house = town.houses["one"]
    assert isinstance(house, Apart)
    alice = await town.user("alice@one")
    await bridge.calls("PUT", path("devices", "BOT"), {})
    room = (await bridge.calls("POST", "createRoom", {"preset": "public_chat"}))["room_id"]
    await alice.joins(room)
    sent = [await alice.sends(room) for _ in range(3)]
    assert await bridge.hears(sent[-1]) is not None
    # One transaction hangs at the service; the relay is killed with it, and more came meanwhile.
    bridge.hangs.clear()
    tries = len(bridge.tries)
    sent += [await alice.sends(room) for _ in range(3)]
    assert await until(lambda: len(bridge.tries) > tries, 40), "it is on its way"
    sent += [await alice.sends(room) for _ in range(3)]
    for key in ("AAAA", "BBBB", "CCCC"):
        await alice.tells_devices("m.room.encrypted", {bridge.id: {"BOT": olm(key)}})
    await alice.has_read(room, sent[-1])
    await house.kill()
    bridge.hangs.set()
    await house.start()
    sent.append(await alice.sends(room))
    assert await bridge.hears(sent[-1]) is not None
    told = [e["event_id"] for e in bridge.told() if e["event_id"] in sent]
    assert told == sent, "each once, in order"
    keys = [m["content"]["sender_key"] for m in bridge.told("to_device")]
    assert keys == ["AAAA", "BBBB", "CCCC"], "messages to its device too"
    assert await bridge.hears_that("ephemeral", lambda e: sent[-2] in e["content"]), "and how far somebody has read"
    assert len({txn for txn, _ in bridge.transactions}) == len(bridge.transactions)
    assert bridge.tries.count(bridge.tries[tries]) >= 2, "what was in flight went out again under its old ID"


def olm(sender_key: str) -> dict[str, object]:
    ciphertext = {"a2V5": {"type": 0, "body": "AwoA"}}
    return {"algorithm": "m.olm.v1.curve25519-aes-sha2", "sender_key": sender_key, "ciphertext": ciphertext}


async def test_a_service_that_is_stuck_holds_nobody_up(town: Town, hires: Hires) -> None:
    stuck = await hires("stuck")
    house = town.houses["one"]
    await house.stop()
    text = (house.folder / "relay.yaml").read_text().replace("[stuck.yaml]", "[stuck.yaml, well.yaml]")
    (house.folder / "relay.yaml").write_text(text)
    well = await hires("well", house="two")
    well.registers_at(house.folder)
    well.settles(house)
    await house.start()
    stuck.refuses = 502
    alice = await town.user("alice@one")
    room = await alice.creates_room(preset="public_chat")
    for service in (stuck, well):
        await service.calls("POST", path("join", room), {})
    sent = await alice.sends(room)
    assert await well.hears(sent) is not None, "one service's trouble is not the other's"
    assert await alice.sees(sent) is not None
    assert await until(lambda: len(stuck.tries) > 0)
    stuck.refuses = None
    town.clock.forward(seconds=6)
    await stuck.calls("GET", "account/whoami")
    assert await stuck.hears(sent) is not None, "it spoke, so it was asked again"
    assert len(set(stuck.tries[: stuck.tries.index(stuck.transactions[0][0]) + 1])) == 1, "one transaction at a time"


async def test_an_old_service_is_spoken_to_in_the_old_way(town: Town, hires: Hires) -> None:
    bridge = await hires()
    bridge.only_legacy = True
    room = (await bridge.calls("POST", "createRoom", {}))["room_id"]
    assert await bridge.hears_that("events", lambda e: e["room_id"] == room)
    alice = await town.user("alice@one")
    ghost = bridge.ghost("late")

    async def make() -> None:
        await bridge.makes("late")

    bridge.knows[ghost] = make
    await alice.invites_to(await alice.creates_room(), ghost)
    assert bridge.asked == [f"/users/{ghost}"]


async def test_keys_and_messages_to_devices_come_with_transactions(town: Town, hires: Hires) -> None:
    bridge = await hires(**{"receive_ephemeral": True, "org.matrix.msc3202": True})
    alice = await town.user("alice@one")
    await bridge.calls("PUT", path("devices", "BOT"), {})
    key = {"signed_curve25519:A": {"key": "a"}, "signed_curve25519:B": {"key": "b"}}
    await bridge.calls("POST", "keys/upload", {"one_time_keys": key}, device_id="BOT")
    room = await alice.creates_room(preset="public_chat")
    await bridge.calls("POST", path("join", room), {})
    assert await until(
        lambda: any(alice.id in body["device_lists"]["changed"] for _, body in bridge.transactions), 20
    ), "who joins an encrypted room has everybody's devices to learn"
    claimed = await alice.calls("POST", "keys/claim", {"one_time_keys": {bridge.id: {"BOT": "signed_curve25519"}}})
    assert claimed["one_time_keys"][bridge.id]["BOT"]
    sealed = olm("a2V5")
    await alice.tells_devices("m.room.encrypted", {bridge.id: {"BOT": sealed}})
    assert await bridge.hears_that("to_device", lambda m: m["to_device_id"] == "BOT")
    (message,) = bridge.told("to_device")
    assert message == {
        "type": "m.room.encrypted",
        "sender": alice.id,
        "to_user_id": bridge.id,
        "to_device_id": "BOT",
        "content": sealed,
    }
    assert bridge.told("de.sorunome.msc2409.to_device") == [message]
    _, body = bridge.transactions[-1]
    assert body["device_one_time_keys_count"] == {bridge.id: {"BOT": {"signed_curve25519": 1}}}
    assert body["device_unused_fallback_key_types"] == {bridge.id: {"BOT": []}}
    assert body["org.matrix.msc3202.device_one_time_keys_count"] == body["device_one_time_keys_count"]
    synced = await bridge.calls("GET", "sync", device_id="BOT")
    assert not synced.get("to_device", {}).get("events"), "what it has is not kept for it"
    await bridge.calls("POST", path("rooms", room, "leave"), {})
    assert await until(lambda: any(alice.id in body["device_lists"]["left"] for _, body in bridge.transactions), 40)


async def test_an_invite_from_another_server_reaches_the_service(town: Town, hires: Hires) -> None:
    bridge = await hires()
    ghost = await bridge.makes("tom")
    bob = await town.user("bob@two")
    room = await bob.creates_room()
    await bob.invites_to(room, ghost)
    assert await bridge.hears_that(
        "events", lambda e: e.get("state_key") == ghost and e["content"]["membership"] == "invite"
    )
    invite = next(e for e in bridge.told() if e.get("state_key") == ghost)
    assert invite["room_id"] == room and invite["unsigned"]["invite_room_state"]
    await bridge.acts(ghost, "POST", path("join", room), {})
    sent = await bob.sends(room)
    assert await bridge.hears(sent) is not None
    answer = await bridge.acts(ghost, "PUT", path("rooms", room, "send", "m.room.encrypted", "x"), CIPHERTEXT)
    assert await bob.sees(answer["event_id"]) is not None
