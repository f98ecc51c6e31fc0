"""One's own account: who am I, another password, and closing it for good. Also the operator's commands for accounts.

Whoever keeps something for a person adds a function to `on_deactivated`; it runs inside the write that closes the
account. Leaving the rooms comes after it, in `run`, and goes on after a restart. No e-mail address or phone number is
ever kept. Spec: client-server-api/#password-management, #account-deactivation, #current-account-information.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import structlog

from relay.accounts import passwords
from relay.accounts.devices import Devices
from relay.accounts.reauth import Reauth
from relay.accounts.sessions import Sessions
from relay.accounts.users import User, Users
from relay.clock import MINUTE, SECOND
from relay.db import Database, Tx
from relay.errors import ApiError, Forbidden, NotFound
from relay.part import Part
from relay.web import Answer, Request, Route, get_bool, get_string

OnDeactivated = Callable[[Tx, str, bool], None]

LEAVE_RETRY_MS = 10 * MINUTE

log = structlog.get_logger("account")


class Account(Part):
    def __init__(self, db: Database, users: Users, sessions: Sessions, devices: Devices, reauth: Reauth) -> None:
        self._db = db
        self._users = users
        self._sessions = sessions
        self._devices = devices
        self._reauth = reauth
        # Called with the write, the user and whether she asked for erasure.
        self.on_deactivated: list[OnDeactivated] = []
        # Called with the write and the user whose password changes.
        self.on_password_changed: list[Callable[[Tx, str], None]] = []
        # Called with the write and the user who is no administrator any more.
        self.on_rank_lost: list[Callable[[Tx, str], None]] = []
        # Leaves all rooms of a user; the server sets it. Called again until it returns.
        self.leave_rooms: Callable[[str], Awaitable[None]] | None = None
        self._somebody_leaves = asyncio.Event()
        # In the write of what the operator does to an account (write, action, user); the server sets it to the audit log.
        self.noted: Callable[[Tx, str, str], None] | None = None

    def routes(self) -> Iterable[Route]:
        client = "/_matrix/client/v3"
        yield Route("GET", f"{client}/account/whoami", self._whoami_route)
        yield Route("POST", f"{client}/account/password", self._password_route)
        yield Route("POST", f"{client}/account/deactivate", self._deactivate_route)
        yield Route("GET", f"{client}/account/3pid", self._threepids_route)
        for purpose in ("register", "account/password", "account/3pid"):
            for medium in ("email", "msisdn"):
                path = f"{client}/{purpose}/{medium}/requestToken"
                yield Route("POST", path, self._no_threepid_route, auth="none")

    def commands(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {
            "user.add": self.add,
            "user.list": self.all,
            "user.password": self.set_password,
            "user.admin": self.set_admin,
            "user.deactivate": self.deactivate_command,
        }

    async def run(self) -> None:
        """Takes closed accounts out of their rooms."""
        while True:
            self._somebody_leaves.clear()
            unfinished = False
            for user_id in await self._users.leaving():
                unfinished |= not await self._leave(user_id)
            try:
                async with asyncio.timeout(LEAVE_RETRY_MS / SECOND if unfinished else None):
                    await self._somebody_leaves.wait()
            except TimeoutError:
                continue

    async def _leave(self, user_id: str) -> bool:
        try:
            if self.leave_rooms is not None:
                await self.leave_rooms(user_id)
        except Exception as error:
            # Whatever it was, it must stop neither the other accounts nor the server.
            log.warning("a closed account could not leave its rooms yet", user=user_id, exc_info=error)
            return False
        await self._users.has_left(user_id)
        return True

    # --- what both a person and the operator can do

    async def change_password(self, user_id: str, password: str, *, keep: str | None, sign_out: bool) -> None:
        """`keep` is the device that stays signed in; with `sign_out` all others are signed out."""
        password_hash = await self._users.passwords.hash(password)

        def change(tx: Tx) -> None:
            self._users.set_password(tx, user_id, password_hash)
            for told in self.on_password_changed:
                told(tx, user_id)
            tx.after(lambda: self._sessions.forget(user_id))

        if sign_out:
            await self._devices.delete_all(user_id, keep=keep, also=change)
        else:
            with self._db.write() as tx:
                change(tx)
            await tx

    async def deactivate(self, user_id: str, *, erase: bool = False, also: Callable[[Tx], None] | None = None) -> None:
        """`also` adds to the same write."""

        def close(tx: Tx) -> None:
            if also is not None:
                also(tx)
            self._users.deactivate(tx, user_id)
            for told in self.on_deactivated:
                told(tx, user_id, erase)
            # Not only those of the devices that are known by now: one may just be signing in.
            self._sessions.end(tx, user_id)
            tx.after(self._somebody_leaves.set)

        await self._devices.delete_all(user_id, also=close)

    # --- the operator's commands

    async def add(self, *, localpart: str, password: str, admin: bool = False) -> dict[str, Any]:
        user_id = self._users.new_id(localpart)
        passwords.require_acceptable(password)
        password_hash = await self._users.passwords.hash(password)
        with self._db.write() as tx:
            self._users.add(tx, user_id, password_hash, admin=admin)
        await tx
        return {"user_id": user_id, "admin": admin}

    async def all(self) -> list[dict[str, Any]]:
        return [
            {
                "user_id": user.user_id,
                "admin": user.admin,
                "deactivated": user.deactivated,
                "locked": user.locked,
                "suspended": user.suspended,
                "has_password": user.password_hash is not None,
                "created": user.created_day,
            }
            for user in await self._users.all()
        ]

    async def set_password(self, *, user: str, password: str, logout_devices: bool = True) -> dict[str, Any]:
        found = await self.open_account(user)
        passwords.require_acceptable(password)
        await self.change_password(found.user_id, password, keep=None, sign_out=logout_devices)
        return {"user_id": found.user_id}

    async def set_admin(self, *, user: str, admin: bool) -> dict[str, Any]:
        found = await self.open_account(user)
        with self._db.write() as tx:
            self._users.set_admin(tx, found.user_id, admin)
            self._note(tx, "admin" if admin else "undo.admin", found.user_id)
            for told in () if admin else self.on_rank_lost:
                told(tx, found.user_id)
            tx.after(lambda: self._sessions.forget(found.user_id))
        await tx
        return {"user_id": found.user_id, "admin": admin}

    async def deactivate_command(self, *, user: str, erase: bool = False) -> dict[str, Any]:
        found = await self.open_account(user)
        await self.deactivate(found.user_id, erase=erase, also=lambda tx: self._note(tx, "deactivate", found.user_id))
        return {"user_id": found.user_id}

    def _note(self, tx: Tx, action: str, user_id: str) -> None:
        if self.noted is not None:
            self.noted(tx, action, user_id)

    async def open_account(self, name: str) -> User:
        user = await self._users.get(self._users.full_id(name))
        if user.deactivated:
            raise NotFound(f"The account {user.user_id} is closed for good.")
        return user

    # --- endpoints

    async def _whoami_route(self, request: Request) -> Answer:
        device = {"device_id": request.who.device_id} if request.who.device_id else {}
        return {"user_id": request.user_id, **device, "is_guest": False}

    async def _password_route(self, request: Request) -> Answer:
        if request.who.service:
            raise Forbidden("An application service acts for its users without passwords, and gives them none.")
        body = request.optional_json()
        if "new_password" in body:
            passwords.require_acceptable(get_string(body, "new_password"))
        body = (await self._reauth.require(request)).body
        password = get_string(body, "new_password")
        passwords.require_acceptable(password)
        sign_out = get_bool(body, "logout_devices", True)
        await self.change_password(request.user_id, password, keep=request.who.device_id, sign_out=sign_out)
        return {}

    async def _deactivate_route(self, request: Request) -> Answer:
        result = await self._reauth.require(request)
        await self.deactivate(request.user_id, erase=get_bool(result.body, "erase", False))
        return {"id_server_unbind_result": "success"}

    async def _threepids_route(self, request: Request) -> Answer:
        return {"threepids": []}

    async def _no_threepid_route(self, request: Request) -> Answer:
        raise ApiError(
            "This server keeps no e-mail addresses and no phone numbers. Ask its operator for help with your account.",
            errcode="M_THREEPID_MEDIUM_NOT_SUPPORTED",
        )
