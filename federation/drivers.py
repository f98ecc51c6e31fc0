"""When something is sent to whom: so many servers are driven at once, one transaction in flight for each, until it is taken.

One that keeps its answer gives up its place to others. The next attempt after a failure waits (`backoff.py`). What waits for
each is its lane (`lane.py`), what of it stands on disk `positions.py`. Spec: server-server-api/#transactions.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Coroutine
from typing import Any

import structlog

from federation.backoff import Backoff
from federation.catch_up import EventLog, missed
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
MAX_SLOW = 900
# A peer may judge fifty events before it answers.
TIMEOUT_FACTOR = 2
# A server that was down for longer keeps nothing in our memory.
REST_AFTER = HOUR
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
        self._ready: deque[Lane] = deque()
        self._awake = 0
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
        if self._backoff.wait_left(lane.server):
            self._set_timer(lane)
            return
        lane.awake = True
        if self._awake < MAX_AWAKE:
            self._start(lane)
        else:
            self._ready.append(lane)

    def _start(self, lane: Lane) -> None:
        if self.group is not None:
            self._awake += 1
            self.group.create_task(self._drive(lane))

    def _start_ready(self) -> None:
        while self._ready and self._awake < MAX_AWAKE and self.group is not None:
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

    def wake_due(self) -> None:
        """Whose wait is over."""
        now = self._clock.now()
        while self.timers and (self.timers[0][0] <= now or not self._backoff.wait_left(self.timers[0][1])):
            lane = self._positions.lanes.get(heapq.heappop(self.timers)[1])
            if lane is not None:
                lane.retry_at = 0
                if lane.has_work:
                    self.wake(lane)

    def _set_timer(self, lane: Lane) -> None:
        trouble = self._backoff.trouble(lane.server)
        if trouble is not None and lane.retry_at != trouble.retry_at:
            lane.retry_at = trouble.retry_at
            heapq.heappush(self.timers, (trouble.retry_at, lane.server))
            self._positions.due.set()

    def _backoff_changed(self, server: str) -> None:
        lane = self._positions.lanes.get(server)
        if lane is not None and lane.has_work:
            self.wake(lane)

    async def _drive(self, lane: Lane) -> None:
        """Sends until nothing is left, the server fails, or others wait for the place."""
        again = False
        try:
            while await self._send_next(lane):
                if self._ready:
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
            lane.awake = False
            if again:
                lane.awake = True
                self._ready.append(lane)
            self._start_ready()
        if not again and lane.has_work:
            self.wake(lane)

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
        self._positions.took_edus(lane.server, self._positions.handing)

    async def _catch_up(self, lane: Lane) -> None:
        while lane.behind is not None:
            upto = self._positions.handing
            if lane.behind < upto:
                found = await missed(self._db, self._rooms, lane.server, self._server_name, lane.behind, upto)
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
        last_edu = lane.arrived()
        if last_edu:
            self._positions.took_edus(lane.server, last_edu)
        self._positions.changed(lane.server)

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
            self._positions.to_trim[lane.server] = self._clock.now() - trouble.since > GONE_AFTER
        elif flight is not None and not flight.events and not flight.last_edu:
            lane.flight = None  # only passing things, which are not worth a second attempt
        return False
