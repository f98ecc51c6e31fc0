"""Our relay and a real Synapse as servers: keys, media, directories, spaces, access lists."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import aiohttp
import nacl.signing
from canonicaljson import encode_canonical_json

from tests.interop.neighbour import encrypted
from tests.interop.street import OURS, THEIRS, Street, becomes, both_sides, they_talk
from tests.people import path


async def _keys(http: aiohttp.ClientSession, name: str, where: str = "/_matrix/key/v2/server") -> dict[str, Any]:
    async with http.get(f"https://{name}{where}", ssl=False) as answer:
        assert answer.status == 200
        found: dict[str, Any] = json.loads(await answer.read())
        return found


def _is_signed(body: dict[str, Any], by: str, keys: dict[str, Any]) -> bool:
    bare = {name: value for name, value in body.items() if name not in ("signatures", "unsigned")}
    for key_id, signature in body["signatures"][by].items():
        public = keys["verify_keys"][key_id]["key"]
        verify = nacl.signing.VerifyKey(base64.b64decode(public + "=="))
        verify.verify(encode_canonical_json(bare), base64.b64decode(signature + "=="))
    return bool(body["signatures"][by])


async def test_signing_keys_are_published_and_vouched_for_both_ways(street: Street) -> None:
    alice, bob = await street.two()
    room = await street.room(alice, bob)
    await they_talk(room, alice, bob)
    relay, http = await street.relay(), street.town.http
    ours, theirs = await _keys(http, relay.name), await _keys(http, street.synapse.name)
    assert ours["server_name"] == relay.name and _is_signed(ours, relay.name, ours), "ours are signed with themselves"
    told = (await _keys(http, street.synapse.name, f"/_matrix/key/v2/query/{relay.name}"))["server_keys"][0]
    assert told["verify_keys"] == ours["verify_keys"], "Synapse, asked as a notary, tells our keys"
    assert _is_signed(told, relay.name, ours) and _is_signed(told, street.synapse.name, theirs)
    told = (await _keys(http, relay.name, f"/_matrix/key/v2/query/{street.synapse.name}"))["server_keys"][0]
    assert told["verify_keys"] == theirs["verify_keys"], "and we tell theirs"
    assert _is_signed(told, street.synapse.name, theirs) and _is_signed(told, relay.name, ours)


@both_sides
async def test_an_encrypted_attachment_crosses(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    blob = os.urandom(400_000)
    uri = await alice.uploads(blob)
    answer, got = await bob.downloads(uri)
    assert got == blob, "it arrives as it was sent"
    assert answer.content_type == "application/octet-stream"
    _, again = await bob.downloads(uri)
    assert again == blob, "and once more, from the copy"
    missing = await bob.is_refused(bob.downloads(f"mxc://{alice.server}/nosuchthing"))
    assert (missing.status, missing.errcode) == (404, "M_NOT_FOUND")


@both_sides
async def test_the_directory_and_the_room_summary_cross(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    room = await alice.creates_room(
        **encrypted(preset="public_chat", visibility="public", name=f"Studio of {alice.name}")
    )
    listed = await bob.calls("GET", "publicRooms", server=alice.server)
    found = next(one for one in listed["chunk"] if one["room_id"] == room)
    assert (found["name"], found["num_joined_members"]) == (f"Studio of {alice.name}", 1)
    searched = await bob.calls(
        "POST", f"publicRooms?server={alice.server}", {"filter": {"generic_search_term": alice.name}}
    )
    assert [one["room_id"] for one in searched["chunk"]] == [room]


@both_sides
async def test_an_access_list_keeps_a_server_out(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    room = await street.room(alice, bob, preset="public_chat")
    await they_talk(room, alice, bob)
    # The list names hosts without ports: it means both servers, but ours and theirs still speak to their own people.
    acl = {"allow": ["*"], "deny": ["localhost"], "allow_ip_literals": True}
    event_id = await alice.sets(room, "m.room.server_acl", acl)
    assert await bob.sees(event_id)
    shut_out = await bob.sends(room)
    assert await alice.does_not_see(shut_out), "what a server sends that the room keeps out is not taken"
    shut = await street.room(alice, preset="public_chat", initial_state=[{"type": "m.room.server_acl", "content": acl}])
    refused = await bob.is_refused(bob.joins(shut, alice.server))
    assert refused.status == 403, f"nobody comes in from there, not: {refused}"


async def test_an_address_that_does_not_exist_and_a_server_that_does_not(street: Street) -> None:
    bob = await street.user("bob", OURS)
    refused = await bob.is_refused(bob.joins(f"#nosuch:{street.synapse.name}"))
    assert (refused.status, refused.errcode) == (404, "M_NOT_FOUND")
    alice = await street.user("alice", THEIRS)
    relay = await street.relay()
    refused = await alice.is_refused(alice.joins(f"#nosuch:{relay.name}"))
    assert (refused.status, refused.errcode) == (404, "M_NOT_FOUND")


async def test_an_upgraded_room_leads_on(street: Street) -> None:
    alice, bob = await street.two(THEIRS)
    old = await street.room(alice, bob, room_version="10", preset="public_chat")
    new = (await alice.calls("POST", path("rooms", old, "upgrade"), {"new_version": "12"}))["replacement_room"]
    assert await bob.notices(lambda: ("m.room.tombstone", "") in bob.state[old]), "the old room says where it goes on"
    tombstone = await bob.reads(old, "m.room.tombstone")
    assert tombstone["replacement_room"] == new
    await bob.joins(new, alice.server)
    assert await becomes(alice, new, bob, "join")
    await they_talk(new, alice, bob)
