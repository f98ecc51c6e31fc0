"""Which names belong to application services: asked where accounts are made and signed in. `appservices` implements it.

Spec: application-service-api/#server-admin-style-permissions.
"""

from __future__ import annotations

from typing import Protocol

from relay.errors import ApiError, MissingToken, UnknownToken
from relay.web import Request, get_optional_string

SERVICE_LOGIN = "m.login.application_service"


class Exclusive(ApiError):
    """A name that is somebody else's to make."""

    errcode = "M_EXCLUSIVE"


class Namespaces(Protocol):
    @property
    def any(self) -> bool:
        """Whether there are services at all."""
        ...

    def reserved(self, user_id: str) -> bool:
        """Whether only a service may make this account."""
        ...

    def acts_for(self, service: str, user_id: str) -> bool: ...
    def is_itself(self, service: str, user_id: str) -> bool:
        """Whether this is the service's own user."""
        ...

    def may_make(self, service: str, user_id: str) -> bool:
        """The same, for an account that is not there yet: another service may have the name for itself."""
        ...


class NoNamespaces:
    """For a relay without application services."""

    any = False

    def reserved(self, user_id: str) -> bool:
        return False

    def acts_for(self, service: str, user_id: str) -> bool:
        return False

    def is_itself(self, service: str, user_id: str) -> bool:
        return False

    def may_make(self, service: str, user_id: str) -> bool:
        return False


def of_service(request: Request) -> str:
    """The service that sends a login or a registration of its kind; "" for everybody else's. Raises the rim's refusals."""
    service = request.caller.service if request.caller is not None else ""
    kind = get_optional_string(request.optional_json(), "type")
    if service or kind != SERVICE_LOGIN:
        return service
    if "Authorization" in request.http.headers or "access_token" in request.query:
        raise UnknownToken(
            "This is not the as_token of an application service of this relay. Check its registration file."
        )
    raise MissingToken("Only an application service signs in this way, and it sends its as_token.")
