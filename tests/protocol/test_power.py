"""Power levels: defaults, creators, and the ways old rooms write numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from relay.protocol.power import Levels, creators, read_level
from relay.protocol.versions import VERSIONS
from tests.protocol.drawn_room import ALICE, BOB, CAROL, DAVE, DrawnRoom


def levels_of(room: DrawnRoom, content: dict[str, Any] | None = None) -> Levels:
    return Levels.of(room.create, None if content is None else room.draw("m.room.power_levels", ALICE, content, ""))


@pytest.mark.parametrize("version", list(VERSIONS))
@pytest.mark.parametrize("content", [None, {}])
def test_defaults(version: str, content: dict[str, Any] | None) -> None:
    levels = levels_of(DrawnRoom(version), content)
    assert (levels.ban, levels.kick, levels.redact, levels.invite) == (50, 50, 50, 0), "moderation takes 50, inviting 0"
    assert (levels.state_default, levels.events_default, levels.users_default) == (50, 0, 0), "state takes 50"
    assert (levels.to_send("m.room.name", True), levels.to_send("m.room.message", False)) == (50, 0), "for all types"
    assert levels.to_notify("room") == 50, "so does telling everybody"
    assert levels.user(BOB) == 0, "a user has nothing"


@pytest.mark.parametrize("version", list(VERSIONS))
def test_a_creator_without_a_power_levels_event(version: str) -> None:
    expected = math.inf if version == "12" else 100
    assert levels_of(DrawnRoom(version)).user(ALICE) == expected, "the creator has the say"
    with_event = levels_of(DrawnRoom(version), {"users": {BOB: 7}, "users_default": 3})
    assert with_event.user(ALICE) == (math.inf if version == "12" else 3), "before 12 only while there are no levels"
    assert (with_event.user(BOB), with_event.user(CAROL)) == (7, 3), "others have what is said"


def test_who_the_creators_are() -> None:
    several = DrawnRoom("12", additional_creators=[BOB, CAROL])
    assert creators(several.create) == {ALICE, BOB, CAROL}, "version 12 knows several"
    levels = levels_of(several, {"users": {DAVE: 2**53 - 1}})
    assert levels.user(BOB) > levels.user(DAVE), "no integer reaches a creator"
    assert creators(DrawnRoom("11", additional_creators=[BOB]).create) == {ALICE}, "before 12 there is one"
    assert creators(DrawnRoom("11", creator=ALICE).create) == {ALICE}, "version 11 takes the sender"
    named = DrawnRoom("10")
    other = named.draw("m.room.create", ALICE, {"creator": BOB, "room_version": "10"}, "", prev=[], auth=[])
    assert creators(other) == {BOB}, "version 10 takes content.creator"
    odd = named.draw("m.room.create", ALICE, {"creator": 5}, "", prev=[], auth=[])
    assert creators(odd) == frozenset(), "which may be nonsense"


def test_a_type_has_its_own_level() -> None:
    levels = levels_of(
        DrawnRoom(),
        {"events": {"m.room.name": 20, "m.room.message": 10}, "state_default": 60, "events_default": 5, "notifications": {"room": 1}},
    )  # fmt: skip
    assert (levels.to_send("m.room.name", True), levels.to_send("m.room.topic", True)) == (20, 60), "state"
    assert (levels.to_send("m.room.message", False), levels.to_send("m.sticker", False)) == (10, 5), "messages"
    assert levels.to_notify("room") == 1, "notifications"


def test_who_may_redact() -> None:
    levels = levels_of(DrawnRoom("11"), {"users": {BOB: 50}, "redact": 50})
    assert levels.may_redact(BOB, CAROL), "who has the redact level"
    assert levels.may_redact(DAVE, ALICE), "who is on the author's server"
    assert not levels.may_redact(CAROL, ALICE), "nobody else"


@pytest.mark.parametrize(
    ("written", "old"),
    [
        (50, 50),
        (-3, -3),
        ("50", 50),
        ("000100", 100),
        ("+5", 5),
        ("-5", -5),
        (" 10 \t", 10),
        (51146.98, 51146),
        (-1.9, -1),
        ("1.5", None),
        ("1e3", None),
        ("1_000", None),
        ("", None),
        ("--5", None),
        ("٣", None),
        ("9" * 5000, None),
        (math.inf, None),
        (math.nan, None),
        (True, None),
        (None, None),
        ([], None),
        ({}, None),
    ],
)
def test_how_a_level_is_written(written: Any, old: int | None) -> None:
    assert read_level(written, VERSIONS["9"]) == old, "before version 10 numbers come in strings and floats"
    assert read_level(written, VERSIONS["10"]) == (written if type(written) is int else None), "since then they don't"


def test_nonsense_in_the_levels_is_as_good_as_nothing() -> None:
    room = DrawnRoom("9")
    levels = levels_of(
        room, {"users": [], "events": "x", "ban": {}, "kick": None, "notifications": 5, "state_default": []}
    )
    assert (levels.user(ALICE), levels.ban, levels.kick, levels.to_send("x", True)) == (0, 50, 50, 50), "defaults hold"
