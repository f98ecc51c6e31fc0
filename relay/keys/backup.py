"""Key backup: room keys that a person's devices have encrypted for each other, in versions of which the latest counts.

The server sees which session of which room a key is for, and how good the copy is, to keep the best one; the key itself
is ciphertext, and what does not look like it is left out or refused. Numbers of versions are never used again.
Spec: client-server-api/#server-side-key-backups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from relay.db import Database, Query, Row, Tx
from relay.errors import ApiError, BadJson, InvalidParam, MissingParam, NotFound, Refused, TooLarge
from relay.ids import is_room_id
from relay.keys.shapes import is_name
from relay.part import Part
from relay.protocol import shapes
from relay.protocol.seal import Seal
from relay.tables import Schema, Table
from relay.web import HEADERS, JSON_TYPE, Answer, Request, Route, get_object, get_optional_string, get_string

MAX_BODY_BYTES = 8 * 2**20
MAX_AUTH_DATA_BYTES = 64 * 1024
MAX_SESSION_BYTES = 16 * 1024
MAX_INDEX = 2**53 - 1
KEYS_PER_READ = 500
DIGITS_OF_VERSION = 18

# The keys of the algorithms in use (m.megolm_backup.v1.curve25519-aes-sha2 and …aes-hmac-sha2), all base64.
_SESSION_DATA = shapes.Record(ciphertext=shapes.BASE64, ephemeral=shapes.BASE64, mac=shapes.BASE64, iv=shapes.BASE64)
_BACKUP_LIFE = "until its owner deletes the backup"


class WrongVersion(ApiError):
    status = 403
    errcode = "M_WRONG_ROOM_KEYS_VERSION"


@dataclass(slots=True, frozen=True)
class BackedUp:
    """One session's key. `data` is ciphertext."""

    room_id: str
    session_id: str
    first_message_index: int
    forwarded_count: int
    is_verified: bool
    data: bytes

    def better_than(self, verified: int, first_index: int, forwarded: int) -> bool:
        """Whether it takes the place of the one that is there. An equal one does not."""
        mine = (not self.is_verified, self.first_message_index, self.forwarded_count)
        return mine < (not verified, first_index, forwarded)


