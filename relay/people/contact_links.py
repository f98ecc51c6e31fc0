"""Contact links: an address that a person gives away, and with which a stranger may invite her.

A link is good for one stranger or for many, and can be revoked; what it lets through is a pass for one user ID, for a
while. Links carry no name and no text. The page behind the address is `pages/contact.py`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from relay.clock import DAY, Clock
from relay.db import Database, Query, Tx
from relay.errors import ApiError, Forbidden, InvalidParam, NotFound
from relay.ids import is_typed_user_id
from relay.part import Part
from relay.tables import Schema, Table

MAX_LINKS = 50
MAX_PASSES_OF_LINK = 500
MAX_TOKEN = 64
SWEEP_SECONDS = 3_600.0
PASS_LIFETIME_MS = 30 * DAY
GONE = "This contact link is not valid any more. Ask whoever gave it to you for a new one."


@dataclass(slots=True, frozen=True)
class Link:
    token: str
    once: bool
    passes: int
    made_day: int


class ContactLinks(Part):
    schema = Schema(
        "contact_links",
        tables=(
            Table(
                "contact_links",
                "an address with which strangers may invite a person",
                {
                    "token": ("the address itself, which its owner gives away again", "until she revokes it"),
                    "user_id": ("whom it leads to", "until she revokes it"),
                    "once": ("whether it is good for one stranger only", "until she revokes it"),
                    "passes": ("how many have used it", "until she revokes it"),
                    "made_day": ("the day it was made, to tell links apart", "until she revokes it"),
                },
            ),
            Table(
                "contact_passes",
                "somebody who used a contact link",
                {
                    "user_id": ("whom she may invite", "a month"),
                    "guest": ("who may", "a month"),
                    "token": ("with which link, so that revoking it takes this back too", "a month"),
                    "until_ts": ("when it ends", "a month"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE contact_links (
                token TEXT PRIMARY KEY, user_id TEXT NOT NULL, once SMALLINT NOT NULL, passes BIGINT NOT NULL,
                made_day BIGINT NOT NULL);
            CREATE INDEX contact_links_of_user ON contact_links (user_id);
            CREATE TABLE contact_passes (
                user_id TEXT NOT NULL, guest TEXT NOT NULL, token TEXT NOT NULL, until_ts BIGINT NOT NULL,
                PRIMARY KEY (user_id, guest));
            CREATE INDEX contact_passes_of_link ON contact_passes (token)
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock

    async def of(self, user_id: str) -> list[Link]:
        rows = await self._db.read(
            lambda query: query.all(
                "SELECT token, once, passes, made_day FROM contact_links WHERE user_id = $1 ORDER BY made_day, token",
                user_id,
            )
        )
        return [Link(token, bool(once), passes, made_day) for token, once, passes, made_day in rows]

    async def make(self, user_id: str, *, once: bool) -> str:
        token = secrets.token_urlsafe(16)
        today = self._clock.now() // DAY * DAY

        def insert(query: Query) -> None:
            count = query.value("SELECT count(*) FROM contact_links WHERE user_id = $1", user_id)
            if count >= MAX_LINKS:
                raise Forbidden(f"You have {count} contact links already. Revoke one that you no longer need first.")
            query.run(
                "INSERT INTO contact_links (token, user_id, once, passes, made_day) VALUES ($1, $2, $3, 0, $4)",
                token,
                user_id,
                int(once),
                today,
            )

        with self._db.write() as tx:
            tx.call(insert)
        await tx
        return token

    async def revoke(self, user_id: str, token: str) -> None:
        """Those who used it and have not invited her yet are strangers again."""

        def delete(query: Query) -> None:
            gone = query.run("DELETE FROM contact_links WHERE token = $1 AND user_id = $2", token, user_id)
            if not gone:
                raise NotFound("You have no such contact link. Perhaps it is revoked already.")
            query.run("DELETE FROM contact_passes WHERE token = $1", token)

        with self._db.write() as tx:
            tx.call(delete)
        await tx

    async def owner(self, token: str) -> str:
        """Whose link it is. Raises NotFound."""
        found = await self._db.read(_find, token) if len(token) <= MAX_TOKEN else None
        if found is None or (found[1] and found[2]):
            raise NotFound(GONE)
        return str(found[0])

    async def use(self, token: str, guest: str) -> str:
        """From now on `guest` may invite the owner, whose user ID is returned."""
        if not is_typed_user_id(guest):
            raise InvalidParam(
                "This is not a Matrix user ID. It looks like @name:server, and your app shows it under its settings."
            )
        owner, now = await self.owner(token), self._clock.now()
        if owner == guest:
            raise ApiError("This is your own contact link. Give it to somebody who should be able to invite you.")

        def use(query: Query) -> None:
            query.run("DELETE FROM contact_passes WHERE until_ts <= $1", now)
            found = _find(query, token)
            known = query.value("SELECT token FROM contact_passes WHERE user_id = $1 AND guest = $2", owner, guest)
            if found is None or (found[1] and found[2] and known != token):
                raise NotFound(GONE)
            if known != token:
                held = query.value("SELECT count(*) FROM contact_passes WHERE token = $1", token)
                if held >= MAX_PASSES_OF_LINK:
                    raise Forbidden("Too many people have used this contact link lately. Ask for another one.")
                query.run("UPDATE contact_links SET passes = passes + 1 WHERE token = $1", token)
            query.run(
                "INSERT INTO contact_passes (user_id, guest, token, until_ts) VALUES ($1, $2, $3, $4)"
                " ON CONFLICT (user_id, guest) DO UPDATE SET token = excluded.token, until_ts = excluded.until_ts",
                owner,
                guest,
                token,
                now + PASS_LIFETIME_MS,
            )

        with self._db.write() as tx:
            tx.call(use)
        await tx
        return owner

    async def has_pass(self, user_id: str, guest: str) -> bool:
        found = await self._db.read(
            lambda query: query.value(
                "SELECT until_ts FROM contact_passes WHERE user_id = $1 AND guest = $2", user_id, guest
            )
        )
        return found is not None and int(found) > self._clock.now()

    async def run(self) -> None:
        while True:
            with self._db.write() as tx:
                tx.run("DELETE FROM contact_passes WHERE until_ts <= $1", self._clock.now())
            await tx
            await self._clock.sleep(SWEEP_SECONDS)

    def forget(self, tx: Tx, user_id: str, erase: bool) -> None:
        """For `Account.on_deactivated`."""
        tx.run("DELETE FROM contact_links WHERE user_id = $1", user_id)
        tx.run("DELETE FROM contact_passes WHERE user_id = $1", user_id)


def _find(query: Query, token: str) -> tuple[str, int, int] | None:
    return query.one("SELECT user_id, once, passes FROM contact_links WHERE token = $1", token)
