"""Messages from device to device, here and across servers: each sent once however often it is repeated, never readable.

What the seal does not list is refused, or dropped where another server sent it. Everything is on disk before the answer:
in the receiving device's queue (`device_queues`), or among what leaves for another server (`departures`).
Spec: client-server-api/#send-to-device-messaging, server-server-api/#send-to-device-messaging.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Any

import orjson
import structlog

from relay.accounts.devices import Devices
from relay.clock import DAY, HOUR, Clock
from relay.db import Database, Query, Tx
from relay.departures import Departures
from relay.doors import Doors
from relay.errors import ApiError, BadJson, Forbidden, InvalidParam, Refused, TooLarge
from relay.ids import is_user_id, random_string, server_of
from relay.keys import device_queues
from relay.keys.device_queues import DeviceQueues, First, Messages
from relay.keys.shapes import is_name
from relay.part import Finding, Part, SyncAsk, SyncShare, TakesEdu
from relay.protocol.seal import Seal
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, get_object

log = structlog.get_logger("to_device")

EDU = "m.direct_to_device"

MAX_MESSAGE_BYTES = 64 * 1024
MAX_REQUEST_BYTES = 4 * 2**20
MAX_EDU_BYTES = 64 * 1024
MAX_MESSAGE_ID = 32
KEPT_DAYS = 7
SWEEP_SECONDS = HOUR / 1000


class AlreadySent(Exception):
    """The same transaction ID again: nothing is done twice."""


class ToDevice(Part):
    schema = Schema(
        "to_device",
        tables=(
            *device_queues.TABLES,
            Table(
                "to_device_sent",
                "transaction IDs",
                {
                    "user_id": ("who sent", "a week"),
                    "device_id": ("from which device", "a week"),
                    "txn": (
                        "a digest of the type and the transaction ID, so that a retry sends nothing twice",
                        "a week",
                    ),
                    "day": ("since when", "a week"),
                },
            ),
            Table(
                "to_device_received",
                "message IDs of other servers",
                {
                    "origin": ("which server sent", "a week"),
                    "message_id": ("its name for the message, so that a repeated one is dropped", "a week"),
                    "day": ("since when", "a week"),
                },
            ),
        ),
        steps=(
            device_queues.STEP
            + """;
            CREATE TABLE to_device_sent (
                user_id TEXT NOT NULL, device_id TEXT NOT NULL, txn TEXT NOT NULL, day BIGINT NOT NULL,
                PRIMARY KEY (user_id, device_id, txn));
            CREATE INDEX to_device_sent_by_day ON to_device_sent (day);
            CREATE TABLE to_device_received (
                origin TEXT NOT NULL, message_id TEXT NOT NULL, day BIGINT NOT NULL, PRIMARY KEY (origin, message_id));
            CREATE INDEX to_device_received_by_day ON to_device_received (day)
            """,
        ),
    )

    def __init__(
        self,
        db: Database,
        clock: Clock,
        departures: Departures,
        devices: Devices,
        seal: Seal,
        doors: Doors,
        server_name: str,
    ) -> None:
        self._db = db
        self._clock = clock
        self._departures = departures
        self._seal = seal
        self._doors = doors
        self._server_name = server_name
        self.queues = DeviceQueues(db, devices)

    def routes(self) -> Iterable[Route]:
        yield Route(
            "PUT",
            "/_matrix/client/v3/sendToDevice/{type}/{txn_id}",
            self._send_route,
            limit="keys",
            max_body=MAX_REQUEST_BYTES,
        )

    def edus(self) -> Mapping[str, TakesEdu]:
        return {EDU: self._take}

    # --- sending

    async def _send_route(self, request: Request) -> Answer:
        event_type, txn_id = request.params["type"], request.params["txn_id"]
        if not is_name(event_type):
            raise InvalidParam("The type of a to-device message has 1 to 255 characters.")
        sender, device_id = request.user_id, request.who.device_id
        packed = _pack(self._seal, self._server_name, event_type, get_object(request.json(), "messages"))
        await self._pass_doors(sender, event_type, packed)
        txn = sha256(f"{event_type}\0{txn_id}".encode(errors="surrogatepass")).hexdigest()[:MAX_MESSAGE_ID]
        day = self._clock.now() // DAY

        def first(query: Query) -> None:
            if not query.run(
                "INSERT INTO to_device_sent (user_id, device_id, txn, day) VALUES ($1, $2, $3, $4) "
                "ON CONFLICT (user_id, device_id, txn) DO NOTHING",
                sender,
                device_id,
                txn,
                day,
            ):
                raise AlreadySent

        try:
            await self._deliver(sender, event_type, packed, first)
        except AlreadySent:
            pass
        return {}

    async def _pass_doors(self, sender: str, event_type: str, packed: Messages) -> None:
        """One person who takes nothing from the sender must not keep the others from getting their keys."""
        refused: ApiError | None = None
        for user_id in list(packed):
            try:
                await self._doors.to_device(sender, user_id, event_type)
            except ApiError as error:
                refused = error
                del packed[user_id]
        if refused is not None and not packed:
            raise refused

    async def deliver(self, sender: str, event_type: str, messages: Mapping[str, Mapping[str, Any]]) -> None:
        """Messages `{user: {device or *: content}}` of the relay's own making. Raises Refused where the seal says no."""
        await self._deliver(sender, event_type, _pack(self._seal, self._server_name, event_type, messages), None)

    async def _deliver(self, sender: str, event_type: str, packed: Messages, first: First | None) -> None:
        local = {user_id: m for user_id, m in packed.items() if server_of(user_id) == self._server_name}
        elsewhere: dict[str, Messages] = {}
        if len(local) < len(packed):
            for user_id, messages in packed.items():
                if user_id not in local:
                    elsewhere.setdefault(server_of(user_id), {})[user_id] = messages
        with self._db.write() as tx:
            self.queues.put(tx, sender, event_type, local, first)
            for server, theirs in elsewhere.items():
                for part in _split(theirs):
                    content = {
                        "sender": sender,
                        "type": event_type,
                        "message_id": random_string(MAX_MESSAGE_ID),
                        "messages": part,
                    }
                    self._departures.durable(tx, (server,), EDU, content)
        await tx

    # --- receiving from other servers

    async def _take(self, origin: str, content: dict[str, Any]) -> None:
        sender, event_type, message_id = content.get("sender"), content.get("type"), content.get("message_id")
        messages = content.get("messages")
        if not isinstance(sender, str) or server_of(sender) != origin or origin == self._server_name:
            raise Forbidden("A server can only send to-device messages of its own users.")
        if not isinstance(message_id, str) or not 0 < len(message_id) <= MAX_MESSAGE_ID:
            raise BadJson(f"The message_id of a to-device message has 1 to {MAX_MESSAGE_ID} characters.")
        if not isinstance(event_type, str) or not is_name(event_type) or not isinstance(messages, dict):
            raise BadJson("A to-device message has a type and messages.")
        local: Messages = {}
        for user_id, devices in messages.items():
            if server_of(user_id) != self._server_name or not isinstance(devices, dict):
                continue
            try:
                await self._doors.to_device(sender, user_id, event_type)
                packed = _pack(self._seal, self._server_name, event_type, {user_id: devices})
            except Refused:
                log.info(
                    "dropped a to-device message that the seal does not list",
                    origin=origin,
                    type=event_type[:MAX_MESSAGE_ID],
                )
            except ApiError:
                continue
            else:
                local |= packed
        day = self._clock.now() // DAY

        def first(query: Query) -> None:
            if not query.run(
                "INSERT INTO to_device_received (origin, message_id, day) VALUES ($1, $2, $3) "
                "ON CONFLICT (origin, message_id) DO NOTHING",
                origin,
                message_id,
                day,
            ):
                raise AlreadySent

        if local:
            with self._db.write() as tx:
                self.queues.put(tx, sender, event_type, local, first)
            try:
                await tx
            except AlreadySent:
                pass

    # --- handing out

    async def changes(self, ask: SyncAsk, share: SyncShare) -> None:
        await self.queues.changes(ask, share)

    async def hand_out(
        self, user_id: str, device_id: str, taken: int, upto: int, limit: int, *, quiet_since: int | None = None
    ) -> tuple[list[Any], int]:
        """For sliding sync, see `DeviceQueues.hand_out`."""
        return await self.queues.hand_out(user_id, device_id, taken, upto, limit, quiet_since=quiet_since)

    # --- going

    def device_deleted(self, tx: Tx, user_id: str, device_id: str) -> None:
        self.queues.device_deleted(tx, user_id, device_id)
        tx.run("DELETE FROM to_device_sent WHERE user_id = $1 AND device_id = $2", user_id, device_id)

    async def run(self) -> None:
        while True:
            with self._db.write() as tx:
                oldest = self._clock.now() // DAY - KEPT_DAYS
                tx.run("DELETE FROM to_device_sent WHERE day < $1", oldest)
                tx.run("DELETE FROM to_device_received WHERE day < $1", oldest)
            await self._clock.sleep(SWEEP_SECONDS)

    def reseal(self, query: Query) -> int:
        removed = 0
        for user_id, device_id, pos, event_type, content in query.all(
            "SELECT user_id, device_id, pos, type, content FROM to_device_messages"
        ):
            if not self._listed(event_type, content):
                removed += query.run(
                    "DELETE FROM to_device_messages WHERE user_id = $1 AND device_id = $2 AND pos = $3",
                    user_id,
                    device_id,
                    pos,
                )
        return removed

    def _listed(self, event_type: str, content: bytes) -> bool:
        try:
            return bool(self._seal.to_device(event_type, orjson.loads(content)) == orjson.loads(content))
        except ApiError:
            return False

    def forget_server(self, query: Query, server: str) -> int:
        return sum(
            query.run(sql, of)
            for sql, of in (
                ("DELETE FROM to_device_messages WHERE sender LIKE $1", f"%:{server}"),
                ("DELETE FROM to_device_received WHERE origin = $1", server),
            )
        )

    def audit(self, query: Query) -> tuple[dict[str, int], list[Finding]]:
        counts, findings = super().audit(query)
        for user_id, device_id, pos, event_type, content in query.all(
            "SELECT user_id, device_id, pos, type, content FROM to_device_messages"
        ):
            if not self._listed(event_type, content):
                row = f"{user_id} {device_id} {pos}"
                findings.append(Finding("to_device_messages", row, "the seal does not list this to-device message"))
        return counts, findings


