"""What a room's state was after an event: a chain of small differences, with a whole state every so many steps.

A state never changes once written, so what was read may be kept. Resolution itself is pure (`protocol/resolve.py`);
here its inputs are gathered and its result is recorded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import orjson

from relay.db import Database, Query, Tx
from relay.ids import shared
from relay.protocol.event import Event
from relay.protocol.resolve import needed, resolve
from relay.protocol.versions import RoomVersion
from relay.rooms import store
from relay.rooms.store import Key, Stored

MAX_STEPS = 64
MAX_REMEMBERED_ENTRIES = 100_000
# Of how many events is remembered what they cite: a resolution in a large room may walk through all of its state.
MAX_CITES_REMEMBERED = 100_000
IDS_AT_ONCE = 64

# key -> (event ID, nid)
StateMap = dict[Key, tuple[str, int]]


class Known(NamedTuple):
    """A state that lies in the database. `steps` is its distance from a whole one."""

    nid: int
    steps: int
    entries: StateMap


_CHAIN = """
    WITH RECURSIVE chain (nid, prev_nid, delta, step) AS (
        SELECT nid, prev_nid, delta, 0 FROM states WHERE nid = $1
        UNION ALL
        SELECT s.nid, s.prev_nid, s.delta, chain.step + 1 FROM states s JOIN chain ON s.nid = chain.prev_nid)
    SELECT nid, delta FROM chain ORDER BY step
