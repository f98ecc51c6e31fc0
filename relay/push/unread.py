"""How many events wait for a person in a room: counted when /sync asks, from what is in memory. Nothing is stored.

Each event is looked at once for all who have the default rules; a person's count goes on from where it stood. It begins
at what that person has read (or when they joined, or last sent something), and is made anew when that changes. What lies
further back than MAX_BACK events is not counted. Spec: client-server-api/#receiving-notifications.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from relay.db import Database
from relay.ephemeral.receipts import PRIVATE, READ, UNTHREADED, Receipts
from relay.ephemeral.threads import MAIN, relation_of
from relay.part import Part, SyncAsk, SyncShare
from relay.protocol.power import Levels
from relay.protocol.pushrules import DEFAULT, EventView, Ruleset
from relay.push.rules import PushRules
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.rooms.store import Stored

MAX_ROOMS = 300
MAX_FACTS = 64
MAX_BACK = 300
# Threads shown of one room.
MAX_THREADS = 100

# From memory: whom a local person ignores.
IgnoredBy = Callable[[str], frozenset[str]]
Counts = tuple[int, int, dict[str, tuple[int, int]]]

_ANYBODY = "\x00anybody"
_MENTION = "m.mentions"


class _Fact:
    """One event as counting sees it: what the default rules say to those whom it does not name."""

    __slots__ = (
        "_levels",
        "_members",
        "_view",
        "highlight",
        "message",
        "notify",
        "personal",
        "pos",
        "sender",
        "stored",
        "thread",
    )

    def __init__(self, stored: Stored, thread: str, members: int, levels: Levels | None) -> None:
        self.stored = stored
        self.pos = stored.pos or 0
        self.sender = stored.event.sender
        self.message = not stored.event.is_state
        self.thread = thread
        self._members = members
        self._levels = levels
        self._view: EventView | None = None
        view = self.view()
        actions = DEFAULT.evaluate(view, _ANYBODY)
        self.notify, self.highlight = actions.notify, actions.highlight
        self.personal = not DEFAULT.same_for_all(view)
        if not self.personal:
            self._view = None  # made again for those who have rules of their own

    def view(self) -> EventView:
        if self._view is None:
            self._view = EventView.of(self.stored.event, member_count=self._members, levels=self._levels)
        return self._view


class _Count:
    """One person's count in one room, up to `upto`; `threads` are those beside the main timeline."""

    __slots__ = ("generation", "highlight", "notify", "threads", "upto")

    def __init__(self, upto: int, generation: int) -> None:
        self.upto = upto
        self.generation = generation
        self.notify = self.highlight = 0
        self.threads: dict[str, list[int]] = {}

    def counts(self) -> Counts:
        if not self.threads:
            return self.notify, self.highlight, {}
        threads = {thread: (n, h) for thread, (n, h) in self.threads.items()}
        return (
            self.notify + sum(n for n, _ in threads.values()),
            self.highlight + sum(h for _, h in threads.values()),
            threads,
        )


class _RoomFacts:
    """All facts of the events in (floor, upto]. The generation grows when something was taken back."""

    __slots__ = ("facts", "floor", "generation", "people", "upto")

    def __init__(self, floor: int) -> None:
        self.floor = self.upto = floor
        self.facts: deque[_Fact] = deque()
        self.people: dict[str, _Count] = {}
        self.generation = 0


