"""A person's own push rules and changes to the default ones, as they are stored, and each change a client can ask for.

Every function takes the stored form (None: nothing was changed) and returns a new one; nothing is written here.
Stored: {"rules": {kind: [rule, …]}, "defaults": {kind: {rule_id: {"enabled": …, "actions": …}}}}, the most important
rule first. Evaluation is in pushrules.py. Spec: client-server-api/#put_matrixclientv3pushrulesglobalkindruleid
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from relay.errors import ApiError, BadJson, InvalidParam, MissingParam, NotFound, TooLarge
from relay.protocol.globs import MAX_PATTERN
from relay.protocol.pushrules import DEFAULT, KINDS, MASTER, ME, Rule, Ruleset, default_rules

MAX_RULE_ID = 255
MAX_STORED_BYTES = 65_536

Stored = dict[str, Any]

_NO_SUCH_KIND = "There is no such kind of push rule; it is one of " + ", ".join(KINDS) + "."
_WORDS = ("notify", "dont_notify", "coalesce")
_DEFAULT_IDS = {kind: frozenset(rule["rule_id"] for rule in rules) for kind, rules in default_rules(ME).items()}


def merged(stored: Mapping[str, Any] | None, user_id: str) -> dict[str, list[Rule]]:
    """The complete global ruleset, as clients get it: a user's rules before the defaults, the master rule before all."""
    rules = default_rules(user_id)
    if not stored:
        return rules
    changes, own = stored.get("defaults", {}), stored.get("rules", {})
    result: dict[str, list[Rule]] = {}
    for kind in KINDS:
        changed = changes.get(kind, {})
        defaults = [{**rule, **changed.get(rule["rule_id"], {})} for rule in rules[kind]]
        masters = [rule for rule in defaults if rule["rule_id"] == MASTER]
        result[kind] = [*masters, *own.get(kind, []), *(rule for rule in defaults if rule["rule_id"] != MASTER)]
    return result


def ruleset(stored: Mapping[str, Any] | None) -> Ruleset:
    """What is asked of each event. All who changed nothing share one."""
    return Ruleset.compile(merged(stored, ME)) if stored else DEFAULT


def find(stored: Mapping[str, Any] | None, user_id: str, kind: str, rule_id: str) -> Rule:
    """One rule as clients get it. Raises NotFound."""
    if kind not in KINDS:
        raise NotFound(_NO_SUCH_KIND)
    for rule in merged(stored, user_id)[kind]:
        if rule["rule_id"] == rule_id:
            return rule
    raise NotFound("The push rule was not found.")


def put(
    stored: Mapping[str, Any] | None,
    kind: str,
    rule_id: str,
    body: Mapping[str, Any],
    *,
    before: str | None = None,
    after: str | None = None,
) -> Stored:
    """Adds a rule, or replaces the one of this ID; a new one is enabled and, unless placed, the most important of its kind."""
    _check_kind(kind)
    _check_rule_id(rule_id)
    rule: Rule = {
        "rule_id": rule_id,
        "default": False,
        "enabled": True,
        "actions": checked_actions(body.get("actions", None)),
    }
    if kind in ("override", "underride"):
        rule["conditions"] = _checked_conditions(body.get("conditions", []))
    elif kind == "content":
        rule["pattern"] = _checked_pattern(body)
    rules = _own(stored, kind)
    at = 0
    for index, old in enumerate(rules):
        if old["rule_id"] == rule_id:
            rule["enabled"] = old["enabled"]
            at = index
            del rules[index]
            break
    if before is not None:
        at = _place(rules, before)
    elif after is not None:
        at = _place(rules, after) + 1
    rules.insert(at, rule)
    return _with_rules(stored, kind, rules)


def delete(stored: Mapping[str, Any] | None, kind: str, rule_id: str) -> Stored:
    _check_kind(kind)
    if rule_id in _DEFAULT_IDS[kind]:
        raise InvalidParam("A rule of the server can't be deleted. Disable it instead.")
    rules = _own(stored, kind)
    left = [rule for rule in rules if rule["rule_id"] != rule_id]
    if len(left) == len(rules):
        raise NotFound("The push rule was not found.")
    return _with_rules(stored, kind, left)


def set_enabled(stored: Mapping[str, Any] | None, kind: str, rule_id: str, enabled: object) -> Stored:
    if not isinstance(enabled, bool):
        raise InvalidParam("`enabled` must be true or false.")
    return _change(stored, kind, rule_id, {"enabled": enabled})


