"""Locked and suspended accounts: who may set it, and what a suspended person still may do. Also who is signed in where.

A locked account can't be used at all (`web.py` refuses, logging out aside); a suspended one reads, leaves rooms and takes
back its own messages. Both are lifted without a trace. Connections are listed without addresses: none are known.
Spec: client-server-api/#account-locking, #account-suspension, #server-administration.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from relay.accounts.account import Account
from relay.accounts.devices import Devices
from relay.accounts.sessions import Sessions
from relay.accounts.users import User, Users
from relay.db import Database, Tx
from relay.doors import OpenDoors
from relay.errors import Forbidden, InvalidParam, MissingParam, NotFound, UserLocked, UserSuspended
from relay.part import Part
from relay.protocol.event import Event
from relay.web import Answer, Request, Route, get_bool

MEMBER = "m.room.member"
REDACTION = "m.room.redaction"


class Restrained:
    """The accounts that are locked or suspended: few, so all of them are in memory. `take` is the write's other half."""

    def __init__(self, users: Users) -> None:
        self._users = users
        self._known: tuple[set[str], set[str]] | None = None
        self._taken = object()

    async def _all(self) -> tuple[set[str], set[str]]:
        while self._known is None:
            before = self._taken
            rows = await self._users.restrained()
            if self._taken is before:
                self._known = {u.user_id for u in rows if u.locked}, {u.user_id for u in rows if u.suspended}
        return self._known

    async def locked(self, user_id: str) -> bool:
        return user_id in (await self._all())[0]

    async def suspended(self, user_id: str) -> bool:
        return user_id in (await self._all())[1]

    def take(self) -> None:
        """After the commit of a change."""
        self._taken = object()
        self._known = None


class RestrainedDoors(OpenDoors):
    """What a suspended person is kept from, and a locked one's signing in."""

    def __init__(self, restrained: Restrained) -> None:
        self._restrained = restrained
        # Who sent an event; the server sets it. Unknown events have no sender.
        self.sender_of: Callable[[str], Awaitable[str | None]] | None = None

    async def _require_free(self, user_id: str) -> None:
        if await self._restrained.suspended(user_id):
            raise UserSuspended

    async def login(self, user_id: str) -> None:
        if await self._restrained.locked(user_id):
            raise UserLocked

    async def create_room(self, user_id: str, content: dict[str, Any]) -> None:
        await self._require_free(user_id)

    async def invite(self, sender: str, target: str, room_id: str) -> None:
        await self._require_free(sender)

    async def join(self, user_id: str, room_id: str) -> None:
        await self._require_free(user_id)

    async def knock(self, user_id: str, room_id: str) -> None:
        await self._require_free(user_id)

    async def send(self, event: Event) -> None:
        if not await self._restrained.suspended(event.sender):
            return
        leaves = event.type == MEMBER and event.state_key == event.sender and event.membership == "leave"
        if leaves or (event.type == REDACTION and await self._is_own(event)):
            return
        raise UserSuspended

    async def _is_own(self, redaction: Event) -> bool:
        if redaction.redacts is None or self.sender_of is None:
            return False
        return await self.sender_of(redaction.redacts) == redaction.sender

    async def upload(self, user_id: str, size: int) -> None:
        await self._require_free(user_id)

    async def profile(self, user_id: str, field_name: str, value: Any) -> None:
        await self._require_free(user_id)

    async def alias(self, user_id: str, alias: str, room_id: str) -> None:
        await self._require_free(user_id)

    async def publish_room(self, user_id: str, room_id: str) -> None:
        await self._require_free(user_id)


