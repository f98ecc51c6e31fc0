"""Push rules: which events a person wants to hear of. The standard's default rules, and what a set of rules says of an event.

An event is looked at once (`EventView`), then asked of every reader's `Ruleset`. A ruleset remembers which of its rules
can match an event of a given shape at all; of an encrypted message that leaves one or two. Changing rules is in
pushrule_changes.py. Spec: client-server-api/#push-rules, v1.19 (without the mentions in `body` that v1.17 took out).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from relay.protocol.event import Event
from relay.protocol.globs import compile_glob
from relay.protocol.power import DEFAULT_NOTIFICATION, Levels

# In the order in which they are asked.
KINDS = ("override", "content", "room", "sender", "underride")
MASTER = ".m.rule.master"
# Stands for the reader's own user ID, so that all who changed nothing share one compiled ruleset.
ME = "\x00me"

Rule = dict[str, Any]
Rules = Mapping[str, list[Rule]]

_SHAPES_REMEMBERED = 64
_MAX_COUNT_DIGITS = 15
_COUNT = re.compile(rf"(==|<=|>=|<|>)?([0-9]{{1,{_MAX_COUNT_DIGITS}}})\Z")
_PATH_STEP = re.compile(r"(?:[^.\\]|\\.|\\\Z)*", re.DOTALL)
_ESCAPE = re.compile(r"\\([.\\])")
_BODY = ("content", "body")
_MISSING = object()


def _match(key: str, pattern: str) -> Rule:
    return {"kind": "event_match", "key": key, "pattern": pattern}


def _default(rule_id: str, conditions: list[Rule], actions: list[Any], *, enabled: bool = True) -> Rule:
    return {"rule_id": rule_id, "default": True, "enabled": enabled, "conditions": conditions, "actions": actions}


def default_rules(user_id: str) -> dict[str, list[Rule]]:
    """The rules everybody starts with, most important first. Spec: client-server-api/#predefined-rules"""
    sound, ring = {"set_tweak": "sound", "value": "default"}, {"set_tweak": "sound", "value": "ring"}
    highlight = {"set_tweak": "highlight"}
    two = {"kind": "room_member_count", "is": "2"}
    to_me = {"kind": "event_property_contains", "key": "content.m\\.mentions.user_ids", "value": user_id}
    to_room = {"kind": "event_property_is", "key": "content.m\\.mentions.room", "value": True}
    may_call_room = {"kind": "sender_notification_permission", "key": "room"}
    an_edit = {"kind": "event_property_is", "key": "content.m\\.relates_to.rel_type", "value": "m.replace"}
    member, unkeyed = _match("type", "m.room.member"), _match("state_key", "")
    invites_me = [member, _match("content.membership", "invite"), _match("state_key", user_id)]
    return {
        "override": [
            _default(MASTER, [], [], enabled=False),
            _default(".m.rule.suppress_notices", [_match("content.msgtype", "m.notice")], []),
            _default(".m.rule.invite_for_me", invites_me, ["notify", sound]),
            _default(".m.rule.member_event", [member], []),
            _default(".m.rule.is_user_mention", [to_me], ["notify", sound, highlight]),
            _default(".m.rule.is_room_mention", [to_room, may_call_room], ["notify", highlight]),
            _default(".m.rule.tombstone", [_match("type", "m.room.tombstone"), unkeyed], ["notify", highlight]),
            _default(".m.rule.reaction", [_match("type", "m.reaction")], []),
            _default(".m.rule.room.server_acl", [_match("type", "m.room.server_acl"), unkeyed], []),
            _default(".m.rule.suppress_edits", [an_edit], []),
        ],
        "content": [],
        "room": [],
        "sender": [],
        "underride": [
            _default(".m.rule.call", [_match("type", "m.call.invite")], ["notify", ring]),
            _default(".m.rule.encrypted_room_one_to_one", [two, _match("type", "m.room.encrypted")], ["notify", sound]),
            _default(".m.rule.room_one_to_one", [two, _match("type", "m.room.message")], ["notify", sound]),
            _default(".m.rule.message", [_match("type", "m.room.message")], ["notify"]),
            _default(".m.rule.encrypted", [_match("type", "m.room.encrypted")], ["notify"]),
        ],
    }


DEFAULT_RULES = default_rules


@dataclass(frozen=True, slots=True)
class Actions:
    """What to do about an event. `tweaks` go to the push gateway as they are."""

    notify: bool = False
    highlight: bool = False
    sound: str | None = None
    tweaks: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, actions: object) -> Actions:
        """Historical and unknown actions are passed over."""
        notify, tweaks = False, dict[str, Any]()
        for action in actions if isinstance(actions, list) else []:
            if action == "notify":
                notify = True
            elif isinstance(action, dict) and isinstance(action.get("set_tweak"), str):
                tweak = action["set_tweak"]
                value = action.get("value", True if tweak == "highlight" else None)
                if value is not None:
                    tweaks[tweak] = value
        sound = tweaks.get("sound")
        return cls(
            notify, notify and tweaks.get("highlight") is True, sound if isinstance(sound, str) else None, tweaks
        )


