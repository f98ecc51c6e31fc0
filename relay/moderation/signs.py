"""Counting what looks odd from the outside: rates, shares, and how far a number lies from what is usual. Pure.

Everything is in memory and forgets by itself. Whom a counter is about stands in it only as a keyed hash, under a key of the
day, so that a memory dump is no list of who did what.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from relay.clock import DAY, HOUR

T = TypeVar("T")

MAX_COUNTERS = 20_000


class Names:
    """Keyed hashes under a key that changes every day."""

    def __init__(self, random_bytes: Callable[[int], bytes]) -> None:
        self._random_bytes = random_bytes
        self._day = -1
        self._key = b""

    def of(self, text: str, now: int) -> bytes:
        if now // DAY != self._day:
            self._day, self._key = now // DAY, self._random_bytes(32)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=self._key, digest_size=12).digest()


class Kept(Generic[T]):
    """A bounded table: the longest unused goes first."""

    def __init__(self, make: Callable[[], T], most: int = MAX_COUNTERS) -> None:
        self._make = make
        self._most = most
        self._rows: OrderedDict[bytes, T] = OrderedDict()

    def of(self, name: bytes) -> T:
        row = self._rows.get(name)
        if row is None:
            row = self._rows[name] = self._make()
            if len(self._rows) > self._most:
                self._rows.popitem(last=False)
        else:
            self._rows.move_to_end(name)
        return row

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(slots=True)
class Window:
    """How much within the last `length_ms`, in steps of a twelfth of it."""

    length_ms: int
    _steps: deque[tuple[int, int]] = field(default_factory=deque)
    _sum: int = 0

    def add(self, now: int, amount: int = 1) -> int:
        step = now * 12 // self.length_ms
        if self._steps and self._steps[-1][0] == step:
            self._steps[-1] = (step, self._steps[-1][1] + amount)
        else:
            self._steps.append((step, amount))
        self._sum += amount
        return self.sum(now)

    def sum(self, now: int) -> int:
        oldest = now * 12 // self.length_ms - 12
        while self._steps and self._steps[0][0] <= oldest:
            self._sum -= self._steps.popleft()[1]
        return self._sum


@dataclass(slots=True)
class Share:
    """Of the last `most` outcomes, how many went one way."""

    most: int
    _outcomes: deque[bool] = field(default_factory=deque)

    def add(self, hit: bool) -> float | None:
        """The share, once there are enough."""
        self._outcomes.append(hit)
        if len(self._outcomes) > self.most:
            self._outcomes.popleft()
        return sum(self._outcomes) / self.most if len(self._outcomes) == self.most else None


@dataclass(slots=True)
class Usual:
    """A moving average and variance of counts per hour, of which older ones count half after `half_life_ms`."""

    half_life_ms: int = HOUR
    _mean: float = 0.0
    _variance: float = 0.0
    _since: int = 0
    _count: int = 0
    _steps: int = 0

    def add(self, now: int, step_ms: int = HOUR // 6) -> float:
        """How many standard deviations the present step lies above what is usual; 0 while nothing is usual yet."""
        if now - self._since >= step_ms:
            passed = max(1, (now - self._since) // step_ms) if self._since else 0
            keep = 0.5 ** (step_ms / self.half_life_ms)
            for count in [self._count, *[0] * min(passed - 1, 100)] if passed else []:
                difference = count - self._mean
                self._mean += (1 - keep) * difference
                self._variance = keep * (self._variance + (1 - keep) * difference * difference)
                self._steps += 1
            self._since, self._count = now, 0
        self._count += 1
        if self._steps < 6:
            return 0.0
        return (self._count - self._mean) / math.sqrt(self._variance + 1.0)
