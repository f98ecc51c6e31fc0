"""The queues of to-device messages, one for each device: in at one end, out through /sync at the other.

A message is gone from the queue when its device syncs with the token of the answer that held it. An answer holds at most
a hundred; then a mark says up to which one, and the answer's token stands for that. Not here: who may send what
(`to_device`). Spec: client-server-api/#send-to-device-messaging, server behaviour.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import orjson

from relay.accounts.devices import Devices
from relay.db import Database, Query, Row, Tx
from relay.ids import server_of
from relay.keys.kept import Kept
from relay.part import SyncAsk, SyncShare
from relay.tables import Table

TOPIC = "to_device"
ALL_DEVICES = "*"

MAX_PER_ANSWER = 100
MAX_QUEUES_KEPT = 20_000
# Of a device that takes nothing any more, or is flooded.
MAX_WAITING = 10_000
MAX_WAITING_BYTES = 32 * 2**20
TRIM_EVERY = 500
MAX_DEVICES_KEPT = 20_000

# {user: {device or *: content as JSON}}
Messages = dict[str, dict[str, bytes]]
# Runs in the same transaction, before anything is queued; may raise to undo it.
First = Callable[[Query], None]

_UNTIL_TAKEN = "until the device has taken it"

TABLES = (
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
)
STEP = """
CREATE TABLE to_device_messages (
    user_id TEXT NOT NULL, device_id TEXT NOT NULL, pos BIGINT NOT NULL, sender TEXT NOT NULL,
    type TEXT NOT NULL, content BYTES NOT NULL, PRIMARY KEY (user_id, device_id, pos));
CREATE TABLE to_device_marks (
    user_id TEXT NOT NULL, device_id TEXT NOT NULL, token BIGINT NOT NULL, pos BIGINT NOT NULL,
    PRIMARY KEY (user_id, device_id, token))
