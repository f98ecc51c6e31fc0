"""What a room's state was after an event: a chain of small differences, with a whole state every so many steps.

A state never changes once written, so what was read may be kept. Resolution itself is pure (`protocol/resolve.py`);
here its inputs are gathered and its result is recorded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from relay.db import Database, Query, Tx
from relay.protocol.event import Event
from relay.protocol.resolve import needed, resolve
from relay.protocol.versions import RoomVersion
from relay.rooms import store
from relay.rooms.store import Key, Stored

MAX_STEPS = 64
MAX_REMEMBERED_ENTRIES = 100_000

# key -> (event ID, nid)
StateMap = dict[Key, tuple[str, int]]

_CHAIN = """
    WITH RECURSIVE chain (nid, prev_nid, delta, step) AS (
        SELECT nid, prev_nid, delta, 0 FROM states WHERE nid = $1
        UNION ALL
        SELECT s.nid, s.prev_nid, s.delta, chain.step + 1 FROM states s JOIN chain ON s.nid = chain.prev_nid)
    SELECT nid, delta FROM chain ORDER BY step
"""


def load(query: Query, state_nid: int) -> StateMap:
    """The whole state. Raises KeyError for a state that is not there."""
    chain = query.all(_CHAIN, state_nid)
    if not chain:
        raise KeyError(state_nid)
    state: StateMap = {}
    for _, delta in reversed(chain):
        for nid in store.unpack(delta):
            row = query.one("SELECT type, state_key, event_id FROM events WHERE nid = $1", nid)
            if row is not None:
                state[(row[0], row[1])] = (row[2], nid)
    return state


def lookup(query: Query, room_nid: int, state_nids: Iterable[int], keys: Sequence[Key]) -> dict[int, dict[Key, str]]:
    """For each of several states of a room, the event IDs of a few keys, without loading the whole states."""
    candidates: dict[int, tuple[Key, str]] = {}
    for key in keys:
        for nid, event_id in query.all(
            "SELECT nid, event_id FROM events WHERE room_nid = $1 AND type = $2 AND state_key = $3", room_nid, *key
        ):
            candidates[nid] = (key, event_id)
    known: dict[int, dict[Key, str]] = {}
    for state_nid in sorted(set(state_nids)):
        walked: list[tuple[int, dict[Key, str]]] = []
        base: dict[Key, str] = {}
        for nid, delta in query.all(_CHAIN, state_nid):
            if nid in known:
                base = known[nid]
                break
            walked.append((nid, dict(candidates[n] for n in store.unpack(delta) if n in candidates)))
        for nid, delta_keys in reversed(walked):
            base = known[nid] = {**base, **delta_keys} if delta_keys else base
    return known


def current_at(query: Query, room_nid: int, pos: int) -> int | None:
    """Which state was a room's current one after everything up to `pos`; None before its first."""
    nid: int | None = query.value(
        "SELECT state_nid FROM current_states WHERE room_nid = $1 AND pos <= $2 ORDER BY pos DESC LIMIT 1",
        room_nid,
        pos,
    )
    return nid


def record(
    tx: Tx,
    room_nid: int,
    before_nid: int | None,
    steps: int,
    state: Mapping[Key, tuple[str, int]],
    changed: Sequence[int],
) -> tuple[int, int]:
    """Writes the state that follows `before_nid` by `changed`; `state` is the whole of it. Returns (its nid, its steps)."""
    nid = tx.pos()
    if before_nid is None or steps + 1 >= MAX_STEPS:
        delta, prev, steps = store.pack([n for _, n in state.values()]), None, 0
    else:
        delta, prev, steps = store.pack(changed), before_nid, steps + 1
    tx.run(
        "INSERT INTO states (nid, room_nid, prev_nid, steps, delta) VALUES ($1, $2, $3, $4, $5)",
        nid,
        room_nid,
        prev,
        steps,
        delta,
    )
    return nid, steps


class States:
    """Reads states, remembers some, and resolves where a room has forked."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._remembered: OrderedDict[int, StateMap] = OrderedDict()
        self._entries = 0
        # (version, the states) -> the resolved map: a fork is resolved once, however many events cite it.
        self._resolved: OrderedDict[frozenset[int], StateMap] = OrderedDict()

    async def get(self, state_nid: int) -> StateMap:
        """The caller does not change it."""
        known = self._remembered.get(state_nid)
        if known is None:
            known = await self._db.read(load, state_nid)
            self.remember(state_nid, known)
        else:
            self._remembered.move_to_end(state_nid)
        return known

    async def merged(self, version: RoomVersion, states: Sequence[StateMap], fresh: Sequence[Event] = ()) -> StateMap:
        """The same for states at hand; `fresh` are events in them that are not in the database yet."""
        return states[0] if len(states) == 1 else await self._resolve(version, states, fresh)

    def remember(self, state_nid: int, state: StateMap) -> None:
        self._remembered[state_nid] = state
        self._entries += len(state)
        while self._entries > MAX_REMEMBERED_ENTRIES and len(self._remembered) > 1:
            _, old = self._remembered.popitem(last=False)
            self._entries -= len(old)

    async def resolved(self, version: RoomVersion, state_nids: Sequence[int]) -> StateMap:
        """The state that results where events with these states after them come together."""
        distinct = frozenset(state_nids)
        if len(distinct) == 1:
            return await self.get(next(iter(distinct)))
        known = self._resolved.get(distinct)
        if known is not None:
            self._resolved.move_to_end(distinct)
            return known
        states = [await self.get(nid) for nid in sorted(distinct)]
        result = await self._resolve(version, states)
        self._resolved[distinct] = result
        while len(self._resolved) > 100:
            self._resolved.popitem(last=False)
        return result

    async def _resolve(self, version: RoomVersion, states: Sequence[StateMap], fresh: Sequence[Event] = ()) -> StateMap:
        nids = {event_id: nid for state in states for event_id, nid in state.values()}
        plain = [{key: event_id for key, (event_id, _) in state.items()} for state in states]
        conflicted = needed(plain)
        if conflicted:

            def gather(query: Query) -> dict[str, Stored]:
                known: dict[str, Stored] = {}
                # The create event and the power levels are needed even where they are not in conflict.
                ids = {event_id for state in plain for event_id in state.values()}
                ids.update(event_id for event in fresh for event_id in event.auth_events)
                return store.auth_chain(query, ids, version, known)

            found = await self._db.read(gather)
            events = {event_id: one.event for event_id, one in found.items()} | {event.id: event for event in fresh}
            rejected = {event_id for event_id, one in found.items() if one.rejected}
            nids.update({event_id: one.nid for event_id, one in found.items()})
            merged = resolve(version, plain, events, rejected)
        else:
            merged = resolve(version, plain, {})
        return {key: (event_id, nids[event_id]) for key, event_id in merged.items()}
