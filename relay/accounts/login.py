"""Signing in with a name and a password, or for an application service without one. An unknown name, a closed account and a wrong password look and last the same.

Spec: client-server-api/#legacy-login, #post_matrixclientv3login; application-service-api/#server-admin-style-permissions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from relay.accounts.devices import Devices
from relay.accounts.namespaces import SERVICE_LOGIN, Exclusive, Namespaces, NoNamespaces, of_service
from relay.accounts.reauth import PASSWORD
from relay.accounts.users import User, Users
from relay.db import Database
from relay.doors import Doors
from relay.errors import ApiError, Forbidden, MissingParam
from relay.limits import Limits
from relay.part import Part
from relay.web import Answer, Request, Route, get_bool, get_optional_string, get_string


class Login(Part):
    def __init__(
        self, db: Database, users: Users, devices: Devices, doors: Doors, limits: Limits, public_base_url: str | None
    ) -> None:
        self._db = db
        self._users = users
        self._devices = devices
        self._doors = doors
        self._limits = limits
        self._public_base_url = public_base_url
        # The server sets it to `Services` where there are application services.
        self.namespaces: Namespaces = NoNamespaces()
        # Whether somebody has powers over others here; the server sets it.
        self.moderates: Callable[[str], Awaitable[bool]] | None = None

    def routes(self) -> Iterable[Route]:
        yield Route("GET", "/_matrix/client/v3/login", self._flows_route, auth="none")
        yield Route(
            "POST", "/_matrix/client/v3/login", self._login_route, auth="none", limit="login", for_services=True
        )

    async def _flows_route(self, request: Request) -> Answer:
        return {"flows": [{"type": PASSWORD}, *([{"type": SERVICE_LOGIN}] if self.namespaces.any else [])]}

    async def _login_route(self, request: Request) -> Answer:
        body = request.json()
        kind, service = get_string(body, "type"), of_service(request)
        if kind != SERVICE_LOGIN and kind != PASSWORD:
            raise ApiError(f"This server signs people in with {PASSWORD} only.")
        user_id = self._users.meant_by(body)
        if user_id is None:
            raise MissingParam("The key identifier is missing: it says who signs in.")
        wanted_device = get_optional_string(body, "device_id")
        display_name = get_optional_string(body, "initial_device_display_name")
        refreshable = get_bool(body, "refresh_token", False)
        if kind == SERVICE_LOGIN:
            user = await self._of_service(service, user_id)
        else:
            user = await self._by_password(user_id, get_string(body, "password"))
        await self._doors.login(user_id)
        device_id = await self._devices.choose_id(user_id, wanted_device)
        with self._db.write() as tx:
            self._users.require_unchanged(tx, user)
            issued = self._devices.sign_in(tx, user_id, device_id, display_name, refreshable=refreshable)
        await tx
        return self.signed_in(user_id, device_id, issued.answer())

    async def _by_password(self, user_id: str, password: str) -> User:
        self._limits.spend("login", user_id)
        user = await self._users.authenticate(user_id, password)
        if user is None:
            raise Forbidden("The user name or the password is wrong. Try again.")
        return user

    async def _of_service(self, service: str, user_id: str) -> User:
        if not self.namespaces.acts_for(service, user_id):
            raise Exclusive(f"{user_id} is in none of this service's namespaces, so it can't sign in as them.")
        user = await self._users.find(user_id)
        if user is None or user.deactivated:
            raise Forbidden(f"There is no open account {user_id}. Register it first, with the type {SERVICE_LOGIN}.")
        if (
            self.moderates is not None
            and await self.moderates(user_id)
            and not self.namespaces.is_itself(service, user_id)
        ):
            # Behind a session of hers stand all her powers, whoever opened it.
            raise Exclusive(
                f"{user_id} moderates here, so no service signs in as them. Take them out of its namespace."
            )
        return user

    def signed_in(self, user_id: str, device_id: str, tokens: dict[str, Any]) -> dict[str, Any]:
        answer = {"user_id": user_id, "device_id": device_id, "home_server": self._users.server_name, **tokens}
        if self._public_base_url is not None:
            answer["well_known"] = {"m.homeserver": {"base_url": self._public_base_url}}
        return answer
