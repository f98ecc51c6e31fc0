"""At every door of the table a rule can say no, in its own words, and nobody passes; and what each question holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from relay.config.hooks import CALLBACKS
from relay.moderation.hook_points import POINTS
from relay.moderation.hooks import DENIES_KEPT_SECONDS
from tests.moderation.tools import Tool
from tests.people import Person, path, until
from tests.town import Town, Within

PASSES = (200, {"decision": "allow"})


class Doorman:
    """A program that stands at each door, and is told one by one what to refuse."""

    def __init__(self, town: Town, tool: Tool) -> None:
        self.town, self.tool = town, tool

    def settings(self) -> str:
        each = ", ".join(
            f"{{name: at-{name.replace('_', '-')}, url: '{self.tool.url}/{name}', points: [{name}]}}" for name in POINTS
        )
        callbacks = ", ".join(CALLBACKS)
        return (
            f"hooks: {{http: [{each}], antispam: {{url: '{self.tool.url}/spam', authorization: s3cret, "
            f"callbacks: [{callbacks}]}}}}"
        )

    @asynccontextmanager
    async def refuses(self, point: str) -> AsyncIterator[str]:
        said = f"Not through the door {point}."
        self.tool.answers[point] = (200, {"decision": "deny", "reason_code": "closed", "error": said})
        try:
            yield said
        finally:
            del self.tool.answers[point]
            self.town.clock.forward(seconds=DENIES_KEPT_SECONDS + 1)


@pytest.fixture
async def doorman(town: Town) -> AsyncIterator[Doorman]:
    async with Tool() as tool:
        tool.usual = PASSES
        yield Doorman(town, tool)


async def test_at_every_door_a_rule_can_say_no(town: Town, doorman: Doorman) -> None:
    house = await town.relay("one", doorman.settings())
    alice, carol, bob = await town.users("alice@one", "carol@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    public = await alice.creates_room(preset="public_chat")
    asked = [{"type": "m.room.join_rules", "state_key": "", "content": {"join_rule": "knock"}}]
    knocking = await alice.creates_room(initial_state=asked)
    there = await bob.creates_room()
    directory = f"directory/room/{path('#ours:' + house.name)}"
    before: set[str] = set()

    async def is_kept_out(point: str, who: Person, *ways: Awaitable[Any]) -> None:
        async with doorman.refuses(point) as said:
            for way in ways:
                refused = await who.is_refused(way)
                assert refused.status == 403, point
                assert refused.text == said, f"she is told why by the rule at {point}"
        before.add(point)

    await is_kept_out("register", alice, town.user("dave@one"))
    await is_kept_out("login", alice, alice.on_another_device())
    await is_kept_out("create_room", alice, alice.creates_room())
    await is_kept_out("invite", alice, alice.invites_to(room, carol), alice.invites_to(public, bob))
    async with doorman.refuses("federated_invite") as said:
        refused = await bob.is_refused(bob.invites_to(there, alice))
        assert refused.status == 403 and said in refused.text, "the other server hears it"
        assert not await alice.is_invited_to(there)
    before.add("federated_invite")
    await is_kept_out("join", carol, carol.joins(public), carol.joins(public, bob.server))
    await is_kept_out("knock", carol, carol.knocks_on(knocking))
    await is_kept_out("alias", alice, alice.calls("PUT", directory, {"room_id": room}))
    listing = f"directory/list/room/{path(room)}"
    await is_kept_out("publish", alice, alice.calls("PUT", listing, {"visibility": "public"}))
    await is_kept_out("state_event", alice, alice.sets(room, "m.room.name", {"name": "a name"}))
    await is_kept_out("message", alice, alice.sends(room))
    await is_kept_out("media", alice, alice.uploads(b"\x00\xff" * 300))
    async with doorman.refuses("transaction"):
        unheard = await bob.sends(room)
        assert await until(lambda: bool(doorman.tool.told("transaction"))), "it is asked before anything is looked at"
        assert await alice.does_not_see(unheard)
    before.add("transaction")
    assert before == set(POINTS), "no door is left out"

    # And through each of them one passes, where nothing stands against it.
    town.clock.forward(hours=1)  # what the other relay could not hand over it tries again
    assert await alice.sees(unheard), "what was not taken comes later"
    await asyncio.gather(town.user("dave@one"), alice.on_another_device(), alice.creates_room(), carol.joins(public))
    await alice.invites_to(room, carol)
    await bob.invites_to(there, alice)
    await carol.knocks_on(knocking)
    await alice.calls("PUT", directory, {"room_id": room})
    await alice.calls("PUT", listing, {"visibility": "public"})
    await alice.sets(room, "m.room.name", {"name": "a name"})
    await alice.uploads(b"\x00\xff" * 300)
    assert await bob.sees(await alice.sends(room))
    for name, point in POINTS.items():
        for question in doorman.tool.told(name):
            assert set(question["asked"]) == set(point.sees), f"what a rule at {name} sees is what the table says"
    _has_spoken_the_antispam_protocol(doorman.tool, alice, carol, bob, room, house)


def _has_spoken_the_antispam_protocol(
    tool: Tool, alice: Person, carol: Person, bob: Person, room: str, house: Within
) -> None:
    """Field by field as Synapse's module of that name and the tools behind it read it."""
    assert {word for word, _, _ in tool.heard} >= set(CALLBACKS), "each callback was called"
    assert {"inviter": alice.id, "invitee": carol.id, "room_id": room} in tool.told("user_may_invite")
    invite = tool.told("federated_user_may_invite")[-1]["event"]
    assert (invite["type"], invite["sender"], invite["state_key"]) == ("m.room.member", bob.id, alice.id)
    assert invite["content"] == {"membership": "invite"} and invite["room_id"].startswith("!")
    assert all(set(one) == {"user", "room", "is_invited"} for one in tool.told("user_may_join_room"))
    assert {"user_id": alice.id} in tool.told("user_may_create_room")
    alias = {"user_id": alice.id, "room_alias": f"#ours:{house.name}"}
    assert alias in tool.told("user_may_create_room_alias")
    assert {"user_id": alice.id, "room_id": room} in tool.told("user_may_publish_room")
    assert f"@dave:{house.name}" in [one["user_profile"]["user_id"] for one in tool.told("check_username_for_spam")]
    login = tool.told("check_login_for_spam")[-1]
    assert login["user_id"] == alice.id and login["request_info"] == [], "and no address of hers goes out"
    assert {"m.room.encrypted", "m.room.name"} <= {one["event"]["type"] for one in tool.told("check_event_for_spam")}
