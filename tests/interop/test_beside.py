"""Our relay and a real Synapse: presence, previews, OpenID, a room with a policy server, a changed signing key."""

from __future__ import annotations

import asyncio
import struct
import zlib
from urllib.parse import quote

import pytest

from relay.__main__ import main
from relay.errors import Forbidden
from tests.interop.street import OURS, Street, both_sides, they_talk
from tests.people import path
from tests.policy_office import Office


def picture(side: int = 64) -> bytes:
    """A small PNG, in one colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    lines = b"".join(b"\x00" + b"\x80\x40\xc0" * side for _ in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


async def test_who_is_there_is_told_both_ways(street: Street) -> None:
    await street.town.relay(OURS, "presence: {enabled: true}")
    alice, bob = await street.two()
    room = await street.room(alice, bob)
    await they_talk(room, alice, bob)
    for one, other in ((alice, bob), (bob, alice)):
        # Both are online already, as their syncs said: a change is what is told.
        await one.calls("PUT", path("presence", one.id, "status"), {"presence": "unavailable"})
        told: set[str] = set()
        for _ in range(30):
            answer = await other.syncs(timeout=500)
            events = answer.get("presence", {}).get("events", [])
            told |= {event["content"]["presence"] for event in events if event["sender"] == one.id}
            if "unavailable" in told:
                break
        assert "unavailable" in told, f"{other.id} is told that {one.id} is away"


@both_sides
async def test_a_picture_of_the_other_side_has_a_preview(street: Street, host: str) -> None:
    alice, bob = await street.two(host)
    uri = await alice.uploads(picture(), "image/png")
    await alice.calls("PUT", path("profile", alice.id, "avatar_url"), {"avatar_url": uri})
    await street.room(alice, bob)
    server, media_id = uri.removeprefix("mxc://").split("/")
    where = f"/_matrix/client/v1/media/thumbnail/{path(server, media_id)}"
    answer, got = await bob.asks("GET", f"{where}?width=32&height=32&method=scale")
    assert answer.content_type.startswith("image/") and len(got) > 20, "it can be shown small"


@both_sides
async def test_a_service_learns_who_somebody_is(street: Street, host: str) -> None:
    alice = await street.user("alice", host)
    token = await alice.calls("POST", path("user", alice.id, "openid", "request_token"), {})
    assert token["matrix_server_name"] == alice.server
    where = f"https://{alice.server}/_matrix/federation/v1/openid/userinfo?access_token={quote(token['access_token'])}"
    async with street.town.http.get(where, ssl=False) as answer:
        assert (await answer.json())["sub"] == alice.id
    async with street.town.http.get(where + "x", ssl=False) as answer:
        assert answer.status == 401 and (await answer.json())["errcode"] == "M_UNKNOWN_TOKEN"


async def test_a_room_with_a_policy_server(street: Street, monkeypatch: pytest.MonkeyPatch) -> None:
    office = Office(monkeypatch)
    alice, bob = await street.two()
    officer = await street.town.user("officer@office")
    room = await street.room(alice, bob, officer)
    await they_talk(room, alice, bob)
    policy = {"via": officer.server, "public_keys": {"ed25519": office.public_key}}
    assert await bob.sees(await alice.sets(room, "m.room.policy", policy))
    for speaker, listener in ((alice, bob), (bob, alice)):
        asked = len(office.asked)
        sent = await speaker.sends(room)
        assert await listener.sees(sent)
        assert office.asked[asked:] == [sent], "whoever sends asks, and whoever receives need not ask again"
    office.refusal = Forbidden("Not in this room, please.")
    for speaker in (alice, bob):
        refused = await speaker.is_refused(speaker.sends(room))
        assert refused.status == 403 and "Not in this room" in refused.text, "both pass on what it says"
    office.refusal = None
    await they_talk(room, alice, bob)


async def test_synapse_takes_up_a_changed_key_and_looks_at_us_from_outside(street: Street) -> None:
    alice, bob = await street.two()
    relay = await street.relay()
    room = await street.room(alice, bob)
    await they_talk(room, alice, bob)
    await relay.stop()
    assert await asyncio.to_thread(main, ["key", "rotate", "--data", str(relay.folder)]) == 0
    await relay.start()
    await they_talk(room, alice, bob)
    found = await relay.command("doctor", ask=street.synapse.name)
    said = [one["what"] for one in found if one["subject"] == "others"]
    assert f"{street.synapse.name} reaches this relay, from outside." in said, found
    assert not [one for one in found if one["severity"] == "error"]
