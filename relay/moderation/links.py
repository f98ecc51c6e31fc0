"""One-time links of a report: what each is for, and whose it is. The link alone opens nothing: the page asks who you are.

Only a hash of the token is kept. A receipt of the public form has no person behind it; whoever has the code has the report.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Literal

from relay.clock import DAY, Clock
from relay.db import Database, Query, Tx
from relay.errors import Forbidden, NotFound
from relay.moderation.case_rules import APPEAL_WINDOW
from relay.part import Part
from relay.tables import Schema, Table

Purpose = Literal["report", "appeal", "receipt"]

TOKEN_BYTES = 32
MAX_TOKEN = 100
LASTS = {"report": 14 * DAY, "appeal": APPEAL_WINDOW, "receipt": APPEAL_WINDOW}
_LIFE = "until it expires or the case is emptied"


@dataclass(frozen=True, slots=True)
class Link:
    case_id: str
    purpose: Purpose
    # Who has to sign in; None for a receipt.
    user_id: str | None
    expires_ts: int

    def require_of(self, user_id: str | None) -> None:
        """Raises Forbidden where the page was opened by another person than the link is for."""
        if self.purpose != "receipt" and (user_id is None or user_id != self.user_id):
            raise Forbidden("This link belongs to another account. Sign in with the account that got it.")


class Links(Part):
    schema = Schema(
        "report_links",
        tables=(
            Table(
                "report_links",
                "a link to a report or a decision, of which only a hash is kept",
                {
                    "hash": ("SHA-256 of the token", _LIFE),
                    "case_id": ("which case", _LIFE),
                    "purpose": ("report, appeal or receipt", _LIFE),
                    "user_id": ("who has to sign in", _LIFE),
                    "expires_ts": ("when it ends", _LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE report_links (hash BYTES PRIMARY KEY, case_id TEXT NOT NULL, purpose TEXT NOT NULL, user_id TEXT,
                expires_ts BIGINT NOT NULL);
            CREATE INDEX report_links_of_case ON report_links (case_id)
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock, base_url: str) -> None:
        self._db = db
        self._clock = clock
        self._base_url = base_url.rstrip("/")

    def make(self, tx: Tx, case_id: str, purpose: Purpose, user_id: str | None) -> str:
        """In the caller's write. Returns the token, which is kept nowhere here."""
        token = secrets.token_urlsafe(TOKEN_BYTES)
        tx.run(
            "INSERT INTO report_links (hash, case_id, purpose, user_id, expires_ts) VALUES ($1, $2, $3, $4, $5)",
            _hash(token),
            case_id,
            purpose,
            user_id,
            self._clock.now() + LASTS[purpose],
        )
        return token

    def address(self, purpose: Purpose, token: str) -> str:
        return f"{self._base_url}/_relay/{'appeal' if purpose == 'appeal' else 'report'}/{token}"

    def of_desk(self, case_id: str | None = None) -> str:
        return f"{self._base_url}/_relay/desk" + (f"/case/{case_id}" if case_id else "")

    async def look(self, token: str) -> Link:
        """Raises NotFound, the same for an unknown one and one that is over."""
        row = None
        if 0 < len(token) <= MAX_TOKEN:
            row = await self._db.read(_find, _hash(token))
        if row is None or row.expires_ts <= self._clock.now():
            raise NotFound(
                "This link is not known here, or its time is over. A newer one may stand in your notice room."
            )
        return row

    def forget(self, tx: Tx, case_id: str) -> None:
        tx.run("DELETE FROM report_links WHERE case_id = $1", case_id)

    def forget_of(self, tx: Tx, case_id: str, user_id: str | None) -> None:
        """Those of one person; of None, the receipts."""
        tx.run("DELETE FROM report_links WHERE case_id = $1 AND coalesce(user_id, '') = $2", case_id, user_id or "")

    def sweep(self, tx: Tx) -> None:
        tx.run("DELETE FROM report_links WHERE expires_ts <= $1", self._clock.now())


def _find(query: Query, hashed: bytes) -> Link | None:
    row = query.one("SELECT case_id, purpose, user_id, expires_ts FROM report_links WHERE hash = $1", hashed)
    return Link(*row) if row is not None else None


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
