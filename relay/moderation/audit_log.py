"""The audit log: every act of a moderator, a rule or the relay itself is a row, and each row holds the hash of the one before.

Append-only: the database refuses UPDATE and DELETE. Whom or what an act was about stands in a sealed part of the row, whose
key lies in another table: erasing a person destroys the keys, and the chain stays whole. Signed checkpoints leave the
machine (moderators' room, webhooks, `relay moderation verify --since`). Root can rewrite log and key alike, so what is found
is any change before the last checkpoint that is held outside. Checking it: audit_check.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from relay.clock import HOUR, Clock, rest
from relay.db import Database, Query, Tx
from relay.moderation.acts import OPERATOR
from relay.part import Part
from relay.protocol.canonical import encode, from_base64, to_base64
from relay.protocol.signing import SigningKey, sign_json
from relay.tables import Schema, Table

CHECKPOINT_EVERY_ROWS = 100
CHECKPOINT_EVERY_MS = HOUR
LOOK_EVERY_SECONDS = 60.0
MAX_PAGE = 200
KEY_BYTES, NONCE_BYTES, HASH_BYTES = 32, 12, 32
FIRST_HASH = bytes(HASH_BYTES)
# The row number under which the key of the targets' HMAC lies; rows of the log begin with 1.
TARGET_KEY = 0

# In the place of an act for whoever may not read of it.
WITHHELD = "withheld"

_FOREVER = "for good: the chain needs it"


@dataclass(frozen=True, slots=True)
class Entry:
    """A row as moderators read it. `target` and `detail` are None where their key was destroyed."""

    seq: int
    ts: int
    actor: str
    action: str
    reason_code: str
    case_id: str | None
    automated: bool
    hash: str
    target: str | None
    detail: Any

    def as_json(self) -> dict[str, Any]:
        return {
            "seq": self.seq,
            "ts": self.ts,
            "actor": self.actor,
            "action": self.action,
            "target": self.target,
            "reason_code": self.reason_code,
            "report_id": self.case_id,
            "automated": self.automated,
            "detail": self.detail,
            "hash": self.hash,
        }


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Up to which row the log had come, signed. `json` is what goes outside."""

    seq: int
    ts: int
    json: dict[str, Any]


