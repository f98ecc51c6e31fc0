"""Other servers ask which of a shared room's events lies closest to a moment. Finding it is `relay/rooms/dates.py`'s work.

Spec: server-server-api/#get_matrixfederationv1timestamp_to_eventroomid.
"""

from __future__ import annotations

from collections.abc import Iterable

from federation.asking import Asking
from relay.errors import NotFound
from relay.part import Part
from relay.rooms.dates import Dates, asked
from relay.web import Answer, Request, Route


class DatesAnswers(Part):
    def __init__(self, asking: Asking, dates: Dates) -> None:
        self._asking = asking
        self._dates = dates

    def routes(self) -> Iterable[Route]:
        yield Route(
            "GET", "/_matrix/federation/v1/timestamp_to_event/{roomId}", self._find, auth="server", limit="federation",
            serves="federation",
        )  # fmt: skip

    async def _find(self, request: Request) -> Answer:
        ts, direction = asked(request)
        room = await self._asking.resident(request.origin, request.params["roomId"])
        one = await self._dates.nearest(room, ts, direction)
        if one is None:
            raise NotFound("This server has no event of this room on that side of the time.")
        return {"event_id": one.id, "origin_server_ts": one.event.origin_server_ts}
