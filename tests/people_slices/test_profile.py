"""Profiles: who may change them, who may see them, and what may stand in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from relay.errors import Forbidden, NotFound
from tests.accounts.front_door import SERVER, House

AVATAR = f"mxc://{SERVER}/abcDEF_-123"


async def test_a_name_and_an_avatar_are_set_shown_and_taken_to_the_rooms(house: House) -> None:
    alice, bob, mallory = [await house.person(name) for name in ("alice", "bob", "mallory")]
    house.rooms.meet("!r", alice.user_id, bob.user_id)
    told: list[tuple[str, Mapping[str, Any]]] = []
    adopted: list[str] = []

    async def update_rooms(user_id: str, profile: Mapping[str, Any]) -> None:
        told.append((user_id, profile))

    async def adopt(uri: str) -> None:
        adopted.append(uri)

    house.profiles.update_rooms, house.profiles.adopt_avatar = update_rooms, adopt
    path = f"/profile/{alice.user_id}"
    assert (await alice.says("GET", path)).body == {}, "a new account shows nothing"
    assert (await alice.says("PUT", f"{path}/displayname", {"displayname": "Alice ♥"})).body == {}
    assert (await alice.says("PUT", f"{path}/avatar_url", {"avatar_url": AVATAR})).status == 200
    assert (await alice.says("PUT", f"{path}/m.tz", {"m.tz": "Europe/London"})).status == 200
    assert (await alice.says("PUT", f"{path}/org.example.likes", {"org.example.likes": ["tea", 1, None]})).status == 200
    whole = {
        "displayname": "Alice ♥",
        "avatar_url": AVATAR,
        "m.tz": "Europe/London",
        "org.example.likes": ["tea", 1, None],
    }
    assert (await bob.says("GET", path)).body == whole, "who shares a room sees it"
    assert (await bob.says("GET", f"{path}/displayname")).body == {"displayname": "Alice ♥"}
    assert (await bob.says("GET", f"{path}/org.example.none")).status == 404
    assert adopted == [AVATAR] and told[-1] == (alice.user_id, {"displayname": "Alice ♥", "avatar_url": AVATAR})
    assert len(told) == 2, "the rooms hear of name and avatar only"
    await alice.says("PUT", f"{path}/displayname", {"displayname": "Alice ♥"})
    assert len(told) == 2, "what is said twice is no change"
    assert (await alice.says("PUT", f"{path}/avatar_url", {"avatar_url": ""})).status == 200
    assert (await alice.says("DELETE", f"{path}/displayname")).status == 200
    assert told[-1] == (alice.user_id, {}) and await house.profiles.member_content(alice.user_id) == {}
    for stranger in (mallory, house.visitor()):
        unknown = await stranger.says("GET", f"/profile/@nobody:{SERVER}")
        hidden = await stranger.says("GET", path)
        assert hidden.status == 403 and hidden.body == unknown.body, "a stranger does not even learn who exists"


async def test_only_the_owner_changes_a_profile_and_the_door_is_asked(house: House) -> None:
    alice, bob = await house.person("alice"), await house.person("bob")
    stolen = await bob.says("PUT", f"/profile/{alice.user_id}/displayname", {"displayname": "Mallory"})
    assert stolen.status == 403 and stolen.errcode == "M_FORBIDDEN"
    assert (await bob.says("DELETE", f"/profile/{alice.user_id}/displayname")).status == 403
    assert (await house.visitor().says("PUT", f"/profile/{alice.user_id}/displayname", {})).status == 401
    house.doors.closed.add("profile")
    refused = await alice.says("PUT", f"/profile/{alice.user_id}/displayname", {"displayname": "Rude"})
    assert refused.body["error"] == "Not this name."


@pytest.mark.parametrize(
    ("field", "body", "errcode"),
    [
        ("displayname", {"displayname": 5}, "M_BAD_JSON"),
        ("displayname", {"displayname": None}, "M_BAD_JSON"),
        ("displayname", {"displayname": "x" * 257}, "M_INVALID_PARAM"),
        ("displayname", {"avatar_url": AVATAR}, "M_MISSING_PARAM"),
        ("avatar_url", {"avatar_url": "https://example.org/me.png"}, "M_INVALID_PARAM"),
        ("avatar_url", {"avatar_url": "data:image/png;base64,AAAA"}, "M_INVALID_PARAM"),
        ("avatar_url", {"avatar_url": f"{AVATAR}/more words"}, "M_INVALID_PARAM"),
        ("m.tz", {"m.tz": "half past nine!"}, "M_INVALID_PARAM"),
        ("nodots", {"nodots": 1}, "M_INVALID_PARAM"),
        ("org.Example.Upper", {"org.Example.Upper": 1}, "M_INVALID_PARAM"),
        ("a." + "x" * 254, {}, "M_KEY_TOO_LARGE"),
        ("org.example.big", {"org.example.big": "x" * 65_530}, "M_PROFILE_TOO_LARGE"),
        ("displayname", b"nonsense", "M_NOT_JSON"),
    ],
)
async def test_what_can_not_stand_in_a_profile(house: House, field: str, body: Any, errcode: str) -> None:
    alice = await house.person("alice")
    reply = await alice.says("PUT", f"/profile/{alice.user_id}/{field}", body)
    assert reply.status == 400 and reply.errcode == errcode, f"{field} gives {errcode}: {reply.body}"
    assert await house.rows("SELECT 1 FROM profiles") == [], "and nothing was written"


async def test_other_servers_learn_of_those_with_whom_they_share_a_room(house: House) -> None:
    alice = await house.person("alice")
    house.rooms.meet("!r", alice.user_id, "@bob:two.example")
    await alice.says("PUT", f"/profile/{alice.user_id}/displayname", {"displayname": "Alice"})
    assert await house.profiles.query_profile(alice.user_id, None, "two.example") == {"displayname": "Alice"}
    assert await house.profiles.query_profile(alice.user_id, "displayname", "two.example") == {"displayname": "Alice"}
    with pytest.raises(Forbidden):
        await house.profiles.query_profile(alice.user_id, None, "three.example")
    with pytest.raises(NotFound):
        await house.profiles.query_profile(f"@nobody:{SERVER}", None)


async def test_open_profiles_are_for_everybody(tmp_path: Path) -> None:
    async with House(tmp_path, open_profiles=True).opened() as house:
        alice = await house.person("alice")
        await alice.says("PUT", f"/profile/{alice.user_id}/displayname", {"displayname": "Alice"})
        assert (await house.visitor().says("GET", f"/profile/{alice.user_id}")).body == {"displayname": "Alice"}
        assert (await house.visitor().says("GET", f"/profile/@nobody:{SERVER}")).status == 404
        assert (await house.visitor().says("GET", "/profile/@bob:two.example")).status == 403, (
            "we fetch for our own people only"
        )
        assert (await alice.says("GET", "/profile/@bob:two.example")).status == 404, "this relay does not federate"
        assert (await alice.says("GET", "/profile/nonsense")).errcode == "M_INVALID_PARAM"


async def test_a_closed_account_shows_nothing_more(house: House) -> None:
    alice = await house.person("alice")
    await alice.says("PUT", f"/profile/{alice.user_id}/displayname", {"displayname": "Alice"})
    await alice.says("PUT", f"/user/{alice.user_id}/account_data/org.example", {"a": 1})
    await alice.says("POST", f"/user/{alice.user_id}/filter", {})
    await house.commands["user.deactivate"](user="alice")
    for table in ("profiles", "account_data", "filters", "devices", "sessions", "session_tokens"):
        assert await house.rows(f"SELECT 1 FROM {table}") == [], f"nothing of hers stays in {table}"
