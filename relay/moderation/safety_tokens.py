"""Who may use the API of moderation, and for what: a moderator's session for everything, a token of hers for some of it.

A token is made by a moderator for a program or a second device, carries scopes, and counts a day after it was made: whoever
steals a session for an hour gets none. It acts in her name, as a person; a signature of an integration is a machine.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from relay.callers import Sessions
from relay.clock import DAY, Clock
from relay.db import Database, Query, Tx
from relay.errors import Forbidden, InvalidParam, MissingToken, NotFound, UnknownToken, UserLocked
from relay.moderation.audit_log import AuditLog
from relay.moderation.key_list import KeyList
from relay.moderation.persons import Persons
from relay.part import Part
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, get_list, get_string

BASE = "/_relay/safety/v1"
SCOPES = ("reports:read", "reports:decide", "evidence:read", "users:act", "federation:write", "audit:read")
MARK = "rsafe_"
COUNTS_AFTER = DAY
LASTS = 365 * DAY
MAX_TOKENS = 50
MAX_NAME = 60
MAX_TOKEN = 100
_LIFE = "until it is taken back or expires"


@dataclass(frozen=True, slots=True)
class Asking:
    """Who calls. `session` where it is a moderator's own session, which may do everything."""

    actor: str
    scopes: frozenset[str]
    session: bool


