"""A room as it is: state, members, who is where."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from tests.people import until
from tests.rooms.ground import V3, Ground


async def test_state_is_read_whole_or_piece_by_piece(ground: Ground) -> None:
    alice = ground.person("alice")
    room = await alice.creates(name="The den")
    state = await alice.gets(f"{V3}/rooms/{room}/state")
    types = [event["type"] for event in state]
    assert len(types) == len(set(types)) and {"m.room.create", "m.room.name", "m.room.encryption"} <= set(types), (
        "each once"
    )
    assert all(event["room_id"] == room for event in state), "and with its room"
    for path in ("m.room.name", "m.room.name/"):
        assert await alice.gets(f"{V3}/rooms/{room}/state/{path}") == {"name": "The den"}, (
            "an empty key may be left out"
        )
    await alice.sets(room, "m.room.name", {"name": "The new den"})
    event = await alice.gets(f"{V3}/rooms/{room}/state/m.room.name", format="event")
    assert event["unsigned"]["prev_content"] == {"name": "The den"}, "the whole event says what it replaced"
    status, answer = await alice.asks("GET", f"{V3}/rooms/{room}/state/m.room.topic")
    assert (status, answer["errcode"]) == (404, "M_NOT_FOUND"), "what is not set is not found"
    assert (await alice.asks("GET", f"{V3}/rooms/{room}/state/m.room.name", format="x"))[0] == 400
    assert (await alice.asks("GET", f"{V3}/rooms/!none:one.example/state"))[0] == 403, (
        "a room nobody knows is like a closed one"
    )
    redacted = await alice.sets(room, "m.room.topic", {"topic": "slip"})
    await alice.does("PUT", f"{V3}/rooms/{room}/redact/{redacted}/r", {})
    assert await alice.gets(f"{V3}/rooms/{room}/state/m.room.topic") == {}, "state that was taken back is empty"
    assert "slip" not in str(await alice.gets(f"{V3}/rooms/{room}/state")), "everywhere"


async def test_what_is_being_written_is_not_told_yet_and_hides_nothing(ground: Ground) -> None:
    alice, bob = ground.people("alice", "bob")
    room = await alice.creates(name="The den", preset="public_chat")
    await bob.joins(room)
    memory = await ground.rooms.get(room)
    assert memory is not None
    disk, commit = threading.Event(), ground.db._commit

    def waits(*args: Any) -> Any:
        disk.wait(60)
        return commit(*args)

    ground.db._commit = waits  # type: ignore[method-assign]
    renaming = asyncio.create_task(alice.sets(room, "m.room.name", {"name": "The new den"}))
    try:
        assert await until(lambda: memory.state_pos > ground.db.stable_pos()), "memory runs ahead of the disk"
        assert await bob.gets(f"{V3}/rooms/{room}/state/m.room.name") == {"name": "The den"}, (
            "the name is still the old one"
        )
        state = {e["type"]: e["content"] for e in await bob.gets(f"{V3}/rooms/{room}/state")}
        assert state["m.room.name"] == {"name": "The den"}, "in the whole state too"
        member = asyncio.create_task(
            alice.sets(room, "m.room.member", {"membership": "join", "displayname": "A"}, alice.id)
        )
        assert await until(lambda: len(memory.recent) and memory.recent[-1].event.state_key == alice.id)
        joined = await bob.gets(f"{V3}/rooms/{room}/joined_members")
        assert joined["joined"][alice.id]["display_name"] == "Alice", (
            "and whoever takes a new name is there all the while"
        )
    finally:
        disk.set()
    await renaming
    await member
    assert await bob.gets(f"{V3}/rooms/{room}/state/m.room.name") == {"name": "The new den"}, (
        "what was answered is there"
    )
    joined = await bob.gets(f"{V3}/rooms/{room}/joined_members")
    assert joined["joined"][alice.id]["display_name"] == "A"


async def test_an_open_room_may_be_read_by_everybody(ground: Ground) -> None:
    alice, eve = ground.people("alice", "eve")
    room = await alice.creates(
        initial_state=[{"type": "m.room.history_visibility", "content": {"history_visibility": "world_readable"}}]
    )
    await alice.says(room, "to all")
    assert await eve.reads(room) == ["to all"], "history"
    assert len(await eve.gets(f"{V3}/rooms/{room}/state")) > 4, "state"
    await alice.sets(room, "m.room.history_visibility", {"history_visibility": "shared"})
    assert (await eve.asks("GET", f"{V3}/rooms/{room}/messages", dir="b"))[0] == 403, "until it is closed"


async def test_members_now_and_at_a_token(ground: Ground) -> None:
    alice, bob, carol = ground.people("alice", "bob", "carol")
    room = await alice.creates(preset="public_chat")
    await bob.joins(room)
    early = f"s{ground.db.epoch}_{ground.db.stable_pos()}_0123abcd-0"
    page = await alice.gets(f"{V3}/rooms/{room}/messages", dir="b", limit=1)
    await bob.leaves(room)
    await carol.joins(room)

    async def members(**query: str) -> set[str]:
        return {e["state_key"] for e in (await alice.gets(f"{V3}/rooms/{room}/members", **query))["chunk"]}

    assert await members() == {alice.id, bob.id, carol.id}, "everybody who ever was"
    assert await members(membership="join") == {alice.id, carol.id}, "who is in it"
    assert await members(not_membership="join") == {bob.id}, "who is not"
    assert await members(at=early, membership="join") == {alice.id, bob.id}, "who was in it then"
    assert await members(at=page["end"], membership="join") == {alice.id}, "by a token of the history too"
    assert (await alice.asks("GET", f"{V3}/rooms/{room}/members", membership="x"))[0] == 400
    joined = (await alice.gets(f"{V3}/rooms/{room}/joined_members"))["joined"]
    assert joined == {
        alice.id: {"display_name": "Alice", "avatar_url": None},
        carol.id: {"display_name": "Carol", "avatar_url": None},
    }, "with their names"
    assert await members(at=f"s{ground.db.epoch}_0_0123abcd-0") == {alice.id}, "before the beginning is the beginning"
