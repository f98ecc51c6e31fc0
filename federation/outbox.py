"""What leaves by itself: events and EDUs in transactions, one in flight for each server, until it is taken.

It follows the log. On disk stand how far it has come and, for each server that lags, how far that one has; so a crash
repeats at most what was in flight, and peers know an event by its ID, a to-device message by its own. The next attempt
after a failure waits (`backoff.py`). A server with nothing to get costs nothing. Spec: server-server-api/#transactions.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any

from federation.backoff import Backoff
from federation.catch_up import EventLog, KnownRoom, Logged, destinations, in_room, leaves_here
from federation.connections import Connections
from federation.drivers import Drivers
from federation.lane import Waiting, passing_edu
from federation.positions import DESTINATIONS, Positions
from relay.bell import Bell
from relay.clock import Clock
from relay.db import Database, Query
from relay.departures import Departures
from relay.ids import is_server_name
from relay.part import Part

# Events that leave here, servers with new EDUs, how far this reaches.
News = tuple[Sequence[Logged], Collection[str], int]
MAX_NEWS = 500
KEEP_SECONDS = 1.0


class Outbox(Part):
    schema = DESTINATIONS

    def __init__(
        self,
        server_name: str,
        db: Database,
        bell: Bell,
        clock: Clock,
        rooms: EventLog,
        departures: Departures,
        connections: Connections,
        backoff: Backoff,
        *,
        keep_seconds: float = KEEP_SECONDS,
    ) -> None:
        self._server_name = server_name
        self._db = db
        self._bell = bell
        self._clock = clock
        self._rooms = rooms
        self._departures = departures
        self._connections = connections
        self._backoff = backoff
        self._keep_seconds = keep_seconds
        self.positions = Positions(db, departures, backoff)
        self._drivers = Drivers(server_name, db, clock, rooms, departures, connections, backoff, self.positions)
        # What happened before this process began may be handed over again after a crash.
        self._begun = (0, 0)
        self._there_since: dict[tuple[str, str], int] = {}
        # What of a room's events is sent to a newcomer, and how; set by the server.
        self.as_seen_by: Callable[[str, Sequence[str]], Awaitable[Sequence[tuple[str, bytes]]]]
        self._newcomers: deque[tuple[str, Sequence[str]]] = deque()
        departures.deliver_passing_to(self.passing)

    # --- what others call

    def passing(self, servers: Iterable[str], edu_type: str, content: dict[str, Any], key: str) -> None:
        """Leaves soon or, where the server can't be reached, never."""
        if self._drivers.group is None:
            return
        edu: bytes | None = None
        for server in servers:
            if self._backoff.wait_left(server) or not is_server_name(server) or not self._departures.allows(server):
                continue
            if edu is None:
                edu = passing_edu(edu_type, content)
            lane = self.positions.lane(server)
            lane.add_passing(key, edu)
            self._drivers.wake(lane)

    def heard_from(self, server: str) -> None:
        """It sent us a signed request: what waits for it is worth an attempt."""
        self._backoff.heard(server)

    async def came_to_light(self, room: KnownRoom, servers: set[str], since: int) -> None:
        """Servers in a room of which we learn only now: what left here since then was for them too."""
        for server in servers:
            if is_server_name(server) and server != self._server_name:
                lane = self.positions.lane(server)
                lane.begin_again(since)
                self._drivers.wake(lane)

    def newcomer(self, server: str, lacking: Sequence[str]) -> None:
        """A server came to a room beside these events: when ours among them left here, nobody knew of it."""
        self._newcomers.append((server, lacking))

    def backlog(self) -> tuple[int, int]:
        """How many servers something waits for, and how many can't be reached."""
        return sum(1 for lane in self.positions.lanes.values() if lane.has_work), len(self._backoff.failing())

    # --- following the log

    async def run(self) -> None:
        await self._begin()
        try:
            async with asyncio.TaskGroup() as group:
                self._drivers.group = group
                group.create_task(self._keep_up())
                for lane in list(self.positions.lanes.values()):
                    self._drivers.wake(lane)
                await self._follow()
        finally:
            self._drivers.group = None
            await self.positions.keep()

    async def _begin(self) -> None:
        await self.positions.begin()
        self._begun = (self.positions.pos, self._db.stable_pos())

    async def _follow(self) -> None:
        while True:
            upto = self._db.stable_pos()
            while self.positions.pos < upto:
                news = self._fresh(upto)
                if news is None:
                    news = await self._db.read(_read_news, self._rooms, self._departures, self.positions.pos, upto)
                events, with_edus, reached = news
                self.positions.handing = reached
                for one in events:
                    await self._hand_over(one)
                for server in with_edus:
                    lane = self.positions.lane(server)
                    lane.edus_due = True
                    self._drivers.wake(lane)
                self.positions.handed_over(reached)
            while self._newcomers:
                await self._bring_up(*self._newcomers.popleft())
            await self._bell.wait_line(self.positions.pos)

    def _fresh(self, upto: int) -> News | None:
        """The same from memory, which has what this process committed, as long as this keeps up."""
        if self.positions.pos < self._begun[1]:
            return None
        events = self._rooms.leaving.between(self.positions.pos, upto)
        with_edus = self._departures.fresh.between(self.positions.pos, upto)
        return None if events is None or with_edus is None else (events, set(with_edus), upto)

    async def _hand_over(self, one: Logged) -> None:
        event = one.event
        room = self._rooms.loaded(event.room_id) or await self._rooms.get(event.room_id)
        if room is None or one.pos is None:
            return
        waiting = Waiting(one.pos, event.id, event.raw)
        for server in destinations(event, room.servers, self._server_name):
            if not self._departures.allows(server):
                continue
            if one.pos <= self._begun[1] and await self._came_later(server, event.room_id, one.pos):
                continue
            if server in self.positions.lanes or is_server_name(server):
                lane = self.positions.lane(server)
                lane.add(waiting, down=self._backoff.wait_left(server) > 0)
                self._drivers.wake(lane)

    async def _bring_up(self, server: str, lacking: Sequence[str]) -> None:
        if not is_server_name(server) or not self._departures.allows(server):
            return
        for event_id, raw in await self.as_seen_by(server, lacking):
            lane = self.positions.lane(server)
            # Not at its own position: the log would be read again from there, which may be years back.
            lane.add_beside(Waiting(self.positions.pos, event_id, raw))
            self._drivers.wake(lane)

    async def _came_later(self, server: str, room_id: str, pos: int) -> bool:
        """After a crash the log is read again from a little before. A server that joined meanwhile has what lies before
        its join, and would take it for news."""
        key = (server, room_id)
        if key not in self._there_since:
            self._there_since[key] = (await in_room(self._db, self._rooms, server, room_id, *self._begun))[0]
        return pos < self._there_since[key]

    async def _keep_up(self) -> None:
        """Wakes whose wait is over, and writes down how far everybody has come."""
        due = self.positions.due
        while True:
            if not self._drivers.timers:
                await due.wait()
            due.clear()
            await self._clock.sleep(self._keep_seconds)
            self._drivers.wake_due()
            await self.positions.keep()

    def forget_server(self, query: Query, server: str) -> int:
        return self.positions.forget_server(query, server)

    def forgotten(self, server: str) -> None:
        """What is on its way there is answered to nobody."""
        lane = self.positions.lanes.get(server)
        if lane is not None:
            lane.empty()
            self.positions.changed(server)


def _read_news(query: Query, rooms: EventLog, departures: Departures, after: int, upto: int) -> News:
    found: Iterable[Logged] = rooms.new_events(query, after, upto, MAX_NEWS)
    events = list(found)
    reached = upto if len(events) < MAX_NEWS else (events[-1].pos or upto)
    return [one for one in events if leaves_here(one)], departures.destinations(query, after, reached), reached