def set_actions(stored: Mapping[str, Any] | None, kind: str, rule_id: str, actions: object) -> Stored:
    return _change(stored, kind, rule_id, {"actions": checked_actions(actions)})


def moved(conditions: object, old_room: str, new_room: str) -> list[Any]:
    """A rule's conditions for another room than the one that they name."""
    given = conditions if isinstance(conditions, list) else []
    return [{**one, "pattern": new_room} if one.get("pattern") == old_room else one for one in given]


def checked_actions(actions: object) -> list[Any]:
    """The historical ones mean nothing, and stay as they are: a client finds what it wrote. Raises MissingParam, InvalidParam."""
    if actions is None:
        raise MissingParam("`actions` is missing. It is a list, empty for a rule that keeps quiet.")
    if not isinstance(actions, list):
        raise InvalidParam("`actions` must be a list.")
    kept: list[Any] = []
    for action in actions:
        if action not in _WORDS and not (isinstance(action, dict) and isinstance(action.get("set_tweak"), str)):
            raise InvalidParam('An action is "notify" or an object with `set_tweak`.')
        kept.append(action)
    return kept


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise InvalidParam(_NO_SUCH_KIND)


def _check_rule_id(rule_id: str) -> None:
    if not rule_id or len(rule_id.encode("utf-8", "surrogatepass")) > MAX_RULE_ID:
        raise InvalidParam(f"A rule's ID has 1 to {MAX_RULE_ID} bytes.")
    if rule_id.startswith("."):
        raise InvalidParam("A rule's ID can't begin with a dot: those are the server's own rules.")
    if "/" in rule_id or "\\" in rule_id:
        raise InvalidParam("A rule's ID can't have slashes or backslashes in it.")


def _checked_conditions(conditions: object) -> list[Any]:
    if not isinstance(conditions, list):
        raise InvalidParam("`conditions` must be a list.")
    for condition in conditions:
        if not isinstance(condition, dict) or not isinstance(condition.get("kind"), str):
            raise InvalidParam("A condition is an object with a `kind`.")
        if isinstance(condition.get("pattern"), str) and len(condition["pattern"]) > MAX_PATTERN:
            raise InvalidParam(f"A pattern has at most {MAX_PATTERN} characters.")
    return conditions


def _checked_pattern(body: Mapping[str, Any]) -> str:
    if "pattern" not in body:
        raise MissingParam("A content rule needs a `pattern`.")
    pattern = body["pattern"]
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
        raise InvalidParam(f"`pattern` must be a text of at most {MAX_PATTERN} characters.")
    return pattern


def _place(rules: list[Rule], rule_id: str) -> int:
    if rule_id.startswith("."):
        raise InvalidParam("A rule can't be placed next to one of the server's own rules.")
    for index, rule in enumerate(rules):
        if rule["rule_id"] == rule_id:
            return index
    raise ApiError(f"before/after rule not found: {rule_id[:MAX_RULE_ID]}")


def _own(stored: Mapping[str, Any] | None, kind: str) -> list[Rule]:
    rules: list[Rule] = (stored or {}).get("rules", {}).get(kind, [])
    return list(rules)


def _with_rules(stored: Mapping[str, Any] | None, kind: str, rules: list[Rule]) -> Stored:
    old = stored or {}
    return _bounded({**old, "rules": {**old.get("rules", {}), kind: rules}})


def _change(stored: Mapping[str, Any] | None, kind: str, rule_id: str, change: Rule) -> Stored:
    _check_kind(kind)
    if rule_id in _DEFAULT_IDS[kind]:
        old = stored or {}
        changes = old.get("defaults", {})
        of_kind = changes.get(kind, {})
        rule = {**of_kind.get(rule_id, {}), **change}
        return _bounded({**old, "defaults": {**changes, kind: {**of_kind, rule_id: rule}}})
    rules = _own(stored, kind)
    for index, rule in enumerate(rules):
        if rule["rule_id"] == rule_id:
            rules[index] = {**rule, **change}
            return _with_rules(stored, kind, rules)
    raise NotFound("The push rule was not found.")


def _bounded(stored: Stored) -> Stored:
    try:
        size = len(orjson.dumps(stored))
    except TypeError as bad:  # A number beyond 64 bits, half a character.
        raise BadJson("The push rule holds a value that can't be stored.") from bad
    if size > MAX_STORED_BYTES:
        raise TooLarge(f"Your push rules would take more than {MAX_STORED_BYTES // 1024} KiB. Delete some first.")
    return stored
