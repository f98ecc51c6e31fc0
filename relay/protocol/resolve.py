"""State resolution: one room state out of several, the same on every server. Versions 2 and 2.1 of the algorithm.

The functions follow the steps of the standard in its order; the numbers in the comments are the algorithm's own.
The result depends on the set of input states alone, never on their order. Not here: which states to resolve, and how
to get at the auth chains (rooms/state). Spec: rooms/v2/#state-resolution, rooms/v12/#state-resolution.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence

from relay.errors import NotAllowed
from relay.protocol import auth
from relay.protocol.event import Event
from relay.protocol.power import Levels
from relay.protocol.versions import RoomVersion

StateKey = tuple[str, str]
StateMap = Mapping[StateKey, str]
# Event IDs -> what each cites as auth events, in any order. Raises KeyError for one that is not there.
Cites = Callable[[Collection[str]], Iterable[Sequence[str]]]

_KEYS_OF_POWER = frozenset({auth.CREATE, auth.POWER_LEVELS, auth.JOIN_RULES})
_REMOVALS = frozenset({"leave", "ban"})


def resolve(
    version: RoomVersion,
    states: Sequence[StateMap],
    events: Mapping[str, Event],
    rejected: Container[str] = (),
    cites: Cites | None = None,
) -> dict[StateKey, str]:
    """The state that follows from `states`, one for each prev_event. Raises KeyError where `events` has a gap.

    `events` holds every event of the states and of their auth chains; nothing of it is read where the states agree.
    `rejected` are the IDs of events that were rejected: they may take part, but never as somebody's auth event. `cites` tells
    what many events cite where that is to be had for less than the events.
    """
    if cites is None:

        def cites(event_ids: Collection[str]) -> Iterable[Sequence[str]]:
            return (events[event_id].auth_events for event_id in event_ids)

    unconflicted, conflicted = _divide(states)
    if not conflicted:
        return unconflicted
    full = _full_conflicted_set(version, states, unconflicted, conflicted, events, cites)
    room = _Room(version, events, rejected, _create_event(unconflicted, full, events))

    # Step 1.
    powerful = room.reverse_topological_power_order(full)
    # Step 2.
    start = {} if version.state_res == "v2.1" else dict(unconflicted)
    resolved = room.iterative_auth_checks(powerful, start)
    # Step 3.
    rest = room.mainline_order(full.difference(powerful), resolved.get(auth.POWER_LEVELS))
    # Step 4.
    resolved = room.iterative_auth_checks(rest, resolved)
    # Step 5.
    resolved.update(unconflicted)
    return resolved


def needed(states: Sequence[StateMap]) -> set[str]:
    """The conflicted events. Where there are none, `resolve` needs no events at all."""
    return _divide(states)[1]


def _divide(states: Sequence[StateMap]) -> tuple[dict[StateKey, str], set[str]]:
    """The unconflicted state map and the conflicted state set."""
    if not states:
        return {}, set()
    first = states[0]
    conflicted_keys: set[StateKey] = set()
    for other in states[1:]:
        if other is first or other == first:
            continue
        conflicted_keys.update(key for key, event_id in first.items() if other.get(key) != event_id)
        conflicted_keys.update(key for key in other if key not in first)
    unconflicted = dict(first)
    for key in conflicted_keys:
        unconflicted.pop(key, None)
    return unconflicted, {state[key] for state in states for key in conflicted_keys if key in state}


def _full_conflicted_set(
    version: RoomVersion,
    states: Sequence[StateMap],
    unconflicted: StateMap,
    conflicted: set[str],
    events: Mapping[str, Event],
    cites: Cites,
) -> set[str]:
    """The conflicted set, the auth difference and, in v2.1, the conflicted state subgraph.

    Every server in use counts an event of a state as part of that state's auth chain, and so do we. What all states
    have in common is then common to all chains; only the chains of conflicted events can differ.
    """
    chains = [
        _with_auth_chain({event_id for event_id in state.values() if event_id in conflicted}, cites) for state in states
    ]
    difference = set[str]().union(*chains) - chains[0].intersection(*chains[1:])
    difference -= conflicted
    if difference:
        # Mostly the unconflicted events that were met on the way say it; the others are looked at only if they must be.
        agreed = set(unconflicted.values())
        difference -= _with_auth_chain(agreed.intersection(set[str]().union(*chains)), cites)
        if difference:
            difference -= _with_auth_chain(agreed, cites)
    full = conflicted | difference
    if version.state_res == "v2.1":
        full |= _conflicted_subgraph(conflicted, events)
    return full


def _with_auth_chain(event_ids: Iterable[str], cites: Cites) -> set[str]:
    seen = set(event_ids)
    waiting = set(seen)
    while waiting:
        waiting = set[str]().union(*cites(waiting)) - seen
        seen |= waiting
    return seen


def _conflicted_subgraph(conflicted: set[str], events: Mapping[str, Event]) -> set[str]:
    """Every event on a path of auth edges from one conflicted event to another, both ends included."""
    reachable = _with_auth_chain(conflicted, lambda event_ids: (events[event_id].auth_events for event_id in event_ids))
    cited_by: dict[str, list[str]] = {}
    for event_id in reachable:
        for cited in events[event_id].auth_events:
            cited_by.setdefault(cited, []).append(event_id)
    subgraph = set(conflicted)
    waiting = list(conflicted)
    while waiting:
        for citing in cited_by.get(waiting.pop(), ()):
            if citing not in subgraph:
                subgraph.add(citing)
                waiting.append(citing)
    return subgraph


def _create_event(unconflicted: StateMap, full: Collection[str], events: Mapping[str, Event]) -> Event | None:
    """The room's create event: conflicted only where one of the states lacks it, so that nobody disagrees about it."""
    create_id = unconflicted.get(auth.CREATE)
    if create_id is not None:
        return events[create_id]
    some = events[min(full)]
    if some.version.room_id_is_create:
        return events.get("$" + some.room_id[1:])
    creates = (event_id for event_id in events if events[event_id].key == auth.CREATE)
    return events[first] if (first := min(creates, default=None)) is not None else None