"""


def load(query: Query, state_nid: int) -> Known:
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
    return Known(state_nid, len(chain) - 1, state)


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


def derive(tx: Tx, room_nid: int, after: StateMap, near: Iterable[Known]) -> Known:
    """Writes a state beside others, as the smallest difference from one of those `near` it. One that is like one of them
    is that one: where a room forks, its events still share their states."""
    best: tuple[Known, list[int]] | None = None
    for base in near:
        if base.entries is after:
            return base
        if any(key not in after for key in base.entries):
            continue  # a difference can't take anything away
        changed = [entry[1] for key, entry in after.items() if base.entries.get(key) != entry]
        if not changed:
            return base
        if best is None or len(changed) < len(best[1]):
            best = base, changed
    if best is None:
        nid, steps = record(tx, room_nid, None, 0, after, ())
    else:
        nid, steps = record(tx, room_nid, best[0].nid, best[0].steps, after, best[1])
    return Known(nid, steps, after)


K = TypeVar("K", bound=Hashable)


class _Remembered(Generic[K]):
    """States, the latest used last, as many as the bound on their entries allows."""

    def __init__(self) -> None:
        self._kept: OrderedDict[K, Known] = OrderedDict()
        self._entries = 0

    def get(self, key: K) -> Known | None:
        known = self._kept.get(key)
        if known is not None:
            self._kept.move_to_end(key)
        return known

    def put(self, key: K, known: Known) -> None:
        before = self._kept.pop(key, None)
        self._entries += len(known.entries) - (len(before.entries) if before is not None else 0)
        self._kept[key] = known
        while self._entries > MAX_REMEMBERED_ENTRIES and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._entries -= len(old.entries)


class States:
    """Reads states, remembers some, and resolves where a room has forked."""

    def __init__(self, db: Database) -> None:
        self._db = db
        # A state never changes once written, so nothing drops these but their bound.
        self._remembered: _Remembered[int] = _Remembered()
        # the states -> the resolved map: a fork is resolved once, however many events cite it.
        self._resolved: _Remembered[frozenset[int]] = _Remembered()
        # What an event cites never changes.
        self._cited: dict[str, tuple[str, ...]] = {}

    async def known(self, state_nid: int) -> Known:
        """The caller does not change it. Raises KeyError for a state that is not there."""
        known = self._remembered.get(state_nid)
        if known is None:
            known = await self._db.read(load, state_nid)
            self._remembered.put(state_nid, known)
        return known

    async def get(self, state_nid: int) -> StateMap:
        return (await self.known(state_nid)).entries

    def remember(self, known: Known) -> None:
        self._remembered.put(known.nid, known)

    async def merged(self, version: RoomVersion, states: Sequence[StateMap], fresh: Sequence[Event] = ()) -> StateMap:
        """The state that results from states at hand; `fresh` are events in them that are not in the database yet."""
        return states[0] if len(states) == 1 else await self._resolve(version, states, fresh)

    async def resolved(self, version: RoomVersion, state_nids: Iterable[int]) -> StateMap:
        """The state that results where events with these states after them come together."""
        distinct = frozenset(state_nids)
        if len(distinct) == 1:
            return await self.get(next(iter(distinct)))
        known = self._resolved.get(distinct)
        if known is None:
            recorded = await self._db.read(_recorded, distinct)
            if recorded is not None:
                known = await self.known(recorded)
                self._resolved.put(distinct, known)
        if known is None:
            states = [await self.get(nid) for nid in sorted(distinct)]
            known = Known(0, 0, await self._resolve(version, states))
            self._resolved.put(distinct, known)
        return known.entries

    def record_resolution(self, tx: Tx, room_nid: int, state_nids: Iterable[int], result: Known) -> None:
        """What came out where these states came together, so that nobody works it out again, also after a restart."""
        distinct = frozenset(state_nids)
        if len(distinct) > 1:
            tx.run(
                "INSERT INTO resolutions (of, room_nid, state_nid) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
                store.pack(sorted(distinct)),
                room_nid,
                result.nid,
            )
            tx.after(lambda: self._resolved.put(distinct, result))

    async def _resolve(self, version: RoomVersion, states: Sequence[StateMap], fresh: Sequence[Event] = ()) -> StateMap:
        nids = {event_id: nid for state in states for event_id, nid in state.values()}
        plain = [{key: event_id for key, (event_id, _) in state.items()} for state in states]
        if not needed(plain):
            return {key: (event_id, nids[event_id]) for key, event_id in resolve(version, plain, {}).items()}

        def work(query: Query) -> StateMap:
            read = _Read(query, version, fresh, self._cited)
            found: StateMap = {}
            for key, event_id in resolve(version, plain, read, read.rejected, read.cites).items():
                nid = nids.get(event_id)
                found[key] = (event_id, read.stored(event_id).nid if nid is None else nid)
            return found

        # In a reader's thread: a large room's resolution takes its time, and reads only the events that it looks at.
        return await self._db.read(work)


def _recorded(query: Query, state_nids: frozenset[int]) -> int | None:
    nid: int | None = query.value("SELECT state_nid FROM resolutions WHERE of = $1", store.pack(sorted(state_nids)))
    return nid


_JSON = f"SELECT event_id, json FROM events WHERE event_id IN ({', '.join(f'${n}' for n in range(1, IDS_AT_ONCE + 1))})"


class _Read(Mapping[str, Event]):
    """Events by ID, read when resolution first looks at them. Raises KeyError for one that is not there."""

    def __init__(
        self, query: Query, version: RoomVersion, fresh: Iterable[Event], cited: dict[str, tuple[str, ...]]
    ) -> None:
        self._cited = cited
        self._query = query
        self._version = version
        self._events = {event.id: event for event in fresh}
        self._stored: dict[str, Stored] = {}
        self.rejected = _Rejected(self)

    def stored(self, event_id: str) -> Stored:
        one = self._stored.get(event_id)
        if one is None:
            one = self._stored[event_id] = store.by_ids(self._query, [event_id], self._version)[event_id]
        return one

    def cites(self, event_ids: Collection[str]) -> list[Sequence[str]]:
        """What many events cite; of those that nobody looked at yet nothing else is read. Raises KeyError."""
        cited, events = self._cited, self._events
        known: dict[str, Sequence[str]] = {}
        lacking: list[str] = []
        for event_id in event_ids:
            found = events[event_id].auth_events if event_id in events else cited.get(event_id)
            if found is None:
                lacking.append(event_id)
            else:
                known[event_id] = found
        # Other threads read and fill the same memory: what is returned does not rest on it.
        if len(cited) + len(lacking) > MAX_CITES_REMEMBERED:
            cited.clear()
        for start in range(0, len(lacking), IDS_AT_ONCE):
            some = lacking[start : start + IDS_AT_ONCE]
            # One text for any number of IDs, so that the statement is prepared once.
            for event_id, raw in self._query.all(_JSON, *some, *some[-1:] * (IDS_AT_ONCE - len(some))):
                known[event_id] = cited[shared(event_id)] = tuple(map(shared, orjson.loads(raw)["auth_events"]))
        return [known[event_id] for event_id in event_ids]

    def is_rejected(self, event_id: str) -> bool:
        if event_id in self._events and event_id not in self._stored:
            return False  # it is being judged, and was found good so far
        return self.stored(event_id).rejected

    def __getitem__(self, event_id: str) -> Event:
        event = self._events.get(event_id)
        if event is None:
            event = self._events[event_id] = self.stored(event_id).event
        return event

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._events))

    def __len__(self) -> int:
        return len(self._events)


class _Rejected(Container[str]):
    def __init__(self, read: _Read) -> None:
        self._read = read

    def __contains__(self, event_id: object) -> bool:
        return self._read.is_rejected(str(event_id))
