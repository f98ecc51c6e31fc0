"""New accounts, where the configuration opens that door: with a token of the operator, or for everybody.

Application services make those of their namespaces without steps and passwords, whatever the mode. Guests are not
served. Spec: client-server-api/#account-registration, application-service-api/#server-admin-style-permissions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from relay.accounts import passwords
from relay.accounts.devices import Devices
from relay.accounts.namespaces import SERVICE_LOGIN, Exclusive, Namespaces, NoNamespaces, of_service
from relay.accounts.reauth import DUMMY, REGISTRATION_TOKEN, Flows, Reauth
from relay.accounts.tokens import RegistrationTokens
from relay.accounts.users import UserInUse, Users
from relay.config import Registration
from relay.db import Database
from relay.doors import Doors
from relay.errors import ApiError, Forbidden, InvalidParam
from relay.limits import Limits
from relay.part import Part
from relay.web import Answer, Request, Route, get_bool, get_optional_string, get_string

# What was asked for waits in memory while a person looks for her token.
MAX_REQUEST_BYTES = 16 * 1024

FLOWS: dict[str, Flows] = {"token": ((REGISTRATION_TOKEN,),), "open_to_everyone": ((DUMMY,),)}


class GuestsRefused(ApiError):
    status = 403
    errcode = "M_GUEST_ACCESS_FORBIDDEN"


class Register(Part):
    def __init__(
        self,
        db: Database,
        users: Users,
        devices: Devices,
        reauth: Reauth,
        tokens: RegistrationTokens,
        doors: Doors,
        registration: Registration,
        limits: Limits,
    ) -> None:
        self._db = db
        self._users = users
        self._devices = devices
        self._reauth = reauth
        self._tokens = tokens
        self._doors = doors
        self._limits = limits
        self._flows = FLOWS.get(registration.mode)
        # Told of each new account, and the token it was made with.
        self.on_made: list[Callable[[str, str | None], None]] = []
        # The server sets it to `Services` where there are application services.
        self.namespaces: Namespaces = NoNamespaces()

    def routes(self) -> Iterable[Route]:
        register = "/_matrix/client/v3/register"
        yield Route("POST", register, self._register_route, auth="none", for_services=True, max_body=MAX_REQUEST_BYTES)
        yield Route("GET", f"{register}/available", self._available_route, auth="none", limit="registration")

    def _require_open(self) -> Flows:
        if self._flows is None:
            raise Forbidden("New accounts are made by the operator of this server. Ask them for one.")
        return self._flows

    async def _available_route(self, request: Request) -> Answer:
        self._require_open()
        await self.require_free(get_string(request.query, "username"))
        return {"available": True}

    async def _register_route(self, request: Request) -> Answer:
        kind = request.query.get("kind", "user")
        if kind == "guest":
            raise GuestsRefused("This server has no guests. Make an account, or ask its operator for one.")
        if kind != "user":
            raise InvalidParam("The parameter kind is user or guest.")
        if (request.caller is None or request.caller.limited) and not self._reauth.asks_what_is_left(request):
            self._limits.spend_at("registration", request.address)
        service = of_service(request)
        if service:
            return await self._register_for(service, request.json())
        flows = self._require_open()
        await self._check(request.optional_json())
        result = await self._reauth.require(request, flows)
        # Another body may have come with the last step than with the first.
        await self._check(result.body)
        return await self.register(result.body, result.registration_token)

    async def _check(self, body: dict[str, Any]) -> None:
        """What can be said before a person goes through the steps is said before."""
        username = get_optional_string(body, "username")
        if username is not None:
            await self.require_free(username)
        password = get_optional_string(body, "password")
        if password is not None:
            passwords.require_acceptable(password)

    async def require_free(self, username: str) -> None:
        """Raises InvalidUsername, UserInUse, Exclusive."""
        user_id = self._users.new_id(username)
        if self.namespaces.reserved(user_id):
            raise Exclusive("This user name belongs to a bridge or bot of this server. Take another one.")
        if await self._users.exists(user_id):
            raise UserInUse("This user name is taken. Take another one.")

    async def _register_for(self, service: str, body: dict[str, Any]) -> dict[str, Any]:
        kind = get_optional_string(body, "type")
        if kind not in (None, SERVICE_LOGIN):
            raise ApiError(f"An application service registers its users with the type {SERVICE_LOGIN}.")
        user_id = self._users.new_id(get_string(body, "username"), reserved=True)
        if not self.namespaces.may_make(service, user_id):
            raise Exclusive(
                f"{user_id} is in none of this service's namespaces, or only another one's. Take another name."
            )
        return await self._make(body, user_id, None, None)

    async def register(self, body: dict[str, Any], token: str | None = None, *, admin: bool = False) -> dict[str, Any]:
        """Makes the account, once its maker has shown that he may. The body is that of /register."""
        user_id = self._users.new_id(get_optional_string(body, "username"))
        password = get_string(body, "password")
        await self._doors.register(user_id)
        return await self._make(body, user_id, await self._users.passwords.hash(password), token, admin=admin)

    async def _make(
        self,
        body: dict[str, Any],
        user_id: str,
        password_hash: str | None,
        token: str | None,
        *,
        admin: bool = False,
    ) -> dict[str, Any]:
        wanted_device = get_optional_string(body, "device_id")
        display_name = get_optional_string(body, "initial_device_display_name")
        refreshable = get_bool(body, "refresh_token", False)
        sign_in = not get_bool(body, "inhibit_login", False)
        device_id = await self._devices.choose_id(user_id, wanted_device)
        answer: dict[str, Any] = {"user_id": user_id, "home_server": self._users.server_name}
        with self._db.write() as tx:
            self._users.add(tx, user_id, password_hash, admin=admin)
            if token is not None:
                spent = token
                tx.call(lambda query: self._tokens.spend(query, spent))
            if sign_in:
                issued = self._devices.sign_in(tx, user_id, device_id, display_name, refreshable=refreshable)
                answer |= {"device_id": device_id, **issued.answer()}
        await tx
        for told in self.on_made:
            told(user_id, token)
        return answer
