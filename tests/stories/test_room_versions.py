"""Two relays, a room of each version: people come, speak, change state and take back, and both sides agree."""

from __future__ import annotations

import pytest

from relay.protocol.versions import VERSIONS
from tests.town import Town


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_conversation_in_a_room_of_this_version(town: Town, version: str) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(room_version=version, preset="trusted_private_chat")
    assert (await alice.reads(room, "m.room.create"))["room_version"] == version
    await alice.invites_to(room, bob)
    assert await bob.notices(lambda: room in bob.invites)
    await bob.joins(room)
    sent, answer = await alice.sends(room), await bob.sends(room)
    assert await bob.sees(sent) and await alice.sees(answer), "messages cross"
    await alice.sets(room, "m.room.name", {"name": "Studio"})
    assert await bob.notices(lambda: ("m.room.name", "") in bob.state[room]), "state crosses"
    redaction = await alice.redacts(room, sent)
    seen = await bob.sees(redaction)
    assert seen is not None
    assert seen.get("redacts", seen["content"].get("redacts")) == sent, "a client finds out what was redacted"
    assert (await bob.event(room, sent))["content"] == {}
    await bob.leaves(room)
    assert await alice.notices(lambda: alice.membership(room, bob) == "leave")
    await alice.invites_to(room, bob)
    assert await bob.notices(lambda: room in bob.invites)
    await bob.joins(room)
    again = await bob.sends(room)
    assert await alice.sees(again)
    levels = dict(await alice.reads(room, "m.room.power_levels"))
    levels["users"] = {**levels.get("users", {}), bob.id: 50}
    await alice.sets(room, "m.room.power_levels", levels)
    assert await bob.notices(lambda: bob.state[room]["m.room.power_levels", ""]["content"]["users"].get(bob.id) == 50)
    await bob.sets(room, "m.room.topic", {"topic": "by the new moderator"})
    assert await alice.notices(lambda: ("m.room.topic", "") in alice.state[room]), "power crosses, too"
