"""Rooms fork whenever two servers speak at once. In the end all have the same state and the same timeline."""

from __future__ import annotations

import random

import pytest

from relay.errors import ApiError, NotAllowed, RemoteError
from relay.rooms.receive import MAX_EXTREMITIES
from tests.rooms.village import Home, Village


async def a_room(village: Village, *names: str, version: str = "12") -> tuple[str, list[Home]]:
    """A room of the first home that somebody of each home is in; all of them may set its topic."""
    homes = [await village.home(name) for name in names]
    levels = {"events": {"m.room.topic": 0, "m.room.name": 50}, "users_default": 0}
    room_id = await homes[0].creates("anna", room_version=version, power_level_content_override=levels)
    for home in homes[1:]:
        await home.joins("anna", room_id, homes[0].name)
    await village.delivers_all()
    return room_id, homes


async def test_two_servers_speak_at_once(village: Village) -> None:
    room_id, (one, two) = await a_room(village, "one.example", "two.example")
    first, second = await one.says("anna", room_id), await two.says("anna", room_id)
    await village.delivers_all()
    for home in (one, two):
        assert {first.id, second.id} == set((await home.room(room_id)).extremities), "both are the latest"
        assert {first.id, second.id} <= set(await home.timeline(room_id)), "both are shown"
    third = await one.says("anna", room_id)
    assert set(third.prev_events) == {first.id, second.id}, "the next one ties them together"
    await village.delivers_all()
    assert list((await two.room(room_id)).extremities) == [third.id], "the other server follows"
    await two.agrees_with_its_disk(room_id)


async def test_a_forked_message_costs_no_state(village: Village) -> None:
    room_id, (one, two) = await a_room(village, "one.example", "two.example")
    before = await one.count("SELECT count(*) FROM states")
    for _ in range(5):
        await one.says("anna", room_id)
        await two.says("anna", room_id)
    await village.delivers_all()
    assert await one.count("SELECT count(*) FROM states") == before, "messages beside each other share one state"


async def test_a_forked_state_event_is_a_small_difference(village: Village) -> None:
    room_id, (one, two) = await a_room(village, "one.example", "two.example")
    for number in range(20):
        await one.joins(f"guest{number}", room_id)
    await village.delivers_all()
    before = await one.count("SELECT sum(length(delta)) FROM states")
    await one.sets("anna", room_id, "m.room.topic", {"topic": "ours"})
    await two.sets("anna", room_id, "m.room.topic", {"topic": "theirs"})
    await village.delivers_all()
    assert await one.state(room_id) == await two.state(room_id), "both choose the same topic"
    grown = await one.count("SELECT sum(length(delta)) FROM states") - before
    assert grown <= 5 * 8, "a fork writes differences, not the whole state again"
    for home in (one, two):
        await home.agrees_with_its_disk(room_id)


async def test_a_ban_wins_over_what_the_banned_said_meanwhile(village: Village) -> None:
    room_id, (one, two) = await a_room(village, "one.example", "two.example")
    await one.members.ban(one.user("anna"), room_id, two.user("anna"))
    said = await two.says("anna", room_id)
    named = await two.sets("anna", room_id, "m.room.topic", {"topic": "mine"})
    await village.delivers(two, one)
    assert (await one.row(said.id)).shown is False, "what comes after the ban is soft-failed"
    assert said.id not in (await one.room(room_id)).extremities, "and nothing is built on it"
    assert ("m.room.topic", "") not in await one.state(room_id), "its state is not the room's"
    await village.delivers(one, two)
    assert ("m.room.topic", "") not in await two.state(room_id), "nor is it on the other side, which knows both"
    assert named.id not in (await two.state(room_id)).values(), "both agree"
    assert (await two.room(room_id)).members[two.user("anna")] == "ban", "the ban holds there"
    assert two.rooms.membership(room_id, two.user("anna")) == "ban", "and she is told"


async def test_an_event_on_a_soft_failed_one_leaves_no_loose_end(village: Village) -> None:
    room_id, (one, two, three) = await a_room(village, "one.example", "two.example", "three.example")
    start = list((await one.room(room_id)).extremities)
    refused = await two.forges("anna", room_id)
    await one.members.kick(one.user("anna"), room_id, two.user("anna"))
    await one.receives("two.example", room_id, refused)
    assert (await one.row(refused.id)).shown is False, "the kicked one's message is soft-failed"
    kick = next(iter((await one.room(room_id)).extremities))
    room = await one.room(room_id)
    assert start and kick not in start
    tie = await three.forges("anna", room_id, after=[refused.id, kick], depth=room.depth + 1)
    await one.receives("three.example", room_id, tie)
    assert list((await one.room(room_id)).extremities) == [tie.id], (
        "what it builds on through the refused one is passed"
    )


async def test_a_late_event_that_others_build_on_is_no_loose_end(village: Village) -> None:
    room_id, (one, two) = await a_room(village, "one.example", "two.example")
    late = await two.says("anna", room_id)
    follows = await two.says("anna", room_id)

    async def nothing(target: str, content: object) -> dict[str, object]:
        return {"events": []}

    village.instead[("two.example", "get_missing_events")] = nothing
    await one.receives("two.example", room_id, follows)
    assert follows.id in await one.timeline(room_id), "an event is placed although the one before it is missing"
    await one.receives("two.example", room_id, late)
    assert late.id in await one.timeline(room_id), "the one before it comes late"
    assert late.id not in (await one.room(room_id)).extremities, "but it is not the latest: something builds on it"
    assert await one.count("SELECT count(*) FROM gaps WHERE event_id = $1", late.id) == 0, "the gap is closed"
    await one.agrees_with_its_disk(room_id)


