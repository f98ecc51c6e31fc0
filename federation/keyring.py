"""Whose key is whose: fetches, keeps and judges the signing keys of servers, and verifies what they signed.

Keys come from their server itself or, where it gives none, from a notary that the operator trusts. Simultaneous fetches of one server are one; a server that gave none is left alone for
a while. Many signatures are checked in threads, since the check itself runs without Python's lock.
Spec: server-server-api/#retrieving-server-keys, #validating-hashes-and-signatures-on-received-events, rooms/v5.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import orjson
import structlog

from federation.joined import Joined
from federation.kept_keys import KeptKeys, named_in
from federation.server_keys import ALGORITHM, BadKeys, KnownKey, own_answer, read
from relay.clock import HOUR, MINUTE, SECOND, Clock
from relay.db import Database, Query
from relay.errors import ApiError, BadJson, Forbidden, RemoteError
from relay.ids import is_server_name
from relay.part import Part
from relay.protocol.canonical import from_base64
from relay.protocol.event import Event, required_signers, signing_bytes
from relay.protocol.signing import OldKey, SigningKey, signature_of, verify_bytes, verify_json
from relay.tables import Schema, Table

log = structlog.get_logger("keyring")

MAX_SERVERS_IN_MEMORY = 20_000
MAX_FETCHES_AT_ONCE = 50
MAX_SIGNATURES_PER_SERVER = 8
MAX_NOTARY_ANSWERS = 8
# A thread's share; fewer are verified where they are.
BATCH = 64
INLINE = 3
# However many servers are slow: a join of a large room comes to an end.
MAX_WAIT_FACTOR = 6
# An unknown key ID is no reason to ask the same server over and over.
REFETCH_MIN = MINUTE
FAILURE_WAIT_MIN = 30 * SECOND
FAILURE_WAIT_MAX = HOUR
# Spec: server-server-api/#validating-policy-server-signatures: not published, and not asked for here.
POLICY_SERVER_KEY = "ed25519:policy_server"

FetchKeys = Callable[[str], Awaitable[dict[str, Any]]]
# (notary, server) -> what it answers to key/v2/query.
AskNotary = Callable[[str, str], Awaitable[dict[str, Any]]]


@dataclass(slots=True)
class _Server:
    keys: dict[str, KnownKey] = field(default_factory=dict)
    fetched_at: int = 0


@dataclass(slots=True)
class _Wanted:
    """One server's signature on one event: which keys were named, and when the event says it was made."""

    server: str
    signatures: list[tuple[str, bytes]]
    when: int
    strict: bool


