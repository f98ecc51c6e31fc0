"""The contact gate: invites of strangers wait, here and across, and nobody outside can tell. On two relays."""

from __future__ import annotations

from tests.people import Person, path, until
from tests.sync.connection import Connection, a_list
from tests.town import Town, Within

CLOSED = "contact: {invites_from: shared_rooms, held_for: 2d}\n"


async def _held(house: Within, person: Person) -> dict[str, str]:
    """Room -> sender, as the page shows it."""
    assert house.server is not None
    return {one.room_id: one.sender for one in await _gate(house).held(person.id)}


def _gate(house: Within):  # type: ignore[no-untyped-def]
    assert house.server is not None
    from relay.people.contact_gate import ContactGate

    return next(part for part in house.server._parts if isinstance(part, ContactGate))


def _links(house: Within):  # type: ignore[no-untyped-def]
    assert house.server is not None
    from relay.people.contact_links import ContactLinks

    return next(part for part in house.server._parts if isinstance(part, ContactLinks))


async def test_strangers_wait_and_can_not_tell(town: Town) -> None:
    home = await town.relay("one", CLOSED)
    eve, fan, stranger = await town.users("eve@one", "fan@one", "stranger@two")
    sliding = Connection(eve, "list")
    sliding.lists = {"list": a_list(0, 99, required=[])}
    await sliding.syncs()
    await eve.syncs()
    rooms = {}
    for person in (fan, stranger):
        rooms[person] = await person.creates_room(name="look at this")
        await person.invites_to(rooms[person], eve)
        assert (await person.members(rooms[person]))[eve.id] == "invite", f"to {person.name} it looks like any invite"
    await eve.syncs()
    assert not eve.invites and not await eve.is_invited_to(rooms[stranger])
    assert (await sliding.syncs())["lists"]["list"]["count"] == 0, "sliding sync shows nothing either"
    assert await _held(home, eve) == {rooms[fan]: fan.id, rooms[stranger]: stranger.id}

    await _gate(home).let_in(eve.id, rooms[stranger])
    assert await eve.notices(lambda: rooms[stranger] in eve.invites), "what is let in comes like a new invite"
    assert (await sliding.syncs())["lists"]["list"]["count"] == 1
    await eve.joins(rooms[stranger], stranger.server)
    assert await until(lambda: _is_in(stranger, rooms[stranger], eve))
    again = await stranger.creates_room()
    await stranger.invites_to(again, eve)
    assert await eve.notices(lambda: again in eve.invites), "who shares a room with her may invite her"

    await _gate(home).drop(eve.id, rooms[fan])
    assert await until(lambda: _has_left(fan, rooms[fan], eve)), "the room hears of the leave"
    await eve.syncs()
    assert rooms[fan] not in eve.left, "her app never hears of it"
    assert await _held(home, eve) == {}


async def test_held_invites_expire_survive_a_restart_and_can_be_taken_back(town: Town) -> None:
    home = await town.relay("one", CLOSED)
    eve, stranger, other = await town.users("eve@one", "stranger@two", "other@two")
    room, second = await stranger.creates_room(), await other.creates_room()
    await eve.syncs()
    await stranger.invites_to(room, eve)
    await other.invites_to(second, eve)
    assert await until(lambda: _holds(home, eve, 2))
    await home.restart()
    assert not await eve.is_invited_to(room), "after a restart it is held as before"
    assert set(await _held(home, eve)) == {room, second}
    await other.kicks(second, eve)
    assert await until(lambda: _holds(home, eve, 1)), "an invite that is taken back waits no more"
    town.clock.forward(hours=49)
    assert await until(lambda: _has_left(stranger, room, eve)), "it is turned down when its time is over"
    assert await until(lambda: _holds(home, eve, 0))
    await eve.syncs()
    assert not eve.left and not eve.invites


async def test_a_contact_link_lets_a_stranger_through(town: Town) -> None:
    home = await town.relay("one", CLOSED)
    eve, early, late, third = await town.users("eve@one", "early@two", "late@two", "third@two")
    await _gate(home).choose(eve.id, "link")
    room = await early.creates_room()
    await early.invites_to(room, eve)
    assert await until(lambda: _holds(home, eve, 1))
    once, many = await _links(home).make(eve.id, once=True), await _links(home).make(eve.id, once=False)
    await eve.calls("GET", f"/_relay/contact/{once}", token="")
    for token, person in ((once, early), (many, late)):
        assert await _links(home).use(token, person.id) == eve.id
    await _gate(home).let_in_from(eve.id, early.id)
    assert await eve.notices(lambda: room in eve.invites), "an invite that waited reaches her with the link"
    room = await late.creates_room()
    await late.invites_to(room, eve)
    assert await eve.notices(lambda: room in eve.invites)
    refused = await eve.is_refused(eve.calls("GET", f"/_relay/contact/{once}", token=""))
    assert refused.status == 404, "a link for one person is used up"
    await _links(home).revoke(eve.id, many)
    assert (await eve.is_refused(eve.calls("GET", f"/_relay/contact/{many}", token=""))).status == 404
    for person in (late, third):
        room = await person.creates_room()
        await person.invites_to(room, eve)
        assert await until(lambda room=room: _waits(home, eve, room)), f"{person.name} is a stranger (again)"


async def test_who_takes_an_invite_at_once_is_not_hidden_from_herself(town: Town) -> None:
    home = await town.relay("one", CLOSED)
    eve, fan = await town.users("eve@one", "fan@one")
    for _ in range(5):
        room = await fan.creates_room()
        await fan.invites_to(room, eve)
        await eve.joins(room)  # her app was told of the room in another way, and is faster than the judgement
        assert await until(lambda room=room: _is_settled(home, eve, room)), "a joined room waits nowhere"
        await eve.syncs()
        assert room in eve.rooms
        await eve.leaves(room)
        await eve.syncs()
        assert room in eve.left, "and leaving it is told"
    await eve.calls("POST", path("rooms", room, "report"), {"reason": "they do not stop"})
    assert await eve.notices(lambda: len(eve.rooms) == 1), "the relay's own notices pass the gate"


async def _is_settled(house: Within, person: Person, room: str) -> bool:
    return (person.id, room) not in _gate(house)._judged and room not in await _held(house, person)


async def test_nobody_is_refused_and_knocking_is_asking(town: Town) -> None:
    home = await town.relay("one", CLOSED)
    eve, fan, host = await town.users("eve@one", "fan@one", "host@two")
    await _gate(home).choose(eve.id, "nobody")
    for person in (fan, host):
        room = await person.creates_room()
        assert (await person.is_refused(person.invites_to(room, eve))).errcode == "M_INVITE_BLOCKED"
    await _gate(home).choose(eve.id, "link")
    room = await host.creates_room(
        initial_state=[{"type": "m.room.join_rules", "state_key": "", "content": {"join_rule": "knock"}}]
    )
    await eve.knocks_on(room, host.server)
    assert await host.notices(lambda: host.membership(room, eve) == "knock")
    await host.invites_to(room, eve)
    assert await eve.notices(lambda: room in eve.invites), "who knocked has asked to be invited"


async def _is_in(person: Person, room: str, other: Person) -> bool:
    return (await person.members(room)).get(other.id) == "join"


async def _has_left(person: Person, room: str, other: Person) -> bool:
    return (await person.members(room)).get(other.id) == "leave"


async def _holds(house: Within, person: Person, number: int) -> bool:
    return len(await _held(house, person)) == number


async def _waits(house: Within, person: Person, room: str) -> bool:
    return room in await _held(house, person)
