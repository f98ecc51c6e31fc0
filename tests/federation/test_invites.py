"""Invites from other servers to people here: nothing but an invite is ever signed, and nothing readable is kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from federation import invites
from relay.protocol.event import co_sign, parse
from relay.protocol.versions import VERSIONS
from tests.federation.residence import ALICE, US, V2, FarRoom, Residence, at


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[Residence]:
    async with Residence(tmp_path).open() as opened:
        yield opened


async def kept(house: Residence, room: FarRoom, user_id: str = ALICE) -> list[dict[str, Any]] | None:
    raw = await house.db.read(
        lambda query: query.value(
            "SELECT m.stripped FROM memberships m JOIN rooms r ON r.nid = m.room_nid WHERE r.room_id = $1 AND m.user_id = $2",
            room.room_id,
            user_id,
        )
    )
    return orjson.loads(raw) if raw is not None else None


@pytest.mark.parametrize("version", ["10", "11", "12"])
async def test_an_invite_is_signed_and_kept(house: Residence, version: str) -> None:
    away = house.peer("two.example").room(version)
    invite = away.member(ALICE, "invite")
    answer = await away.invites(invite)
    assert answer.status == 200, answer.json
    signed = parse(answer.json["event"], VERSIONS[version])
    assert signed.id == invite.id, "it is the event that was sent"
    assert signed.pdu["signatures"].keys() == {"two.example", US}, "with our signature beside theirs"
    assert all(await house.wire.verified([signed])), "and theirs still holds"
    assert signed.pdu["signatures"] == co_sign(invite, US, house.key).pdu["signatures"], "so does ours"
    assert house.rooms.membership(away.room_id, ALICE) == "invite", "Alice is invited"
    told = await kept(house, away)
    assert told is not None and {one["type"] for one in told} == {
        "m.room.create", "m.room.join_rules", "m.room.encryption", "m.room.name"
    }, "she learns what the room is"  # fmt: skip
    form = {"type", "state_key", "content", "sender"}
    assert all(one.keys() == form for one in told if one["type"] != "m.room.create"), "in the stripped form"
    create = next(one for one in told if one["type"] == "m.room.create")
    more = {"event_id", "origin_server_ts"} if version == "12" else set()
    assert create.keys() == form | more, "with what makes the room's ID, where that is the create event's"


async def test_stripped_state_is_taken_before_version_12_and_refused_from_then_on(house: Residence) -> None:
    stripped = [{"type": "m.room.name", "state_key": "", "content": {"name": "Old"}, "sender": "@host:two.example"}]
    old, new = house.peer("two.example").room("11"), house.peer("three.example").room("12")
    assert (await old.invites(old.member(ALICE, "invite"), stripped)).status == 200, "old servers send it like that"
    assert await kept(house, old) == stripped, "and Alice sees it"
    answer = await new.invites(new.member(ALICE, "invite"), stripped)
    assert (answer.status, answer.errcode) == (400, "M_INVALID_PARAM"), "since version 12 whole events are due"


async def test_from_version_12_on_the_room_is_proven(house: Residence) -> None:
    away, other = house.peer("two.example").room(), house.peer("three.example").room()
    without = [event.pdu for event in away.state[1:]]
    answer = await away.invites(away.member(ALICE, "invite"), without)
    assert (answer.status, answer.errcode) == (400, "M_INVALID_PARAM"), "the create event is missing"
    mixed = [event.pdu for event in (*away.state, other.state[1])]
    answer = await away.invites(away.member(ALICE, "invite"), mixed)
    assert (answer.status, answer.errcode) == (400, "M_INVALID_PARAM"), "an event of another room is among them"
    forged = [*(event.pdu for event in away.state[:3]), {**away.state[3].pdu, "signatures": {}}]
    assert (await away.invites(away.member(ALICE, "invite"), forged)).status == 200, "what can't be verified"
    assert "m.room.name" not in {one["type"] for one in await kept(house, away) or ()}, "is left out"
    assert (await away.invites(away.member(ALICE, "invite"), without * 20)).status == 400, "and all of it is bounded"


async def test_what_is_told_of_a_room_goes_through_the_seal(house: Residence) -> None:
    away = house.peer("two.example").room("11")
    told = [
        *(event.pdu for event in away.state),
        {"type": "com.example.note", "state_key": "", "content": {"text": "read me"}, "sender": away.host},
    ]
    assert (await away.invites(away.member(ALICE, "invite"), told)).status == 200, "the invite is good"
    assert "com.example.note" not in {one["type"] for one in await kept(house, away) or ()}, "free text is not kept"


async def test_only_an_invite_of_the_asking_server_to_somebody_here_is_signed(house: Residence) -> None:
    away = house.peer("two.example").room()
    for event, why in (
        (away.member(ALICE, "join"), "it is no invite"),
        (away.member(ALICE, "invite", "@host:three.example"), "its sender is of another server"),
        (away.member("@carol:three.example", "invite"), "the invited user is of another server"),
        (away.event("m.room.name", {"membership": "invite", "name": "x"}, ALICE), "it is no member event"),
        (away.member(ALICE, "invite", third_party_invite={"signed": {}}), "it bears a third-party invite"),
    ):
        answer = await away.invites(event)
        assert (answer.status, answer.errcode) == (400, "M_INVALID_PARAM"), f"refused, since {why}: {answer.json}"
        assert "event" not in answer.json, "and nothing is signed"
    invite = away.member(ALICE, "invite")
    forged = {**invite.pdu, "signatures": {"two.example": {"ed25519:far": "A" * 86}}}
    answer = await away.invites(invite, event=forged)
    assert (answer.status, answer.errcode) == (400, "M_INVALID_PARAM"), "a signature that does not hold is no signature"
    changed = {**invite.pdu, "content": {"membership": "invite", "displayname": "Not Alice"}}
    answer = await away.invites(invite, event=changed)
    assert (answer.status, answer.errcode) == (400, "M_INVALID_PARAM"), "nor does the hash cover another content"
    fraction = {**invite.pdu, "content": {"membership": "invite", "org.example.half": 0.5}}
    answer = await away.invites(invite, event=fraction)
    assert (answer.status, answer.errcode) == (400, "M_BAD_JSON"), "what no event may hold is no event"
    assert house.rooms.membership(away.room_id, ALICE) is None, "Alice hears of none of it"


async def test_strangers_can_not_fill_the_disk_with_invites(house: Residence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invites, "MAX_UNANSWERED", 2)
    two = house.peer("two.example")
    rooms = [two.room() for _ in range(3)]
    answers = [await room.invites(room.member(ALICE, "invite")) for room in rooms]
    assert [one.status for one in answers] == [200, 200, 403], "unanswered invites have a bound"


async def test_what_stands_against_an_invite_is_said(house: Residence) -> None:
    away = house.peer("two.example").room()
    invite = away.member(ALICE, "invite")
    answer = await away.invites(invite, room_version="org.example.new")
    assert (answer.status, answer.errcode) == (400, "M_INCOMPATIBLE_ROOM_VERSION"), "we do not speak that version"
    assert answer.json["room_version"] == "org.example.new", "and the answer names it"
    nobody = away.member(f"@nobody:{US}", "invite")
    answer = await away.invites(nobody)
    assert (answer.status, answer.errcode) == (404, "M_NOT_FOUND"), "there is no such account"
    house.doors.unwelcome.add(away.host)
    answer = await away.invites(invite)
    assert (answer.status, answer.errcode) == (403, "M_INVITE_BLOCKED"), "Alice takes no invites from this person"
    assert house.rooms.membership(away.room_id, ALICE) is None, "so she does not hear of it"


async def test_an_invite_to_a_room_that_we_are_in_waits_for_the_transaction(house: Residence) -> None:
    room, two = await house.room(preset="public_chat", who=ALICE), house.peer("two.example")
    await two.lives_in(room, "carol")
    await house.sets(room, "m.room.power_levels", {**(await room.content("m.room.power_levels")), "invite": 0})
    bob = f"@bob:{US}"
    invite = await two.writes(room, "carol", type="m.room.member", content={"membership": "invite"}, state_key=bob)
    create = await room.event("m.room.create")
    assert create is not None
    body = {"room_version": "12", "event": invite.pdu, "invite_room_state": [create.pdu]}
    answer = await two.asks("PUT", at(f"{V2}/invite", room.room_id, invite.id), body)
    assert answer.status == 200, answer.json
    assert room.membership(bob) is None, "it is signed, and not yet part of the room"
    signed = parse(answer.json["event"], room.version)
    await two.transmits(signed)
    assert room.membership(bob) == "invite", "once it comes with a transaction, it is"
    assert house.rooms.membership(room.room_id, bob) == "invite", "and Bob is told"
