"""Ban lists of others over the API: which are followed, follow one, follow it no longer. docs/safety-api.md."""

from __future__ import annotations

from collections.abc import Iterable

from relay.errors import InvalidParam
from relay.moderation.list_following import ListFollowing
from relay.moderation.policy_lists import REVIEW, PolicyLists
from relay.moderation.safety_tokens import SafetyTokens
from relay.part import Part
from relay.web import Answer, Request, Route, get_optional_string, get_string

LISTS = "/_relay/safety/v1/lists"
SCOPE = "federation:write"


class ListRoutes(Part):
    def __init__(self, following: ListFollowing, lists: PolicyLists, tokens: SafetyTokens) -> None:
        self._following = following
        self._lists = lists
        self._tokens = tokens

    def routes(self) -> Iterable[Route]:
        yield Route("GET", LISTS, self._followed, auth="none")
        yield Route("POST", LISTS, self._follow, auth="none")
        yield Route("DELETE", f"{LISTS}/{{roomId}}", self._unfollow, auth="none")

    async def _followed(self, request: Request) -> Answer:
        await self._tokens.require(request, "reports:read")
        return {"lists": self._lists.listing()}

    async def _follow(self, request: Request) -> Answer:
        actor = (await self._tokens.require(request, SCOPE)).actor
        body = request.json()
        via = body.get("via", [])
        if not isinstance(via, list) or not all(isinstance(server, str) for server in via):
            raise InvalidParam("The key via is a list of server names.")
        effect = get_optional_string(body, "effect") or REVIEW
        return await self._following.follow(actor, get_string(body, "room_id"), effect, via)

    async def _unfollow(self, request: Request) -> Answer:
        actor = (await self._tokens.require(request, SCOPE)).actor
        return await self._following.unfollow(actor, request.params["roomId"])
