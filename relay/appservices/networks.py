"""Other networks that services are bridges to: which there are, and how people and places there are called here.

Clients ask when they begin; each question is passed on to the services of that network, and their answers are put
together. Spec: client-server-api/#third-party-networks, application-service-api/#third-party-networks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, urlencode

import orjson

from relay.appservices.asking import APP, QUERY_SECONDS, Asking
from relay.appservices.registration import Registration
from relay.appservices.room_lists import instance_id
from relay.appservices.services import Services
from relay.clock import MINUTE, SECOND, Clock
from relay.errors import BadJson, NotFound, RemoteError
from relay.part import Part
from relay.web import Answer, Request, Route, require_shallow

THIRD_PARTY = "/_matrix/client/v3/thirdparty"
KEPT_SECONDS = 10 * MINUTE / SECOND
MAX_INSTANCES = 1_000
# What of a request is for this relay and not for the other network.
OURS = ("access_token", "user_id", "device_id", "org.matrix.msc3202.device_id")


class Networks(Part):
    def __init__(self, services: Services, asking: Asking, clock: Clock) -> None:
        self._services = services
        self._asking = asking
        self._clock = clock
        # By network, with when it was asked; there are as many as the registrations name.
        self._described: dict[str, tuple[float, dict[str, Any]]] = {}

    def routes(self) -> Iterable[Route]:
        yield Route("GET", f"{THIRD_PARTY}/protocols", self._all)
        yield Route("GET", f"{THIRD_PARTY}/protocol/{{protocol}}", self._one)
        for kind, function in (("location", self._look_up), ("user", self._look_up)):
            yield Route("GET", f"{THIRD_PARTY}/{kind}", function)
            yield Route("GET", f"{THIRD_PARTY}/{kind}/{{protocol}}", function)

    async def _all(self, request: Request) -> Answer:
        names = sorted({name for one in self._services.all for name in one.protocols})
        described = await asyncio.gather(*(self._describe(name) for name in names))
        return {name: found for name, found in zip(names, described, strict=True) if found is not None}

    async def _one(self, request: Request) -> Answer:
        found = await self._describe(request.params["protocol"])
        if found is None:
            raise NotFound("This relay is connected to no network of this name.")
        return found

    async def _describe(self, name: str) -> dict[str, Any] | None:
        """What the services say of a network, their instances together."""
        known = self._described.get(name)
        if known is not None and self._clock.monotonic() - known[0] < KEPT_SECONDS:
            return known[1]
        whole: dict[str, Any] | None = None
        for one in self._of(name):
            said = await self._ask(one, f"/thirdparty/protocol/{quote(name, safe='')}")
            if not isinstance(said, dict):
                continue
            instances = said.get("instances")
            shown = [
                {**instance, "instance_id": instance_id(one.id, instance["network_id"])}
                for instance in (instances if isinstance(instances, list) else [])[:MAX_INSTANCES]
                if isinstance(instance, dict) and isinstance(instance.get("network_id"), str)
            ]
            if whole is None:
                whole = {**said, "instances": shown}
            else:
                whole["instances"] += shown
        if whole is not None:
            self._described[name] = (self._clock.monotonic(), whole)
        return whole

    async def _look_up(self, request: Request) -> Answer:
        """People or places of one network by its fields, or of all by their name here."""
        kind = request.route.path.split("/")[5]
        name = request.params.get("protocol")
        if name is None:
            asked, path = [one for one in self._services.all if one.protocols], f"/thirdparty/{kind}"
        else:
            asked, path = self._of(name), f"/thirdparty/{kind}/{quote(name, safe='')}"
        if not asked:
            raise NotFound("This relay is connected to no network of this name.")
        fields = {key: value for key, value in request.query.items() if key not in OURS}
        answers = await asyncio.gather(*(self._ask(one, f"{path}?{urlencode(fields)}") for one in asked))
        return [entry for said in answers if isinstance(said, list) for entry in said if isinstance(entry, dict)]

    def _of(self, name: str) -> list[Registration]:
        return [one for one in self._services.all if name in one.protocols]

    async def _ask(self, one: Registration, path: str) -> Any:
        if one.url is None:
            return None
        legacy = APP.replace("/v1", "/unstable") + path
        try:
            status, said = await self._asking.say(one, "GET", path, legacy=legacy, timeout=QUERY_SECONDS)
            answer = orjson.loads(said) if status == 200 else None
            require_shallow(answer)
        except (RemoteError, BadJson, orjson.JSONDecodeError):
            return None
        return answer