class AuditLog(Part):
    schema = Schema(
        "audit_log",
        tables=(
            Table(
                "audit_log",
                "an act of a moderator, a rule or the relay",
                {
                    "seq": ("its number, without gaps", _FOREVER),
                    "ts": ("when", _FOREVER),
                    "actor": ("the moderator, integration or rule that acted; never who reported", _FOREVER),
                    "action": ("what was done, as a word", _FOREVER),
                    "target_hmac": ("a keyed hash of whom or what it was about", _FOREVER),
                    "reason_code": ("why, as a word", _FOREVER),
                    "case_id": ("the case it belongs to", _FOREVER),
                    "automated": ("whether no person did it", _FOREVER),
                    "sealed": ("target and details, encrypted with the row's own key", _FOREVER),
                    "prev_hash": ("the hash of the row before", _FOREVER),
                    "hash": ("over all of this", _FOREVER),
                },
            ),
            Table(
                "audit_keys",
                "the key of one row's sealed part",
                {
                    "seq": ("which row; 0 is the key of the targets' hashes", "until whom it is about is erased"),
                    "key": ("the key", "until whom it is about is erased"),
                },
            ),
            Table(
                "audit_checkpoints",
                "a signed statement of how far the audit log had come",
                {
                    "seq": ("up to which row", _FOREVER),
                    "ts": ("when", _FOREVER),
                    "statement": ("server, row, hash, key and signature", _FOREVER),
                },
            ),
            Table(
                "audit_signers",
                "a key that signs checkpoints",
                {
                    "key_id": ("its name", _FOREVER),
                    "seed": ("its secret half; empty once it is retired", "until another key takes its place"),
                    "public": ("its public half", _FOREVER),
                    "since_seq": ("the row that introduced it", _FOREVER),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE audit_log (seq BIGINT PRIMARY KEY, ts BIGINT NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
                target_hmac TEXT NOT NULL, reason_code TEXT NOT NULL, case_id TEXT, automated SMALLINT NOT NULL,
                sealed BYTES NOT NULL, prev_hash BYTES NOT NULL, hash BYTES NOT NULL);
            CREATE INDEX audit_log_of_case ON audit_log (case_id, seq);
            CREATE INDEX audit_log_of_target ON audit_log (target_hmac);
            CREATE TABLE audit_keys (seq BIGINT PRIMARY KEY, key BYTES NOT NULL);
            CREATE TABLE audit_checkpoints (seq BIGINT PRIMARY KEY, ts BIGINT NOT NULL, statement BYTES NOT NULL);
            CREATE TABLE audit_signers (key_id TEXT PRIMARY KEY, seed BYTES NOT NULL, public TEXT NOT NULL, since_seq BIGINT NOT NULL);
            REFUSE UPDATE ON audit_log;
            REFUSE DELETE ON audit_log;
            REFUSE UPDATE ON audit_checkpoints;
            REFUSE DELETE ON audit_checkpoints
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock, server_name: str) -> None:
        self._db = db
        self._clock = clock
        self._server_name = server_name
        self._woken = asyncio.Event()
        # In the write of each checkpoint: it leaves the machine by as many ways as there are.
        self.on_checkpoint: list[Callable[[Tx, Checkpoint], None]] = []
        # In the write of the row that tells of a restored backup, with the row before it.
        self.on_restored: list[Callable[[Tx, int], None]] = []

    # --- writing

    def record(
        self,
        tx: Tx,
        *,
        actor: str,
        action: str,
        target: str,
        reason_code: str,
        case_id: str | None = None,
        automated: bool = False,
        detail: Any = None,
    ) -> None:
        """A row in the caller's write. `actor` is a moderator, `integration:NAME`, `rule:NAME`, `operator`, or a role such as
        `reporter`: never the name of who reported."""
        now = self._clock.now()

        def append(query: Query) -> None:
            _append(query, now, actor, action, target, reason_code, case_id, automated, detail)

        tx.call(append)
        tx.after(self._woken.set)

    def record_found(
        self, query: Query, *, actor: str, action: str, target: str, reason_code: str, detail: Any = None
    ) -> None:
        """The same for a write that sees only in the database thread whether there is something to record."""
        _append(query, self._clock.now(), actor, action, target, reason_code, None, False, detail)

    def forget(self, tx: Tx, target: str) -> None:
        """Destroys what the log says of this person or thing; the rows stay, unreadable in that part."""

        def destroy(query: Query) -> None:
            key = query.value("SELECT key FROM audit_keys WHERE seq = $1", TARGET_KEY)
            if key is not None:
                query.run(
                    "DELETE FROM audit_keys WHERE seq > $2 AND seq IN (SELECT seq FROM audit_log WHERE target_hmac = $1)",
                    _named(bytes(key), target),
                    TARGET_KEY,
                )

        tx.call(destroy)

    async def introduce_signer(self, actor: str = OPERATOR) -> str:
        """Another key signs from now on. The row that says so carries signatures of both. Returns the key's name."""
        now = self._clock.now()

        def change(query: Query) -> str:
            old = _signer(query, now)
            new = SigningKey.generate(secrets.token_hex(4))
            statement: dict[str, Any] = {"introduces": _described(new), "retires": _described(old)}
            for key in (old, new):
                statement = sign_json(statement, self._server_name, key)
            seq = _append(query, now, actor, "signer.changed", new.key_id, "rotation", None, False, statement)
            query.run("UPDATE audit_signers SET seed = $1", b"")
            _keep_signer(query, new, seq)
            return new.key_id

        with self._db.write() as tx:
            tx.call(change)
        return str(await tx)

    # --- checkpoints

    async def run(self) -> None:
        while True:
            self._woken.clear()
            began = self._clock.monotonic()
            await self._note_restore()
            await self.checkpoint_if_due()
            await rest(self._clock, self._woken, LOOK_EVERY_SECONDS, since=began)
            # Many acts in a row are one look.
            await self._clock.sleep(1.0)

    async def _note_restore(self) -> None:
        """A database that came from a backup says so, until somebody has seen it (`restored`)."""
        epoch = str(self._db.epoch)
        before = await self._db.note("audit_epoch")
        if before == epoch:
            return
        if before is not None:
            await self.note_restored("relay")
        await self._db.take_note("audit_epoch", epoch)

    async def note_restored(self, actor: str) -> int:
        """The log goes on from an older state; the row says from which, and stays shown until it is acknowledged."""
        last, _ = await self._db.read(_last)
        with self._db.write() as tx:
            self.record(
                tx,
                actor=actor,
                action="restored",
                target=self._server_name,
                reason_code=f"from_seq_{last}",
                automated=actor == "relay",
            )
            for told in self.on_restored:
                told(tx, last)
        await tx
        return last

    async def checkpoint_if_due(self) -> None:
        now = self._clock.now()

        def due(query: Query) -> bool:
            last_seq, _ = _last(query)
            row = query.one("SELECT seq, ts FROM audit_checkpoints ORDER BY seq DESC LIMIT 1")
            seq, ts = row if row is not None else (0, 0)
            return bool(last_seq > seq and (last_seq - seq >= CHECKPOINT_EVERY_ROWS or now - ts >= CHECKPOINT_EVERY_MS))

        if await self._db.read(due):
            await self.checkpoint()

    async def checkpoint(self) -> Checkpoint | None:
        """Signs how far the log has come; the latest one again where nothing was added, None where nothing ever was."""
        now = self._clock.now()
        with self._db.write() as tx:
            tx.call(lambda query: _sign(query, now, self._server_name))
        made: Checkpoint | None = await tx
        if made is not None and made.ts == now and self.on_checkpoint:
            with self._db.write() as tx:
                for told in self.on_checkpoint:
                    told(tx, made)
            await tx
        return made

    async def last_checkpoint(self) -> dict[str, Any] | None:
        raw = await self._db.read(
            lambda query: query.value("SELECT statement FROM audit_checkpoints ORDER BY seq DESC LIMIT 1")
        )
        return None if raw is None else orjson.loads(raw)

    # --- reading

    async def of_case(self, case_id: str) -> list[Entry]:
        return await self._db.read(
            lambda query: _entries(
                query, query.all(f"SELECT {COLUMNS} FROM audit_log WHERE case_id = $1 ORDER BY seq LIMIT 1000", case_id)
            )
        )

    async def page(self, *, before: int | None = None, limit: int = 50, reader: str | None = None) -> list[Entry]:
        """The newest rows first, older than `before`. Of cases that are about the reader only the hashes are given, so that the
        chain can be followed and the named person learns nothing of them."""
        most = max(1, min(limit, MAX_PAGE))
        below = 2**53 if before is None else before

        def read(query: Query) -> list[Entry]:
            rows = query.all(f"SELECT {COLUMNS} FROM audit_log WHERE seq < $1 ORDER BY seq DESC LIMIT $2", below, most)
            hers = (
                set(query.all("SELECT case_id FROM cases WHERE user_id = $1", reader)) if reader is not None else set()
            )
            return [_withheld(one) if (one.case_id,) in hers else one for one in _opened(query, rows)]

        return await self._db.read(read)

    async def restored(self) -> int | None:
        """The row that tells of a restore which nobody has acknowledged."""
        row = await self._db.read(
            lambda query: query.one(
                "SELECT seq, action FROM audit_log WHERE action IN ('restored', 'restored.seen') ORDER BY seq DESC LIMIT 1"
            )
        )
        return row[0] if row is not None and row[1] == "restored" else None

    async def acknowledge_restore(self, actor: str) -> None:
        with self._db.write() as tx:
            self.record(tx, actor=actor, action="restored.seen", target=self._server_name, reason_code="acknowledged")
        await tx


COLUMNS = "seq, ts, actor, action, target_hmac, reason_code, case_id, automated, sealed, prev_hash, hash"


def digest(row: Sequence[Any]) -> bytes:
    """The hash that a row of `COLUMNS` has to carry."""
    seq, ts, actor, action, target_hmac, reason_code, case_id, automated, sealed, prev_hash = row[:10]
    said = {
        "seq": seq,
        "ts": ts,
        "actor": actor,
        "action": action,
        "target": target_hmac,
        "reason_code": reason_code,
        "report_id": case_id,
        "automated": bool(automated),
        "sealed": hashlib.sha256(bytes(sealed)).hexdigest(),
    }
    return hashlib.sha256(bytes(prev_hash) + encode(said)).digest()


def _append(
    query: Query, ts: int, actor: str, action: str, target: str, reason_code: str, case_id: str | None, automated: bool, detail: Any
) -> int:  # fmt: skip
    # Loaded by the first act: a relay without any does without its 7 MB.
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    last_seq, prev_hash = _last(query)
    seq = last_seq + 1
    stored = query.value("SELECT key FROM audit_keys WHERE seq = $1", TARGET_KEY)
    if stored is None:
        stored = secrets.token_bytes(KEY_BYTES)
        query.run("INSERT INTO audit_keys (seq, key) VALUES ($1, $2)", TARGET_KEY, stored)
    key, nonce = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(NONCE_BYTES)
    inside = orjson.dumps({"target": target, "detail": detail})
    sealed = nonce + AESGCM(key).encrypt(nonce, inside, str(seq).encode())
    row = (seq, ts, actor, action, _named(bytes(stored), target), reason_code, case_id, int(automated), sealed, prev_hash)  # fmt: skip
    query.run(
        f"INSERT INTO audit_log ({COLUMNS}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)", *row, digest(row)
    )
    query.run("INSERT INTO audit_keys (seq, key) VALUES ($1, $2)", seq, key)
    return seq


def _last(query: Query) -> tuple[int, bytes]:
    row = query.one("SELECT seq, hash FROM audit_log ORDER BY seq DESC LIMIT 1")
    return (row[0], bytes(row[1])) if row is not None else (0, FIRST_HASH)


def _named(key: bytes, target: str) -> str:
    return hmac.new(key, target.encode(), hashlib.sha256).hexdigest()


def _entries(query: Query, rows: Sequence[Sequence[Any]]) -> list[Entry]:
    return list(_opened(query, rows))


def _opened(query: Query, rows: Sequence[Sequence[Any]]) -> Iterator[Entry]:
    for seq, ts, actor, action, _, reason_code, case_id, automated, sealed, _, hashed in rows:
        target, detail = None, None
        key = query.value("SELECT key FROM audit_keys WHERE seq = $1", seq)
        if key is not None:
            target, detail = _unsealed(bytes(key), seq, bytes(sealed))
        yield Entry(seq, ts, actor, action, reason_code, case_id, bool(automated), bytes(hashed).hex(), target, detail)


def _withheld(entry: Entry) -> Entry:
    return Entry(entry.seq, entry.ts, "", WITHHELD, "", None, entry.automated, entry.hash, None, None)


def _unsealed(key: bytes, seq: int, sealed: bytes) -> tuple[str | None, Any]:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        inside = orjson.loads(AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], str(seq).encode()))
    except (InvalidTag, ValueError):
        return None, None  # tampered with: `verify` says so
    return inside["target"], inside["detail"]


# --- signing


def _described(key: SigningKey) -> dict[str, str]:
    return {"key_id": key.key_id, "public": key.verify_key_base64}


def _keep_signer(query: Query, key: SigningKey, seq: int) -> None:
    seed = from_base64(key.dump().split()[2])
    query.run(
        "INSERT INTO audit_signers (key_id, seed, public, since_seq) VALUES ($1, $2, $3, $4)",
        key.key_id,
        seed,
        key.verify_key_base64,
        seq,
    )


def _signer(query: Query, now: int) -> SigningKey:
    """The key that signs at present; the first time it is made, and a row introduces it."""
    row = query.one("SELECT key_id, seed FROM audit_signers WHERE length(seed) > 0")
    if row is not None:
        return SigningKey(row[0], bytes(row[1]))
    key = SigningKey.generate(secrets.token_hex(4))
    seq = _append(query, now, "relay", "signer.introduced", key.key_id, "first_use", None, True, _described(key))
    _keep_signer(query, key, seq)
    return key


def _sign(query: Query, now: int, server_name: str) -> Checkpoint | None:
    if _last(query)[0] == 0:
        return None
    key = _signer(query, now)
    seq, hashed = _last(query)
    known = query.one("SELECT ts, statement FROM audit_checkpoints WHERE seq = $1", seq)
    if known is not None:
        return Checkpoint(seq, known[0], orjson.loads(known[1]))
    unsigned = {"server": server_name, "seq": seq, "hash": to_base64(hashed), "ts": now, **_described(key)}
    statement = sign_json(unsigned, server_name, key)
    query.run("INSERT INTO audit_checkpoints (seq, ts, statement) VALUES ($1, $2, $3)", seq, now, orjson.dumps(statement))  # fmt: skip
    return Checkpoint(seq, now, statement)
