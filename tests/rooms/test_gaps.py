"""What is missing is fetched, within bounds; what cannot be had is not asked for again and again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from relay.errors import RemoteError
from relay.rooms import gaps
from relay.rooms.gap_rows import note_gaps
from relay.rooms.gaps import MAX_ROUNDS, MISSING_ASKED
from tests.rooms.village import Home, Village


@pytest.fixture
async def pair(village: Village) -> tuple[str, Home, Home]:
    one, two = await village.home("one.example"), await village.home("two.example")
    room_id = await one.creates("anna")
    await two.joins("ben", room_id, "one.example")
    await village.delivers_all()
    return room_id, one, two


async def silence(target: str, content: object) -> dict[str, Any]:
    raise RemoteError("two.example", 0, "no answer")


async def nothing(target: str, content: object) -> dict[str, Any]:
    return {"events": []}


@pytest.mark.parametrize("gap", [1, 15, 70])
async def test_a_gap_is_filled_before_what_follows_it(village: Village, pair: tuple[str, Home, Home], gap: int) -> None:
    room_id, one, two = pair
    said = [await two.says("ben", room_id) for _ in range(gap)]
    await village.loses(two, one)
    last = await two.says("ben", room_id)
    await village.delivers(two, one)
    timeline = await one.timeline(room_id, history=False)
    assert timeline[-gap - 1 :] == [*(event.id for event in said), last.id], "all of it, in order, as if it had come so"
    assert list((await one.room(room_id)).extremities) == [last.id], "and one event is the latest"
    assert await one.count("SELECT count(*) FROM gaps WHERE event_id = $1", said[0].id) == 0
    await one.agrees_with_its_disk(room_id)


async def test_a_wider_gap_is_begun_late_and_filled_when_somebody_pages(
    village: Village, pair: tuple[str, Home, Home]
) -> None:
    room_id, one, two = pair
    wide = MISSING_ASKED * MAX_ROUNDS + 60
    topic = await two.sets("ben", room_id, "m.room.member", {"membership": "join", "displayname": "B"}, two.user("ben"))
    said = [await two.says("ben", room_id) for _ in range(wide)]
    await village.loses(two, one)
    one.wire.asked.clear()
    last = await two.says("ben", room_id)
    await village.delivers(two, one)
    assert len(one.wire.asked) < 20, f"one event costs few questions: {one.wire.asked}"
    timeline = await one.timeline(room_id, history=False)
    assert timeline[-1] == last.id and said[-50].id in timeline, "its nearer end is there"
    assert said[0].id not in timeline, "its farther end is not"
    assert (await one.state(room_id))[("m.room.member", two.user("ben"))] == topic.id, "the state is right all the same"
    for _ in range(5):
        if not await one.history.backfill(await one.room(room_id), 50):
            break
    everything = await one.timeline(room_id)
    assert {event.id for event in (*said, topic)} <= set(everything), "paging back fills it"
    assert len(everything) == len(set(everything)), "each event once"
    await one.agrees_with_its_disk(room_id)


async def test_a_gap_that_nobody_fills_is_asked_for_once(
    village: Village, pair: tuple[str, Home, Home], monkeypatch: pytest.MonkeyPatch
) -> None:
    room_id, one, two = pair
    lost = await two.says("ben", room_id)
    await village.loses(two, one)
    follows = await two.says("ben", room_id)
    village.instead[("two.example", "get_missing_events")] = nothing
    village.instead[("two.example", "state_ids")] = silence
    before = await one.count("SELECT count(*) FROM events")
    answer = await one.receives("two.example", room_id, follows)
    assert answer[follows.id], "its server is told that it has to wait"
    assert await one.count("SELECT count(*) FROM events") == before, "nothing of it is kept half-way"
    assert await one.count("SELECT count(*) FROM gaps WHERE event_id = $1", lost.id) == 0
    one.wire.asked.clear()
    await asyncio.gather(*(one.receives("two.example", room_id, follows) for _ in range(5)))
    assert one.wire.asked == [], "and nobody is asked again so soon"
    village.instead.clear()
    monkeypatch.setattr(gaps, "UNFILLED_SECONDS", 0.0)
    one.gaps._unfilled.clear()
    assert await one.receives("two.example", room_id, follows) == {follows.id: None}, "later it can be had"
    assert (await one.timeline(room_id))[-2:] == [lost.id, follows.id]


async def test_whoever_the_room_denies_comes_in_through_no_gap(village: Village, pair: tuple[str, Home, Home]) -> None:
    room_id, one, two = pair
    three = await village.home("three.example")
    await three.joins("carl", room_id, "one.example")
    await village.delivers_all()
    await one.sets("anna", room_id, "m.room.server_acl", {"allow": ["*"], "deny": ["three.example"]})
    await village.delivers(one, two)
    denied = await three.forges("carl", room_id, after=[(await two.says("ben", room_id)).id])
    await village.delivers(two, one)
    follows = await two.forges("ben", room_id, after=[denied.id])

    async def hands_on(target: str, content: object) -> dict[str, Any]:
        return {"events": [denied.pdu]}

    village.instead[("two.example", "get_missing_events")] = hands_on
    for name in village.homes:
        village.instead[(name, "state_ids")] = silence
    await one.receives("two.example", room_id, follows)
    assert denied.id not in await one.timeline(room_id), "what it said is shown to nobody"
    assert await one.count("SELECT count(*) FROM events WHERE event_id = $1 AND pos IS NOT NULL", denied.id) == 0


async def test_of_many_servers_in_a_room_only_a_few_are_asked(village: Village, pair: tuple[str, Home, Home]) -> None:
    room_id, one, two = pair
    for number in range(gaps.MAX_SERVERS_ASKED + 3):
        await (await village.home(f"more{number}.example")).joins("carl", room_id, "one.example")
    await village.delivers_all()
    lost = await two.says("ben", room_id)
    await village.loses(two, one)
    follows = await two.says("ben", room_id)
    for name in village.homes:
        village.instead[(name, "get_missing_events")] = nothing
        village.instead[(name, "state_ids")] = silence
    one.wire.asked.clear()
    assert (await one.receives("two.example", room_id, follows))[follows.id]
    asked = {one_asked.split()[0] for one_asked in one.wire.asked}
    assert "two.example" in asked and len(asked) <= gaps.MAX_SERVERS_ASKED, "a gap costs a bounded number of questions"
    assert len(one.wire.asked) <= 3 * gaps.MAX_SERVERS_ASKED
    assert await one.count("SELECT count(*) FROM events WHERE event_id = $1", lost.id) == 0


@pytest.mark.parametrize("wide", [10, MISSING_ASKED * MAX_ROUNDS + 60])
async def test_what_several_events_lack_is_fetched_once(
    village: Village, pair: tuple[str, Home, Home], wide: int
) -> None:
    room_id, one, two = pair
    homes = [await village.home(f"{name}.example") for name in ("three", "four", "five")]
    for home in homes:
        await home.joins("carl", room_id, "one.example")
    await village.delivers_all()
    said = [await two.says("ben", room_id) for _ in range(wide)]
    await village.loses(two, one)
    for home in homes:
        await village.delivers(two, home)
    everybodys = [await home.says("carl", room_id) for home in homes]
    one.wire.asked.clear()
    answers = await asyncio.gather(
        *(one.receives(home.name, room_id, event) for home, event in zip(homes, everybodys, strict=True))
    )
    assert answers == [{event.id: None} for event in everybodys], "each finds its place"
    rounds = min(MAX_ROUNDS, wide // MISSING_ASKED + 1)
    missing = [asked for asked in one.wire.asked if asked.endswith("get_missing_events")]
    assert len(missing) == rounds, f"one of them asks, for all: {one.wire.asked}"
    assert len([asked for asked in one.wire.asked if asked.endswith("state_ids")]) <= 1, one.wire.asked
    assert {event.id for event in everybodys} <= set((await one.room(room_id)).extremities)
    assert said[-1].id in await one.timeline(room_id)
    await one.agrees_with_its_disk(room_id)


async def test_a_server_that_keeps_its_answer_does_not_hold_up_those_who_give_it(
    village: Village, pair: tuple[str, Home, Home], monkeypatch: pytest.MonkeyPatch
) -> None:
    room_id, one, two = pair
    three = await village.home("three.example")
    await three.joins("carl", room_id, "one.example")
    await village.delivers_all()
    said = await two.says("ben", room_id)
    await village.loses(two, one)
    await village.delivers(two, three)
    mean, good = await two.says("ben", room_id), await three.says("carl", room_id)
    asked, never = asyncio.Event(), asyncio.Event()

    async def keeps_its_answer(target: str, content: object) -> dict[str, Any]:
        asked.set()
        await never.wait()
        return {}

    village.instead[("two.example", "get_missing_events")] = keeps_its_answer
    monkeypatch.setattr(gaps, "PATIENCE_SECONDS", 0.2)
    held = asyncio.create_task(one.receives("two.example", room_id, mean))
    await asked.wait()
    async with asyncio.timeout(60):
        assert await one.receives("three.example", room_id, good) == {good.id: None}
    assert {said.id, good.id} <= set(await one.timeline(room_id)), "somebody else gave it"
    assert not held.done()
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    assert not one.gaps._under_way, "nothing is left of who hung up"


async def test_what_lies_before_a_soft_failed_event_is_found(village: Village) -> None:
    one, two = await village.home("one.example"), await village.home("two.example")
    powers = {"users": {two.user("ben"): 100}}
    room_id = await one.creates("anna", power_level_content_override=powers)
    await one.joins("gus", room_id)
    await two.joins("ben", room_id, "one.example")
    await village.delivers_all()
    banned = {"membership": "ban"}
    await two.sets("ben", room_id, "m.room.member", banned, one.user("gus"))
    said = await one.says("anna", room_id)
    await village.loses(one, two)
    over = await one.says("gus", room_id)
    village.instead[("one.example", "get_missing_events")] = silence
    assert over.id in await two.receives("one.example", room_id, over)
    follows = await one.says("anna", room_id)
    village.instead.clear()
    assert await two.receives("one.example", room_id, follows) == {follows.id: None}
    assert over.id not in await two.timeline(room_id), "what he said after he was put out is shown to nobody"
    await two.history.backfill(await two.room(room_id), 50)
    assert said.id in await two.timeline(room_id), "but what lies before it is found by who pages back"


async def test_backfill_that_brings_nothing_is_not_repeated(village: Village, pair: tuple[str, Home, Home]) -> None:
    room_id, _, two = pair
    village.instead[("one.example", "backfill")] = silence
    room = await two.room(room_id)
    assert not await two.history.backfill(room, 10), "the history before her join is not to be had"
    asked = two.wire.asked.count("one.example backfill")
    for _ in range(3):
        assert not await two.history.backfill(room, 10)
    assert two.wire.asked.count("one.example backfill") == asked, "it is not asked for at every page"


async def test_several_page_back_at_once(village: Village) -> None:
    one, two = await village.home("one.example"), await village.home("two.example")
    room_id = await one.creates("anna")
    said = [await one.says("anna", room_id) for _ in range(30)]
    await two.joins("ben", room_id, "one.example")
    room = await two.room(room_id)
    await asyncio.gather(*(two.history.backfill(room, 30) for _ in range(4)))
    assert two.wire.asked.count("one.example backfill") == 1, "one of them asks, for all"
    timeline = await two.timeline(room_id)
    assert {event.id for event in said} <= set(timeline) and len(timeline) == len(set(timeline)), "each event once"
    assert not {event.id for event in said} & set(await two.timeline(room_id, history=False)), "history is no news"
    assert list((await two.room(room_id)).extremities) == list((await one.room(room_id)).extremities)
    await two.agrees_with_its_disk(room_id)


async def test_a_wire_that_breaks_leaves_no_hole_in_the_state(village: Village, pair: tuple[str, Home, Home]) -> None:
    room_id, one, two = pair
    await one.sets("anna", room_id, "m.room.name", {"name": "Studio"})
    for _ in range(MISSING_ASKED * MAX_ROUNDS):
        await one.says("anna", room_id)
    await village.loses(one, two)
    last = await one.says("anna", room_id)
    village.instead[("one.example", "get_missing_events")] = village.instead[("one.example", "event")] = silence
    await two.receives("one.example", room_id, last)
    assert (await two.state(room_id)).get(("m.room.name", "")) is None
    assert last.id not in await two.timeline(room_id), "it waits, rather than be judged by half a state"


async def test_whoever_pages_back_has_the_gaps_filled_that_she_meets(
    village: Village, pair: tuple[str, Home, Home]
) -> None:
    room_id, one, two = pair
    village.instead[("one.example", "get_missing_events")] = silence
    lost = []
    for _ in range(3):
        lost.append(await one.says("anna", room_id))
        await village.loses(one, two)
        after = await one.says("anna", room_id)
        await village.delivers_all()
        assert after.id in await two.timeline(room_id), "what follows is there"
    first, second, third = lost
    room = await two.room(room_id)
    assert await two.history.backfill(room, 20, 0, first.depth)
    timeline = await two.timeline(room_id)
    assert first.id in timeline and second.id not in timeline, "far back what lies far back is asked for"
    await two.history.backfill(room, 20)
    await two.history.backfill(room, 20)
    assert {each.id for each in lost} <= set(await two.timeline(room_id))
    # What was taken for missing and has come meanwhile is no gap: asking for it would keep others from being asked for.
    with two.db.write() as tx:
        note_gaps(tx, room, [third.id], after)
    await tx
    asked = two.wire.asked.count("one.example backfill")
    assert not await two.history.backfill(room, 20)
    assert two.wire.asked.count("one.example backfill") == asked, "nobody is asked for what is here"


async def test_a_redaction_in_the_history_takes_back(village: Village) -> None:
    one, two = await village.home("one.example"), await village.home("two.example")
    room_id = await one.creates("anna")
    said = await one.says("anna", room_id)
    redaction = await one.takes_back("anna", room_id, said.id)
    await one.says("anna", room_id)
    await two.joins("ben", room_id, "one.example")
    await two.history.backfill(await two.room(room_id), 50)
    assert (await two.row(said.id)).redacted_by == redaction.id, "what was taken back before we came stays so"


async def test_an_old_branch_that_comes_to_light_changes_nothing_now(
    village: Village, pair: tuple[str, Home, Home]
) -> None:
    room_id, one, two = pair
    await one.sets("anna", room_id, "m.room.name", {"name": "now"})
    before = await one.state(room_id)
    said = [await one.says("anna", room_id) for _ in range(3)]
    deep = await two.forges("ben", room_id, after=[said[0]], depth=2**53 - 1)
    await one.receives("two.example", room_id, deep)
    assert await one.state(room_id) == before, "a branch off an old event leaves the state alone"
    after = await one.says("anna", room_id)
    assert after.depth == 2**53 - 1, "a depth is never more than the standard's most"
    assert set(after.prev_events) == {said[2].id, deep.id}, "and both ends are tied together"
    await village.delivers_all()
    assert after.id in await two.timeline(room_id), "the others take it"
    last = await one.says("anna", room_id)
    assert (await one.timeline(room_id))[-1] == last.id


async def test_a_server_that_lies_about_the_state_gets_nothing_in(
    village: Village, pair: tuple[str, Home, Home]
) -> None:
    room_id, one, two = pair
    await two.says("ben", room_id)
    await village.loses(two, one)
    follows = await two.says("ben", room_id)
    other = await two.creates("ben")
    foreign = list((await two.state(other)).values())

    async def lie(target: str, content: object) -> dict[str, Any]:
        return {"pdu_ids": foreign, "auth_chain_ids": []}

    village.instead[("two.example", "get_missing_events")] = nothing
    village.instead[("two.example", "state_ids")] = lie
    before = await one.state(room_id)
    assert (await one.receives("two.example", room_id, follows))[follows.id], "such a state is no state of this room"
    assert await one.state(room_id) == before
