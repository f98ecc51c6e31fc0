"""The same room graphs, resolved by us and by Synapse's own code, in one process.

Events that were rejected earlier are left out of the comparison: Synapse refuses them in state resolution, the standard
lets them take part.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from typing import Any

import pytest

from relay.protocol.resolve import resolve
from relay.protocol.versions import VERSIONS
from tests.protocol.forked_room import ForkedRoom, Merge, State

pytest.importorskip("synapse.server", reason="matrix-synapse is not installed, so there is nothing to compare with")

from synapse.api.room_versions import KNOWN_ROOM_VERSIONS
from synapse.events import EventBase, make_event_from_dict
from synapse.state.v2 import resolve_events_with_store
from synapse.storage.databases.main.event_federation import StateDifference

SEEDS = range(12)
EVENTS = 40
SMALL_SEEDS = range(6)
SMALL_EVENTS = 12


class NoClock:
    async def sleep(self, duration: Any) -> None:
        return None


class Library:
    """The events of one room, as Synapse's resolution asks for them: auth difference and subgraph taken literally."""

    def __init__(self, room: ForkedRoom, *, persisted: bool = True) -> None:
        version = KNOWN_ROOM_VERSIONS[room.version]
        self.events: dict[str, EventBase] = {
            event.id: make_event_from_dict(event.pdu, version) for event in room.events.values()
        }
        for event_id, event in self.events.items():
            assert event.event_id == event_id, "both give the event the same ID"
        self.persisted = persisted

    async def get_events(self, event_ids: Iterable[str], allow_rejected: bool = False) -> dict[str, EventBase]:
        return {event_id: self.events[event_id] for event_id in event_ids}

    def chain(self, event_ids: Collection[str]) -> set[str]:
        seen: set[str] = set()
        waiting = list(event_ids)
        while waiting:
            event_id = waiting.pop()
            if event_id not in seen:
                seen.add(event_id)
                waiting.extend(self.events[event_id].auth_event_ids())
        return seen

    async def get_auth_chain_difference(
        self, room_id: str, state_sets: list[set[str]], conflicted: set[str] | None, more: set[str] | None
    ) -> StateDifference:
        if not self.persisted:
            return StateDifference(auth_difference=set(), conflicted_subgraph=set() if conflicted is not None else None)
        chains = [self.chain(state) for state in state_sets]
        difference = set[str]().union(*chains) - chains[0].intersection(*chains[1:])
        subgraph = None
        if conflicted is not None:
            below = self.chain(conflicted)
            subgraph = {event_id for event_id in below if self.chain([event_id]) & conflicted}
        return StateDifference(auth_difference=difference, conflicted_subgraph=subgraph)


def by_synapse(room: ForkedRoom, library: Library, merge: Merge) -> State:
    resolution = resolve_events_with_store(
        NoClock(),
        room.room,
        KNOWN_ROOM_VERSIONS[room.version],
        merge.states,
        {} if library.persisted else dict(library.events),
        library,  # type: ignore[arg-type]
    )
    return dict(asyncio.run(resolution))


def describe(room: ForkedRoom, state: State) -> dict[Any, str]:
    return {
        key: f"{room.events[event_id].content} by {room.events[event_id].sender}" for key, event_id in state.items()
    }


@pytest.mark.parametrize("version", list(VERSIONS))
def test_both_resolve_a_forked_room_alike(version: str) -> None:
    disagreements = 0
    for seed in SEEDS:
        room = ForkedRoom(version, seed).with_events(EVENTS)
        library = Library(room)
        for number, merge in enumerate(room.merges):
            theirs = by_synapse(room, library, merge)
            ours = resolve(room.room_version, merge.states, room.events)
            assert describe(room, ours) == describe(room, theirs), f"version {version}, seed {seed}, merge {number}"
            assert ours == theirs, f"version {version}, seed {seed}, merge {number}: the same events"
            disagreements += any(state != merge.states[0] for state in merge.states)
    assert disagreements > 100, "the rooms did fork"


@pytest.mark.parametrize("version", ["6", "10", "11", "12"])
def test_both_find_the_same_conflicts(version: str) -> None:
    """Small rooms, in which Synapse computes the auth difference and the conflicted subgraph by itself."""
    for seed in SMALL_SEEDS:
        room = ForkedRoom(version, 1_000 + seed).with_events(SMALL_EVENTS)
        library = Library(room, persisted=False)
        for number, merge in enumerate(room.merges):
            theirs = by_synapse(room, library, merge)
            ours = resolve(room.room_version, merge.states, room.events)
            assert ours == theirs, f"version {version}, seed {seed}, merge {number}"
