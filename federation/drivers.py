"""When something is sent to whom: so many servers are driven at once, one transaction in flight for each, until it is taken.

One that keeps its answer gives up its place to others; those that failed before have few places. The next attempt after a
failure waits (`backoff.py`), and after a long absence a small question comes before what waits. What waits for each is its
lane (`lane.py`), what of it stands on disk `positions.py`. Spec: server-server-api/#transactions.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import structlog

from federation.backoff import SILENT_AFTER, Backoff, Trouble, left
from federation.catch_up import CatchUp, EventLog
from federation.connections import Connections, path
from federation.lane import MAX_EDUS, Departing, Lane
from federation.positions import Positions
from relay.clock import DAY, HOUR, Clock
from relay.db import Database
from relay.departures import Departures
from relay.errors import ApiError, RemoteError
from relay.ids import random_string

log = structlog.get_logger("outbox")

SEND = "/_matrix/federation/v1/send"
# So many are driven at once; one that keeps its answer for longer than QUICK_SECONDS lets others have its place.
MAX_AWAKE = 100
QUICK_SECONDS = 0.25
MAX_SLOW = 400
# Of those that failed before; the rest of them waits, so that however many are down, they take nobody's place.
MAX_RETRYING = 50
# A peer may judge fifty events before it answers.
TIMEOUT_FACTOR = 2
# A server that was down for longer keeps nothing in our memory, and is asked whether it lives before anything is sent.
REST_AFTER = HOUR
LIVES = "/_matrix/federation/v1/version"
MAX_LIVES_BYTES = 64 * 1024
# Messages to the devices there would no longer be understood by anybody.
GONE_AFTER = 30 * DAY
# Spec names no code for one bad item in a transaction; these say that repeating it is of no use.
_REFUSED = frozenset({"M_BAD_JSON", "M_NOT_JSON", "M_TOO_LARGE"})
MAX_REFUSALS = 5


class Drivers:
    def __init__(
        self,
        server_name: str,
        db: Database,
        clock: Clock,
        rooms: EventLog,
        departures: Departures,
        connections: Connections,
        backoff: Backoff,
        positions: Positions,
    ) -> None:
        self._server_name = server_name
        self._db = db
        self._clock = clock
        self._rooms = rooms
        self._departures = departures
        self._connections = connections
        self._backoff = backoff
        self._positions = positions
        self._catching_up = CatchUp(server_name, db, rooms)
        self._ready: deque[Lane] = deque()
        self._retries: deque[Lane] = deque()
        self._awake = 0
        self._retrying = 0
        self._slow = 0
        self.timers: list[tuple[int, str]] = []
        # While it is None nothing is sent.
        self.group: asyncio.TaskGroup | None = None
        # Transactions with nothing durable in them: their ID need not outlive us, only never come twice.
        self._boot = random_string(8)
        self._count = 0
        backoff.tell(self._backoff_changed)

    # --- who is awake

    def wake(self, lane: Lane) -> None:
        self._positions.changed(lane.server)
        if lane.awake or self.group is None:
            return
        trouble = self._trouble(lane)
        if trouble is not None and self._wait_left(lane):
            self._set_timer(lane, trouble.retry_at)
            return
        lane.awake = True
        (self._ready if trouble is None else self._retries).append(lane)
        self._start_ready()

    def _trouble(self, lane: Lane) -> Trouble | None:
        """What keeps it from being sent to the longest."""
        trouble, refused = self._backoff.trouble(lane.server), lane.refused
        return refused if trouble is None or (refused is not None and refused.retry_at > trouble.retry_at) else trouble

    def _wait_left(self, lane: Lane) -> int:
        trouble = self._trouble(lane)
        return 0 if trouble is None else left(trouble, self._clock.now())

    def _start_ready(self) -> None:
        while self.group is not None and self._awake < MAX_AWAKE:
            if self._retries and self._retrying < MAX_RETRYING:
                self._retrying += 1
                self._awake += 1
                self.group.create_task(self._drive(self._retries.popleft(), retry=True))
            elif self._ready:
                self._awake += 1
                self.group.create_task(self._drive(self._ready.popleft()))
            else:
                return

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

    def wake_due(self) -> None:
        """Whose wait is over."""
        now = self._clock.now()
        while self.timers:
            at, server = self.timers[0]
            lane = self._positions.lanes.get(server)
            # Where the clock was set back a wait is over before its time has come.
            if lane is not None and at > now and self._wait_left(lane):
                return
            heapq.heappop(self.timers)
            if lane is not None:
                lane.retry_at = 0
                if lane.has_work:
                    self.wake(lane)

    def _set_timer(self, lane: Lane, retry_at: int) -> None:
        if lane.retry_at != retry_at:
            lane.retry_at = retry_at
            heapq.heappush(self.timers, (retry_at, lane.server))
            self._positions.due.set()

    def _backoff_changed(self, server: str) -> None:
        lane = self._positions.lanes.get(server)
        if lane is not None and lane.has_work:
            self.wake(lane)

    async def _drive(self, lane: Lane, *, retry: bool = False) -> None:
        """Sends until nothing is left, the server fails, or others wait for the place."""
        again = False
        try:
            while await self._send_next(lane):
                if retry or self._ready:
                    again = True
                    break
        except asyncio.CancelledError:
            self.group = None  # the server stops: nothing is started any more
            raise
        except Exception as error:
            # One server's lane must not stop the others.
            log.error("sending failed", destination=lane.server, exc_info=error)
            self._backoff.failed(lane.server)
        finally:
            self._awake -= 1
            self._retrying -= retry
            lane.awake = False
            if again:
                lane.awake = True
                self._ready.append(lane)
            self._start_ready()
        if again:
            return
        if lane.has_work:
            self.wake(lane)
        else:
            self._positions.changed(lane.server)  # so that it is forgotten

    # --- one transaction

    async def _send_next(self, lane: Lane) -> bool:
        """Whether it is worth going on at once."""
        if not self._departures.allows(lane.server):
            self._shut_out(lane)
            return False
        flight = lane.flight
        trouble = self._trouble(lane)
        if flight is None:
            if trouble is not None and self._clock.now() - trouble.since > REST_AFTER:
                if not await self._lives(lane, trouble):
                    return False
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
            return await self._not_taken(lane, error, trouble)
        self._taken(lane, answer)
        return True

    async def _lives(self, lane: Lane, trouble: Trouble) -> bool:
        """Whatever it answers: then what waits for it is worth being read from the log. Most attempts end here."""
        try:
            await self._patiently(self._connections.get(lane.server, LIVES, forced=True, most_bytes=MAX_LIVES_BYTES))
        except (RemoteError, ApiError) as error:
            if isinstance(error, RemoteError) and error.status and not self._backoff.wait_left(lane.server):
                return True
            await self._failed(lane, error, trouble)
            return False
        return True

    def _shut_out(self, lane: Lane) -> None:
        """The operator's lists say so, or it is gone: nothing waits for it any longer. If it is there again, it asks for what
        it missed."""
        lane.empty()
        self._positions.took_edus(lane.server, self._positions.handing)

    async def _catch_up(self, lane: Lane) -> None:
        # Once, if there is something: what happens meanwhile is read when this has gone, or a busy log would be followed, and
        # all of it kept, before anything is sent.
        while lane.behind is not None and not lane.events:
            upto = self._positions.handing
            if lane.behind < upto:
                found = await self._catching_up.missed(lane.server, lane.behind, upto)
                lane.caught_up(found, upto)
            # Nothing more was handed over meanwhile: the queue is complete again.
            if lane.behind >= self._positions.handing:
                lane.behind = None

    def _taken(self, lane: Lane, answer: dict[str, Any]) -> None:
        pdus = answer.get("pdus")
        if isinstance(pdus, dict):
            refused = sum(1 for result in pdus.values() if isinstance(result, dict) and result.get("error"))
            if refused:
                log.info("a server refused events", destination=lane.server, count=refused)
        self._departed(lane)

    def _departed(self, lane: Lane) -> None:
        lane.refused = None
        last_edu = lane.arrived()
        if last_edu:
            self._positions.took_edus(lane.server, last_edu)
        self._positions.changed(lane.server)

    async def _not_taken(self, lane: Lane, error: RemoteError | ApiError, before: Trouble | None) -> bool:
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
        await self._failed(lane, error, before)
        if flight is not None and not flight.events and not flight.last_edu:
            lane.flight = None  # only passing things, which are not worth a second attempt
        return False

    async def _failed(self, lane: Lane, error: RemoteError | ApiError, before: Trouble | None) -> None:
        self._backoff.failed(lane.server, before=before)
        trouble = self._backoff.trouble(lane.server)
        if trouble is None:
            return
        lane.refused = replace(trouble) if error.status else None
        silent = self._clock.now() - trouble.since
        if silent > SILENT_AFTER and not await self._rooms.shares_with(lane.server):
            log.info("a server is gone and shares no room, what waits for it is dropped", destination=lane.server)
            self._shut_out(lane)
        elif silent > REST_AFTER:
            lane.rest()
            self._positions.to_trim[lane.server] = silent > GONE_AFTER
