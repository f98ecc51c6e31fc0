"""People of other servers come, knock and leave through us; the rules hold for them as they hold for everybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from relay.protocol.event import parse
from relay.protocol.versions import VERSIONS
from relay.rooms.room import Room
from relay.rooms.store import FAN_OUT
from tests.federation.residence import ALICE, US, V1, V2, Residence, at


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[Residence]:
    async with Residence(tmp_path).open() as opened:
        yield opened


def ids(room: Room, pdus: list[dict[str, Any]]) -> set[str]:
    return {parse(pdu, room.version).id for pdu in pdus}


@pytest.mark.parametrize("version", sorted(VERSIONS, key=int))
async def test_somebody_joins_through_us(house: Residence, version: str) -> None:
    room, two = await house.room(version=version, preset="public_chat"), house.peer("two.example")
    before = set(room.state.values())
    answer = await two.joins(room, "carol")
    assert answer.status == 200, answer.json
    assert room.membership("@carol:two.example") == "join", "she is in the room"
    assert answer.json["members_omitted"] is False, "all members are told"
    assert parse(answer.json["event"], room.version).id == answer.sent.id, "her event comes back"
    assert ids(room, answer.json["state"]) == before, "with the state that held before it"
    chain, told = ids(room, answer.json["auth_chain"]), {parse(p, room.version).id for p in answer.json["state"]}
    cited = {
        c for p in answer.json["state"] + answer.json["auth_chain"] + [answer.json["event"]] for c in p["auth_events"]
    }
    assert cited <= chain, "and everything that authorises it"
    assert told, "the state is not empty"


async def test_a_join_is_passed_on_to_the_other_servers(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    answer = await two.joins(room, "carol")
    one = await house.rooms.event(answer.sent.id)
    assert one is not None and one.marks & FAN_OUT, "the outbox finds its mark in the log"


async def test_a_join_that_is_sent_twice_happens_once(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    made = await two.template("join", room, two.user("carol"))
    event = two.signs(made.json["event"])
    first, second = await asyncio.gather(two.sends("join", event), two.sends("join", event))
    third = await two.sends("join", event)
    assert first.json == second.json == third.json, "each attempt gets the same answer"
    assert [one.id for one in room.recent].count(event.id) == 1, "the room has it once"


async def test_who_is_in_the_room_is_told_where_it_is_asked(house: Residence) -> None:
    room, two, three = await house.room(preset="public_chat"), house.peer("two.example"), house.peer("three.example")
    await two.lives_in(room, "carol")
    answer = await three.joins(room, "dave", query="omit_members=true")
    assert answer.json["servers_in_room"] == [US, "two.example"], "the servers that were there before"
    assert answer.json["members_omitted"] is True, "members come later"
    told = {(pdu["type"], pdu["state_key"]) for pdu in answer.json["state"]}
    assert {key for kind, key in told if kind == "m.room.member"} == {ALICE, two.user("carol")}, (
        "but those whose names stand for a room without a name are told"
    )
    assert {key for key in room.state if key[0] != "m.room.member"} <= told, "and everything else"
    chain = ids(room, answer.json["auth_chain"])
    assert chain.isdisjoint(ids(room, answer.json["state"])), "nothing is told twice"
    cited = {
        c for p in answer.json["state"] + answer.json["auth_chain"] + [answer.json["event"]] for c in p["auth_events"]
    }
    assert cited <= chain | ids(room, answer.json["state"]), "and nothing that authorises it is missing"
    await house.sets(room, "m.room.name", {"name": "kitchen"})
    again = await two.joins(room, "carla", query="omit_members=true")
    assert again.json["servers_in_room"] == [US, "three.example", "two.example"], "its own is among them now"
    assert not [p for p in again.json["state"] if p["type"] == "m.room.member"], "a name stands for itself"


async def test_the_template_is_bare(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    made = await two.template("join", room, two.user("carol"))
    assert made.json["room_version"] == "12", "it names the room's version"
    event = made.json["event"]
    assert not {"hashes", "signatures", "unsigned", "event_id"} & event.keys(), (
        "what the joining server adds is not there"
    )
    assert (event["type"], event["sender"], event["state_key"], event["room_id"]) == (
        "m.room.member", two.user("carol"), two.user("carol"), room.room_id,
    ), "it is her own member event"  # fmt: skip
    assert event["content"] == {"membership": "join"}, "and says nothing but that"
    assert event["prev_events"] == list(room.extremities), "it builds on the room's latest event"


async def test_templates_are_refused_with_the_reason(house: Residence) -> None:
    public, private = await house.room(preset="public_chat"), await house.room()
    two = house.peer("two.example")
    carol = two.user("carol")
    answer = await two.asks("GET", at(f"{V1}/make_join", public.room_id, carol, query="ver=1&ver=11"))
    assert (answer.status, answer.errcode) == (400, "M_INCOMPATIBLE_ROOM_VERSION"), "its versions do not fit"
    assert answer.json["room_version"] == "12", "the answer says which is needed"
    answer = await two.asks("GET", at(f"{V1}/make_join", public.room_id, carol))
    assert answer.errcode == "M_INCOMPATIBLE_ROOM_VERSION", "who names no version speaks only the first"
    answer = await two.template("join", public, "@dave:three.example")
    assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN"), "a server asks for its own users only"
    answer = await two.template("join", private, carol)
    assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN"), "she is not invited"
    answer = await two.template("leave", public, carol)
    assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN"), "who is not there can't leave"
    answer = await two.asks("GET", at(f"{V1}/make_join", "!unheard", carol, query="ver=12"))
    assert (answer.status, answer.errcode) == (404, "M_NOT_FOUND"), "the room is not known"
    await house.members.leave(ALICE, public.room_id)
    answer = await two.template("join", public, carol)
    assert (answer.status, answer.errcode) == (404, "M_NOT_FOUND"), "nobody here is in the room any more"


async def test_a_server_that_the_room_denies_gets_nothing(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    made = await two.template("join", room, two.user("carol"))
    event = two.signs(made.json["event"])
    await house.sets(room, "m.room.server_acl", {"allow": ["*"], "deny": ["two.example"]})
    for answer in (
        await two.sends("join", event),
        await two.template("join", room, two.user("carol")),
        await two.template("leave", room, two.user("carol")),
        await two.template("knock", room, two.user("carol")),
    ):
        assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN"), f"the list denies it: {answer.json}"
    assert room.membership(two.user("carol")) is None, "and nobody came in"


async def test_a_signed_event_must_be_the_join_that_it_claims_to_be(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    carol = two.user("carol")
    made = (await two.template("join", room, carol)).json["event"]
    good = two.signs(made)

    async def sent(pdu: dict[str, Any], room_id: str = room.room_id, event_id: str | None = None) -> Any:
        name = event_id or parse(pdu, room.version).id
        return await two.asks("PUT", at(f"{V2}/send_join", room_id, name), pdu)

    for pdu, why in (
        ({**made, "content": {"membership": "leave"}}, "its membership is another"),
        ({**made, "type": "m.room.name"}, "it is no member event"),
        ({**made, "state_key": "@dave:two.example"}, "it is about somebody else"),
        ({**made, "sender": "@dave:three.example", "state_key": "@dave:three.example"}, "it is of another server"),
        ({**made, "room_id": "!another"}, "it is of another room"),
    ):
        answer = await sent(two.signs(pdu).pdu)
        assert (answer.status, answer.errcode) == (400, "M_INVALID_PARAM"), f"refused, since {why}: {answer.json}"
    answer = await sent(good.pdu, event_id="$another")
    assert answer.errcode == "M_INVALID_PARAM", "the path names another event"
    answer = await sent({**good.pdu, "signatures": {two.name: {"ed25519:far": "A" * 86}}})
    assert (answer.status, answer.errcode) == (400, "M_INVALID_PARAM"), "the signature does not hold"
    answer = await sent({**good.pdu, "content": {"membership": "join", "displayname": "C"}})
    assert answer.errcode == "M_INVALID_PARAM", "the content is another than the one that was hashed"
    answer = await sent({**good.pdu, "depth": "deep"}, event_id=good.id)
    assert (answer.status, answer.errcode) == (400, "M_BAD_JSON"), "it is not even an event"
    assert room.membership(carol) is None, "none of that let her in"
    assert (await sent(good.pdu)).status == 200, "the honest one does"


async def test_a_ban_between_the_two_steps_counts(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    carol = two.user("carol")
    event = two.signs((await two.template("join", room, carol)).json["event"])
    await house.members.ban(ALICE, room.room_id, carol)
    answer = await two.sends("join", event)
    assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN"), "she was banned meanwhile"
    assert room.membership(carol) == "ban", "and stays banned"
    assert (await two.sends("join", event)).status == 403, "however often it is sent"


async def test_the_room_moved_on_between_the_two_steps(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    event = two.signs((await two.template("join", room, two.user("carol"))).json["event"])
    said = await house.says(room)
    named = await house.sets(room, "m.room.name", {"name": "Later"})
    answer = await two.sends("join", event)
    assert answer.status == 200, answer.json
    assert room.membership(two.user("carol")) == "join", "she joins beside what happened since"
    assert named.id not in ids(room, answer.json["state"]), "the state is that of her join's own place"
    assert set(room.extremities) == {named.id, event.id}, "the room has two ends now"
    assert said.id in [one.id for one in room.recent], "and nothing was lost"


# --- restricted rooms


async def restricted(house: Residence, *allowed: str, **more: Any) -> Room:
    allow = [{"type": "m.room_membership", "room_id": room_id} for room_id in allowed]
    rule = {"type": "m.room.join_rules", "state_key": "", "content": {"join_rule": "restricted", "allow": allow}}
    return await house.room(initial_state=[rule], **more)


async def test_a_member_of_the_right_room_is_vouched_for(house: Residence) -> None:
    club, two = await house.room(preset="public_chat"), house.peer("two.example")
    room = await restricted(house, club.room_id)
    await two.lives_in(club, "carol")
    made = await two.template("join", room, two.user("carol"))
    assert made.json["event"]["content"]["join_authorised_via_users_server"] == ALICE, "Alice vouches for her"
    answer = await two.joins(room, "carol")
    assert answer.status == 200, answer.json
    returned = parse(answer.json["event"], room.version)
    assert US in returned.pdu["signatures"], "the event comes back with our signature"
    assert all(await house.wire.verified([returned])), "and both signatures hold"
    stored = await house.rooms.event(returned.id)
    assert stored is not None and US in stored.event.pdu["signatures"], "so it is passed on with it"


async def test_who_fulfils_no_condition_stays_outside(house: Residence) -> None:
    club, two = await house.room(preset="public_chat"), house.peer("two.example")
    room, unseen = await restricted(house, club.room_id), await restricted(house, club.room_id, "!elsewhere")
    answer = await two.template("join", room, two.user("carol"))
    assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN"), "we see that she is in none of the rooms"
    answer = await two.template("join", unseen, two.user("carol"))
    assert (answer.status, answer.errcode) == (400, "M_UNABLE_TO_AUTHORISE_JOIN"), "here we can't see it"


async def test_nobody_who_could_vouch_is_here(house: Residence) -> None:
    club, two = await house.room(preset="public_chat"), house.peer("two.example")
    room = await restricted(house, club.room_id, version="11", power_level_content_override={"invite": 50})
    await two.lives_in(club, "carol")
    levels = await room.content("m.room.power_levels")
    await house.sets(room, "m.room.power_levels", {**levels, "invite": 100, "users": {ALICE: 100}})
    await house.sets(room, "m.room.power_levels", {**levels, "invite": 100, "users": {ALICE: 99}})
    answer = await two.template("join", room, two.user("carol"))
    assert (answer.status, answer.errcode) == (400, "M_UNABLE_TO_GRANT_JOIN"), "another server may have somebody"


async def test_a_vouching_that_was_not_given_is_not_signed(house: Residence) -> None:
    club, two = await house.room(preset="public_chat"), house.peer("two.example")
    room = await restricted(house, club.room_id)
    await two.lives_in(club, "carol")
    made = (await two.template("join", room, two.user("carol"))).json["event"]
    stranger = two.user("mallory")
    claimed = two.signs({**made, "sender": stranger, "state_key": stranger})
    answer = await two.sends("join", claimed)
    assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN"), "it is asked once more when the event comes"
    elsewhere = two.signs(
        {**made, "content": {**made["content"], "join_authorised_via_users_server": "@x:three.example"}}
    )
    answer = await two.sends("join", elsewhere)
    assert (answer.status, answer.errcode) == (400, "M_INVALID_PARAM"), "nobody here can sign for another server's user"
    bare = two.signs({**made, "content": {"membership": "join"}})
    assert (await two.sends("join", bare)).status == 403, "without a voucher the rules refuse it"


async def test_an_invited_person_needs_no_voucher(house: Residence) -> None:
    room, two = await restricted(house, "!elsewhere"), house.peer("two.example")
    carol = two.user("carol")
    await invited(house, room, carol)
    made = await two.template("join", room, carol)
    assert "join_authorised_via_users_server" not in made.json["event"]["content"], "the invite is enough"
    assert (await two.joins(room, "carol")).status == 200, "and she comes in"


async def invited(house: Residence, room: Room, user_id: str) -> None:
    """As if its server had signed the invite."""
    await house.members._change(room.room_id, sender=ALICE, target=user_id, content={"membership": "invite"})


# --- leaving


async def test_somebody_leaves_through_us(house: Residence) -> None:
    room, two = await house.room(preset="public_chat"), house.peer("two.example")
    carol = await two.lives_in(room, "carol")
    made = await two.template("leave", room, carol)
    assert made.json["event"]["content"] == {"membership": "leave"}, "the template is a leave"
    event = two.signs(made.json["event"])
    answer = await two.sends("leave", event)
    assert (answer.status, answer.json) == (200, {}), answer.json
    assert room.membership(carol) == "leave", "she is gone"
    one = await house.rooms.event(event.id)
    assert one is not None and one.marks & FAN_OUT, "and the others will hear of it"
    assert (await two.sends("leave", event)).status == 200, "a retry finds it done"


async def test_an_invite_is_turned_down_through_us(house: Residence) -> None:
    room, two = await house.room(), house.peer("two.example")
    carol = two.user("carol")
    await invited(house, room, carol)
    event = two.signs((await two.template("leave", room, carol)).json["event"])
    assert (await two.sends("leave", event)).status == 200, "her server need not be in the room"
    assert room.membership(carol) == "leave", "the invite is answered"


async def test_nobody_is_put_out_with_a_leave_of_ones_own(house: Residence) -> None:
    room, two, three = await house.room(preset="public_chat"), house.peer("two.example"), house.peer("three.example")
    carol = await two.lives_in(room, "carol")
    made = (await two.template("leave", room, carol)).json["event"]
    await three.lives_in(room, "dave")
    forged = three.signs({**made, "sender": three.user("dave")})
    answer = await three.sends("leave", forged)
    assert (answer.status, answer.errcode) == (400, "M_INVALID_PARAM"), "a leave is about its sender"
    assert room.membership(carol) == "join", "Carol stays"


# --- knocking


async def test_somebody_knocks(house: Residence) -> None:
    rule = {"type": "m.room.join_rules", "state_key": "", "content": {"join_rule": "knock"}}
    room, two = await house.room(initial_state=[rule], name="A quiet place"), house.peer("two.example")
    carol = two.user("carol")
    made = await two.template("knock", room, carol)
    assert made.status == 200, made.json
    event = two.signs(made.json["event"])
    answer = await two.sends("knock", event)
    assert answer.status == 200, answer.json
    assert room.membership(carol) == "knock", "the members see the knock"
    told = [parse(pdu, room.version) for pdu in answer.json["knock_room_state"]]
    assert {one.type for one in told} >= {"m.room.create", "m.room.join_rules", "m.room.name"}, "she sees what it is"
    assert not any(one.type == "m.room.member" for one in told), "and not who is in it"
    again = await two.template("leave", room, carol)
    assert again.status == 200, "a knock can be taken back"


async def test_where_knocking_is_not_allowed_nobody_knocks(house: Residence) -> None:
    room, old, two = await house.room(), await house.room(version="6"), house.peer("two.example")
    for where in (room, old):
        answer = await two.template("knock", where, two.user("carol"))
        assert (answer.status, answer.errcode) == (403, "M_FORBIDDEN"), f"not in version {where.version}: {answer.json}"
    answer = await two.asks("GET", at(f"{V1}/make_knock", room.room_id, two.user("carol"), query="ver=7"))
    assert answer.errcode == "M_INCOMPATIBLE_ROOM_VERSION", "and the versions have to fit"
