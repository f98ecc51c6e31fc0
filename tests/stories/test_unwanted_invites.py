"""Invites that somebody does not want: she blocks all of them, or ignores a person, on her relay and across."""

from __future__ import annotations

from tests.people import Person, path
from tests.sync.connection import Connection, a_list
from tests.town import Town

CONFIG = "m.invite_permission_config"


async def _sets(person: Person, type: str, content: object) -> None:
    await person.calls("PUT", path("user", person.id, "account_data", type), content)


async def test_who_blocks_invites_gets_none(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@two")
    early = await bob.creates_room()
    await bob.invites_to(early, alice)
    assert await alice.is_invited_to(early)
    await _sets(alice, CONFIG, {"default_action": "block"})
    assert not await alice.is_invited_to(early), "what came before is not shown either"
    for person in (bob, carol):
        room = await person.creates_room()
        refused = await person.is_refused(person.invites_to(room, alice))
        assert (refused.status, refused.errcode) == (403, "M_INVITE_BLOCKED"), f"{person.name} is told so"
        refused = await person.is_refused(person.sets(room, "m.room.member", {"membership": "invite"}, alice.id))
        assert refused.errcode == "M_INVITE_BLOCKED"
        await person.creates_room(invite=[alice.id, "@nobody:elsewhere.example"])
        assert alice.id not in await person.members(room)
    await _sets(alice, CONFIG, {})
    assert await alice.is_invited_to(early), "and is shown when she takes invites again"
    room = await carol.creates_room()
    await carol.invites_to(room, alice)
    assert await alice.is_invited_to(room)


async def test_who_is_ignored_does_not_find_out(town: Town) -> None:
    alice, bob, carol, dave = await town.users("alice@one", "bob@one", "carol@two", "dave@one")
    await _sets(alice, "m.ignored_user_list", {"ignored_users": {bob.id: {}, carol.id: {}}})
    await alice.syncs()
    rooms = {person: await person.creates_room(invite=[alice.id]) for person in (bob, carol, dave)}
    assert await alice.notices(lambda: rooms[dave] in alice.invites), "others may invite her"
    await alice.syncs()
    for person in (bob, carol):
        assert (await person.members(rooms[person]))[alice.id] == "invite", f"to {person.name} it looks like any invite"
        assert rooms[person] not in alice.invites
        assert not await alice.is_invited_to(rooms[person])
    await alice.joins(rooms[bob])
    await _sets(alice, "m.ignored_user_list", {"ignored_users": {}})
    assert await alice.is_invited_to(rooms[carol])


async def test_sliding_sync_keeps_them_back_as_well(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    rooms = [await person.creates_room(invite=[alice.id]) for person in (bob, carol)]
    connection = Connection(alice, "list")
    connection.lists = {"list": a_list(0, 99, required=[])}
    assert set((await connection.syncs())["rooms"]) == set(rooms)
    await _sets(alice, "m.ignored_user_list", {"ignored_users": {bob.id: {}}})
    assert (await connection.syncs())["lists"]["list"]["count"] == 1, "bob's is in no list any more"
    await _sets(alice, CONFIG, {"default_action": "block"})
    assert (await connection.syncs())["lists"]["list"]["count"] == 0
    await _sets(alice, "m.ignored_user_list", {"ignored_users": {}})
    await _sets(alice, CONFIG, {})
    assert (await connection.syncs())["lists"]["list"]["count"] == 2
