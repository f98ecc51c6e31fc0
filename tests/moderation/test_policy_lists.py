"""Stories of other people's ban lists: applied at the doors, shown to the moderators, ignored; and what rules may say."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.moderation.list_following import MAX_SUCCESSORS
from relay.moderation.policy_rules import MAX_RULES, TYPES, Bans
from tests.moderation.casehouse import casework
from tests.moderation.test_actions import SAFETY, takes
from tests.people import Person, Refused, path, until
from tests.town import Town


def ban(entity: str, recommendation: str = "m.ban") -> dict[str, Any]:
    return {"entity": entity, "recommendation": recommendation, "reason": "x"}


async def test_a_list_that_is_applied_closes_the_doors(town: Town) -> None:
    # The room's ID is needed for the config, so the list is kept elsewhere.
    [keeper] = await town.users("keeper@lists")
    room = await keeper.creates_room(preset="public_chat", creation_content={"type": "m.space"})
    review = await keeper.creates_room(preset="public_chat", creation_content={"type": "m.space"})
    house = await town.relay(
        "one", f"hooks: {{policy_lists: [{{room_id: '{room}', effect: apply}}, {{room_id: '{review}'}}]}}"
    )
    mod, alice = await town.users("mod@one", "alice@one")
    await house.command("user.admin", user="mod", admin=True)
    bob, carol, mallory = await town.users("bob@two", "carol@three", "mallory@three")

    async def rules(number: int) -> bool:
        lists = (await mod.calls("GET", f"{SAFETY}/lists"))["lists"]
        return [one["rules"] for one in lists] == [number, 0]

    await mod.joins(room, keeper.server)
    await mod.joins(review, keeper.server)
    theirs = await mallory.creates_room()
    await mallory.invites_to(theirs, alice)
    assert await until(lambda: alice.is_invited_to(theirs)), "before the list names her she may invite"
    await keeper.sets(room, "m.policy.rule.user", ban(f"@mal*:{mallory.server}"), "rule-1")
    assert await until(lambda: rules(1)), "the relay follows the list"
    other = await mallory.creates_room()
    refused = await mallory.is_refused(mallory.invites_to(other, alice))
    assert refused.status == 403 and "list" in refused.text, "whom it bans invites nobody here"
    hers = await carol.creates_room(with_=alice)
    await keeper.sets(room, "org.matrix.mjolnir.rule.room", ban(hers, "org.matrix.mjolnir.ban"), "rule-2")
    assert await until(lambda: rules(2)), "older names count as well"
    await alice.leaves(hers)
    assert (await alice.is_refused(alice.joins(hers, carol.server))).status == 403, "rooms can be on a list"
    ours = await bob.creates_room(with_=alice)
    await keeper.sets(room, "m.policy.rule.server", ban(bob.server), "rule-3")
    assert await until(lambda: rules(3))
    assert await alice.does_not_see(await bob.sends(ours)), "a server on an applied list is shut out"
    await takes(mod, "allow_server", bob.server)
    assert await alice.sees(await bob.sends(ours)), "our own moderators have the last word"
    await keeper.sets(room, "m.policy.rule.user", {}, "rule-1")
    assert await until(lambda: rules(2)), "what is taken off the list counts no longer"
    assert await until(lambda: invites(mallory, other, alice)), "and the door is open again"
    await keeper.sets(review, "m.policy.rule.user", ban(carol.id), "rule-1")

    async def flagged() -> bool:
        third = await carol.creates_room()
        await carol.invites_to(third, alice)
        flags = (await mod.calls("GET", f"{SAFETY}/flags"))["flags"]
        return [(one["rule"], one["subject"]) for one in flags] == [("policy-list", carol.id)]

    assert await until(flagged), "a list for review turns nobody away, and raises a flag"


async def test_a_list_goes_on_in_the_room_that_replaces_its_room(town: Town) -> None:
    house = await town.relay("one")
    [keeper] = await town.users("keeper@lists")
    mod, alice, mallory = await town.users("mod@one", "alice@one", "mallory@two")
    await house.command("user.admin", user="mod", admin=True)
    policy = {"preset": "public_chat", "creation_content": {"type": "m.policy"}}
    old, strays = [await keeper.creates_room(**policy) for _ in range(2)]
    await keeper.sets(old, "m.policy.rule.user", ban("@first:bad.example"), "rule-1")
    for room in (old, strays):
        await mod.calls("POST", f"{SAFETY}/lists", {"room_id": room, "effect": "apply", "via": [keeper.server]})

    async def followed() -> dict[str, tuple[Any, ...]]:
        lists = (await mod.calls("GET", f"{SAFETY}/lists"))["lists"]
        return {one["room_id"]: (one["effect"], one["heard"], one["replaced_by"]) for one in lists}

    foreign = await keeper.creates_room(**policy)
    await keeper.sets(strays, "m.room.tombstone", {"replacement_room": foreign})
    new = (await keeper.calls("POST", f"{path('rooms', old)}/upgrade", {"new_version": "12"}))["replacement_room"]
    await keeper.sets(new, "m.policy.rule.user", ban(mallory.id), "rule-2")

    async def has_moved() -> bool:
        return await followed() == {
            old: ("apply", True, new), new: ("apply", True, None), strays: ("apply", True, foreign),
        }  # fmt: skip

    assert await until(has_moved), "the successor is followed like the list, a room that does not know of it is not"
    theirs = await mallory.creates_room()

    async def is_refused() -> bool:
        try:
            await mallory.invites_to(theirs, alice)
        except Refused as no:
            return no.status == 403
        await alice.leaves(theirs)
        return False

    assert await until(is_refused), "and its rules count"
    history = (await mod.calls("GET", f"{SAFETY}/audit"))["entries"]
    moved = {(one["action"], one["target"]) for one in history if one["actor"] == "rule:list-replaced"}
    assert moved == {("list.apply", new)}, "the log says so"
    await mod.calls("DELETE", f"{SAFETY}/lists/{path(old)}")
    await house.restart()
    assert set(await followed()) == {new, strays}, "moderators let go of the old one"


async def test_a_list_does_not_lead_the_relay_about(town: Town) -> None:
    house = await town.relay("one")
    [keeper] = await town.users("keeper@lists")
    mod, alice = await town.users("mod@one", "alice@one")
    await house.command("user.admin", user="mod", admin=True)
    strays = await keeper.creates_room(preset="public_chat", creation_content={"type": "m.policy"})
    await mod.calls("POST", f"{SAFETY}/lists", {"room_id": strays, "effect": "apply", "via": [keeper.server]})
    await alice.calls("POST", f"users/{path(keeper.id)}/report", {"reason": "x"})
    assert await until(lambda: casework(house).own_rooms.room_of(alice.id)), "the relay tells her that it was heard"
    notices = str(await casework(house).own_rooms.room_of(alice.id))

    async def is_replaced_by(room: str) -> None:
        await keeper.sets(strays, "m.room.tombstone", {"replacement_room": room})

        async def is_heard() -> bool:
            [one] = (await mod.calls("GET", f"{SAFETY}/lists"))["lists"]
            return bool(one["replaced_by"] == room)

        assert await until(is_heard), "a room that does not know of the list is not followed"

    await is_replaced_by(notices)
    foreign = [await keeper.creates_room(preset="public_chat") for _ in range(MAX_SUCCESSORS)]
    for room in foreign:
        await is_replaced_by(room)
    # Each is heard of when the one before it was dealt with.
    here = (await alice.calls("GET", f"{path('rooms', notices)}/joined_members"))["joined"]
    assert len(here) == 2, "the relay does not leave its own rooms because a list names them"

    async def came(room: str) -> list[str]:
        members = (await keeper.calls("GET", f"{path('rooms', room)}/members"))["chunk"]
        return [one["content"]["membership"] for one in members if one["sender"] != keeper.id]

    *tried, last = foreign
    assert await until(lambda: all_are(tried, came, ["leave"])), "it has looked into some and gone again"
    await is_replaced_by(notices)
    assert await came(last) == [], "and follows no list into any number of rooms"


async def all_are(rooms: list[str], found: Callable[[str], Awaitable[list[str]]], wanted: list[str]) -> bool:
    return [await found(room) for room in rooms] == [wanted] * len(rooms)


async def test_moderators_choose_lists_while_it_runs(town: Town) -> None:
    """A list as it is deployed: a room without a type and without encryption, which nobody of ours is in."""
    await town.relay("lists", "privacy: {seal: open}")
    keeper, mallory = await town.users("keeper@lists", "mallory@three")
    lists_room = await keeper.creates_room(preset="public_chat", room_alias_name="bans")
    await keeper.sets(lists_room, "m.policy.rule.user", ban(mallory.id), "rule-1")
    house = await town.relay("one")
    mod, alice = await town.users("mod@one", "alice@one")
    await house.command("user.admin", user="mod", admin=True)
    theirs = await mallory.creates_room()

    refused = await alice.is_refused(alice.calls("POST", f"{SAFETY}/lists", {"room_id": lists_room}))
    assert refused.status == 403, "only moderators choose"
    refused = await mod.is_refused(mod.calls("POST", f"{SAFETY}/lists", {"room_id": lists_room, "effect": "burn"}))
    assert refused.status == 400 and "apply, review, ignore" in refused.text
    followed = await mod.calls("POST", f"{SAFETY}/lists", {"room_id": f"#bans:{keeper.server}", "effect": "apply"})
    assert followed == {
        "room_id": lists_room, "effect": "apply", "chosen_by": "moderators", "rules": 1, "heard": True, "replaced_by": None,
    }  # fmt: skip
    members = await keeper.members(lists_room)
    assert mod.id not in members and alice.id not in members, "nobody has to show herself in the list's room"
    assert (await mallory.is_refused(mallory.invites_to(theirs, alice))).status == 403, "it counts at once"
    await keeper.sets(lists_room, "m.policy.rule.user", {}, "rule-1")
    assert await until(lambda: invites(mallory, theirs, alice)), "and what is taken off it counts no longer"
    await keeper.sets(lists_room, "m.policy.rule.user", ban(mallory.id), "rule-1")

    async def turned_away() -> bool:
        return not await invites(mallory, await mallory.creates_room(), alice)

    assert await until(turned_away)
    await house.restart()
    assert await until(turned_away), "the choice outlives a restart"
    words = [row["action"] for row in (await mod.calls("GET", f"{SAFETY}/audit"))["entries"]]
    assert "list.apply" in words, "each choice stands in the log"
    gone = await mod.calls("DELETE", f"{SAFETY}/lists/{path(lists_room)}")
    assert gone == {"room_id": lists_room, "effect": None}
    assert await until(lambda: invites(mallory, theirs, alice)), "a list that is followed no longer turns nobody away"

    async def left() -> bool:
        return [m for m in (await keeper.members(lists_room)).values() if m == "join"] == ["join"]

    assert await until(left), "and the relay has left its room"
    assert (await mod.is_refused(mod.calls("DELETE", f"{SAFETY}/lists/{path(lists_room)}"))).status == 404


async def invites(person: Person, room: str, other: Person) -> bool:
    try:
        await person.invites_to(room, other)
    except Refused:
        return False
    return True


@pytest.mark.parametrize("event_type", sorted(TYPES))
def test_each_name_of_a_rule_counts(event_type: str) -> None:
    kind = TYPES[event_type]
    entity = {"user": "@a:x.example", "room": "!r:x.example", "server": "x.example"}[kind]
    bans = Bans([(event_type, ban(entity))])
    assert bans.match(kind, entity) and bans.count == 1
    assert not any(bans.match(other, entity) for other in ("user", "room", "server") if other != kind)


def test_patterns_ports_and_what_is_no_ban() -> None:
    bans = Bans(
        [
            ("m.policy.rule.user", ban("@spam*:*")),
            ("m.policy.rule.server", ban("*.evil.example")),
            ("m.policy.rule.server", ban("Bad.example")),
            ("m.policy.rule.user", ban("@fine:x.example", "m.allow")),
            ("m.policy.rule.user", {"entity": ["@x:y"], "recommendation": "m.ban"}),
            ("m.policy.rule.user", {}),
            ("m.room.name", ban("@fine:x.example")),
        ]
    )
    assert bans.count == 3
    assert bans.match_user("@spammer:any.example") and bans.match_user("@a:deep.evil.example:8448")
    assert bans.match_server("bad.example:8448") and bans.match_server("BAD.example")
    assert not bans.match_user("@fine:x.example") and not bans.match_server("evil.example")


def test_rules_that_name_by_a_hash_only() -> None:
    """MSC4205: the base64 of the SHA-256 of the whole name."""
    hashed = "VPqwbUV7mMMkOVto3kPwsNXXiALMs7VCKWh3OeqqjGs="
    for key in ("hashes", "org.matrix.msc4205.hashes"):
        bans = Bans([("m.policy.rule.user", {key: {"sha256": hashed}, "recommendation": "m.takedown"})])
        assert bans.count == 1 and bans.match_user("@yarrgh:example.com")
        assert not bans.match_user("@yarrgh:example.org")
    server = base64.b64encode(hashlib.sha256(b"bad.example").digest()).decode()
    bans = Bans([("m.policy.rule.server", {"hashes": {"sha256": server}, "recommendation": "m.ban"})])
    assert bans.match_server("bad.example:8448") and bans.match_user("@a:bad.example")


def test_a_list_is_bounded() -> None:
    bans = Bans(("m.policy.rule.user", ban(f"@u{n}:x")) for n in range(MAX_RULES + 50))
    assert bans.count == MAX_RULES


@given(
    st.dictionaries(
        st.text(max_size=8), st.recursive(st.none() | st.text(max_size=9), lambda x: st.lists(x, max_size=3))
    )
)
def test_whatever_stands_in_a_rule_is_read(content: dict[str, Any]) -> None:
    content.setdefault("recommendation", "m.ban")
    Bans([("m.policy.rule.user", content)]).match_user("@a:x")
