"""One-time and fallback keys: uploaded by a device, handed out once each, in the order of upload, or the fallback key.

Everything that gives a key away happens in one function inside the database thread, so no two callers get the same. One
upload is one row, and handing out moves a number in it; a row that is used up stays for a week, since a client that
repeats an upload whose answer was lost must not bring back what somebody already has.
Spec: client-server-api/#one-time-and-fallback-keys, #post_matrixclientv3keysclaim, server-server-api/#end-to-end-encryption.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from relay.accounts.devices import Devices
from relay.clock import DAY, HOUR, Clock
from relay.db import Database, Query, Tx
from relay.errors import ApiError, BadJson, InvalidParam, RemoteError, TooLarge, UnknownToken
from relay.ids import is_user_id, server_of
from relay.keys.kept import Kept
from relay.keys.shapes import is_name, unsigned_form
from relay.part import Part, SyncAsk, SyncShare
from relay.remote import Remote
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, get_object

MAX_KEY_BYTES = 4 * 1024
MAX_KEYS_PER_DEVICE = 1_000
MAX_FALLBACK_KEYS = 16
MAX_COUNTS_KEPT = 10_000
MAX_SERVERS_AT_ONCE = 20
USED_UP_KEPT_DAYS = 7
# Between the keys of one upload, each as `"name":value`. JSON has no line breaks of its own.
BETWEEN = b"\n"
SWEEP_SECONDS = HOUR / 1000
REMOTE_TIMEOUT_MS = 10_000
# Clients take a missing count for a server that says nothing.
ALWAYS_COUNTED = "signed_curve25519"

_DEVICE_LIFE = "until the device signs out"
_BATCH_LIFE = "until all keys of one upload are handed out, and a week more"


# (user, device, algorithm, batch, how many of it are handed out now, where the next begins, the day on which it was used up)
_Taken = tuple[str, str, str, int, int, int, int | None]


class Key(NamedTuple):
    algorithm: str
    key_id: str
    keys: bytes


@dataclass(slots=True, frozen=True)
class Supply:
    """What a device has left."""

    counts: dict[str, int]
    unused_fallbacks: list[str]


class OneTimeKeys(Part):
    schema = Schema(
        "one_time_keys",
        tables=(
            Table(
                "one_time_keys",
                "public keys, made to be handed out once",
                {
                    "user_id": ("whose keys they are", _BATCH_LIFE),
                    "device_id": ("which device's keys they are", _BATCH_LIFE),
                    "algorithm": ("what they are for", _BATCH_LIFE),
                    "batch": ("which upload: the order of handing out", _BATCH_LIFE),
                    "number": ("how many they were", _BATCH_LIFE),
                    "taken": ("how many of them were handed out", _BATCH_LIFE),
                    "next_at": ("where among the values the next one begins", _BATCH_LIFE),
                    "used_up_on": ("the day on which the last was handed out", _BATCH_LIFE),
                },
            ),
            Table(
                "one_time_key_values",
                "public keys, made to be handed out once",
                {
                    "batch": ("which upload", _BATCH_LIFE),
                    "keys": ("the names, public keys and signatures", _BATCH_LIFE),
                },
            ),
            Table(
                "fallback_keys",
                "public keys, made to be handed out where no one-time key is left",
                {
                    "user_id": ("whose key it is", _DEVICE_LIFE),
                    "device_id": ("which device's key it is", _DEVICE_LIFE),
                    "algorithm": ("what it is for", "until it is replaced"),
                    "key_id": ("its name", "until it is replaced"),
                    "keys": ("the public key and its signature", "until it is replaced"),
                    "used": ("whether the device should replace it", "until it is replaced"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE one_time_keys (
                user_id TEXT NOT NULL, device_id TEXT NOT NULL, algorithm TEXT NOT NULL, batch BIGINT NOT NULL,
                number BIGINT NOT NULL, taken BIGINT NOT NULL, next_at BIGINT NOT NULL, used_up_on BIGINT,
                PRIMARY KEY (user_id, device_id, algorithm, batch)) CLUSTERED;
            CREATE INDEX one_time_keys_used_up ON one_time_keys (used_up_on) WHERE used_up_on IS NOT NULL;
            CREATE TABLE one_time_key_values (batch BIGINT PRIMARY KEY, keys BYTES NOT NULL);
            CREATE TABLE fallback_keys (
                user_id TEXT NOT NULL, device_id TEXT NOT NULL, algorithm TEXT NOT NULL, key_id TEXT NOT NULL,
                keys BYTES NOT NULL, used SMALLINT NOT NULL, PRIMARY KEY (user_id, device_id, algorithm))
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock, devices: Devices, remote: Remote, server_name: str) -> None:
        self._db = db
        self._clock = clock
        self._devices = devices
        self._remote = remote
        self._server_name = server_name
        # Dropped by uploads, claims and the deletion of the device.
        self._supplies: Kept[tuple[str, str], Supply] = Kept(MAX_COUNTS_KEPT)

    def routes(self) -> Iterable[Route]:
        yield Route("POST", "/_matrix/client/v3/keys/claim", self._claim_route, limit="keys")

    # --- uploading

    def upload(self, tx: Tx, user_id: str, device_id: str, one_time: list[Key], fallback: list[Key]) -> None:
        """Adds to the device's supply; `await tx` returns how many one-time keys it has of each algorithm.

        The write fails where the device has signed out meanwhile.
        """
        batches = {algorithm: tx.pos() for algorithm in dict.fromkeys(key.algorithm for key in one_time)}

        def store(query: Query) -> dict[str, int]:
            if device_id not in self._devices.ids(query, user_id):
                raise UnknownToken("This device has signed out. Sign in again.")
            if one_time:
                _store(query, user_id, device_id, one_time, batches)
            for key in fallback:
                _store_fallback(query, user_id, device_id, key)
            return _counts(query, user_id, device_id)

        tx.call(store)
        tx.after(lambda: self._supplies.drop((user_id, device_id)))

    # --- what is left

    async def supply(self, user_id: str, device_id: str) -> Supply:
        known = self._supplies.get((user_id, device_id))
        if known is None:
            ticket = self._supplies.begin((user_id, device_id))
            known = await self._db.read(_supply, user_id, device_id)
            self._supplies.put((user_id, device_id), known, ticket)
        return known

    async def changes(self, ask: SyncAsk, share: SyncShare) -> None:
        supply = await self.supply(ask.user_id, ask.device_id)
        share.one_time_keys_count = supply.counts
        share.unused_fallback_key_types = supply.unused_fallbacks

    # --- handing out

    async def claim_local(self, wanted: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
        """`{user: {device: algorithm}}` of local users; what is not there is left out. The keys are ready JSON."""
        asked = [
            (user_id, device_id, algorithm)
            for user_id, devices in wanted.items()
            for device_id, algorithm in devices.items()
        ]
        if not asked:
            return {}
        day = self._clock.now() // DAY

        def claim(query: Query) -> dict[str, dict[str, Any]]:
            found: dict[str, dict[str, Any]] = {}
            taken: list[_Taken] = []
            for user_id, device_id, algorithm in asked:
                line = _take(query, user_id, device_id, algorithm, day, taken)
                if line is not None:
                    found.setdefault(user_id, {})[device_id] = orjson.Fragment(b"{%b}" % line)
            query.many(
                "UPDATE one_time_keys SET taken = $5, next_at = $6, used_up_on = $7 "
                "WHERE user_id = $1 AND device_id = $2 AND algorithm = $3 AND batch = $4",
                taken,
            )
            return found

        with self._db.write() as tx:
            tx.call(claim)
            tx.after(lambda: self._drop(asked))
        answer: dict[str, dict[str, Any]] = await tx
        return answer

    def _drop(self, asked: list[tuple[str, str, str]]) -> None:
        for user_id, device_id, _ in asked:
            self._supplies.drop((user_id, device_id))

    async def _claim_route(self, request: Request) -> Answer:
        body = request.json()
        local: dict[str, dict[str, str]] = {}
        elsewhere: dict[str, dict[str, dict[str, str]]] = {}
        for user_id, devices in get_object(body, "one_time_keys").items():
            if not is_user_id(user_id) or not isinstance(devices, dict):
                raise BadJson("The key one_time_keys maps user IDs to objects.")
            if not all(isinstance(algorithm, str) for algorithm in devices.values()):
                raise BadJson("In one_time_keys each device ID has the name of an algorithm.")
            server = server_of(user_id)
            if server == self._server_name:
                local[user_id] = devices
            else:
                elsewhere.setdefault(server, {})[user_id] = devices
        found = await self.claim_local(local)
        failures: dict[str, Any] = {}
        if elsewhere:
            seconds = timeout_of(body)
            at_once = asyncio.Semaphore(MAX_SERVERS_AT_ONCE)

            async def claim_from(server: str, wanted: dict[str, dict[str, str]]) -> None:
                try:
                    async with asyncio.timeout(seconds), at_once:
                        found.update(_asked_for(await self._remote.claim_keys(server, wanted), wanted))
                except (RemoteError, ApiError, TimeoutError) as error:
                    failures[server] = failure(error)

            async with asyncio.TaskGroup() as group:
                for server, wanted in elsewhere.items():
                    group.create_task(claim_from(server, wanted))
        return {"one_time_keys": found, "failures": failures}

    # --- going

    def device_deleted(self, tx: Tx, user_id: str, device_id: str) -> None:
        tx.run(
            "DELETE FROM one_time_key_values WHERE batch IN "
            "(SELECT batch FROM one_time_keys WHERE user_id = $1 AND device_id = $2)",
            user_id,
            device_id,
        )
        tx.run("DELETE FROM one_time_keys WHERE user_id = $1 AND device_id = $2", user_id, device_id)
        tx.run("DELETE FROM fallback_keys WHERE user_id = $1 AND device_id = $2", user_id, device_id)
        tx.after(lambda: self._supplies.drop((user_id, device_id)))

    async def run(self) -> None:
        while True:
            oldest = self._clock.now() // DAY - USED_UP_KEPT_DAYS
            with self._db.write() as tx:
                tx.run(
                    "DELETE FROM one_time_key_values WHERE batch IN "
                    "(SELECT batch FROM one_time_keys WHERE used_up_on < $1)",
                    oldest,
                )
                tx.run("DELETE FROM one_time_keys WHERE used_up_on < $1", oldest)
            await self._clock.sleep(SWEEP_SECONDS)


def parse(body: Mapping[str, Any], name: str, most: int) -> list[Key]:
    """The `one_time_keys` or `fallback_keys` of an upload. Raises BadJson, TooLarge."""
    given = body.get(name)
    if given is None:
        return []
    if not isinstance(given, dict):
        raise BadJson(f"The key {name} is not an object.")
    if len(given) > most:
        raise TooLarge(f"The key {name} holds more than {most} keys. Upload fewer.")
    keys = []
    for key_id, value in given.items():
        algorithm, colon, rest = key_id.partition(":")
        if not (colon and algorithm and rest and is_name(key_id)):
            raise BadJson(f"The names in {name} look like ALGORITHM:ID.")
        if not isinstance(value, (str, dict)):
            raise BadJson(f"The values in {name} are keys: strings or objects.")
        raw = orjson.dumps(value)
        if len(raw) > MAX_KEY_BYTES:
            raise TooLarge(f"A key in {name} is larger than {MAX_KEY_BYTES} bytes.")
        keys.append(Key(algorithm, key_id, raw))
    return keys


def timeout_of(body: Mapping[str, Any]) -> float:
    """How many seconds a client's request waits for other servers."""
    given = body.get("timeout", REMOTE_TIMEOUT_MS)
    if type(given) is not int or given < 0:
        raise BadJson("The key timeout is a number of milliseconds.")
    return min(given, REMOTE_TIMEOUT_MS) / 1000


