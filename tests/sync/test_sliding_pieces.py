"""The pieces of sliding sync that need no relay: required state, windows over an order, positions and what they confirm."""

from __future__ import annotations

import random
from typing import Any

import pytest

from relay.errors import ApiError
from relay.sync.sliding_asked import EVERY_ROOM, Asked, Config, Extensions, ListAsk, accepted, deployed
from relay.sync.sliding_connection import MAX_OF_A_DEVICE, MAX_UNCONFIRMED, Connections, Sent, UnknownPos, new_standing
from relay.sync.sliding_lists import View
from relay.sync.sliding_state import Rule, StateIndex, Wanted, difference
from relay.sync.token import Token

ME = "@me:here"
STATE = {
    key: (f"${n}", n)
    for n, key in enumerate(
        [
            ("m.room.create", ""),
            ("m.room.name", ""),
            ("m.room.topic", ""),
            ("m.call.member", "a"),
            ("m.call.member", "b"),
            ("x", "a"),
        ]
        + [("m.room.member", u) for u in (ME, "@a:x", "@b:y")]
    )
}
OTHERS = {key for key in STATE if key[0] != "m.room.member"}


def _wanted(*pairs: tuple[str, str]) -> Wanted:
    body = {"lists": {"l": {"timeline_limit": 1, "required_state": [list(pair) for pair in pairs]}}}
    return deployed(body, ME).lists["l"].config.wanted


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], set()),
        ([("m.room.name", "")], {("m.room.name", "")}),
        ([("m.call.member", "*")], {("m.call.member", "a"), ("m.call.member", "b")}),
        ([("*", "a")], {("m.call.member", "a"), ("x", "a")}),
        ([("m.room.member", "$ME")], {("m.room.member", ME)}),
        ([("m.room.member", "$LAZY")], set()),
        ([("m.room.member", "*")], {key for key in STATE if key[0] == "m.room.member"}),
        ([("*", "*")], set(STATE)),
        ([("*", "*"), ("m.room.member", "$LAZY")], OTHERS),
        ([("*", "*"), ("m.room.member", "$LAZY"), ("m.room.member", "$ME")], OTHERS | {("m.room.member", ME)}),
        (
            [("*", ""), ("m.room.member", "*"), ("m.room.member", "$LAZY")],
            {k for k in STATE if k[1] == "" or k[0] == "m.room.member"},
        ),
    ],
)
def test_required_state_selects_what_it_names(pairs: list[tuple[str, str]], expected: set[tuple[str, str]]) -> None:
    wanted = _wanted(*pairs)
    assert set(wanted.select(StateIndex(STATE))) == expected
    assert {key for key in STATE if wanted.match(key)} == expected, "one by one it is the same as all at once"


def test_rules_that_are_joined_lose_nothing() -> None:
    all_but_create = Wanted.of(Rule.of([(None, None)], [("m.room.create", None)]), False)
    assert set(all_but_create.select(StateIndex(STATE))) == set(STATE) - {("m.room.create", "")}
    joined = all_but_create.joined_with(_wanted(("m.room.create", "")))
    assert set(joined.select(StateIndex(STATE))) == set(STATE), "what one rule leaves out another may want"
    both = Config(1, _wanted(("x", "a"))).joined_with(
        Config(20, _wanted(("m.room.name", ""), ("m.room.member", "$LAZY")))
    )
    assert (
        both.limit == 20
        and both.wanted.lazy
        and set(both.wanted.select(StateIndex(STATE))) == {("x", "a"), ("m.room.name", "")}
    )


def test_a_difference_names_what_is_new_and_what_is_gone() -> None:
    after = {key: entry for key, entry in STATE.items() if key != ("x", "a")}
    after["m.room.name", ""] = ("$new", 99)
    assert difference(STATE, after) == ({("m.room.name", ""): "$new"}, [("x", "a")])
    assert difference(STATE, STATE) == ({}, [])


def test_a_view_stays_in_order_whatever_happens() -> None:
    chance = random.Random(7)
    view, truth = View(EVERY_ROOM), dict[str, int]()
    asked = ListAsk(((0, 2), (5, 6)), Config(1, _wanted()), EVERY_ROOM)
    for pos in range(400):
        room, before = f"!{chance.randrange(12)}", view.version
        place = None if chance.random() < 0.3 else pos
        changes = truth.get(room) != place
        view.put(room, place)
        if place is None:
            truth.pop(room, None)
        else:
            truth[room] = place
        assert (view.version != before) == changes, "a version stands for one order"
        order = sorted(truth, key=lambda r: -truth[r])
        assert [view.index(room) for room in order] == list(range(len(order)))
        assert view.window(asked) == order[0:3] + order[5:7]
        assert {room for room in truth if view.holds(asked, room)} == set(view.window(asked)), (
            "each room knows whether it is in it"
        )
        whole = ListAsk(((0, 11),), asked.config, EVERY_ROOM)
        assert view.is_whole(whole) and view.window(whole) == order


