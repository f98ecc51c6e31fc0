"""Addresses and the directory of published rooms."""

from __future__ import annotations

from tests.rooms.ground import V3, Ground, Person

DEN = "%23den:one.example"


async def test_an_address_has_a_maker_and_an_end(ground: Ground) -> None:
    alice, bob, admin, nobody = ground.people("alice", "bob", "admin", "")
    room = await alice.creates(preset="public_chat")
    path = f"{V3}/directory/room/{DEN}"
    assert (await bob.asks("PUT", path, {"room_id": room}))[0] == 403, "only people in the room give it an address"
    await bob.joins(room)
    await bob.does("PUT", path, {"room_id": room})
    assert await nobody.gets(path) == {"room_id": room, "servers": ["one.example"]}, "everybody may follow it"
    assert (await alice.asks("PUT", path, {"room_id": room}))[0] == 409, "an address is given once"
    assert (await alice.gets(f"{V3}/rooms/{room}/aliases"))["aliases"] == ["#den:one.example"], (
        "the room's people see it"
    )
    carol = ground.person("carol")
    assert (await carol.asks("GET", f"{V3}/rooms/{room}/aliases"))[0] == 403, "others do not"
    assert (await carol.asks("DELETE", path))[0] == 403, "nor can they remove it"
    await alice.sets(room, "m.room.canonical_alias", {"alias": "#den:one.example"})
    await alice.does("DELETE", path)
    assert (await nobody.asks("GET", path))[0] == 404, "a moderator can; then it is gone"
    status, _ = await alice.asks("GET", f"{V3}/rooms/{room}/state/m.room.canonical_alias")
    assert status == 200 and "alias" not in (await alice.gets(f"{V3}/rooms/{room}/state/m.room.canonical_alias")), (
        "also from the room's state"
    )
    await bob.does("PUT", path, {"room_id": room})
    await admin.does("DELETE", path)
    for wrong in ("%23den:two.example", "den", "%23den"):
        assert (await alice.asks("PUT", f"{V3}/directory/room/{wrong}", {"room_id": room}))[0] == 400, (
            f"{wrong} is not ours to give"
        )


async def test_an_address_of_another_server_is_asked_there(ground: Ground) -> None:
    alice, nobody = ground.people("alice", "")
    ground.remote.aliases["#far:two.example"] = ("!far:two.example", ["two.example", "not a server"])
    found = await alice.gets(f"{V3}/directory/room/%23far:two.example")
    assert found == {"room_id": "!far:two.example", "servers": ["two.example"]}, "the answer is passed on, cleaned"
    assert (await alice.asks("GET", f"{V3}/directory/room/%23none:two.example"))[0] == 404, (
        "what is not there is not found"
    )
    assert (await nobody.asks("GET", f"{V3}/directory/room/%23far:two.example"))[0] == 401, (
        "strangers can't make us ask others"
    )


async def _publishes(person: Person, room: str, visibility: str = "public") -> int:
    return (await person.asks("PUT", f"{V3}/directory/list/room/{room}", {"visibility": visibility}))[0]


async def test_published_rooms_are_found_page_by_page(ground: Ground) -> None:
    alice, bob, nobody = ground.people("alice", "bob", "")
    rooms = [
        await alice.creates(preset="public_chat", name=f"Room {n}", topic="music" if n % 2 else "films")
        for n in range(5)
    ]
    space = await alice.creates(
        preset="public_chat", visibility="public", name="Space", creation_content={"type": "m.space"}
    )
    await bob.joins(rooms[3])
    assert await _publishes(bob, rooms[3]) == 403, "publishing is for moderators"
    for room in rooms:
        assert await _publishes(alice, room) == 200, "she is one"
    listed = await nobody.gets(f"{V3}/publicRooms")
    assert {r["room_id"] for r in listed["chunk"]} == {*rooms, space}, "a stranger sees what is published"
    assert listed["chunk"][0]["room_id"] == rooms[3], "the fullest first"
    first = listed["chunk"][0]
    assert (first["name"], first["topic"], first["num_joined_members"], first["join_rule"]) == (
        "Room 3",
        "music",
        2,
        "public",
    )
    assert (first["world_readable"], first["guest_can_join"]) == (False, False), "and says what it needs to"

    pages, since = [], {}
    while True:
        page = await nobody.gets(f"{V3}/publicRooms", limit=2, **since)
        pages.append([r["room_id"] for r in page["chunk"]])
        if "next_batch" not in page:
            break
        since = {"since": page["next_batch"]}
    assert [len(p) for p in pages] == [2, 2, 2] and [r for p in pages for r in p] == [
        r["room_id"] for r in listed["chunk"]
    ], "pages make up the list"
    back = await nobody.gets(f"{V3}/publicRooms", limit=2, since=page["prev_batch"])
    assert [r["room_id"] for r in back["chunk"]] == pages[1], "and lead back too"

    async def finds(**filter: object) -> set[str]:
        answer = await bob.does("POST", f"{V3}/publicRooms", {"filter": filter})
        return {r["room_id"] for r in answer["chunk"]}

    assert await finds(generic_search_term="MUSIC") == {rooms[1], rooms[3]}, "a word is searched in name and topic"
    assert await finds(room_types=["m.space"]) == {space}, "by kind"
    assert await finds(room_types=[None]) == set(rooms), "rooms of no kind too"
    assert await _publishes(alice, rooms[0], "private") == 200
    assert rooms[0] not in await finds(), "what is withdrawn is gone at once"
    assert (await nobody.gets(f"{V3}/directory/list/room/{rooms[0]}"))["visibility"] == "private", "and says so"
    assert (await nobody.gets(f"{V3}/directory/list/room/{rooms[1]}"))["visibility"] == "public"
    assert (await nobody.asks("GET", f"{V3}/directory/list/room/!none:one.example"))[0] == 404
    assert (await nobody.asks("GET", f"{V3}/publicRooms", server="two.example"))[0] == 401, (
        "strangers can't make us ask others"
    )
    assert (await nobody.asks("GET", f"{V3}/publicRooms", since="rubbish"))[0] == 400
    assert (await bob.asks("POST", f"{V3}/publicRooms", {"limit": "many"}))[0] == 400