class KeyBackup(Part):
    schema = Schema(
        "key_backup",
        tables=(
            Table(
                "key_backups",
                "a key backup's public settings",
                {
                    "user_id": ("whose backup it is", _BACKUP_LIFE),
                    "version": ("its number", "while the account exists, so that no number comes twice"),
                    "algorithm": ("how it is encrypted", _BACKUP_LIFE),
                    "auth_data": ("the public key and the signatures by which devices trust it", _BACKUP_LIFE),
                    "number": ("how many keys are in it", _BACKUP_LIFE),
                    "changed": ("when keys last changed, which is the etag", _BACKUP_LIFE),
                    "deleted": (
                        "whether the owner deleted it",
                        "while the account exists, so that no number comes twice",
                    ),
                },
            ),
            Table(
                "backed_up_keys",
                "ciphertext",
                {
                    "user_id": ("whose key it is", _BACKUP_LIFE),
                    "version": ("which backup it is in", _BACKUP_LIFE),
                    "room_id": ("which room's messages it opens", _BACKUP_LIFE),
                    "session_id": ("which session of the room", _BACKUP_LIFE),
                    "first_message_index": ("from where on it opens messages, to keep the better copy", _BACKUP_LIFE),
                    "forwarded_count": ("how often it was passed on, to keep the better copy", _BACKUP_LIFE),
                    "is_verified": ("whether its source was verified, to keep the better copy", _BACKUP_LIFE),
                    "data": ("the key, encrypted by the owner's device", _BACKUP_LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE key_backups (
                user_id TEXT NOT NULL, version BIGINT NOT NULL, algorithm TEXT NOT NULL, auth_data BYTES NOT NULL,
                number BIGINT NOT NULL, changed BIGINT NOT NULL, deleted SMALLINT NOT NULL,
                PRIMARY KEY (user_id, version));
            CREATE TABLE backed_up_keys (
                user_id TEXT NOT NULL, version BIGINT NOT NULL, room_id TEXT NOT NULL, session_id TEXT NOT NULL,
                first_message_index BIGINT NOT NULL, forwarded_count BIGINT NOT NULL, is_verified SMALLINT NOT NULL,
                data BYTES NOT NULL, PRIMARY KEY (user_id, version, room_id, session_id))
            """,
        ),
    )

    def __init__(self, db: Database, seal: Seal) -> None:
        self._db = db
        self._seal = seal

    def forget(self, tx: Tx, user_id: str, erase: bool) -> None:
        """For `account.on_deactivated`: nobody can ever fetch it again."""
        tx.run("DELETE FROM backed_up_keys WHERE user_id = $1", user_id)
        tx.run("DELETE FROM key_backups WHERE user_id = $1", user_id)

    def routes(self) -> Iterable[Route]:
        for prefix in ("/_matrix/client/v3/room_keys", "/_matrix/client/unstable/room_keys"):
            yield Route("POST", f"{prefix}/version", self._create, limit="keys")
            yield Route("GET", f"{prefix}/version", self._latest, limit="keys")
            yield Route("GET", f"{prefix}/version/{{version}}", self._info, limit="keys")
            yield Route("PUT", f"{prefix}/version/{{version}}", self._update, limit="keys")
            yield Route("DELETE", f"{prefix}/version/{{version}}", self._delete, limit="keys")
            for path in ("keys", "keys/{room_id}", "keys/{room_id}/{session_id}"):
                yield Route("PUT", f"{prefix}/{path}", self._put_keys, limit="keys", max_body=MAX_BODY_BYTES)
                yield Route("DELETE", f"{prefix}/{path}", self._delete_keys, limit="keys")
            yield Route("GET", f"{prefix}/keys", self._get_all, limit="keys")
            yield Route("GET", f"{prefix}/keys/{{room_id}}", self._get_room, limit="keys")
            yield Route("GET", f"{prefix}/keys/{{room_id}}/{{session_id}}", self._get_one, limit="keys")

    # --- versions

    async def _create(self, request: Request) -> Answer:
        body, user_id = request.json(), request.user_id
        algorithm, auth_data = get_string(body, "algorithm"), _auth_data(body)
        if not is_name(algorithm):
            raise InvalidParam("The algorithm of a backup has 1 to 255 characters.")
        with self._db.write() as tx:
            pos = tx.pos()

            def create(query: Query) -> int:
                version = 1 + (query.value("SELECT max(version) FROM key_backups WHERE user_id = $1", user_id) or 0)
                query.run(
                    "INSERT INTO key_backups (user_id, version, algorithm, auth_data, number, changed, deleted) "
                    "VALUES ($1, $2, $3, $4, 0, $5, 0)",
                    user_id,
                    version,
                    algorithm,
                    auth_data,
                    pos,
                )
                return version

            tx.call(create)
        return {"version": str(await tx)}

    async def _latest(self, request: Request) -> Answer:
        return _described(await self._db.read(_current, request.user_id))

    async def _info(self, request: Request) -> Answer:
        return _described(await self._db.read(_find, request.user_id, _version(request.params["version"])))

    async def _update(self, request: Request) -> Answer:
        body, user_id, version = request.json(), request.user_id, _version(request.params["version"])
        if get_optional_string(body, "version") not in (None, request.params["version"]):
            raise InvalidParam("The version in the body is another one than in the path. Leave it out.")
        algorithm, auth_data = get_string(body, "algorithm"), _auth_data(body)

        def update(query: Query) -> None:
            row = _find(query, user_id, version)
            if row[1] != algorithm:
                raise InvalidParam("The algorithm of a backup can't be changed. Create a new version.")
            query.run(
                "UPDATE key_backups SET auth_data = $3 WHERE user_id = $1 AND version = $2", user_id, version, auth_data
            )

        await self._change(update)
        return {}

    async def _delete(self, request: Request) -> Answer:
        user_id, version = request.user_id, _version(request.params["version"])

        def delete(query: Query) -> None:
            # The row stays, empty: its number must not come again.
            if not query.run(
                "UPDATE key_backups SET deleted = 1, auth_data = $3, number = 0 WHERE user_id = $1 AND version = $2",
                user_id,
                version,
                b"{}",
            ):
                raise NotFound("There is no backup of this version.")
            query.run("DELETE FROM backed_up_keys WHERE user_id = $1 AND version = $2", user_id, version)

        await self._change(delete)
        return {}

    # --- keys

    async def _put_keys(self, request: Request) -> Answer:
        user_id, version, body = request.user_id, _version_asked(request), request.json()
        room_id, session_id = request.params.get("room_id"), request.params.get("session_id")
        if session_id is not None:
            body = {"sessions": {session_id: body}}
        if room_id is not None:
            body = {"rooms": {room_id: body}}
        keys = self._parse(body)
        with self._db.write() as tx:
            pos = tx.pos()

            def put(query: Query) -> dict[str, Any]:
                row = _current(query, user_id)
                if row[0] != version:
                    raise WrongVersion(
                        f"Keys can only be added to the latest backup, version {row[0]}.", current_version=str(row[0])
                    )
                added, changed = 0, 0
                for key in keys:
                    is_new, is_better = _put(query, user_id, version, key)
                    added += is_new
                    changed += is_better
                return _counted(query, user_id, version, added, pos if changed else None)

            tx.call(put)
        answer: dict[str, Any] = await tx
        return answer

    def _parse(self, body: Mapping[str, Any]) -> list[BackedUp]:
        keys = []
        for room_id, room in get_object(dict(body), "rooms").items():
            if not is_room_id(room_id) or not isinstance(room, dict):
                raise BadJson("The key rooms maps room IDs to objects.")
            for session_id, value in get_object(room, "sessions").items():
                keys.append(self._parse_one(room_id, session_id, value))
        return keys

    def _parse_one(self, room_id: str, session_id: str, value: object) -> BackedUp:
        if not is_name(session_id) or not isinstance(value, dict):
            raise BadJson("The key sessions maps session IDs to objects.")
        numbers = value.get("first_message_index"), value.get("forwarded_count")
        first, forwarded = numbers
        if (
            type(first) is not int
            or type(forwarded) is not int
            or not all(0 <= n <= MAX_INDEX for n in (first, forwarded))
        ):
            raise BadJson("A backed up key has a first_message_index and a forwarded_count, both numbers from 0.")
        if not isinstance(value.get("is_verified"), bool) or not isinstance(value.get("session_data"), dict):
            raise BadJson("A backed up key has is_verified (true or false) and an object, session_data.")
        raw = orjson.dumps(self._sealed(value["session_data"]))
        if len(raw) > MAX_SESSION_BYTES:
            raise TooLarge(f"A backed up key is larger than {MAX_SESSION_BYTES} bytes.")
        return BackedUp(room_id, session_id, first, forwarded, value["is_verified"], raw)

    def _sealed(self, data: dict[str, Any]) -> Any:
        if self._seal.open:
            return data
        try:
            picked = _SESSION_DATA(data)
        except shapes.Misfit:
            picked = {}
        if "ciphertext" not in picked:
            raise Refused(
                "The session_data of a backed up key must be ciphertext. Please update the client that sent it."
            )
        return picked

    async def _delete_keys(self, request: Request) -> Answer:
        user_id, version = request.user_id, _version_asked(request)
        where, values = _where(request.params)
        with self._db.write() as tx:
            pos = tx.pos()

            def delete(query: Query) -> dict[str, Any]:
                _find(query, user_id, version)
                gone = query.run(
                    f"DELETE FROM backed_up_keys WHERE user_id = $1 AND version = $2{where}", user_id, version, *values
                )
                return _counted(query, user_id, version, -gone, pos if gone else None)

            tx.call(delete)
        answer: dict[str, Any] = await tx
        return answer

    async def _get_one(self, request: Request) -> Answer:
        rows = await self._read_some(request, "", "")
        if not rows:
            raise NotFound("This key is not in the backup.")
        return _answer(rows[0])

    async def _get_room(self, request: Request) -> Answer:
        sessions: dict[str, Any] = {}
        rows = await self._read_some(request, "", "")
        while rows:
            sessions |= {row[1]: _answer(row) for row in rows}
            rows = await self._read_some(request, rows[-1][0], rows[-1][1]) if len(rows) == KEYS_PER_READ else []
        return {"sessions": sessions}

    async def _get_all(self, request: Request) -> Answer:
        """Written piece by piece: a backup may be larger than what should be in memory at once."""
        rows = await self._read_some(request, "", "")
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": JSON_TYPE})
        await response.prepare(request.http)
        piece, open_room = b'{"rooms":{', None
        while rows:
            for row in rows:
                if row[0] != open_room:
                    piece += (b"}}," if open_room is not None else b"") + orjson.dumps(row[0]) + b':{"sessions":{'
                else:
                    piece += b","
                open_room = row[0]
                piece += orjson.dumps(row[1]) + b":" + orjson.dumps(_answer(row))
            await response.write(piece)
            piece = b""
            rows = await self._read_some(request, rows[-1][0], rows[-1][1]) if len(rows) == KEYS_PER_READ else []
        await response.write(piece + (b"}}" if open_room is not None else b"") + b"}}")
        await response.write_eof()
        return response

    async def _read_some(self, request: Request, after_room: str, after_session: str) -> list[Row]:
        """The next keys of the backup, or of the room or session that the path names. Raises NotFound."""
        user_id, version = request.user_id, _version_asked(request)
        where, values = _where(request.params, first=6)

        def read(query: Query) -> list[Row]:
            _find(query, user_id, version)
            return query.all(
                "SELECT room_id, session_id, first_message_index, forwarded_count, is_verified, data FROM backed_up_keys "
                f"WHERE user_id = $1 AND version = $2 AND (room_id, session_id) > ($3, $4){where} "
                "ORDER BY room_id, session_id LIMIT $5",
                user_id,
                version,
                after_room,
                after_session,
                KEYS_PER_READ,
                *values,
            )

        return await self._db.read(read)

    async def _change(self, function: Callable[[Query], None]) -> None:
        with self._db.write() as tx:
            tx.call(function)
        await tx


def _where(params: Mapping[str, str], first: int = 3) -> tuple[str, list[str]]:
    """What the path names: everything, a room, or a session of a room."""
    where = ""
    values: list[str] = []
    for column in ("room_id", "session_id"):
        if column in params:
            where += f" AND {column} = ${first + len(values)}"
            values.append(params[column])
    return where, values


def _version(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= DIGITS_OF_VERSION):
        raise NotFound("There is no backup of this version.")
    return int(text)


def _version_asked(request: Request) -> int:
    text = request.query.get("version")
    if text is None:
        raise MissingParam("The parameter version is missing. Say which backup is meant.")
    return _version(text)


def _auth_data(body: dict[str, Any]) -> bytes:
    raw = orjson.dumps(get_object(body, "auth_data"))
    if len(raw) > MAX_AUTH_DATA_BYTES:
        raise TooLarge(f"The auth_data of a backup is larger than {MAX_AUTH_DATA_BYTES} bytes.")
    return raw


def _current(query: Query, user_id: str) -> Row:
    row = query.one(
        "SELECT version, algorithm, auth_data, number, changed FROM key_backups "
        "WHERE user_id = $1 AND deleted = 0 ORDER BY version DESC LIMIT 1",
        user_id,
    )
    if row is None:
        raise NotFound("You have no key backup.")
    return row


def _find(query: Query, user_id: str, version: int) -> Row:
    row = query.one(
        "SELECT version, algorithm, auth_data, number, changed FROM key_backups "
        "WHERE user_id = $1 AND version = $2 AND deleted = 0",
        user_id,
        version,
    )
    if row is None:
        raise NotFound("There is no backup of this version.")
    return row


def _described(row: Row) -> dict[str, Any]:
    version, algorithm, auth_data, number, changed = row
    return {
        "version": str(version),
        "algorithm": algorithm,
        "auth_data": orjson.Fragment(auth_data),
        "count": number,
        "etag": str(changed),
    }


def _put(query: Query, user_id: str, version: int, key: BackedUp) -> tuple[bool, bool]:
    """(whether the session is new, whether anything was stored)."""
    old = query.one(
        "SELECT is_verified, first_message_index, forwarded_count FROM backed_up_keys "
        "WHERE user_id = $1 AND version = $2 AND room_id = $3 AND session_id = $4",
        user_id,
        version,
        key.room_id,
        key.session_id,
    )
    if old is not None and not key.better_than(*old):
        return False, False
    query.run(
        "INSERT INTO backed_up_keys (user_id, version, room_id, session_id, first_message_index, forwarded_count, "
        "is_verified, data) VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (user_id, version, room_id, session_id) "
        "DO UPDATE SET first_message_index = excluded.first_message_index, forwarded_count = excluded.forwarded_count, "
        "is_verified = excluded.is_verified, data = excluded.data",
        user_id,
        version,
        key.room_id,
        key.session_id,
        key.first_message_index,
        key.forwarded_count,
        int(key.is_verified),
        key.data,
    )
    return old is None, True


def _counted(query: Query, user_id: str, version: int, more: int, changed: int | None) -> dict[str, Any]:
    if changed is not None:
        query.run(
            "UPDATE key_backups SET number = number + $3, changed = $4 WHERE user_id = $1 AND version = $2",
            user_id,
            version,
            more,
            changed,
        )
    row = _find(query, user_id, version)
    return {"count": row[3], "etag": str(row[4])}


def _answer(row: Row) -> dict[str, Any]:
    _, _, first, forwarded, verified, data = row
    return {
        "first_message_index": first,
        "forwarded_count": forwarded,
        "is_verified": bool(verified),
        "session_data": orjson.Fragment(data),
    }
