"""Stories of what only passes: typing notices, and presence where it is on."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay.errors import ApiError, Forbidden
from tests.ephemeral.rooms_house import House, quoted


async def typing_seen(house: House, who: str, room: str, since: int) -> list[str] | None:
    share = await house.sync(who, house.now(), since)
    for event in share.rooms[room].ephemeral if room in share.rooms else []:
        if event["type"] == "m.typing":
            return list(event["content"]["user_ids"])
    return None


async def types(house: House, who: str, room: str, typing: bool = True, timeout: int = 20_000) -> None:
    await house.ask(who, "PUT", f"/rooms/{quoted(room)}/typing/@{who}:one", {"typing": typing, "timeout": timeout})


async def test_others_see_who_types_until_it_ends(tmp_path: Path) -> None:
    async with House(tmp_path) as house:
        room, pos = await house.room("bob", "eve:two"), house.now()
        await types(house, "bob", room)
        assert house.bell.changed("@alice:one", house.now(), 0), "alice's long poll wakes up"
        number = house.bell.typing
        assert await typing_seen(house, "alice", room, 0) == ["@bob:one"]
        assert await typing_seen(house, "alice", room, number) is None, "once is enough"
        await types(house, "bob", room)
        assert house.bell.typing == number, "typing on is no news here"
        assert [left[2]["typing"] for left in house.left] == [True, True], "but the other server is told again"
        await types(house, "bob", room, False)
        assert await typing_seen(house, "alice", room, number) == []
        assert house.now() == house.db.stable_pos() == pos, "nothing of it touched the database"


async def test_typing_runs_out(tmp_path: Path) -> None:
    async with House(tmp_path) as house:
        room = await house.room("bob")
        await types(house, "bob", room, timeout=600_000)
        house.clock.ahead = 31_000
        await house.typing.expire()
        assert await typing_seen(house, "alice", room, 1) == [], "30 s are the most"
        house.clock.ahead = 31_000 + 11 * 60_000
        await house.typing.expire()
        assert not house.typing._typing, "and the room is forgotten"


async def test_who_leaves_stops_typing(tmp_path: Path) -> None:
    async with House(tmp_path) as house:
        room = await house.room("bob")
        await types(house, "bob", room)
        await house.member(room, "bob", "leave")
        assert house.typing.in_room(room) == []


async def test_typing_is_checked(tmp_path: Path) -> None:
    async with House(tmp_path) as house:
        room = await house.room("bob", "eve:two")
        with pytest.raises(Forbidden):
            await house.ask("alice", "PUT", f"/rooms/{quoted(room)}/typing/@bob:one", {"typing": True})
        with pytest.raises(Forbidden):
            await types(house, "carol", room)
        for bad in ({}, {"typing": "yes"}, {"typing": True, "timeout": "long"}):
            with pytest.raises(ApiError):
                await house.ask("bob", "PUT", f"/rooms/{quoted(room)}/typing/@bob:one", bad)
        take = house.typing.edus()["m.typing"]
        await take("two", {"room_id": room, "user_id": "@eve:two", "typing": True})
        for stranger in ("@bob:one", "@mallory:two"):
            await take("two", {"room_id": room, "user_id": stranger, "typing": True})
        assert house.typing.in_room(room) == ["@eve:two"], "two speaks for its members only"
        await take("two", {"room_id": room, "user_id": "@eve:two", "typing": False})
        assert house.typing.in_room(room) == [] and not house.left, "what came from outside is not sent on"


async def test_presence_is_off_unless_asked_for(tmp_path: Path) -> None:
    async with House(tmp_path) as house:
        await house.room("bob")
        said = {"presence": "online", "status_msg": "canary"}
        assert await house.ask("bob", "PUT", "/presence/@bob:one/status", said) == {}
        assert await house.ask("alice", "GET", "/presence/@bob:one/status") == {"presence": "offline"}
        await house.presence.edus()["m.presence"]("two", {"push": [{"user_id": "@eve:two", "presence": "online"}]})
        assert not (await house.sync("alice")).presence and not house.left


async def test_presence_reaches_those_who_share_a_room(tmp_path: Path) -> None:
    async with House(tmp_path, presence=True) as house:
        await house.room("bob", "eve:two")
        said = {"presence": "online", "status_msg": "canary"}
        await house.ask("bob", "PUT", "/presence/@bob:one/status", said)
        share = await house.sync("alice", house.now(), 0)
        (event,) = share.presence
        assert event["sender"] == "@bob:one" and event["content"]["presence"] == "online"
        assert event["content"]["currently_active"] is True
        assert "canary" not in str((share, house.left)), "status texts go nowhere"
        assert house.left[-1][1] == "m.presence" and house.left[-1][2]["push"][0]["user_id"] == "@bob:one"
        with pytest.raises(Forbidden):
            await house.ask("carol", "GET", "/presence/@bob:one/status")
        take, number = house.presence.edus()["m.presence"], house.bell.typing
        await take(
            "two", {"push": [{"user_id": user, "presence": "online"} for user in ("@eve:two", "@bob:one", "@x:two")]}
        )
        assert [e["sender"] for e in (await house.sync("alice", house.now(), number)).presence] == ["@eve:two"]
        house.clock.ahead, number = 4 * 60_000, house.bell.typing
        await house.presence.expire()
        (event,) = (await house.sync("alice", house.now(), number)).presence
        assert event["sender"] == "@bob:one" and event["content"]["presence"] == "offline", (
            "who is not heard of is offline"
        )
