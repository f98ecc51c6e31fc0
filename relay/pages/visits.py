"""Who is looking at a page: the cookie of a visit, and the person who signed in with it.

A guest's cookie is remembered nowhere; signing in makes a new one, of which only the hash is stored. `proved` names the
factors a person gave: a password today, a second factor beside it once there is one. Whether she may still come in is
looked up for each page. A locked or closed account gets a visit that opens the appeal page alone.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from relay.clock import DAY, HOUR, Clock
from relay.db import Database, Query, Tx
from relay.part import Part
from relay.tables import Schema, Table
from relay.web import Request

COOKIE = "relay_visit"
MAX_COOKIE = 100
LIFETIME_MS = 7 * DAY
# What moderators do asks for the password once a working day.
FRESH_MS = 12 * HOUR
MAX_VISITS_OF_ONE = 20
SWEEP_SECONDS = 3_600.0
PASSWORD = "password"
ACCOUNT, APPEAL = "account", "appeal"


@dataclass(slots=True, frozen=True)
class Visit:
    """`cookie` is what the browser holds; `user_id` is empty for a guest. `opens` is ACCOUNT or APPEAL."""

    cookie: str
    user_id: str = ""
    opens: str = ACCOUNT
    admin: bool = False
    suspended: bool = False
    proved_ts: int = 0
    proved: frozenset[str] = frozenset()
    new: bool = False

    @property
    def signed_in(self) -> bool:
        return bool(self.user_id)

    def is_fresh(self, now: int) -> bool:
        return now - self.proved_ts < FRESH_MS


class Visits(Part):
    schema = Schema(
        "visits",
        tables=(
            Table(
                "visits",
                "a browser that is signed in to the relay's pages",
                {
                    "hash": ("SHA-256 of the cookie", "until she signs out, a week at most"),
                    "user_id": ("whose it is", "until she signs out, a week at most"),
                    "opens": ("account, or appeal for an account that is locked or closed", "as long as the row"),
                    "proved": ("by which factors she proved who she is", "as long as the row"),
                    "proved_ts": ("when she did, since the desk asks again after a day", "as long as the row"),
                    "expires_ts": ("when it ends", "as long as the row"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE visits (
                hash BYTES PRIMARY KEY, user_id TEXT NOT NULL, opens TEXT NOT NULL, proved TEXT NOT NULL,
                proved_ts BIGINT NOT NULL, expires_ts BIGINT NOT NULL);
            CREATE INDEX visits_by_user ON visits (user_id, expires_ts)
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock

    async def of(self, request: Request) -> Visit:
        """The visit of a request; a guest's where its cookie is unknown, with a new cookie where it has none."""
        cookie = request.http.cookies.get(COOKIE, "")
        if not cookie or len(cookie) > MAX_COOKIE or not cookie.isascii():
            return Visit(_new_cookie(), new=True)
        row = await self._db.read(_find, sha256(cookie.encode()).digest(), self._clock.now())
        if row is None:
            return Visit(cookie)
        user_id, opens, proved, proved_ts, admin, deactivated, locked, suspended = row
        if opens == ACCOUNT and (deactivated or locked):
            return Visit(cookie)
        return Visit(
            cookie, user_id, opens, bool(admin) and opens == ACCOUNT, bool(suspended), proved_ts, frozenset(proved.split())
        )  # fmt: skip

    async def begin(
        self, user_id: str, proved: frozenset[str], opens: str = ACCOUNT, *, require: Callable[[Tx], None] | None = None
    ) -> Visit:
        """Signs a browser in, with a cookie of its own; the person's oldest visits end where there are too many. `require` adds what
        must still hold in that write."""
        cookie, now = _new_cookie(), self._clock.now()
        with self._db.write() as tx:
            if require is not None:
                require(tx)
            tx.run("DELETE FROM visits WHERE expires_ts <= $1", now)
            tx.run(
                "DELETE FROM visits WHERE hash IN"
                " (SELECT hash FROM visits WHERE user_id = $1 ORDER BY expires_ts DESC LIMIT 1000 OFFSET $2)",
                user_id,
                MAX_VISITS_OF_ONE - 1,
            )
            tx.run(
                "INSERT INTO visits (hash, user_id, opens, proved, proved_ts, expires_ts) VALUES ($1, $2, $3, $4, $5, $6)",
                sha256(cookie.encode()).digest(),
                user_id,
                opens,
                " ".join(sorted(proved)),
                now,
                now + LIFETIME_MS,
            )
        await tx
        return Visit(cookie, user_id, opens, proved_ts=now, proved=proved, new=True)

    async def run(self) -> None:
        """Those that are over leave no trace, also where nobody signs in any more."""
        while True:
            with self._db.write() as tx:
                tx.run("DELETE FROM visits WHERE expires_ts <= $1", self._clock.now())
            await tx
            await self._clock.sleep(SWEEP_SECONDS)

    async def end(self, visit: Visit) -> None:
        with self._db.write() as tx:
            tx.run("DELETE FROM visits WHERE hash = $1", sha256(visit.cookie.encode()).digest())
        await tx

    def end_all(self, tx: Tx, user_id: str) -> None:
        """Of one person: her password changed, or her account was closed."""
        tx.run("DELETE FROM visits WHERE user_id = $1", user_id)


def _find(query: Query, digest: bytes, now: int) -> tuple[str, str, str, int, int, int, int, int] | None:
    return query.one(
        "SELECT v.user_id, v.opens, v.proved, v.proved_ts, u.admin, u.deactivated, u.locked, u.suspended"
        " FROM visits v JOIN users u ON u.user_id = v.user_id WHERE v.hash = $1 AND v.expires_ts > $2",
        digest,
        now,
    )


def _new_cookie() -> str:
    return secrets.token_urlsafe(32)