def _is_power_event(event: Event) -> bool:
    """An event that may take somebody's power away. Like every server in use, we count the create event among them."""
    if event.key in _KEYS_OF_POWER:
        return True
    return event.type == "m.room.member" and event.membership in _REMOVALS and event.sender != event.state_key


class _Room:
    """What stays the same during one resolution."""

    def __init__(
        self, version: RoomVersion, events: Mapping[str, Event], rejected: Container[str], create: Event | None
    ) -> None:
        self._version = version
        self._events = events
        self._rejected = rejected
        self._create = create

    def _power_levels_cited_by(self, event: Event) -> Event | None:
        for cited in event.auth_events:
            if self._events[cited].key == auth.POWER_LEVELS:
                return self._events[cited]
        return None

    def _power_of_sender(self, event: Event) -> int | float:
        """The sender's level by the event's own auth events."""
        create = self._create
        if create is None:
            return 0
        return Levels.of(create, self._power_levels_cited_by(event)).user(event.sender)

    def reverse_topological_power_order(self, full: set[str]) -> list[str]:
        """The power events of the full conflicted set with what they rest on in it, from earliest to latest.

        The walk goes through the full conflicted set only, as it does on every server in use. In v2.1 nothing of a
        chain that matters can lie outside it.
        """
        events = self._events
        edges: dict[str, list[str]] = {}
        waiting = [event_id for event_id in full if _is_power_event(events[event_id])]
        edges.update((event_id, []) for event_id in waiting)
        while waiting:
            event_id = waiting.pop()
            for cited in events[event_id].auth_events:
                if cited in full:
                    edges[event_id].append(cited)
                    if cited not in edges:
                        edges[cited] = []
                        waiting.append(cited)

        # Kahn's algorithm: of all events whose auth events were given out, the smallest comes next.
        missing = {event_id: len(cited) for event_id, cited in edges.items()}
        cited_by: dict[str, list[str]] = {}
        for event_id, cited_ids in edges.items():
            for cited in cited_ids:
                cited_by.setdefault(cited, []).append(event_id)

        def rank(event_id: str) -> tuple[int | float, int, str]:
            event = events[event_id]
            return -self._power_of_sender(event), event.origin_server_ts, event_id

        ready = [rank(event_id) for event_id, count in missing.items() if count == 0]
        heapq.heapify(ready)
        ordered: list[str] = []
        while ready:
            event_id = heapq.heappop(ready)[2]
            ordered.append(event_id)
            for citing in cited_by.get(event_id, ()):
                missing[citing] -= 1
                if missing[citing] == 0:
                    heapq.heappush(ready, rank(citing))
        return ordered

    def mainline_order(self, event_ids: Iterable[str], power_levels_id: str | None) -> list[str]:
        """Those that rest on the oldest power levels first, then by time, then by ID."""
        # The place of a power levels event: 0 for one that is not on the mainline, then counted from its oldest.
        mainline: list[str] = []
        at = self._events[power_levels_id] if power_levels_id is not None else None
        while at is not None:
            mainline.append(at.id)
            at = self._power_levels_cited_by(at)
        places = {event_id: place for place, event_id in enumerate(reversed(mainline), start=1)}

        def place_of(event: Event) -> int:
            passed: list[str] = []
            place = 0
            above = self._power_levels_cited_by(event)
            while above is not None:
                known = places.get(above.id)
                if known is not None:
                    place = known
                    break
                passed.append(above.id)
                above = self._power_levels_cited_by(above)
            places.update(dict.fromkeys(passed, place))
            return place

        def rank(event_id: str) -> tuple[int, int, str]:
            event = self._events[event_id]
            return place_of(event), event.origin_server_ts, event_id

        return sorted(event_ids, key=rank)

    def iterative_auth_checks(self, event_ids: Iterable[str], state: dict[StateKey, str]) -> dict[StateKey, str]:
        """Each event that the rules allow in the state so far becomes part of it."""
        events = self._events
        resolved = dict(state)
        for event_id in event_ids:
            event = events[event_id]
            if event.key is None:
                continue
            own = {events[cited].key: events[cited] for cited in event.auth_events if cited not in self._rejected}
            against: dict[StateKey, Event] = {}
            for key in auth.auth_keys(event.type, event.sender, event.state_key, event.content, self._version):
                settled = resolved.get(key)
                cited_event = events[settled] if settled is not None else own.get(key)
                if cited_event is not None:
                    against[key] = cited_event
            try:
                auth.check(event, against, self._create if self._version.room_id_is_create else None)
            except NotAllowed:
                continue
            resolved[event.key] = event_id
        return resolved