NOTHING = Actions()


class EventView:
    """One event as the rules see it, with what holds for all readers: how many are in the room, what its sender may do."""

    __slots__ = ("fields", "levels", "member_count", "room_id", "sender", "shape", "type")

    def __init__(self, fields: Mapping[str, Any], *, member_count: int, levels: Levels | None = None) -> None:
        """`fields` is the event in the client format; `levels` are the room's power levels."""
        self.fields = fields
        self.member_count = member_count
        self.levels = levels
        self.type: str = fields["type"]
        self.sender: str = fields["sender"]
        self.room_id: str = fields["room_id"]
        content = fields["content"]
        self.shape = (
            self.type,
            "state_key" in fields,
            frozenset(content) if isinstance(content, dict) else frozenset(),
        )

    @classmethod
    def of(cls, event: Event, *, member_count: int, levels: Levels | None = None) -> EventView:
        fields = {
            "type": event.type,
            "sender": event.sender,
            "content": event.content,
            "room_id": event.room_id,
            "event_id": event.id,
            "origin_server_ts": event.origin_server_ts,
        }
        if event.state_key is not None:
            fields["state_key"] = event.state_key
        if event.redacts is not None:
            fields["redacts"] = event.redacts
        return cls(fields, member_count=member_count, levels=levels)

    def value(self, path: tuple[str, ...]) -> Any:
        at: Any = self.fields
        for step in path:
            if not isinstance(at, Mapping) or step not in at:
                return _MISSING
            at = at[step]
        return at

    def may_notify(self, whom: str) -> bool:
        if self.levels is None:
            return DEFAULT_NOTIFICATION <= 0
        return self.levels.user(self.sender) >= self.levels.to_notify(whom)


@dataclass(slots=True)
class Reader:
    """Whose rules are asked. The display name is the one in the room."""

    user_id: str
    display_name: str | None = None


Test = Callable[[EventView, Reader], bool]


def property_path(key: str) -> tuple[str, ...]:
    """Spec: appendices/#dot-separated-property-paths"""
    steps, at = [], 0
    while True:
        step = _PATH_STEP.match(key, at)
        end = at if step is None else step.end()
        steps.append(_ESCAPE.sub(r"\1", key[at:end]))
        if end >= len(key):
            return tuple(steps)
        at = end + 1


@dataclass(slots=True)
class _Compiled:
    """A rule that can match. The last fields say what an event needs to have for that, as far as its shape tells."""

    actions: Actions
    tests: list[Test] = field(default_factory=list)
    personal: bool = False
    types: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    needs_state_key: bool = False

    def fits(self, shape: tuple[str, bool, frozenset[str]]) -> bool:
        type, is_state, keys = shape
        return (
            all(type.lower() == t for t in self.types) and self.keys <= keys and (is_state or not self.needs_state_key)
        )

    def matches(self, view: EventView, reader: Reader) -> bool:
        return all(test(view, reader) for test in self.tests)


def _is_scalar(value: Any) -> bool:
    return value is None or type(value) in (str, int, bool)


def _same(one: Any, other: Any) -> bool:
    """Equal and of one type: JSON's true is not 1."""
    return type(one) is type(other) and one == other


def _compile_match(rule: _Compiled, path: tuple[str, ...], pattern: object) -> Test | None:
    if not isinstance(pattern, str):
        return None
    if pattern == ME:
        rule.personal = True

        def is_me(view: EventView, reader: Reader) -> bool:
            value = view.value(path)
            return isinstance(value, str) and value.lower() == reader.user_id.lower()

        return is_me
    glob = compile_glob(pattern)
    if path == ("type",) and glob.literal is not None:
        rule.types.add(glob.literal)
    found = glob.in_words if path == _BODY else glob.matches

    def match(view: EventView, reader: Reader) -> bool:
        value = view.value(path)
        return isinstance(value, str) and found(value)

    return match


def _compile_property(rule: _Compiled, path: tuple[str, ...], wanted: Any, *, contains: bool) -> Test | None:
    if not _is_scalar(wanted):
        return None
    mine = wanted == ME
    rule.personal = rule.personal or mine

    def test(view: EventView, reader: Reader) -> bool:
        value, sought = view.value(path), reader.user_id if mine else wanted
        if contains:
            return isinstance(value, list) and any(_same(item, sought) for item in value)
        return _same(value, sought)

    return test


def _compile_count(condition: Rule) -> Test | None:
    asked = _COUNT.match(condition["is"]) if isinstance(condition.get("is"), str) else None
    if asked is None:
        return None
    operator, number = asked[1] or "==", int(asked[2])
    compare: Callable[[int], bool] = {
        "==": lambda count: count == number,
        "<": lambda count: count < number,
        ">": lambda count: count > number,
        "<=": lambda count: count <= number,
        ">=": lambda count: count >= number,
    }[operator]
    return lambda view, reader: compare(view.member_count)


