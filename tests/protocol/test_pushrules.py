"""Push rules: each default rule and each condition with an event that matches and one that does not, and their changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import ApiError, InvalidParam, MissingParam, NotFound, TooLarge
from relay.protocol import pushrule_changes as changes
from relay.protocol.power import Levels
from relay.protocol.pushrules import DEFAULT, NOTHING, Actions, EventView, Reader, Ruleset, default_rules, property_path
from tests.protocol.drawn_room import ALICE, BOB, CAROL, DrawnRoom

QUIET = Actions()


def view(
    type: str, content: dict[str, Any] | None = None, *, members: int = 5, levels: Levels | None = None, **top: Any
) -> EventView:
    fields = {"type": type, "sender": BOB, "room_id": "!room", "content": content or {}, **top}
    return EventView(fields, member_count=members, levels=levels)


def heard(event: EventView, **changed: Any) -> tuple[bool, bool, str | None]:
    actions = DEFAULT.evaluate(event, ALICE, **changed)
    return actions.notify, actions.highlight, actions.sound


def text(body: str, **content: Any) -> EventView:
    return view("m.room.message", {"msgtype": "m.text", "body": body, **content})


NOT_AT_ALL = (False, False, None)
BOOST = {"users": {ALICE: 100, BOB: 50}}


def levels(users: dict[str, int], **content: Any) -> Levels:
    room = DrawnRoom("11")
    return Levels.of(room.create, room.add("m.room.power_levels", ALICE, {"users": users, **content}, ""))


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (text("hi"), (True, False, None)),
        (view("m.room.message", {"body": "hi"}, members=2), (True, False, "default")),
        (view("m.room.encrypted", {"ciphertext": "x"}), (True, False, None)),
        (view("m.room.encrypted", {"ciphertext": "x"}, members=2), (True, False, "default")),
        (view("m.room.message", {"msgtype": "m.notice", "body": "hi"}), NOT_AT_ALL),
        (view("m.room.member", {"membership": "invite"}, state_key=ALICE), (True, False, "default")),
        (view("m.room.member", {"membership": "invite"}, state_key=CAROL), NOT_AT_ALL),
        (view("m.room.member", {"membership": "join"}, state_key=BOB), NOT_AT_ALL),
        (text("hi", **{"m.mentions": {"user_ids": [CAROL, ALICE]}}), (True, True, "default")),
        (text("hi", **{"m.mentions": {"user_ids": [CAROL]}}), (True, False, None)),
        (text("hi", **{"m.mentions": {"user_ids": ALICE}}), (True, False, None)),
        (text("hi", **{"m.mentions": {"room": True}}), (True, False, None)),
        (view("m.room.tombstone", {}, state_key=""), (True, True, None)),
        (view("m.room.tombstone", {}), NOT_AT_ALL),
        (view("m.reaction", {"m.relates_to": {"key": "👍"}}), NOT_AT_ALL),
        (view("m.room.server_acl", {}, state_key=""), NOT_AT_ALL),
        (text("* edited", **{"m.relates_to": {"rel_type": "m.replace"}}), NOT_AT_ALL),
        (view("m.room.encrypted", {"m.relates_to": {"rel_type": "m.replace"}}), NOT_AT_ALL),
        (view("m.room.encrypted", {"m.relates_to": {"rel_type": "m.thread"}}), (True, False, None)),
        (view("m.call.invite", {}), (True, False, "ring")),
        (view("m.room.topic", {"topic": "x"}, state_key=""), NOT_AT_ALL),
        (view("com.example", {}), NOT_AT_ALL),
    ],
)
def test_the_default_rules(event: EventView, expected: tuple[bool, bool, str | None]) -> None:
    assert heard(event) == expected, f"{event.fields}"


def test_only_who_may_calls_the_room() -> None:
    loud = {"m.mentions": {"room": True}, "body": "x"}
    assert heard(view("m.room.message", loud, levels=levels({BOB: 50}))) == (True, True, None), (
        "50 is enough by default"
    )
    assert heard(view("m.room.message", loud, levels=levels({BOB: 49}))) == (True, False, None), "49 is not"
    low = levels({BOB: 10}, notifications={"room": 10})
    assert heard(view("m.room.message", loud, levels=low)) == (True, True, None), "the room may ask for less"
    mention = {"m.mentions": {"room": 1}, "body": "x"}
    assert not heard(view("m.room.message", mention, levels=low))[1], "1 is not true"


def test_nobody_hears_of_their_own_events() -> None:
    assert DEFAULT.evaluate(text("hi"), BOB) is NOTHING, "the sender knows"


def ruleset(**rules: list[dict[str, Any]]) -> Ruleset:
    return Ruleset.compile(
        {
            kind: [{"rule_id": str(n), "actions": ["notify"], **r} for n, r in enumerate(listed)]
            for kind, listed in rules.items()
        }
    )


def matches(condition: dict[str, Any], event: EventView, name: str | None = None) -> bool:
    return ruleset(override=[{"conditions": [condition]}]).evaluate(event, ALICE, name).notify


@pytest.mark.parametrize(
    ("condition", "event", "expected"),
    [
        (
            {"kind": "event_match", "key": "content.topic", "pattern": "lunc?*"},
            view("t", {"topic": "LUNCH plans"}),
            True,
        ),
        ({"kind": "event_match", "key": "content.topic", "pattern": "lunc?*"}, view("t", {"topic": " lunch"}), False),
        ({"kind": "event_match", "key": "content.topic", "pattern": "*"}, view("t", {}), False),
        ({"kind": "event_match", "key": "content.topic", "pattern": "*"}, view("t", {"topic": None}), False),
        ({"kind": "event_match", "key": "content.topic", "pattern": 7}, view("t", {"topic": "7"}), False),
        ({"kind": "event_match", "key": "content.topic"}, view("t", {"topic": "x"}), False),
        ({"kind": "event_match", "key": "type", "pattern": "M.ROOM.*"}, view("m.room.x"), True),
        ({"kind": "event_match", "key": "type", "pattern": "M.ROOM.X"}, view("m.room.x"), True),
        ({"kind": "event_match", "key": "room_id", "pattern": "!room"}, view("t"), True),
        ({"kind": "event_match", "key": "content.body", "pattern": "ex*ple"}, text("An example event."), True),
        ({"kind": "event_match", "key": "content.body", "pattern": "ex*ple"}, text("examples"), False),
        (
            {"kind": "event_property_is", "key": "content.m\\.federate", "value": True},
            view("t", {"m.federate": True}),
            True,
        ),
        (
            {"kind": "event_property_is", "key": "content.m\\.federate", "value": True},
            view("t", {"m.federate": 1}),
            False,
        ),
        (
            {"kind": "event_property_is", "key": "content.m\\.federate", "value": True},
            view("t", {"m.federate": "true"}),
            False,
        ),
        ({"kind": "event_property_is", "key": "content.n", "value": 3}, view("t", {"n": 3}), True),
        ({"kind": "event_property_is", "key": "content.n", "value": None}, view("t", {"n": None}), True),
        ({"kind": "event_property_is", "key": "content.n", "value": None}, view("t", {}), False),
        ({"kind": "event_property_is", "key": "content.n"}, view("t", {"n": None}), False),
        ({"kind": "event_property_is", "key": "content.n", "value": [1]}, view("t", {"n": [1]}), False),
        ({"kind": "event_property_contains", "key": "content.a", "value": "x"}, view("t", {"a": [1, "x"]}), True),
        ({"kind": "event_property_contains", "key": "content.a", "value": "x"}, view("t", {"a": ["xy"]}), False),
        ({"kind": "event_property_contains", "key": "content.a", "value": "x"}, view("t", {"a": "x"}), False),
        ({"kind": "event_property_contains", "key": "content.a", "value": 1}, view("t", {"a": [True]}), False),
        ({"kind": "room_member_count", "is": "2"}, view("t", members=2), True),
        ({"kind": "room_member_count", "is": "==2"}, view("t", members=3), False),
        ({"kind": "room_member_count", "is": "<10"}, view("t", members=9), True),
        ({"kind": "room_member_count", "is": "<=10"}, view("t", members=10), True),
        ({"kind": "room_member_count", "is": ">10"}, view("t", members=10), False),
        ({"kind": "room_member_count", "is": ">=10"}, view("t", members=10), True),
        ({"kind": "room_member_count", "is": "about 2"}, view("t", members=2), False),
        ({"kind": "room_member_count"}, view("t", members=2), False),
        ({"kind": "sender_notification_permission", "key": "room"}, view("t"), False),
        ({"kind": "sender_notification_permission"}, view("t"), False),
        ({"kind": "com.example.moon", "key": "phase"}, view("t"), False),
        ({}, view("t"), False),
    ],
)
def test_a_condition_matches_or_does_not(condition: dict[str, Any], event: EventView, expected: bool) -> None:
    assert matches(condition, event) is expected, f"{condition} on {event.fields}"


def test_the_display_name_stands_alone_in_the_text() -> None:
    condition = {"kind": "contains_display_name"}
    assert matches(condition, text("hello Alice (the performer)!"), "Alice (the performer)"), "a name is no pattern"
    assert matches(condition, text("hey ALICE?"), "alice"), "in any case"
    assert not matches(condition, text("malice"), "Alice"), "not inside of a word"
    assert not matches(condition, text("hello"), None), "who has no name is not named"
    assert not matches(condition, text("hello"), ""), "nor who has an empty one"


def test_paths_can_escape_dots() -> None:
    assert property_path("content.m\\.relates_to.rel_type") == ("content", "m.relates_to", "rel_type"), "an escaped dot"
    assert property_path("content.m\\\\foo") == ("content", "m\\foo"), "an escaped backslash"
    assert property_path("content.a\\x") == ("content", "a\\x"), "another escape is left as it is"
    assert property_path("a..b") == ("a", "", "b"), "an empty name is a name"
    assert property_path("") == ("",), "the empty path"


def test_the_kinds_are_asked_in_their_order() -> None:
    def told(name: str) -> dict[str, Any]:
        return {"actions": ["notify", {"set_tweak": "sound", "value": name}]}

    message = text("time for tea")
    rules: dict[str, list[dict[str, Any]]] = {
        "override": [{"conditions": [], **told("override")}],
        "content": [{"pattern": "tea", **told("tea")}, {"pattern": "time", **told("time")}],
        "room": [{"rule_id": "!other", **told("other room")}, {"rule_id": "!room", **told("room")}],
        "sender": [{"rule_id": BOB, **told("sender")}],
        "underride": [{"conditions": [], **told("underride")}],
    }
    for kind, expected in (
        ("override", "override"),
        ("content", "tea"),
        ("room", "room"),
        ("sender", "sender"),
        ("underride", "underride"),
    ):
        assert ruleset(**rules).evaluate(message, ALICE).sound == expected, f"{kind} rules come next"
        del rules[kind]
    assert ruleset(**rules).evaluate(message, ALICE) == QUIET, "no rule, no notification"


def test_a_disabled_rule_never_matches() -> None:
    assert not ruleset(override=[{"conditions": [], "enabled": False}]).evaluate(text("x"), ALICE).notify


def test_historical_actions_mean_nothing() -> None:
    assert Actions.of(["dont_notify"]) == Actions.of([]) == QUIET, "dont_notify is an empty list"
    assert Actions.of(["notify", "coalesce", {"set_tweak": "highlight"}]).highlight, "a highlight without value is true"
    assert not Actions.of(["notify", {"set_tweak": "highlight", "value": False}]).highlight, "and may be false"
    assert Actions.of("notify") == Actions.of([7, {"x": 1}]) == QUIET, "what is no action is passed over"


def test_readers_with_the_same_rules_share_an_answer() -> None:
    assert DEFAULT.same_for_all(view("m.room.encrypted", {"algorithm": "a", "ciphertext": "x"})), (
        "ciphertext names nobody"
    )
    assert not DEFAULT.same_for_all(text("x", **{"m.mentions": {}})), "a mention is personal"
    assert not DEFAULT.same_for_all(view("m.room.member", {"membership": "invite"}, state_key=ALICE)), "so is an invite"
    assert changes.ruleset(None) is changes.ruleset({}) is DEFAULT, "who changed nothing has the shared rules"


@given(
    st.dictionaries(
        st.sampled_from(["body", "msgtype", "m.mentions", "m.relates_to", "membership"]),
        st.sampled_from(
            ["m.notice", "hi", "invite", None, 3, {"rel_type": "m.replace"}, {"user_ids": [ALICE]}, {"room": True}]
        ),
        max_size=4,
    ),
    st.sampled_from(["m.room.message", "m.room.encrypted", "m.room.member", "M.ROOM.MESSAGE", "m.reaction"]),
    st.sampled_from([None, "", ALICE]),
)
def test_what_is_skipped_could_not_have_matched(content: dict[str, Any], type: str, state_key: str | None) -> None:
    event = view(type, content) if state_key is None else view(type, content, state_key=state_key)
    literal = Ruleset.compile(default_rules(ALICE))
    for rules in (DEFAULT, literal):
        slow = next(
            (
                rule.actions
                for rule in (*rules._override, *rules._content, *rules._underride)
                if rule.matches(event, Reader(ALICE))
            ),
            QUIET,
        )
        assert rules.evaluate(event, ALICE) == slow, "the shape only saves work"
    assert DEFAULT.evaluate(event, ALICE) == literal.evaluate(event, ALICE), "the shared rules know who asks"


# ---- Changes


def ids(stored: dict[str, Any] | None, kind: str) -> list[str]:
    return [rule["rule_id"] for rule in changes.merged(stored, ALICE)[kind]]


def test_a_new_rule_is_the_most_important_of_its_kind() -> None:
    stored = changes.put(None, "content", "cake", {"pattern": "cake", "actions": ["notify"]})
    stored = changes.put(stored, "content", "tea", {"pattern": "tea", "actions": ["notify", "coalesce"]})
    assert ids(stored, "content") == ["tea", "cake"], "the newest first"
    assert changes.find(stored, ALICE, "content", "tea") == {
        "rule_id": "tea",
        "default": False,
        "enabled": True,
        "pattern": "tea",
        "actions": ["notify", "coalesce"],
    }, "as clients get it"
    stored = changes.put(stored, "content", "pie", {"pattern": "pie", "actions": []}, before="cake")
    assert ids(stored, "content") == ["tea", "pie", "cake"], "before: the next more important"
    stored = changes.put(stored, "content", "jam", {"pattern": "jam", "actions": []}, after="tea")
    assert ids(stored, "content") == ["tea", "jam", "pie", "cake"], "after: the next less important"
    stored = changes.put(stored, "content", "cake", {"pattern": "cakes", "actions": []}, before="jam", after="pie")
    assert ids(stored, "content") == ["tea", "cake", "jam", "pie"], "if both are given, before counts"
    stored = changes.put(stored, "content", "jam", {"pattern": "jams", "actions": []})
    assert ids(stored, "content") == ["tea", "cake", "jam", "pie"], "a replaced rule keeps its place"


def test_a_users_rules_stand_before_the_defaults_but_behind_the_master() -> None:
    stored = changes.put(None, "override", "mine", {"conditions": [], "actions": ["notify"]})
    assert ids(stored, "override")[:3] == [".m.rule.master", "mine", ".m.rule.suppress_notices"], (
        "the master comes first"
    )
    stored = changes.set_enabled(stored, "override", ".m.rule.master", True)
    assert not changes.ruleset(stored).evaluate(text("hi"), ALICE).notify, "and silences everything"


def test_default_rules_can_be_changed_and_not_deleted() -> None:
    stored = changes.set_enabled(None, "underride", ".m.rule.message", False)
    assert not changes.ruleset(stored).evaluate(text("hi"), ALICE).notify, "messages are off"
    stored = changes.set_enabled(stored, "underride", ".m.rule.message", True)
    loud = ["notify", {"set_tweak": "sound", "value": "bing"}]
    stored = changes.set_actions(stored, "underride", ".m.rule.message", loud)
    assert changes.ruleset(stored).evaluate(text("hi"), ALICE).sound == "bing", "with another sound"
    assert changes.find(stored, ALICE, "underride", ".m.rule.message")["default"] is True, "it is still a default rule"
    with pytest.raises(InvalidParam, match="Disable it"):
        changes.delete(stored, "underride", ".m.rule.message")


def test_an_own_rule_lives_and_goes() -> None:
    stored = changes.put(None, "room", "!room", {"actions": []})
    assert not changes.ruleset(stored).evaluate(text("hi"), ALICE).notify, "the room is muted"
    off = changes.set_enabled(stored, "room", "!room", False)
    assert changes.ruleset(off).evaluate(text("hi"), ALICE).notify, "and heard again"
    again = changes.put(off, "room", "!room", {"actions": ["notify"]})
    assert changes.find(again, ALICE, "room", "!room")["enabled"] is False, "a replaced rule stays disabled"
    loud = changes.set_actions(stored, "room", "!room", ["notify"])
    assert changes.ruleset(loud).evaluate(text("hi"), ALICE).notify, "its actions change"
    assert changes.find(stored, ALICE, "room", "!room")["actions"] == [], "and the older form did not"
    gone = changes.delete(stored, "room", "!room")
    with pytest.raises(NotFound):
        changes.find(gone, ALICE, "room", "!room")


def test_a_muted_person_is_not_heard() -> None:
    stored = changes.put(None, "sender", BOB, {"actions": []})
    assert not changes.ruleset(stored).evaluate(text("hi"), ALICE).notify, "Bob is muted"


@pytest.mark.parametrize(
    ("kind", "rule_id", "body", "error"),
    [
        ("loud", "x", {"actions": []}, InvalidParam),
        ("override", ".m.rule.mine", {"actions": []}, InvalidParam),
        ("override", "a/b", {"actions": []}, InvalidParam),
        ("override", "a\\b", {"actions": []}, InvalidParam),
        ("override", "", {"actions": []}, InvalidParam),
        ("override", "x" * 256, {"actions": []}, InvalidParam),
        ("override", "x", {}, MissingParam),
        ("override", "x", {"actions": "notify"}, InvalidParam),
        ("override", "x", {"actions": ["shout"]}, InvalidParam),
        ("override", "x", {"actions": [{"value": 1}]}, InvalidParam),
        ("override", "x", {"actions": [], "conditions": {}}, InvalidParam),
        ("override", "x", {"actions": [], "conditions": [{}]}, InvalidParam),
        (
            "override",
            "x",
            {"actions": [], "conditions": [{"kind": "event_match", "pattern": "x" * 2000}]},
            InvalidParam,
        ),
        ("content", "x", {"actions": []}, MissingParam),
        ("content", "x", {"actions": [], "pattern": 3}, InvalidParam),
        ("override", "x", {"actions": [], "conditions": [{"kind": "k", "n": 2**70}]}, ApiError),
    ],
)
def test_a_bad_rule_is_refused(kind: str, rule_id: str, body: dict[str, Any], error: type[ApiError]) -> None:
    with pytest.raises(error):
        changes.put(None, kind, rule_id, body)


def test_what_is_not_there_cannot_be_changed() -> None:
    for call in (
        lambda: changes.delete(None, "room", "!x"),
        lambda: changes.set_enabled(None, "room", "!x", True),
        lambda: changes.set_actions(None, "override", ".m.rule.no_such", []),
        lambda: changes.find(None, ALICE, "room", "!x"),
    ):
        with pytest.raises(NotFound):
            call()
    with pytest.raises(ApiError, match="before/after rule not found: nothing"):
        changes.put(None, "room", "!x", {"actions": []}, before="nothing")
    with pytest.raises(InvalidParam):
        changes.put(None, "override", "x", {"actions": []}, after=".m.rule.master")
    with pytest.raises(InvalidParam):
        changes.set_enabled(None, "override", ".m.rule.master", 1)


def test_push_rules_have_a_bound() -> None:
    stored: dict[str, Any] | None = None
    with pytest.raises(TooLarge, match="Delete some first"):
        for number in range(2_000):
            stored = changes.put(stored, "content", str(number), {"pattern": "x" * 100, "actions": ["notify"]})
    assert len(json.dumps(stored)) <= 2 * changes.MAX_STORED_BYTES, "what was stored before stays"
