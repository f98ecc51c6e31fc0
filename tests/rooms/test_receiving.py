"""Events of other servers find their place, or are refused with a reason: races, forgeries, failed writes, redactions."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from relay.db import Query
from relay.errors import StorageFull
from relay.protocol import event as events
from relay.protocol.event import Event
from relay.rooms.store import GONE, SOFT_FAILED, STUB
from tests.rooms.village import SECRET, Home, Village


@pytest.fixture
async def pair(village: Village) -> tuple[str, Home, Home]:
    return await meet(village)


async def meet(village: Village, version: str = "12", **body: Any) -> tuple[str, Home, Home]:
    one, two = await village.home("one.example"), await village.home("two.example")
    room_id = await one.creates("anna", room_version=version, **body)
    await two.joins("ben", room_id, "one.example")
    await village.delivers_all()
    return room_id, one, two


# --- the same thing twice, and races


async def test_the_same_state_event_by_three_ways_at_once(pair: tuple[str, Home, Home]) -> None:
    room_id, one, two = pair
    renamed = await two.forges(
        "ben",
        room_id,
        type="m.room.member",
        content={"membership": "join", "displayname": "B"},
        state_key=two.user("ben"),
    )
    answers = await asyncio.gather(*(one.receives(f"{name}.example", room_id, renamed) for name in ("two", "x", "y")))
    assert all(answer == {renamed.id: None} for answer in answers), "each way is fine"
    assert (await one.timeline(room_id)).count(renamed.id) == 1, "it stands there once"
    assert await one.count("SELECT count(*) FROM membership_log WHERE user_id = $1", two.user("ben")) == 1, "one coming"
    await one.agrees_with_its_disk(room_id)


async def test_a_refused_event_that_comes_again_costs_the_room_nothing(pair: tuple[str, Home, Home]) -> None:
    room_id, one, two = pair
    intruder = await two.forges("nobody", room_id)
    assert (await one.receives("two.example", room_id, intruder))[intruder.id], (
        "who is not in the room says nothing there"
    )
    room = await one.room(room_id)
    answers = await asyncio.gather(*(one.receives("two.example", room_id, intruder) for _ in range(3)))
    assert all(answer == {intruder.id: None} for answer in answers), "it was dealt with"
    assert await one.room(room_id) is room and not room.dropped, "and what memory holds of the room stays"
    assert intruder.id not in await one.timeline(room_id)
    await one.agrees_with_its_disk(room_id)


async def test_a_batch_waits_for_the_disk_once(pair: tuple[str, Home, Home]) -> None:
    room_id, one, two = pair
    said = [await two.says("ben", room_id) for _ in range(20)]
    commits = 0
    commit = one.db._commit

    def counted(*args: Any) -> Any:
        nonlocal commits
        commits += 1
        return commit(*args)

    one.db._commit = counted  # type: ignore[method-assign]
    await one.receives("two.example", room_id, *said)
    assert (await one.timeline(room_id))[-20:] == [event.id for event in said], "all are there, in their order"
    assert commits < 10, "not each of them waited for a sync of its own"


async def test_we_speak_while_others_are_heard(village: Village, pair: tuple[str, Home, Home]) -> None:
    room_id, one, two = pair
    theirs = [await two.says("ben", room_id) for _ in range(15)]
    ours, _ = await asyncio.gather(
        asyncio.gather(*(one.says("anna", room_id) for _ in range(15))), one.receives("two.example", room_id, *theirs)
    )
    await village.delivers_all()
    last = await one.says("anna", room_id)
    await village.delivers_all()
    everything = {event.id for event in (*theirs, *ours, last)}
    for home in (one, two):
        timeline = await home.timeline(room_id)
        assert everything <= set(timeline), f"{home.name} has heard everything"
        assert len(timeline) == len(set(timeline)), "and each thing once"
        assert list((await home.room(room_id)).extremities) == [last.id], "one event is the latest"
        await home.agrees_with_its_disk(room_id)


async def test_an_outlier_gets_its_place_and_keeps_its_number(pair: tuple[str, Home, Home]) -> None:
    room_id, one, two = pair
    renamed = await two.forges(
        "ben",
        room_id,
        type="m.room.member",
        content={"membership": "join", "displayname": "B"},
        state_key=two.user("ben"),
    )
    room = await one.room(room_id)
    with one.db.write() as tx:
        one.appender.outlier(tx, room, renamed)
    await tx
    number = (await one.row(renamed.id)).nid
    await one.receives("two.example", room_id, renamed)
    row = await one.row(renamed.id)
    assert row.pos is not None and row.nid == number, "it is in the timeline now, under the number that it had"
    assert (await one.room(room_id)).entries[("m.room.member", two.user("ben"))] == (renamed.id, number)
    await one.agrees_with_its_disk(room_id)


async def test_an_outlier_that_appears_while_its_event_is_judged(pair: tuple[str, Home, Home]) -> None:
    room_id, one, two = pair
    renamed = await two.forges(
        "ben",
        room_id,
        type="m.room.member",
        content={"membership": "join", "displayname": "B"},
        state_key=two.user("ben"),
    )
    room = await one.room(room_id)
    door, met = one.doors.receive, False

    async def slow_door(origin: str, event: Event) -> None:
        nonlocal met
        if not met:
            met = True
            with one.db.write() as tx:
                one.appender.outlier(tx, room, renamed)
            await tx
        await door(origin, event)

    one.doors.receive = slow_door  # type: ignore[method-assign]
    assert await one.receives("two.example", room_id, renamed) == {renamed.id: None}, "it is taken all the same"
    row = await one.row(renamed.id)
    assert (await one.room(room_id)).entries[("m.room.member", two.user("ben"))] == (renamed.id, row.nid)
    await one.agrees_with_its_disk(room_id)


# --- memory that ran ahead of the disk


async def test_the_middle_of_a_batch_fails(pair: tuple[str, Home, Home]) -> None:
    room_id, one, two = pair
    said = [await two.says("ben", room_id) for _ in range(6)]
    judged = 0
    fits = one.appender.first_time

    def failing(tx: Any, event: Event, nid: int | None) -> None:
        nonlocal judged
        judged += 1
        fits(tx, event, nid)
        if judged == 3:

            def breaks(query: Query) -> None:
                raise ValueError("the middle of a batch fails")

            tx.call(breaks)

    one.appender.first_time = failing  # type: ignore[method-assign]
    answer = await one.receives("two.example", room_id, *said)
    assert [event.id for event in said if answer[event.id]] == [said[2].id], "only that one is in trouble"
    await one.agrees_with_its_disk(room_id)
    timeline = await one.timeline(room_id)
    assert timeline[-6:] == [e.id for e in said], "those behind it were judged again, and fetched what they build on"


async def test_a_sender_who_was_judging_when_the_room_was_dropped_judges_again(pair: tuple[str, Home, Home]) -> None:
    room_id, one, _ = pair
    door, dropped = one.doors.send, False
    lost: list[Event] = []

    async def slow_door(event: Event) -> None:
        nonlocal dropped
        if not dropped:
            dropped = True
            lost.append(event)
            # While she is asked, what she builds on turns out to be lost.
            one.rooms.drop(await one.room(room_id))
        await door(event)

    one.doors.send = slow_door  # type: ignore[method-assign]
    said = await one.says("anna", room_id)
    assert said.id != lost[0].id, "it was built anew"
    assert await one.rooms.event(lost[0].id) is None, "what was judged by a memory that is gone is not written"
    await one.agrees_with_its_disk(room_id)


async def test_a_full_disk_loses_nothing_that_was_answered(pair: tuple[str, Home, Home]) -> None:
    room_id, one, two = pair
    said = [await two.says("ben", room_id) for _ in range(3)]
    execute = one.db._execute

    def full(connection: Any, query: Any, outcome: Any, **rest: Any) -> None:
        execute(connection, query, outcome, **rest)
        if outcome.tx._statements and outcome.tx._chain is not None:
            raise sqlite_full()

    one.db._execute = full  # type: ignore[method-assign]
    with pytest.raises(StorageFull):
        await one.receives("two.example", room_id, *said)
    assert said[0].id not in await one.timeline(room_id), "nothing was saved"
    assert (await one.room(room_id)).known, "the room can be read"
    one.db._execute = execute  # type: ignore[method-assign]
    assert set((await one.receives("two.example", room_id, *said)).values()) == {None}, "with room again, all is taken"
    await one.agrees_with_its_disk(room_id)


def sqlite_full() -> Exception:
    import sqlite3

    return sqlite3.OperationalError("database or disk is full")


# --- auth events


async def test_an_event_that_cites_a_rejected_one_is_rejected(pair: tuple[str, Home, Home]) -> None:
    room_id, one, two = pair
    grab = await two.forges(
        "ben", room_id, type="m.room.power_levels", content={"users": {two.user("ben"): 100}}, state_key=""
    )
    assert (await one.receives("two.example", room_id, grab))[grab.id], "he may not make himself mighty"
    state = await one.state(room_id)
    kick = await two.forges(
        "ben", room_id, type="m.room.name", content={"name": "mine"}, state_key="",
        cites={("m.room.power_levels", ""): grab},
    )  # fmt: skip
    assert (await one.receives("two.example", room_id, kick))[kick.id], "nor build on having done so"
    on_top = await two.forges("ben", room_id, after=[grab])
    await one.receives("two.example", room_id, on_top)
    assert on_top.id in await one.timeline(room_id), "but an event may follow a rejected one"
    assert await one.state(room_id) == state, "whose state is that before it"
    assert list((await one.room(room_id)).extremities) == [on_top.id], "and which leaves no loose end"
    await one.agrees_with_its_disk(room_id)


async def test_what_is_not_known_of_an_auth_event_is_not_held_against_it(village: Village) -> None:
    room_id, one, two = await meet(village)
    # Another server is asked for auth events, and gives one without what that one rests on.
    hidden = await two.forges(
        "ben",
        room_id,
        type="m.room.member",
        content={"membership": "join", "displayname": "1"},
        state_key=two.user("ben"),
    )
    citing = await two.forges(
        "ben", room_id, type="m.room.member", content={"membership": "join", "displayname": "2"},
        state_key=two.user("ben"), cites={("m.room.member", two.user("ben")): hidden}, after=[hidden],
    )  # fmt: skip
    from relay.rooms.intake import Taken

    room = await one.room(room_id)
    await one.gaps.keep_outliers(room, [Taken(citing)])
    assert await one.rooms.event(citing.id) is None, "an event whose auth events are missing is not judged"
    answer = await one.receives("two.example", room_id, hidden, citing)
    assert set(answer.values()) == {None}, "and so it is good when they come"


# --- redactions


@pytest.mark.parametrize("version", ["10", "11", "12"])
async def test_a_redaction_that_comes_before_its_event(village: Village, version: str) -> None:
    room_id, one, two = await meet(village, version)
    said = await two.says("ben", room_id)
    taken_back = await two.takes_back("ben", room_id, said.id)

    async def nothing(target: str, content: object) -> dict[str, object]:
        return {"events": []}

    village.instead[("two.example", "get_missing_events")] = nothing
    await one.receives("two.example", room_id, taken_back)
    assert taken_back.id not in await one.timeline(room_id), "it is held until what it names is known"
    await one.receives("two.example", room_id, said)
    row = await one.row(said.id)
    assert row.redacted_by == taken_back.id, "the late event is taken back the moment it comes"
    assert taken_back.id in await one.timeline(room_id), "and the redaction is shown"
    assert await one.count("SELECT count(*) FROM early_redactions") == 0, "nothing is waited for any more"


async def test_a_strangers_early_redaction_does_not_stand_before_the_right_one(village: Village) -> None:
    one = await village.home("one.example")
    two, three = await village.home("two.example"), await village.home("three.example")
    room_id = await one.creates("anna")
    await two.joins("ben", room_id, "one.example")
    await three.joins("carl", room_id, "one.example")
    await village.delivers_all()
    said = await two.forges("ben", room_id)
    for number in range(3):
        sly = await three.forges("carl", room_id, type="m.room.redaction", content={}, redacts=said.id)
        await one.receives("three.example", room_id, sly)
        assert sly.id not in await one.timeline(room_id), f"attempt {number} is shown to nobody"
    right = await two.forges("ben", room_id, type="m.room.redaction", content={}, redacts=said.id)
    await one.receives("two.example", room_id, right)
    await one.receives("two.example", room_id, said)
    assert (await one.row(said.id)).redacted_by == right.id, "only his own takes it back"
    assert sly.id not in await one.timeline(room_id), "the others' stay hidden"


async def test_who_may_not_take_back_is_not_seen_trying(village: Village) -> None:
    room_id, one, two = await meet(village)
    said = await one.says("anna", room_id)
    await village.delivers_all()
    sly = await two.forges("ben", room_id, type="m.room.redaction", content={}, redacts=said.id)
    await one.receives("two.example", room_id, sly)
    room = await one.room(room_id)
    assert (await one.row(said.id)).redacted_by is None, "her message stays"
    assert sly.id not in [shown.id for shown in room.recent], "and no client hears of the attempt, at once or later"
    assert sly.id not in await one.timeline(room_id)


async def test_a_redaction_counts_with_the_power_of_its_moment(village: Village) -> None:
    room_id, one, two = await meet(village)
    levels = dict(await (await one.room(room_id)).content("m.room.power_levels"))
    await one.sets("anna", room_id, "m.room.power_levels", {**levels, "users": {two.user("ben"): 50}})
    said = await one.says("anna", room_id)
    await village.delivers_all()
    redaction = await two.forges("ben", room_id, type="m.room.redaction", content={}, redacts=said.id)
    await one.sets("anna", room_id, "m.room.power_levels", {**levels, "users": {}})
    await one.receives("two.example", room_id, redaction)
    assert (await one.row(said.id)).redacted_by == redaction.id, "he was a moderator when he did it"


async def test_a_relay_in_between_cannot_turn_a_redaction_on_something_else(village: Village) -> None:
    room_id, one, two = await meet(village, "10")
    said, other = await two.says("ben", room_id), await two.says("ben", room_id)
    await village.delivers_all()
    redaction = await two.forges("ben", room_id, type="m.room.redaction", content={}, redacts=said.id)
    turned = events.parse({**redaction.pdu, "redacts": other.id}, redaction.version)
    assert turned.id == redaction.id, "in old rooms the target is not covered by signature and ID"
    await one.receives("two.example", room_id, turned)
    assert (await one.row(other.id)).redacted_by is None, "but by the content hash, and that does not hold"


async def test_a_redaction_of_a_redaction_and_of_state(village: Village) -> None:
    room_id, one, two = await meet(village)
    said = await two.says("ben", room_id)
    first = await two.takes_back("ben", room_id, said.id)
    second = await two.takes_back("ben", room_id, first.id)
    levels = dict(await (await one.room(room_id)).content("m.room.power_levels"))
    await one.sets("anna", room_id, "m.room.power_levels", {**levels, "users": {two.user("ben"): 50}})
    await village.delivers_all()
    acl = await one.sets("anna", room_id, "m.room.server_acl", {"allow": ["*"], "deny": ["evil.example"]})
    await one.takes_back("anna", room_id, acl.id)
    await village.delivers_all()
    for home in (one, two):
        assert (await home.row(said.id)).redacted_by == first.id, "what was taken back stays so"
        assert (await home.row(first.id)).redacted_by == second.id
        room = await home.room(room_id)
        in_memory = room.acl.allows("two.example")
        home.rooms.drop(room)
        assert (await home.room(room_id)).acl.allows("two.example") == in_memory, "a restart does not change the list"


async def test_the_ciphertext_goes_after_its_grace(village: Village) -> None:
    from relay.rooms.redactions import Grace

    room_id, one, _ = await meet(village)
    said = [await one.says("anna", room_id) for _ in range(4)]
    for event in said[:3]:
        await one.takes_back("anna", room_id, event.id)
    assert await Grace(one.db, one.clock, 3_600_000).sweep() == 0, "within the grace it stays"
    assert await Grace(one.db, one.clock, -1).sweep() == 3, "afterwards it goes"
    for event in said[:3]:
        row = await one.row(event.id)
        assert row.marks & GONE and row.event.content == {}, "nothing of it is left"
    assert (await one.row(said[3].id)).event.content == SECRET, "what nobody took back is untouched"
    ahead = events.build(
        (await one.room(room_id)).version, room_id=room_id, type="m.room.redaction", sender=one.user("anna"),
        content={}, prev_events=list((await one.room(room_id)).extremities),
        auth_events=list(said[3].auth_events), depth=(await one.room(room_id)).depth + 1,
        origin_server_ts=one.clock.now() * 2, redacts=said[3].id, server_name=one.name, key=one.key,
    )  # fmt: skip
    await one.receives("two.example", room_id, ahead)
    assert await Grace(one.db, one.clock, 3_600_000).sweep() == 1, "a time that never comes keeps nothing"


# --- what is kept of the refused


async def test_a_soft_failed_event_takes_part_when_others_cite_it(village: Village) -> None:
    room_id, one, two = await meet(village, power_level_content_override={"events": {"m.room.topic": 0}})
    start = list((await one.room(room_id)).extremities)
    levels = dict(await (await one.room(room_id)).content("m.room.power_levels"))
    await one.sets("anna", room_id, "m.room.power_levels", {**levels, "events": {"m.room.topic": 50}})
    late = await two.forges("ben", room_id, type="m.room.topic", content={"topic": "t"}, state_key="", after=start)
    await one.receives("two.example", room_id, late)
    row = await one.row(late.id)
    assert row.marks & SOFT_FAILED and row.pos is None, "by the room's present rules it is late"
    assert row.state_nid is not None, "but its state is kept"
    at = await one.rooms.states.get(row.state_nid)
    assert at[("m.room.topic", "")][0] == late.id, "with itself in it"
    follows = await two.forges("ben", room_id, after=[late])
    await one.receives("two.example", room_id, follows)
    assert follows.id in await one.timeline(room_id), "what follows it is judged on that state"
    assert not (await one.row(follows.id)).marks & STUB
    await one.agrees_with_its_disk(room_id)
