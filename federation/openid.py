"""A service asks whose OpenID token it was given. No server and no person signs this request: the token is the proof.

Spec: server-server-api/#openid.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from relay.accounts.openid import OpenId
from relay.errors import MissingToken
from relay.part import Part
from relay.web import Request, Route


class UserInfo(Part):
    def __init__(self, openid: OpenId) -> None:
        self._openid = openid

    def routes(self) -> Iterable[Route]:
        yield Route(
            "GET",
            "/_matrix/federation/v1/openid/userinfo",
            self._userinfo,
            auth="none",
            limit="federation",
            serves="federation",
        )

    async def _userinfo(self, request: Request) -> dict[str, Any]:
        token = request.query.get("access_token")
        if not token:
            raise MissingToken("The parameter access_token is missing: the OpenID token that you were given.")
        return {"sub": await self._openid.owner(token)}