"""


class DeviceQueues:
    def __init__(self, db: Database, devices: Devices) -> None:
        self._db = db
        self._devices = devices
        # Up to which pos a device's queue is known to be empty. Nothing is ever inserted behind a committed pos.
        self._empty_to: Kept[tuple[str, str], int] = Kept(MAX_QUEUES_KEPT)
        self._since_trim: dict[tuple[str, str], int] = {}
        # Devices that exist; dropped by `device_deleted`.
        self._known: Kept[tuple[str, str], bool] = Kept(MAX_DEVICES_KEPT)

    def put(self, tx: Tx, sender: str, event_type: str, local: Messages, first: First | None) -> None:
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
        # Filled on the way; the bell reads it after the commit.
        reached = {row[0] for row in sure}

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
            for user_id, device_id, *_ in (*sure, *found):
                if self._grown((user_id, device_id)):
                    _trim(query, user_id, device_id)
            reached.update(row[0] for row in found)

        def learn() -> None:
            for user_id, device_id, *_ in found:
                if (user_id, device_id) in tickets:
                    self._known.put((user_id, device_id), True, tickets[(user_id, device_id)])

        if sure:
            tx.many(_INSERT, sure)
        tx.call(insert)
        tx.after(learn)
        if local:
            tx.ring(reached, TOPIC)

    def _grown(self, device: tuple[str, str]) -> bool:
        """Whether it is time to look how long a queue has become. In the database thread alone."""
        count = self._since_trim.get(device, 0) + 1
        if len(self._since_trim) >= MAX_QUEUES_KEPT:
            self._since_trim.clear()
        self._since_trim[device] = count % TRIM_EVERY
        return count >= TRIM_EVERY

    def known_empty(self, user_id: str, device_id: str, pos: int) -> bool:
        """Whether it is known without a query that nothing waits that came up to `pos`, taken or not."""
        return (self._empty_to.get((user_id, device_id)) or -1) >= pos

    async def changes(self, ask: SyncAsk, share: SyncShare) -> None:
        device = (ask.user_id, ask.device_id)
        empty_to = self._empty_to.get(device) or -1
        if ask.since is not None and not ask.concerns(TOPIC) and empty_to >= ask.since:
            if empty_to < ask.upto:  # nothing came up to here, so that the next /sync need not look either
                self._empty_to.put(device, ask.upto, self._empty_to.begin(device))
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

    async def hand_out(
        self, user_id: str, device_id: str, taken: int, upto: int, limit: int, *, quiet_since: int | None = None
    ) -> tuple[list[Any], int]:
        """What waits after `taken`, and up to where that reaches; what lies up to `taken` is gone from now on.

        For sliding sync, where the client itself names the last batch that it has. `quiet_since` is a position since
        which the bell knows of no message.
        """
        device = (user_id, device_id)
        empty_to = self._empty_to.get(device) or -1
        if quiet_since is not None and empty_to >= quiet_since:
            if empty_to < upto:  # nothing came up to here, so that the next step need not look either
                self._empty_to.put(device, upto, self._empty_to.begin(device))
            return [], upto
        ticket = self._empty_to.begin(device)

        def look(query: Query) -> tuple[list[Row], bool]:
            rows = query.all(
                "SELECT pos, sender, type, content FROM to_device_messages "
                "WHERE user_id = $1 AND device_id = $2 AND pos > $3 AND pos <= $4 ORDER BY pos LIMIT $5",
                user_id, device_id, taken, upto, limit + 1,
            )  # fmt: skip
            old = "SELECT 1 FROM to_device_messages WHERE user_id = $1 AND device_id = $2 AND pos <= $3 LIMIT 1"
            return rows, query.value(old, user_id, device_id, taken) is not None

        rows, old = await self._db.read(look)
        if old:
            with self._db.write() as tx:
                tx.run(
                    "DELETE FROM to_device_messages WHERE user_id = $1 AND device_id = $2 AND pos <= $3",
                    user_id, device_id, taken,
                )  # fmt: skip
        if not rows:
            self._empty_to.put(device, upto, ticket)
        reached = rows[limit - 1][0] if len(rows) > limit else upto
        return [
            {"sender": sender, "type": event_type, "content": orjson.Fragment(content)}
            for _, sender, event_type, content in rows[:limit]
        ], reached

    @staticmethod
    def waiting_for(query: Query, devices: Iterable[tuple[str, str]], after: int, upto: int, limit: int) -> list[Row]:
        """(pos, user, device, sender, type, content) for several devices in (after, upto], in order, `limit` of each."""
        found: list[Row] = []
        for user_id, device_id in devices:
            found += query.all(
                "SELECT pos, user_id, device_id, sender, type, content FROM to_device_messages "
                "WHERE user_id = $1 AND device_id = $2 AND pos > $3 AND pos <= $4 ORDER BY pos LIMIT $5",
                user_id, device_id, after, upto, limit,
            )  # fmt: skip
        return sorted(found, key=lambda row: row[0])

    @staticmethod
    def taken(tx: Tx, devices: Iterable[tuple[str, str]], upto: int) -> None:
        tx.many(
            "DELETE FROM to_device_messages WHERE user_id = $1 AND device_id = $2 AND pos <= $3",
            [(user_id, device_id, upto) for user_id, device_id in devices],
        )

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

    def device_deleted(self, tx: Tx, user_id: str, device_id: str) -> None:
        tx.run(_CLEAR, user_id, device_id)
        tx.run("DELETE FROM to_device_marks WHERE user_id = $1 AND device_id = $2", user_id, device_id)

        def gone() -> None:
            self._known.drop((user_id, device_id))
            # A message may have been queued between this write and now, while the device was still thought to be there.
            with self._db.write() as again:
                again.run(_CLEAR, user_id, device_id)

        tx.after(gone)


_INSERT = (
    "INSERT INTO to_device_messages (user_id, device_id, pos, sender, type, content) VALUES ($1, $2, $3, $4, $5, $6)"
)
_CLEAR = "DELETE FROM to_device_messages WHERE user_id = $1 AND device_id = $2"


def _trim(query: Query, user_id: str, device_id: str) -> None:
    """A queue that is too long loses the oldest messages of whichever server has most of it: a flood sweeps away itself."""
    rows = query.all(
        "SELECT pos, sender, length(content) FROM to_device_messages WHERE user_id = $1 AND device_id = $2 ORDER BY pos",
        user_id,
        device_id,
    )
    count, size = len(rows), sum(row[2] for row in rows)
    if count <= MAX_WAITING and size <= MAX_WAITING_BYTES:
        return
    of_server: dict[str, deque[tuple[int, int]]] = {}
    for pos, sender, length in rows:
        of_server.setdefault(server_of(sender), deque()).append((pos, length))
    doomed = []
    while count > MAX_WAITING or size > MAX_WAITING_BYTES:
        pos, length = max(of_server.values(), key=len).popleft()
        doomed.append((user_id, device_id, pos))
        count, size = count - 1, size - length
    query.many("DELETE FROM to_device_messages WHERE user_id = $1 AND device_id = $2 AND pos = $3", doomed)
