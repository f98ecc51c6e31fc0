"""Who is calling: what stands behind an access token, and who can tell. Protocols, and no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True, frozen=True)
class Caller:
    """The session behind an access token. `session` is its row's number, for logout and for idempotency.

    `admin` says whether she has that rank now: not while she is suspended, nor where a service acts for her.
    `service` is the application service that acts for this user, if one does: then there is no session (0), and a device
    only where it named one. `limited` False: its registration spares it the rate limits.
    """

    user_id: str
    device_id: str
    session: int
    admin: bool = False
    locked: bool = False
    service: str = ""
    limited: bool = True


class Sessions(Protocol):
    """Who is behind an access token; `accounts` implements it."""

    def known(self, token: str) -> Caller | None:
        """From memory, or None where the database has to be asked."""
        ...

    async def caller(self, token: str) -> Caller:
        """Raises UnknownToken (soft_logout where it only expired)."""
        ...


class AssertsIdentities(Protocol):
    """Application services, who act for their users; `appservices` implements it.

    Spec: application-service-api/#identity-assertion.
    """

    def knows(self, token: str) -> bool: ...
    def itself(self, token: str) -> Caller:
        """The service's own user, whoever the request names."""
        ...

    async def caller(self, token: str, query: Mapping[str, str]) -> Caller:
        """Whom the request names. Raises Forbidden, ApiError."""
        ...