class Unread(Part):
    def __init__(
        self, db: Database, rooms: Rooms, rules: PushRules, receipts: Receipts, ignored_by: IgnoredBy | None = None
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._rules = rules
        self._receipts = receipts
        self._ignored_by = ignored_by or (lambda user_id: frozenset())
        # Derived from the log: grows as it is asked. A receipt, a membership or a rule drops what it makes untrue.
        self._facts: OrderedDict[str, _RoomFacts] = OrderedDict()
        self._drops = 0
        receipts.on_read.append(self._drop)
        rules.on_change.append(self._drop_person)
        rooms.on_membership.append(lambda room, user_id, before, now, pos: self._drop(user_id, room.room_id))
        rooms.on_withheld.append(self._drop_room)

    def _drop(self, user_id: str, room_id: str) -> None:
        self._drops += 1
        known = self._facts.get(room_id)
        if known is not None:
            known.people.pop(user_id, None)

    def _drop_room(self, room: Room) -> None:
        self._drops += 1
        self._facts.pop(room.room_id, None)

    def _drop_person(self, user_id: str) -> None:
        self._drops += 1
        for known in self._facts.values():
            known.people.pop(user_id, None)

    async def changes(self, ask: SyncAsk, share: SyncShare) -> None:
        unsure = ask.since is not None and ask.topics is None
        for room_id in ask.rooms if ask.since is None else ask.rooms_concerned():
            room = self._rooms.loaded(room_id) or await self._rooms.get(room_id)
            if room is None:
                continue
            if unsure and room_id not in share.rooms and room_id not in ask.newly_joined:
                # Nobody knows whether anything changed here: only what is new is worth a word.
                if not room.recent or (room.recent[-1].pos or 0) <= (ask.since or 0):
                    continue
            notify, highlight, threads = await self._count(ask.user_id, room, ask.upto)
            one = share.room(room_id)
            one.unread = {"notification_count": notify, "highlight_count": highlight}
            if threads:
                one.unread_threads = {
                    thread: {"notification_count": n, "highlight_count": h} for thread, (n, h) in threads.items()
                }

    async def counts(self, user_id: str, room_id: str, upto: int) -> Counts:
        """(notifications, highlights, {thread: (notifications, highlights)}); the first two with those of all threads."""
        room = await self._rooms.get(room_id)
        return await self._count(user_id, room, upto) if room is not None else (0, 0, {})

    async def _count(self, user_id: str, room: Room, upto: int) -> Counts:
        known = self._facts.get(room.room_id)
        if known is None or known.upto < upto:
            known = await self._follow(room, upto)
        count = known.people.get(user_id)
        if count is not None and count.upto >= known.floor and count.generation == known.generation:
            if count.upto >= upto:
                return count.counts()
            ruleset = self._rules.known(user_id) or await self._rules.ruleset(user_id)
            fresh = []
            for fact in reversed(known.facts):
                if fact.pos <= count.upto:
                    break
                if fact.pos <= upto:
                    fresh.append(fact)
            fresh.reverse()
            self._go_on(count, fresh, user_id, room, ruleset, {})
            count.upto = max(count.upto, upto)
            return count.counts()
        return (await self._begin(known, user_id, room, upto)).counts()

    async def _begin(self, known: _RoomFacts, user_id: str, room: Room, upto: int) -> _Count:
        """Counts from what was read."""
        ruleset = self._rules.known(user_id) or await self._rules.ruleset(user_id)
        own = self._receipts.own_known(user_id)
        if own is None:
            own = await self._receipts.own(user_id)
        # From here on nothing is awaited, unless the database is asked: a receipt that comes then is noticed by `_drops`.
        read: dict[str, int] = {}
        for (kind, thread), pos in own.get(room.room_id, {}).items():
            if kind in (READ, PRIVATE):
                read[thread] = max(pos, read.get(thread, 0))
        mine = self._rooms.memberships(user_id).get(room.room_id)
        start = max(read.get(UNTHREADED, 0), mine.since_pos if mine is not None else upto)
        count = _Count(upto, known.generation)
        if start >= known.floor:
            fresh = []
            for fact in reversed(known.facts):
                if fact.pos <= start:
                    break
                if fact.pos <= upto:
                    fresh.append(fact)
            fresh.reverse()
            self._go_on(count, fresh, user_id, room, ruleset, read)
            known.people[user_id] = count
            return count
        drops = self._drops
        older = await self._db.read(self._rooms.room_events_after, room.nid, start, upto, MAX_BACK)
        levels = await room.levels() if any(_MENTION in one.event.content for one in older) else None
        self._go_on(count, self._facts_of(room, older, levels), user_id, room, ruleset, read)
        if drops == self._drops:
            known.people[user_id] = count
        return count

    def _go_on(
        self, count: _Count, facts: Iterable[_Fact], user_id: str, room: Room, ruleset: Ruleset, read: Mapping[str, int]
    ) -> None:
        ignored = self._ignored_by(user_id)
        for fact in facts:
            thread = fact.thread
            if fact.sender == user_id:
                # Who sends has read what was there. Spec: client-server-api/#marking-notifications-as-read
                if not fact.message:
                    continue
                if thread == MAIN:
                    count.notify = count.highlight = 0
                else:
                    count.threads.pop(thread, None)
                continue
            if fact.stored.taken_back or fact.sender in ignored:
                continue
            notify, highlight = fact.notify, fact.highlight
            if fact.personal or ruleset is not DEFAULT:
                actions = ruleset.evaluate(fact.view(), user_id, _name_in(room, user_id))
                notify, highlight = actions.notify, actions.highlight
            if not notify or (read and fact.pos <= read.get(thread, 0)):
                continue
            if thread == MAIN:
                count.notify += 1
                count.highlight += highlight
            else:
                of_thread = count.threads.get(thread)
                if of_thread is None:
                    if len(count.threads) >= MAX_THREADS:
                        del count.threads[next(iter(count.threads))]
                    of_thread = count.threads[thread] = [0, 0]
                of_thread[0] += 1
                of_thread[1] += highlight

    # --- facts

    async def _follow(self, room: Room, upto: int) -> _RoomFacts:
        """Takes the room's new events, up to `upto`; what lies behind that may not be committed."""
        levels = None
        known = self._facts.get(room.room_id)
        if known is not None and (not room.recent or (room.recent[-1].pos or 0) <= known.upto):
            known.upto = upto
            return known
        if any(_MENTION in one.event.content for one in room.newer_than(known.upto if known else 0)):
            levels = await room.levels()
            known = self._facts.get(room.room_id)
        # No await from here on: two who ask at once must not take an event twice.
        if known is None:
            known = self._facts[room.room_id] = _RoomFacts(room.recent_floor)
            while len(self._facts) > MAX_ROOMS:
                self._facts.popitem(last=False)
        elif known.upto < room.recent_floor:
            known.facts.clear()
            known.floor = known.upto = room.recent_floor
            known.people.clear()
        else:
            self._facts.move_to_end(room.room_id)
        if known.upto >= upto:
            return known
        fresh = [one for one in room.newer_than(known.upto) if (one.pos or 0) <= upto]
        for fact in self._facts_of(room, fresh, levels, known.facts):
            if fact.stored.event.type == "m.room.redaction":
                _take_back(known, room, fact.stored.event.redacts)
            known.facts.append(fact)
            if len(known.facts) > MAX_FACTS:
                known.floor = known.facts.popleft().pos
        known.upto = upto
        return known

    def _facts_of(
        self, room: Room, stored: Iterable[Stored], levels: Levels | None, earlier: Iterable[_Fact] = ()
    ) -> list[_Fact]:
        facts: list[_Fact] = []
        members = room.joined_count
        # In which thread earlier events stand; made for the first that relates to one.
        threads: dict[str, str] | None = None
        for one in stored:
            relation = relation_of(one.event)
            thread = MAIN
            if relation is not None and relation[0] == "m.thread":
                thread = relation[1]
            elif relation is not None:
                if threads is None:
                    threads = {fact.stored.id: fact.thread for fact in (*earlier, *facts)}
                # One step is enough: what it relates to has its own thread already.
                thread = threads.get(relation[1], MAIN)
            if threads is not None:
                threads[one.id] = thread
            facts.append(_Fact(one, thread, members, levels))
        return facts


def _take_back(known: _RoomFacts, room: Room, event_id: str | None) -> None:
    known.generation += 1
    for fact in known.facts:
        if fact.stored.id == event_id:
            # The room may have been loaded anew since: then its copy of the event is the one that knows.
            fact.stored = next((one for one in room.recent if one.id == event_id), fact.stored)


def _name_in(room: Room, user_id: str) -> str | None:
    """The person's display name in the room, for historical rules; only from memory."""
    event_id = room.state.get(("m.room.member", user_id))
    event = room.kept(event_id) if event_id is not None else None
    name: Any = event.content.get("displayname") if event is not None else None
    return name if isinstance(name, str) else None
