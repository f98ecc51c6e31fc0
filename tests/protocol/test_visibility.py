"""History visibility: each rule of the standard with an event that may be seen and one that may not."""

from __future__ import annotations

import pytest

from relay.protocol.visibility import may_see, visibility_of, visible_to_server


@pytest.mark.parametrize(
    ("visibility", "membership", "joined_later", "expected"),
    [
        ("world_readable", None, False, True),
        ("world_readable", "ban", False, True),
        ("shared", "join", False, True),
        ("shared", None, True, True),
        ("shared", None, False, False),
        ("shared", "invite", False, False),
        ("shared", "leave", True, True),
        ("invited", "invite", False, True),
        ("invited", "join", False, True),
        ("invited", None, True, False),
        ("invited", "leave", True, False),
        ("invited", "knock", False, False),
        ("joined", "join", False, True),
        ("joined", "invite", True, False),
        ("joined", None, True, False),
        ("joined", "leave", True, False),
        ("something new", None, True, True),
        ("something new", None, False, False),
    ],
)
def test_the_five_rules(visibility: str, membership: str | None, joined_later: bool, expected: bool) -> None:
    answer = may_see(visibility, membership, joined_later=joined_later)
    assert answer is expected, f"{membership} in a room whose history is {visibility}"


def test_a_change_of_visibility_is_seen_if_either_side_allows_it() -> None:
    assert may_see("world_readable", None, visibility_after="joined"), "the setting before lets everybody see"
    assert may_see("joined", None, visibility_after="world_readable"), "the setting after lets everybody see"
    assert not may_see("joined", None, visibility_after="invited"), "neither side lets a stranger see"
    assert may_see("joined", "invite", visibility_after="invited"), "an invited user sees by the new setting"


def test_everybody_sees_their_own_membership_change() -> None:
    assert may_see("joined", None, "join", is_own_membership=True), "their join"
    assert may_see("joined", "join", "leave", is_own_membership=True), "their leaving"
    assert may_see("joined", "join", "ban", is_own_membership=True), "their ban"
    assert may_see("joined", None, "invite", is_own_membership=True), "an invite"
    assert may_see("joined", "invite", "leave", is_own_membership=True), "an invite that was withdrawn"
    assert may_see("joined", "knock", "leave", is_own_membership=True), "a knock that was turned down"
    assert not may_see("joined", None, "join"), "somebody else's join is not theirs"
    assert not may_see("joined", "leave", "ban", is_own_membership=True), "a ban of somebody who had left"


def test_the_setting_is_read_from_its_event() -> None:
    assert visibility_of(None) == "shared", "no event"
    assert visibility_of({}) == "shared", "an event without a setting"
    assert visibility_of({"history_visibility": ["joined"]}) == "shared", "a setting that is not understood"
    assert visibility_of({"history_visibility": "joined"}) == "joined", "a setting"


@pytest.mark.parametrize(
    ("visibility", "memberships", "expected"),
    [
        ("shared", [], True),
        ("world_readable", [], True),
        ("joined", [], False),
        ("joined", ["invite", "leave"], False),
        ("joined", ["leave", "join"], True),
        ("invited", ["invite"], True),
        ("invited", ["leave", None], False),
    ],
)
def test_a_server_sees_what_one_of_its_users_sees(
    visibility: str, memberships: list[str | None], expected: bool
) -> None:
    assert visible_to_server(visibility, memberships) is expected, f"{memberships} under {visibility}"


def test_a_server_sees_a_change_of_visibility_by_either_side() -> None:
    assert visible_to_server("joined", [], visibility_after="shared"), "the new setting is open"
    assert not visible_to_server("joined", ["leave"], visibility_after="invited"), "neither is"
