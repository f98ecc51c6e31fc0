"""Keys of people on other servers: fetched at need, kept current by EDUs, forgotten when nobody tells us any more."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from relay.errors import ApiError, Forbidden
from tests.keys.key_house import BOB, ELSEWHERE, KeyHouse, device_of


def _update(stream: int, previous: list[int], device_id: str = "BOBSPHONE", **more: Any) -> dict[str, Any]:
    return {"user_id": BOB, "device_id": device_id, "stream_id": stream, "prev_id": previous, **more}


async def _together(house: KeyHouse) -> tuple[Any, str]:
    """Alice and Bob share a room; Bob has one device, known under number 5."""
    alice = await house.friend("alice")
    room = await house.room_of(alice)
    await house.moves(room, BOB, "join")
    house.elsewhere.devices[BOB] = {"user_id": BOB, "stream_id": 5, "devices": [device_of(BOB, "BOBSPHONE")]}
    await alice.syncs(None)
    return alice, room


async def test_a_list_is_fetched_once_and_kept_current_by_updates(house: KeyHouse) -> None:
    alice, _ = await _together(house)
    first = await alice.queries(BOB)
    keys = house.elsewhere.devices[BOB]["devices"][0]["keys"]
    assert first["device_keys"] == {BOB: {"BOBSPHONE": keys}}, "without the name that the other server told"
    await alice.queries(BOB)
    assert house.elsewhere.asked == [f"devices {BOB}"], "the second query asks nobody"
    tablet = device_of(BOB, "TABLET", "D")["keys"]
    await house.receives("m.device_list_update", _update(6, [5], "TABLET", keys=tablet))
    assert (await alice.syncs()).changed == {BOB}, "alice hears of it"
    assert set((await alice.queries(BOB))["device_keys"][BOB]) == {"BOBSPHONE", "TABLET"}, "the update was applied"
    await house.receives("m.device_list_update", _update(7, [6], deleted=True))
    assert set((await alice.queries(BOB))["device_keys"][BOB]) == {"TABLET"}, "a deletion too"
    await house.receives("m.device_list_update", _update(7, [6], deleted=True))
    assert len(house.elsewhere.asked) == 1, "nothing had to be asked again, not even after a repeated update"


async def test_a_list_that_is_being_forgotten_is_given_to_nobody(house: KeyHouse) -> None:
    alice, room = await _together(house)
    await alice.queries(BOB)
    at_once: list[asyncio.Task[Any]] = []

    def asks(*_: object) -> None:
        at_once.append(asyncio.create_task(house.remote_lists.lists([BOB])))

    house.real_rooms.on_membership.append(asks)
    await house.moves(room, BOB, "leave")
    found, _ = await at_once[0]
    assert set(found[BOB].devices) == {"BOBSPHONE"}
    assert len(house.elsewhere.asked) == 2, "what was held is asked for anew in the very moment in which Bob left"


async def test_a_missed_update_makes_the_list_be_fetched_again(house: KeyHouse) -> None:
    alice, _ = await _together(house)
    await alice.queries(BOB)
    house.elsewhere.devices[BOB] = {"user_id": BOB, "stream_id": 9, "devices": [device_of(BOB, "NEW")]}
    await house.receives("m.device_list_update", _update(9, [8], "NEW"))
    assert (await alice.syncs()).changed == {BOB}, "alice hears that something changed"
    assert set((await alice.queries(BOB))["device_keys"][BOB]) == {"NEW"}, "the whole list was asked for"
    assert len(house.elsewhere.asked) == 2, "once"


async def test_an_update_during_a_fetch_is_not_lost(house: KeyHouse) -> None:
    alice, _ = await _together(house)

    async def changes_meanwhile() -> None:
        house.elsewhere.on_asked = None
        await house.receives("m.device_list_update", _update(6, [5], "TABLET"))

    house.elsewhere.on_asked = changes_meanwhile
    await alice.queries(BOB)
    house.elsewhere.devices[BOB]["devices"].append(device_of(BOB, "TABLET"))
    assert (await alice.syncs()).changed == {BOB}, "the change is told"
    assert "TABLET" in (await alice.queries(BOB))["device_keys"][BOB], "an older answer was not kept"


async def test_many_who_ask_at_once_are_one_request(house: KeyHouse) -> None:
    alice, room = await _together(house)
    house.elsewhere.on_asked = lambda: asyncio.sleep(0.02)
    await asyncio.gather(*(alice.queries(BOB) for _ in range(8)))
    assert house.elsewhere.asked == [f"devices {BOB}"], "one goes, the others wait for it"
    others = [f"@guest{number}:{ELSEWHERE}" for number in range(6)]
    for user_id in others:
        await house.moves(room, user_id, "join")
        house.elsewhere.devices[user_id] = {"stream_id": 1, "devices": [device_of(user_id, "X")]}
    await alice.queries(*others)
    assert house.elsewhere.asked[1:] == ["query 6"], "many of one server are asked for together"
    await alice.queries(*others)
    assert len(house.elsewhere.asked) == 2, "and kept"


async def test_lists_are_forgotten_when_no_room_is_shared(house: KeyHouse) -> None:
    alice, room = await _together(house)
    await alice.queries(BOB)
    assert await house.published.held_elsewhere() == [BOB], "it is kept as long as they share a room"
    await house.moves(room, alice.user_id, "leave")
    await _until(lambda: house.published.held_elsewhere(), [])
    await alice.queries(BOB)
    await alice.queries(BOB)
    assert len(house.elsewhere.asked) == 3, "who shares no room is asked for each time"
    await house.moves(room, alice.user_id, "join")
    await alice.queries(BOB)
    assert await house.published.held_elsewhere() == [BOB], "together again, it is kept again"
    await house.moves(room, BOB, "leave")
    await _until(lambda: house.published.held_elsewhere(), [])


async def _until(ask: Any, wanted: Any) -> None:
    for _ in range(2_000):
        if await ask() == wanted:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"it never became {wanted}")


async def test_a_server_that_is_down_is_named(house: KeyHouse) -> None:
    alice, _ = await _together(house)
    house.elsewhere.down = True
    found = await alice.queries(BOB, alice.user_id)
    assert set(found["failures"]) == {ELSEWHERE}, "the client learns whom it could not ask"
    assert set(found["device_keys"]) == {alice.user_id}, "and gets the others"
    reply = await alice.says("POST", "/keys/claim", {"one_time_keys": {BOB: {"BOBSPHONE": "signed_curve25519"}}})
    assert set(reply.body["failures"]) == {ELSEWHERE}, "the same for a claim"


async def test_a_claim_elsewhere_brings_only_what_was_asked_for(house: KeyHouse) -> None:
    alice, _ = await _together(house)
    house.elsewhere.one_time_keys = {
        BOB: {"BOBSPHONE": {"signed_curve25519:A": {"key": "k"}}, "OTHER": {"signed_curve25519:B": {"key": "k"}}},
        alice.user_id: {alice.device_id: {"signed_curve25519:EVIL": {"key": "k"}}},
    }
    reply = await alice.says("POST", "/keys/claim", {"one_time_keys": {BOB: {"BOBSPHONE": "signed_curve25519"}}})
    assert reply.body["one_time_keys"] == {BOB: {"BOBSPHONE": {"signed_curve25519:A": {"key": "k"}}}}, "nothing else"


async def test_a_server_speaks_only_for_its_own_users(house: KeyHouse) -> None:
    alice, _ = await _together(house)
    await alice.queries(BOB)
    for content in (_update(6, [5]), {**_update(6, [5]), "user_id": alice.user_id}):
        with pytest.raises(Forbidden):
            await house.receives("m.device_list_update", content, origin="three.example")
    with pytest.raises(Forbidden):
        await house.receives("m.signing_key_update", {"user_id": BOB, "master_key": {}}, origin="three.example")
    for bad in ({"stream_id": "6"}, {"stream_id": -1}, {"device_id": None}, {"prev_id": "5"}):
        with pytest.raises(ApiError):
            await house.receives("m.device_list_update", {**_update(6, [5]), **bad})
    assert (await alice.syncs()).changed == set(), "nothing of it counts"


async def test_a_device_that_names_itself_wrongly_does_not_exist(house: KeyHouse) -> None:
    alice, _ = await _together(house)
    liar = {"device_id": "LIAR", "keys": device_of("@carol:one.example", "LIAR")["keys"]}
    house.elsewhere.devices[BOB]["devices"] += [liar, {"device_id": 5, "keys": {}}, "junk"]
    assert set((await alice.queries(BOB))["device_keys"][BOB]) == {"BOBSPHONE"}, "only the honest device is shown"


async def test_new_signing_keys_from_elsewhere(house: KeyHouse) -> None:
    alice, _ = await _together(house)
    await alice.queries(BOB)
    public = "E" * 43
    master = {"user_id": BOB, "usage": ["master"], "keys": {f"ed25519:{public}": public}}
    await house.receives("m.signing_key_update", {"user_id": BOB, "master_key": master})
    assert (await alice.syncs()).changed == {BOB}, "alice hears of it"
    assert (await alice.queries(BOB))["master_keys"] == {BOB: master}, "and sees the key"
    assert len(house.elsewhere.asked) == 1, "without another request"
