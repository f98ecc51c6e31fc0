"""The verdict on a peer's event: cited events first, then the state before it, then the state of today."""

from __future__ import annotations

import pytest

from relay.protocol.event import Event
from relay.protocol.judge import judge
from tests.protocol.drawn_room import ALICE, BOB, DrawnRoom


def public_room(version: str) -> DrawnRoom:
    room = DrawnRoom(version)
    room.add("m.room.join_rules", ALICE, {"join_rule": "public"}, "")
    room.member(BOB, "join")
    return room


BANNED = {"membership": "ban"}


@pytest.mark.parametrize("version", ["3", "10", "11", "12"])
def test_bob_and_the_ban(version: str) -> None:
    room = public_room(version)
    message = room.draw("m.room.message", BOB, {"body": "hello"})
    cited, before = room.cited(message), dict(room.state)
    verdict = judge(message, cited, (), before, room.state, room.create)
    assert (verdict.outcome, verdict.rule, verdict.reason) == ("accepted", "", ""), "a member's message is good"
    assert judge(message, cited, (), before, None, room.create).outcome == "accepted", "also in a room without a today"

    rejected = judge(message, cited, {cited[-1].id}, before, before, room.create)
    assert (rejected.outcome, rejected.rule) == ("rejected", "4/3.3"), "what it cites was rejected"

    room.member(BOB, "ban", by=ALICE)
    late = judge(message, cited, (), before, room.state, room.create)
    assert (late.outcome, late.rule) == ("soft_failed", "6/7"), "it was good then, but he is banned today"
    assert late.reason, "a verdict gives its reason"

    after = judge(message, cited, (), room.state, before, room.create)
    assert (after.outcome, after.rule) == ("rejected", "5/7"), "he was banned before it"

    ban = room.state["m.room.member", BOB]
    honest: list[Event] = [ban if known.key == ban.key else known for known in cited]
    both = judge(message, honest, (), room.state, room.state, room.create)
    assert (both.outcome, both.rule) == ("rejected", "4/7"), "it cites the ban itself"


@pytest.mark.parametrize("version", ["3", "10", "11", "12"])
def test_the_first_event_of_a_room(version: str) -> None:
    room = DrawnRoom(version)
    assert judge(room.create, [], (), {}, None, None).outcome == "accepted", "a create event needs nothing before it"
    join = room.draw("m.room.member", ALICE, {"membership": "join"}, ALICE, prev=[room.create.id], auth=[])
    cited = [] if version == "12" else [room.create]
    state = {("m.room.create", ""): room.create}
    assert judge(join, cited, (), state, state, room.create).outcome == "accepted", "then its creator joins"
    other = DrawnRoom(version, creator=BOB)
    wrong = judge(join, [] if version == "12" else [other.create], (), state, state, other.create)
    assert wrong.rule == ("4/2" if version == "12" else "4/3.5"), "not into another room"
