"""What a member can do to the repair of a room that was joined in part: no more work than for any other room."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from relay.protocol.versions import RoomVersion
from relay.rooms import afar, replay
from relay.rooms.state import StateMap
from relay.rooms.store import REJECTED
from tests.rooms.test_partial_joins import kicked_by_a_banned_person
from tests.rooms.village import Village


async def test_any_number_of_ends_that_were_tied_by_what_is_refused_are_no_more_than_a_few(
    village: Village, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(afar, "WHOLE_SECONDS", 0.02)
    monkeypatch.setattr(afar, "MANY_MEMBERS", 1)
    monkeypatch.setattr(replay, "MAX_ENDS", 4)
    one, two, three, room_id, kick, _ = await kicked_by_a_banned_person(village)
    before = next(iter(kick.prev_events))
    mallory = three.user("mallory")
    authorised = [(await two.row(e)).event for e in kick.auth_events]
    joined = {("m.room.member", mallory): next(e for e in authorised if e.state_key == mallory)}
    tie = kick
    for turn in range(3):
        ends = [
            await one.forges("anna", room_id, type="m.room.topic", content={"topic": f"tea {turn}{n}"}, state_key="", after=[before])
            for n in range(4)
        ]  # fmt: skip
        await two.receives("one.example", room_id, *ends)
        tie = await three.forges("mallory", room_id, after=[tie, *ends], cites=joined)
        assert await two.receives("three.example", room_id, tie) == {tie.id: None}
    assert set((await two.room(room_id)).extremities) == {tie.id}, "a banned person ties them together"
    merged: list[int] = []
    resolved = two.rooms.states.resolved

    async def counted(version: RoomVersion, nids: Collection[int]) -> StateMap:
        merged.append(len(nids))
        return await resolved(version, nids)

    monkeypatch.setattr(two.rooms.states, "resolved", counted)
    assert await two.completes(room_id)
    assert merged and max(merged) <= 6, "so many states at once, and no more"
    assert (await two.row(tie.id)).marks == REJECTED
    found = set((await two.room(room_id)).extremities)
    assert found == {event.id for event in ends}, "the latest of them are where the room goes on"
    said = await two.says("ben", room_id)
    assert set(said.prev_events) == found
    assert set((await two.room(room_id)).extremities) == {said.id}
