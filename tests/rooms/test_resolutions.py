"""Where branches of a room come together, the state is worked out once, also after a restart, and reads what it needs."""

from __future__ import annotations

from typing import Any

import pytest

from relay.rooms import state, store
from tests import crowds
from tests.rooms.village import Home, Village

AGREED = 400


class Counted:
    """How often a resolution was worked out, and the events that were parsed for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        self.read: set[str] = set()
        resolve, stored = state.resolve, store.stored

        def resolves(version: Any, states: Any, *rest: Any) -> Any:
            self.times += 1
            return resolve(version, states, *rest)

        def reads(row: Any, version: Any) -> Any:
            self.read.add(row[1])
            return stored(row, version)

        monkeypatch.setattr(state, "resolve", resolves)
        monkeypatch.setattr(store, "stored", reads)


async def forked(village: Village, guests: int = 0) -> tuple[Home, Home, str]:
    """Both sides changed the topic while they did not hear each other."""
    one, two = await village.home("one.example"), await village.home("two.example")
    room_id = await one.creates("anna", name="a hall")
    await crowds.fill(one.rooms, one.key, room_id, [one.user(f"guest{n}") for n in range(guests)], one.clock.now())
    await two.joins("ben", room_id, "one.example")
    await village.delivers_all()
    levels = await (await one.room(room_id)).content("m.room.power_levels")
    await one.sets("anna", room_id, "m.room.power_levels", {**levels, "users": {two.user("ben"): 50}})
    await village.delivers_all()
    await one.sets("anna", room_id, "m.room.topic", {"topic": "tea"})
    await two.sets("ben", room_id, "m.room.topic", {"topic": "coffee"})
    return one, two, room_id


async def test_a_fork_is_resolved_once(village: Village, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, room_id = await forked(village)
    counted = Counted(monkeypatch)
    await village.delivers_all()
    room = await one.room(room_id)
    assert len(room.extremities) == 2, "the room has two ends"
    assert counted.times == 2, "each side works out once what the two come to"
    await two.says("ben", room_id)
    await village.delivers_all()
    assert len((await one.room(room_id)).extremities) == 1, "a message ties them together"
    assert counted.times == 2, "and rests on what was worked out before"
    assert await one.state(room_id) == await two.state(room_id)


async def test_a_fork_is_not_resolved_again_after_a_restart(village: Village, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, room_id = await forked(village)
    await village.delivers_all()
    one = await village.restarts(one)
    counted = Counted(monkeypatch)
    await two.says("ben", room_id)
    await village.delivers_all()
    assert len((await one.room(room_id)).extremities) == 1
    assert counted.times == 0, "the result was on disk"
    assert await one.state(room_id) == await two.state(room_id)
    await one.agrees_with_its_disk(room_id)


async def test_what_all_agree_about_is_not_parsed(village: Village, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, room_id = await forked(village, AGREED)
    # On one side somebody left and came again, so that one chain has events that the other lacks.
    await one.joins("gail", room_id)
    await one.members.leave(one.user("gail"), room_id)
    await one.joins("gail", room_id)
    counted = Counted(monkeypatch)
    await village.delivers(two, one)
    assert counted.times == 1
    current = await one.state(room_id)
    agreed = {current["m.room.member", one.user(f"guest{number}")] for number in range(AGREED)}
    assert len(agreed) == AGREED, "nobody got lost"
    assert not counted.read & agreed, "of those about whom nobody disagrees no event was parsed"
