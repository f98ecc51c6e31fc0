"""State resolution: the stories the standard tells, and the same answer for any order of the inputs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.protocol.event import Event
from relay.protocol.resolve import StateKey, needed, resolve
from relay.protocol.versions import VERSIONS
from tests.protocol.drawn_room import ALICE, BOB, CAROL, START, DrawnRoom
from tests.protocol.forked_room import ForkedRoom

LEVELS = ("m.room.power_levels", "")
RULES = ("m.room.join_rules", "")
TOPIC = ("m.room.topic", "")


class Fork:
    """A room that splits in two: each side is drawn on its own state, then both are resolved."""

    def __init__(self, version: str) -> None:
        self.room = DrawnRoom(version)
        users = {BOB: 50} if version == "12" else {ALICE: 100, BOB: 50}
        self.room.add("m.room.power_levels", ALICE, {"users": users}, "")
        self.room.add("m.room.join_rules", ALICE, {"join_rule": "public"}, "")
        self.room.member(BOB, "join")
        self.room.member(CAROL, "join")
        self.common = dict(self.room.state)
        self.sides: list[dict[StateKey, Event]] = []

    def side(self, *drawn: tuple[str, str, dict[str, object], str]) -> list[Event]:
        self.room.state = dict(self.common)
        added = [self.room.add(type, sender, content, key) for type, sender, content, key in drawn]
        self.sides.append(dict(self.room.state))
        return added

    def resolved(self, rejected: frozenset[str] = frozenset()) -> dict[StateKey, str]:
        states = [{key: event.id for key, event in side.items()} for side in self.sides]
        return resolve(self.room.version, states, {event.id: event for event in self.room.all}, rejected)


BOTH = pytest.mark.parametrize("version", ["3", "10", "11", "12"])


def member(by: str, who: str, membership: str) -> tuple[str, str, dict[str, object], str]:
    return ("m.room.member", by, {"membership": membership}, who)


def topic(by: str, text: str) -> tuple[str, str, dict[str, object], str]:
    return ("m.room.topic", by, {"topic": text}, "")


@BOTH
def test_one_state_is_its_own_resolution(version: str) -> None:
    state = {("m.room.create", ""): "$a", TOPIC: "$b"}
    assert resolve(VERSIONS[version], [state], {}) == state, "nothing to resolve, no event is needed"
    assert resolve(VERSIONS[version], [state, dict(state)], {}) == state, "two equal states agree"
    assert needed([state, dict(state)]) == set(), "and nothing has to be fetched"
    assert resolve(VERSIONS[version], [], {}) == {}, "before the first event there is no state"


def test_what_the_states_disagree_about_is_needed() -> None:
    one = {TOPIC: "$a", RULES: "$r", LEVELS: "$p"}
    two = {TOPIC: "$b", RULES: "$r"}
    assert needed([one, two]) == {"$a", "$b", "$p"}, "other events under a key, and keys that one side lacks"


@BOTH
def test_a_ban_beats_what_the_banned_did_beside_it(version: str) -> None:
    fork = Fork(version)
    (ban,) = fork.side(member(ALICE, BOB, "ban"))
    fork.side(topic(BOB, "mine now"))
    state = fork.resolved()
    assert state["m.room.member", BOB] == ban.id, "the ban stands"
    assert TOPIC not in state, "a banned user's topic does not"


@BOTH
def test_the_demoted_lose_what_they_did_beside_it(version: str) -> None:
    fork = Fork(version)
    users = {BOB: 0} if version == "12" else {ALICE: 100, BOB: 0}
    (demotion,) = fork.side(("m.room.power_levels", ALICE, {"users": users}, ""))
    users = {BOB: 50, CAROL: 50} if version == "12" else {ALICE: 100, BOB: 50, CAROL: 50}
    fork.side(("m.room.power_levels", BOB, {"users": users}, ""), topic(CAROL, "a coup"))
    state = fork.resolved()
    assert state[LEVELS] == demotion.id, "the greater power comes first"
    assert TOPIC not in state, "what rested on the other levels falls"


@BOTH
def test_the_later_of_two_equals_wins(version: str) -> None:
    fork = Fork(version)
    fork.side(topic(ALICE, "one"))
    (later,) = fork.side(topic(BOB, "two"))
    assert fork.resolved()[TOPIC] == later.id, "the topics are set in the order of their times"


@BOTH
def test_equal_times_are_ordered_by_event_id(version: str) -> None:
    fork = Fork(version)
    rivals = []
    for text in ("one", "two"):
        fork.room.state = dict(fork.common)
        rivals.append(fork.room.add("m.room.topic", ALICE, {"topic": text}, "", at=START + 99_000))
        fork.sides.append(dict(fork.room.state))
    assert fork.resolved()[TOPIC] == max(rival.id for rival in rivals), "the greater ID is applied last"


@BOTH
def test_a_room_closed_on_one_side_keeps_out_who_came_in_on_the_other(version: str) -> None:
    fork = Fork(version)
    dave = "@dave:one.example"
    (closed,) = fork.side(("m.room.join_rules", ALICE, {"join_rule": "invite"}, ""))
    fork.side(member(dave, dave, "join"))
    state = fork.resolved()
    assert state[RULES] == closed.id, "the new rule holds"
    assert ("m.room.member", dave) not in state, "so that nobody joins by the old one"


@BOTH
def test_topics_on_older_power_levels_come_first(version: str) -> None:
    fork = Fork(version)
    users = {BOB: 50} if version == "12" else {ALICE: 100, BOB: 50}
    fork.side(topic(ALICE, "on the old levels, later by its clock"))
    fork.room.state = dict(fork.common)
    fork.room.add("m.room.power_levels", ALICE, {"users": users, "ban": 60}, "")
    newer = fork.room.add("m.room.topic", BOB, {"topic": "on the new levels"}, "", at=START)
    fork.sides.append(dict(fork.room.state))
    assert fork.resolved()[TOPIC] == newer.id, "the mainline counts before the clock"


@BOTH
def test_what_all_sides_agree_on_stays(version: str) -> None:
    fork = Fork(version)
    fork.side(topic(ALICE, "one"))
    fork.side(member(CAROL, CAROL, "leave"))
    state = fork.resolved()
    for key in (RULES, LEVELS, ("m.room.member", BOB), ("m.room.create", "")):
        assert state[key] == fork.common[key].id, f"{key} was never in question"


def test_a_rejected_event_is_nobodys_auth_event() -> None:
    fork = Fork("12")
    (first,) = fork.side(topic(ALICE, "one"))
    (later,) = fork.side(topic(BOB, "two"))
    assert fork.resolved()[TOPIC] == later.id, "version 2.1 starts from nothing: Bob's join is found in his auth events"
    join = fork.common["m.room.member", BOB].id
    assert fork.resolved(frozenset({join}))[TOPIC] == first.id, "a join that was rejected proves nothing"


def test_in_version_12_a_lost_reset_is_undone() -> None:
    """Version 2.1 starts from nothing, so that old state cannot return by way of the unconflicted part."""
    fork = Fork("12")
    fork.side(member(ALICE, BOB, "ban"))
    fork.side(topic(BOB, "x"), ("m.room.name", BOB, {"name": "y"}, ""))
    state = fork.resolved()
    assert TOPIC not in state and ("m.room.name", "") not in state, "the ban is applied before the rest"


def test_a_missing_event_is_noticed() -> None:
    fork = Fork("11")
    fork.side(topic(ALICE, "one"))
    (lost,) = fork.side(topic(BOB, "two"))
    fork.room.all.remove(lost)
    with pytest.raises(KeyError):
        fork.resolved()


@given(st.sampled_from(sorted(VERSIONS)), st.integers(0, 10_000), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_inputs_does_not_matter(version: str, seed: int, shuffler: random.Random) -> None:
    room = ForkedRoom(version, seed).with_events(12)
    for merge in room.merges:
        expected = resolve(room.room_version, merge.states, room.events)
        states = [dict(shuffler.sample(list(state.items()), len(state))) for state in merge.states]
        states.append(dict(states[0]))
        shuffler.shuffle(states)
        events = dict(shuffler.sample(list(room.events.items()), len(room.events)))
        assert resolve(room.room_version, states, events) == expected, "another order, the same state"


@given(st.sampled_from(["11", "12"]), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_what_was_resolved_stays_within_its_inputs(version: str, seed: int) -> None:
    room = ForkedRoom(version, seed).with_events(15)
    for merge in room.merges:
        state = resolve(room.room_version, merge.states, room.events)
        for key in set.intersection(*(set(s.items()) for s in merge.states)):
            assert state[key[0]] == key[1], "what all states have in common is in the result"
        assert all(room.events[event_id].key == key for key, event_id in state.items()), "each event lies under its key"


class Counted(dict[str, Event]):
    """How often an event was looked at."""

    looks = 0

    def __getitem__(self, event_id: str) -> Event:
        self.looks += 1
        return super().__getitem__(event_id)


def crowded(version: str, number: int) -> tuple[Fork, list[str]]:
    """On both sides the same people came, with another event each; the levels changed in between, one after another."""
    fork = Fork(version)
    crowd = [f"@user{n}:two.example" for n in range(number)]
    levels = fork.common[LEVELS].content
    for side in range(2):
        fork.room.state = dict(fork.common)
        for place, user in enumerate(crowd):
            fork.room.member(user, "join")
            if place % 20 == 0:
                fork.room.add(
                    "m.room.power_levels", ALICE, {**levels, "kick": 50 + side, "notifications": {"room": place}}, ""
                )
        fork.sides.append(dict(fork.room.state))
    return fork, crowd


@BOTH
def test_thousands_of_conflicts_are_resolved_with_work_that_grows_no_faster_than_they_do(version: str) -> None:
    looks = []
    for number in (100, 1_000):
        fork, crowd = crowded(version, number)
        states = [{key: event.id for key, event in side.items()} for side in fork.sides]
        assert len(needed(states)) == 2 * number + 2, "each of them is in question, and the levels"
        events = Counted({event.id: event for event in fork.room.all})
        state = resolve(fork.room.version, states, events)
        assert all(state["m.room.member", user] == fork.sides[1]["m.room.member", user].id for user in crowd), (
            "the later join"
        )
        looks.append(events.looks)
    assert looks[1] < 12 * looks[0], "ten times as many conflicts cost ten times as much"
    assert looks[1] < 30 * 2_000, "and each of them a few looks"
