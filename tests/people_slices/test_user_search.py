"""Finding people one already shares a room with, and nobody else."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from relay.protocol.canonical import encode
from relay.protocol.versions import VERSIONS
from tests.accounts.front_door import House, Person

MEMBER = "m.room.member"


async def finds(person: Person, term: str, **more: Any) -> list[str]:
    reply = await person.says("POST", "/user_directory/search", {"search_term": term, **more})
    assert reply.status == 200, f"the search works: {reply.body}"
    return [result["user_id"] for result in reply.body["results"]]


async def test_people_who_share_a_room_find_each_other(house: House) -> None:
    alice, bob, stranger = [await house.person(name) for name in ("alice", "bob", "alina")]
    await bob.says("PUT", f"/profile/{bob.user_id}/displayname", {"displayname": "Robert Émile"})
    room = house.rooms.meet("!r", alice.user_id, bob.user_id, "@carla:two.example", "@gone:two.example")
    room.members["@gone:two.example"] = "leave"
    room.version = VERSIONS["12"]
    content = {"membership": "join", "displayname": "Carlotta", "avatar_url": "https://tracker.example/x.png"}
    pdu = {
        "type": MEMBER, "room_id": "!r", "sender": "@carla:two.example", "state_key": "@carla:two.example", "content": content,
        "depth": 1, "origin_server_ts": 1, "prev_events": [], "auth_events": [], "hashes": {}, "signatures": {},
    }  # fmt: skip
    with house.db.write() as tx:
        tx.run(
            "INSERT INTO events (nid, event_id, room_nid, depth, type, sender, marks, json) VALUES (1, $1, 1, 1, $2, $3, 0, $4)",
            "$member",
            MEMBER,
            "@carla:two.example",
            encode(pdu),
        )
    await tx
    room.state[(MEMBER, "@carla:two.example")] = "$member"

    assert await finds(alice, "rob") == [bob.user_id], "by the beginning of a name"
    assert await finds(alice, "ÉMILE") == [bob.user_id], "by any word of it, in any case"
    assert await finds(alice, "bob") == [bob.user_id], "by the user ID"
    assert await finds(alice, "carlot") == ["@carla:two.example"], "people elsewhere by the name they show in the room"
    assert await finds(alice, "two.example") == ["@carla:two.example"], "not those who left"
    assert await finds(alice, "ali") == [], "neither herself nor strangers"
    assert await finds(stranger, "bob") == [], "and a stranger finds nobody"
    assert await finds(alice, "  ") == []
    assert await finds(alice, "o", limit=1) == [bob.user_id]
    reply = await alice.says("POST", "/user_directory/search", {"search_term": "carla"})
    assert reply.body == {
        "results": [{"user_id": "@carla:two.example", "display_name": "Carlotta"}],
        "limited": False,
    }, "an avatar that is no mxc address is not handed on"


@pytest.mark.parametrize(
    "body", [{}, {"search_term": 1}, {"search_term": "a", "limit": 0}, {"search_term": "a", "limit": "ten"}]
)
async def test_a_malformed_search(house: House, body: dict[str, Any]) -> None:
    alice = await house.person("alice")
    reply = await alice.says("POST", "/user_directory/search", orjson.dumps(body))
    assert reply.status == 400, f"a clear error: {reply.body}"
