"""Decisions that come from programs: signed with a secret of their own, for one case in one state, and only once.

The signed body says for whom it is meant (`aud`), that it is a decision (`purpose`), which case (`report_id`) in which
version; all are compared. The message's ID is used up in the write of the decision. Whoever signs is a machine: it may
only take what can be taken back, for a day (`acts.py`). A new secret or scope counts after a day, the very first at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from relay.clock import DAY, Clock
from relay.config.hooks import Integration
from relay.db import Database, Query, Tx
from relay.errors import ApiError, BadJson, Forbidden, Unauthorized
from relay.moderation import signatures
from relay.part import Part
from relay.tables import Schema, Table
from relay.web import Request, parse_object

WAITS_MS = DAY
# Longer than a signature is good for.
USED_KEPT_MS = DAY
SWEEP_SECONDS = 3_600.0


@dataclass(frozen=True, slots=True)
class Signed:
    """What an integration has signed. `use_up` belongs into the write of the decision."""

    actor: str
    body: dict[str, Any]
    message_id: str
    _integrations: Integrations

    def use_up(self, tx: Tx) -> None:
        self._integrations.use_up(tx, self.actor, self.message_id)


class UsedUp(ApiError):
    status = 409
    errcode = "M_UNKNOWN"


class Integrations(Part):
    schema = Schema(
        "integrations",
        tables=(
            Table(
                "integration_secrets",
                "since when a program's secret is known",
                {
                    "secret_hash": ("hash of its name, secret and scopes", "until the config names it no more"),
                    "counts_ts": ("from when on it counts", "until the config names it no more"),
                },
            ),
            Table(
                "used_messages",
                "a signed message that was taken and counts no second time",
                {
                    "actor": ("who signed it", "1 d"),
                    "message_id": ("its ID", "1 d"),
                    "used_ts": ("when", "1 d"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE integration_secrets (secret_hash TEXT PRIMARY KEY, counts_ts BIGINT NOT NULL);
            CREATE TABLE used_messages (actor TEXT NOT NULL, message_id TEXT NOT NULL, used_ts BIGINT NOT NULL,
                PRIMARY KEY (actor, message_id)) CLUSTERED
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock, server_name: str, known: Sequence[Integration]) -> None:
        self._db = db
        self._clock = clock
        self._server_name = server_name
        self._known = known
        self._counts_from: dict[str, int] = {}

    async def open(self) -> None:
        """Notes what is new in the config; a day later it counts."""
        now = self._clock.now()
        present = {_hash_of(one, secret) for one in self._known for secret in one.secrets}

        def note(query: Query) -> dict[str, int]:
            before: dict[str, int] = dict(query.all("SELECT secret_hash, counts_ts FROM integration_secrets"))
            for gone in before.keys() - present:
                query.run("DELETE FROM integration_secrets WHERE secret_hash = $1", gone)
            counts = {f: before.get(f, now + WAITS_MS if before else now) for f in present}
            for new in present - before.keys():
                query.run("INSERT INTO integration_secrets (secret_hash, counts_ts) VALUES ($1, $2)", new, counts[new])
            return counts

        with self._db.write() as tx:
            tx.call(note)
        self._counts_from = await tx

    async def run(self) -> None:
        while self._known:
            with self._db.write() as tx:
                tx.run("DELETE FROM used_messages WHERE used_ts < $1", self._clock.now() - USED_KEPT_MS)
            await tx
            await self._clock.sleep(SWEEP_SECONDS)

    @staticmethod
    def is_signed(request: Request) -> bool:
        return signatures.SIGNATURE in request.http.headers

    async def accept(self, request: Request, *, purpose: str, report_id: str, version: int | str, scope: str) -> Signed:
        """Raises Unauthorized, Forbidden, ApiError 409 where the case has moved on. The route lets anybody in."""
        one, message_id = self._signer(request)
        if scope not in one.scopes:
            raise Forbidden(f"The integration {one.name} may not do this: its scopes lack {scope}.")
        body = parse_object(request.body)
        for key, expected in (("aud", self._server_name), ("purpose", purpose), ("report_id", report_id)):
            if body.get(key) != expected:
                raise Forbidden(f"The signed {key} is not the one of this request: it should be {expected}.")
        if "version" not in body:
            raise BadJson("The key version is missing: the case's version that you have seen.")
        if str(body["version"]) != str(version):
            raise ApiError(
                "The case has changed since you looked. Read it again, and decide anew.", status=409, errcode="M_UNKNOWN",
                version=version,
            )  # fmt: skip
        return Signed(f"integration:{one.name}", body, message_id, self)

    def _signer(self, request: Request) -> tuple[Integration, str]:
        now, refused = self._clock.now(), Unauthorized("No integration of this relay has signed this.")
        for one in self._known:
            try:
                message_id, number = signatures.verified_id(request.http.headers, one.secrets, now, request.body)
            except Unauthorized as no:
                refused = no
                continue
            counts_from = self._counts_from.get(_hash_of(one, one.secrets[number]), now + WAITS_MS)
            if counts_from > now:
                raise Forbidden("This secret, or a scope that came with it, is new: it counts a day after it was set.")
            return one, message_id
        raise refused

    def use_up(self, tx: Tx, actor: str, message_id: str) -> None:
        now = self._clock.now()

        def take(query: Query) -> None:
            added = query.run(
                "INSERT INTO used_messages (actor, message_id, used_ts) VALUES ($1, $2, $3) ON CONFLICT (actor, message_id) DO NOTHING",
                actor,
                message_id,
                now,
            )
            if not added:
                raise UsedUp("This message was taken already. Nothing was done a second time.")

        tx.call(take)


def _hash_of(one: Integration, secret: str) -> str:
    return hashlib.sha256(orjson.dumps([one.name, secret, sorted(one.scopes)])).hexdigest()
