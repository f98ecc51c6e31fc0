"""Who may be the second person for what can't be undone: enrolled long enough, and seen lately.

A moderator who was made one yesterday, who has no key of her own, or whose account rests, is no second pair of eyes. Safety: two persons.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from relay.accounts.devices import Devices
from relay.clock import DAY, Clock

ENROLLED_FOR_MS = 7 * DAY
SEEN_WITHIN_MS = 30 * DAY


class Enrolled(Protocol):
    """A moderator, and since when a key of hers counts; None where she has none."""

    @property
    def user_id(self) -> str: ...
    @property
    def enrolled_ts(self) -> int | None: ...
    @property
    def rests(self) -> bool: ...


class Persons:
    def __init__(self, devices: Devices, clock: Clock, moderators: Callable[[], Awaitable[Sequence[Enrolled]]]) -> None:
        self._devices = devices
        self._clock = clock
        self._moderators = moderators

    async def moderators(self) -> list[str]:
        return [one.user_id for one in await self._moderators()]

    async def at_work(self) -> list[str]:
        """Without those whose accounts are locked or suspended: they decide nothing, and are told nothing, for as long."""
        return [one.user_id for one in await self._moderators() if not one.rests]

    async def is_moderator(self, user_id: str) -> bool:
        return any(one.user_id == user_id for one in await self._moderators())

    async def may_act(self, user_id: str) -> bool:
        """A moderator whose account is neither locked nor suspended."""
        return any(one.user_id == user_id and not one.rests for one in await self._moderators())

    async def may_second(self, actor: str) -> list[str]:
        """Those whose word completes what `actor` has begun."""
        now = self._clock.now()
        return [
            one.user_id
            for one in await self._moderators()
            if one.user_id != actor
            and not one.rests
            and one.enrolled_ts is not None
            and now - one.enrolled_ts >= ENROLLED_FOR_MS
            and await self._seen_lately(one.user_id, now)
        ]

    async def _seen_lately(self, user_id: str, now: int) -> bool:
        days = [one.last_seen_day for one in await self._devices.list(user_id) if one.last_seen_day is not None]
        return bool(days) and now - max(days) <= SEEN_WITHIN_MS + DAY
