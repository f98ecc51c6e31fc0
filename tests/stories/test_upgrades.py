"""A room is upgraded: who may do it, what moves along, and how everybody finds the way."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.people import Person, path
from tests.town import Town


async def _upgrades(person: Person, room: str, version: str = "12", **more: Any) -> str:
    answer = await person.calls("POST", path("rooms", room, "upgrade"), {"new_version": version, **more})
    return str(answer["replacement_room"])


async def test_what_a_room_is_moves_along(town: Town) -> None:
    alice, bob, eve = await town.users("alice@one", "bob@one", "eve@one")
    old = await alice.creates_room(
        with_=bob, room_version="10", name="Studio", topic="daily", room_alias_name="studio", visibility="public",
        preset="public_chat",
    )  # fmt: skip
    await alice.joins(old)
    await alice.bans(old, eve)
    levels = await alice.reads(old, "m.room.power_levels")
    await alice.sets(old, "m.room.power_levels", {**levels, "users": {alice.id: 100, bob.id: 50}})
    acl = {"allow": ["*"], "deny": ["evil.example"], "allow_ip_literals": False}
    await alice.sets(old, "m.room.server_acl", acl)
    new = await _upgrades(alice, old)
    create = await alice.reads(new, "m.room.create")
    assert create["room_version"] == "12" and create["predecessor"] == {"room_id": old}
    assert (await alice.reads(old, "m.room.tombstone")) == {
        "replacement_room": new,
        "body": "This room has been replaced.",
    }, "with a sentence of the relay's own: clients pass over one without"
    for type in ("m.room.name", "m.room.topic", "m.room.join_rules", "m.room.encryption", "m.room.history_visibility"):
        assert await alice.reads(new, type) == await alice.reads(old, type), f"{type} moves along"
    assert await alice.reads(new, "m.room.server_acl") == acl
    assert (await alice.reads(new, "m.room.member", eve.id))["membership"] == "ban"
    fresh = await alice.reads(new, "m.room.power_levels")
    assert fresh["users"] == {bob.id: 50}, "her own power comes from having made it"
    assert fresh["events"]["m.room.tombstone"] == 150
    alias = f"#studio:{alice.server}"
    assert (await bob.calls("GET", path("directory", "room", alias)))["room_id"] == new
    assert (await alice.reads(new, "m.room.canonical_alias"))["alias"] == alias
    assert await alice.reads(old, "m.room.canonical_alias") == {}
    listed = [one["room_id"] for one in (await bob.calls("GET", "publicRooms"))["chunk"]]
    assert listed == [new], "the directory lists the new one only"
    quiet = await alice.reads(old, "m.room.power_levels")
    assert quiet["events_default"] == 50 and quiet["invite"] == 50
    assert (await eve.is_refused(eve.joins(new))).status == 403, "who was banned stays out"
    assert await bob.joins(new) == new


async def test_who_has_the_power_may_upgrade_and_becomes_a_creator(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    old = await alice.creates_room(with_=[bob, carol])
    assert (await bob.is_refused(_upgrades(bob, old))).status == 403
    refused = await alice.is_refused(_upgrades(alice, old, "0"))
    assert (refused.status, refused.errcode) == (400, "M_UNSUPPORTED_ROOM_VERSION")
    levels = await alice.reads(old, "m.room.power_levels")
    await alice.sets(old, "m.room.power_levels", {**levels, "users": {bob.id: 150, carol.id: 50}})
    new = await _upgrades(bob, old, additional_creators=[carol.id])
    assert (await bob.reads(new, "m.room.create"))["additional_creators"] == [carol.id]
    assert (await bob.reads(new, "m.room.power_levels"))["users"] == {}, "creators are named nowhere else"


async def test_creators_of_a_new_version_keep_their_power_in_an_old_one(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    old = await alice.creates_room(with_=bob, creation_content={"m.federate": False})
    new = await _upgrades(alice, old, "11")
    create = await alice.reads(new, "m.room.create")
    assert create["predecessor"]["room_id"] == old and create["predecessor"]["event_id"].startswith("$")
    assert create["m.federate"] is False
    assert (await alice.reads(new, "m.room.power_levels"))["users"] == {alice.id: 150}, "as high as any level there is"


async def test_a_space_keeps_its_children(town: Town) -> None:
    alice = await town.user("alice@one")
    child = await alice.creates_room()
    space = await alice.creates_room(creation_content={"type": "m.space"}, room_version="11")
    await alice.sets(space, "m.space.child", {"via": [alice.server]}, child)
    new = await _upgrades(alice, space)
    assert (await alice.reads(new, "m.room.create"))["type"] == "m.space"
    assert await alice.reads(new, "m.space.child", child) == {"via": [alice.server]}


async def test_what_people_set_for_the_room_follows_them(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    old = await alice.creates_room(with_=bob, room_version="11", preset="public_chat")
    await bob.calls("PUT", path("user", bob.id, "rooms", old, "tags", "m.favourite"), {"order": 0.5})
    await bob.calls("PUT", path("user", bob.id, "account_data", "m.direct"), {alice.id: [old]})
    await bob.calls("PUT", path("pushrules", "global", "room", old), {"actions": []})
    muted = {"conditions": [{"kind": "event_match", "key": "room_id", "pattern": old}], "actions": []}
    await bob.calls("PUT", path("pushrules", "global", "override", old), muted)
    new = await _upgrades(alice, old)
    assert await bob.notices(lambda: ("m.room.tombstone", "") in bob.state[old]), "he is told where it went on"
    await bob.joins(new, alice.server)
    assert await bob.notices(lambda: bob.account_data.get("m.direct") == {alice.id: [old, new]})
    tags = await bob.calls("GET", path("user", bob.id, "rooms", new, "tags"))
    assert tags["tags"] == {"m.favourite": {"order": 0.5}}

    def rules(kind: str) -> list[str]:
        return [rule["rule_id"] for rule in bob.account_data.get("m.push_rules", {}).get("global", {}).get(kind, [])]

    assert await bob.notices(lambda: new in rules("room") and new in rules("override")), "muted stays muted"
    rule = await bob.calls("GET", path("pushrules", "global", "override", new))
    assert rule["conditions"][0]["pattern"] == new


async def test_nobody_s_settings_are_taken_by_a_room_that_only_claims_to_be_the_next(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    private = await alice.creates_room()
    await alice.calls("PUT", path("user", alice.id, "rooms", private, "tags", "u.mine"), {})
    claims = {"predecessor": {"room_id": private}}
    new = await bob.creates_room(creation_content=claims, preset="public_chat")
    await bob.joins(new)
    tags = await bob.calls("GET", path("user", bob.id, "rooms", new, "tags"))
    assert tags["tags"] == {}, "bob was never in the other room"


async def test_a_room_has_one_beginning(town: Town) -> None:
    alice = await town.user("alice@one")
    room = await alice.creates_room()
    refused = await alice.is_refused(alice.sets(room, "m.room.create", {"room_version": "12", "relay.nonce": "x"}))
    assert (refused.status, refused.errcode) == (400, "M_BAD_JSON")


async def test_two_impatient_requests_make_one_room(town: Town) -> None:
    alice = await town.user("alice@one")
    old = await alice.creates_room(room_version="11")
    first, second = await asyncio.gather(_upgrades(alice, old), _upgrades(alice, old))
    assert first == second
