"""Rooms that are joined before their members are known: what works at once, what waits, what is never let through, and how
the rest comes, also after a restart. Spec: `omit_members` of send_join, MSC3902."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from relay.errors import ApiError, Forbidden
from relay.protocol.event import Event
from relay.rooms import afar, gaps, replay, rooms
from relay.rooms.room import Room
from relay.rooms.store import IN_PART, REJECTED, SOFT_FAILED
from tests.rooms.village import Home, Village


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rooms of one are large already, and nobody waits for members that no story has fetched yet."""
    monkeypatch.setattr(afar, "WHOLE_SECONDS", 0.02)
    monkeypatch.setattr(afar, "MANY_MEMBERS", 1)


async def joined_in_part(village: Village, *guests: str) -> tuple[Home, Home, str]:
    """Ben has joined anna's room from elsewhere; of the others in it his server knows nothing yet."""
    one, two = await village.home("one.example"), await village.home("two.example")
    room_id = await one.creates("anna", name="a large hall")
    for guest in guests:
        await one.joins(guest, room_id)
    await village.loses(one, two)
    two.patient = True
    await two.joins("ben", room_id, "one.example")
    await village.delivers_all()
    room = await two.room(room_id)
    assert room.partial is not None, "he is in the room before its members are known"
    assert set(room.members) == {two.user("ben")}, "they were left out"
    assert room.servers == {"one.example", "two.example"}, "but which servers are in it is known"
    return one, two, room_id


async def same(room_id: str, *homes: Home) -> None:
    found = [await home.room(room_id) for home in homes]
    assert all(room.partial is None for room in found), "nothing is left to come"
    assert all(room.members == found[0].members for room in found), "they know the same people"
    assert all(dict(room.state) == dict(found[0].state) for room in found), "and the same state"
    for home in homes:
        await home.agrees_with_its_disk(room_id)
        states = await home.count("SELECT count(*) FROM current_states c JOIN states s ON s.nid = c.state_nid")
        assert states == await home.count("SELECT count(*) FROM current_states"), (
            "every state that was current is there"
        )


async def memberships(home: Home, room: Room) -> dict[str, tuple[str, str]]:
    rows = await home.db.read(
        lambda query: query.all(
            "SELECT user_id, membership, event_id FROM memberships WHERE room_nid = $1 AND membership <> 'leave'",
            room.nid,
        )
    )
    return {user: (membership, event_id) for user, membership, event_id in rows}


async def test_people_talk_before_everybody_is_known(village: Village) -> None:
    one, two, room_id = await joined_in_part(village, "gail", "hugh")
    said = [await one.says("gail", room_id), await two.says("ben", room_id)]
    await village.delivers_all()
    said += [await one.says("hugh", room_id), await one.sets("anna", room_id, "m.room.topic", {"topic": "tea"})]
    await one.members.leave(one.user("hugh"), room_id)
    await one.joins("ivan", room_id)
    await village.delivers_all()
    for event in said:
        assert event.id in await two.timeline(room_id), "what somebody says whom we don't know yet is heard"
        assert event.id in await one.timeline(room_id), "and everybody hears us"
    assert (await two.room(room_id)).partial is not None
    assert await two.completes(room_id), "then the members come"
    await same(room_id, one, two)
    room = await two.room(room_id)
    held = {user: m for user, m in room.members.items() if m != "leave"}
    rows = await memberships(two, room)
    assert {user: m for user, (m, _) in rows.items()} == held, "and stand in the table"
    assert all(room.entries["m.room.member", user][0] == e for user, (_, e) in rows.items())
    assert two.rooms.completed_since(room_id, 0), "whoever syncs can tell when"
    for who in ("gail", "ben"):
        event = await (one if who == "gail" else two).says(who, room_id)
        await village.delivers_all()
        assert event.id in await two.timeline(room_id), "life goes on"
    await same(room_id, one, two)


async def test_states_since_the_join_are_whole_afterwards(village: Village) -> None:
    """Whatever was recorded by the partial state is what the resident server has: at each event, and when it was current."""
    one, two, room_id = await joined_in_part(village, "gail")
    sent: list[Event] = []
    for number in range(3):
        sent.append(await one.sets("anna", room_id, "m.room.topic", {"topic": f"tea {number}"}))
        sent.append(await two.says("ben", room_id))
        if number != 1:  # a fork, brought together later
            await village.delivers_all()
    await village.delivers_all()
    sent.append(await one.says("gail", room_id))
    await village.delivers_all()
    assert await two.completes(room_id)
    await same(room_id, one, two)
    for event in sent:
        here, there = await two.row(event.id), await one.row(event.id)
        assert here.state_nid is not None and there.state_nid is not None
        known = [
            {key: e for key, (e, _) in (await home.rooms.states.get(row.state_nid or 0)).items()}
            for home, row in ((two, here), (one, there))
        ]
        assert known[0] == known[1], "the state after it is the same on both sides"


