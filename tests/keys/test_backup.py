"""Key backup: versions, and which of two copies of a key stays. Spec: client-server-api/#server-side-key-backups."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.keys.backup import KEYS_PER_READ
from tests.keys.key_house import Friend, KeyHouse

ALGORITHM = "m.megolm_backup.v1.curve25519-aes-sha2"
ROOM = "!room:one.example"


def _key(first: int = 0, forwarded: int = 0, verified: bool = False, text: str = "QUJD") -> dict[str, Any]:
    return {
        "first_message_index": first,
        "forwarded_count": forwarded,
        "is_verified": verified,
        "session_data": {"ciphertext": text, "ephemeral": "QQ", "mac": "QQ"},
    }


async def _new_backup(friend: Friend) -> str:
    reply = await friend.says(
        "POST", "/room_keys/version", {"algorithm": ALGORITHM, "auth_data": {"public_key": "abc"}}
    )
    assert reply.status == 200, f"a backup can be made: {reply.body}"
    return str(reply.body["version"])


async def test_the_life_of_a_backup(house: KeyHouse) -> None:
    alice = await house.friend("alice")
    assert (await alice.says("GET", "/room_keys/version")).errcode == "M_NOT_FOUND", "there is none yet"
    version = await _new_backup(alice)
    info = (await alice.says("GET", "/room_keys/version")).body
    assert info["version"] == version and info["count"] == 0 and info["auth_data"] == {"public_key": "abc"}, f"{info}"
    path = f"/room_keys/version/{version}"
    change = {"algorithm": ALGORITHM, "auth_data": {"public_key": "new"}, "version": version}
    assert (await alice.says("PUT", path, change)).body == {}, "its settings can be changed"
    assert (await alice.says("GET", path)).body["auth_data"] == {"public_key": "new"}, "and are"
    for bad in ({**change, "version": "9"}, {**change, "algorithm": "other"}):
        assert (await alice.says("PUT", path, bad)).errcode == "M_INVALID_PARAM", f"{bad} is refused"
    assert (await alice.says("DELETE", path)).status == 200, "it can be deleted"
    assert (await alice.says("DELETE", path)).status == 200, "twice"
    assert (await alice.says("DELETE", "/room_keys/version/77")).errcode == "M_NOT_FOUND", "but not what never was"
    assert (await alice.says("GET", path)).errcode == "M_NOT_FOUND", "then it is gone"
    assert (await alice.says("PUT", path, change)).errcode == "M_NOT_FOUND", "and can't be changed"
    assert int(await _new_backup(alice)) > int(version), "no number comes twice"


async def test_keys_go_in_and_come_out(house: KeyHouse) -> None:
    alice = await house.friend("alice")
    version = await _new_backup(alice)
    one = await alice.says("PUT", f"/room_keys/keys/{ROOM}/s1?version={version}", _key(1))
    assert one.body["count"] == 1, f"one key: {one.body}"
    two = await alice.says("PUT", f"/room_keys/keys/{ROOM}?version={version}", {"sessions": {"s/2+": _key(2)}})
    body = {"rooms": {"!other:one.example": {"sessions": {"s3": _key(3)}}, ROOM: {"sessions": {"s1": _key(1)}}}}
    three = await alice.says("PUT", f"/room_keys/keys?version={version}", body)
    assert [two.body["count"], three.body["count"]] == [2, 3], "an equal key is not counted again"
    assert len({one.body["etag"], two.body["etag"], three.body["etag"]}) == 3, "each change has another etag"
    same = await alice.says("PUT", f"/room_keys/keys/{ROOM}/s1?version={version}", _key(1))
    assert same.body == three.body, "what changes nothing leaves the etag alone"
    everything = (await alice.says("GET", f"/room_keys/keys?version={version}")).body
    room = {"sessions": {"s1": _key(1), "s/2+": _key(2)}}
    assert everything == {"rooms": {ROOM: room, "!other:one.example": {"sessions": {"s3": _key(3)}}}}, "all of it"
    assert (await alice.says("GET", f"/room_keys/keys/{ROOM}?version={version}")).body == room, "a room's keys"
    assert (await alice.says("GET", f"/room_keys/keys/!x:y?version={version}")).body == {"sessions": {}}, "no keys"
    assert (await alice.says("GET", f"/room_keys/keys/{ROOM}/s1?version={version}")).body == _key(1), "one key"
    assert (await alice.says("GET", f"/room_keys/keys/{ROOM}/no?version={version}")).errcode == "M_NOT_FOUND", "none"
    assert (await alice.says("GET", "/room_keys/keys?version=99")).errcode == "M_NOT_FOUND", "no such backup"
    assert (await alice.says("GET", "/room_keys/keys")).errcode == "M_MISSING_PARAM", "which backup?"
    gone = await alice.says("DELETE", f"/room_keys/keys/{ROOM}/s1?version={version}")
    assert gone.body["count"] == 2 and gone.body["etag"] != three.body["etag"], "one is deleted"
    assert (await alice.says("DELETE", f"/room_keys/keys/{ROOM}?version={version}")).body["count"] == 1, "a room's"
    assert (await alice.says("DELETE", f"/room_keys/keys?version={version}")).body["count"] == 0, "all"
    assert (await alice.says("GET", f"/room_keys/keys?version={version}")).body == {"rooms": {}}, "nothing is left"


async def test_only_the_latest_backup_takes_keys(house: KeyHouse) -> None:
    alice, carol = await house.friend("alice"), await house.friend("carol")
    old, new = await _new_backup(alice), await _new_backup(alice)
    reply = await alice.says("PUT", f"/room_keys/keys/{ROOM}/s?version={old}", _key())
    assert (reply.status, reply.errcode) == (403, "M_WRONG_ROOM_KEYS_VERSION"), "the old one is closed"
    assert reply.body["current_version"] == new, "and the answer says which is open"
    assert (await alice.says("PUT", f"/room_keys/keys/{ROOM}/s?version={new}", _key())).status == 200, "the new one is"
    assert (await carol.says("GET", f"/room_keys/keys?version={new}")).errcode == "M_NOT_FOUND", "it is hers alone"


async def test_a_large_backup_comes_whole(house: KeyHouse) -> None:
    alice = await house.friend("alice")
    version = await _new_backup(alice)
    number = KEYS_PER_READ + 3
    body = {"rooms": {f"!{i % 3}:x": {"sessions": {f"s{j}": _key(j) for j in range(i, number, 3)}} for i in range(3)}}
    assert (await alice.says("PUT", f"/room_keys/keys?version={version}", body)).body["count"] == number, "all go in"
    assert (await alice.says("GET", f"/room_keys/keys?version={version}")).body == body, "all come out"


async def test_a_readable_key_is_refused(house: KeyHouse) -> None:
    alice = await house.friend("alice")
    version = await _new_backup(alice)
    path = f"/room_keys/keys/{ROOM}/s?version={version}"
    for data in ({"session_key": "canary"}, {"ciphertext": "in the clear!"}, {}):
        reply = await alice.says("PUT", path, {**_key(), "session_data": data})
        assert (reply.status, reply.errcode) == (403, "M_FORBIDDEN"), f"{data} is refused"
    value = _key()
    value["session_data"]["note"] = "canary"
    assert (await alice.says("PUT", path, value)).status == 200, "a good one is taken"
    assert (await alice.says("GET", path)).body == _key(), "without what nobody listed"
    for bad in ({"first_message_index": -1}, {"forwarded_count": "1"}, {"is_verified": 1}, {"session_data": "x"}):
        assert (await alice.says("PUT", path, {**_key(), **bad})).errcode == "M_BAD_JSON", f"{bad} is refused"


@pytest.mark.parametrize(
    ("old", "new", "wins"),
    [
        (_key(5, 5, False, "b2xk"), _key(9, 9, True), True),
        (_key(9, 9, True, "b2xk"), _key(0, 0, False), False),
        (_key(5, 0, True, "b2xk"), _key(4, 9, True), True),
        (_key(4, 9, False, "b2xk"), _key(5, 0, False), False),
        (_key(4, 2, True, "b2xk"), _key(4, 1, True), True),
        (_key(4, 1, True, "b2xk"), _key(4, 2, True), False),
        (_key(4, 1, True, "b2xk"), _key(4, 1, True), False),
    ],
)
async def test_which_of_two_copies_stays(house: KeyHouse, old: Any, new: Any, wins: bool) -> None:
    alice = await house.friend("alice")
    path = f"/room_keys/keys/{ROOM}/s?version={await _new_backup(alice)}"
    await alice.says("PUT", path, old)
    await alice.says("PUT", path, new)
    assert (await alice.says("GET", path)).body == (new if wins else old), "verified, then earlier, then less forwarded"


_COPIES = st.builds(_key, st.integers(0, 3), st.integers(0, 3), st.booleans())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_COPIES, min_size=1, max_size=8))
async def test_the_best_copy_stays_whatever_the_order(house: KeyHouse, copies: list[dict[str, Any]]) -> None:
    name = f"u{len(await house.rows('SELECT user_id FROM users'))}"
    alice = await house.friend(name) if name == "u0" else None
    friend = getattr(house, "keeper", None) or alice
    assert friend is not None, "one person for all examples"
    house.keeper = friend  # type: ignore[attr-defined]
    path = f"/room_keys/keys/{ROOM}/s?version={await _new_backup(friend)}"
    for number, copy in enumerate(copies):
        copy["session_data"] = {**copy["session_data"], "iv": "QQ" * (number + 1)}
        await friend.says("PUT", path, copy)
    order = [(not c["is_verified"], c["first_message_index"], c["forwarded_count"]) for c in copies]
    best = copies[order.index(min(order))]
    assert (await friend.says("GET", path)).body == best, "the first of the best ones"
