"""A bounded memory in front of tables: what was read stays until a write drops it.

A value that was being read while its row changed must not be kept: `begin` before the read gives a ticket, `drop` tears
it up, and `put` takes a value only with a whole one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Kept(Generic[K, V]):
    def __init__(self, most: int) -> None:
        self._most = most
        self._values: dict[K, V] = {}
        self._tickets: dict[K, object] = {}

    def get(self, key: K) -> V | None:
        return self._values.get(key)

    def begin(self, key: K) -> object:
        """Call before reading."""
        if len(self._tickets) > self._most:
            self._tickets.clear()  # of readings that failed
        ticket = self._tickets[key] = object()
        return ticket

    def put(self, key: K, value: V, ticket: object) -> None:
        """Call after reading."""
        if self._tickets.get(key) is not ticket:
            return
        del self._tickets[key]
        while len(self._values) >= self._most:
            del self._values[next(iter(self._values))]
        self._values[key] = value

    def drop_where(self, concerned: Callable[[K], bool]) -> None:
        """The same for many."""
        for key in [key for key in (*self._tickets, *self._values) if concerned(key)]:
            self.drop(key)

    def drop(self, key: K) -> None:
        """Call after the commit of a change."""
        self._tickets.pop(key, None)
        self._values.pop(key, None)
