"""Everybody's public keys, as their owners published them: devices and cross-signing keys, of people here and elsewhere.

The one place that reads and writes these tables; the bytes are stored as they go into answers. Of a remote user we hold
either the whole list or nothing. Not here: who may change a key (`device_keys`, `cross_signing`), who has to hear of it
(`device_lists`), how remote lists come here (`remote_lists`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from relay.db import Database, Query, Tx
from relay.ids import server_of
from relay.keys.kept import Kept
from relay.part import Part
from relay.tables import Schema, Table

MAX_LISTS_KEPT = 2_000


@dataclass(slots=True)
class KeyList:
    """A person's public keys. `stream` is the number of their latest device list update, 0 where it is not known.

    `held` is false for a remote user whose list is not here.
    """

    devices: dict[str, bytes] = field(default_factory=dict)
    signing: dict[str, bytes] = field(default_factory=dict)
    stream: int = 0
    held: bool = True


_OWNER = ("whose keys they are", "while the keys are published")


class Published(Part):
    schema = Schema(
        "published_keys",
        tables=(
            Table(
                "published_devices",
                "public keys, made to be handed out",
                {
                    "user_id": _OWNER,
                    "device_id": ("which device the keys belong to", "until the device signs out"),
                    "keys": ("the device's public keys and their signatures", "until the device signs out"),
                },
            ),
            Table(
                "published_signing_keys",
                "public keys, made to be handed out",
                {
                    "user_id": _OWNER,
                    "usage": ("master, self_signing or user_signing", "until it is replaced"),
                    "keys": ("the public key and its signatures", "until it is replaced"),
                },
            ),
            Table(
                "device_lists",
                "the number of a change of public keys",
                {
                    "user_id": ("whose list of devices changed", "while the account exists or shares a room"),
                    "pos": ("when, on the number line, so that clients hear of it", "until the next change"),
                    "stream": ("the number under which other servers know the change", "until the next change"),
                    "held": ("whether the whole list is here", "until the next change"),
                },
            ),
            Table(
                "unannounced_devices",
                "a device's name tag, waiting to be announced as deleted",
                {
                    "pos": ("when it was deleted", "seconds, until it is announced"),
                    "user_id": ("whose device it was", "seconds, until it is announced"),
                    "device_id": ("which device it was", "seconds, until it is announced"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE published_devices (
                user_id TEXT NOT NULL, device_id TEXT NOT NULL, keys BYTES NOT NULL, PRIMARY KEY (user_id, device_id));
            CREATE TABLE published_signing_keys (
                user_id TEXT NOT NULL, usage TEXT NOT NULL, keys BYTES NOT NULL, PRIMARY KEY (user_id, usage));
            CREATE TABLE device_lists (
                user_id TEXT NOT NULL PRIMARY KEY, pos BIGINT NOT NULL, stream BIGINT NOT NULL, held SMALLINT NOT NULL)
                CLUSTERED;
            CREATE INDEX device_lists_by_pos ON device_lists (pos);
            CREATE TABLE unannounced_devices (
                pos BIGINT PRIMARY KEY, user_id TEXT NOT NULL, device_id TEXT NOT NULL)
            """,
        ),
    )

    def __init__(self, db: Database, server_name: str) -> None:
        self._db = db
        self._server_name = server_name
        # Dropped by every write of this class, for the user it changes.
        self._kept: Kept[str, KeyList] = Kept(MAX_LISTS_KEPT)

    # --- reading

    async def lists(self, user_ids: Iterable[str]) -> dict[str, KeyList]:
        """The lists of these people, from memory, and in one hop where they are not."""
        found: dict[str, KeyList] = {}
        missing: dict[str, object] = {}
        for user_id in user_ids:
            known = self._kept.get(user_id)
            if known is None:
                missing[user_id] = self._kept.begin(user_id)
            else:
                found[user_id] = known
        if missing:
            for user_id, read in (await self._db.read(self._load, tuple(missing))).items():
                self._kept.put(user_id, read, missing[user_id])
                found[user_id] = read
        return found

    async def of(self, user_id: str) -> KeyList:
        return (await self.lists((user_id,)))[user_id]

    def _load(self, query: Query, user_ids: tuple[str, ...]) -> dict[str, KeyList]:
        found = {}
        for user_id in user_ids:
            row = query.one("SELECT stream, held FROM device_lists WHERE user_id = $1", user_id)
            local = server_of(user_id) == self._server_name
            one = KeyList(stream=row[0] if row else 0, held=local or bool(row and row[1]))
            if one.held:
                one.devices = dict(
                    query.all(
                        "SELECT device_id, keys FROM published_devices WHERE user_id = $1 ORDER BY device_id", user_id
                    )
                )
                one.signing = dict(
                    query.all("SELECT usage, keys FROM published_signing_keys WHERE user_id = $1", user_id)
                )
            found[user_id] = one
        return found

    @staticmethod
    def changed_between(query: Query, since: int, upto: int) -> list[str]:
        """Whose keys changed in (since, upto], of all the people we know."""
        return [
            row[0] for row in query.all("SELECT user_id FROM device_lists WHERE pos > $1 AND pos <= $2", since, upto)
        ]

    # --- writing: every method also takes the user out of memory, after the commit

    def put_device(self, tx: Tx, user_id: str, device_id: str, keys: bytes) -> None:
        tx.run(_PUT_DEVICE, user_id, device_id, keys)
        tx.after(lambda: self._kept.drop(user_id))

    def remove_device(self, tx: Tx, user_id: str, device_id: str) -> None:
        tx.run("DELETE FROM published_devices WHERE user_id = $1 AND device_id = $2", user_id, device_id)
        tx.after(lambda: self._kept.drop(user_id))

    def put_signing_key(self, tx: Tx, user_id: str, usage: str, keys: bytes) -> None:
        tx.run(_PUT_SIGNING_KEY, user_id, usage, keys)
        tx.after(lambda: self._kept.drop(user_id))

    def remove_signing_key(self, tx: Tx, user_id: str, usage: str) -> None:
        tx.run("DELETE FROM published_signing_keys WHERE user_id = $1 AND usage = $2", user_id, usage)
        tx.after(lambda: self._kept.drop(user_id))

    def moved(self, tx: Tx, user_id: str, pos: int, stream: int, *, held: bool = True) -> None:
        """The list changed at `pos`; `stream` is its number from now on."""
        tx.run(_MOVED, user_id, pos, stream, int(held))
        tx.after(lambda: self._kept.drop(user_id))

    def put_list(self, tx: Tx, user_id: str, whole: KeyList) -> None:
        """All that there is of a remote user. It is no news: whoever tracks the user has just asked for it."""
        self._remove(tx.run, user_id)
        tx.many(_PUT_DEVICE, [(user_id, device_id, keys) for device_id, keys in whole.devices.items()])
        tx.many(_PUT_SIGNING_KEY, [(user_id, usage, keys) for usage, keys in whole.signing.items()])
        tx.run(
            "INSERT INTO device_lists (user_id, pos, stream, held) VALUES ($1, 0, $2, 1) "
            "ON CONFLICT (user_id) DO UPDATE SET stream = excluded.stream, held = 1",
            user_id,
            whole.stream,
        )
        tx.after(lambda: self._kept.drop(user_id))

    def forget(self, tx: Tx, user_ids: Collection[str]) -> None:
        """What is held of remote users may be out of date: it will be asked for again at the next need."""

        def forget(query: Query) -> None:
            for user_id in user_ids:
                if query.run("UPDATE device_lists SET held = 0, stream = 0 WHERE user_id = $1 AND held = 1", user_id):
                    self._remove(query.run, user_id)

        def drop() -> None:
            for user_id in user_ids:
                self._kept.drop(user_id)

        tx.call(forget)
        tx.after(drop)

    @staticmethod
    def _remove(run: Callable[..., object], user_id: str) -> None:
        run("DELETE FROM published_devices WHERE user_id = $1", user_id)
        run("DELETE FROM published_signing_keys WHERE user_id = $1", user_id)

    async def held_elsewhere(self) -> list[str]:
        """The remote users whose lists are here."""
        rows = await self._db.read(lambda query: query.all("SELECT user_id FROM device_lists WHERE held = 1"))
        return [user_id for (user_id,) in rows if server_of(user_id) != self._server_name]

    def forget_server(self, query: Query, server: str) -> int:
        return sum(
            query.run(sql, of)
            for sql, of in (
                ("DELETE FROM published_devices WHERE user_id LIKE $1", f"%:{server}"),
                ("DELETE FROM published_signing_keys WHERE user_id LIKE $1", f"%:{server}"),
                ("DELETE FROM device_lists WHERE user_id LIKE $1", f"%:{server}"),
            )
        )

    def forgotten(self, server: str) -> None:
        self._kept.drop_where(lambda user_id: server_of(user_id) == server)

    # --- devices that are deleted

    def device_deleted(self, tx: Tx, user_id: str, device_id: str) -> None:
        """Takes the keys away; who has to hear of it is found out afterwards, from this row."""
        tx.run(
            "INSERT INTO unannounced_devices (pos, user_id, device_id) SELECT CAST($1 AS BIGINT), user_id, device_id "
            "FROM published_devices WHERE user_id = $2 AND device_id = $3",
            tx.pos(),
            user_id,
            device_id,
        )
        self.remove_device(tx, user_id, device_id)

    async def unannounced(self, most: int) -> list[tuple[int, str, str]]:
        rows = await self._db.read(
            lambda query: query.all(
                "SELECT pos, user_id, device_id FROM unannounced_devices ORDER BY pos LIMIT $1", most
            )
        )
        return [(pos, user_id, device_id) for pos, user_id, device_id in rows]

    def announced(self, tx: Tx, pos: int) -> None:
        tx.run("DELETE FROM unannounced_devices WHERE pos = $1", pos)


_PUT_DEVICE = (
    "INSERT INTO published_devices (user_id, device_id, keys) VALUES ($1, $2, $3) "
    "ON CONFLICT (user_id, device_id) DO UPDATE SET keys = excluded.keys"
)
_PUT_SIGNING_KEY = (
    "INSERT INTO published_signing_keys (user_id, usage, keys) VALUES ($1, $2, $3) "
    "ON CONFLICT (user_id, usage) DO UPDATE SET keys = excluded.keys"
)
_MOVED = (
    "INSERT INTO device_lists (user_id, pos, stream, held) VALUES ($1, $2, $3, $4) "
    "ON CONFLICT (user_id) DO UPDATE SET pos = excluded.pos, stream = excluded.stream, held = excluded.held"
)
