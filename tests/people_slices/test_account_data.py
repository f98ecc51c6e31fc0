"""Account data and tags: kept exactly, bounded, seen by their owner alone, and told to her other devices by /sync."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from relay.part import SyncAsk, SyncShare
from tests.accounts.front_door import House, Person

ROOM = "!room:one.example"


async def syncs(house: House, person: Person, since: int | None, **more: Any) -> dict[str, Any]:
    """This part's share of a /sync of somebody who is in ROOM."""
    upto = house.db.stable_pos()
    topics = house.bell.topics(person.user_id, since) if since is not None else None
    rooms = more.get("rooms", frozenset({ROOM}))
    ask = SyncAsk(
        person.user_id, person.device_id, since, upto, 0, topics, rooms, more.get("newly_joined", frozenset())
    )
    share = SyncShare()
    await house.account_data.changes(ask, share)
    answer = {"global": share.account_data, **{room_id: room.account_data for room_id, room in share.rooms.items()}}
    whole: dict[str, Any] = orjson.loads(orjson.dumps({**answer, "upto": upto}))
    return whole


async def test_account_data_comes_back_as_it_was_and_reaches_the_next_sync(house: House) -> None:
    alice = await house.person("alice")
    user = f"/user/{alice.user_id}"
    secret = {
        "algorithm": "m.secret_storage.v1.aes-hmac-sha2",
        "n": [1.5, None, True, "é\u2028"],
        "big": 2**53,
        "z": 1,
        "a": {},
    }
    assert (await alice.says("GET", f"{user}/account_data/m.secret_storage.key.x")).errcode == "M_NOT_FOUND"
    assert (await alice.says("PUT", f"{user}/account_data/m.secret_storage.key.x", secret)).body == {}
    assert (await alice.says("GET", f"{user}/account_data/m.secret_storage.key.x")).body == secret
    await alice.says("PUT", f"{user}/rooms/{ROOM}/account_data/m.marked_unread", {"unread": True})
    first = await syncs(house, alice, None)
    assert first["global"] == [{"type": "m.secret_storage.key.x", "content": secret}], "a first sync has everything"
    assert first[ROOM] == [{"type": "m.marked_unread", "content": {"unread": True}}]
    quiet = await syncs(house, alice, first["upto"])
    assert quiet["global"] == [] and ROOM not in quiet, "nothing new"
    await alice.says("PUT", f"{user}/account_data/m.direct", {"@bob:two.example": [ROOM]})
    then = await syncs(house, alice, first["upto"])
    assert [event["type"] for event in then["global"]] == ["m.direct"] and ROOM not in then, "only what changed"
    elsewhere = await syncs(house, alice, None, rooms=frozenset())
    assert ROOM not in elsewhere, "of a room that she left nothing is told"
    joined = await syncs(house, alice, then["upto"], newly_joined=frozenset({ROOM}))
    assert [event["type"] for event in joined[ROOM]] == ["m.marked_unread"], "a room she joins brings its notes along"


async def test_a_long_poll_is_woken(house: House) -> None:
    alice = await house.person("alice")
    waiting = asyncio.create_task(house.bell.wait(alice.user_id, 30))
    await asyncio.sleep(0)
    await alice.says("PUT", f"/user/{alice.user_id}/account_data/org.example", {})
    await asyncio.wait_for(waiting, 5)


async def test_account_data_is_its_owners(house: House) -> None:
    alice, bob = await house.person("alice"), await house.person("bob")
    for method, body in (("GET", None), ("PUT", {})):
        for place in ("account_data/m.direct", f"rooms/{ROOM}/account_data/m.direct"):
            reply = await bob.says(method, f"/user/{alice.user_id}/{place}", body)
            assert reply.status == 403 and reply.errcode == "M_FORBIDDEN", f"bob can't {method} it"
    reply = await bob.says("PUT", f"/user/{alice.user_id}/rooms/{ROOM}/tags/u.x", {})
    assert reply.status == 403


