"""Account data: what a person's clients keep for themselves, for the account or for one room, up to 64 KiB apiece.

Opaque here, apart from the few types that the server has to act on: who asks for those uses `get` or `ignored_users`.
Push rules and read markers belong to other parts, which say so in `provided`. Spec: client-server-api/#client-config.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import orjson

from relay.db import Database, Query, Row, Tx
from relay.errors import BadJson, Forbidden, InvalidParam, LimitExceeded, NotFound, TooLarge
from relay.ids import MAX_ID_BYTES, require_room_id
from relay.part import Part, SyncAsk, SyncShare
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route

TOPIC = "account_data"
MAX_CONTENT_BYTES = 64 * 1024
MAX_ROWS_PER_USER = 20_000
RETRY_AFTER_SECONDS = 3600.0
MAX_REMEMBERED = 10_000
IGNORED_USERS = "m.ignored_user_list"
# The server's own; clients change them through endpoints of their own.
SERVER_TYPES = frozenset({"m.fully_read", "m.push_rules"})
GLOBAL = ""

# Called with the user and the room ID, or '' for the account.
Provides = Callable[[str, str], Awaitable[Mapping[str, Any] | None]]


class AccountData(Part):
    schema = Schema(
        "account_data",
        tables=(
            Table(
                "account_data",
                "what a person's clients keep for themselves",
                {
                    "user_id": ("whose it is", "until the account is closed"),
                    "room_id": ("for which room; empty: for the account", "until the account is closed"),
                    "type": ("what it is", "until the account is closed"),
                    "content": (
                        "the client's JSON; secrets in it are encrypted by the client",
                        "until it is replaced or the account closed",
                    ),
                    "pos": ("when it changed last, for /sync", "until the account is closed"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE account_data (
                user_id TEXT NOT NULL, room_id TEXT NOT NULL, type TEXT NOT NULL, content BYTES NOT NULL,
                pos BIGINT NOT NULL, PRIMARY KEY (user_id, room_id, type));
            CREATE INDEX account_data_by_pos ON account_data (user_id, pos)
            """,
        ),
    )

    def __init__(self, db: Database) -> None:
        self._db = db
        # Types whose content another part keeps: clients may read them here as well.
        self.provided: dict[str, Provides] = {}
        # Whom a user ignores; dropped after each write of that type, and when the account is closed.
        self._ignored: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._drops = 0

    def routes(self) -> Iterable[Route]:
        user = "/_matrix/client/v3/user/{user_id}"
        yield Route("GET", f"{user}/account_data/{{type}}", self._get_route)
        yield Route("PUT", f"{user}/account_data/{{type}}", self._put_route)
        yield Route("GET", f"{user}/rooms/{{room_id}}/account_data/{{type}}", self._get_route)
        yield Route("PUT", f"{user}/rooms/{{room_id}}/account_data/{{type}}", self._put_route)

    # --- for other parts

    async def get(self, user_id: str, event_type: str, room_id: str = GLOBAL) -> dict[str, Any] | None:
        raw = await self._db.read(_content, user_id, room_id, event_type)
        content: dict[str, Any] | None = orjson.loads(raw) if raw is not None else None
        return content

    async def of_types(self, user_id: str, types: Sequence[str]) -> list[tuple[str, str, Any]]:
        """(room or '', type, content) of all that this user keeps under these types."""

        def read(query: Query) -> list[Row]:
            rows: list[Row] = []
            for event_type in types:
                rows += query.all(
                    "SELECT room_id, type, content FROM account_data WHERE user_id = $1 AND type = $2",
                    user_id,
                    event_type,
                )
            return rows

        return [(room_id, kind, orjson.loads(raw)) for room_id, kind, raw in await self._db.read(read)]

    async def ignored_users(self, user_id: str) -> frozenset[str]:
        """Whom this local user does not want to hear from. Spec: client-server-api/#ignoring-users."""
        known = self._ignored.get(user_id)
        if known is not None:
            return known
        drops = self._drops
        content = await self.get(user_id, IGNORED_USERS)
        ignored = content.get("ignored_users") if content is not None else None
        users = frozenset(ignored) if isinstance(ignored, dict) else frozenset()
        if drops == self._drops:
            self._ignored[user_id] = users
            if len(self._ignored) > MAX_REMEMBERED:
                self._ignored.popitem(last=False)
        return users

    def ignored_known(self, user_id: str) -> frozenset[str]:
        """The same without asking the database, for one whose list was read in this answer already."""
        return self._ignored.get(user_id, frozenset())

    def set(self, tx: Tx, user_id: str, event_type: str, content: Mapping[str, Any], room_id: str = GLOBAL) -> None:
        """Replaces one entry in `tx`. Raises TooLarge; the write fails where the user has too many."""
        raw = _encoded(content)
        self.change(tx, user_id, event_type, lambda _: raw, room_id)

    def change(
        self, tx: Tx, user_id: str, event_type: str, changed: Callable[[bytes | None], bytes], room_id: str = GLOBAL
    ) -> None:
        """The same, where the new content depends on the old one: `changed` runs in the database thread."""
        pos = tx.pos()

        def write(query: Query) -> None:
            raw = changed(_content(query, user_id, room_id, event_type))
            updated = query.run(
                "UPDATE account_data SET content = $4, pos = $5 WHERE user_id = $1 AND room_id = $2 AND type = $3",
                user_id,
                room_id,
                event_type,
                raw,
                pos,
            )
            if updated:
                return
            if query.value("SELECT count(*) FROM account_data WHERE user_id = $1", user_id) >= MAX_ROWS_PER_USER:
                raise LimitExceeded(RETRY_AFTER_SECONDS)
            query.run(
                "INSERT INTO account_data (user_id, room_id, type, content, pos) VALUES ($1, $2, $3, $4, $5)",
                user_id,
                room_id,
                event_type,
                raw,
                pos,
            )

        tx.call(write)
        tx.ring((user_id,), TOPIC)
        if event_type == IGNORED_USERS:
            tx.after(lambda: self._forget(user_id))

    def forget(self, tx: Tx, user_id: str, erase: bool) -> None:
        """For `account.on_deactivated`: nobody can ever read it again."""
        tx.run("DELETE FROM account_data WHERE user_id = $1", user_id)
        tx.after(lambda: self._forget(user_id))

    def _forget(self, user_id: str) -> None:
        self._drops += 1
        self._ignored.pop(user_id, None)

    # --- /sync

    async def changes(self, ask: SyncAsk, share: SyncShare) -> None:
        if ask.since is not None and not ask.concerns(TOPIC) and not ask.newly_joined:
            return
        rooms = ask.rooms | ask.left_rooms
        since = ask.since if ask.since is not None else -1
        new_rooms = ask.newly_joined if ask.since is not None else frozenset()
        for room_id, event_type, content in await self._db.read(_changed, ask.user_id, since, ask.upto, new_rooms):
            event = {"type": event_type, "content": orjson.Fragment(content)}
            if room_id == GLOBAL:
                share.account_data.append(event)
            elif room_id in rooms:
                share.room(room_id).account_data.append(event)

    # --- endpoints

    async def _get_route(self, request: Request) -> Answer:
        room_id, event_type = self._place(request)
        provides = self.provided.get(event_type)
        if provides is not None:
            content = await provides(request.user_id, room_id)
            if content is not None:
                return content
        raw = await self._db.read(_content, request.user_id, room_id, event_type)
        if raw is None:
            raise NotFound("There is no account data of this type.")
        return raw

    async def _put_route(self, request: Request) -> Answer:
        room_id, event_type = self._place(request)
        if event_type in SERVER_TYPES:
            raise BadJson(f"The type {event_type} is the server's. Use its own endpoints to change it.", status=405)
        content = request.json()
        with self._db.write() as tx:
            self.set(tx, request.user_id, event_type, content, room_id)
        await tx
        return {}

    def _place(self, request: Request) -> tuple[str, str]:
        require_self(request)
        event_type = request.params["type"]
        if not 0 < len(event_type.encode()) <= MAX_ID_BYTES:
            raise InvalidParam(f"A type of account data has 1 to {MAX_ID_BYTES} bytes.")
        room_id = request.params.get("room_id")
        return (GLOBAL if room_id is None else require_room_id(room_id)), event_type


