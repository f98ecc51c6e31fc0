"""Rate limits: token buckets by class and key, in memory, bounded. Spec: client-server-api/#rate-limiting.

A bucket holds at most `burst` and refills at `per_second`. A full bucket is forgotten: it says nothing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Protocol

from relay.clock import Clock
from relay.errors import LimitExceeded

MAX_BUCKETS = 50_000


def parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """One that is IPv4 in the form of IPv6 is IPv4. None where a proxy tells something else."""
    try:
        one = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return one.ipv4_mapped or one if isinstance(one, ipaddress.IPv6Address) else one


def place_of(address: str) -> str:
    """Whose requests are counted together: an IPv4 address, and of IPv6 the /56 that one connection to the internet gets, since
    whoever has it has all the addresses in it."""
    one = parsed(address)
    if isinstance(one, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((one, 56), strict=False))
    return address if one is None else str(one)


class Rate(Protocol):
    @property
    def per_second(self) -> float: ...
    @property
    def burst(self) -> int: ...


class Limits:
    def __init__(self, rates: Mapping[str, Rate], clock: Clock, *, enabled: bool = True) -> None:
        self._rates = rates
        self._clock = clock
        self._enabled = enabled
        self._buckets: dict[tuple[str, str], tuple[float, float]] = {}

    def spend(self, rate_class: str, key: str, cost: float = 1.0) -> None:
        """Raises LimitExceeded with the time until it would pass."""
        if not self._enabled:
            return
        rate = self._rates[rate_class]
        now = self._clock.monotonic()
        left, at = self._buckets.get((rate_class, key), (float(rate.burst), now))
        left = min(float(rate.burst), left + (now - at) * rate.per_second)
        if left < cost:
            raise LimitExceeded((cost - left) / rate.per_second)
        if len(self._buckets) >= MAX_BUCKETS:
            self._forget_full(now)
        self._buckets[(rate_class, key)] = (left - cost, now)

    def spend_at(self, rate_class: str, address: str) -> None:
        """The same for whoever is known by her address only."""
        self.spend(rate_class, place_of(address))

    def _forget_full(self, now: float) -> None:
        for bucket, (left, at) in list(self._buckets.items()):
            rate = self._rates[bucket[0]]
            if left + (now - at) * rate.per_second >= rate.burst:
                del self._buckets[bucket]
        while len(self._buckets) >= MAX_BUCKETS:
            del self._buckets[next(iter(self._buckets))]
