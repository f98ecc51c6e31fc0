"""Delayed events: a client leaves an event here, to be sent later unless it says otherwise; so a call ends for whoever
lost the network. What waits has passed the seal, is a row, and survives a restart.

Whoever holds a delay's ID may restart, send or cancel it, without a session: call servers do that for their clients. State
that somebody else has set meanwhile is not overwritten; what its own sender sets in between changes nothing, since joining
a call comes after scheduling its end. Rights are judged at the time of sending. Spec: MSC4140.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import orjson

from relay.clock import DAY, HOUR, SECOND, Clock, rest
from relay.db import Database, Query, Tx
from relay.errors import ApiError, Forbidden, InvalidParam, LimitExceeded, MissingParam, NotAllowed, NotFound
from relay.ids import random_string
from relay.limits import Limits
from relay.part import Finding, Part
from relay.protocol.seal import Seal
from relay.rooms import delayed_store as store
from relay.rooms.delayed_store import CANCELLED, SENT, WAITING, Delayed
from relay.rooms.rooms import Rooms
from relay.rooms.send import Sender
from relay.rooms.store import Stored
from relay.web import Answer, Caller, Request, Route, get_object, get_optional_string, get_string

UNSTABLE = "/_matrix/client/unstable/org.matrix.msc4140"
PARAMETER = "org.matrix.msc4140.delay"

MAX_DELAY_MS = 24 * HOUR
MAX_SCHEDULED = 100
MAX_TRANSACTION_ID = 255
ENDED_KEPT_MS = DAY
SWEEP_SECONDS = HOUR / SECOND
MAX_AT_ONCE = 50
RETRY_MS = 5 * SECOND
# Its letters are the only proof that an unauthenticated caller gives.
ID_LENGTH = 32
ACTIONS = ("send", "cancel", "restart")
# These have duties beside the event, which are those of the moment.
NOT_DELAYED = frozenset({"m.room.create", "m.room.member", "m.room.canonical_alias"})
REDACTION = "m.room.redaction"

CAPABILITIES = {
    "org.matrix.msc4140.delayed_events": {"max_delay_ms": MAX_DELAY_MS, "max_scheduled": MAX_SCHEDULED},
}


class DelayedEvents(Part):
    schema = store.SCHEMA

    def __init__(self, db: Database, clock: Clock, rooms: Rooms, sender: Sender, seal: Seal, limits: Limits) -> None:
        self._db = db
        self._clock = clock
        self._rooms = rooms
        self._sender = sender
        self._seal = seal
        self._limits = limits
        self._changed = asyncio.Event()
        # Held from looking at a row to the end of what is done about it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def routes(self) -> Iterable[Route]:
        one = f"{UNSTABLE}/delayed_events/{{delayId}}"
        yield Route(
            "PUT", f"{UNSTABLE}/rooms/{{roomId}}/delayed_event/{{eventType}}/{{txnId}}", self._put, limit="messages"
        )
        yield Route("GET", f"{UNSTABLE}/delayed_events", self._list)
        yield Route("GET", one, self._get)
        yield Route("POST", one, self._act_by_body, auth="optional", limit="messages")
        yield Route("POST", f"{one}/{{action}}", self._act_by_path, auth="optional", limit="messages")

    # --- scheduling

    async def _put(self, request: Request) -> Answer:
        body = request.json()
        delay = body.get("delay_ms")
        if type(delay) is not int or delay <= 0:
            raise InvalidParam("The key delay_ms is a number of milliseconds above 0.")
        if delay > MAX_DELAY_MS:
            raise Forbidden(
                f"An event can wait for {MAX_DELAY_MS} ms at most. Schedule it later, or restart its delay."
            )
        params = request.params
        state_key = get_optional_string(body, "state_key")
        delay_id = await self.schedule(
            request.who, params["roomId"], params["eventType"], state_key, get_object(body, "content"), delay,
            txn_id=params["txnId"],
        )  # fmt: skip
        return {"delay_id": delay_id}

    async def asked(self, request: Request, state_key: str | None) -> Answer | None:
        """For /send and /state: the answer where the request carries the delay as a parameter, as clients in use do."""
        text = request.query.get(PARAMETER)
        if text is None:
            return None
        delay = request.query_int(PARAMETER, 0, low=1)
        if delay > MAX_DELAY_MS:
            extra: dict[str, Any] = {
                "org.matrix.msc4140.errcode": "M_MAX_DELAY_EXCEEDED",
                "org.matrix.msc4140.max_delay": MAX_DELAY_MS,
            }
            raise ApiError(f"An event can wait for {MAX_DELAY_MS} ms at most. Schedule it later.", **extra)
        params = request.params
        delay_id = await self.schedule(
            request.who, params["roomId"], params["eventType"], state_key, request.json(), delay,
            txn_id=params.get("txnId"),
        )  # fmt: skip
        return {"delay_id": delay_id}

    async def schedule(
        self,
        who: Caller,
        room_id: str,
        event_type: str,
        state_key: str | None,
        content: dict[str, Any],
        delay_ms: int,
        *,
        txn_id: str | None = None,
    ) -> str:
        if event_type in NOT_DELAYED:
            raise InvalidParam(f"An event of the type {event_type} can't wait. Send it when it is due.")
        if txn_id is not None and len(txn_id) > MAX_TRANSACTION_ID:
            raise InvalidParam(f"A transaction ID has at most {MAX_TRANSACTION_ID} characters.")
        room = await self._rooms.require_joined(room_id, who.user_id)
        redacts = None
        if event_type == REDACTION:
            redacts = get_string(content, "redacts")
            content = {key: value for key, value in content.items() if key != "redacts"}
        content = self._seal.outgoing(event_type, state_key, content)
        one = Delayed(
            random_string(ID_LENGTH), who.user_id, who.device_id, room_id, event_type, state_key, redacts, content,
            room.state.get((event_type, state_key)) if state_key is not None else None, delay_ms, self._clock.now(),
        )  # fmt: skip
        txn = None if txn_id is None else f"{room_id} {event_type} {txn_id}"
        with self._db.write() as tx:
            tx.call(lambda query: store.insert(query, one, txn, MAX_SCHEDULED))
            tx.after(self._changed.set)
        got: str | int = await tx
        if isinstance(got, int):
            raise LimitExceeded(max(0, got - self._clock.now()) / SECOND)
        return got

    # --- what waits

    async def _list(self, request: Request) -> Answer:
        waiting = await self._db.read(store.waiting_of, request.user_id)
        return {"delayed_events": [one.shown() for one in waiting if not await self._overtaken(one)]}

    async def _get(self, request: Request) -> Answer:
        return (await self._find(request)).shown()

    async def _find(self, request: Request) -> Delayed:
        one = await self._db.read(store.find, request.params["delayId"])
        if one is None or (request.caller is not None and request.caller.user_id != one.user_id):
            raise NotFound("There is no delayed event with this ID, or it is over since long.")
        return one

    async def _act_by_body(self, request: Request) -> Answer:
        action = request.optional_json().get("action")
        if action is None:
            raise MissingParam("The key action is missing: send, cancel or restart.")
        if action not in ACTIONS:
            raise InvalidParam("The key action is one of send, cancel and restart.")
        return await self._act(request, str(action))

    async def _act_by_path(self, request: Request) -> Answer:
        action = request.params["action"]
        if action not in ACTIONS:
            raise NotFound("A delayed event can be sent, cancelled or restarted.")
        return await self._act(request, action)

    async def _act(self, request: Request, action: str) -> Answer:
        request.optional_json()
        async with self._lock(request.params["delayId"]):
            one = await self._find(request)
            if one.outcome == WAITING and await self._overtaken(one):
                await self._end(one, CANCELLED)
                one = await self._find(request)
            if one.outcome != WAITING:
                if (action, one.outcome) in (("send", SENT), ("cancel", CANCELLED)):
                    return {}
                raise ApiError(
                    "This event was sent already." if one.outcome == SENT else "This event was cancelled already.",
                    status=409,
                )
            if action == "send":
                await self._send(one)
            elif action == "cancel":
                await self._end(one, CANCELLED)
            else:
                with self._db.write() as tx:
                    tx.run(
                        "UPDATE delayed_events SET since_ts = $2 WHERE delay_id = $1 AND outcome = 0",
                        one.delay_id,
                        self._clock.now(),
                    )
                    tx.after(self._changed.set)
                await tx
        return {}

    def _lock(self, delay_id: str) -> asyncio.Lock:
        lock = self._locks.get(delay_id)
        if lock is None:
            lock = self._locks[delay_id] = asyncio.Lock()
        return lock

    async def _overtaken(self, one: Delayed) -> bool:
        """Whether somebody else set this state since."""
        if one.state_key is None:
            return False
        room = await self._rooms.get(one.room_id)
        now = room.state.get((one.type, one.state_key)) if room is not None else None
        if room is None or now is None or now == one.replaces:
            return False
        event = await room.event(one.type, one.state_key)
        return event is not None and event.sender != one.user_id

    async def _end(self, one: Delayed, outcome: int, *, event_id: str | None = None, error: Any = None) -> None:
        with self._db.write() as tx:
            self._note_end(tx, one, outcome, event_id, error)
        await tx

    def _note_end(self, tx: Tx, one: Delayed, outcome: int, event_id: str | None, error: Any) -> None:
        tx.run(
            "UPDATE delayed_events SET outcome = $2, ended_ts = $3, event_id = $4, error = $5"
            " WHERE delay_id = $1 AND outcome = 0",
            one.delay_id,
            outcome,
            self._clock.now(),
            event_id,
            None if error is None else orjson.dumps(error),
        )

    # --- sending

    async def _send(self, one: Delayed) -> None:
        """Raises what sending it now would raise."""
        self._limits.spend("messages", one.user_id)
        noted = False

        def note(tx: Tx, sent: Stored) -> None:
            # In the same write: a crash can't send it twice.
            nonlocal noted
            noted = True
            self._note_end(tx, one, SENT, sent.id, None)

        sent = await self._sender.send(
            one.room_id, sender=one.user_id, type=one.type, content=one.content, state_key=one.state_key,
            redacts=one.redacts, beside=note,
        )  # fmt: skip
        if not noted:  # the room says so already
            await self._end(one, SENT, event_id=sent.id)

    async def run(self) -> None:
        swept = 0.0
        while True:
            self._changed.clear()
            began, now = self._clock.monotonic(), self._clock.now()
            if began >= swept:
                await self._sweep()
                swept = began + SWEEP_SECONDS
            rows, following = await self._db.read(store.due, now, MAX_AT_ONCE)
            well = [await self._deliver(one.delay_id) for one in rows]
            if rows and all(well):
                continue
            if rows:
                following = now + RETRY_MS
            wait = SWEEP_SECONDS if following is None else min(SWEEP_SECONDS, (following - now) / SECOND)
            await rest(self._clock, self._changed, wait, since=began)

    async def _deliver(self, delay_id: str) -> bool:
        """False where it is the server's own trouble, such as a full disk: then it is tried again."""
        async with self._lock(delay_id):
            one = await self._db.read(store.find, delay_id)
            if one is None or one.outcome != WAITING or one.due_ts > self._clock.now():
                return True
            if await self._overtaken(one):
                await self._end(one, CANCELLED)
                return True
            try:
                await self._send(one)
            except ApiError as refused:
                if refused.status >= 500:
                    return False
                await self._end(one, CANCELLED, error=refused.body())
            except NotAllowed as refused:
                await self._end(
                    one, CANCELLED, error=Forbidden(f"The room does not allow this: {refused.reason}.").body()
                )
        return True

    async def _sweep(self) -> None:
        with self._db.write() as tx:
            tx.run("DELETE FROM delayed_events WHERE outcome <> 0 AND ended_ts < $1", self._clock.now() - ENDED_KEPT_MS)
        await tx

    # --- going, and what the operator asks

    def forget(self, tx: Tx, user_id: str, erase: bool) -> None:
        """For `Account.on_deactivated`."""
        tx.run("DELETE FROM delayed_events WHERE user_id = $1", user_id)

    def _sealed(self, one: Delayed) -> bool:
        return self._seal.rule(one.type, one.state_key, one.content) is not None

    def reseal(self, query: Query) -> int:
        gone = [one.delay_id for one in store.everything(query) if not self._sealed(one)]
        for delay_id in gone:
            query.run("DELETE FROM delayed_events WHERE delay_id = $1", delay_id)
        return len(gone)

    def audit(self, query: Query) -> tuple[dict[str, int], list[Finding]]:
        counts, _ = super().audit(query)
        return counts, [
            Finding("delayed_events", one.delay_id, f"the seal does not list an event of the type {one.type[:80]}")
            for one in store.everything(query)
            if not self._sealed(one)
        ]
