"""One bell: the database rings it after each commit, and long polls, the outbox and other followers wait for it.

For each local user it remembers when each topic changed last, bounded: "did anything change for X since N, and what?"
needs no query. A topic is a room ID or the name of a part's own stream ("account_data", "to_device", …).
Typing notices have a line of their own, `typing`, in memory and with this process's life: they never touch `pos`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

# Topics remembered of one user; a client that was away for longer than these tell gathers everything.
MAX_TOPICS_PER_USER = 4_096
MAX_USERS = 20_000


class _Ear:
    __slots__ = ("changes", "floor", "last", "typing", "waiting")

    def __init__(self, floor: int) -> None:
        self.changes: dict[str, int] = {}  # topic -> pos, the latest change last
        self.floor = floor
        self.last = floor
        self.typing = 0
        self.waiting: set[asyncio.Future[None]] = set()


class Bell:
    def __init__(self) -> None:
        self._ears: dict[str, _Ear] = {}
        self._boot = 0
        self._forgotten = 0
        self._line = 0
        self._followers: set[asyncio.Future[None]] = set()
        self.typing = 0

    def begin(self, pos: int) -> None:
        """Changes up to `pos` happened before this process."""
        self._boot = self._forgotten = self._line = pos

    def _ear(self, user_id: str) -> _Ear:
        ear = self._ears.get(user_id)
        if ear is None:
            if len(self._ears) >= MAX_USERS:
                self._forget_quiet()
            ear = self._ears[user_id] = _Ear(self._forgotten)
        return ear

    def _forget_quiet(self) -> None:
        for user_id, ear in list(self._ears.items())[: MAX_USERS // 4]:
            if not ear.waiting:
                self._forgotten = max(self._forgotten, ear.last)
                del self._ears[user_id]

    def ring(self, users: Iterable[str], topic: str, pos: int) -> None:
        for user_id in users:
            ear = self._ear(user_id)
            ear.last = max(ear.last, pos)
            changes = ear.changes
            if changes.pop(topic, None) is None and len(changes) >= MAX_TOPICS_PER_USER:
                ear.floor = changes.pop(next(iter(changes)))
            changes[topic] = pos
            _wake(ear.waiting)

    def ring_typing(self, users: Iterable[str]) -> int:
        """Someone began or stopped typing where these users can see it. Returns the typing line's new number."""
        self.typing += 1
        for user_id in users:
            ear = self._ear(user_id)
            ear.typing = self.typing
            _wake(ear.waiting)
        return self.typing

    def wake(self, user_id: str) -> None:
        """Something ended (a session, a shutdown): whoever waits looks again."""
        ear = self._ears.get(user_id)
        if ear is not None:
            _wake(ear.waiting)

    def wake_all(self) -> None:
        for ear in self._ears.values():
            _wake(ear.waiting)
        _wake(self._followers)

    def moved(self, pos: int) -> None:
        self._line = max(self._line, pos)
        _wake(self._followers)

    def topics(self, user_id: str, since: int) -> frozenset[str] | None:
        """What changed for this user after `since`; None where that is no longer remembered."""
        ear = self._ear(user_id)
        if since < ear.floor:
            return None
        if since >= ear.last:
            return _NOTHING
        found = []
        for topic in reversed(ear.changes):
            if ear.changes[topic] <= since:
                break
            found.append(topic)
        return frozenset(found)

    def changed(self, user_id: str, since: int, typing: int) -> bool:
        ear = self._ear(user_id)
        return ear.last > since or since < ear.floor or ear.typing > typing

    async def wait(self, user_id: str, timeout: float) -> None:
        """Until something rings for this user, or `timeout` seconds. The caller looks with `changed` before and after."""
        await _waiting(self._ear(user_id).waiting, timeout)

    async def wait_line(self, since: int) -> None:
        """For followers: until a change after `since` is committed, or somebody wakes all."""
        if self._line <= since:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._followers.add(future)
            try:
                await future
            finally:
                self._followers.discard(future)


_NOTHING: frozenset[str] = frozenset()


def _wake(waiting: set[asyncio.Future[None]]) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(None)
    waiting.clear()


async def _waiting(waiting: set[asyncio.Future[None]], timeout: float) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    waiting.add(future)
    timer = loop.call_later(timeout, _ring_once, future)
    try:
        await future
    finally:
        timer.cancel()
        waiting.discard(future)


def _ring_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
