"""Sessions: who is behind an access token. A session is one sign-in on one device; its tokens change when it refreshes.

Only hashes of tokens are stored. A refresh makes a new pair beside the old one; the first use of a new pair ends all
others, so a client whose answer got lost simply refreshes again. Of when a device was used, only the day is kept.
Devices themselves are `devices`. Spec: client-server-api/#refreshing-access-tokens, #soft-logout.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from relay.bell import Bell
from relay.clock import DAY, Clock
from relay.db import Database, Query, Tx
from relay.errors import StorageFull, UnknownToken, UserLocked
from relay.part import Part
from relay.tables import Schema, Table
from relay.web import Answer, Caller, Request, Route, get_string

MAX_REMEMBERED = 10_000
# Sessions that ended while a long poll of theirs may still wait; it lasts minutes at most.
MAX_ENDED = 10_000
# New pairs that wait for their first use; a client that refreshes more often loses the oldest.
MAX_PENDING_PAIRS = 4
MAX_TOKEN_LENGTH = 256
ACCESS, REFRESH = 0, 1
UNKNOWN = "This access token is unknown or was revoked. Sign in again."


@dataclass(slots=True, frozen=True)
class Issued:
    """The only moment at which the tokens themselves are known."""

    access_token: str
    refresh_token: str | None
    expires_in_ms: int | None

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = {"access_token": self.access_token}
        if self.refresh_token is not None:
            answer["refresh_token"] = self.refresh_token
        if self.expires_in_ms is not None:
            answer["expires_in_ms"] = self.expires_in_ms
        return answer


@dataclass(slots=True, frozen=True)
class _Found:
    session: int
    pair: int
    confirmed_pair: int
    expires_ts: int | None
    user_id: str
    device_id: str
    last_seen_day: int
    admin: int
    locked: int
    suspended: int

    def caller(self) -> Caller:
        # Whose account is suspended has no rank either, for as long.
        rank = bool(self.admin) and not self.suspended
        return Caller(self.user_id, self.device_id, self.session, rank, bool(self.locked))


class Sessions(Part):
    """Implements `web.Sessions`."""

    schema = Schema(
        "sessions",
        tables=(
            Table(
                "sessions",
                "a device that is signed in",
                {
                    "id": ("the session's number, which stays when its tokens change", "until the device signs out"),
                    "user_id": ("whose session it is", "until the device signs out"),
                    "device_id": ("on which device", "until the device signs out"),
                    "pair": ("which pair of tokens was used last", "until the device signs out"),
                    "last_seen_day": ("the day of its last use, for the list of devices", "until the device signs out"),
                },
            ),
            Table(
                "session_tokens",
                "the hash of a token of a session",
                {
                    "hash": ("SHA-256 of a random token", "until it is replaced or the device signs out"),
                    "session": ("of which session", "until it is replaced or the device signs out"),
                    "pair": (
                        "which access and refresh token belong together",
                        "until it is replaced or the device signs out",
                    ),
                    "kind": ("0 access, 1 refresh", "until it is replaced or the device signs out"),
                    "expires_ts": ("when an access token ends", "until it is replaced or the device signs out"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE sessions (
                id BIGINT PRIMARY KEY, user_id TEXT NOT NULL, device_id TEXT NOT NULL, pair BIGINT NOT NULL,
                last_seen_day BIGINT NOT NULL);
            CREATE UNIQUE INDEX sessions_by_device ON sessions (user_id, device_id);
            CREATE TABLE session_tokens (
                hash BYTES PRIMARY KEY, session BIGINT NOT NULL, pair BIGINT NOT NULL, kind SMALLINT NOT NULL,
                expires_ts BIGINT);
            CREATE INDEX session_tokens_by_session ON session_tokens (session)
            """,
        ),
    )

    def __init__(self, db: Database, bell: Bell, clock: Clock, access_token_lifetime_ms: int) -> None:
        self._db = db
        self._bell = bell
        self._clock = clock
        self._lifetime_ms = access_token_lifetime_ms
        # By token hash: (caller, until when to believe it). Dropped by `end`, `forget` and the confirmation of a new
        # pair, each after its write; an entry never outlives its token or the day.
        self._remembered: dict[bytes, tuple[Caller, int]] = {}
        self._of_user: dict[str, set[bytes]] = {}
        # Counts the drops: what was read before one must not be remembered after it.
        self._drops = 0
        self._ended: dict[int, None] = {}
        # Who was locked while this process runs; whoever was locked before has no request that waits.
        self._locked: set[str] = set()

    def routes(self) -> Iterable[Route]:
        # Without a rate limit: the tokens have 256 random bits, and a household behind one address refreshes together.
        yield Route("POST", "/_matrix/client/v3/refresh", self._refresh_route, auth="none")

    # --- who is calling

    def known(self, token: str) -> Caller | None:
        entry = self._remembered.get(sha256(token.encode()).digest())
        return entry[0] if entry is not None and self._clock.now() < entry[1] else None

    async def caller(self, token: str) -> Caller:
        if len(token) > MAX_TOKEN_LENGTH:
            raise UnknownToken(UNKNOWN)
        digest, drops = sha256(token.encode()).digest(), self._drops
        found = await self._db.read(_find, digest)
        if found is None:
            raise UnknownToken(UNKNOWN)
        now = self._clock.now()
        if found.expires_ts is not None and found.expires_ts <= now:
            raise UnknownToken(
                "This access token has expired. Refresh it, or sign in again on this device.", soft_logout=True
            )
        today = now // DAY * DAY
        try:
            if found.pair != found.confirmed_pair:
                await self._confirm(found, digest)
                drops = self._drops
            if found.last_seen_day != today:
                with self._db.write() as tx:
                    tx.run("UPDATE sessions SET last_seen_day = $2 WHERE id = $1", found.session, today)
                await tx
        except StorageFull:
            # Reading goes on without these notes; they are made when the session is asked for next.
            return found.caller()
        caller = found.caller()
        if drops == self._drops:
            self._remember(digest, caller, min(today + DAY, found.expires_ts or today + DAY))
        return caller

    def require_alive(self, caller: Caller) -> None:
        """For whoever waited a while with a caller in hand, such as a long poll. Raises UnknownToken, UserLocked."""
        if caller.session in self._ended:
            raise UnknownToken(UNKNOWN)
        if caller.user_id in self._locked:
            raise UserLocked

    def take_locked(self, user_id: str, locked: bool) -> None:
        """After the commit that locked or unlocked the account: requests ask anew, and waiting ones look again."""
        if locked:
            self._locked.add(user_id)
        else:
            self._locked.discard(user_id)
        self.forget(user_id)
        self._bell.wake(user_id)

    # --- opening, refreshing, ending

    def open(self, tx: Tx, user_id: str, device_id: str, *, refreshable: bool) -> Issued:
        """A new session in place of the one that this device may have had."""
        self.end(tx, user_id, (device_id,))
        session = pair = tx.pos()
        issued = self._new_tokens(refreshable)
        tx.run(
            "INSERT INTO sessions (id, user_id, device_id, pair, last_seen_day) VALUES ($1, $2, $3, $4, $5)",
            session,
            user_id,
            device_id,
            pair,
            self._clock.now() // DAY * DAY,
        )
        tx.many(_ADD_TOKEN, self._token_rows(issued, session, pair))
        return issued

    async def refresh(self, refresh_token: str) -> Issued:
        """Raises UnknownToken."""
        digest = sha256(refresh_token.encode()).digest()
        issued = self._new_tokens(refreshable=True)
        changed: list[str] = []
        with self._db.write() as tx:
            pair = tx.pos()

            def rotate(query: Query) -> None:
                found = query.one(_FIND_REFRESH, digest, REFRESH)
                if found is None:
                    raise UnknownToken("This refresh token is unknown, was used before, or was revoked. Sign in again.")
                session, used_pair, confirmed_pair, user_id, locked = found
                if locked:
                    raise UserLocked
                if used_pair != confirmed_pair:
                    _keep_only(query, session, used_pair)
                    changed.append(user_id)
                pending = query.all(_PENDING_PAIRS, session, used_pair)
                for (old_pair,) in pending[MAX_PENDING_PAIRS - 1 :]:
                    query.run("DELETE FROM session_tokens WHERE session = $1 AND pair = $2", session, old_pair)
                query.many(_ADD_TOKEN, self._token_rows(issued, session, pair))

            tx.call(rotate)
            tx.after(lambda: self._forget_all(changed))
        await tx
        return issued

    def end(self, tx: Tx, user_id: str, device_ids: Collection[str] | None = None) -> None:
        """Ends the sessions of these devices, or all of this user's. What waits for them is woken after the commit."""
        ended: list[int] = []

        def delete(query: Query) -> None:
            rows = query.all("SELECT id, device_id FROM sessions WHERE user_id = $1", user_id)
            ended.extend(session for session, device_id in rows if device_ids is None or device_id in device_ids)
            for session in ended:
                query.run("DELETE FROM session_tokens WHERE session = $1", session)
                query.run("DELETE FROM sessions WHERE id = $1", session)

        def drop() -> None:
            if not ended:
                return
            for session in ended:
                self._ended[session] = None
            while len(self._ended) > MAX_ENDED:
                del self._ended[next(iter(self._ended))]
            self.forget(user_id)
            self._bell.wake(user_id)

        tx.call(delete)
        tx.after(drop)

    def forget(self, user_id: str) -> None:
        """Drops what is remembered of a user's tokens: the next request of each asks the database again."""
        self._drops += 1
        for digest in self._of_user.pop(user_id, ()):
            self._remembered.pop(digest, None)

    def _forget_all(self, user_ids: Iterable[str]) -> None:
        for user_id in user_ids:
            self.forget(user_id)

    def last_seen(self, query: Query, user_id: str) -> dict[str, int]:
        """Of each signed-in device the day of its last use."""
        return dict(query.all("SELECT device_id, last_seen_day FROM sessions WHERE user_id = $1", user_id))

    # --- inside

    async def _confirm(self, found: _Found, digest: bytes) -> None:
        """A new pair is used for the first time: the others end."""

        def confirm(query: Query) -> None:
            if query.one("SELECT 1 FROM session_tokens WHERE hash = $1", digest) is None:
                raise UnknownToken(UNKNOWN)
            _keep_only(query, found.session, found.pair)

        with self._db.write() as tx:
            tx.call(confirm)
            tx.after(lambda: self.forget(found.user_id))
        await tx

    def _remember(self, digest: bytes, caller: Caller, until: int) -> None:
        if len(self._remembered) >= MAX_REMEMBERED:
            oldest = next(iter(self._remembered))
            owner = self._remembered.pop(oldest)[0].user_id
            self._of_user[owner].discard(oldest)
            if not self._of_user[owner]:
                del self._of_user[owner]
        self._remembered[digest] = (caller, until)
        self._of_user.setdefault(caller.user_id, set()).add(digest)

    def _new_tokens(self, refreshable: bool) -> Issued:
        if not refreshable:
            return Issued(_new_token("sra"), None, None)
        return Issued(_new_token("sra"), _new_token("srr"), self._lifetime_ms or None)

    def _token_rows(self, issued: Issued, session: int, pair: int) -> list[tuple[bytes, int, int, int, int | None]]:
        expires_ts = None if issued.expires_in_ms is None else self._clock.now() + issued.expires_in_ms
        rows: list[tuple[bytes, int, int, int, int | None]] = [
            (sha256(issued.access_token.encode()).digest(), session, pair, ACCESS, expires_ts)
        ]
        if issued.refresh_token is not None:
            rows.append((sha256(issued.refresh_token.encode()).digest(), session, pair, REFRESH, None))
        return rows

    async def _refresh_route(self, request: Request) -> Answer:
        return (await self.refresh(get_string(request.json(), "refresh_token"))).answer()


