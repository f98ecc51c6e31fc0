"""Whether the audit log was changed: every row's hash, every checkpoint's signature, and whether the log still extends the
checkpoint that somebody holds outside. Pure, but for the rows it is given to read.

What it finds is told with the number of the row, never with what the row says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from relay.db import Query
from relay.errors import ApiError, BadJson
from relay.moderation.audit_log import COLUMNS, FIRST_HASH, digest
from relay.protocol.canonical import from_base64
from relay.protocol.signing import KEY_BYTES, verify_json

AT_ONCE = 1_000
MAX_FOUND = 50
MAX_SIGNERS = 1_000


@dataclass(slots=True)
class Verdict:
    rows: int = 0
    checkpoints: int = 0
    found: list[str] = field(default_factory=list)

    def find(self, text: str) -> None:
        if len(self.found) < MAX_FOUND:
            self.found.append(text)

    def as_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "checkpoints": self.checkpoints, "found": self.found, "sound": not self.found}


def verify(query: Query, server_name: str, held: Mapping[str, Any] | None = None) -> Verdict:
    """`held` is a checkpoint from outside this machine."""
    verdict = Verdict()
    statements = {
        seq: _read(raw) for seq, raw in query.all("SELECT seq, statement FROM audit_checkpoints ORDER BY seq")
    }
    signers: dict[str, str] = dict(query.all("SELECT key_id, public FROM audit_signers LIMIT $1", MAX_SIGNERS))
    marked = {seq: _hash_of(one) for seq, one in statements.items()}
    held_seq = -1
    if held is not None:
        held_seq = _check_held(verdict, server_name, held, signers)
    last_seq, last_hash = 0, FIRST_HASH
    while True:
        rows = query.all(f"SELECT {COLUMNS} FROM audit_log WHERE seq > $1 ORDER BY seq LIMIT $2", last_seq, AT_ONCE)
        for row in rows:
            seq, prev_hash, hashed = row[0], _bytes(row[9]), _bytes(row[10])
            if seq != last_seq + 1:
                verdict.find(f"Rows {last_seq + 1} to {seq - 1} are missing.")
            if prev_hash != last_hash:
                verdict.find(f"Row {seq} does not follow from the one before it.")
            if _digest(row) != hashed:
                verdict.find(f"Row {seq} was changed.")
            if seq in marked and marked[seq] != hashed:
                verdict.find(f"Row {seq} is another than the one its checkpoint names.")
            if seq == held_seq and held is not None and _hash_of(held) != hashed:
                verdict.find(
                    f"Row {seq} is another than the one in the checkpoint that you hold: the log was rewritten."
                )
            last_seq, last_hash = seq, hashed
            verdict.rows += 1
        if len(rows) < AT_ONCE:
            break
    if held_seq > last_seq:
        verdict.find(
            f"The log ends at row {last_seq}, before row {held_seq} of the checkpoint that you hold: it was cut."
        )
    for seq, statement in statements.items():
        verdict.checkpoints += 1
        if seq > last_seq:
            verdict.find(f"The log ends at row {last_seq}, before row {seq} of its own checkpoint: it was cut.")
        if not _is_signed(statement, server_name, signers):
            verdict.find(f"The signature of the checkpoint at row {seq} is wrong.")
    return verdict


def _read(raw: object) -> Mapping[str, Any]:
    """A checkpoint as it lies there; whoever tampers need not leave JSON behind."""
    try:
        value = orjson.loads(raw) if isinstance(raw, bytes | str) else None
    except orjson.JSONDecodeError:
        value = None
    return value if isinstance(value, dict) else {}


def _bytes(value: object) -> bytes:
    return bytes(value) if isinstance(value, bytes | memoryview) else b""


def _digest(row: Sequence[Any]) -> bytes:
    try:
        return digest(row)
    except (ApiError, TypeError, ValueError):
        return b""  # of no form that this relay writes


def _check_held(verdict: Verdict, server_name: str, held: Mapping[str, Any], signers: Mapping[str, str]) -> int:
    seq = held.get("seq")
    if not isinstance(seq, int) or seq < 1 or _hash_of(held) is None:
        verdict.find("What you hold is not a checkpoint: it has no row number or no hash.")
        return -1
    if held.get("server") != server_name:
        verdict.find("The checkpoint that you hold is of another server.")
    if not _is_signed(held, server_name, signers):
        verdict.find("The key of the checkpoint that you hold is not one of this log: key and log were replaced.")
    return seq


def _is_signed(statement: Mapping[str, Any], server_name: str, signers: Mapping[str, str]) -> bool:
    key_id = statement.get("key_id")
    public = signers.get(key_id) if isinstance(key_id, str) else None
    if public is None or public != statement.get("public"):
        return False
    try:
        key = from_base64(public)
    except BadJson:
        return False
    return len(key) == KEY_BYTES and verify_json(dict(statement), server_name, str(key_id), key)


def _hash_of(statement: Mapping[str, Any]) -> bytes | None:
    text = statement.get("hash")
    if not isinstance(text, str):
        return None
    try:
        return from_base64(text)
    except BadJson:
        return None
