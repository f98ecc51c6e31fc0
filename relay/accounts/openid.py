"""OpenID tokens: with one, a person shows another service who she is, and nothing else can be done with it.

They live an hour, in memory and as hashes; after a restart a client asks for a new one. The service exchanges it at the
federation API (`federation/openid.py`). Spec: client-server-api/#openid.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from hashlib import sha256

from relay.accounts.users import Users
from relay.clock import HOUR, SECOND, Clock
from relay.errors import Forbidden, UnknownToken
from relay.part import Part
from relay.web import Answer, Request, Route

LIFETIME_MS = HOUR
MAX_TOKENS = 20_000
MAX_TOKENS_PER_USER = 50


class OpenId(Part):
    def __init__(self, users: Users, clock: Clock) -> None:
        self._users = users
        self._clock = clock
        # By hash: (user, when it ends), oldest first; dropped when it ends, or when there are too many.
        self._tokens: dict[bytes, tuple[str, int]] = {}
        self._of_user: dict[str, list[bytes]] = {}

    def routes(self) -> Iterable[Route]:
        yield Route(
            "POST", "/_matrix/client/v3/user/{userId}/openid/request_token", self._request_token, limit="messages"
        )

    async def _request_token(self, request: Request) -> Answer:
        if request.params["userId"] != request.user_id:
            raise Forbidden("You can ask for a token for yourself only.")
        request.optional_json()
        token = f"sro_{secrets.token_urlsafe(32)}"
        self._add(request.user_id, sha256(token.encode()).digest())
        return {
            "access_token": token,
            "token_type": "Bearer",
            "matrix_server_name": self._users.server_name,
            "expires_in": LIFETIME_MS // SECOND,
        }

    def _add(self, user_id: str, digest: bytes) -> None:
        now = self._clock.now()
        while self._tokens:
            oldest = next(iter(self._tokens))
            if self._tokens[oldest][1] > now and len(self._tokens) < MAX_TOKENS:
                break
            self._drop(oldest)
        mine = self._of_user.setdefault(user_id, [])
        mine.append(digest)
        self._tokens[digest] = (user_id, now + LIFETIME_MS)
        if len(mine) > MAX_TOKENS_PER_USER:
            self._drop(mine[0])

    def _drop(self, digest: bytes) -> None:
        user_id, _ = self._tokens.pop(digest)
        mine = self._of_user[user_id]
        mine.remove(digest)
        if not mine:
            del self._of_user[user_id]

    async def owner(self, token: str) -> str:
        """Whose token it is. Raises UnknownToken."""
        user_id, ends = self._tokens.get(sha256(token.encode(errors="surrogatepass")).digest(), ("", 0))
        user = await self._users.find(user_id) if ends > self._clock.now() else None
        if user is None or user.deactivated or user.locked:
            raise UnknownToken("This OpenID token is unknown or has expired. Ask your client for a new one.")
        return user_id