_ADD_TOKEN = "INSERT INTO session_tokens (hash, session, pair, kind, expires_ts) VALUES ($1, $2, $3, $4, $5)"
_FIND_REFRESH = (
    "SELECT t.session, t.pair, s.pair, s.user_id, u.locked FROM session_tokens t JOIN sessions s ON s.id = t.session"
    " JOIN users u ON u.user_id = s.user_id"
    " WHERE t.hash = $1 AND t.kind = $2"
)
_PENDING_PAIRS = "SELECT DISTINCT pair FROM session_tokens WHERE session = $1 AND pair <> $2 ORDER BY pair DESC"


def _new_token(prefix: str) -> str:
    """A prefix lets a scanner recognise a token that leaked; the rest has 256 random bits."""
    return f"{prefix}_{secrets.token_urlsafe(32)}"


def _find(query: Query, digest: bytes) -> _Found | None:
    row = query.one(
        "SELECT s.id, t.pair, s.pair, t.expires_ts, s.user_id, s.device_id, s.last_seen_day, u.admin, u.locked, u.suspended FROM session_tokens t"
        " JOIN sessions s ON s.id = t.session JOIN users u ON u.user_id = s.user_id"
        " WHERE t.hash = $1 AND t.kind = $2 AND u.deactivated = 0",
        digest,
        ACCESS,
    )
    return _Found(*row) if row else None


def _keep_only(query: Query, session: int, pair: int) -> None:
    query.run("UPDATE sessions SET pair = $2 WHERE id = $1", session, pair)
    query.run("DELETE FROM session_tokens WHERE session = $1 AND pair <> $2", session, pair)