def require_self(request: Request) -> None:
    if request.params["user_id"] != request.user_id:
        raise Forbidden("You can read and change what is your own only.")


def _encoded(content: Mapping[str, Any]) -> bytes:
    raw = orjson.dumps(content)
    if len(raw) > MAX_CONTENT_BYTES:
        raise TooLarge(f"An entry of account data has at most {MAX_CONTENT_BYTES // 1024} KiB.")
    return raw


def _content(query: Query, user_id: str, room_id: str, event_type: str) -> bytes | None:
    raw = query.value(
        "SELECT content FROM account_data WHERE user_id = $1 AND room_id = $2 AND type = $3",
        user_id,
        room_id,
        event_type,
    )
    return bytes(raw) if raw is not None else None


def _changed(query: Query, user_id: str, since: int, upto: int, new_rooms: Iterable[str]) -> list[Row]:
    rows = query.all(
        "SELECT room_id, type, content FROM account_data WHERE user_id = $1 AND pos > $2 AND pos <= $3 ORDER BY pos",
        user_id,
        since,
        upto,
    )
    for room_id in new_rooms:
        # A room that is new to the client brings along what was noted about it before.
        rows += query.all(
            "SELECT room_id, type, content FROM account_data WHERE user_id = $1 AND room_id = $2 AND pos <= $3 ORDER BY pos",
            user_id,
            room_id,
            since,
        )
    return rows
