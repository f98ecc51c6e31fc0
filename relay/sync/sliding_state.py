"""`required_state`: which events of a room's state a client wants, as rules that are joined and never lost.

A rule has what it includes and what it excludes; None for a type or a state key is any of them. With lazy members, what
includes any type leaves members out: those come where the timeline speaks of them. Spec: MSC4186, RequiredStateRequest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from relay.rooms.store import Key

MEMBER = "m.room.member"

Pattern = tuple[str | None, str | None]


@dataclass(frozen=True, slots=True)
class _Patterns:
    exact: frozenset[Key]
    types: frozenset[str]
    state_keys: frozenset[str]
    everything: bool

    @classmethod
    def of(cls, patterns: Iterable[Pattern]) -> _Patterns:
        exact, types, state_keys, everything = set(), set(), set(), False
        for event_type, state_key in patterns:
            if event_type is not None and state_key is not None:
                exact.add((event_type, state_key))
            elif event_type is not None:
                types.add(event_type)
            elif state_key is not None:
                state_keys.add(state_key)
            else:
                everything = True
        return cls(frozenset(exact), frozenset(types), frozenset(state_keys), everything)

    def match(self, key: Key, lazy: bool) -> bool:
        if key in self.exact or key[0] in self.types:
            return True
        if not (self.everything or key[1] in self.state_keys):
            return False
        return not (lazy and key[0] == MEMBER)


@dataclass(frozen=True, slots=True)
class Rule:
    include: _Patterns
    exclude: _Patterns

    @classmethod
    def of(cls, include: Iterable[Pattern], exclude: Iterable[Pattern] = ()) -> Rule:
        return cls(_Patterns.of(include), _Patterns.of(exclude))

    def match(self, key: Key, lazy: bool) -> bool:
        return self.include.match(key, lazy) and not self.exclude.match(key, False)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What any of its rules wants."""

    rules: frozenset[Rule]
    lazy: bool

    @classmethod
    def of(cls, rule: Rule, lazy: bool) -> Wanted:
        return cls(frozenset((rule,)), lazy)

    def joined_with(self, other: Wanted) -> Wanted:
        return Wanted(self.rules | other.rules, self.lazy or other.lazy)

    def match(self, key: Key) -> bool:
        return any(rule.match(key, self.lazy) for rule in self.rules)

    @property
    def everybody(self) -> bool:
        """Whether all members are wanted, not only those of whom the timeline speaks."""
        return any(
            MEMBER in rule.include.types
            or (not self.lazy and (rule.include.everything or bool(rule.include.state_keys)))
            for rule in self.rules
        )

    def select(self, index: StateIndex) -> dict[Key, str]:
        """What of a whole state is wanted."""
        found: dict[Key, str] = {}
        for rule in self.rules:
            include, exclude = rule.include, rule.exclude
            candidates: Iterable[Key]
            if include.everything or include.state_keys:
                # With lazy members these leave the members out, of which there may be thousands.
                candidates = index.besides_members() if self.lazy else index.entries
                if self.lazy:
                    candidates = [*candidates, *include.exact]
                    if MEMBER in include.types:
                        candidates = index.entries
            else:
                candidates = list(include.exact)
                for event_type in include.types:
                    candidates += index.of_type(event_type)
            for key in candidates:
                event_id = index.entries.get(key)
                if event_id is not None and include.match(key, self.lazy) and not exclude.match(key, False):
                    found[key] = event_id[0]
        return found


class StateIndex:
    """A state, with its keys by type as far as somebody asked."""

    __slots__ = ("_others", "entries")

    def __init__(self, entries: Mapping[Key, tuple[str, int]]) -> None:
        self.entries = entries
        self._others: dict[str, list[Key]] | None = None

    def _by_type(self) -> dict[str, list[Key]]:
        if self._others is None:
            others: dict[str, list[Key]] = {}
            for key in self.entries:
                if key[0] != MEMBER:
                    others.setdefault(key[0], []).append(key)
            self._others = others
        return self._others

    def of_type(self, event_type: str) -> list[Key]:
        if event_type == MEMBER:
            return [key for key in self.entries if key[0] == MEMBER]
        return self._by_type().get(event_type, [])

    def besides_members(self) -> list[Key]:
        return [key for keys in self._by_type().values() for key in keys]


def difference(
    before: Mapping[Key, tuple[str, int]], after: Mapping[Key, tuple[str, int]]
) -> tuple[dict[Key, str], list[Key]]:
    """What is new or other in `after`, and what is in it no more."""
    changed = {key: entry[0] for key, entry in after.items() if before.get(key) != entry}
    gone = [key for key in before if key not in after] if len(after) < len(before) + len(changed) else []
    return changed, gone
