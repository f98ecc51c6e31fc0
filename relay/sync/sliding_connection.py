"""What a sliding sync connection has been told, at each position that its client may still come from.

Nobody knows that an answer arrived until its `pos` comes back. So a connection is what was told up to the last pos that
came back, and for each answer since then what that answer added. In memory only, bounded; whoever is forgotten hears
M_UNKNOWN_POS and begins anew. A connection without rooms needs no memory and outlives a restart. Spec: MSC4186.
"""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from relay.errors import ApiError, InvalidParam
from relay.sync.sliding_asked import Asked
from relay.sync.sliding_state import Wanted
from relay.sync.token import Token

MAX_CONNECTIONS = 5_000
MAX_OF_A_DEVICE = 10
# Over all connections; an entry is about 200 bytes.
MAX_ROOMS = 200_000
# Answers to one pos that may all still be on their way.
MAX_UNCONFIRMED = 4
# Whose member events a connection was given, of one room; beyond that they may be given again.
MAX_MEMBERS = 100

UNKNOWN = "This position is not known any more. Start the connection anew, without a pos."
_FORM = re.compile(r"(.{1,60})-(\d{1,18})\Z")
_numbers = itertools.count(1)


class UnknownPos(ApiError):
    status = 400
    errcode = "M_UNKNOWN_POS"

    def __init__(self) -> None:
        super().__init__(UNKNOWN)


@dataclass(frozen=True, slots=True)
class Sent:
    """What a connection was told of a room.

    `behind` is None where that is all up to the connection's pos; else what came after it was left out, since the room
    lay in no window. `limit` is how many of the latest events it has without a gap.
    """

    behind: int | None
    limit: int
    wanted: Wanted
    members: tuple[str, ...]
    counts: tuple[int, int]
    dm: bool
    membership: str


Key = tuple[str, str, str]  # user, device, connection


@dataclass(slots=True)
class Standing:
    """Where a connection stands at one pos. `rooms` is what it adds; None takes a room out."""

    number: int
    token: Token | None
    asked: Asked | None = None
    rooms: dict[str, Sent | None] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    dm: frozenset[str] = frozenset()
    keys: object = None


class Connection:
    __slots__ = ("_sent", "_unconfirmed", "base", "key", "turn")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.base = Standing(0, None)
        self._sent: dict[str, Sent] = {}
        self._unconfirmed: OrderedDict[int, Standing] = OrderedDict()
        # The latest request; an older one that still waits has been given up by its client.
        self.turn = 0

    @property
    def size(self) -> int:
        return len(self._sent) + sum(len(one.rooms) for one in self._unconfirmed.values())

    @property
    def sent(self) -> Mapping[str, Sent]:
        """As of the base."""
        return self._sent

    def begin(self) -> int:
        self.turn = next(_numbers)
        return self.turn

    def confirm(self, number: int) -> bool:
        """The client comes from this pos: what it was told there is told. False where it is not known."""
        if number == self.base.number:
            return True
        standing = self._unconfirmed.get(number)
        if standing is None:
            return False
        for room_id, one in standing.rooms.items():
            if one is None:
                self._sent.pop(room_id, None)
            else:
                self._sent[room_id] = one
        standing.rooms = {}
        self.base = standing
        self._unconfirmed.clear()
        return True

    def answer(self, standing: Standing) -> str:
        """An answer goes out; returns its pos."""
        self._unconfirmed[standing.number] = standing
        while len(self._unconfirmed) > MAX_UNCONFIRMED:
            self._unconfirmed.popitem(last=False)
        return written(standing)

    def reaches(self, token: Token) -> None:
        """A connection without rooms whose pos says all there is to know."""
        self.base = Standing(next(_numbers), token)


def new_standing(token: Token, asked: Asked) -> Standing:
    return Standing(next(_numbers), token, asked)


def written(standing: Standing) -> str:
    return f"{standing.token}-{standing.number}"


class Connections:
    def __init__(self) -> None:
        # The one that was heard of last comes last.
        self._known: OrderedDict[Key, Connection] = OrderedDict()
        self._of_device: dict[tuple[str, str], dict[str, None]] = {}
        self._rooms = 0

    def find(self, key: Key, pos: str | None, asked: Asked, epoch: int, stable: int) -> Connection:
        """The connection as it stood at `pos`. Raises UnknownPos."""
        if pos is None:
            connection = Connection(key)
            self._put(key, connection)
            return connection
        found = _FORM.match(pos)
        try:
            token = Token.parse(found[1]) if found is not None else None
        except InvalidParam:
            token = None
        if found is None or token is None or token.epoch != epoch or token.pos > stable:
            raise UnknownPos
        known = self._known.get(key)
        if known is not None:
            size = known.size
            confirmed = known.confirm(int(found[2]))
            self._rooms += known.size - size
            if confirmed:
                self._known.move_to_end(key)
                return known
        if asked.lists or asked.subscriptions or (known is not None and known.sent):
            raise UnknownPos
        connection = Connection(key)
        connection.reaches(token)
        self._put(key, connection)
        return connection

    def answer(self, connection: Connection, standing: Standing) -> str:
        size = connection.size
        pos = connection.answer(standing)
        if self._known.get(connection.key) is connection:
            self._rooms += connection.size - size
        while self._rooms > MAX_ROOMS and len(self._known) > 1:
            self._drop(next(iter(self._known)))
        return pos

    def _put(self, key: Key, connection: Connection) -> None:
        self._drop(key)
        self._known[key] = connection
        names = self._of_device.setdefault(key[:2], {})
        names[key[2]] = None
        if len(names) > MAX_OF_A_DEVICE:
            self._drop((*key[:2], next(iter(names))))
        if len(self._known) > MAX_CONNECTIONS:
            self._drop(next(iter(self._known)))

    def _drop(self, key: Key) -> None:
        connection = self._known.pop(key, None)
        if connection is None:
            return
        self._rooms -= connection.size
        names = self._of_device[key[:2]]
        names.pop(key[2], None)
        if not names:
            del self._of_device[key[:2]]
