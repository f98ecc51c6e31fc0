"""Our relay and a real Synapse: each side makes a room, the other comes by invitation or by address, and they talk."""

from __future__ import annotations

import pytest

from tests.interop.neighbour import encrypted
from tests.interop.street import SIDES, Street
from tests.people import ciphertext

both_sides = pytest.mark.parametrize("host", SIDES)
both_versions = pytest.mark.parametrize("version", ["12", "10"])


@both_sides
@both_versions
async def test_an_encrypted_conversation(street: Street, host: str, version: str) -> None:
    alice, bob = await street.two(host)
    room = await street.room(alice, bob, room_version=version)
    assert await alice.notices(lambda: alice.state[room].get(("m.room.member", bob.id), {}).get("content", {}).get("membership") == "join")
    content = ciphertext()
    sent = await alice.sends(room, content)
    seen = await bob.sees(sent)
    assert seen is not None, "a message crosses"
    assert seen["content"] == content and seen["sender"] == alice.id, "as it was sent"
    answer = await bob.sends(room)
    assert await alice.sees(answer), "and an answer comes back"
