"""Stories of unread counts: what waits for whom, and when it no longer does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay.errors import ApiError, NotFound
from tests.ephemeral.rooms_house import House


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with House(tmp_path) as house:
        yield house


async def waits(house: House, who: str, room: str) -> tuple[int, int]:
    notify, highlight, _ = await house.unread.counts(f"@{who}:one", room, house.now())
    return notify, highlight


async def test_messages_wait_until_they_are_read(house: House) -> None:
    room = await house.room("bob", "carol")
    assert await waits(house, "bob", room) == (0, 0), "what was before bob came does not wait for him"
    sent = [await house.says("alice", room) for _ in range(3)]
    assert await waits(house, "bob", room) == (3, 0)
    assert await waits(house, "alice", room) == (0, 0), "one's own do not wait"
    await house.reads("bob", room, sent[1].id)
    assert await waits(house, "bob", room) == (1, 0)
    await house.reads("bob", room, sent[2].id, "m.read.private")
    assert await waits(house, "bob", room) == (0, 0)
    await house.says("alice", room)
    assert await waits(house, "bob", room) == (1, 0)
    await house.says("bob", room)
    assert await waits(house, "bob", room) == (0, 0), "who answers has read"
    assert await waits(house, "carol", room) == (5, 0)


async def test_counts_come_with_the_event(house: House) -> None:
    room = await house.room("bob")
    before = house.now()
    await house.says("alice", room)
    share = await house.sync("bob", before)
    assert share.rooms[room].unread == {"notification_count": 1, "highlight_count": 0}
    assert not (await house.sync("bob", house.now())).rooms
    assert not (await house.sync("bob", house.now(), forgetful=True)).rooms, "nothing new, nothing said"
    assert (await house.sync("bob")).rooms[room].unread == {"notification_count": 1, "highlight_count": 0}


async def test_counts_survive_a_restart(tmp_path: Path) -> None:
    async with House(tmp_path) as house:
        room = await house.room("bob")
        sent = [await house.says("alice", room) for _ in range(80)]
        await house.reads("bob", room, sent[4].id)
        assert await waits(house, "bob", room) == (75, 0)
    async with House(tmp_path) as house:
        assert await waits(house, "bob", room) == (75, 0), "older than what is in memory"
        await house.reads("bob", room, sent[70].id)
        assert await waits(house, "bob", room) == (9, 0)


async def test_only_so_many_are_counted(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.push.unread.MAX_BACK", 70)
    room = await house.room("bob")
    for _ in range(100):
        await house.says("alice", room)
    assert await waits(house, "bob", room) == (70, 0)


async def test_what_is_taken_back_no_longer_waits(house: House) -> None:
    room = await house.room("bob")
    sent = await house.says("alice", room)
    await house.says("alice", room)
    assert await waits(house, "bob", room) == (2, 0)
    await house.sender.send(
        room, sender="@alice:one", type="m.room.redaction", content={"redacts": sent.id}, redacts=sent.id
    )
    assert await waits(house, "bob", room) == (1, 0)


async def test_threads_are_counted_apart(house: House) -> None:
    room = await house.room("bob")
    root = await house.says("alice", room)
    thread: Any = {"m.relates_to": {"rel_type": "m.thread", "event_id": root.id}}
    first = await house.says("alice", room, **thread)
    await house.says("alice", room, **thread)
    counts = await house.unread.counts("@bob:one", room, house.now())
    assert counts == (3, 0, {root.id: (2, 0)})
    await house.reads("bob", room, root.id, thread="main")
    await house.reads("bob", room, first.id, thread=root.id)
    assert await house.unread.counts("@bob:one", room, house.now()) == (1, 0, {root.id: (1, 0)})
    await house.says("bob", room, **thread)
    assert await house.unread.counts("@bob:one", room, house.now()) == (0, 0, {})


async def test_who_comes_back_begins_anew(house: House) -> None:
    room = await house.room("bob")
    await house.says("alice", room)
    await house.member(room, "bob", "leave")
    await house.says("alice", room)
    await house.member(room, "bob", "join")
    assert await waits(house, "bob", room) == (0, 0)
    await house.says("alice", room)
    assert await waits(house, "bob", room) == (1, 0)


async def test_rules_decide_what_counts(house: House) -> None:
    room = await house.room("bob", "carol")
    await house.says("alice", room)
    assert await waits(house, "bob", room) == (1, 0)
    rule = f"/pushrules/global/room/{room.replace('!', '%21').replace(':', '%3A')}"
    await house.ask("bob", "PUT", rule, {"actions": []})
    assert await waits(house, "bob", room) == (0, 0), "a muted room is quiet"
    assert await waits(house, "carol", room) == (1, 0), "for bob alone"
    await house.says("alice", room)
    assert await waits(house, "bob", room) == (0, 0)
    await house.ask("bob", "PUT", rule, {"actions": ["notify", {"set_tweak": "highlight"}]})
    assert await waits(house, "bob", room) == (2, 2)
    await house.ask("bob", "DELETE", rule)
    assert await waits(house, "bob", room) == (2, 0)


async def test_mentions_in_a_clear_room(tmp_path: Path) -> None:
    async with House(tmp_path, seal="open") as house:
        room = await house.room("bob", "carol")

        async def says(**content: Any) -> None:
            content = {"msgtype": "m.text", "body": "hi", **content}
            await house.sender.send(room, sender="@alice:one", type="m.room.message", content=content)

        await says(**{"m.mentions": {"user_ids": ["@bob:one"]}})
        assert (await waits(house, "bob", room), await waits(house, "carol", room)) == ((1, 1), (1, 0))
        await says(**{"m.mentions": {"room": True}})
        assert (await waits(house, "bob", room), await waits(house, "carol", room)) == ((2, 2), (2, 1))
        await says(msgtype="m.notice")
        assert await waits(house, "bob", room) == (2, 2), "notices are quiet"


async def test_ignored_people_do_not_count(house: House) -> None:
    room = await house.room("bob", "carol")
    house.unread._ignored_by = lambda user_id: frozenset({"@alice:one"})
    await house.says("alice", room)
    await house.says("carol", room)
    assert await waits(house, "bob", room) == (1, 0)


async def test_push_rules_are_kept_and_synced(tmp_path: Path) -> None:
    rule = {"actions": ["notify"], "pattern": "cake"}
    async with House(tmp_path) as house:
        everything = await house.ask("bob", "GET", "/pushrules/")
        assert everything == await house.rules.provide("@bob:one", "")
        assert everything["global"] == await house.ask("bob", "GET", "/pushrules/global/")
        before = house.now()
        await house.ask("bob", "PUT", "/pushrules/global/content/cake", rule)
        await house.ask("bob", "PUT", "/pushrules/global/content/pie?after=cake", {**rule, "pattern": "pie"})
        await house.ask("bob", "PUT", "/pushrules/global/content/tart?before=cake", {**rule, "pattern": "tart"})
        (event,) = (await house.sync("bob", before)).account_data
        assert event["type"] == "m.push_rules"
        assert [r["rule_id"] for r in event["content"]["global"]["content"]] == ["tart", "cake", "pie"]
        assert not (await house.sync("bob", house.now())).account_data
        assert not (await house.sync("bob", house.now(), forgetful=True)).account_data
        assert (await house.sync("bob")).account_data, "an initial sync has them"
    async with House(tmp_path) as house:
        assert (await house.ask("bob", "GET", "/pushrules/global/content/cake"))["pattern"] == "cake"
        await house.ask("bob", "PUT", "/pushrules/global/content/cake/enabled", {"enabled": False})
        assert await house.ask("bob", "GET", "/pushrules/global/content/cake/enabled") == {"enabled": False}
        await house.ask("bob", "PUT", "/pushrules/global/content/cake/actions", {"actions": []})
        assert await house.ask("bob", "GET", "/pushrules/global/content/cake/actions") == {"actions": []}
        await house.ask("bob", "PUT", "/pushrules/global/underride/.m.rule.message/enabled", {"enabled": False})
        for method, path in (("DELETE", "content/none"), ("GET", "content/none/enabled"), ("GET", "room/none")):
            with pytest.raises(NotFound):
                await house.ask("bob", method, f"/pushrules/global/{path}")
        for path in ("content/.dot", "nonsense/a", "content/new?before=none"):
            with pytest.raises(ApiError):
                await house.ask("bob", "PUT", f"/pushrules/global/{path}", rule)