def failure(error: Exception) -> dict[str, Any]:
    """How an unreachable server stands in `failures`."""
    if isinstance(error, RemoteError):
        return {"errcode": error.errcode, "error": error.text, "status": error.status or 503}
    if isinstance(error, ApiError):
        return error.body()
    return {"errcode": "M_UNKNOWN", "error": "The server did not answer in time.", "status": 504}


def _asked_for(answer: Mapping[str, Any], wanted: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What another server answered, without users and devices that it was not asked for."""
    given = answer.get("one_time_keys")
    found = {}
    for user_id, devices in wanted.items():
        theirs = given.get(user_id) if isinstance(given, dict) else None
        if isinstance(theirs, dict):
            keys = {device_id: theirs[device_id] for device_id in devices if isinstance(theirs.get(device_id), dict)}
            if keys:
                found[user_id] = keys
    return found


def _supply(query: Query, user_id: str, device_id: str) -> Supply:
    unused = query.all(
        "SELECT algorithm FROM fallback_keys WHERE user_id = $1 AND device_id = $2 AND used = 0 ORDER BY algorithm",
        user_id,
        device_id,
    )
    return Supply(_counts(query, user_id, device_id), [algorithm for (algorithm,) in unused])


def _counts(query: Query, user_id: str, device_id: str) -> dict[str, int]:
    rows = query.all(
        "SELECT algorithm, number - taken FROM one_time_keys WHERE user_id = $1 AND device_id = $2 AND taken < number",
        user_id,
        device_id,
    )
    counts = {ALWAYS_COUNTED: 0}
    for algorithm, left in rows:
        counts[algorithm] = counts.get(algorithm, 0) + left
    return counts


def _store(query: Query, user_id: str, device_id: str, keys: list[Key], batches: Mapping[str, int]) -> None:
    have: dict[str, Any] = {}
    left = 0
    for number, taken, lines in query.all(
        "SELECT b.number, b.taken, v.keys FROM one_time_keys b JOIN one_time_key_values v ON v.batch = b.batch "
        "WHERE b.user_id = $1 AND b.device_id = $2",
        user_id,
        device_id,
    ):
        have |= orjson.loads(b"{%b}" % lines.replace(BETWEEN, b","))
        left += number - taken
    new: dict[str, list[bytes]] = {}
    for key in keys:
        # Handed out or not, a key that came once is not taken a second time.
        if key.key_id not in have:
            new.setdefault(key.algorithm, []).append(b"%b:%b" % (orjson.dumps(key.key_id), key.keys))
            left += 1
        elif not _same_key(have[key.key_id], orjson.loads(key.keys)):
            raise InvalidParam(
                f"There is already another one-time key with the name {key.key_id}. Upload new keys under new names."
            )
    if left > MAX_KEYS_PER_DEVICE:
        raise TooLarge(f"A device can have {MAX_KEYS_PER_DEVICE} unclaimed one-time keys. Upload fewer.")
    for algorithm, lines in new.items():
        query.run(
            "INSERT INTO one_time_keys (batch, user_id, device_id, algorithm, number, taken, next_at) "
            "VALUES ($1, $2, $3, $4, $5, 0, 0)",
            batches[algorithm],
            user_id,
            device_id,
            algorithm,
            len(lines),
        )
        query.run(
            "INSERT INTO one_time_key_values (batch, keys) VALUES ($1, $2)", batches[algorithm], BETWEEN.join(lines)
        )


def _store_fallback(query: Query, user_id: str, device_id: str, key: Key) -> None:
    old = query.one(
        "SELECT key_id, keys FROM fallback_keys WHERE user_id = $1 AND device_id = $2 AND algorithm = $3",
        user_id,
        device_id,
        key.algorithm,
    )
    if old == (key.key_id, key.keys):
        return  # repeated, because the answer was lost: whether it was used has not changed
    query.run(
        "INSERT INTO fallback_keys (user_id, device_id, algorithm, key_id, keys, used) VALUES ($1, $2, $3, $4, $5, 0) "
        "ON CONFLICT (user_id, device_id, algorithm) DO UPDATE SET "
        "key_id = excluded.key_id, keys = excluded.keys, used = 0",
        user_id,
        device_id,
        key.algorithm,
        key.key_id,
        key.keys,
    )


def _take(query: Query, user_id: str, device_id: str, algorithm: str, day: int, taken: list[_Taken]) -> bytes | None:
    """The next key as `"name":value`, which nobody else gets once `taken` is written; else the fallback key."""
    row = query.one(
        "SELECT b.batch, b.number, b.taken, b.next_at, v.keys FROM one_time_keys b JOIN one_time_key_values v ON v.batch = b.batch "
        "WHERE b.user_id = $1 AND b.device_id = $2 AND b.algorithm = $3 AND b.taken < b.number ORDER BY b.batch LIMIT 1",
        user_id,
        device_id,
        algorithm,
    )
    if row is not None:
        batch, number, before, at, lines = row
        last = before + 1 == number
        end = len(lines) if last else lines.index(BETWEEN, at)
        after = end + len(BETWEEN)
        taken.append((user_id, device_id, algorithm, batch, before + 1, after, day if last else None))
        line: bytes = lines[at:end]
        return line
    row = query.one(
        "UPDATE fallback_keys SET used = 1 WHERE user_id = $1 AND device_id = $2 AND algorithm = $3 RETURNING key_id, keys",
        user_id,
        device_id,
        algorithm,
    )
    return None if row is None else b"%b:%b" % (orjson.dumps(row[0]), row[1])


def _same_key(one: Any, other: Any) -> bool:
    """Signatures may differ: a key that was signed anew is still the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        return unsigned_form(one) == unsigned_form(other)
    return bool(one == other)
