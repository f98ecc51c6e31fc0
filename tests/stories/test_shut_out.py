"""Whoever is shut out by a moderator gets in by none of the ways there are, and nothing that people do here goes out to her;
an allow-list is opened for one server in the same way."""

from __future__ import annotations

import os
import re
from typing import Any

from relay.errors import RemoteError
from tests.forger import Forger
from tests.moderation.test_actions import logged, moderators, takes
from tests.people import Person, Refused, path, until
from tests.town import FEDERATION, Town, Within

SHUT_OUT = "shut that server out"
OLM = {
    "algorithm": "m.olm.v1.curve25519-aes-sha2",
    "sender_key": "k" * 43,
    "ciphertext": {"k" * 43: {"type": 0, "body": "QUJD" * 8}},
}


def ways_in(house: Within) -> list[tuple[str, str]]:
    """Method and path of all that another server may ask of us with its signature."""
    assert house.server is not None
    routes = [route for part in house.server._parts for route in part.routes() if route.auth == "server"]
    return [(route.method, re.sub(r"\{\w+\}", "x", route.path)) for route in routes]


async def refusal_of(forger: Forger, method: str, where: str) -> str:
    try:
        await forger.asks(method, where, None if method == "GET" else {})
    except RemoteError as no:
        return f"{no.status} {no}"
    return ""


def asked_by(house: Within) -> list[str]:
    """Each address that it opens a connection to from now on."""
    assert house.server is not None
    outward, asked = house.server.outbox._connections._outward, []
    request = outward.request

    async def overheard(method: str, url: Any, **rest: Any) -> Any:
        asked.append(str(url))
        return await request(method, url, **rest)

    outward.request = overheard  # type: ignore[method-assign]
    return asked


async def does_all_she_can(alice: Person, bob: Person, room: str, sent: str, picture: str) -> None:
    """Whatever of it would have to ask or tell Bob's server."""
    media = picture.removeprefix("mxc://")
    alias, elsewhere, v1 = f"#any:{bob.server}", f"!any:{bob.server}", "/_matrix/client/v1"
    own = await alice.creates_room()
    for doing in (
        alice.joins(alias),
        alice.joins(elsewhere, bob.server),
        alice.knocks_on(elsewhere, bob.server),
        alice.invites_to(own, bob),
        alice.calls("GET", path("profile", bob.id)),
        alice.calls("GET", f"directory/room/{path(alias)}"),
        alice.calls("GET", "publicRooms", server=bob.server),
        alice.calls("POST", "publicRooms", {}, server=bob.server),
        alice.calls("GET", f"{v1}/room_summary/{path(elsewhere)}", via=bob.server),
        alice.calls("GET", f"{v1}/rooms/{path(room)}/hierarchy"),
        alice.calls("GET", f"{v1}/rooms/{path(room)}/timestamp_to_event", ts=1, dir="b"),
        alice.downloads(picture),
        alice.calls("GET", f"{v1}/media/thumbnail/{media}", width=64, height=64),
        alice.calls("GET", f"/_matrix/media/v3/download/{media}"),
        alice.calls("POST", "keys/query", {"device_keys": {bob.id: []}}),
        alice.calls("POST", "keys/claim", {"one_time_keys": {bob.id: {"DEVICE": "signed_curve25519"}}}),
        alice.tells_devices("m.room.encrypted", {bob.id: {"*": OLM}}),
        alice.sends(room),
        alice.is_typing(room),
        alice.has_read(room, sent),
        alice.calls("PUT", path("presence", alice.id, "status"), {"presence": "online"}),
        alice.history(room),
        alice.calls("POST", "user_directory/search", {"search_term": bob.id}),
        alice.leaves(room),
    ):
        try:
            await doing
        except Refused as no:
            assert no.status < 500 or no.status == 502, f"{no}"


async def test_a_blocked_server_comes_in_by_no_way_and_nothing_goes_out_to_it(town: Town) -> None:
    house, [mod] = await moderators(town, "mod")
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@three")
    room = await alice.creates_room(with_=[bob, carol])
    sent = await bob.sends(room)
    assert await alice.sees(sent)
    picture = await bob.uploads(os.urandom(300))
    waiting = await bob.creates_room(invite=[alice.id])
    assert await alice.notices(lambda: waiting in alice.invites)
    ways, forger = ways_in(house), Forger(town.houses["two"], house.name)  # type: ignore[arg-type]
    assert len(ways) > 30, "all of the standard's, and the relay's own"
    assert not [way for way in ways if SHUT_OUT in await refusal_of(forger, *way)], "whatever they say, it is not that"

    await takes(mod, "block_server", bob.server)
    heard = await carol.sends(room)
    assert await alice.sees(heard), "everybody else is heard"
    said = {way: await refusal_of(forger, *way) for way in ways}
    assert not [way for way, no in said.items() if not (no.startswith("403") and SHUT_OUT in no)], (
        "each of them is shut"
    )
    asked = asked_by(house)
    await does_all_she_can(alice, bob, room, sent, picture)
    last = await alice.creates_room(with_=carol)
    assert await carol.sees(await alice.sends(last)), "what goes out goes out"
    port = bob.server.partition(":")[2]
    assert asked and not [url for url in asked if f":{port}/" in url], "and nothing of it to the blocked one"

    await takes(mod, "block_server", bob.server, undo=True)
    assert not [way for way in ways if SHUT_OUT in await refusal_of(forger, *way)]
    again = await alice.creates_room(with_=bob)
    assert await bob.sees(await alice.sends(again)), "and all is as before"


async def test_moderators_let_one_server_through_an_allow_list(town: Town) -> None:
    listed = FEDERATION.replace("{extra", "{allow: ['friends.example', '*.friends.example'], extra")
    await town.relay("one", f"{listed}\n")
    house, [mod] = await moderators(town, "mod")
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room()
    assert SHUT_OUT in (await alice.is_refused(alice.invites_to(room, bob))).text
    there = await bob.creates_room()
    await bob.is_refused(bob.invites_to(there, alice))
    assert not await alice.is_invited_to(there), "nor is anybody asked for its keys"
    await takes(mod, "allow_server", bob.server)
    await alice.invites_to(room, bob)
    assert await until(lambda: bob.is_invited_to(room))
    await bob.joins(room, alice.server)
    assert await bob.sees(await alice.sends(room)) and await alice.sees(await bob.sends(room)), "both ways"
    await house.restart()
    assert await alice.sees(await bob.sends(room)), "after a restart too"
    await takes(mod, "allow_server", bob.server, undo=True)
    assert await alice.does_not_see(await bob.sends(room)), "until it is taken back"
    assert await logged(house) == ["allow_server", "undo.allow_server"]