@pytest.mark.parametrize(
    ("place", "body", "status", "errcode"),
    [
        ("account_data/m.push_rules", {}, 405, "M_BAD_JSON"),
        (f"rooms/{ROOM}/account_data/m.fully_read", {}, 405, "M_BAD_JSON"),
        ("account_data/org.example", {"big": "x" * 65_536}, 413, "M_TOO_LARGE"),
        ("account_data/org.example", b"[1]", 400, "M_BAD_JSON"),
        ("account_data/org.example", b"{nonsense", 400, "M_NOT_JSON"),
        ("account_data/" + "x" * 256, {}, 400, "M_INVALID_PARAM"),
        ("rooms/nonsense/account_data/org.example", {}, 400, "M_INVALID_PARAM"),
        (f"rooms/{ROOM}/tags/{'x' * 256}", {}, 400, "M_INVALID_PARAM"),
        (f"rooms/{ROOM}/tags/u.x", {"order": "first"}, 400, "M_INVALID_PARAM"),
        (f"rooms/{ROOM}/tags/u.x", {"big": "x" * 65_536}, 413, "M_TOO_LARGE"),
    ],
)
async def test_what_is_not_taken(house: House, place: str, body: Any, status: int, errcode: str) -> None:
    alice = await house.person("alice")
    reply = await alice.says("PUT", f"/user/{alice.user_id}/{place}", body)
    assert (reply.status, reply.errcode) == (status, errcode), f"{place:.60}: {reply.body}"
    assert await house.rows("SELECT 1 FROM account_data") == [], "and nothing was written"


async def test_types_that_another_part_keeps_can_be_read_here(house: House) -> None:
    alice = await house.person("alice")

    async def push_rules(user_id: str, room_id: str) -> dict[str, Any] | None:
        return {"global": {}} if room_id == "" else None

    house.account_data.provided["m.push_rules"] = push_rules
    assert (await alice.says("GET", f"/user/{alice.user_id}/account_data/m.push_rules")).body == {"global": {}}
    assert (await alice.says("GET", f"/user/{alice.user_id}/rooms/{ROOM}/account_data/m.push_rules")).status == 404


async def test_whom_she_ignores_is_known_from_memory_and_follows_her_changes(house: House) -> None:
    alice = await house.person("alice")
    path = f"/user/{alice.user_id}/account_data/m.ignored_user_list"
    assert await house.account_data.ignored_users(alice.user_id) == frozenset()
    await alice.says("PUT", path, {"ignored_users": {"@mallory:two.example": {}}})
    assert await house.account_data.ignored_users(alice.user_id) == {"@mallory:two.example"}
    await alice.says("PUT", path, {"ignored_users": "nonsense"})
    assert await house.account_data.ignored_users(alice.user_id) == frozenset(), "nonsense ignores nobody"


async def test_tags(house: House) -> None:
    alice = await house.person("alice")
    tags = f"/user/{alice.user_id}/rooms/{ROOM}/tags"
    assert (await alice.says("GET", tags)).body == {"tags": {}}
    await asyncio.gather(*(alice.says("PUT", f"{tags}/u.number{number}", {"order": 0.5}) for number in range(5)))
    await alice.says("PUT", f"{tags}/m.favourite", {"order": 0.25, "org.example": "kept"})
    for number in range(5):
        assert (await alice.says("DELETE", f"{tags}/u.number{number}")).body == {}
    expected = {"tags": {"m.favourite": {"order": 0.25, "org.example": "kept"}}}
    assert (await alice.says("GET", tags)).body == expected
    assert (await syncs(house, alice, None))[ROOM] == [{"type": "m.tag", "content": expected}], "they are account data"
    await alice.says("PUT", f"/user/{alice.user_id}/rooms/{ROOM}/account_data/m.tag", {"tags": "nonsense"})
    assert (await alice.says("GET", tags)).body == {"tags": {}}, "a client that writes nonsense breaks nothing"
    assert (await alice.says("PUT", f"{tags}/u.x")).status == 200, "a tag may come without a body"
