"""User-interactive authentication: a person proves once more who she is before something that can't be undone.

What was begun stands in memory, bounded, and is bound to the person, the method and the path; after a restart a client
simply begins again. Spec: client-server-api/#user-interactive-authentication-api.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from relay.accounts.users import Users
from relay.clock import MINUTE, Clock
from relay.errors import ApiError, Forbidden, Unauthorized
from relay.ids import random_string
from relay.limits import Limits
from relay.web import Request, get_object, get_optional_string, get_string

PASSWORD = "m.login.password"
DUMMY = "m.login.dummy"
REGISTRATION_TOKEN = "m.login.registration_token"
PASSWORD_ONLY = ((PASSWORD,),)

MAX_BEGUN = 5_000
LIFETIME_MS = 15 * MINUTE
# Of one begun: every second for as long as it lives.
MAX_ASKED = 900
SESSION_LENGTH = 24

Flows = Sequence[Sequence[str]]


class KnowsTokens(Protocol):
    async def valid(self, token: str) -> bool: ...


@dataclass(slots=True, frozen=True)
class UiaResult:
    """`body` is the request's body without `auth`, or that of the first request where the client repeats only `auth`."""

    completed: tuple[str, ...]
    body: dict[str, Any]
    registration_token: str | None = None


@dataclass(slots=True)
class _Begun:
    session: str
    user_id: str | None
    operation: tuple[str, str]
    body: dict[str, Any]
    until: int
    completed: list[str] = field(default_factory=list)
    registration_token: str | None = None
    # Why the last try failed, for whoever asks again without another: Element shows only what the latest answer says.
    failure: Forbidden | None = None
    # How often somebody only asked what is left.
    asked: int = 0


class AuthenticationNeeded(Unauthorized):
    """Says what is left to do; without an errcode as long as nothing went wrong."""

    def __init__(self, begun: _Begun, flows: Flows, failure: ApiError | None = None) -> None:
        super().__init__(failure.text if failure is not None else "Prove who you are.")
        self._failure = failure
        self.extra = {
            "flows": [{"stages": list(flow)} for flow in flows],
            "params": {},
            "session": begun.session,
        }
        if begun.completed or failure is not None:
            self.extra["completed"] = list(begun.completed)
        if failure is not None:
            self.errcode = failure.errcode

    def body(self) -> dict[str, Any]:
        return {**self.extra, "errcode": self.errcode, "error": self.text} if self._failure is not None else self.extra


class OtherAccount(ApiError):
    """Not a step that failed and may be tried again: the proof is of somebody else."""

    status = 403
    errcode = "M_FORBIDDEN"


class Reauth:
    def __init__(self, users: Users, tokens: KnowsTokens, limits: Limits, clock: Clock) -> None:
        self._users = users
        self._tokens = tokens
        self._limits = limits
        self._clock = clock
        # By session ID, oldest first; dropped when it succeeds or is too old.
        self._begun: dict[str, _Begun] = {}

    async def require(
        self, request: Request, stages: Flows = PASSWORD_ONLY, *, user_id: str | None = None
    ) -> UiaResult:
        """Returns once one of the flows `stages` is complete. Raises AuthenticationNeeded.

        `user_id` is whose password counts; by default that of the caller. A service has proved itself by its token.
        Spec: application-service-api/#server-admin-style-permissions, #device-management.
        """
        if request.caller is not None and request.caller.service:
            return UiaResult((), {key: value for key, value in request.optional_json().items() if key != "auth"})
        if user_id is None and request.caller is not None:
            user_id = request.caller.user_id
        body = dict(request.optional_json())
        # Some clients send null where they have nothing yet.
        auth = get_object({"auth": body.pop("auth", None) or {}}, "auth")
        begun = self._find(request, user_id, body, get_optional_string(auth, "session")) or self._begin(
            request, user_id, body
        )
        stage = get_optional_string(auth, "type")
        if stage is not None and stage not in begun.completed:
            await self._complete(begun, stage, auth, stages)
        if not any(tuple(flow) == tuple(begun.completed) for flow in stages):
            raise AuthenticationNeeded(begun, stages, begun.failure)
        self._begun.pop(begun.session, None)
        return UiaResult(tuple(begun.completed), body or begun.body, begun.registration_token)

    def asks_what_is_left(self, request: Request) -> bool:
        """Whether nothing is tried: what was begun is asked for again, word for word, without a step.

        Some clients ask so every two seconds while a person looks for what the next step wants.
        """
        body = dict(request.optional_json())
        auth = body.pop("auth", None)
        if not isinstance(auth, dict) or "type" in auth or not isinstance(session := auth.get("session"), str):
            return False
        begun = self._find(request, None, body, session)
        if begun is None or (body and body != begun.body):
            return False
        begun.asked += 1
        return begun.asked <= MAX_ASKED

    def _find(self, request: Request, user_id: str | None, body: dict[str, Any], session: str | None) -> _Begun | None:
        begun = self._begun.get(session) if session is not None else None
        if begun is None or begun.until <= self._clock.now():
            return None
        if (begun.user_id, begun.operation) != (user_id, _operation(request)):
            return None
        # What a person confirms must not be changed under her hand. Registering proves nothing about anybody, and
        # there a client may correct a name that turned out to be taken.
        return begun if user_id is None or not body or body == begun.body else None

    def _begin(self, request: Request, user_id: str | None, body: dict[str, Any]) -> _Begun:
        now = self._clock.now()
        for session, begun in list(self._begun.items()):
            if begun.until > now and len(self._begun) < MAX_BEGUN:
                break
            del self._begun[session]
        begun = _Begun(random_string(SESSION_LENGTH), user_id, _operation(request), body, now + LIFETIME_MS)
        self._begun[begun.session] = begun
        return begun

    async def _complete(self, begun: _Begun, stage: str, auth: dict[str, Any], flows: Flows) -> None:
        done = len(begun.completed)
        if not any(list(flow[:done]) == begun.completed and len(flow) > done and flow[done] == stage for flow in flows):
            raise AuthenticationNeeded(begun, flows, Forbidden(f"The step {stage} is not the next one here."))
        try:
            if stage == PASSWORD:
                await self._password(begun, auth)
            elif stage == REGISTRATION_TOKEN:
                await self._registration_token(begun, auth)
            elif stage != DUMMY:
                raise Forbidden(f"This server does not know the step {stage}.")
        except Forbidden as failure:
            begun.failure = failure
            raise AuthenticationNeeded(begun, flows, failure) from None
        begun.completed.append(stage)
        begun.failure = None

    async def _password(self, begun: _Begun, auth: dict[str, Any]) -> None:
        if begun.user_id is None:
            raise Forbidden("Nobody is signed in here, so there is no password to ask for.")
        password = get_string(auth, "password")
        meant = self._users.meant_by(auth)
        if meant is not None and meant != begun.user_id:
            raise OtherAccount(
                "This is the name of another account. Give the password of the one you are signed in with."
            )
        self._limits.spend("login", begun.user_id)
        if await self._users.authenticate(begun.user_id, password) is None:
            raise Forbidden("The password is wrong. Try again.")

    async def _registration_token(self, begun: _Begun, auth: dict[str, Any]) -> None:
        token = get_string(auth, "token")
        if not await self._tokens.valid(token):
            raise Forbidden(
                "This registration token is not valid, or used up. Ask whoever gave it to you for another one."
            )
        begun.registration_token = token


def _operation(request: Request) -> tuple[str, str]:
    return request.http.method, request.http.rel_url.raw_path