async def test_nobody_is_served_what_is_not_known(village: Village) -> None:
    one, two, room_id = await joined_in_part(village)
    three = await village.home("three.example")
    said = await one.says("anna", room_id)
    await village.delivers_all([one, two])
    with pytest.raises(ApiError) as no:
        await three.joins("carl", room_id, "two.example")
    assert no.value.status == 404, "who joins has to go to a server that knows the room"
    for ask in (two.remote.state, two.remote.state_ids):
        name = getattr(ask, "__name__", "")
        with pytest.raises(Exception, match="still fetching"):
            await getattr(one.remote, name)("two.example", room_id, said.id)
    assert await one.remote.event("two.example", said.id) == said.pdu, "a single event is given"
    with pytest.raises(Exception, match="Nobody on your server"):
        await three.remote.event("two.example", said.id)


async def test_what_somebody_does_to_others_waits_for_the_members(village: Village) -> None:
    one, two, room_id = await joined_in_part(village, "gail")
    levels = await (await one.room(room_id)).content("m.room.power_levels")
    await one.sets("anna", room_id, "m.room.power_levels", {**levels, "users": {two.user("ben"): 50}})
    await village.delivers_all()
    inviting = asyncio.create_task(two.members.invite(two.user("ben"), room_id, two.user("cleo")))
    await asyncio.sleep(0)
    assert await two.completes(room_id)
    await inviting
    assert two.rooms.membership(room_id, two.user("cleo")) == "invite", "she is invited once it is known who she is"
    await village.delivers_all()
    await same(room_id, one, two)


async def test_what_takes_too_long_is_refused_with_a_word(village: Village, monkeypatch: pytest.MonkeyPatch) -> None:
    _, two, room_id = await joined_in_part(village)
    waits = two.rooms.whole
    monkeypatch.setattr(two.rooms, "whole", lambda room_id, seconds=0.01: waits(room_id, 0.01))
    with pytest.raises(ApiError) as no:
        await two.members.ban(two.user("ben"), room_id, "@mallory:one.example")
    assert (no.value.status, no.value.text) == (503, rooms.STILL_COMING)


async def test_a_second_person_joins_by_the_word_of_the_others(village: Village) -> None:
    one = await village.home("one.example")
    two = await village.home("two.example")
    room_id = await one.creates("anna", name="a large hall")
    await two.joins("mallory", room_id, "one.example")
    await village.delivers_all()
    await one.members.ban(one.user("anna"), room_id, two.user("mallory"))
    await village.delivers_all()
    two.patient = True
    await two.joins("ben", room_id, "one.example")
    await village.delivers_all()
    assert two.user("mallory") not in (await two.room(room_id)).members, "who she was here is not known yet"
    with pytest.raises(ApiError):
        await two.joins("mallory", room_id, "one.example")
    await two.joins("cleo", room_id, "one.example")
    assert not await village.waiting(two, one), "who took her join need not be sent it"
    await village.delivers_all()
    assert (await two.room(room_id)).local_joined == {two.user("ben"), two.user("cleo")}
    assert await two.completes(room_id)
    await same(room_id, one, two)
    assert two.rooms.membership(room_id, two.user("mallory")) == "ban", "she is still banned"


async def test_a_banned_person_is_not_heard_for_long(village: Village) -> None:
    """By an old join that her own server cites she may speak until the members are known: then it is taken out of sight."""
    one, two, three = [await village.home(f"{name}.example") for name in ("one", "two", "three")]
    room_id = await one.creates("anna", name="a large hall")
    await three.joins("mallory", room_id, "one.example")
    await village.delivers_all()
    room = await three.room(room_id)
    old = await room.event("m.room.member", three.user("mallory"))
    assert old is not None
    await one.members.ban(one.user("anna"), room_id, three.user("mallory"))
    await village.delivers_all()
    two.patient = True
    await two.joins("ben", room_id, "one.example")
    await village.delivers_all([one, two])
    latest = list((await two.room(room_id)).extremities)
    lie = await three.forges("mallory", room_id, after=latest, cites={("m.room.member", three.user("mallory")): old})
    chain = await one.answers("two.example", "GET", f"/_matrix/federation/v1/event_auth/{room_id}/{old.id}", b"")

    async def authorises(target: str, content: Any) -> dict[str, Any]:
        return {"auth_chain": [*chain["auth_chain"], old.pdu]}

    village.instead["three.example", "event_auth"] = authorises
    await two.receives("three.example", room_id, lie)
    assert lie.id in await two.timeline(room_id), "by what is known it is good"
    topic = await three.forges(
        "mallory", room_id, type="m.room.topic", content={"topic": "mine"}, state_key="", after=[lie],
        cites={("m.room.member", three.user("mallory")): old},
    )  # fmt: skip
    assert await two.receives("three.example", room_id, topic) != {topic.id: None}, "but she has no power"
    answer = await one.says("anna", room_id)
    await village.delivers_all([one, two])
    assert await two.completes(room_id)
    assert lie.id not in await two.timeline(room_id), "nobody is shown it any more"
    assert (await two.row(lie.id)).marks & REJECTED
    assert answer.id in await two.timeline(room_id), "what others said stays"
    room = await two.room(room_id)
    assert room.members == (await one.room(room_id)).members and room.members[three.user("mallory")] == "ban"
    assert await two.receives("three.example", room_id, lie) == {lie.id: None}, "and it does not come again"
    assert lie.id not in await two.timeline(room_id)