def _contains_display_name(view: EventView, reader: Reader) -> bool:
    name, body = reader.display_name, view.value(_BODY)
    if not name or not isinstance(body, str):
        return False
    # A name is no pattern: compared as it is, between the same word boundaries.
    return (
        re.search(rf"(?:(?<!\w)|(?!\w)){re.escape(name.lower())}(?:(?<!\w)|(?!\w))", body.lower(), re.ASCII) is not None
    )


def _compile_condition(rule: _Compiled, condition: object) -> Test | None:
    """None for a condition that is not recognised: its rule never matches."""
    if not isinstance(condition, dict):
        return None
    kind, key = condition.get("kind"), condition.get("key")
    if kind == "room_member_count":
        return _compile_count(condition)
    if kind == "contains_display_name":
        rule.personal = True
        rule.keys.add("body")
        return _contains_display_name
    if not isinstance(key, str):
        return None
    if kind == "sender_notification_permission":
        return lambda view, reader: view.may_notify(key)
    path = property_path(key)
    if path[0] == "content" and len(path) > 1:
        rule.keys.add(path[1])
    elif path == ("state_key",):
        rule.needs_state_key = True
    if kind == "event_match":
        return _compile_match(rule, path, condition.get("pattern"))
    if kind in ("event_property_is", "event_property_contains") and "value" in condition:
        return _compile_property(rule, path, condition["value"], contains=kind == "event_property_contains")
    return None


def _compile_rule(kind: str, rule: Rule) -> _Compiled | None:
    """None for a rule that can never match: a disabled one, or one with a condition nobody understands."""
    if rule.get("enabled") is False:
        return None
    compiled = _Compiled(Actions.of(rule.get("actions")))
    if kind == "content":
        conditions: list[Any] = [{"kind": "event_match", "key": "content.body", "pattern": rule.get("pattern")}]
    elif kind in ("override", "underride"):
        listed = rule.get("conditions", [])
        conditions = listed if isinstance(listed, list) else [None]
    else:
        return compiled  # Found by its rule_id, the room's or the sender's.
    for condition in conditions:
        test = _compile_condition(compiled, condition)
        if test is None:
            return None
        compiled.tests.append(test)
    return compiled


class Ruleset:
    """One person's rules, ready to be asked. Immutable, and shared by all who have the same ones."""

    __slots__ = ("_by_shape", "_content", "_override", "_rooms", "_senders", "_underride")

    def __init__(self, rules: Rules) -> None:
        compiled = {
            kind: [
                (rule["rule_id"], one) for rule in rules.get(kind, []) if (one := _compile_rule(kind, rule)) is not None
            ]
            for kind in KINDS
        }
        self._override = [rule for _, rule in compiled["override"]]
        self._content = [rule for _, rule in compiled["content"]]
        self._rooms = dict(compiled["room"])
        self._senders = dict(compiled["sender"])
        self._underride = [rule for _, rule in compiled["underride"]]
        self._by_shape: dict[tuple[str, bool, frozenset[str]], tuple[list[_Compiled], list[_Compiled]]] = {}

    @classmethod
    def compile(cls, rules: Rules) -> Ruleset:
        """From a complete set of rules: the defaults merged with the user's changes, most important first."""
        return cls(rules)

    def _candidates(self, view: EventView) -> tuple[list[_Compiled], list[_Compiled]]:
        """The rules that an event of this shape can match, before and after those for rooms and senders."""
        shape = view.shape
        known = self._by_shape.get(shape)
        if known is None:
            first = [rule for rule in (*self._override, *self._content) if rule.fits(shape)]
            known = first, [rule for rule in self._underride if rule.fits(shape)]
            if len(self._by_shape) >= _SHAPES_REMEMBERED:
                self._by_shape.clear()
            self._by_shape[shape] = known
        return known

    def same_for_all(self, view: EventView) -> bool:
        """Whether every reader with this ruleset gets the same answer, so that one of them may be asked for all."""
        first, last = self._candidates(view)
        return not any(rule.personal for rule in first) and not any(rule.personal for rule in last)

    def evaluate(self, view: EventView, user_id: str, display_name: str | None = None) -> Actions:
        """The actions of the most important rule that matches; nothing for one's own events."""
        if user_id == view.sender:
            return NOTHING
        first, last = self._candidates(view)
        reader = Reader(user_id, display_name)
        for rule in first:
            if rule.matches(view, reader):
                return rule.actions
        chosen = self._rooms.get(view.room_id) or self._senders.get(view.sender)
        if chosen is not None:
            return chosen.actions
        for rule in last:
            if rule.matches(view, reader):
                return rule.actions
        return NOTHING


DEFAULT = Ruleset(default_rules(ME))
