"""Who the application services are, and whom each acts for: behind a token, at a name, at a door.

A service's token stands for its own user or, where the request names one of its namespaces, for that user, and for a
device of theirs; never for somebody who moderates here, whom a namespace covers. Nothing here talks to a service.
Spec: application-service-api/#client-server-api-extensions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from hashlib import sha256

from relay.accounts import users as accounts
from relay.accounts.devices import Devices
from relay.accounts.namespaces import Exclusive
from relay.accounts.users import Users
from relay.appservices.registration import Registration
from relay.clock import Clock
from relay.db import Database, Query
from relay.doors import OpenDoors
from relay.errors import ApiError, Forbidden
from relay.ids import server_of
from relay.web import Caller

# The parameter's name before it was standard.
DEVICE_PARAMETERS = ("device_id", "org.matrix.msc3202.device_id")
# An administrator is told of at once; a moderator's key counts a day after it was listed anyway.
LOOK_AGAIN_SECONDS = 60.0


class Moderating:
    """Who moderates here, as far as services have to know: they act for none of them, and hear nothing on their account."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._looked: float | None = None
        self.people: frozenset[str] = frozenset()
        # The server sets it: moderation is built later.
        self.who: Callable[[], Awaitable[Sequence[str]]] | None = None

    async def look(self) -> frozenset[str]:
        now = self._clock.monotonic()
        if self.who is not None and (self._looked is None or now - self._looked >= LOOK_AGAIN_SECONDS):
            self._looked = now
            self.people = frozenset(await self.who())
        return self.people

    def look_again(self) -> None:
        self._looked = None


class Services:
    """Implements `web.AssertsIdentities` and `accounts.namespaces.Namespaces`."""

    def __init__(
        self, registrations: Sequence[Registration], db: Database, clock: Clock, users: Users, devices: Devices
    ) -> None:
        self.all = tuple(registrations)
        self.moderating = Moderating(clock)
        users.on_rank.append(self.moderating.look_again)
        self._db = db
        self._users = users
        self._devices = devices
        self._server_name = users.server_name
        self._by_token = {_digest(one.as_token): one for one in self.all}
        self._by_id = {one.id: one for one in self.all}
        # Called when a service speaks to us; the server sets it to `Delivery.heard_from`.
        self.heard_from: Callable[[str], None] | None = None

    async def prepare(self) -> None:
        """The services' own accounts, before anybody is answered."""
        for one in self.all:
            user_id = one.sender(self._server_name)
            if not await self._users.exists(user_id):
                with self._db.write() as tx:
                    self._users.add(tx, user_id, None)
                await tx

    # --- names

    @property
    def any(self) -> bool:
        return bool(self.all)

    def get(self, service: str) -> Registration | None:
        return self._by_id.get(service)

    def covers(self, one: Registration, user_id: str) -> bool:
        """Whether the user is the service's by name."""
        return one.acts_for(user_id, self._server_name)

    def owned(self, one: Registration, user_id: str) -> bool:
        """Whether the service is or may be this user."""
        return self.covers(one, user_id) and not self.keeps_off(one, user_id)

    def keeps_off(self, one: Registration, user_id: str) -> bool:
        """Its own user may be made an administrator by the operator, as Draupnir needs it."""
        return user_id in self.moderating.people and user_id != one.sender(self._server_name)

    def reserved(self, user_id: str) -> bool:
        return any(
            one.users.hold_alone(user_id) or user_id == one.sender(self._server_name)
            for one in self.all
            if server_of(user_id) == self._server_name
        )

    def acts_for(self, service: str, user_id: str) -> bool:
        one = self._by_id.get(service)
        return one is not None and self.covers(one, user_id)

    def is_itself(self, service: str, user_id: str) -> bool:
        one = self._by_id.get(service)
        return one is not None and user_id == one.sender(self._server_name)

    def may_make(self, service: str, user_id: str) -> bool:
        others = any(one.id != service and one.users.hold_alone(user_id) for one in self.all)
        return self.acts_for(service, user_id) and not others

    def require_alias(self, who: Caller, alias: str) -> bool:
        """Whether the address belongs to the caller's service. Raises Exclusive where only others may make or remove it."""
        mine = self._by_id.get(who.service)
        if mine is not None and mine.aliases.hold(alias):
            return True
        if mine is not None:
            raise Exclusive(f"{alias} is in none of this service's namespaces. Take another address.")
        return False

    # --- behind a token

    def knows(self, token: str) -> bool:
        return bool(self._by_token) and _digest(token) in self._by_token

    def itself(self, token: str) -> Caller:
        one = self._by_token[_digest(token)]
        return Caller(one.sender(self._server_name), "", 0, service=one.id, limited=False)

    async def caller(self, token: str, query: Mapping[str, str]) -> Caller:
        one = self._by_token[_digest(token)]
        if self.heard_from is not None:
            self.heard_from(one.id)
        sender = one.sender(self._server_name)
        user_id = query.get("user_id") or sender
        if not self.covers(one, user_id):
            raise Forbidden(f"This service can't act for {user_id}: its registration has no namespace for this user.")
        device_id = next((query[name] for name in DEVICE_PARAMETERS if query.get(name)), "")
        user, has_device = await self._db.read(self._look, user_id, device_id)
        if user is None:
            raise Forbidden(
                f"There is no account {user_id} yet. Register it first, with the type m.login.application_service."
            )
        if user.deactivated:
            raise ApiError(f"The account {user_id} is closed for good.", status=403, errcode="M_USER_DEACTIVATED")
        if user_id != sender and (user.admin or user_id in await self.moderating.look()):
            raise Forbidden(
                f"{user_id} moderates here, so no service acts for them. Take them out of namespaces.users in its registration."
            )
        if not has_device:
            raise ApiError(
                f"{user_id} has no device {device_id!r}. Make it first: PUT /_matrix/client/v3/devices/{{deviceId}}.",
                errcode="M_UNKNOWN_DEVICE",
            )
        limited = one.rate_limited and user_id != sender
        rank = user.admin and user_id == sender and not user.suspended
        return Caller(user_id, device_id, 0, rank, user.locked, one.id, limited)

    def _look(self, query: Query, user_id: str, device_id: str) -> tuple[accounts.User | None, bool]:
        has_device = not device_id or device_id in self._devices.ids(query, user_id)
        return accounts.find(query, user_id), has_device


class ServiceDoors(OpenDoors):
    """Addresses that a service has for itself are made by its users only."""

    def __init__(self) -> None:
        # The server sets it: doors are there before accounts.
        self.services: Services | None = None

    async def alias(self, user_id: str, alias: str, room_id: str) -> None:
        if self.services is None:
            return
        holders = [one for one in self.services.all if one.aliases.hold_alone(alias)]
        if holders and not any(self.services.owned(one, user_id) for one in holders):
            raise Exclusive("This address belongs to a bridge or bot of this server. Take another one.")


def _digest(token: str) -> bytes:
    """Compared by digest, so that nobody learns a token by the time that an answer takes."""
    return sha256(token.encode(errors="surrogatepass")).digest()