class SafetyTokens(Part):
    schema = Schema(
        "safety_tokens",
        tables=(
            Table(
                "safety_tokens",
                "a moderator's token for the API of moderation",
                {
                    "token_id": ("its name, to take it back", _LIFE),
                    "hash": ("SHA-256 of the token", _LIFE),
                    "user_id": ("in whose name it acts", _LIFE),
                    "name": ("what she calls it", _LIFE),
                    "scopes": ("what it may do", _LIFE),
                    "counts_ts": ("from when on it counts", _LIFE),
                    "expires_ts": ("until when", _LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE safety_tokens (token_id TEXT PRIMARY KEY, hash BYTES NOT NULL UNIQUE, user_id TEXT NOT NULL, name TEXT NOT NULL,
                scopes TEXT NOT NULL, counts_ts BIGINT NOT NULL, expires_ts BIGINT NOT NULL)
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock, sessions: Sessions, persons: Persons, audit_log: AuditLog) -> None:
        self._db = db
        self._clock = clock
        self._sessions = sessions
        self._persons = persons
        self._audit_log = audit_log

    def routes(self) -> Iterable[Route]:
        yield Route("GET", f"{BASE}/tokens", self._list_route, auth="none")
        yield Route("POST", f"{BASE}/tokens", self._make_route, auth="none")
        yield Route("DELETE", f"{BASE}/tokens/{{tokenId}}", self._delete_route, auth="none")

    # --- who calls

    async def require(self, request: Request, scope: str) -> Asking:
        """Raises MissingToken, UnknownToken, Forbidden."""
        asking = await self._asking(request)
        if scope not in asking.scopes:
            raise Forbidden(f"This token may not do this: it lacks the scope {scope}. Make one that has it.")
        return asking

    async def _require_session(self, request: Request) -> str:
        asking = await self._asking(request)
        if not asking.session:
            raise Forbidden("Tokens are made and taken back with a session of your own, not with another token.")
        return asking.actor

    async def _asking(self, request: Request) -> Asking:
        token = _bearer(request)
        if token is None:
            raise MissingToken("Sign in first: this needs the access token of a moderator.")
        if token.startswith(MARK):
            return await self._by_token(token)
        caller = self._sessions.known(token) or await self._sessions.caller(token)
        if caller.locked:
            raise UserLocked
        await self._require_moderator(caller.user_id)
        return Asking(caller.user_id, frozenset(SCOPES), True)

    async def _require_moderator(self, user_id: str) -> None:
        if not await self._persons.may_act(user_id):
            raise Forbidden("Only moderators of this server, whose accounts are not suspended, may do this.")

    async def _by_token(self, token: str) -> Asking:
        now = self._clock.now()
        row = None
        if len(token) <= MAX_TOKEN:
            row = await self._db.read(
                lambda query: query.one(
                    "SELECT user_id, scopes, counts_ts FROM safety_tokens WHERE hash = $1 AND expires_ts > $2",
                    _hash(token),
                    now,
                )
            )
        if row is None:
            raise UnknownToken("This token is not known here, or its time is over. Make another one.")
        user_id, scopes, counts_ts = row
        if counts_ts > now:
            raise Forbidden("This token counts a day after it was made. Until then use your own session.")
        await self._require_moderator(user_id)
        return Asking(user_id, frozenset(scopes.split()), False)

    # --- making them

    async def make(self, user_id: str, name: str, scopes: Iterable[str]) -> dict[str, Any]:
        chosen = sorted(set(scopes))
        unknown = [one for one in chosen if one not in SCOPES]
        if unknown or not chosen:
            raise InvalidParam(f"The scopes are some of: {', '.join(SCOPES)}.")
        if not 0 < len(name) <= MAX_NAME:
            raise InvalidParam(f"Give the token a name of at most {MAX_NAME} characters, to know it again.")
        token, token_id, now = MARK + secrets.token_urlsafe(32), secrets.token_urlsafe(9), self._clock.now()
        number = await self._db.read(
            lambda query: query.value(
                "SELECT count(*) FROM safety_tokens WHERE user_id = $1 AND expires_ts > $2", user_id, now
            )
        )
        if number >= MAX_TOKENS:
            raise InvalidParam("You have too many tokens. Take one back first.")
        with self._db.write() as tx:
            tx.run("DELETE FROM safety_tokens WHERE expires_ts <= $1", now)
            tx.run(
                "INSERT INTO safety_tokens (token_id, hash, user_id, name, scopes, counts_ts, expires_ts) VALUES ($1, $2, $3, $4, $5, $6, $7)",
                token_id, _hash(token), user_id, name, " ".join(chosen), now + COUNTS_AFTER, now + LASTS,
            )  # fmt: skip
            self._record(tx, user_id, "token.made", token_id, " ".join(chosen))
        await tx
        return {
            "id": token_id,
            "token": token,
            "scopes": chosen,
            "counts_from": now + COUNTS_AFTER,
            "expires": now + LASTS,
        }

    # --- ending them

    def end_all(self, tx: Tx, user_id: str, reason_code: str) -> None:
        """Whoever ends all her sessions, changes her password or loses her rank wants nothing to go on in her name."""

        def end(query: Query) -> None:
            rows = query.all("DELETE FROM safety_tokens WHERE user_id = $1 RETURNING token_id, scopes", user_id)
            for token_id, scopes in rows:
                self._audit_log.record_found(
                    query, actor=user_id, action="token.taken_back", target=token_id, reason_code=reason_code,
                    detail={"scopes": scopes},
                )  # fmt: skip

        tx.call(end)

    def sweep(self, tx: Tx) -> None:
        tx.run("DELETE FROM safety_tokens WHERE expires_ts <= $1", self._clock.now())

    async def keys_changed(self, before: KeyList | None, after: KeyList) -> None:
        """`ModeratorKeys.on_change`: of those who are no moderators any more."""
        listed = {one.user_id for one in after.keys}
        gone = {one.user_id for one in before.keys} - listed if before is not None else set()
        if gone - set(await self._persons.moderators()):
            with self._db.write() as tx:
                for user_id in sorted(gone):
                    self.end_all(tx, user_id, "moderates_no_more")
            await tx

    def _record(self, tx: Tx, actor: str, action: str, token_id: str, scopes: str) -> None:
        self._audit_log.record(
            tx, actor=actor, action=action, target=token_id, reason_code="api", detail={"scopes": scopes}
        )

    async def _make_route(self, request: Request) -> Answer:
        actor = await self._require_session(request)
        body = request.json()
        return await self.make(actor, get_string(body, "name"), [str(one) for one in get_list(body, "scopes")])

    async def _list_route(self, request: Request) -> Answer:
        actor = await self._require_session(request)
        rows = await self._db.read(
            lambda query: query.all(
                "SELECT token_id, name, scopes, counts_ts, expires_ts FROM safety_tokens WHERE user_id = $1 ORDER BY counts_ts",
                actor,
            )
        )
        return {
            "tokens": [
                {"id": token_id, "name": name, "scopes": scopes.split(), "counts_from": counts, "expires": expires}
                for token_id, name, scopes, counts, expires in rows
            ]
        }

    async def _delete_route(self, request: Request) -> Answer:
        actor, token_id = await self._require_session(request), request.params["tokenId"]
        known = await self._db.read(
            lambda query: query.value(
                "SELECT scopes FROM safety_tokens WHERE token_id = $1 AND user_id = $2", token_id, actor
            )
        )
        if known is None:
            raise NotFound("You have no such token.")
        with self._db.write() as tx:
            tx.run("DELETE FROM safety_tokens WHERE token_id = $1 AND user_id = $2", token_id, actor)
            self._record(tx, actor, "token.taken_back", token_id, known)
        await tx
        return {}


def _bearer(request: Request) -> str | None:
    kind, _, token = request.http.headers.get("Authorization", "").partition(" ")
    return token.strip() or None if kind.lower() == "bearer" else None


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
