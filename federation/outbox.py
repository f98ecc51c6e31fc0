"""What leaves by itself: events and EDUs in transactions, one in flight for each server, until it is taken.

It follows the log. On disk stand how far it has come and, for each server that lags, how far that one has; so a crash
repeats at most what was in flight, and peers know an event by its ID, a to-device message by its own. The next attempt
after a failure waits (`backoff.py`). A server with nothing to get costs nothing. Spec: server-server-api/#transactions.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Collection, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any

import structlog

from federation.backoff import Backoff, Trouble
from federation.catch_up import EventLog, KnownRoom, Logged, destinations, in_room, leaves_here, missed
from federation.connections import Connections, path
from federation.lane import MAX_EDUS, Departing, Lane, Waiting
from relay.bell import Bell
from relay.clock import DAY, HOUR, SECOND, Clock
from relay.db import FOLLOWED, Database, Query
from relay.departures import Departures
from relay.errors import ApiError, RemoteError
from relay.ids import is_server_name, random_string
from relay.part import Part
from relay.tables import Schema, Table

log = structlog.get_logger("outbox")

NAME = "outbox"
SEND = "/_matrix/federation/v1/send"
# Events that leave here, servers with new EDUs, how far this reaches.
News = tuple[Sequence[Logged], Collection[str], int]
# So many are driven at once; one that keeps its answer for longer than QUICK_SECONDS lets others have its place.
MAX_AWAKE = 100
QUICK_SECONDS = 0.25
MAX_SLOW = 900
MAX_NEWS = 500
KEEP_SECONDS = 1.0
# A peer may judge fifty events before it answers.
TIMEOUT_FACTOR = 2
# A server that was down for longer keeps nothing in our memory.
REST_AFTER = HOUR
# Messages to the devices there would no longer be understood by anybody.
GONE_AFTER = 30 * DAY
# Spec names no code for one bad item in a transaction; these say that repeating it is of no use.
_REFUSED = frozenset({"M_BAD_JSON", "M_NOT_JSON", "M_TOO_LARGE"})
MAX_REFUSALS = 5

_SAVE = (
    "INSERT INTO destinations (server, position, failing_since, failed_at, wait, retry_at) VALUES ($1, $2, $3, $4, $5, $6) "
    "ON CONFLICT (server) DO UPDATE SET position = excluded.position, failing_since = excluded.failing_since, "
    "failed_at = excluded.failed_at, wait = excluded.wait, retry_at = excluded.retry_at"
)


class Outbox(Part):
    schema = Schema(
        "outbox",
        tables=(
            Table(
                "destinations",
                "a server that has not taken everything yet",
                {
                    "server": ("which server", "until it has taken everything"),
                    "position": ("everything up to here was taken", "until it has taken everything"),
                    "failing_since": ("since when it can't be reached", "until it has taken everything"),
                    "failed_at": ("the latest attempt", "until it has taken everything"),
                    "wait": ("how long the next wait is", "until it has taken everything"),
                    "retry_at": ("when the next attempt is made", "until it has taken everything"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE destinations (server TEXT PRIMARY KEY, position BIGINT, failing_since BIGINT, failed_at BIGINT,
                wait BIGINT, retry_at BIGINT)
            """,
        ),
    )

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
        self._pos = 0
        # How far it is being handed over just now; the lanes have everything up to here, or are behind.
        self._handing = 0
        self._kept_pos = 0
        # What happened before this process began may be handed over again after a crash.
        self._begun = (0, 0)
        self._there_since: dict[tuple[str, str], int] = {}
        self._lanes: dict[str, Lane] = {}
        self._ready: deque[Lane] = deque()
        self._awake = 0
        self._slow = 0
        self._timers: list[tuple[int, str]] = []
        self._dirty: set[str] = set()
        self._taken_edus: dict[str, int] = {}
        # Servers that are down -> whether they count as gone.
        self._to_trim: dict[str, bool] = {}
        self._to_keep = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        # Transactions with nothing durable in them: their ID need not outlive us, only never come twice.
        self._boot = random_string(8)
        self._count = 0
        departures.deliver_passing_to(self.passing)
        backoff.tell(self._backoff_changed)

    # --- what others call

    def passing(self, destination: str, edu_type: str, content: dict[str, Any], key: str) -> None:
        """Leaves soon or, where the server can't be reached, never."""
        if self._group is None or self._backoff.wait_left(destination) or not is_server_name(destination):
            return
        if not self._departures.allows(destination):
            return
        lane = self._lane(destination)
        lane.add_passing(key, edu_type, content)
        self._wake(lane)

    def heard_from(self, server: str) -> None:
        """It sent us a signed request: what waits for it is worth an attempt."""
        self._backoff.heard(server)

    async def came_to_light(self, room: KnownRoom, servers: set[str], since: int) -> None:
        """Servers in a room of which we learn only now: what left here since then was for them too."""
        for server in servers:
            if is_server_name(server) and server != self._server_name:
                lane = self._lane(server)
                lane.begin_again(since)
                self._wake(lane)

    # --- following the log

    async def run(self) -> None:
        await self._begin()
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(self._keep_up())
                for lane in list(self._lanes.values()):
                    self._wake(lane)
                await self._follow()
        finally:
            self._group = None
            await self._keep()

    async def _begin(self) -> None:
        self._pos = self._handing = self._kept_pos = await self._db.followed(NAME) or 0
        self._begun = (self._pos, self._db.stable_pos())
        rows, with_edus = await self._db.read(_read_state, self._departures)
        for server, position, since, failed_at, wait, retry_at in rows:
            lane = self._lane(server)
            lane.behind = position
            lane.kept = (position, since, failed_at, wait, retry_at)
            if retry_at is not None:
                self._backoff.restore(server, Trouble(since, failed_at, wait, retry_at))
        for server in with_edus:
            self._lane(server).edus_due = True

    async def _follow(self) -> None:
        while True:
            upto = self._db.stable_pos()
            while self._pos < upto:
                news = self._fresh(upto)
                if news is None:
                    news = await self._db.read(_read_news, self._rooms, self._departures, self._pos, upto)
                events, with_edus, reached = news
                self._handing = reached
                for one in events:
                    await self._hand_over(one)
                for server in with_edus:
                    lane = self._lane(server)
                    lane.edus_due = True
                    self._wake(lane)
                self._pos = reached
                self._to_keep.set()
            await self._bell.wait_line(self._pos, HOUR / SECOND)

    def _fresh(self, upto: int) -> News | None:
        """The same from memory, which has what this process committed, as long as this keeps up."""
        if self._pos < self._begun[1]:
            return None
        events = self._rooms.leaving.between(self._pos, upto)
        with_edus = self._departures.fresh.between(self._pos, upto)
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
            if server in self._lanes or is_server_name(server):
                lane = self._lane(server)
                lane.add(waiting, down=self._backoff.wait_left(server) > 0)
                self._wake(lane)

    async def _came_later(self, server: str, room_id: str, pos: int) -> bool:
        """After a crash the log is read again from a little before. A server that joined meanwhile has what lies before
        its join, and would take it for news."""
        key = (server, room_id)
        if key not in self._there_since:
            self._there_since[key] = (await in_room(self._db, self._rooms, server, room_id, *self._begun))[0]
        return pos < self._there_since[key]

    def _lane(self, server: str) -> Lane:
        lane = self._lanes.get(server)
        if lane is None:
            lane = self._lanes[server] = Lane(server)
        return lane

    # --- who is awake

    def _wake(self, lane: Lane) -> None:
        self._dirty.add(lane.server)
        self._to_keep.set()
        if lane.awake or self._group is None:
            return
        if self._backoff.wait_left(lane.server):
            self._set_timer(lane)
            return
        lane.awake = True
        if self._awake < MAX_AWAKE:
            self._start(lane)
        else:
            self._ready.append(lane)

    def _start(self, lane: Lane) -> None:
        if self._group is not None:
            self._awake += 1
            self._group.create_task(self._drive(lane))

    def _start_ready(self) -> None:
        while self._ready and self._awake < MAX_AWAKE and self._group is not None:
            self._start(self._ready.popleft())

    async def _patiently(self, answer: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        """While a server keeps its answer to itself, its place among those that are driven is somebody else's."""
        slow = False

        def stands_aside() -> None:
            nonlocal slow
            if self._slow < MAX_SLOW:
                slow = True
                self._slow += 1
                self._awake -= 1
                self._start_ready()

        timer = asyncio.get_running_loop().call_later(QUICK_SECONDS, stands_aside)
        try:
            return await answer
        finally:
            timer.cancel()
            if slow:
                self._slow -= 1
                self._awake += 1

    def _set_timer(self, lane: Lane) -> None:
        trouble = self._backoff.trouble(lane.server)
        if trouble is not None and lane.retry_at != trouble.retry_at:
            lane.retry_at = trouble.retry_at
            heapq.heappush(self._timers, (trouble.retry_at, lane.server))
            self._to_keep.set()

    def _backoff_changed(self, server: str) -> None:
        lane = self._lanes.get(server)
        if lane is not None and lane.has_work:
            self._wake(lane)

    async def _drive(self, lane: Lane) -> None:
        """Sends until nothing is left, the server fails, or others wait for the place."""
        again = False
        try:
            while await self._send_next(lane):
                if self._ready:
                    again = True
                    break
        except asyncio.CancelledError:
            self._group = None  # the server stops: nothing is started any more
            raise
        except Exception as error:
            # One server's lane must not stop the others.
            log.error("sending failed", destination=lane.server, exc_info=error)
            self._backoff.failed(lane.server)
        finally:
            self._awake -= 1
            lane.awake = False
            if again:
                lane.awake = True
                self._ready.append(lane)
            self._start_ready()
        if not again and lane.has_work:
            self._wake(lane)

    # --- one transaction

    async def _send_next(self, lane: Lane) -> bool:
        """Whether it is worth going on at once."""
        if not self._departures.allows(lane.server):
            self._shut_out(lane)
            return False
        flight = lane.flight
        if flight is None:
            if lane.behind is not None and not lane.events:
                await self._catch_up(lane)
            edus: list[Departing] = []
            if lane.edus_due:
                lane.edus_due = False
                most = 1 if lane.narrow else MAX_EDUS
                try:
                    rows = await self._db.read(self._departures.waiting, lane.server, lane.edus_taken, most)
                    edus = [Departing(*row) for row in rows]
                except BaseException:
                    lane.edus_due = True
                    raise
                lane.edus_due = lane.edus_due or len(edus) == most
            self._count += 1
            flight = lane.depart(self._server_name, self._clock.now(), edus, f"{self._boot}.{self._count}")
            if flight is None:
                return False
        try:
            answer = await self._patiently(
                self._connections.send(
                    lane.server,
                    "PUT",
                    path(SEND, flight.id),
                    flight.body,
                    forced=True,
                    timeout=self._connections.timeout * TIMEOUT_FACTOR,
                )
            )
        except (RemoteError, ApiError) as error:
            return self._not_taken(lane, error)
        self._taken(lane, answer)
        return True

    def _shut_out(self, lane: Lane) -> None:
        """The operator's lists say so: nothing waits for it any longer. Let in again, it asks for what it missed."""
        lane.empty()
        self._taken_edus[lane.server] = self._handing
        self._dirty.add(lane.server)
        self._to_keep.set()

    async def _catch_up(self, lane: Lane) -> None:
        while lane.behind is not None:
            upto = self._handing
            if lane.behind < upto:
                found = await missed(self._db, self._rooms, lane.server, self._server_name, lane.behind, upto)
                lane.caught_up(found, upto)
            # Nothing more was handed over meanwhile: the queue is complete again.
            if lane.behind >= self._handing:
                lane.behind = None

    def _taken(self, lane: Lane, answer: dict[str, Any]) -> None:
        pdus = answer.get("pdus")
        if isinstance(pdus, dict):
            refused = sum(1 for result in pdus.values() if isinstance(result, dict) and result.get("error"))
            if refused:
                log.info("a server refused events", destination=lane.server, count=refused)
        self._departed(lane)

    def _departed(self, lane: Lane) -> None:
        last_edu = lane.arrived()
        if last_edu:
            self._taken_edus[lane.server] = last_edu
        self._dirty.add(lane.server)
        self._to_keep.set()

    def _not_taken(self, lane: Lane, error: RemoteError | ApiError) -> bool:
        flight = lane.flight
        lane.passing.clear()
        if flight is not None and error.errcode in _REFUSED and error.status in (400, 413):
            if flight.items > 1:
                log.info("a server refuses a transaction, its parts go one by one", destination=lane.server, exc=error)
                lane.narrow_down()
                return True
            flight.refusals += 1
            if flight.refusals >= MAX_REFUSALS:
                log.warning("a server refuses one item for good, it is left out", destination=lane.server, exc=error)
                self._departed(lane)
                return True
        self._backoff.failed(lane.server)
        trouble = self._backoff.trouble(lane.server)
        if trouble is not None and self._clock.now() - trouble.since > REST_AFTER:
            lane.rest()
            self._to_trim[lane.server] = self._clock.now() - trouble.since > GONE_AFTER
        elif flight is not None and not flight.events and not flight.last_edu:
            lane.flight = None  # only passing things, which are not worth a second attempt
        return False

    def forget_server(self, query: Query, server: str) -> int:
        return query.run("DELETE FROM destinations WHERE server = $1", server)

    # --- what stands on disk

    async def _keep_up(self) -> None:
        """Wakes whose wait is over, and writes down how far everybody has come."""
        while True:
            if not self._timers:
                await self._to_keep.wait()
            self._to_keep.clear()
            await self._clock.sleep(self._keep_seconds)
            now = self._clock.now()
            while self._timers and self._timers[0][0] <= now:
                lane = self._lanes.get(heapq.heappop(self._timers)[1])
                if lane is not None:
                    lane.retry_at = 0
                    if lane.has_work:
                        self._wake(lane)
            await self._keep()

    async def _keep(self) -> None:
        pos, dirty, edus = self._pos, self._dirty, self._taken_edus
        trims = self._to_trim
        if not dirty and not edus and not trims and pos == self._kept_pos:
            return
        self._dirty, self._taken_edus, self._to_trim = set(), {}, {}
        kept: dict[str, tuple[int | None, ...] | None] = {}
        with self._db.write() as tx:
            for server in dirty:
                lane = self._lanes.get(server)
                trouble = self._backoff.trouble(server)
                if lane is None:
                    continue
                row: tuple[int | None, ...] | None = None
                if lane.has_work and (lane.position is not None or trouble is not None):
                    row = (lane.position, None, None, None, None)
                    if trouble is not None:
                        row = (lane.position, trouble.since, trouble.failed_at, trouble.wait, trouble.retry_at)
                # Most servers take everything at once, and of those that are down nothing is new.
                if row == lane.kept:
                    continue
                kept[server] = row
                if row is None:
                    tx.run("DELETE FROM destinations WHERE server = $1", server)
                else:
                    tx.run(_SAVE, server, *row)
            for server, last in edus.items():
                self._departures.taken(tx, server, last)
            for server, gone in trims.items():
                tx.call(partial(self._departures.trim, destination=server, gone=gone))
            tx.run(FOLLOWED, NAME, pos)
        try:
            await tx
        except ApiError as error:
            self._dirty |= dirty
            self._taken_edus = edus | self._taken_edus
            self._to_keep.set()
            log.warning("the outbox could not write down how far it has come", exc=error)
            return
        self._kept_pos = pos
        for server, row in kept.items():
            if (lane := self._lanes.get(server)) is not None:
                lane.kept = row
        for server in dirty:
            lane = self._lanes.get(server)
            # A lane that took EDUs remembers so until their rows are gone.
            if lane is not None and not lane.has_work and not lane.awake and server not in self._taken_edus:
                del self._lanes[server]


def _read_state(query: Query, departures: Departures) -> tuple[list[Any], list[str]]:
    rows = query.all("SELECT server, position, failing_since, failed_at, wait, retry_at FROM destinations")
    return rows, departures.destinations(query, 0, 2**62)


def _read_news(query: Query, rooms: EventLog, departures: Departures, after: int, upto: int) -> News:
    found: Iterable[Logged] = rooms.new_events(query, after, upto, MAX_NEWS)
    events = list(found)
    reached = upto if len(events) < MAX_NEWS else (events[-1].pos or upto)
    return [one for one in events if leaves_here(one)], departures.destinations(query, after, reached), reached
