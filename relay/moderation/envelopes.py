"""The sealed envelopes of each case, as rows: the text, and for each moderator's key a wrap of what opens it.

`prepare` seals in memory, before the write; `store` is part of the write that changes the case. `forget` takes the wraps
away, so that nobody can open the text any more, and leaves a hash. A key that was taken off the list loses its wraps a day
later; a key that was added gets its own from whoever opens the case (`take_wraps`), since the relay can open none.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relay.clock import DAY, Clock
from relay.db import Database, Query, Tx
from relay.errors import ApiError, InvalidParam, NotFound
from relay.moderation import envelope
from relay.moderation.acts import OPERATOR
from relay.moderation.envelope import Envelope, TooFewKeys
from relay.moderation.moderator_keys import ModeratorKeys, Records
from relay.part import Part
from relay.protocol.canonical import from_base64
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, get_object

KINDS = frozenset({"evidence", "words", "answer", "appeal", "note", "forward"})
MAX_PLAINTEXT = 4 * 2**20
MAX_REMEMBERED = 10_000
MAX_UNWRAPPED = 200
SWEEP_EVERY_SECONDS = 600.0
REMOVED_WAIT = DAY


_KEPT = "until the case's retention is over"


@dataclass(frozen=True, slots=True)
class Sealed:
    """An envelope that waits for its write."""

    envelope_id: str
    kind: str
    envelope: Envelope = field(repr=False)

    @property
    def digest(self) -> str:
        return self.envelope.digest.hex()


class Envelopes(Part):
    schema = Schema(
        "envelopes",
        tables=(
            Table(
                "envelopes",
                "text sealed to the moderators' keys, which are not here",
                {
                    "envelope_id": ("its name", _KEPT),
                    "case_id": ("whose evidence it is", _KEPT),
                    "version": ("the how-manieth of its case", _KEPT),
                    "kind": ("evidence, words, answer, appeal, note or forward", _KEPT),
                    "iv": ("for opening it; empty once it is forgotten", _KEPT),
                    "body": ("ciphertext; empty once it is forgotten", _KEPT),
                    "digest": ("hash of the ciphertext, as the audit log names it", "as long as the case's row"),
                    "created_ts": ("when, to the hour", _KEPT),
                },
            ),
            Table(
                "envelope_wraps",
                "an envelope's key, wrapped for one moderator's key",
                {
                    "envelope_id": ("which envelope", _KEPT),
                    "key_id": ("for which key", _KEPT + ", or a day after the key was removed"),
                    "wrap": ("the wrapped key", _KEPT + ", or a day after the key was removed"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE envelopes (envelope_id TEXT PRIMARY KEY, case_id TEXT NOT NULL, version BIGINT NOT NULL, kind TEXT NOT NULL,
                iv BYTES NOT NULL, body BYTES NOT NULL, digest BYTES NOT NULL, created_ts BIGINT NOT NULL, UNIQUE (case_id, version));
            CREATE TABLE envelope_wraps (envelope_id TEXT NOT NULL, key_id TEXT NOT NULL, wrap BYTES NOT NULL,
                PRIMARY KEY (envelope_id, key_id));
            CREATE INDEX envelope_wraps_of_key ON envelope_wraps (key_id)
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock, keys: ModeratorKeys, audit_log: Records | None) -> None:
        self._db = db
        self._clock = clock
        self._keys = keys
        self._audit_log = audit_log
        # The highest version handed out for a case: it may not be written yet.
        self._handed: OrderedDict[str, int] = OrderedDict()

    # --- sealing

    async def can_seal(self, except_users: Collection[str] = ()) -> bool:
        return len(await self._keys.recipients(except_users)) >= envelope.MIN_KEYS

    async def prepare(
        self, case_id: str, kind: str, plaintext: bytes, except_users: Collection[str] = ()
    ) -> Sealed | None:
        """Sealed to all keys that count, but those of `except_users` (whom the case is about); None where fewer than two remain:
        then nothing of the text may be kept."""
        if kind not in KINDS:
            raise ValueError(f"an envelope of the kind {kind} is not known")
        if len(plaintext) > MAX_PLAINTEXT:
            raise ApiError(f"This is more than {MAX_PLAINTEXT // 2**20} MiB of text. Send less at once.", status=413)
        to = await self._keys.recipients(except_users)
        version = await self._next_version(case_id)
        try:
            made = envelope.seal(plaintext, case_id=case_id, version=version, to=to)
        except TooFewKeys:
            return None
        return Sealed(secrets.token_hex(16), kind, made)

    def store(self, tx: Tx, sealed: Sealed, *, actor: str = "relay") -> None:
        """In the write that changes the case."""
        made = sealed.envelope
        now = self._clock.now()
        tx.run(
            "INSERT INTO envelopes (envelope_id, case_id, version, kind, iv, body, digest, created_ts) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            sealed.envelope_id, made.case_id, made.version, sealed.kind, made.iv, made.body, made.digest, now - now % (DAY // 24),
        )  # fmt: skip
        tx.many(
            "INSERT INTO envelope_wraps (envelope_id, key_id, wrap) VALUES ($1, $2, $3)",
            [(sealed.envelope_id, key_id, wrap) for key_id, wrap in made.wraps.items()],
        )
        if self._audit_log is not None:
            self._audit_log.record(
                tx, actor=actor, action="envelope.sealed", target=sealed.envelope_id, reason_code=sealed.kind,
                case_id=made.case_id, detail={"sha256": sealed.digest},
            )  # fmt: skip

    async def _next_version(self, case_id: str) -> int:
        stored = await self._db.read(
            lambda query: query.value("SELECT max(version) FROM envelopes WHERE case_id = $1", case_id)
        )
        version = max(stored or 0, self._handed.get(case_id, 0)) + 1
        self._handed[case_id] = version
        self._handed.move_to_end(case_id)
        if len(self._handed) > MAX_REMEMBERED:
            self._handed.popitem(last=False)
        return version

    # --- reading

    async def of_case(self, case_id: str) -> list[dict[str, Any]]:
        """Its envelopes as a moderator's tool opens them, oldest first. A forgotten one has no body, and `forgotten` true."""
        return await self._db.read(_of_case, case_id)

    # --- forgetting

    def forget(self, tx: Tx, case_id: str, kinds: Iterable[str] | None = None) -> None:
        """Nobody can open them from the commit on."""

        def shred(query: Query) -> None:
            for envelope_id, kind in query.all("SELECT envelope_id, kind FROM envelopes WHERE case_id = $1", case_id):
                if kinds is None or kind in chosen:
                    query.run("DELETE FROM envelope_wraps WHERE envelope_id = $1", envelope_id)
                    query.run("UPDATE envelopes SET iv = $2, body = $2 WHERE envelope_id = $1", envelope_id, b"")

        chosen = frozenset(kinds or ())
        tx.call(shred)

    async def run(self) -> None:
        while True:
            await self.sweep()
            await self._clock.sleep(SWEEP_EVERY_SECONDS)

    async def sweep(self) -> None:
        """Keys that were taken off the list a day ago open nothing any more."""
        gone = await self._keys.removed_before(self._clock.now() - REMOVED_WAIT)
        held = {
            row[0] for row in await self._db.read(lambda query: query.all("SELECT DISTINCT key_id FROM envelope_wraps"))
        }
        if gone & held:
            with self._db.write() as tx:
                tx.many("DELETE FROM envelope_wraps WHERE key_id = $1", [(key_id,) for key_id in sorted(gone & held)])
            await tx

    # --- wraps for keys that came later

    async def unwrapped(self, key_id: str) -> list[dict[str, Any]]:
        """Envelopes that `key_id` opens and some key that counts does not yet, each with the keys it lacks."""
        counting = {one.key_id: one for one in await self._keys.recipients()}
        excluded = await self.excluded()

        def find(query: Query) -> list[dict[str, Any]]:
            found = []
            for (case_id,) in query.all(
                "SELECT DISTINCT e.case_id FROM envelopes e JOIN envelope_wraps w ON w.envelope_id = e.envelope_id WHERE w.key_id = $1",
                key_id,
            ):
                for one in _of_case(query, case_id):
                    lacks = [
                        other for other in counting
                        if other not in one["wraps"] and counting[other].user_id not in excluded.get(case_id, ())
                    ]  # fmt: skip
                    if key_id in one["wraps"] and lacks:
                        found.append({**one, "lacks": lacks})
                        if len(found) >= MAX_UNWRAPPED:
                            return found
            return found

        return await self._db.read(find)

    # Which people a case is about; the cases set it. They get no wraps later either.
    persons_of: Callable[[], Awaitable[Mapping[str, Collection[str]]]] | None = None

    async def excluded(self) -> Mapping[str, Collection[str]]:
        """Per case whom it is about."""
        return await self.persons_of() if self.persons_of is not None else {}

    async def take_wraps(self, envelope_id: str, wraps: Mapping[str, object], actor: str) -> int:
        """From a moderator who could open it, or the operator. Only for keys that count, and none is replaced. Raises NotFound,
        InvalidParam."""
        counting = {one.key_id: one for one in await self._keys.recipients()}
        own = [key_id for key_id, one in counting.items() if one.user_id == actor]
        excluded = await self.excluded()
        given = {key_id: _wrap(value) for key_id, value in list(wraps.items())[: envelope.MAX_KEYS]}

        added: list[int] = []

        def add(query: Query) -> None:
            row = query.one("SELECT case_id FROM envelopes WHERE envelope_id = $1 AND length(body) > 0", envelope_id)
            if row is None or actor in excluded.get(row[0], ()):  # whoever it is about must not learn that it is there
                raise NotFound("There is no such envelope, or it is forgotten.")
            if actor != OPERATOR and not any(query.value(_HAS_WRAP, envelope_id, key_id) for key_id in own):
                # It could be nothing that opens, and would stand in the place of what does.
                raise InvalidParam("You have no key that opens this. Wraps come from somebody who opened it.")
            for key_id, wrap in given.items():
                if key_id not in counting or counting[key_id].user_id in excluded.get(row[0], ()):
                    raise InvalidParam("A wrap is for a key that may not open this case. Read the list of keys again.")
                sql = (
                    "INSERT INTO envelope_wraps (envelope_id, key_id, wrap) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
                )
                added.append(query.run(sql, envelope_id, key_id, wrap))

        with self._db.write() as tx:
            tx.call(add)
            if self._audit_log is not None:
                self._audit_log.record(
                    tx, actor=actor, action="envelope.rewrapped", target=envelope_id, reason_code="new key",
                    detail={"keys": sorted(given)},
                )  # fmt: skip
        await tx
        return sum(added)

    def commands(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {"moderator.unwrapped": self.unwrapped, "moderator.rewrap": self._rewrap}

    async def _rewrap(self, envelope_id: str, wraps: dict[str, Any]) -> int:
        return await self.take_wraps(envelope_id, wraps, OPERATOR)

    async def check(self) -> list[dict[str, str]]:
        """Findings for `relay check`: cases that a key which counts can't open yet."""
        counting = await self._keys.recipients()
        excluded = await self.excluded()

        def lacking(query: Query) -> int:
            found = set()
            for one in counting:
                rows = query.all(
                    "SELECT e.envelope_id, e.case_id FROM envelopes e WHERE length(e.body) > 0 AND NOT EXISTS "
                    "(SELECT 1 FROM envelope_wraps w WHERE w.envelope_id = e.envelope_id AND w.key_id = $1)",
                    one.key_id,
                )
                found |= {envelope_id for envelope_id, case_id in rows if one.user_id not in excluded.get(case_id, ())}
            return len(found)

        number = await self._db.read(lacking)
        if not number:
            return []
        what = f"{number} sealed texts can't be opened yet with a key that was added later."
        return [
            {"severity": "warning", "what": what, "todo": "Somebody with an older key runs: relay moderator rewrap"}
        ]

    # --- for the desk

    def routes(self) -> Iterable[Route]:
        yield Route("GET", "/_relay/safety/v1/keys/{key_id}/unwrapped", self._get_unwrapped)
        yield Route("POST", "/_relay/safety/v1/envelopes/{envelope_id}/wraps", self._post_wraps)

    async def _get_unwrapped(self, request: Request) -> Answer:
        user_id = await self._keys.require_session(request)
        key_id = await self._keys.require_own(user_id, request.params["key_id"])
        return {"envelopes": await self.unwrapped_for(user_id, key_id)}

    async def unwrapped_for(self, user_id: str, key_id: str) -> list[dict[str, Any]]:
        """`unwrapped`, without what is about herself; that she fetched it stands in the log."""
        about = await self.excluded()
        found = [one for one in await self.unwrapped(key_id) if user_id not in about.get(one["case_id"], ())]
        if found and self._audit_log is not None:
            with self._db.write() as tx:
                for case_id in sorted({one["case_id"] for one in found}):
                    self._audit_log.record(
                        tx, actor=user_id, action="evidence.fetched", target=case_id, reason_code="rewrap", case_id=case_id
                    )  # fmt: skip
            await tx
        return found

    async def _post_wraps(self, request: Request) -> Answer:
        user_id = await self._keys.require_session(request)
        wraps = get_object(request.json(), "wraps")
        return {"added": await self.take_wraps(request.params["envelope_id"], wraps, user_id)}


_HAS_WRAP = "SELECT 1 FROM envelope_wraps WHERE envelope_id = $1 AND key_id = $2"


def _wrap(value: object) -> bytes:
    raw = from_base64(value) if isinstance(value, str) else b""
    if len(raw) != envelope.WRAP_BYTES:
        raise InvalidParam("A wrap is not one: it has another length. Use this relay's own tools.")
    return raw


def _of_case(query: Query, case_id: str) -> list[dict[str, Any]]:
    rows = query.all(
        "SELECT envelope_id, version, kind, iv, body, digest, created_ts FROM envelopes WHERE case_id = $1 ORDER BY version",
        case_id,
    )
    found = []
    for envelope_id, version, kind, iv, body, digest, created_ts in rows:
        wraps: Sequence[Any] = query.all("SELECT key_id, wrap FROM envelope_wraps WHERE envelope_id = $1", envelope_id)
        made = Envelope(case_id, version, bytes(iv), bytes(body), {key_id: bytes(wrap) for key_id, wrap in wraps})
        shown = {"id": envelope_id, "kind": kind, "created_ts": created_ts, "sha256": bytes(digest).hex()}
        found.append({**made.json(), **shown, "forgotten": not body})
    return found