def _pack(seal: Seal, server_name: str, event_type: str, messages: Mapping[str, Any]) -> Messages:
    """The messages as they may wait on disk. Raises BadJson, Refused, TooLarge."""
    packed: Messages = {}
    for user_id, devices in messages.items():
        # Of our own users only those who exist get anything; the names of others leave the house.
        if (server_of(user_id) != server_name and not is_user_id(user_id)) or not isinstance(devices, dict):
            raise BadJson("The key messages maps user IDs to objects.")
        theirs: dict[str, bytes] = {}
        for device_id, content in devices.items():
            if not isinstance(content, dict) or not is_name(device_id):
                raise BadJson("In messages each device ID has an object, the content.")
            raw = orjson.dumps(seal.to_device(event_type, content))
            if len(raw) > MAX_MESSAGE_BYTES:
                raise TooLarge(
                    f"A to-device message is larger than {MAX_MESSAGE_BYTES} bytes. Send it as an attachment."
                )
            theirs[device_id] = raw
        packed[user_id] = theirs
    return packed


def _split(messages: Messages) -> Iterator[dict[str, dict[str, Any]]]:
    """In portions of the size of an EDU."""
    part: dict[str, dict[str, Any]] = {}
    size = 0
    for user_id, devices in messages.items():
        for device_id, content in devices.items():
            if size and size + len(content) > MAX_EDU_BYTES:
                yield part
                part, size = {}, 0
            part.setdefault(user_id, {})[device_id] = orjson.Fragment(content)
            size += len(content)
    if part:
        yield part