def _sent(behind: int | None = None) -> Sent:
    return Sent(behind, 1, _wanted(), (), (0, 0), False, "join")


def _asked(**lists: ListAsk) -> Asked:
    return Asked("c", lists, {}, Extensions())


RULES = _asked(l=ListAsk(None, Config(1, _wanted()), EVERY_ROOM))
KEY = (ME, "DEVICE", "c")


def _answers(connections: Connections, connection: Any, pos: int, **rooms: Sent | None) -> str:
    standing = new_standing(Token(1, pos), RULES)
    standing.rooms = dict(rooms)
    return connections.answer(connection, standing)


def test_an_answer_counts_when_its_pos_comes_back() -> None:
    connections = Connections()
    connection = connections.find(KEY, None, RULES, 1, 100)
    first = _answers(connections, connection, 10, a=_sent())
    assert not connection.sent, "nobody knows yet whether the answer arrived"
    assert connections.find(KEY, first, RULES, 1, 100) is connection and set(connection.sent) == {"a"}
    lost = _answers(connections, connection, 20, b=_sent())
    second = _answers(connections, connection, 20, a=None, c=_sent())
    connections.find(KEY, first, RULES, 1, 100)
    assert set(connection.sent) == {"a"}, "a retry comes from where it stood"
    connections.find(KEY, second, RULES, 1, 100)
    assert set(connection.sent) == {"c"}, "what the lost answer told was never told"
    for gone in (first, lost):
        with pytest.raises(UnknownPos):
            connections.find(KEY, gone, RULES, 1, 100)


def test_a_position_of_another_time_is_unknown() -> None:
    connections = Connections()
    connection = connections.find(KEY, None, RULES, 1, 100)
    pos = _answers(connections, connection, 10)
    for epoch, stable, text in (
        (2, 100, pos),
        (1, 5, pos),
        (1, 100, "s1_10_00000000-0"),
        (1, 100, ""),
        (1, 100, pos + "9"),
    ):
        with pytest.raises(UnknownPos):
            connections.find(KEY, text, RULES, epoch, stable)
    keys = connections.find((ME, "DEVICE", "k"), pos, _asked(), 1, 100)
    assert keys.base.token == Token(1, 10), "where no rooms are asked for, the pos says all"


def test_connections_are_bounded() -> None:
    connections = Connections()
    connection = connections.find(KEY, None, RULES, 1, 100)
    unconfirmed = [_answers(connections, connection, 10 + n) for n in range(MAX_UNCONFIRMED + 1)]
    with pytest.raises(UnknownPos):
        connections.find(KEY, unconfirmed[0], RULES, 1, 100)
    assert connections.find(KEY, unconfirmed[-1], RULES, 1, 100) is connection
    for n in range(MAX_OF_A_DEVICE):
        connections.find((ME, "DEVICE", f"other{n}"), None, RULES, 1, 100)
    with pytest.raises(UnknownPos):
        connections.find(KEY, unconfirmed[-1], RULES, 1, 100)


@pytest.mark.parametrize(
    "body",
    [
        {"lists": {"l": {"timeline_limit": 1, "ranges": [[0, 1, 2]]}}},
        {"lists": {"l": {"timeline_limit": -1}}},
        {"lists": {"l": {"timeline_limit": 1, "required_state": [["m.room.name"]]}}},
        {"lists": {"l": {"timeline_limit": 1, "required_state": [["a", "b"]] * 201}}},
        {"lists": {"l": {"timeline_limit": 1, "filters": {"tags": "x"}}}},
        {"lists": {"l": {"timeline_limit": 1, "ranges": [[2, 1]]}}},
        {"lists": {f"l{n}": {"timeline_limit": 1} for n in range(101)}},
        {"room_subscriptions": {"!r": {}}},
        {"conn_id": "c" * 300},
        {"extensions": {"to_device": {"since": 5}}},
    ],
)
def test_what_is_no_request_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        deployed(body, ME)
    assert refused.value.status == 400 and refused.value.text


def test_the_accepted_form_reads_its_own_names() -> None:
    asked = accepted(
        {
            "pos": "p",
            "timeout": 5,
            "lists": {"l": {"timeline_limit": 3, "required_state": {}, "filters": {"is_invited": True}}},
        },
        ME,
    )
    assert (asked.pos, asked.timeout) == ("p", 5)
    assert asked.lists["l"].filters.invites is True and asked.lists["l"].ranges is None, (
        "without a range it is the whole list"
    )
    many = {f"!{n}": {"timeline_limit": 1, "required_state": {}} for n in range(101)}
    with pytest.raises(ApiError):
        accepted({"room_subscriptions": many}, ME)
