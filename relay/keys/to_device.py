"""Messages from device to device: queued until the receiving device has taken them, never stored longer, never readable.

A message is gone from the queue when its device syncs with the token of the answer that held it. An answer holds at most
a hundred; then a mark says up to which one, and the answer's token stands for that. What the seal does not list is
refused, or dropped where another server sent it. Spec: client-server-api/#send-to-device-messaging,
server-server-api/#send-to-device-messaging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Any

import orjson
import structlog

from relay.accounts.devices import Devices
from relay.clock import DAY, HOUR, Clock
from relay.db import Database, Query, Row, Tx
from relay.departures import Departures
from relay.doors import Doors
from relay.errors import ApiError, BadJson, Forbidden, InvalidParam, Refused, TooLarge
from relay.ids import is_user_id, random_string, server_of
from relay.keys.kept import Kept
from relay.keys.shapes import is_name
from relay.part import Finding, Part, SyncAsk, SyncShare, TakesEdu
from relay.protocol.seal import Seal
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, get_object

log = structlog.get_logger("to_device")

TOPIC = "to_device"
EDU = "m.direct_to_device"
ALL_DEVICES = "*"

MAX_PER_ANSWER = 100
MAX_MESSAGE_BYTES = 64 * 1024
MAX_REQUEST_BYTES = 4 * 2**20
MAX_EDU_BYTES = 64 * 1024
MAX_MESSAGE_ID = 32
MAX_QUEUES_KEPT = 20_000
MAX_DEVICES_KEPT = 20_000
KEPT_DAYS = 7
SWEEP_SECONDS = HOUR / 1000

# {user: {device or *: content as JSON}}
Messages = dict[str, dict[str, bytes]]
# Runs in the same transaction, before anything is queued; raises AlreadySent.
First = Callable[[Query], None]


class AlreadySent(Exception):
    """The same transaction ID again: nothing is done twice."""


_UNTIL_TAKEN = "until the device has taken it"


class ToDevice(Part):
    schema = Schema(
        "to_device",
        tables=(
            Table(
                "to_device_messages",
                "ciphertext, or what the seal lists of verification and key requests",
                {
                    "user_id": ("whom it is for", _UNTIL_TAKEN),
                    "device_id": ("which device it is for", _UNTIL_TAKEN),
                    "pos": ("its place in the queue", _UNTIL_TAKEN),
                    "sender": ("who sent it", _UNTIL_TAKEN),
                    "type": ("which kind of message", _UNTIL_TAKEN),
                    "content": ("the content, encrypted or listed by the seal", _UNTIL_TAKEN),
                },
            ),
            Table(
                "to_device_marks",
                "how far a long queue was handed out",
                {
                    "user_id": ("whose queue", "until the device syncs again"),
                    "device_id": ("which device's queue", "until the device syncs again"),
                    "token": ("the answer that could not hold everything", "until the device syncs again"),
                    "pos": ("the last message in it", "until the device syncs again"),
                },
            ),
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
            """
            CREATE TABLE to_device_messages (
                user_id TEXT NOT NULL, device_id TEXT NOT NULL, pos BIGINT NOT NULL, sender TEXT NOT NULL,
                type TEXT NOT NULL, content BYTES NOT NULL, PRIMARY KEY (user_id, device_id, pos));
            CREATE TABLE to_device_marks (
                user_id TEXT NOT NULL, device_id TEXT NOT NULL, token BIGINT NOT NULL, pos BIGINT NOT NULL,
                PRIMARY KEY (user_id, device_id, token));
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
        self._devices = devices
        self._seal = seal
        self._doors = doors
        self._server_name = server_name
        # Up to which pos a device's queue is known to be empty. Nothing is ever inserted behind a committed pos.
        self._empty_to: Kept[tuple[str, str], int] = Kept(MAX_QUEUES_KEPT)

        # Devices that exist; dropped by `device_deleted`.
        self._known: Kept[tuple[str, str], bool] = Kept(MAX_DEVICES_KEPT)

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
            self._queue(tx, sender, event_type, local, first)
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

    def _queue(self, tx: Tx, sender: str, event_type: str, local: Messages, first: First | None) -> None:
        pos = tx.pos()
        sure: list[Row] = []
        unsure: Messages = {}
        for user_id, messages in local.items():
            for device_id, content in messages.items():
                if self._known.get((user_id, device_id)):
                    sure.append((user_id, device_id, pos, sender, event_type, content))
                else:
                    unsure.setdefault(user_id, {})[device_id] = content
        tickets = {
            (user_id, device_id): self._known.begin((user_id, device_id))
            for user_id, m in unsure.items()
            for device_id in m
        }
        found: list[Row] = []

        def insert(query: Query) -> None:
            if first is not None:
                first(query)
            for user_id, messages in unsure.items():
                # Whoever names a device that is not there sends to nobody, as the standard has it.
                known = self._devices.ids(query, user_id)
                named = local[user_id]
                for device_id, content in messages.items():
                    if device_id == ALL_DEVICES:
                        found.extend(
                            (user_id, one, pos, sender, event_type, content) for one in known if one not in named
                        )
                    elif device_id in known:
                        found.append((user_id, device_id, pos, sender, event_type, content))
            query.many(_INSERT, found)

        def learn() -> None:
            for user_id, device_id, *_ in found:
                if (user_id, device_id) in tickets:
                    self._known.put((user_id, device_id), True, tickets[(user_id, device_id)])

        tx.call(insert)
        if sure:
            tx.many(_INSERT, sure)
        tx.after(learn)
        if local:
            tx.ring(local, TOPIC)

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
                self._queue(tx, sender, event_type, local, first)
            try:
                await tx
            except AlreadySent:
                pass

    # --- handing out

    async def changes(self, ask: SyncAsk, share: SyncShare) -> None:
        device = (ask.user_id, ask.device_id)
        if ask.since is not None and not ask.concerns(TOPIC) and (self._empty_to.get(device) or -1) >= ask.since:
            return
        ticket = self._empty_to.begin(device)
        rows, taken, over = await self._db.read(self._waiting, ask.user_id, ask.device_id, ask.since, ask.upto)
        if taken is not None:
            with self._db.write() as tx:
                self._remove(tx, ask, taken)
        if over:
            # The token of this answer must not stand for the messages that it does not hold. The mark is a change of
            # its own, so that the next answer has another token, and comes at once.
            with self._db.write() as tx:
                tx.run(
                    "INSERT INTO to_device_marks (user_id, device_id, token, pos) VALUES ($1, $2, $3, $4) "
                    "ON CONFLICT (user_id, device_id, token) DO UPDATE SET pos = excluded.pos",
                    ask.user_id,
                    ask.device_id,
                    ask.upto,
                    rows[-1][0],
                )
                tx.pos()
                tx.ring((ask.user_id,), TOPIC)
            await tx
        elif not rows:
            self._empty_to.put(device, ask.upto, ticket)
        share.to_device += [
            {"sender": sender, "type": event_type, "content": orjson.Fragment(content)}
            for _, sender, event_type, content in rows
        ]

    @staticmethod
    def _waiting(
        query: Query, user_id: str, device_id: str, since: int | None, upto: int
    ) -> tuple[list[Row], int | None, bool]:
        """(messages for this answer, up to where earlier ones are taken and still here, whether there are more)."""
        taken = 0
        if since is not None:
            mark = query.value(
                "SELECT pos FROM to_device_marks WHERE user_id = $1 AND device_id = $2 AND token = $3",
                user_id,
                device_id,
                since,
            )
            taken = since if mark is None else mark
        rows = query.all(
            "SELECT pos, sender, type, content FROM to_device_messages "
            "WHERE user_id = $1 AND device_id = $2 AND pos > $3 AND pos <= $4 ORDER BY pos LIMIT $5",
            user_id,
            device_id,
            taken,
            upto,
            MAX_PER_ANSWER + 1,
        )
        old = query.value(
            "SELECT 1 FROM to_device_messages WHERE user_id = $1 AND device_id = $2 AND pos <= $3 LIMIT 1",
            user_id,
            device_id,
            taken,
        )
        return rows[:MAX_PER_ANSWER], taken if old else None, len(rows) > MAX_PER_ANSWER

    @staticmethod
    def _remove(tx: Tx, ask: SyncAsk, taken: int) -> None:
        tx.run(
            "DELETE FROM to_device_messages WHERE user_id = $1 AND device_id = $2 AND pos <= $3",
            ask.user_id,
            ask.device_id,
            taken,
        )
        tx.run(
            "DELETE FROM to_device_marks WHERE user_id = $1 AND device_id = $2 AND token < $3",
            ask.user_id,
            ask.device_id,
            ask.since,
        )

    # --- going

    def device_deleted(self, tx: Tx, user_id: str, device_id: str) -> None:
        tx.run(_CLEAR, user_id, device_id)
        tx.run("DELETE FROM to_device_marks WHERE user_id = $1 AND device_id = $2", user_id, device_id)
        tx.run("DELETE FROM to_device_sent WHERE user_id = $1 AND device_id = $2", user_id, device_id)

        def gone() -> None:
            self._known.drop((user_id, device_id))
            # A message may have been queued between this write and now, while the device was still thought to be there.
            with self._db.write() as again:
                again.run(_CLEAR, user_id, device_id)

        tx.after(gone)

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

    def audit(self, query: Query) -> tuple[dict[str, int], list[Finding]]:
        counts, findings = super().audit(query)
        for user_id, device_id, pos, event_type, content in query.all(
            "SELECT user_id, device_id, pos, type, content FROM to_device_messages"
        ):
            if not self._listed(event_type, content):
                row = f"{user_id} {device_id} {pos}"
                findings.append(Finding("to_device_messages", row, "the seal does not list this to-device message"))
        return counts, findings


_INSERT = (
    "INSERT INTO to_device_messages (user_id, device_id, pos, sender, type, content) VALUES ($1, $2, $3, $4, $5, $6)"
)
_CLEAR = "DELETE FROM to_device_messages WHERE user_id = $1 AND device_id = $2"


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
