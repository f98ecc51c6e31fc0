"""The accounts of this server: who they are, whether they still are, and the hash of each password.

Accounts are never deleted, so that a name is not given to somebody else; a deactivated one keeps only its name.
What a person shows to others is `people/profile`. Spec: appendices/#user-identifiers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relay.accounts.passwords import Passwords
from relay.clock import DAY, Clock
from relay.db import Database, Query, Row, Tx
from relay.errors import ApiError, Forbidden, NotFound
from relay.ids import MAX_ID_BYTES, is_localpart, is_user_id, random_string, server_of
from relay.part import Part
from relay.tables import Schema, Table
from relay.web import get_object, get_optional_string

# Names that are known to be taken; accounts are never deleted, so nothing has to drop them.
MAX_REMEMBERED = 50_000
GENERATED_LOCALPART_LENGTH = 12
OPEN, LEAVING, CLOSED = 0, 1, 2


class InvalidUsername(ApiError):
    errcode = "M_INVALID_USERNAME"


class UserInUse(ApiError):
    errcode = "M_USER_IN_USE"


class UserDeactivated(ApiError):
    status = 403
    errcode = "M_USER_DEACTIVATED"


@dataclass(slots=True, frozen=True)
class User:
    user_id: str
    password_hash: str | None
    admin: bool
    deactivated: bool
    created_day: int
    locked: bool = False
    suspended: bool = False


class Users(Part):
    schema = Schema(
        "users",
        tables=(
            Table(
                "users",
                "an account of this server",
                {
                    "user_id": ("the account's name", "for good: a name is never given to somebody else"),
                    "password_hash": ("argon2id, to log in", "until the account is deactivated"),
                    "admin": ("whether this person runs the server", "until it is changed"),
                    "deactivated": ("0 open, 1 closed and still leaving its rooms, 2 closed", "for good"),
                    "created_day": ("the day it was made, for the operator's list", "for good"),
                    "locked": ("whether a moderator keeps it from being used at all", "until it is unlocked"),
                    "suspended": ("whether a moderator lets it only read", "until it is lifted"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE users (
                user_id TEXT PRIMARY KEY, password_hash TEXT, admin SMALLINT NOT NULL,
                deactivated SMALLINT NOT NULL, created_day BIGINT NOT NULL)
            """,
            """
            ALTER TABLE users ADD COLUMN locked SMALLINT NOT NULL DEFAULT 0;
            ALTER TABLE users ADD COLUMN suspended SMALLINT NOT NULL DEFAULT 0
            """,
        ),
    )

    def __init__(self, db: Database, server_name: str, passwords: Passwords, clock: Clock) -> None:
        self._db = db
        self.server_name = server_name
        self.passwords = passwords
        self._clock = clock
        self._suffix = f":{server_name}"
        self._taken: set[str] = set()
        # After somebody became an administrator, or is none any more.
        self.on_rank: list[Callable[[], None]] = []

    # --- names

    def is_local(self, user_id: str) -> bool:
        return user_id.endswith(self._suffix) and server_of(user_id) == self.server_name

    def full_id(self, name: str) -> str:
        """The user ID that a person means who types a localpart or a whole ID, in any case of letters."""
        name = name.strip()
        localpart = name[1 : -len(self._suffix)] if name.startswith("@") and name.endswith(self._suffix) else name
        return localpart if localpart.startswith("@") else f"@{localpart.lower()}{self._suffix}"

    def meant_by(self, body: Mapping[str, Any]) -> str | None:
        """The account that a login or a password stage names; None where it names none. Raises BadJson, Forbidden.

        Spec: client-server-api/#identifier-types; `user` beside it is the older way.
        """
        identifier = get_object({"identifier": body.get("identifier") or {}}, "identifier")
        if identifier and identifier.get("type") != "m.id.user":
            raise Forbidden("Sign in with your user name: this server knows no e-mail addresses and no phone numbers.")
        name = get_optional_string(identifier or body, "user")
        return None if name is None else self.full_id(name)

    def new_id(self, localpart: str | None, *, reserved: bool = False) -> str:
        """The user ID of a new account. Raises InvalidUsername. Spec: appendices/#user-identifiers.

        `reserved`: an application service asks, whose names customarily begin with an underscore.
        """
        if localpart is None:
            localpart = random_string(GENERATED_LOCALPART_LENGTH).lower()
        if localpart.startswith("@") and localpart.endswith(self._suffix):
            localpart = localpart[1 : -len(self._suffix)]
        if not reserved:
            # People may write their names as they like; a service has to know its own exactly.
            localpart = localpart.lower()
        if not is_localpart(localpart):
            raise InvalidUsername(
                "A user name consists of the letters a-z, digits and . _ = - / + only. Take another one."
            )
        if localpart.startswith("_") and not reserved:
            # Customary for bridges, which claim such names later.
            raise InvalidUsername("A user name does not begin with an underscore. Take another one.")
        user_id = f"@{localpart}{self._suffix}"
        if len(user_id) > MAX_ID_BYTES:
            raise InvalidUsername("This user name is too long. Take a shorter one.")
        return user_id

    # --- reading

    async def find(self, user_id: str) -> User | None:
        return await self._db.read(find, user_id)

    async def get(self, user_id: str) -> User:
        """Raises NotFound."""
        user = await self.find(user_id) if is_user_id(user_id) else None
        if user is None:
            raise NotFound(f"There is no account {user_id} on this server.")
        return user

    async def exists(self, user_id: str) -> bool:
        """Whether this name was ever given here; true for a deactivated account as well."""
        if not self.is_local(user_id):
            return False
        if user_id in self._taken:
            return True
        found = await self.find(user_id) is not None
        if found:
            if len(self._taken) >= MAX_REMEMBERED:
                self._taken.clear()
            self._taken.add(user_id)
        return found

    async def authenticate(self, user_id: str, password: str) -> User | None:
        """The account if the password is hers, in the same time whether it exists or not."""
        user = await self.find(user_id) if self.is_local(user_id) else None
        stored = user.password_hash if user is not None and not user.deactivated else None
        return user if await self.passwords.matches(stored, password) else None

    async def all(self) -> Sequence[User]:
        return await self._db.read(_all)

    # --- writing

    def add(self, tx: Tx, user_id: str, password_hash: str | None, *, admin: bool = False) -> None:
        """The write fails with UserInUse where the name is taken."""
        today = self.today()

        def insert(query: Query) -> None:
            added = query.run(
                "INSERT INTO users (user_id, password_hash, admin, deactivated, created_day)"
                " VALUES ($1, $2, $3, 0, $4) ON CONFLICT (user_id) DO NOTHING",
                user_id,
                password_hash,
                int(admin),
                today,
            )
            if not added:
                raise UserInUse("This user name is taken. Take another one.")

        tx.call(insert)
        if admin:
            tx.after(self._rank_changed)

    def set_password(self, tx: Tx, user_id: str, password_hash: str) -> None:
        tx.run("UPDATE users SET password_hash = $2 WHERE user_id = $1 AND deactivated = 0", user_id, password_hash)

    def set_admin(self, tx: Tx, user_id: str, admin: bool) -> None:
        """The caller also has `sessions.forget(user_id)` run after the commit."""
        tx.run("UPDATE users SET admin = $2 WHERE user_id = $1", user_id, int(admin))
        tx.after(self._rank_changed)

    def _rank_changed(self) -> None:
        for told in self.on_rank:
            told()

    def set_locked(self, tx: Tx, user_id: str, locked: bool) -> None:
        tx.run("UPDATE users SET locked = $2 WHERE user_id = $1", user_id, int(locked))

    def set_suspended(self, tx: Tx, user_id: str, suspended: bool) -> None:
        tx.run("UPDATE users SET suspended = $2 WHERE user_id = $1", user_id, int(suspended))

    async def restrained(self) -> Sequence[User]:
        """The accounts that are locked or suspended."""
        return await self._db.read(
            lambda query: [
                _user(row)
                for row in query.all(f"SELECT {_COLUMNS} FROM users WHERE locked = 1 OR suspended = 1 ORDER BY user_id")
            ]
        )

    def deactivate(self, tx: Tx, user_id: str) -> None:
        tx.run(
            "UPDATE users SET deactivated = $2, password_hash = NULL, admin = 0 WHERE user_id = $1 AND deactivated = $3",
            user_id,
            LEAVING,
            OPEN,
        )

    async def leaving(self) -> Sequence[str]:
        """Closed accounts that may still be in rooms."""
        rows = await self._db.read(lambda query: query.all("SELECT user_id FROM users WHERE deactivated = $1", LEAVING))
        return [user_id for (user_id,) in rows]

    async def has_left(self, user_id: str) -> None:
        with self._db.write() as tx:
            tx.run(
                "UPDATE users SET deactivated = $2 WHERE user_id = $1 AND deactivated = $3", user_id, CLOSED, LEAVING
            )
        await tx

    def require_unchanged(self, tx: Tx, user: User) -> None:
        """The write fails where the account was closed, or its password changed, since `user` was read."""

        def look(query: Query) -> None:
            now = find(query, user.user_id)
            if now is None or now.deactivated:
                raise UserDeactivated("This account has been deactivated.")
            if now.password_hash != user.password_hash:
                raise ApiError(
                    "The password has just been changed. Sign in with the new one.", status=403, errcode="M_FORBIDDEN"
                )

        tx.call(look)

    def today(self) -> int:
        return self._clock.now() // DAY * DAY


_COLUMNS = "user_id, password_hash, admin, deactivated, created_day, locked, suspended"


def find(query: Query, user_id: str) -> User | None:
    row = query.one(f"SELECT {_COLUMNS} FROM users WHERE user_id = $1", user_id)
    return _user(row) if row else None


def _all(query: Query) -> list[User]:
    return [_user(row) for row in query.all(f"SELECT {_COLUMNS} FROM users ORDER BY user_id")]


def _user(row: Row) -> User:
    user_id, stored, admin, deactivated, day, locked, suspended = row
    return User(user_id, stored, bool(admin), bool(deactivated), day, bool(locked), bool(suspended))
