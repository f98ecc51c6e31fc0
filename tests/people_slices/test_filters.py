"""Filters: stored once, parsed strictly, and matching as the standard says."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import ApiError, BadJson, InvalidParam, NotJson, TooLarge
from relay.people.filters import EVERYTHING, EventFilter, Filter, parse, parse_event_filter
from tests.accounts.front_door import House

LAZY = {"room": {"timeline": {"limit": 20, "unknown": 1}, "state": {"lazy_load_members": True}}, "event_fields": None}


async def test_a_filter_is_stored_once_and_found_again(house: House) -> None:
    alice, bob = await house.person("alice"), await house.person("bob")
    path = f"/user/{alice.user_id}/filter"
    made = (await alice.says("POST", path, LAZY)).body["filter_id"]
    assert not made.startswith("{") and (await alice.says("POST", path, LAZY)).body["filter_id"] == made
    other = (await alice.says("POST", path, {"room": {"include_leave": True}})).body["filter_id"]
    assert other != made, "another filter has another number"
    assert (await alice.says("GET", f"{path}/{made}")).body == LAZY
    for unknown in ("77", "nonsense", "99999999999999999999"):
        assert (await alice.says("GET", f"{path}/{unknown}")).errcode == "M_NOT_FOUND"
    assert (await bob.says("POST", path, {})).status == 403 and (await bob.says("GET", f"{path}/{made}")).status == 403
    stored = await house.filters.get(alice.user_id, made)
    assert stored.room.timeline.limit == 20 and stored.room.state.lazy_load_members
    assert await house.filters.get(alice.user_id, made) is stored, "parsed once"
    assert await house.filters.get(alice.user_id, orjson.dumps(LAZY).decode()) == stored, "the same, given inline"
    assert await house.filters.get(alice.user_id, None) is EVERYTHING
    with pytest.raises(InvalidParam):
        await house.filters.get(bob.user_id, other)
    for text, error in (("{", NotJson), ('{"room": 1}', BadJson), ("{" + " " * 70_000 + "}", TooLarge)):
        with pytest.raises(error):
            await house.filters.get(alice.user_id, text)


@pytest.mark.parametrize(
    "bad",
    [
        {"room": []},
        {"room": {"timeline": {"limit": "20"}}},
        {"room": {"timeline": {"limit": -1}}},
        {"room": {"timeline": {"types": "m.room.message"}}},
        {"room": {"timeline": {"types": [1]}}},
        {"room": {"include_leave": "yes"}},
        {"event_format": "morse"},
        {"presence": {"senders": ["@a:b"] * 1001}},
    ],
)
async def test_what_is_not_a_filter_is_refused(house: House, bad: dict[str, Any]) -> None:
    alice = await house.person("alice")
    reply = await alice.says("POST", f"/user/{alice.user_id}/filter", bad)
    assert reply.status == 400 and reply.errcode == "M_BAD_JSON", f"{bad!r:.60} is refused: {reply.body}"


@pytest.mark.parametrize(
    ("definition", "passes", "fails"),
    [
        ({}, [("m.room.message", "@a:b", "!r", False)], []),
        ({"types": []}, [], [("m.room.message", "@a:b", "!r", False)]),
        (
            {"types": ["m.room.*"], "not_types": ["m.room.*.secret"]},
            [("m.room.message", "@a:b", "!r", False), ("m.room.", "@a:b", "!r", False)],
            [("m.typing", "@a:b", "!r", False), ("m.room.x.secret", "@a:b", "!r", False)],
        ),
        (
            {"types": ["a*b*c"]},
            [("abc", "", "!r", False), ("axxbxxc", "", "!r", False)],
            [("acb", "", "!r", False), ("ab", "", "!r", False)],
        ),
        ({"types": ["aa*aa"]}, [("aaaa", "", "!r", False)], [("aaa", "", "!r", False)]),
        ({"not_types": ["*"]}, [], [("anything", "@a:b", "!r", False)]),
        ({"senders": ["@a:b"]}, [("t", "@a:b", "!r", False)], [("t", "@c:d", "!r", False)]),
        ({"senders": ["@a:b"], "not_senders": ["@a:b"]}, [], [("t", "@a:b", "!r", False)]),
        ({"rooms": ["!r"]}, [("t", "@a:b", "!r", False)], [("t", "@a:b", "!other", False)]),
        ({"not_rooms": ["!r"]}, [("t", "@a:b", "!other", False)], [("t", "@a:b", "!r", False)]),
        ({"contains_url": True}, [("t", "@a:b", "!r", True)], [("t", "@a:b", "!r", False)]),
        ({"contains_url": False}, [("t", "@a:b", "!r", False)], [("t", "@a:b", "!r", True)]),
    ],
)
def test_what_passes(definition: dict[str, Any], passes: list[Any], fails: list[Any]) -> None:
    chosen = parse({"room": {"timeline": definition}}).room.timeline
    for event in passes:
        assert chosen.allows(*event), f"{definition} lets {event} pass"
    for event in fails:
        assert not chosen.allows(*event), f"{definition} keeps {event} out"
    assert chosen.is_everything == (definition == {})
    assert chosen.is_nothing == (definition in ({"types": []}, {"not_types": ["*"]}))


def test_rooms_are_chosen_at_two_levels() -> None:
    room = parse({"room": {"rooms": ["!a", "!b"], "not_rooms": ["!b"]}}).room
    assert room.allows_room("!a") and not room.allows_room("!b") and not room.allows_room("!c")
    assert parse_event_filter(None).is_everything and parse_event_filter('{"limit": 3}') == EventFilter(limit=3)


def test_a_nasty_pattern_costs_little() -> None:
    nasty = parse({"presence": {"types": ["*a" * 100 + "*b"] * 100}}).presence
    assert not nasty.allows("a" * 255, "@a:b"), "it does not match, and says so at once"


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["room", "timeline", "types", "limit", "senders", "presence", "event_fields", "contains_url"]), inner, max_size=4), max_leaves=12))  # fmt: skip
def test_whatever_comes_is_a_filter_or_a_clear_error(value: Any) -> None:
    try:
        assert isinstance(parse({"room": value, "presence": value}), Filter)
    except ApiError as error:
        assert error.errcode == "M_BAD_JSON", "and nothing else"
