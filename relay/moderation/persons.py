"""Who may be the second person for what can't be undone: enrolled long enough, and seen lately.

A moderator who was made one yesterday, or whose account rests, is no second pair of eyes. Safety: two persons.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from relay.accounts.devices import Devices
from relay.accounts.users import Users
from relay.clock import DAY, Clock

ENROLLED_FOR_MS = 7 * DAY
SEEN_WITHIN_MS = 30 * DAY


class Persons:
    def __init__(self, users: Users, devices: Devices, clock: Clock) -> None:
        self._users = users
        self._devices = devices
        self._clock = clock
        # (user ID, since when) of those who are moderators beside the administrators; the assembly sets it.
        self.enrolled: Callable[[], Awaitable[Sequence[tuple[str, int]]]] | None = None

    async def moderators(self) -> dict[str, int]:
        """Everybody who may decide, and since when."""
        found = {one.user_id: one.created_day for one in await self._users.all() if one.admin and not one.deactivated}
        if self.enrolled is not None:
            found.update(await self.enrolled())
        return found

    async def is_moderator(self, user_id: str) -> bool:
        return user_id in await self.moderators()

    async def may_second(self, actor: str) -> list[str]:
        """Those whose word completes what `actor` has begun."""
        now = self._clock.now()
        old_enough = [
            user_id
            for user_id, since in (await self.moderators()).items()
            if user_id != actor and now - since >= ENROLLED_FOR_MS
        ]
        return [user_id for user_id in old_enough if await self._seen_lately(user_id, now)]

    async def _seen_lately(self, user_id: str, now: int) -> bool:
        days = [one.last_seen_day for one in await self._devices.list(user_id) if one.last_seen_day is not None]
        return bool(days) and now - max(days) <= SEEN_WITHIN_MS + DAY
