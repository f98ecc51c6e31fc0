"""Every refusal that a client, a peer or an operator can meet, raised where it is known and caught once, in `web.py`.

`ApiError` is the standard's error object with its HTTP status (client-server-api/#standard-error-response).
`NotAllowed` and `BadEvent` are verdicts of the pure rules and name the rule. `RemoteError` is another server's fault.
Exceptions without a class here are our own fault and become a 500 without details.
"""

from __future__ import annotations

from typing import Any

# Of a name that another server gave a room version.
MAX_VERSION_NAME = 32


class ApiError(Exception):
    """An answer of the standard's error form. `text` is for a person: it says what to do next."""

    status = 400
    errcode = "M_UNKNOWN"

    def __init__(
        self,
        text: str,
        *,
        status: int | None = None,
        errcode: str | None = None,
        headers: dict[str, str] | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(text)
        self.text = text
        self.status = status if status is not None else type(self).status
        self.errcode = errcode if errcode is not None else type(self).errcode
        self.headers = headers or {}
        self.extra = extra

    def body(self) -> dict[str, Any]:
        return {"errcode": self.errcode, "error": self.text, **self.extra}


class NotJson(ApiError):
    errcode = "M_NOT_JSON"


class BadJson(ApiError):
    errcode = "M_BAD_JSON"


class InvalidParam(ApiError):
    errcode = "M_INVALID_PARAM"


class MissingParam(ApiError):
    errcode = "M_MISSING_PARAM"


class Forbidden(ApiError):
    status = 403
    errcode = "M_FORBIDDEN"


class Refused(Forbidden):
    """The seal says no."""


class Unauthorized(ApiError):
    status = 401
    errcode = "M_UNAUTHORIZED"


class MissingToken(ApiError):
    status = 401
    errcode = "M_MISSING_TOKEN"


class UnknownToken(ApiError):
    status = 401
    errcode = "M_UNKNOWN_TOKEN"


class UserLocked(ApiError):
    """Spec: client-server-api/#account-locking"""

    status = 401
    errcode = "M_USER_LOCKED"

    def __init__(self) -> None:
        super().__init__(
            "This account is locked. Ask the people who run this server; nothing of it is lost.", soft_logout=True
        )


class UserSuspended(ApiError):
    """Spec: client-server-api/#account-suspension"""

    status = 403
    errcode = "M_USER_SUSPENDED"

    def __init__(self) -> None:
        super().__init__(
            "This account is suspended: you can read, leave rooms and take back your messages, and nothing else. "
            "Ask the people who run this server."
        )


class NotFound(ApiError):
    status = 404
    errcode = "M_NOT_FOUND"


class Unrecognized(ApiError):
    status = 404
    errcode = "M_UNRECOGNIZED"


class TooLarge(ApiError):
    status = 413
    errcode = "M_TOO_LARGE"


class LimitExceeded(ApiError):
    """Spec: client-server-api/#rate-limiting. `retry_after` is in seconds."""

    status = 429
    errcode = "M_LIMIT_EXCEEDED"

    def __init__(self, retry_after: float) -> None:
        seconds = max(1, int(retry_after + 0.999))
        super().__init__(
            f"Too many requests. Try again in {seconds} s.",
            headers={"Retry-After": str(seconds)},
            retry_after_ms=int(retry_after * 1000) + 1,
        )


class StorageFull(ApiError):
    """The disk took no more. Nothing that was answered is lost; reading goes on."""

    status = 507
    errcode = "M_UNKNOWN"

    def __init__(self) -> None:
        super().__init__(
            "The server's disk is full, so nothing was saved. Try again later; its operator has to make room."
        )


class NotAllowed(Exception):
    """The authorization rules refuse an event. `rule` is the number in the room version's list."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(f"rule {rule}: {reason}")
        self.rule = rule
        self.reason = reason


class BadEvent(Exception):
    """An event that is not one: format, size or identifiers. It is dropped, never stored."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule
        self.text = text


class RemoteError(Exception):
    """Another server did not answer, or answered something unusable. `status` 0 means that no answer came."""

    def __init__(
        self, server: str, status: int, text: str, errcode: str = "M_UNKNOWN", body: dict[str, Any] | None = None
    ) -> None:
        super().__init__(f"{server}: {status} {errcode} {text}")
        self.server = server
        self.status = status
        self.text = text
        self.errcode = errcode
        self.body = body or {}

    def passed_on(self) -> ApiError | None:
        """Its refusal for our own client; None where it refused nothing, but could not be asked."""
        if self.status not in (400, 403, 404):
            return None
        extra: dict[str, Any] = {}
        version = self.body.get("room_version")
        # Spec: client-server-api/#common-error-codes: clients look there for the version that is not spoken here.
        if self.errcode == "M_INCOMPATIBLE_ROOM_VERSION" and isinstance(version, str):
            extra = {"room_version": version[:MAX_VERSION_NAME]}
        return ApiError(f"{self.server} answered: {self.text}", status=self.status, errcode=self.errcode, **extra)
