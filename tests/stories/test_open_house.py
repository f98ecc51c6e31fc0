"""What a relay does for people where the seal is open: what others expect of any server, beside what the seal forbids."""

from __future__ import annotations

import hmac
import random
from typing import Any

from relay import config
from tests.people import Person, path, until
from tests.town import PASSWORD, Town, Within

REGISTER = "/_synapse/admin/v1/register"

OPEN = 'privacy: {seal: open, profiles_open: true}\npresence: {enabled: true}\nrooms: {default_version: "11"}\n'


async def _last(person: Person, room: str, who: Person) -> Any:
    return await person.calls("GET", path("rooms", room, "state", "m.room.member", who.id))


async def test_what_people_say_as_they_come_and_go_is_kept(town: Town) -> None:
    await town.relay("one", OPEN)
    await town.relay("two", OPEN)
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@two")
    room = await alice.creates_room(preset="public_chat")
    await bob.calls("POST", path("join", room), {"reason": "hello", "org.example.colour": "blue"})
    said = await _last(alice, room, bob)
    assert (said["reason"], said["org.example.colour"]) == ("hello", "blue"), "what he says of himself is in the room"
    await carol.calls("POST", path("join", room), {"reason": "from afar"}, via=alice.server)
    assert await until(lambda: _has_reason(alice, room, carol, "from afar")), "also from elsewhere"
    await alice.calls("POST", path("rooms", room, "kick"), {"user_id": bob.id, "reason": "enough"})
    assert (await _last(alice, room, bob))["reason"] == "enough"
    forged = {"membership": "join", "displayname": "Al", "join_authorised_via_users_server": bob.id}
    await alice.calls("PUT", path("rooms", room, "state", "m.room.member", alice.id), forged)
    said = await _last(alice, room, alice)
    assert said["displayname"] == "Al", "a name for one room"
    assert "join_authorised_via_users_server" not in said, "who vouches for her is the server's to say"


async def _has_reason(person: Person, room: str, who: Person, reason: str) -> bool:
    return bool((await _last(person, room, who)).get("reason") == reason)


async def test_who_is_online_is_told_to_those_whom_one_joins(town: Town) -> None:
    await town.relay("one", OPEN)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(preset="public_chat")
    await alice.syncs()
    status = {"presence": "online", "status_msg": "at sea"}
    await bob.calls("PUT", path("presence", bob.id, "status"), status)
    await bob.joins(room)

    async def told() -> bool:
        events = (await alice.syncs()).get("presence", {}).get("events", [])
        return any(e["sender"] == bob.id and e["content"].get("status_msg") == "at sea" for e in events)

    assert await until(told), "who was online before he came is seen by those who are there"


async def test_files_keep_their_type_and_name_on_the_way(town: Town) -> None:
    two = await town.relay("two", OPEN)
    await town.relay("one", OPEN)
    alice, bob = await town.users("alice@one", "bob@two")
    uri = await alice.uploads(b"a word", "text/plain", filename="caf\u00e9.txt")
    for _ in range(2):
        answer, body = await bob.downloads(uri)
        assert body == b"a word" and answer.content_type == "text/plain", "the type that alice gave it"
        assert "caf%C3%A9.txt" in answer.headers["Content-Disposition"], "and its name, from afar and from the copy"
    assert two.server is not None
    audited = await two.command("audit")
    assert not audited["findings"], f"what may lie there is what lies there: {audited['findings']}"


async def test_people_in_public_rooms_are_found_where_profiles_are_open(town: Town) -> None:
    await town.relay("one", OPEN)
    alice, eve = await town.users("alice@one", "eve@one")
    await alice.calls("PUT", path("profile", alice.id, "displayname"), {"displayname": "Nightingale"})
    found = await eve.calls("POST", "user_directory/search", {"search_term": "nightingale"})
    assert found["results"] == [], "nobody is found who stands in no open room"
    await alice.creates_room(preset="public_chat", visibility="public")
    found = await eve.calls("POST", "user_directory/search", {"search_term": "nightingale"})
    assert [one["user_id"] for one in found["results"]] == [alice.id], "who is in a room of the directory is"


async def test_several_relays_stand_side_by_side_on_the_usual_ports(town: Town) -> None:
    # As conformance suites want them: each on a loopback address of its own, clients at 8008, servers at 8448.
    street = f"127.{random.randrange(2, 250)}.{random.randrange(2, 250)}"
    for number, nickname in enumerate(("one", "two"), start=1):
        address = f"{street}.{number}"
        house = Within(town, nickname, "")
        town.authority.certify(house.folder, address)
        (house.folder / config.CONFIG_NAME).write_text(
            f"server_name: {address}\n"
            "listeners:\n"
            f"  - {{address: {address}, port: 8008}}\n"
            f"  - {{address: {address}, port: 8448, tls_certificate: tls.crt, tls_key: tls.key}}\n"
            "registration: {mode: closed, shared_secret: complement}\n"
            "limits: {enabled: false}\n"
            "federation: {extra_ca_file: ca.crt, allow_private_addresses: true}\n"
        )
        house.name, house.url, house.federation_port = address, f"http://{address}:8008", 8448
        town.houses[nickname] = house
        await house.start()
    alice, bob = [
        Person(town.http, house.url, house.name, name, PASSWORD)
        for name, house in zip(("alice", "bob"), town.houses.values(), strict=True)
    ]
    for person in (alice, bob):
        nonce = (await person.calls("GET", REGISTER, token=""))["nonce"]
        signed = "\0".join([nonce, person.name, PASSWORD, "notadmin"]).encode()
        body = {"nonce": nonce, "username": person.name, "password": PASSWORD}
        body["mac"] = hmac.digest(b"complement", signed, "sha1").hex()
        await person.calls("POST", REGISTER, body, token="")
        await person.signs_in()
    room = await alice.creates_room()
    await alice.invites_to(room, bob)
    assert await bob.is_invited_to(room), "they find each other by address alone"
    await bob.joins(room, alice.server)
    assert await bob.sees(await alice.sends(room)) and await alice.sees(await bob.sends(room))