class Keyring(Part):
    schema = Schema(
        "keyring",
        tables=(
            Table(
                "server_keys",
                "public keys of servers",
                {
                    "server": ("whose key", "as long as events signed with it may be met"),
                    "key_id": ("its ID", "as long as events signed with it may be met"),
                    "verify_key": ("the public key", "as long as events signed with it may be met"),
                    "valid_until": ("when it stops being valid", "as long as events signed with it may be met"),
                    "expired": ("whether its server put it away", "as long as events signed with it may be met"),
                },
            ),
            Table(
                "server_key_answers",
                "public keys of servers, as these signed them",
                {
                    "server": ("whose keys", "until the next answer"),
                    "answer": ("the signed list, given on as a notary", "until the next answer"),
                    "fetched_at": ("when it came", "until the next answer"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE server_keys (server TEXT NOT NULL, key_id TEXT NOT NULL, verify_key BYTES NOT NULL,
                valid_until BIGINT NOT NULL, expired SMALLINT NOT NULL, PRIMARY KEY (server, key_id));
            CREATE TABLE server_key_answers (server TEXT PRIMARY KEY, answer BYTES NOT NULL, fetched_at BIGINT NOT NULL)
            """,
        ),
    )

    def __init__(
        self,
        server_name: str,
        key: SigningKey,
        db: Database,
        clock: Clock,
        fetch: FetchKeys,
        *,
        timeout: float,
        old_keys: Sequence[OldKey] = (),
        notaries: Sequence[str] = (),
        ask_notary: AskNotary | None = None,
        kept: KeptKeys | None = None,
    ) -> None:
        """`notaries` are believed about the keys of servers that give none themselves."""
        self.server_name = server_name
        self._key = key
        # Ours; it grows where our own key is changed while we run.
        self._old_keys = old_keys
        self._db = db
        self._clock = clock
        self._fetch_keys = fetch
        self._timeout = timeout
        self._notaries = notaries
        self._ask_notary = ask_notary
        self._kept = kept
        # Dropped by `_keep`, the only write to these tables, and by size.
        self._servers: dict[str, _Server] = {}
        self._failures: dict[str, tuple[int, int]] = {}
        self._joined: Joined[None] = Joined()
        self._slots = asyncio.Semaphore(MAX_FETCHES_AT_ONCE)
        self._threads: ThreadPoolExecutor | None = None

    # --- what is asked

    async def knows(self, server: str) -> bool:
        """Whether keys of this server are kept here; what is to be found out about others costs requests."""
        await self._load((server,))
        return bool(self._of(server).keys)

    async def current_key(self, server: str, key_id: str) -> bytes | None:
        """The key with which this server may sign a request now."""
        now = self._clock.now()

        def found() -> bytes | None:
            key = self._of(server).keys.get(key_id)
            return key.raw if key is not None and not key.expired and key.valid_until >= now else None

        await self._load((server,))
        raw = found()
        if raw is None and self._may_fetch(server):
            await self._refresh(server)
            raw = found()
        return raw

    async def verified_json(self, server: str, value: dict[str, Any]) -> bool:
        """Whether `server` signed this object with a key that is valid now."""
        for key_id in _key_ids(value.get("signatures"), server):
            raw = await self.current_key(server, key_id)
            if raw is not None and verify_json(value, server, key_id, raw):
                return True
        return False

    async def verified(self, events: Sequence[Event]) -> list[bool]:
        """Whether each event carries the valid signatures of all servers that must have signed it."""
        wanted = [_wanted(event) for event in events]
        asked = [one for several in wanted if several is not None for one in several]
        await self._load({one.server for one in asked})
        lacking = {one.server for one in asked if not self._usable(one)}
        await self._refresh_all(server for server in lacking if self._may_fetch(server))
        jobs: list[tuple[Event, list[tuple[bytes, bytes]]] | None] = []
        for event, several in zip(events, wanted, strict=True):
            usable = None if several is None else [self._usable(one) for one in several]
            jobs.append(
                None if usable is None or not all(usable) else (event, [pair for pairs in usable for pair in pairs])
            )
        if len(jobs) <= INLINE:
            return _verify_batch(jobs)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="verify")
        loop = asyncio.get_running_loop()
        batches = [jobs[start : start + BATCH] for start in range(0, len(jobs), BATCH)]
        answers = await asyncio.gather(
            *(loop.run_in_executor(self._threads, _verify_batch, batch) for batch in batches)
        )
        return [verdict for answer in answers for verdict in answer]

    def own_answer(self) -> dict[str, Any]:
        return own_answer(self.server_name, self._key, self._old_keys, self._clock.now())

    async def answer_of(self, server: str, valid_until: int) -> dict[str, Any] | None:
        """What this server last published, signed by it, fetched anew where half its life is over; None where it never
        answered. For the notary."""
        kept = await self._kept_answer(server)
        now = self._clock.now()
        if kept is None or not _fresh(kept[0], kept[1], now, valid_until):
            if self._may_fetch(server):
                await self._refresh(server)
                kept = await self._kept_answer(server)
        return None if kept is None else kept[0]

    async def answers_of(self, server: str, valid_until: int, key_ids: Sequence[str]) -> list[dict[str, Any]]:
        """The same, and what it said before of those of these keys that it names no longer."""
        answer = await self.answer_of(server, valid_until)
        named = set() if answer is None else named_in(answer)
        missing = [key_id for key_id in key_ids if key_id not in named]
        former = await self._kept.former_answers(server, missing) if missing and self._kept is not None else []
        return [*([] if answer is None else [answer]), *former]

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None

    # --- what is known

    def _of(self, server: str) -> _Server:
        if server == self.server_name:
            return self._own()
        known = self._servers.get(server)
        return known if known is not None else _Server()

    def _own(self) -> _Server:
        """Ours need no network, and are valid for whatever we sign now."""
        keys = {self._key.key_id: KnownKey(self._key.verify_key, 2**63 - 1)}
        for old in self._old_keys:
            keys.setdefault(old.key_id, KnownKey(from_base64(old.verify_key_base64), old.expired_at, expired=True))
        return _Server(keys, self._clock.now())

    def _usable(self, wanted: _Wanted) -> list[tuple[bytes, bytes]]:
        """(signature, key) of each named key that was valid when the event was made."""
        keys = self._of(wanted.server).keys
        return [
            (signature, keys[key_id].raw)
            for key_id, signature in wanted.signatures
            if key_id in keys and keys[key_id].valid_at(wanted.when, strict=wanted.strict)
        ]

    async def _load(self, servers: Iterable[str]) -> None:
        """From disk into memory."""
        missing = [server for server in servers if server not in self._servers and server != self.server_name]
        if not missing:
            return
        found = await self._db.read(_read_servers, missing)
        while len(self._servers) + len(found) > MAX_SERVERS_IN_MEMORY and self._servers:
            del self._servers[next(iter(self._servers))]
        for server, entry in found.items():
            self._servers.setdefault(server, entry)

    async def _kept_answer(self, server: str) -> tuple[dict[str, Any], int] | None:
        row = await self._db.read(
            lambda query: query.one("SELECT answer, fetched_at FROM server_key_answers WHERE server = $1", server)
        )
        return None if row is None else (orjson.loads(row[0]), row[1])

    # --- fetching

    def _may_fetch(self, server: str) -> bool:
        if server == self.server_name or not is_server_name(server):
            return False
        now = self._clock.now()
        known = self._servers.get(server)
        # A time that lies further ahead than it was put there: the clock was set back since, and it says nothing.
        if known is not None and known.fetched_at <= now < known.fetched_at + REFETCH_MIN:
            return False
        until, wait = self._failures.get(server, (0, 0))
        return not until - wait <= now < until

    async def _refresh_all(self, servers: Iterable[str]) -> None:
        lacking = list(servers)
        if not lacking:
            return
        try:
            async with asyncio.timeout(self._timeout * MAX_WAIT_FACTOR):
                await asyncio.gather(*(self._refresh(server) for server in lacking))
        except TimeoutError:
            log.warning("not all servers gave their keys in time", count=len(lacking))

    async def _refresh(self, server: str) -> None:
        """Asks the server itself; whatever goes wrong is remembered, and raises nothing."""
        await self._joined.get(server, lambda: self._fetch(server))

    async def _fetch(self, server: str) -> None:
        async with self._slots:
            if not self._may_fetch(server):
                return
            try:
                async with asyncio.timeout(self._timeout):
                    answer = await self._fetch_keys(server)
                keys = read(server, answer, self._clock.now())
            except (RemoteError, ApiError, BadKeys, TimeoutError) as error:
                if isinstance(error, Forbidden) and not self._notaries:
                    return  # our own operator has shut it out: nobody was asked, and it may be let in at any moment
                _, wait = self._failures.get(server, (0, 0))
                wait = min(FAILURE_WAIT_MAX, max(FAILURE_WAIT_MIN, 2 * wait))
                while len(self._failures) >= MAX_SERVERS_IN_MEMORY:
                    del self._failures[next(iter(self._failures))]
                self._failures[server] = (self._clock.now() + wait, wait)
                log.info("a server gave no keys", server=server, exc=error, seconds=wait // SECOND)
                told = await self._from_notaries(server)
                if told is None:
                    return
                answer, keys = await self._beside_ours(server, *told)
            else:
                self._failures.pop(server, None)
        await self._keep(server, keys, answer)

    async def _beside_ours(
        self, server: str, answer: dict[str, Any], keys: dict[str, KnownKey]
    ) -> tuple[dict[str, Any], dict[str, KnownKey]]:
        """What a notary gave. Where ours is the later list, its word on each key stands: one that was put away does not come back."""
        ours = await self._kept_answer(server)
        if ours is None or ours[0]["valid_until_ts"] <= answer["valid_until_ts"]:
            return answer, keys
        await self._load([server])
        known = self._of(server).keys
        return ours[0], {key_id: key for key_id, key in keys.items() if key_id not in known}

    async def _from_notaries(self, server: str) -> tuple[dict[str, Any], dict[str, KnownKey]] | None:
        """The server's own signed list as the first notary has it that has one. Spec: #querying-keys-through-another-server"""
        for notary in self._notaries if self._ask_notary is not None else ():
            if notary in (server, self.server_name) or self._ask_notary is None:
                continue
            try:
                async with asyncio.timeout(self._timeout):
                    given = (await self._ask_notary(notary, server)).get("server_keys")
                    told = []
                    for answer in given[:MAX_NOTARY_ANSWERS] if isinstance(given, list) else ():
                        if not isinstance(answer, dict) or answer.get("server_name") != server:
                            continue
                        if await self.verified_json(notary, answer):
                            told.append((answer, read(server, answer, self._clock.now())))
                    if told:
                        # It may give on former lists as well: in those a key is in use that was put away since.
                        return max(told, key=lambda one: one[0]["valid_until_ts"])
            except (RemoteError, ApiError, BadKeys, TimeoutError) as error:
                log.info("a notary gave no keys", server=notary, exc=error)
        return None

    async def _keep(self, server: str, keys: dict[str, KnownKey], answer: dict[str, Any]) -> None:
        now = self._clock.now()
        with self._db.write() as tx:
            if self._kept is not None:
                self._kept.note(tx, server, keys)
            tx.many(
                "INSERT INTO server_keys (server, key_id, verify_key, valid_until, expired) VALUES ($1, $2, $3, $4, $5) "
                "ON CONFLICT (server, key_id) DO UPDATE SET verify_key = excluded.verify_key, "
                "valid_until = excluded.valid_until, expired = excluded.expired",
                [(server, key_id, key.raw, key.valid_until, int(key.expired)) for key_id, key in keys.items()],
            )
            tx.run(
                "INSERT INTO server_key_answers (server, answer, fetched_at) VALUES ($1, $2, $3) "
                "ON CONFLICT (server) DO UPDATE SET answer = excluded.answer, fetched_at = excluded.fetched_at",
                server,
                orjson.dumps(answer),
                now,
            )
        # The keys are good whether or not the disk has room for them.
        before = self._servers.get(server)
        self._servers[server] = _Server((before.keys if before is not None else {}) | keys, now)
        try:
            await tx
        except ApiError as error:
            log.warning("a server's keys could not be kept", server=server, exc=error)


def _read_servers(query: Query, servers: Sequence[str]) -> dict[str, _Server]:
    found = {}
    for server in servers:
        entry = _Server(
            fetched_at=query.value("SELECT fetched_at FROM server_key_answers WHERE server = $1", server) or 0
        )
        for key_id, raw, valid_until, expired in query.all(
            "SELECT key_id, verify_key, valid_until, expired FROM server_keys WHERE server = $1", server
        ):
            entry.keys[key_id] = KnownKey(bytes(raw), valid_until, bool(expired))
        found[server] = entry
    return found


def _fresh(answer: dict[str, Any], fetched_at: int, now: int, valid_until: int) -> bool:
    until = answer.get("valid_until_ts")
    return isinstance(until, int) and until >= valid_until and now < fetched_at + (until - fetched_at) // 2


def _key_ids(signatures: object, server: str) -> list[str]:
    mine = signatures.get(server) if isinstance(signatures, dict) else None
    if not isinstance(mine, dict):
        return []
    return [key_id for key_id in mine if key_id.startswith(ALGORITHM) and key_id != POLICY_SERVER_KEY][
        :MAX_SIGNATURES_PER_SERVER
    ]


def _wanted(event: Event) -> list[_Wanted] | None:
    """What has to be verified; None where a signature that must be there is not."""
    found = []
    for server in required_signers(event):
        signatures = [
            (key_id, signature)
            for key_id in _key_ids(event.pdu["signatures"], server)
            if (signature := signature_of(event.pdu, server, key_id)) is not None
        ]
        if not signatures:
            return None
        found.append(_Wanted(server, signatures, event.origin_server_ts, event.version.strict_keys))
    return found


def _verify_batch(jobs: Sequence[tuple[Event, list[tuple[bytes, bytes]]] | None]) -> list[bool]:
    verdicts = []
    for job in jobs:
        if job is None:
            verdicts.append(False)
            continue
        event, pairs = job
        try:
            message = signing_bytes(event)
        except BadJson:
            verdicts.append(False)
            continue
        verdicts.append(all(verify_bytes(message, signature, key) for signature, key in pairs))
    return verdicts
