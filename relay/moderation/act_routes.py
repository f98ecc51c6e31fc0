"""Measures over the API: take one, see what waits for a second person, confirm or cancel it; what is in force; strikes, flags.

For moderators, with a session or a token that has the scope; only a session counts as a second person. docs/safety-api.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.errors import Forbidden, InvalidParam, MissingParam
from relay.moderation.actions import Actions
from relay.moderation.acts import MEASURES, Act
from relay.moderation.doorkeeping import Doorkeeping
from relay.moderation.restrictions import KINDS, as_json
from relay.moderation.safety_tokens import SafetyTokens
from relay.moderation.statements import parse_reasons
from relay.part import Part
from relay.web import Answer, Request, Route, get_bool, get_optional_string, get_string

BASE = "/_relay/safety/v1"


class ActRoutes(Part):
    def __init__(self, actions: Actions, keeping: Doorkeeping, tokens: SafetyTokens) -> None:
        self._actions = actions
        self._restrictions = keeping.restrictions
        self._flags = keeping.flags
        self._tokens = tokens

    def routes(self) -> Iterable[Route]:
        yield Route("GET", f"{BASE}/measures", self._measures, auth="none")
        yield Route("POST", f"{BASE}/acts", self._take, auth="none")
        yield Route("GET", f"{BASE}/acts", self._waiting, auth="none")
        yield Route("POST", f"{BASE}/acts/{{actId}}/confirm", self._confirm, auth="none")
        yield Route("POST", f"{BASE}/acts/{{actId}}/cancel", self._cancel, auth="none")
        yield Route("GET", f"{BASE}/restrictions", self._in_force, auth="none")
        yield Route("GET", f"{BASE}/users/{{userId}}/strikes", self._strikes, auth="none")
        yield Route("GET", f"{BASE}/flags", self._flagged, auth="none")

    async def _measures(self, request: Request) -> Answer:
        await self._tokens.require(request, "reports:read")
        return {
            "measures": {
                name: {"target": one.target, "reversible": one.reversible, "in_a_room": one.in_a_room}
                for name, one in MEASURES.items()
            }
        }

    async def _take(self, request: Request) -> Answer:
        body = request.json()
        kind = MEASURES.get(get_string(body, "measure"))
        scope = "federation:write" if kind is not None and kind.target == "server" else "users:act"
        actor = (await self._tokens.require(request, scope)).actor
        lasts = body.get("lasts_ms")
        if lasts is not None and type(lasts) is not int:
            raise InvalidParam("The key lasts_ms is a whole number of milliseconds.")
        act = Act(
            get_string(body, "measure"), get_string(body, "target"), actor, get_string(body, "reason_code"),
            get_optional_string(body, "room_id"), get_optional_string(body, "report_id"), lasts_ms=lasts,
            erase=get_bool(body, "erase", False), undo=get_bool(body, "undo", False), reasons=parse_reasons(body, actor),
        )  # fmt: skip
        if act.reasons is None and not act.undo and kind is not None and kind.target in ("user", "event"):
            raise MissingParam(
                "Whoever is concerned has to be told why: give the ground (tos_clause or law_ref) and the facts, in your own words."
            )
        return (await self._actions.take(act)).as_json()

    async def _waiting(self, request: Request) -> Answer:
        await self._tokens.require(request, "reports:read")
        return {"acts": [one.as_json() for one in await self._actions.waiting()]}

    async def _confirm(self, request: Request) -> Answer:
        asking = await self._tokens.require(request, "users:act")
        if not asking.session:
            raise Forbidden(
                "The second person is a person: confirm this with a session of your own, not with a program's token."
            )
        return (await self._actions.confirm(request.params["actId"], asking.actor)).as_json()

    async def _cancel(self, request: Request) -> Answer:
        asking = await self._tokens.require(request, "users:act")
        await self._actions.cancel(request.params["actId"], asking.actor)
        return {}

    async def _in_force(self, request: Request) -> Answer:
        await self._tokens.require(request, "reports:read")
        kind = request.query.get("kind")
        if kind is not None and kind not in KINDS:
            raise InvalidParam(f"The parameter kind is one of: {', '.join(KINDS)}.")
        kinds = KINDS if kind is None else (kind,)
        return {"restrictions": [as_json(one) for k in kinds for one in await self._restrictions.listed(k)]}

    async def _strikes(self, request: Request) -> Answer:
        await self._tokens.require(request, "reports:read")
        strikes = await self._actions.strikes(request.params["userId"])
        return {
            "strikes": [
                {"day": s.given_day, "until": s.until_ts, "reason_code": s.reason_code, "report_id": s.case_id}
                for s in strikes
            ]
        }

    async def _flagged(self, request: Request) -> Answer:
        await self._tokens.require(request, "reports:read")
        return {"mode": self._flags.mode, "flags": [flag.as_json() for flag in self._flags.listed()]}
