"""Telling services what happened: each has a lane of its own that follows the log, one transaction at a time, until it is taken.

On disk stand how far a service was told and up to where the transaction in flight reaches, so that after a crash the same
one goes out again under the same ID. A slow or dead service keeps nobody waiting; it is asked again, later each time, and
at once when it speaks to us. Receipts wait with their positions; typing and presence are told as they are then.
Spec: application-service-api/#pushing-events, #pushing-ephemeral-data.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from relay.accounts.devices import Devices
from relay.appservices.asking import Asking
from relay.appservices.registration import Registration
from relay.appservices.transaction import Teller, Told
from relay.appservices.whereabouts import Whereabouts
from relay.bell import Bell
from relay.clock import MINUTE, SECOND, Clock, rest
from relay.db import Database, Query, Tx
from relay.ephemeral.presence import Presence
from relay.ephemeral.receipts import PRIVATE, READ, Receipt, Receipts
from relay.ephemeral.typing_notices import TypingNotices
from relay.errors import RemoteError, StorageFull
from relay.ids import random_string
from relay.part import Part
from relay.tables import Schema, Table

log = structlog.get_logger("appservices")

TIMEOUT_SECONDS = 60.0
BACKOFF_MIN_SECONDS = 1.0
BACKOFF_MAX_SECONDS = 10 * MINUTE / SECOND
# A service that speaks to us is tried again, but not with each of its requests.
HEARD_SECONDS = 5.0
# After a fault of our own: a full disk, a mistake.
TROUBLE_SECONDS = 30.0
# The position is written at least this often, so that a restart looks through little again.
MAX_POS_UNWRITTEN = 1_000
MAX_RECEIPTS = 500
MAX_PASSING = 1_000

_LIFE = "as long as the configuration names the service"
_KEEP = (
    "INSERT INTO appservice_lanes (service, pos, flight) VALUES ($1, $2, $3) "
    "ON CONFLICT (service) DO UPDATE SET pos = excluded.pos, flight = excluded.flight"
)

MakesTeller = Callable[[Registration, Whereabouts], Teller]


class _Lane:
    def __init__(
        self, one: Registration, teller: Teller, whereabouts: Whereabouts, pos: int, flight: int | None
    ) -> None:
        self.one = one
        self.teller = teller
        self.whereabouts = whereabouts
        # Everything up to here was taken; `flight` is how far the transaction reaches that may be on its way.
        self.pos = self.kept_pos = pos
        self.flight = flight
        self.news = asyncio.Event()
        self.heard = asyncio.Event()
        self.failing_since: float | None = None
        self.receipts: deque[Receipt] = deque(maxlen=MAX_RECEIPTS)
        # What changed lately; what it is now is looked up when it is told.
        self.typing: dict[str, None] = {}
        self.presence: dict[str, None] = {}

    def note(self, where: dict[str, None], what: str) -> None:
        if len(where) < MAX_PASSING:
            where[what] = None
            self.news.set()


class Delivery(Part):
    schema = Schema(
        "appservices",
        tables=(
            Table(
                "appservice_lanes",
                "how far a bridge or bot was told",
                {
                    "service": ("which one", _LIFE),
                    "pos": ("everything up to here was taken", _LIFE),
                    "flight": ("how far the transaction reaches that may be on its way", "until it is taken"),
                },
            ),
        ),
        steps=("CREATE TABLE appservice_lanes (service TEXT PRIMARY KEY, pos BIGINT NOT NULL, flight BIGINT)",),
    )

    def __init__(
        self,
        services: Sequence[Registration],
        db: Database,
        bell: Bell,
        clock: Clock,
        asking: Asking,
        devices: Devices,
        receipts: Receipts,
        typing: TypingNotices,
        presence: Presence,
        whereabouts: Callable[[Registration], Whereabouts],
        teller: MakesTeller,
        departed: Callable[[Query, int], list[tuple[str, str, int]]],
    ) -> None:
        self._services = services
        self._db = db
        self._bell = bell
        self._clock = clock
        self._asking = asking
        self._devices = devices
        self._receipts = receipts
        self._typing = typing
        self._presence = presence
        self._new_whereabouts = whereabouts
        self._new_teller = teller
        self._departed = departed
        self._lanes: dict[str, _Lane] = {}
        # Transactions with only passing things in them: their ID need not outlive us, only never come twice.
        self._boot = random_string(8)
        self._count = 0

    # --- before anybody is answered

    async def prepare(self) -> None:
        """Takes up each lane where it was left; a service that is new begins now."""
        known = dict(await self._db.read(lambda query: [(s, (p, f)) for s, p, f in query.all(_LANES)]))
        told = [one for one in self._services if one.url is not None]
        with self._db.write() as tx:
            for gone in known.keys() - {one.id for one in told}:
                tx.run("DELETE FROM appservice_lanes WHERE service = $1", gone)
            for one in told:
                if one.id not in known:
                    known[one.id] = (self._db.stable_pos(), None)
                    tx.run(_KEEP, one.id, *known[one.id])
        await tx
        for one in told:
            await self._begin(one, *known[one.id])
        if any(lane.one.receives_ephemeral for lane in self._lanes.values()):
            self._receipts.on_receipts.append(self._note_receipts)
            self._typing.on_change.append(lambda room_id: self._note_passing("typing", room_id))
            self._presence.on_change.append(lambda user_id: self._note_passing("presence", user_id))
        if any(lane.one.encrypts for lane in self._lanes.values()):
            self._devices.on_device_added.append(self._device_added)
            self._devices.on_device_deleted.append(self._device_deleted)

    async def _begin(self, one: Registration, pos: int, flight: int | None) -> None:
        whereabouts = self._new_whereabouts(one)
        whereabouts.begin(pos, await self._db.read(self._departed, pos))
        lane = self._lanes[one.id] = _Lane(one, self._new_teller(one, whereabouts), whereabouts, pos, flight)
        if one.receives_ephemeral:
            lane.receipts.extend(await self._db.read(self._receipts.since, pos, MAX_RECEIPTS))
        if one.encrypts:
            devices = await self._db.read(self._devices.of_everybody)
            lane.teller.devices.update(device for device in devices if lane.teller.covers(device[0]))

    # --- what is noted as it happens

    def _note_receipts(self, receipts: list[Receipt]) -> None:
        for lane in self._lanes.values():
            if lane.one.receives_ephemeral:
                lane.receipts.extend(receipts)
                lane.news.set()

    def _note_passing(self, kind: str, what: str) -> None:
        for lane in self._lanes.values():
            if lane.one.receives_ephemeral:
                lane.note(lane.typing if kind == "typing" else lane.presence, what)

    def _device_added(self, user_id: str, device_id: str) -> None:
        for lane in self._lanes.values():
            if lane.one.encrypts and lane.teller.covers(user_id):
                lane.teller.devices.add((user_id, device_id))

    def _device_deleted(self, tx: Tx, user_id: str, device_id: str) -> None:
        def forget() -> None:
            for lane in self._lanes.values():
                lane.teller.devices.discard((user_id, device_id))

        tx.after(forget)

    def heard_from(self, service: str) -> None:
        """It sent us a request: what waits for it is worth an attempt."""
        lane = self._lanes.get(service)
        if lane is not None and lane.failing_since is not None:
            if self._clock.monotonic() - lane.failing_since > HEARD_SECONDS:
                lane.heard.set()

    # --- the lanes

    async def run(self) -> None:
        if not self._lanes:
            return
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes.values():
                group.create_task(self._drive(lane), name="application service")
            pos = 0
            while True:
                pos = self._db.stable_pos()
                for lane in self._lanes.values():
                    if lane.pos < pos:
                        lane.news.set()
                await self._bell.wait_line(pos)

    async def _drive(self, lane: _Lane) -> None:
        while True:
            lane.news.clear()
            try:
                more = await self._step(lane)
            except StorageFull as full:
                log.warning("an application service waits: the disk is full", name=lane.one.id, exc_info=full)
                await self._clock.sleep(TROUBLE_SECONDS)
                continue
            except Exception as error:
                # One service's trouble must not end the others.
                log.error("telling an application service failed", name=lane.one.id, exc_info=error)
                await self._clock.sleep(TROUBLE_SECONDS)
                continue
            if not more:
                await lane.news.wait()

    async def _step(self, lane: _Lane) -> bool:
        """One look at the log, and one transaction where there is something to tell. Whether there may be more."""
        again = lane.flight is not None
        upto = self._db.stable_pos() if lane.flight is None else lane.flight
        told = await lane.teller.tell(lane.pos, upto) if upto > lane.pos else Told(upto)
        # To what may have been taken before a crash nothing is added: what came since would be lost with it.
        ephemeral = [] if again else await self._ephemeral(lane)
        if told.empty and not ephemeral and not again:
            lane.pos = told.upto
            if lane.pos - lane.kept_pos > MAX_POS_UNWRITTEN:
                await self._keep(lane, None)
            lane.whereabouts.told(lane.pos)
            return told.upto < upto
        if told.empty and not again:
            self._count += 1
            txn = f"p{self._boot}{self._count}"
        else:
            txn = f"{self._db.epoch}-{told.upto}"
            await self._keep(lane, told.upto)
        await self._until_taken(lane, txn, told.body(ephemeral, encrypts=lane.one.encrypts))
        lane.pos = told.upto
        await self._keep(lane, None, [(one["to_user_id"], one["to_device_id"]) for one in told.to_device])
        lane.whereabouts.told(lane.pos)
        return again or told.upto < upto

    async def _keep(self, lane: _Lane, flight: int | None, taken: Sequence[tuple[str, str]] = ()) -> None:
        """`taken` are the devices whose messages the service has now, up to its position."""
        if lane.flight == flight and lane.kept_pos == lane.pos and not taken:
            return
        with self._db.write() as tx:
            tx.run(_KEEP, lane.one.id, lane.pos, flight)
            if taken:
                lane.teller.forget_messages(tx, taken, lane.pos)
        await tx
        lane.flight, lane.kept_pos = flight, lane.pos

    async def _until_taken(self, lane: _Lane, txn: str, body: bytes) -> None:
        wait = BACKOFF_MIN_SECONDS
        while True:
            try:
                path = f"/transactions/{txn}"
                status, _ = await self._asking.say(lane.one, "PUT", path, body, legacy=path, timeout=TIMEOUT_SECONDS)
            except RemoteError as error:
                status = error.status
            if 200 <= status < 300:
                if lane.failing_since is not None:
                    log.info("an application service takes its transactions again", name=lane.one.id)
                lane.failing_since = None
                return
            if lane.failing_since is None:
                log.warning(
                    "an application service does not take its transactions, they wait for it",
                    name=lane.one.id,
                    status=status,
                )
            lane.failing_since = self._clock.monotonic()
            await self._pause(lane, wait)
            wait = min(2 * wait, BACKOFF_MAX_SECONDS)

    async def _pause(self, lane: _Lane, seconds: float) -> None:
        """Until the time is over, or the service is heard from."""
        lane.heard.clear()
        await rest(self._clock, lane.heard, seconds, since=self._clock.monotonic())

    # --- what passes

    async def _ephemeral(self, lane: _Lane) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        receipts, typing, presence = list(lane.receipts), list(lane.typing), list(lane.presence)
        lane.receipts.clear()
        lane.typing.clear()
        lane.presence.clear()
        found += await self._read_up_to(lane, receipts)
        for room_id in typing:
            if await lane.teller.concerns_room(room_id):
                content = {"user_ids": self._typing.in_room(room_id)}
                found.append({"type": "m.typing", "room_id": room_id, "content": content})
        for user_id in presence:
            if await lane.teller.concerns_person(user_id):
                found.append({"type": "m.presence", "sender": user_id, "content": self._presence.of(user_id)})
        return found

    async def _read_up_to(self, lane: _Lane, receipts: Sequence[Receipt]) -> list[dict[str, Any]]:
        by_room: dict[str, dict[str, Any]] = {}
        for one in receipts:
            if one.type != READ and not (one.type == PRIVATE and lane.teller.owned(one.user_id)):
                continue
            if one.room_id not in by_room and not await lane.teller.concerns_room(one.room_id):
                continue
            data = {"ts": one.ts, "thread_id": one.thread} if one.thread else {"ts": one.ts}
            of_event = by_room.setdefault(one.room_id, {}).setdefault(one.event_id, {})
            of_event.setdefault(one.type, {})[one.user_id] = data
        return [{"type": "m.receipt", "room_id": room, "content": content} for room, content in by_room.items()]


_LANES = "SELECT service, pos, flight FROM appservice_lanes"