async def kicked_by_a_banned_person(village: Village) -> tuple[Home, Home, Home, str, Event, Event]:
    """Mallory's old join lets her kick gail, by what two.example knows of the room: (one, two, three, room, the kick, gail)."""
    one, two, three = [await village.home(f"{name}.example") for name in ("one", "two", "three")]
    room_id = await one.creates("anna", name="a large hall")
    await one.joins("gail", room_id)
    await three.joins("mallory", room_id, "one.example")
    await village.delivers_all()
    levels = await (await one.room(room_id)).content("m.room.power_levels")
    await one.sets("anna", room_id, "m.room.power_levels", {**levels, "users": {three.user("mallory"): 50}})
    await village.delivers_all()
    old = await (await three.room(room_id)).event("m.room.member", three.user("mallory"))
    gail = await (await one.room(room_id)).event("m.room.member", one.user("gail"))
    assert old is not None and gail is not None
    await one.members.ban(one.user("anna"), room_id, three.user("mallory"))
    await village.delivers_all()
    two.patient = True
    await two.joins("ben", room_id, "one.example")
    await village.delivers_all([one, two])
    kick = await three.forges(
        "mallory", room_id, type="m.room.member", content={"membership": "leave"}, state_key=one.user("gail"),
        after=list((await two.room(room_id)).extremities),
        cites={("m.room.member", three.user("mallory")): old, ("m.room.member", one.user("gail")): gail},
    )  # fmt: skip
    chains = [
        await one.answers("two.example", "GET", f"/_matrix/federation/v1/event_auth/{room_id}/{one_of.id}", b"")
        for one_of in (old, gail)
    ]

    async def authorises(target: str, content: Any) -> dict[str, Any]:
        return {"auth_chain": [*chains[0]["auth_chain"], *chains[1]["auth_chain"], old.pdu, gail.pdu]}

    village.instead["three.example", "event_auth"] = authorises
    assert await two.receives("three.example", room_id, kick) == {kick.id: None}
    assert kick.id in await two.timeline(room_id), "by what is known it is good"
    return one, two, three, room_id, kick, gail


async def test_what_was_refused_for_want_of_the_members_comes_in_with_them(village: Village) -> None:
    one, two, _, room_id, kick, gail = await kicked_by_a_banned_person(village)
    her = {("m.room.member", one.user("gail")): gail}
    before = next(iter(kick.prev_events))
    over = await two.says("ben", room_id)
    await village.delivers_all([one, two])
    assert over.prev_events == (kick.id,) and over.id in await one.timeline(room_id), (
        "who does not know better builds on it, and is heard where it was refused"
    )
    onto = await one.forges("gail", room_id, after=[kick], cites=her)
    more = await one.forges("gail", room_id, after=[onto], cites=her)
    beside = await one.forges("gail", room_id, after=[before], cites=her)
    topic = await one.forges("anna", room_id, type="m.room.topic", content={"topic": "tea"}, state_key="", after=[onto])
    refused = [onto, more, beside]
    for event in (*refused, topic):
        assert await one.receives("one.example", room_id, event) == {event.id: None}
        await two.receives("one.example", room_id, event)
    marks = [(await two.row(event.id)).marks for event in refused]
    assert marks == [REJECTED, REJECTED, SOFT_FAILED | IN_PART], "she was kicked, as far as is known"
    assert topic.id in await two.timeline(room_id)

    assert await two.completes(room_id)
    await two.gives_places()
    here = await two.timeline(room_id)
    assert all(event.id in here for event in refused), "they are heard after all"
    assert kick.id not in here and topic.id in here
    assert [(await two.row(event.id)).marks for event in refused] == [0, 0, 0]
    assert await two.count("SELECT count(*) FROM waiting_events") == 0, "and nothing waits any more"
    assert await two.count("SELECT count(*) FROM gaps WHERE event_id IN ($1, $2)", onto.id, more.id) == 0
    await same(room_id, one, two)
    assert set((await two.room(room_id)).extremities) == set((await one.room(room_id)).extremities)
    said = await two.says("ben", room_id)
    await village.delivers_all([one, two])
    assert said.id in await one.timeline(room_id)
    await same(room_id, one, two)


