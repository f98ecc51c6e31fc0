"""GET /sync: a long poll over `gather`. Spec: client-server-api/#get_matrixclientv3sync.

The answer goes out as soon as there is one; an empty one after `timeout`. Whoever is signed out while she waits is told.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import orjson

from relay.bell import Bell
from relay.clock import Clock
from relay.db import Database
from relay.part import Part
from relay.people.filters import Filters
from relay.sync.gather import Gather, Gathered
from relay.sync.token import Token
from relay.web import Caller, Request, Route

MAX_TIMEOUT_MS = 120_000

Seen = Callable[[str, str], Awaitable[None]]
# (user, device, pos of her token) -> whether the queue up to there is empty, as far as is known without a query.
NothingQueued = Callable[[str, str, int], bool]


class ClassicSync(Part):
    def __init__(
        self,
        db: Database,
        bell: Bell,
        clock: Clock,
        gather: Gather,
        filters: Filters,
        require_alive: Callable[[Caller], None],
        seen: Seen,
        nothing_queued: NothingQueued,
    ) -> None:
        self._db = db
        self._bell = bell
        self._clock = clock
        self._gather = gather
        self._filters = filters
        self._require_alive = require_alive
        self._seen = seen
        self._nothing_queued = nothing_queued
        self._stopping = False

    def routes(self) -> Iterable[Route]:
        return (Route("GET", "/_matrix/client/v3/sync", self._sync),)

    def forgotten(self, server: str) -> None:
        self._gather.forget_shared()

    def stop(self) -> None:
        """Long polls end with what they have."""
        self._stopping = True
        self._bell.wake_all()

    async def _sync(self, request: Request) -> bytes:
        who = request.who
        filter = await self._filters.get(who.user_id, request.query.get("filter"))
        text = request.query.get("since")
        since = Token.parse(text) if text else None
        if since is not None and (since.epoch != self._db.epoch or since.pos > self._db.stable_pos()):
            since = None
        full_state = request.query_bool("full_state")
        state_after = "state_after" if request.query_bool("use_state_after") else ""
        if request.query_bool("org.matrix.msc4222.use_state_after"):
            state_after = "org.matrix.msc4222.state_after"  # what matrix-js-sdk reads today
        timeout = request.query_int("timeout", 0, high=MAX_TIMEOUT_MS) / 1000
        await self._seen(who.user_id, request.query.get("set_presence", "online"))
        until = self._clock.monotonic() + timeout
        after, waits = since, since is not None and not full_state
        if after is not None and waits and self._nothing_queued(who.user_id, who.device_id, after.pos):
            # Most who ask have all there is, and nothing to be taken off their queue: they are looked at once something came.
            await self._wait(who, after, until)
        while True:
            upto = Token(self._db.epoch, self._db.stable_pos(), self._bell.typing)
            gathered = await self._gather.everything(
                who.user_id, who.device_id, after, upto, filter, full_state=full_state, state_after=state_after
            )
            if not waits or not gathered.empty or self._stopping or self._clock.monotonic() >= until:
                return rendered(gathered)
            after = upto
            await self._wait(who, after, until)

    async def _wait(self, who: Caller, after: Token, until: float) -> None:
        """Until something came for this person, the clock says `until`, or the server stops."""
        left = until - self._clock.monotonic()
        while left > 0 and not self._stopping and not self._bell.changed(who.user_id, after.pos, after.typing):
            await self._bell.wait(who.user_id, left)
            left = until - self._clock.monotonic()
            self._require_alive(who)


def rendered(gathered: Gathered) -> bytes:
    """The JSON of one answer; the rooms' bytes are spliced in as they are."""
    share = gathered.share
    head: dict[str, Any] = {"next_batch": str(gathered.upto)}
    if share.account_data:
        head["account_data"] = {"events": share.account_data}
    if share.presence:
        head["presence"] = {"events": share.presence}
    if share.to_device:
        head["to_device"] = {"events": share.to_device}
    if share.device_lists_changed or share.device_lists_left:
        head["device_lists"] = {"changed": sorted(share.device_lists_changed), "left": sorted(share.device_lists_left)}
    if share.one_time_keys_count is not None:
        head["device_one_time_keys_count"] = share.one_time_keys_count
    if share.unused_fallback_key_types is not None:
        head["device_unused_fallback_key_types"] = share.unused_fallback_key_types
        head["org.matrix.msc2732.device_unused_fallback_key_types"] = share.unused_fallback_key_types
    made = orjson.dumps(head)[:-1]
    rooms = []
    for name, section in (("join", gathered.joined), ("leave", gathered.left)):
        if section:
            rooms.append(b'"' + name.encode() + b'":' + _object(section))
    for name, stripped in (("invite", gathered.invited), ("knock", gathered.knocked)):
        if stripped:
            rooms.append(b'"' + name.encode() + b'":' + orjson.dumps(stripped))
    if rooms:
        made += b',"rooms":{' + b",".join(rooms) + b"}"
    return made + b"}"


def _object(section: Mapping[str, bytes]) -> bytes:
    return b"{" + b",".join(orjson.dumps(room_id) + b":" + made for room_id, made in section.items()) + b"}"