async def test_loose_ends_are_bounded(village: Village) -> None:
    room_id, (one, two) = await a_room(village, "one.example", "two.example")
    start = list((await two.room(room_id)).extremities)
    forks = [await two.forges("anna", room_id, after=start) for _ in range(MAX_EXTREMITIES + 10)]
    for begin in range(0, len(forks), 50):
        await one.receives("two.example", room_id, *forks[begin : begin + 50])
    assert len((await one.room(room_id)).extremities) == MAX_EXTREMITIES, "a room takes so many loose ends, no more"
    said = await one.says("anna", room_id)
    assert len(said.prev_events) == 10, "each event of ours ties ten of them together"
    more = await two.forges("anna", room_id, after=[said])
    await one.receives("two.example", room_id, more)
    assert more.id in await one.timeline(room_id), "what builds on the latest events is welcome"


async def test_an_event_on_another_rooms_event_gets_nowhere(village: Village) -> None:
    room_id, (one, two) = await a_room(village, "one.example", "two.example")
    other = await two.creates("anna")
    await one.joins("anna", other, "two.example")
    await village.delivers_all()
    elsewhere = list((await two.room(other)).extremities)
    before = await one.state(room_id)
    sly = await two.forges("anna", room_id, after=elsewhere)
    sly_state = await two.forges(
        "anna", room_id, after=elsewhere, type="m.room.topic", content={"topic": "x"}, state_key=""
    )
    for event in (sly, sly_state):
        answer = await one.receives("two.example", room_id, event)
        assert answer[event.id], "an event that builds on another room is refused"
        assert event.id not in await one.timeline(room_id), "and not shown"
    assert await one.state(room_id) == before, "the other room's state stays there"


async def test_an_event_without_roots_is_rejected(village: Village) -> None:
    room_id, (one, two) = await a_room(village, "one.example", "two.example")
    rootless = await two.forges("anna", room_id, after=[])
    assert (await one.receives("two.example", room_id, rootless))[rootless.id], "only the create event follows nothing"
    assert rootless.id not in await one.timeline(room_id), "it is not shown"


@pytest.mark.parametrize("version", ["10", "12"])
@pytest.mark.parametrize("seed", range(4))
async def test_whatever_the_order_all_agree(village: Village, seed: int, version: str) -> None:
    """Three servers speak, name, come, go and are promoted while wires break and letters are lost."""
    room_id, homes = await a_room(village, "one.example", "two.example", "three.example", version=version)
    chance = random.Random(f"{version} {seed}")
    levels = dict(await (await homes[0].room(room_id)).content("m.room.power_levels"))
    for step in range(60):
        home = chance.choice(homes)
        other = chance.choice([h for h in homes if h is not home])
        dice = chance.random()
        try:
            if dice < 0.30:
                await home.says("anna", room_id)
            elif dice < 0.42:
                await home.sets("anna", room_id, "m.room.topic", {"topic": f"{home.name} {step}"})
            elif dice < 0.52:
                who = chance.choice(["ben", "cleo"])
                if (await home.room(room_id)).members.get(home.user(who)) == "join":
                    await home.members.leave(home.user(who), room_id)
                else:
                    await home.joins(who, room_id)
            elif dice < 0.56:
                users = {**levels.get("users", {}), chance.choice(homes[1:]).user("anna"): chance.choice([0, 50])}
                await homes[0].sets("anna", room_id, "m.room.power_levels", {**levels, "users": users})
            elif dice < 0.60:
                rule = chance.choice(["public", "invite"])
                await homes[0].sets("anna", room_id, "m.room.join_rules", {"join_rule": rule})
            elif dice < 0.63:
                await homes[0].members.kick(homes[0].user("anna"), room_id, other.user("ben"))
            elif dice < 0.70:
                village.cut(home, other)
            elif dice < 0.80:
                village.mend(home, other)
            elif dice < 0.84:
                await village.loses(home, other)
            elif frozenset((home.name, other.name)) not in village.cuts:
                await village.delivers(home, other, most=chance.randint(1, 6))
        except (ApiError, NotAllowed, RemoteError):
            continue  # the rules of the moment said no
    village.cuts.clear()
    await village.delivers_all()
    for _ in range(3):
        # Every side's last word ties its loose ends together, and lets the others see what they have missed.
        for home in homes:
            await home.says("anna", room_id)
            await village.delivers_all()
    states = [await home.state(room_id) for home in homes]
    for home, state in zip(homes[1:], states[1:], strict=True):
        different = {
            key: (states[0].get(key), state.get(key))
            for key in states[0] | state
            if states[0].get(key) != state.get(key)
        }
        assert not different, f"{home.name} and {homes[0].name} agree on the state"
    timelines = [set(await home.timeline(room_id)) for home in homes]
    known = set.union(*timelines)
    for home, timeline in zip(homes, timelines, strict=True):
        for event_id in known - timeline:
            one = await home.rooms.event(event_id)
            assert one is not None and not one.shown, f"{home.name} has each event, or has a reason not to show it"
        await home.agrees_with_its_disk(room_id)
        ends = (await home.room(room_id)).extremities
        assert len(ends) == 1, f"{home.name} has one latest event in the end, not {len(ends)}"
