"""Which servers could not be reached, and from when on it is worth trying again. In memory; the outbox keeps it on disk.

The wait doubles with each failure, up to a bound that is longer for a server that has been silent for long. A request of
theirs shows that they live, and shortens it to the least wait.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from relay.clock import DAY, SECOND, Clock
from relay.errors import RemoteError

MAX_SERVERS = 20_000
JITTER = 0.2
# A server that was silent for so long is tried once a day.
SILENT_AFTER = 7 * DAY
MOST_WHILE_SILENT = DAY


@dataclass(slots=True)
class Trouble:
    """Times in milliseconds. `since` is when the server last worked, `failed_at` the latest failure."""

    since: int
    failed_at: int
    wait: int
    retry_at: int


class Backoff:
    def __init__(self, clock: Clock, *, least: int, most: int) -> None:
        self._clock = clock
        self._least = least
        self._most = most
        self._troubles: dict[str, Trouble] = {}
        self._on_change: Callable[[str], None] | None = None

    def tell(self, on_change: Callable[[str], None]) -> None:
        """Called with a server's name whenever its trouble begins, ends, or may be over sooner."""
        self._on_change = on_change

    def trouble(self, server: str) -> Trouble | None:
        return self._troubles.get(server)

    def failing(self) -> list[str]:
        """Those that could not be reached at the latest attempt."""
        return sorted(self._troubles)

    def restore(self, server: str, trouble: Trouble) -> None:
        self._troubles[server] = trouble

    def wait_left(self, server: str) -> int:
        """Milliseconds until the next attempt; 0 where one may be made now."""
        trouble = self._troubles.get(server)
        return 0 if trouble is None else left(trouble, self._clock.now())

    def require(self, server: str) -> None:
        """Raises RemoteError while the server is left alone."""
        left = self.wait_left(server)
        if left:
            raise RemoteError(
                server, 0, f"it could not be reached lately, the next attempt is in {left // SECOND + 1} s"
            )

    def failed(self, server: str, at_least: int = 0, *, before: Trouble | None = None) -> None:
        """`before` is a trouble that goes on, although the server has answered something since."""
        now = self._clock.now()
        known = self._troubles.get(server)
        if known is not None and left(known, now):
            return  # several requests that fail together are one failure
        since, wait = now, self._least
        if known is not None or before is not None:
            since = min(now, *(one.since for one in (known, before) if one is not None))
            wait = max(one.wait for one in (known, before) if one is not None) * 2
        most = self._most if now - since < SILENT_AFTER else max(self._most, MOST_WHILE_SILENT)
        wait = min(most, wait)
        if known is None and len(self._troubles) >= MAX_SERVERS:
            del self._troubles[next(iter(self._troubles))]
        retry_at = now + max(at_least, int(wait * random.uniform(1, 1 + JITTER)))
        self._troubles[server] = Trouble(since, now, wait, retry_at)
        self._changed(server)

    def succeeded(self, server: str) -> None:
        if server in self._troubles:
            del self._troubles[server]
            self._changed(server)

    def heard(self, server: str) -> None:
        """It asked us something, so it lives. That it can also be reached is not said."""
        trouble = self._troubles.get(server)
        if trouble is not None:
            trouble.wait = self._least
            sooner = trouble.failed_at + self._least
            if sooner < trouble.retry_at:
                trouble.retry_at = sooner
            self._changed(server)

    def _changed(self, server: str) -> None:
        if self._on_change is not None:
            self._on_change(server)


def left(trouble: Trouble, now: int) -> int:
    """Milliseconds until the next attempt."""
    # A failure that lies ahead: the clock was set back since, and how long ago it was, nobody knows.
    return 0 if now < trouble.failed_at else max(0, trouble.retry_at - now)