async def test_the_room_does_not_go_on_from_what_turned_out_to_be_refused(village: Village) -> None:
    one, two, _, room_id, kick, _ = await kicked_by_a_banned_person(village)
    assert set((await two.room(room_id)).extremities) == {kick.id}
    assert await two.completes(room_id)
    assert (
        set((await two.room(room_id)).extremities)
        == set(kick.prev_events)
        == set((await one.room(room_id)).extremities)
    )
    await same(room_id, one, two)


async def test_what_is_refused_by_the_whole_room_too_stays_refused(village: Village) -> None:
    one, two, _, room_id, kick, gail = await kicked_by_a_banned_person(village)
    topic = await one.forges("gail", room_id, type="m.room.topic", content={"topic": "mine"}, state_key="",
                               after=[next(iter(kick.prev_events))], cites={("m.room.member", one.user("gail")): gail})  # fmt: skip
    assert await two.receives("one.example", room_id, topic) != {topic.id: None}
    assert await two.completes(room_id)
    await two.gives_places()
    assert (await two.row(topic.id)).marks == REJECTED, "she has no power"
    assert topic.id not in await two.timeline(room_id)


async def test_only_so_many_refused_events_are_asked_again(village: Village, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_RISEN", 2)
    one, two, _, room_id, kick, gail = await kicked_by_a_banned_person(village)
    her = {("m.room.member", one.user("gail")): gail}
    refused = [await one.forges("gail", room_id, after=[kick], cites=her) for _ in range(4)]
    await two.receives("one.example", room_id, *refused)
    assert [(await two.row(event.id)).marks for event in refused] == [REJECTED] * 4
    assert await two.completes(room_id)
    await two.gives_places()
    assert [(await two.row(event.id)).marks for event in refused] == [0, 0, SOFT_FAILED, SOFT_FAILED]


async def test_the_rest_comes_after_a_restart_and_from_another_server(village: Village) -> None:
    one, two, three = [await village.home(f"{name}.example") for name in ("one", "two", "three")]
    room_id = await one.creates("anna", name="a large hall")
    await three.joins("carl", room_id, "one.example")
    await village.delivers_all()
    two.patient = True
    await two.joins("ben", room_id, "one.example")
    said = await two.says("ben", room_id)
    await village.delivers_all()
    two = await village.restarts(two)
    room = await two.room(room_id)
    assert room.partial is not None and room.servers == {"one.example", "two.example", "three.example"}
    village.cut(one, two)
    running = asyncio.create_task(two.completing.run())
    try:
        whole = await two.rooms.whole(room_id, 20)
        assert whole is not None and whole.partial is None, "whoever is there tells the rest"
    finally:
        running.cancel()
    village.mend(one, two)
    assert said.id in await two.timeline(room_id)
    await same(room_id, one, two, three)


async def test_the_rest_comes_although_the_first_server_is_shut_out(
    village: Village, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = [await village.home(f"{name}.example") for name in ("one", "two", "three")]
    room_id = await one.creates("anna", name="a large hall")
    await three.joins("carl", room_id, "one.example")
    await village.delivers_all()
    two.patient = True
    await two.joins("ben", room_id, "one.example")
    await village.delivers_all()
    asked, remote = list[str](), two.completing._remote
    state = remote.state

    async def shut_out(server: str, *more: str) -> Any:
        asked.append(server)
        if server == asked[0]:
            raise Forbidden("Its operator has shut that server out.")
        return await state(server, *more)

    monkeypatch.setattr(remote, "state", shut_out)
    running = asyncio.create_task(two.completing.run())
    try:
        whole = await two.rooms.whole(room_id, 20)
        assert whole is not None and whole.partial is None and len(asked) > 1, "another one tells"
    finally:
        running.cancel()


async def test_what_another_server_tells_of_the_room_beside_its_members_is_not_taken(village: Village) -> None:
    one, two, room_id = await joined_in_part(village, "gail")
    join = next(iter((await two.room(room_id)).extremities))
    topic = await one.sets("anna", room_id, "m.room.topic", {"topic": "not yet"})
    before = await one.answers("two.example", "GET", f"/_matrix/federation/v1/state/{room_id}?event_id={join}", b"")

    async def lies(target: str, content: Any) -> dict[str, Any]:
        pdus = [pdu for pdu in before["pdus"] if pdu["type"] != "m.room.join_rules"]
        return {"pdus": [*pdus, topic.pdu], "auth_chain": before["auth_chain"]}

    village.instead["one.example", "state"] = lies
    assert await two.completes(room_id)
    village.instead.clear()
    state = await two.state(room_id)
    assert ("m.room.topic", "") not in state and ("m.room.join_rules", "") in state
    await village.delivers_all()
    await same(room_id, one, two)


async def test_a_useless_answer_leaves_the_room_as_it_is(village: Village) -> None:
    one, two, room_id = await joined_in_part(village, "gail")

    async def nothing(target: str, content: Any) -> dict[str, Any]:
        return {"pdus": [], "auth_chain": []}

    village.instead["one.example", "state"] = nothing
    with pytest.raises(Exception, match="create event"):
        await two.completes(room_id)
    assert (await two.room(room_id)).partial is not None, "another attempt is made later"
    village.instead.clear()
    assert await two.completes(room_id)
    await same(room_id, one, two)


async def test_she_leaves_and_comes_back_while_members_are_fetched(village: Village) -> None:
    one, two, room_id = await joined_in_part(village, "gail")
    first = (await two.room(room_id)).partial
    await two.members.leave(two.user("ben"), room_id)
    await village.delivers_all()
    await two.joins("ben", room_id, "one.example")
    await village.delivers_all()
    second = (await two.room(room_id)).partial
    assert first is not None and second is not None and first.event_id != second.event_id
    assert await two.completes(room_id)
    await same(room_id, one, two)


async def test_a_gap_waits_for_the_members(village: Village, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies before an event that is not to be had is not fetched beside the members, which bring it along."""
    monkeypatch.setattr(gaps, "MAX_ROUNDS", 1)
    one, two, room_id = await joined_in_part(village, "gail")
    for number in range(30):
        await one.sets("anna", room_id, "m.room.topic", {"topic": f"tea {number}"})
    await village.loses(one, two)
    last = await one.says("gail", room_id)
    receiving = asyncio.create_task(two.receives("one.example", room_id, last))
    await asyncio.sleep(0)
    two.wire.asked.clear()
    assert await two.completes(room_id)
    assert await receiving == {last.id: None}
    assert two.wire.asked.count("one.example state") == 1, "the state was asked for once"
    await village.delivers_all()
    await same(room_id, one, two)


async def test_a_large_answer_is_taken_in_piece_by_piece(village: Village, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the other server can't leave the members out."""
    monkeypatch.setattr(afar, "IN_MEMORY", 2)
    one, two = await village.home("one.example"), await village.home("two.example")
    room_id = await one.creates("anna", name="a large hall")
    for guest in ("gail", "hugh"):
        await one.joins(guest, room_id)
    await one.members.ban(one.user("anna"), room_id, one.user("hugh"))

    async def whole(target: str, content: Any) -> dict[str, Any]:
        return await one.answers(
            "two.example", "PUT", target.replace("omit_members=true", "omit_members=false"), content
        )

    village.instead["one.example", "send_join"] = whole
    await two.joins("ben", room_id, "one.example")
    village.instead.clear()
    await village.delivers_all()
    await same(room_id, one, two)
    assert (await two.room(room_id)).members[one.user("hugh")] == "ban"
    said = await two.says("ben", room_id)
    await village.delivers_all()
    assert said.id in await one.timeline(room_id)


async def test_a_large_room_in_the_clear_leaves_nothing_behind(
    village: Village, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(afar, "IN_MEMORY", 2)
    one, two = await village.home("one.example"), await village.home("two.example")
    room_id = await one.creates("anna", name="a large hall")
    room = await one.room(room_id)

    async def bare(target: str, content: Any) -> dict[str, Any]:
        answer = await one.answers("two.example", "PUT", target, content)
        answer["state"] = [pdu for pdu in answer["state"] if pdu["type"] != "m.room.encryption"]
        return answer

    village.instead["one.example", "send_join"] = bare
    with pytest.raises(ApiError) as no:
        await two.joins("ben", room_id, "one.example")
    assert no.value.text == afar.NOT_ENCRYPTED
    assert room.members[two.user("ben")] == "leave", "he left again at once"
    assert await two.count("SELECT count(*) FROM events") == 0, "and nothing of the room was kept"