class Moderated(Part):
    def __init__(
        self,
        db: Database,
        users: Users,
        sessions: Sessions,
        devices: Devices,
        account: Account,
        restrained: Restrained,
    ) -> None:
        self._db = db
        self._users = users
        self._sessions = sessions
        self._devices = devices
        self._account = account
        self._restrained = restrained
        # Who changes what for whom (actor, "lock" or "suspend", user, on or off); the server sets it to the moderators'
        # actions, which write it into their log.
        self.through: Callable[[str, str, str, bool], Awaitable[None]] | None = None

    def routes(self) -> Iterable[Route]:
        admin = "/_matrix/client/v1/admin"
        yield Route("GET", f"{admin}/lock/{{userId}}", self._get_lock)
        yield Route("PUT", f"{admin}/lock/{{userId}}", self._put_lock)
        yield Route("GET", f"{admin}/suspend/{{userId}}", self._get_suspend)
        yield Route("PUT", f"{admin}/suspend/{{userId}}", self._put_suspend)
        yield Route("GET", "/_matrix/client/v3/admin/whois/{userId}", self._whois)

    def commands(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {"user.lock": self.lock_command, "user.suspend": self.suspend_command}

    # --- setting

    async def set_locked(self, user_id: str, locked: bool, *, also: Callable[[Tx], None] | None = None) -> None:
        """`also` adds to the same write."""

        def take() -> None:
            self._restrained.take()
            self._sessions.take_locked(user_id, locked)

        with self._db.write() as tx:
            self._users.set_locked(tx, user_id, locked)
            if also is not None:
                also(tx)
            tx.after(take)
        await tx

    async def set_suspended(self, user_id: str, suspended: bool, *, also: Callable[[Tx], None] | None = None) -> None:
        def take() -> None:
            self._restrained.take()
            self._sessions.forget(user_id)  # an administrator has no rank meanwhile

        with self._db.write() as tx:
            self._users.set_suspended(tx, user_id, suspended)
            if also is not None:
                also(tx)
            tx.after(take)
        await tx

    async def change(self, actor: str, measure: str, user_id: str, on: bool) -> None:
        if self.through is not None:
            await self.through(actor, measure, user_id, on)
        elif measure == "lock":
            await self.set_locked(user_id, on)
        else:
            await self.set_suspended(user_id, on)

    async def lock_command(self, *, user: str, locked: bool = True) -> dict[str, Any]:
        user_id = (await self._account.open_account(user)).user_id
        await self.change("operator", "lock", user_id, locked)
        return {"user_id": user_id, "locked": locked}

    async def suspend_command(self, *, user: str, suspended: bool = True) -> dict[str, Any]:
        user_id = (await self._account.open_account(user)).user_id
        await self.change("operator", "suspend", user_id, suspended)
        return {"user_id": user_id, "suspended": suspended}

    # --- endpoints

    async def _target(self, request: Request) -> User:
        # Who is no administrator learns nothing about who has an account.
        if not request.who.admin:
            raise Forbidden("Only an administrator of this server may ask this.")
        user_id = request.params["userId"]
        if not self._users.is_local(user_id):
            raise InvalidParam("This person has no account on this server. Ask the people who run theirs.")
        user = await self._users.get(user_id)
        if user.deactivated:
            raise NotFound(f"The account {user_id} is closed for good.")
        if user.admin:
            raise Forbidden("An administrator's account can't be locked or suspended. Take the rank away first.")
        return user

    async def _get_lock(self, request: Request) -> Answer:
        return {"locked": (await self._target(request)).locked}

    async def _put_lock(self, request: Request) -> Answer:
        user = await self._target(request)
        locked = _flag(request, "locked")
        await self.change(request.user_id, "lock", user.user_id, locked)
        return {"locked": locked}

    async def _get_suspend(self, request: Request) -> Answer:
        return {"suspended": (await self._target(request)).suspended}

    async def _put_suspend(self, request: Request) -> Answer:
        user = await self._target(request)
        suspended = _flag(request, "suspended")
        await self.change(request.user_id, "suspend", user.user_id, suspended)
        return {"suspended": suspended}

    async def _whois(self, request: Request) -> Answer:
        user_id = request.params["userId"]
        if user_id != request.user_id and not request.who.admin:
            raise Forbidden("Only an administrator of this server may ask this about somebody else.")
        if not await self._users.exists(user_id):
            raise NotFound(f"There is no account {user_id} on this server.")
        devices = {}
        for device in await self._devices.list(user_id):
            # The day is all that is kept; addresses and user agents are not known to begin with.
            connections = [] if device.last_seen_day is None else [{"last_seen": device.last_seen_day}]
            devices[device.device_id] = {"sessions": [{"connections": connections}]}
        return {"user_id": user_id, "devices": devices}


def _flag(request: Request, name: str) -> bool:
    body = request.json()
    if name not in body:
        raise MissingParam(f"The key {name} is missing: true or false.")
    return get_bool(body, name, False)
