"""How many notices the form for everybody takes: so many an hour from one network, fewer while many come, and a bound on all.

Whoever floods it from one place shuts it for that place only; whoever floods it from many finds each of them soon shut. A network
is a /24 or a /56, known in memory only, by a hash whose key is thrown away every day. Addresses that are none of the internet
(a proxy that tells nothing) stand for many people and have a bound of their own.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections import Counter, deque

from relay.clock import DAY, HOUR, SECOND, Clock
from relay.errors import LimitExceeded
from relay.limits import parsed

OF_ONE_NETWORK = 10
OF_ONE_WHILE_BUSY = 2
OF_ONE_UNTOLD = 60
# Of all together; from half of it on it is busy.
OF_ALL = 600
BUSY = OF_ALL // 2
UNTOLD = "untold"


class FormLimits:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._came: deque[tuple[int, bytes]] = deque()
        self._of_network: Counter[bytes] = Counter()
        self._key, self._key_day = secrets.token_bytes(32), -1

    @property
    def number(self) -> int:
        """How many came within the hour."""
        self._forget_old(self._clock.now())
        return len(self._came)

    def admit(self, address: str) -> None:
        """Raises LimitExceeded."""
        now = self._clock.now()
        self._forget_old(now)
        network = network_of(address)
        name, most = self._named(network, now), OF_ONE_NETWORK if network != UNTOLD else OF_ONE_UNTOLD
        if len(self._came) >= BUSY and network != UNTOLD:
            most = OF_ONE_WHILE_BUSY
        if len(self._came) >= OF_ALL:
            raise LimitExceeded((self._came[0][0] + HOUR - now) / SECOND)
        if self._of_network[name] >= most:
            oldest = next(ts for ts, one in self._came if one == name)
            raise LimitExceeded((oldest + HOUR - now) / SECOND)
        self._came.append((now, name))
        self._of_network[name] += 1

    def _named(self, network: str, now: int) -> bytes:
        if self._key_day != now // DAY:
            self._key, self._key_day = secrets.token_bytes(32), now // DAY
        return hmac.digest(self._key, network.encode(), "sha256")

    def _forget_old(self, now: int) -> None:
        while self._came and self._came[0][0] <= now - HOUR:
            _, name = self._came.popleft()
            self._of_network[name] -= 1
            if not self._of_network[name]:
                del self._of_network[name]


def network_of(address: str) -> str:
    """Those who share it are taken for one: a home, a phone company's customers."""
    one = parsed(address)
    if one is None or not one.is_global:
        return UNTOLD
    return str(ipaddress.ip_network((one, 24 if one.version == 4 else 56), strict=False))
