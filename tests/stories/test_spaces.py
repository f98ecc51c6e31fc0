"""Spaces: the tree is walked across relays, page by page, and nobody is shown a room that is not for her."""

from __future__ import annotations

from typing import Any

from tests.people import Person, path
from tests.town import Town

SPACE = {"creation_content": {"type": "m.space"}}
OPEN_TO_ALL = {"type": "m.room.history_visibility", "content": {"history_visibility": "world_readable"}}


async def _tree(person: Person, space: str, **query: Any) -> Any:
    return await person.calls("GET", f"/_matrix/client/v1/{path('rooms', space, 'hierarchy')}", **query)


async def _rooms(person: Person, space: str, **query: Any) -> list[str]:
    return [one["room_id"] for one in (await _tree(person, space, **query))["rooms"]]


async def _space(person: Person, name: str, **more: Any) -> str:
    return await person.creates_room(preset="public_chat", name=name, **SPACE, **more)


async def _has_child(person: Person, space: str, child: str, *via: str, **more: Any) -> None:
    await person.sets(space, "m.space.child", {"via": [*via] or [person.server], **more}, child)


async def test_a_space_is_walked_depth_first(town: Town) -> None:
    alice = await town.user("alice@one")
    root, below = await _space(alice, "Root"), await _space(alice, "Below")
    first, deep, last = [await alice.creates_room(preset="public_chat", name=name) for name in ("A", "B", "C")]
    await _has_child(alice, root, last, order="c")
    await _has_child(alice, root, below, order="b")
    await _has_child(alice, root, first, order="a", suggested=True)
    await _has_child(alice, below, deep)
    await _has_child(alice, below, root)
    await _has_child(alice, first, last)
    assert await _rooms(alice, root) == [root, first, below, deep, last], "in order, each once, and only below spaces"
    assert await _rooms(alice, root, max_depth=1) == [root, first, below, last]
    assert await _rooms(alice, root, suggested_only="true") == [root, first]
    told = (await _tree(alice, root))["rooms"]
    assert [child["state_key"] for child in told[0]["children_state"]] == [first, below, last]
    assert told[0]["room_type"] == "m.space" and told[0]["name"] == "Root"
    assert told[1]["children_state"] == [] and told[1]["encryption"] == "m.megolm.v1.aes-sha2"
    await alice.sets(root, "m.space.child", {}, below)
    assert await _rooms(alice, root) == [root, first, last], "a child without servers is none any more"


async def test_a_large_space_comes_page_by_page(town: Town) -> None:
    alice = await town.user("alice@one")
    root = await _space(alice, "Root")
    children = [await alice.creates_room(preset="public_chat") for _ in range(4)]
    for number, child in enumerate(children):
        await _has_child(alice, root, child, order=str(number))
    found, query = [], {"limit": 2, "max_depth": 3}
    for _ in range(4):
        page = await _tree(alice, root, **query)
        again = await _tree(alice, root, **query)
        assert [one["room_id"] for one in again["rooms"]] == [one["room_id"] for one in page["rooms"]], (
            "a page can be had twice"
        )
        found += [one["room_id"] for one in page["rooms"]]
        if "next_batch" not in page:
            break
        query["from"] = page["next_batch"]
    assert found == [root, *children]
    refused = await alice.is_refused(_tree(alice, root, **{**query, "max_depth": 1}))
    assert (refused.status, refused.errcode) == (400, "M_INVALID_PARAM"), "the depth can't change on the way"
    refused = await alice.is_refused(_tree(alice, root, **{"from": "elsewhere"}))
    assert refused.errcode == "M_INVALID_PARAM"


async def test_only_rooms_that_she_could_enter_are_shown(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    root, inner = await _space(alice, "Root"), await alice.creates_room(name="Inner", **SPACE)
    allow = {"join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": root}]}
    rules = [{"type": "m.room.join_rules", "content": allow}]
    private = await alice.creates_room(name="private")
    members_only = await alice.creates_room(name="members", initial_state=rules)
    below = await alice.creates_room(preset="public_chat")
    for child in (private, members_only, inner):
        await _has_child(alice, root, child)
    await _has_child(alice, inner, below)
    assert await _rooms(bob, root) == [root], "he is in none of them"
    await bob.joins(root)
    assert await _rooms(bob, root) == [root, members_only], "members of the space may join it"
    await alice.invites_to(private, bob)
    await alice.invites_to(inner, bob)
    assert await _rooms(bob, root) == [root, private, members_only, inner, below]
    refused = await bob.is_refused(_tree(bob, await alice.creates_room(**SPACE)))
    assert refused.status == 403, "of a private space he is told nothing"


async def test_branches_on_another_relay_are_asked_for(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    root, theirs = await _space(alice, "Root", initial_state=[OPEN_TO_ALL]), await _space(bob, "Theirs")
    public = await bob.creates_room(preset="public_chat", name="public")
    secret = await bob.creates_room(name="secret")
    await _has_child(alice, root, theirs, bob.server)
    await _has_child(bob, theirs, public)
    await _has_child(bob, theirs, secret)
    told = (await _tree(alice, root))["rooms"]
    assert [one["room_id"] for one in told] == [root, theirs, public], "her relay looks at his"
    assert told[2]["name"] == "public"
    town.cut("one", "two")
    town.clock.forward(minutes=2)
    assert await _rooms(alice, root) == [root], "what can't be asked for is left out"


async def test_a_restricted_room_elsewhere_is_shown_to_members_of_the_space(town: Town) -> None:
    alice, bob, charlie = await town.users("alice@one", "bob@one", "charlie@two")
    space = await _space(alice, "Space", initial_state=[OPEN_TO_ALL])
    allow = {"join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": space}]}
    room = await charlie.creates_room(initial_state=[{"type": "m.room.join_rules", "content": allow}])
    await _has_child(alice, space, room, charlie.server)
    assert await _rooms(alice, space) == [space], "his relay does not know that hers is in the space"
    await charlie.joins(space, alice.server)
    assert await _rooms(alice, space) == [space, room]
    assert await _rooms(bob, space) == [space], "and it is for members only"
