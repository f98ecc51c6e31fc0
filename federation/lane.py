"""What waits for one server, in order, and the transaction that is on its way there.

Memory only, and bounded: where more waits than is kept here, `behind` says up to which position the queue is complete, and
the rest is read from the log (`catch_up.py`). Not about when to send (`outbox.py`). Spec: server-server-api/#transactions.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from federation.backoff import Trouble
from relay.protocol.canonical import encode, to_urlsafe_base64

# Spec: server-server-api/#transactions
MAX_PDUS = 50
MAX_EDUS = 100
MAX_WAITING = 500
MAX_WAITING_WHILE_DOWN = 50
MAX_PASSING = 200
ID_BYTES = 18


class Waiting(NamedTuple):
    pos: int
    event_id: str
    raw: bytes


class Departing(NamedTuple):
    """A durable EDU as its row has it."""

    pos: int
    edu_type: str
    content: bytes


@dataclass(slots=True)
class Transaction:
    """Sent unchanged, under the same ID, until it is answered. `events` stand at the head of the lane's queue meanwhile."""

    id: str
    body: bytes
    events: int
    last_edu: int
    items: int
    refusals: int = 0


class Lane:
    __slots__ = (
        "awake",
        "behind",
        "edus_due",
        "edus_taken",
        "events",
        "flight",
        "floor",
        "kept",
        "mixed",
        "narrow",
        "passing",
        "refused",
        "retry_at",
        "server",
    )

    def __init__(self, server: str) -> None:
        self.server = server
        self.events: deque[Waiting] = deque()
        self.passing: dict[str, bytes] = {}
        # Not None: what lies after this position is in the log only.
        self.behind: int | None = None
        # What was read from the log up to here is not taken again when it is handed over.
        self.floor = 0
        # After an absence the rooms come one after the other, so that positions go up and down.
        self.mixed = False
        # What stands on disk of it; None where nothing does.
        self.kept: tuple[int | None, ...] | None = None
        self.edus_due = False
        self.edus_taken = 0
        self.flight: Transaction | None = None
        # How many items still go one by one, after a transaction of several was refused.
        self.narrow = 0
        self.awake = False
        self.retry_at = 0
        # It answers, and does not take what is sent: that it answers other questions makes no attempt come sooner.
        self.refused: Trouble | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.flight or self.events or self.edus_due or self.passing) or self.behind is not None

    @property
    def position(self) -> int | None:
        """Everything up to here was taken; None where nothing waits."""
        if not self.events:
            return self.behind
        return (min(self.events).pos if self.mixed else self.events[0].pos) - 1

    def caught_up(self, found: Sequence[Waiting], upto: int) -> None:
        """What was read from the log, up to a position. Only where nothing waits."""
        self.events.extend(found)
        self.mixed = True
        self.behind = self.floor = upto

    def add(self, waiting: Waiting, *, down: bool) -> None:
        if waiting.pos <= self.floor:
            return
        if down and len(self.events) >= MAX_WAITING_WHILE_DOWN:
            # When it comes back, it is to have the latest first.
            self.rest()
        if self.behind is not None:
            return
        if len(self.events) >= MAX_WAITING:
            self.behind = max(self.events[-1].pos, self.floor)
            return
        self.events.append(waiting)

    def add_beside(self, waiting: Waiting) -> None:
        """What was handed over before this server was among those who get it; at the place up to which all is handed over now."""
        if self.behind is not None or len(self.events) >= MAX_WAITING:
            return
        if all(one.event_id != waiting.event_id for one in self.events):
            self.events.append(waiting)

    def add_passing(self, key: str, edu: bytes) -> None:
        """A later one with the same key replaces an earlier one that still waits."""
        self.passing.pop(key, None)
        if len(self.passing) >= MAX_PASSING:
            del self.passing[next(iter(self.passing))]
        self.passing[key] = edu

    def begin_again(self, after: int) -> None:
        """The log is read from further back, also what is queued or in flight; peers know by the ID what they had."""
        after = min(after, self.position if self.position is not None else after)
        self.events.clear()
        self.drop_flight()
        self.behind, self.floor = after, 0

    def rest(self) -> None:
        """The server has been down for long: keep nothing of this in memory."""
        self.behind = self.position
        self.events.clear()
        self.drop_flight()
        self.passing.clear()

    def empty(self) -> None:
        """Nothing is to be sent there."""
        self.events.clear()
        self.passing.clear()
        self.behind, self.flight, self.edus_due = None, None, False

    def drop_flight(self) -> None:
        if self.flight is not None and self.flight.last_edu:
            self.edus_due = True
        self.flight = None

    def depart(self, server_name: str, now: int, edus: Sequence[Departing], passing_id: str) -> Transaction | None:
        """The next transaction, or None where nothing waits. Passing EDUs leave the lane with it."""
        if self.narrow and not edus and not self.events:
            self.narrow = 0
        most_pdus = MAX_PDUS if not self.narrow else 0 if edus else 1
        going = [self.events[index] for index in range(min(len(self.events), most_pdus))]
        packed = [_edu(edu.edu_type, _canonical(edu.content)) for edu in edus]
        while self.passing and not self.narrow and len(packed) < MAX_EDUS:
            packed.append(self.passing.pop(next(iter(self.passing))))
        if not going and not packed:
            return None
        body = b"".join(
            (
                b'{"edus":[',
                b",".join(packed),
                b'],"origin":',
                orjson.dumps(server_name),
                b',"origin_server_ts":%d,"pdus":[' % now,
                b",".join(one.raw for one in going),
                b"]}",
            )
        )
        # The same durable content has the same ID also after a crash, so that the peer can tell.
        durable = [*(one.event_id for one in going), *(str(edu.pos) for edu in edus)]
        txn_id = _id(self.server, durable) if durable else passing_id
        last_edu = edus[-1].pos if edus else 0
        self.flight = Transaction(txn_id, body, len(going), last_edu, len(going) + len(packed))
        return self.flight

    def arrived(self) -> int:
        """The flight was taken. Returns the position up to which durable EDUs were taken by it, 0 where it had none."""
        flight, self.flight = self.flight, None
        if flight is None:
            return 0
        for _ in range(flight.events):
            self.events.popleft()
        self.mixed = self.mixed and bool(self.events)
        self.narrow = max(0, self.narrow - 1)
        if flight.last_edu:
            self.edus_taken = flight.last_edu
        return flight.last_edu

    def narrow_down(self) -> None:
        """Something in the flight is refused: find out what, by sending its items one by one."""
        if self.flight is not None:
            self.narrow = self.flight.items
            self.drop_flight()


def passing_edu(edu_type: str, content: dict[str, Any]) -> bytes:
    """The form that `Lane.add_passing` takes: made once, for however many servers."""
    return _edu(edu_type, encode(content))


def _edu(edu_type: str, content: bytes) -> bytes:
    return b'{"content":' + content + b',"edu_type":' + orjson.dumps(edu_type) + b"}"


def _canonical(content: bytes) -> bytes:
    return encode(orjson.loads(content))


def _id(server: str, durable: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join((server, *durable)).encode()).digest()
    return to_urlsafe_base64(digest[:ID_BYTES])
